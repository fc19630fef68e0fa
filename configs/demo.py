"""The embedded default: everything at once on phantom CTs, in minutes on two cores.

    python main.py --config configs/demo.py --workdir runs/demo

Makes synthetic CTs as NIfTI files, prepares them, trains a tiny encoder, validates on held-out
phantoms and exports the weights.
"""

import ml_collections

from configs import voco_10k


def get_config() -> ml_collections.ConfigDict:
    """voco_10k, shrunk: crops of 32x32x64, 3x3 grid, feature size 12, window 4."""
    config = voco_10k.get_config()
    config.total_steps = 40
    config.batch_size = 1
    config.log_every_steps = 10
    config.data.sources.ct.cache = "{workdir}/cache"
    config.data.sources.ct.lists = ()
    config.data.sources.ct.roots = ()
    config.data.phantoms = 40
    config.data.prepare = True
    config.data.held_out = 0.2
    config.data.workers = 0
    config.data.sources.ct.chain.volume_size = (96, 96, 64)
    config.crops.grid = (3, 3, 1)
    config.crops.crop_size = (32, 32, 64)
    config.crops.encoder_size = (32, 32, 64)
    config.augment.flip_probability = 0.0  # left and right tell positions apart: learn faster
    config.augment.rotate_probability = 0.0
    config.model.feature_size = 12
    config.model.window_size = (4, 4, 4)
    config.projector_size = 128
    config.model.remat = False
    config.model.crops_per_pass = 0
    config.model.dtype = "float32"
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 10
    config.validation.every_steps = 20
    config.validation.volumes = 8
    config.validation.sub_volumes = 8
    config.checkpoint.every_steps = 20
    return config
