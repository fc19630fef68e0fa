"""Pre-training on the images that configs/finetune_hippocampus.py trains on, for a CPU.

    python main.py --config configs/hippocampus.py --workdir runs/hippocampus_voco

expects data/hippocampus, as configs/finetune_hippocampus.py does. The held-out volumes of the list
are validated on and never trained on. comparisons/does_it_help.py starts from it.
"""

import ml_collections

from configs import demo, finetune_hippocampus


def get_config() -> ml_collections.ConfigDict:
    """demo, on MR crops resized to 64x64x64: a 2x2 grid of 32x32x64."""
    config = demo.get_config()
    labelled = finetune_hippocampus.get_config().data.sources.mr
    config.total_steps = 300
    config.batch_size = 2
    config.log_every_steps = 20
    source = config.data.sources.ct.to_dict()
    source["roots"], source["lists"] = labelled.roots, labelled.lists
    source["chain"] |= {
        "window": labelled.chain.window,
        "window_unit": "percentile",
        "crop_foreground": False,
        "volume_size": (64, 64, 64),
    }
    config.data.sources = {"mr": source}
    config.data.phantoms = 0
    config.data.held_out = 0.0
    config.crops.grid = (2, 2, 1)
    config.validation.every_steps = 100
    config.checkpoint.every_steps = 50
    return config
