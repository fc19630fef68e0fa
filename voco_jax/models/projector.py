"""The projector: pooled encoder features -> embeddings."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from voco_jax.models.conv_blocks import at_least_float32, torch_uniform


def batch_norm(x: jax.Array, epsilon: float = 1e-5) -> jax.Array:
    """Normalises each feature over the batch, in float32, without parameters or running statistics.

    Under jit over a mesh the batch is the whole global one, so this is synchronised batch norm.

    Args:
        x: `n features`, all crops of the batch together.
        epsilon: added to the biased variance, as in
            `torch.nn.BatchNorm1d(affine=False, track_running_stats=False)`.

    Returns:
        `n features`, float32.
    """
    wide = at_least_float32(x)
    centred = wide - jnp.mean(wide, axis=0, keepdims=True)
    variance = jnp.mean(jnp.square(centred), axis=0, keepdims=True)
    return centred * lax.rsqrt(variance + epsilon)


class Projector(nn.Module):
    """VoCo's projector: linear-norm-relu, linear-norm-relu, linear; every layer `width` wide.

    `n in_features` -> `n width`, float32. With fewer than two rows batch norm has nothing to
    normalise: a ValueError.

    Attributes:
        in_features: 24 * feature size, or 16 * without the convolution encoders.
        width: of the hidden layers and of the embedding: 2048 (10k), 1024 (v2).
        dtype: of the products; norms are in float32 always.
    """

    in_features: int
    width: int = 2048
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        self.layer1 = [self._linear(self.in_features)]
        self.layer2 = [self._linear(self.width)]
        self.layer3 = [self._linear(self.width)]

    def _linear(self, fan_in: int) -> nn.Dense:
        init = torch_uniform(fan_in)
        return nn.Dense(self.width, dtype=self.dtype, kernel_init=init, bias_init=init)

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
