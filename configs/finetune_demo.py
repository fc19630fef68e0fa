"""Segmentation on phantom CTs with their organs, in minutes on two cores.

    python main.py --config configs/demo.py --workdir runs/demo
    python main.py --config configs/finetune_demo.py --workdir runs/finetune_demo \\
        --config.init_from=runs/demo/voco_encoder.safetensors

Makes synthetic CTs with the labels of five organs, prepares them, trains from the weights that
configs/demo.py exported (or, without init_from, from scratch), validates on held-out phantoms and
exports weights for voco_jax.evaluation.predict.
"""

import ml_collections

from configs import demo, finetune_btcv
from voco_jax.data.phantom import ORGANS


def get_config() -> ml_collections.ConfigDict:
    """finetune_btcv, shrunk: voxels of 6 mm, crops of 64x64x32, the network of configs/demo.py."""
    config = finetune_btcv.get_config()
    size = (64, 64, 32)
    config.total_steps = 60
    config.batch_size = 2
    config.log_every_steps = 10
    config.data.phantoms = 40
    config.data.held_out = 0.2
    config.data.workers = 0
    config.data.sources.ct.roots = ()
    config.data.sources.ct.lists = ()
    config.data.sources.ct.chain.spacing = (6.0, 6.0, 6.0)
    config.data.sources.ct.chain.volume_size = size
    config.data.sources.ct.chain.classes = finetune_btcv.one_value_each(ORGANS)
    config.crops.size = size
    config.crops.balance = "classes"
    config.augment.flip_probability = (0.0, 0.0, 0.0)  # left and right tell the organs apart
    config.augment.rotate_probability = 0.0
    config.model = demo.get_config().model
    config.optimizer.learning_rate = 2e-3
    config.optimizer.warmup_steps = 10
    config.validation.every_steps = 30
    config.validation.overlap = 0.25
    config.checkpoint.every_steps = 20
    return config
