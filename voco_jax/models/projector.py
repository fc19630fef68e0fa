"""The projector: pooled encoder features -> embeddings; how similar two embeddings are."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from voco_jax.models.conv_blocks import EPSILON, at_least_float32, linear

_COSINE_EPS = 1e-8  # torch.nn.functional.cosine_similarity


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


def cosine(a: jax.Array, b: jax.Array) -> jax.Array:
    """Cosine of every row of `a` with every row of `b`.

    Args:
        a: (..., m, d).
        b: (..., n, d).

    Returns:
        (..., m, n) float32 in [-1, 1]; 0 where a row is all zeros.
    """
    return jnp.einsum("...md,...nd->...mn", unit(a), unit(b), precision=jax.lax.Precision.HIGHEST)


def unit(rows: jax.Array) -> jax.Array:
    """Rows (..., d) at length 1, float32; a row of zeros stays one."""
    rows = rows.astype(jnp.float32)
    square = jnp.sum(rows * rows, axis=-1, keepdims=True)
    # The maximum comes before the square root: its gradient at zero would be infinite.
    return rows / jnp.sqrt(jnp.maximum(square, _COSINE_EPS**2))


def similarity(x: jax.Array, bases: jax.Array) -> jax.Array:
    """relu(cos): the predicted overlap of sub-volumes (..., s, d) with bases (..., n, d)."""
    return jax.nn.relu(cosine(x, bases))
