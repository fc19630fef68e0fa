"""The smallest experiment there is: a step takes a second on two cores, the run a minute.

    python main.py --config configs/tiny.py --workdir runs/tiny

The tests, robustness/ and the smallest comparisons start from it. It learns nothing worth having.
"""

import ml_collections

from configs import demo


def get_config() -> ml_collections.ConfigDict:
    """demo, shrunk: four steps on three phantoms, two crops, one block a stage, no v2 blocks."""
    config = demo.get_config()
    config.total_steps = 4
    config.log_every_steps = 1
    config.data.phantoms = 4
    config.data.held_out = 0.25
    config.data.sources.ct.chain.volume_size = (64, 32, 64)
    config.crops.grid = (2, 1, 1)
    config.crops.sub_volumes = 1
    config.model.depths = (1, 1, 1, 1)
    config.model.use_v2 = False  # compiles sooner
    config.projector_size = 32
    config.optimizer.warmup_steps = 1
    config.validation.every_steps = 4
    config.validation.volumes = 1
    config.validation.sub_volumes = 1
    config.checkpoint.every_steps = 2
    return config
