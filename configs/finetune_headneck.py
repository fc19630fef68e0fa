"""Segmentation of seven organs in head-and-neck planning CTs, on few and coarse volumes.

    python main.py --config configs/finetune_headneck.py --workdir runs/headneck

expects data/headneck with headneck.json (a Decathlon list) and the folders that it names;
--config.data.sources.ct.roots and .lists name others. A network of feature size 12 for a CPU.
"""

import ml_collections

from configs import finetune_btcv

ORGANS = (
    *("brainstem", "spinal_cord", "right_parotid", "left_parotid"),
    *("esophagus", "larynx", "mandible"),
)


def get_config() -> ml_collections.ConfigDict:
    """finetune_btcv, small: voxels of 4x4x3 mm, crops of 32x32x64."""
    config = finetune_btcv.get_config()
    config.total_steps = 1_200
    config.batch_size = 4
    config.log_every_steps = 20
    size = (32, 32, 64)
    source = config.data.sources.ct
    source.roots = ("data/headneck",)
    source.lists = ("data/headneck/headneck.json",)
    source.chain.spacing = (4.0, 4.0, 3.0)
    source.chain.volume_size = size
    source.chain.classes = finetune_btcv.one_value_each(ORGANS)
    config.data.workers = 0
    config.crops.size = size
    config.crops.balance = "classes"
    config.augment.flip_probability = (0.0, 0.0, 0.0)  # left and right parotids differ
    config.augment.rotate_probability = 0.0
    config.model.feature_size = 12
    config.model.window_size = (4, 4, 4)
    config.model.remat = False
    config.model.crops_per_pass = 0
    config.model.dtype = "float32"
    config.loss.batch = True  # few crops hold every organ
    config.optimizer.learning_rate = 2e-3
    config.optimizer.warmup_steps = 50
    config.validation.every_steps = 400
    config.checkpoint.every_steps = 200
    return config
