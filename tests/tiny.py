"""The smallest experiment there is: demo.py shrunk until a step takes a second on two cores."""

import ml_collections

from configs import demo


def tiny_config() -> ml_collections.ConfigDict:
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
    config.model.projector_size = 32
    config.optimizer.warmup_steps = 1
    config.validation.every_steps = 4
    config.validation.volumes = 1
    config.validation.sub_volumes = 1
    config.checkpoint.every_steps = 2
    return config
