"""The networks that the tests build: the model of configs/voco_10k.py, changed.

In float32 and without recomputing, whatever the config says.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from configs import voco_10k
from voco_jax.config.encoders import Model
from voco_jax.config.load import parse
from voco_jax.models.attention import attend
from voco_jax.models.encoders import ENCODERS
from voco_jax.models.network import Network
from voco_jax.models.swin_unetr import SwinUNETREncoder
from voco_jax.voco.step import describe_parameters

_EXPERIMENT = parse(voco_10k.get_config())
SETTINGS = _EXPERIMENT.model


def settings(**changes: Any) -> Model:
    """The config's model section with changes, checked anew."""
    return dataclasses.replace(SETTINGS, **changes)


def swin_unetr(**changes: Any) -> SwinUNETREncoder:
    """The encoder with changed attributes."""
    encoder = ENCODERS["swin_unetr"].build(
        SETTINGS, in_channels=1, remat=False, dtype=jnp.float32, convolution="lax", attention=attend
    )
    return encoder.clone(**changes)


def network(*, projector_size: int = _EXPERIMENT.projector_size, **changes: Any) -> Network:
    """The encoder with changed attributes, and a projector."""
    encoder = swin_unetr(**changes)
    return Network(encoder, projector_size, encoder.dtype)


def shapes(model: Network | SwinUNETREncoder, size: tuple[int, int, int] = (32, 32, 64)) -> Any:
    """The abstract parameters."""
    return nn.unbox(describe_parameters(model, size))
