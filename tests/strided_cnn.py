"""A plain strided CNN: all that a second encoder is."""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from pydantic.dataclasses import dataclass

from voco_jax.config import common, encoders
from voco_jax.models.encoder import Encoder, Usage
from voco_jax.models.network import EncoderOutput

SNIPPET = """import torch
from safetensors.torch import load_file
layers = [torch.nn.Conv3d(i, o, 3, 2, 1) for i, o in {channels}]
model = torch.nn.ModuleDict({{"conv": torch.nn.ModuleList(layers)}})
model.load_state_dict(load_file({file!r}))"""


@dataclass(frozen=True, config=common.STRICT, kw_only=True)
class Settings(encoders.Model):
    features: common.Positive


class StridedCNN(nn.Module):
    channels: tuple[int, int, int]
    dtype: DTypeLike

    @property
    def pooled_size(self) -> int:
        return self.channels[-1]

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> EncoderOutput:
        states = []
        for i, c in enumerate(self.channels):
            layer = nn.Conv(c, (3, 3, 3), 2, padding=1, dtype=self.dtype, name=f"conv_{i}")
            states.append(x := nn.relu(layer(x)))
        return EncoderOutput(tuple(states), (), jnp.mean(x.astype(jnp.float32), (1, 2, 3)))


class Decoder(nn.Module):
    classes: int

    @nn.compact
    def __call__(self, output: EncoderOutput) -> jax.Array:
        """Each voxel's logits, of the states around it."""
        states = []
        for level, state in enumerate(output.hidden_states, 1):
            for axis in (1, 2, 3):
                state = jnp.repeat(state, 2**level, axis)
            states.append(state)
        x = nn.relu(nn.Dense(16, name="dense_0")(jnp.concatenate(states, -1)))
        return nn.Dense(self.classes, name="dense_1")(x).astype(jnp.float32)


def _channels(features: int) -> tuple[int, int, int]:
    return features, 2 * features, 4 * features


def _usage(file, settings, shapes):
    channels = (1, *_channels(settings["features"]))
    pairs = list(itertools.pairwise(channels))
    return Usage(library="PyTorch", snippet=SNIPPET.format(channels=pairs, file=file), card={})


ENCODER = Encoder(
    build_decoder=lambda model, classes, **_: Decoder(classes),
    build=lambda model, dtype, **_: StridedCNN(_channels(model.features), dtype),
    card=lambda model, shapes: {"features": model.features},
    usage=_usage,
)
