"""Segmentation of the anterior and posterior hippocampus in MR crops: Decathlon task 4.

    python main.py --config configs/finetune_hippocampus.py --workdir runs/hippocampus

expects data/hippocampus with dataset.json (a Decathlon list, "training" and "validation") and the
folders that it names; --config.data.sources.mr.roots and .lists name others. Small enough for a
CPU: images of about 35x50x35 voxels, a network of feature size 12.
"""

import ml_collections

from configs import finetune_btcv


def get_config() -> ml_collections.ConfigDict:
    """finetune_btcv, small, with percentiles for MR and without flips: sides and ends differ."""
    config = finetune_btcv.get_config()
    config.total_steps = 1_500
    config.batch_size = 4
    config.log_every_steps = 50
    source = config.data.sources.ct.to_dict()
    source["roots"] = ("data/hippocampus",)
    source["lists"] = ("data/hippocampus/dataset.json",)
    size = (32, 64, 32)
    source["chain"] |= {
        "spacing": (),
        "window": (0.5, 99.5),
        "window_unit": "percentile",
        "crop_foreground": False,
        "volume_size": size,
        "classes": finetune_btcv.one_value_each(("anterior", "posterior")),
    }
    config.data.sources = {"mr": source}
    config.data.workers = 0
    config.crops.size = size
    config.crops.foreground = 0.5
    config.augment.flip_probability = (0.5, 0.0, 0.0)  # left and right hippocampi
    config.augment.rotate_probability = 0.0
    config.augment.scale_probability = 0.5
    config.augment.noise_probability = 0.2
    config.augment.gamma_probability = 0.3
    config.model.feature_size = 12
    config.model.window_size = (4, 4, 4)
    config.model.remat = False
    config.model.crops_per_pass = 0
    config.model.dtype = "float32"
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 50
    config.validation.every_steps = 250
    config.checkpoint.every_steps = 250
    return config
