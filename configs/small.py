"""VoCo on some hundred CTs of your own: for a GPU of 8 GB, or as small.py:cpu for a CPU.

    python main.py --config configs/small.py --workdir runs/small \\
        --config.data.sources.ct.roots=/data/my_ct

Prepares the folder (default: data/ct) into WORKDIR/cache, holds out one volume in ten for
validation, trains, and exports an encoder of feature size 24, half of voco_10k's. As compiled for
an RTX 3070 a step needs 4.5 GiB, of the 5.6 that JAX takes of 8 GB (`python -m voco_jax.plan
--config configs/small.py --topology rtx3070:1`, jax 0.10.2).
"""

import ml_collections

from configs import voco_10k
from voco_jax.errors import InputError


def get_config(device: str = "gpu") -> ml_collections.ConfigDict:
    """voco_10k on volumes of 192x192x64: a 3x3 grid of crops of 64x64x64.

    Args:
        device: what stands after the colon of --config: gpu, or cpu with crops resized to 32x32x64,
            a quarter of the work; both use the same cache.

    Raises:
        InputError: there is no such device.
    """
    if device not in ("gpu", "cpu"):
        raise InputError(
            f"--config: found device {device!r}, expected gpu or cpu, as in configs/small.py:cpu"
        )
    config = voco_10k.get_config()
    config.total_steps = 20_000
    config.data.sources.ct.cache = "{workdir}/cache"
    config.data.sources.ct.lists = ()
    config.data.sources.ct.roots = ("data/ct",)
    config.data.sources.ct.chain.volume_size = (192, 192, 64)
    config.data.prepare = True
    config.data.held_out = 0.1
    config.crops.grid = (3, 3, 1)
    config.crops.crop_size = (64, 64, 64)
    config.model.feature_size = 24
    config.model.remat = False
    config.model.crops_per_pass = 0
    config.projector_size = 512
    config.optimizer.learning_rate = 5e-4
    config.optimizer.warmup_steps = 200
    config.validation.every_steps = 500
    config.validation.volumes = 16
    config.checkpoint.every_steps = 500
    config.checkpoint.keep_every_steps = 0
    if device == "cpu":
        config.total_steps = 2_000
        config.batch_size = 1
        config.log_every_steps = 10
        config.crops.encoder_size = (32, 32, 64)
        config.model.window_size = (4, 4, 4)
        config.model.dtype = "float32"
        config.checkpoint.every_steps = 100
        config.checkpoint.keep = 1
    return config
