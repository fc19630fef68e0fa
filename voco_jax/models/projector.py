"""The projector: pooled encoder features -> embeddings."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from voco_jax.models.conv_blocks import EPSILON, at_least_float32, linear


def batch_norm(x: jax.Array) -> jax.Array:
    """Normalises each feature over the batch, in float32, without parameters or running statistics.

    As `torch.nn.BatchNorm1d(affine=False, track_running_stats=False)`. Under jit over a mesh the
    batch is the global one, so this is synchronised batch norm.

    Args:
        x: `n features`, all crops of the batch together.

    Returns:
        `n features`, float32.
    """
    wide = at_least_float32(x)
    centred = wide - jnp.mean(wide, axis=0, keepdims=True)
    variance = jnp.mean(jnp.square(centred), axis=0, keepdims=True)
    return centred * lax.rsqrt(variance + EPSILON)


class Projector(nn.Module):
    """VoCo's projector: linear-norm-relu, linear-norm-relu, linear; every layer `width` wide.

    `n in_features` -> `n width`, float32. With fewer than two rows batch norm has nothing to
    normalise: a ValueError.

    Attributes:
        in_features: the encoder's `pooled_size`.
        width: of the hidden layers and of the embedding: 2048 (10k), 1024 (v2).
        dtype: of the products; norms are in float32 always.
    """

    in_features: int
    width: int
    dtype: DTypeLike

    def setup(self) -> None:
        self.layer1 = [linear(self.in_features, self.width, self.dtype)]
        self.layer2 = [linear(self.width, self.width, self.dtype)]
        self.layer3 = [linear(self.width, self.width, self.dtype)]

    def __call__(self, x: jax.Array) -> jax.Array:
        if x.ndim != 2 or x.shape[1] != self.in_features:
            raise ValueError(
                f"the projector takes (crops, {self.in_features}) features, got {x.shape}"
            )
        if x.shape[0] < 2:
            raise ValueError(
                f"the projector's batch norm needs at least 2 crops in a batch, got {x.shape[0]}"
            )
        x = nn.relu(batch_norm(self.layer1[0](x)))
        x = nn.relu(batch_norm(self.layer2[0](x)))
        return at_least_float32(self.layer3[0](x))
