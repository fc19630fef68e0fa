"""Classification of phantom CTs, in minutes on two cores: is there iodised oil in the liver or not?

    python main.py --config configs/finetune_lesion_demo.py --workdir runs/finetune_lesion_demo

Makes synthetic CTs, every second one with a few dense balls in its liver, as lesions look after
they were treated with iodised oil; prepares them, trains a small encoder and a classifier from
scratch, validates on held-out phantoms and exports weights for voco_jax.evaluation.predict.
"""

import ml_collections

from configs import demo, finetune_ccii


def get_config() -> ml_collections.ConfigDict:
    """finetune_ccii, shrunk: whole phantoms in 64x64x32 voxels, the network of configs/demo.py."""
    config = finetune_ccii.get_config()
    size = (64, 64, 32)
    config.total_steps = 60
    config.batch_size = 4
    config.log_every_steps = 10
    config.data.phantoms = 120
    config.data.held_out = 0.33
    config.data.workers = 0
    config.data.patient = ""
    chain = config.data.sources.ct.chain
    config.data.sources.ct.roots = ()
    config.data.sources.ct.lists = ()
    chain.window = (400.0, 1800.0)
    chain.window_unit = "HU"
    chain.volume_size = size
    chain.classes = (("untreated", (0,)), ("treated", (1,)))
    config.crops.size = size
    config.augment.flip_probability = (0.0, 0.0, 0.0)
    config.augment.scale_probability = 0.0
    config.augment.shift_probability = 0.0
    config.model = demo.get_config().model
    config.optimizer.learning_rate = 1e-3
    config.optimizer.weight_decay = 1e-5
    config.optimizer.warmup_steps = 10
    config.validation.every_steps = 20
    config.checkpoint.every_steps = 20
    return config
