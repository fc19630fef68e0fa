"""VoCo of the 160k release (voco_v2), B, L or H, on abdomen, chest and head-neck CT.

    python -m voco_jax.data.prepare --config configs/voco_160k.py
    python main.py --config configs/voco_160k.py:b --workdir runs/voco_160k_b

`:l` and `:h` after the file's name are the larger encoders: feature size 96 and 192 (212M and 847M
parameters); they need `--config.mesh.fsdp`. CT files are in data/abdomen, data/chest and
data/head_neck, the lists in data/lists (see configs/regions.py and docs/data.md).
"""

import ml_collections

from configs import regions, voco_10k
from voco_jax.errors import InputError

FEATURE_SIZES = {"b": 48, "l": 96, "h": 192}


def get_config(size: str = "b") -> ml_collections.ConfigDict:
    """The published settings: two volumes on each of eight GPUs.

    Args:
        size: what stands after the colon of --config.

    Raises:
        InputError: there is no such size.
    """
    if size not in FEATURE_SIZES:
        raise InputError(
            f"--config: found size {size!r}, expected one of {', '.join(FEATURE_SIZES)}, as in "
            "configs/voco_160k.py:b"
        )
    config = voco_10k.get_config()
    config.recipe = "voco_v2"
    config.total_steps = 2_000_000
    config.batch_size = 16
    config.data.sources = regions.sources("data", "data/lists")
    config.crops.grid = (3, 3, 1)
    config.crops.crop_size = (64, 64, 64)
    config.crops.encoder_size = (64, 64, 64)
    config.augment.shift_probability = 0.5
    config.model.feature_size = FEATURE_SIZES[size]
    config.projector_size = 1024
    config.model.crops_per_pass = 11 if size == "b" else 2  # of 22 for two volumes
    config.teacher.scope = "projector"
    config.dropout.rate = 0.2
    return config
