"""MONAI's Swin transformer in Flax: attention in shifted windows, patch merging, v2 blocks.

Every array is channels-last, `b x y z c`. Names of modules and parameters spell MONAI's.
"""

import itertools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from voco_jax.models.attention import Attend
from voco_jax.models.conv_blocks import at_least_float32, linear, residual_block
from voco_jax.models.initial_values import Distribution, torch_uniform
from voco_jax.models.windows import (
    fit_window,
    relative_position_bias,
    shift_regions,
    spatial_size,
    window_partition,
    window_reverse,
)
from voco_jax.types import Size

MLP_RATIO = 4
"""Hidden channels of a block's MLP over its channels."""
_FIRST: tuple[Size, ...] = ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))
NEIGHBOURS: dict[str, tuple[Size, ...]] = {
    # MONAI up to 1.4: (0,1,0) and (0,0,1) stand twice, (1,1,0) and (0,1,1) are missing.
    "legacy": (*_FIRST, (1, 0, 1), (0, 1, 0), (0, 0, 1), (1, 1, 1)),
    "merging": (*_FIRST, (1, 1, 0), (1, 0, 1), (0, 1, 1), (1, 1, 1)),
    "mergingv2": tuple(itertools.product((0, 1), (0, 1), (0, 1))),
}
"""For each patch merging, the order in which the eight voxels of a 2x2x2 cell are concatenated."""


def layer_norm(dtype: DTypeLike, *, affine: bool = True) -> nn.LayerNorm:
    """PyTorch's LayerNorm: eps 1e-5, two-pass variance, statistics in float32."""
    return nn.LayerNorm(
        epsilon=1e-5,
        use_fast_variance=False,
        use_bias=affine,
        use_scale=affine,
        bias_init=Distribution("constant", 0),
        scale_init=Distribution("constant", 1),
        dtype=dtype,
    )


class PatchProjection(nn.Module):
    """A convolution with kernel 2 and stride 2 and a bias: `b x y z in` -> `b x/2 y/2 z/2 out`."""

    features: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        b, size_x, size_y, size_z, channels = x.shape
        init = torch_uniform(8 * channels)
        kernel = self.param("kernel", init, (2, 2, 2, channels, self.features))
        bias = self.param("bias", init, (self.features,))
        x = x.astype(self.dtype)
        x = x.reshape(b, size_x // 2, 2, size_y // 2, 2, size_z // 2, 2, channels)
        out = jnp.einsum("bxiyjzkc,ijkco->bxyzo", x, kernel.astype(self.dtype))
        return out + bias.astype(self.dtype)


class PatchEmbed(nn.Module):
    """MONAI's `PatchEmbed` with patch size 2 and without norm."""

    features: int
    dtype: DTypeLike

    def setup(self) -> None:
        self.proj = PatchProjection(self.features, self.dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.proj(x)


class WindowAttention(nn.Module):
    """MONAI's `WindowAttention`: `b windows n dim` -> the same; logits and softmax in float32.

    Attributes:
        dim: channels.
        num_heads: divides `dim`.
        window_size: the full window, x y z, which gives the bias table its size.
        attention: `attend`, or another way to the same.
        dtype: of the products.
    """

    dim: int
    num_heads: int
    window_size: Size
    attention: Attend
    dtype: DTypeLike

    def setup(self) -> None:
        rows = math.prod(2 * size - 1 for size in self.window_size)
        self.relative_position_bias_table = self.param(
            "relative_position_bias_table", Distribution("normal", 0.02), (rows, self.num_heads)
        )
        self.qkv = linear(self.dim, 3 * self.dim, self.dtype)
        self.proj = linear(self.dim, self.dim, self.dtype)

    def __call__(self, x: jax.Array, regions: jax.Array | None) -> jax.Array:
        b, windows, n, _ = x.shape
        qkv = self.qkv(x).reshape(b, windows, n, 3, self.num_heads, self.dim // self.num_heads)
        bias = relative_position_bias(self.relative_position_bias_table, self.window_size, n)
        return self.proj(self.attention(qkv, bias, regions).reshape(b, windows, n, self.dim))


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
    """x times the normal distribution's cumulative function, as `torch.nn.GELU` computes it.

    Computed in float32 or wider with `erf` (`jax.nn.gelu` takes `erfc`, which costs an exponential
    more). Its gradient is written out: it keeps `x` alone. Reverse-mode differentiation only.

    Returns:
        The shape and dtype of `x`.
    """
    wide = at_least_float32(x)
    return (wide * _cumulative(wide)).astype(x.dtype)


def _cumulative(x: jax.Array) -> jax.Array:
    """The standard normal distribution's cumulative function."""
    return 0.5 * (1 + lax.erf(x * math.sqrt(0.5)))


def _gelu_backward(x: jax.Array, d_out: jax.Array) -> tuple[jax.Array]:
    wide = at_least_float32(x)
    density = jnp.exp(-0.5 * jnp.square(wide)) / math.sqrt(2 * math.pi)
    slope = _cumulative(wide) + wide * density
    return ((at_least_float32(d_out) * slope).astype(x.dtype),)


gelu.defvjp(lambda x: (gelu(x), x), _gelu_backward)


class Mlp(nn.Module):
    """MONAI's `MLPBlock`: linear, exact GELU, linear."""

    dim: int
    hidden: int
    dtype: DTypeLike

    def setup(self) -> None:
        self.linear1 = linear(self.dim, self.hidden, self.dtype)
        self.linear2 = linear(self.hidden, self.dim, self.dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.linear2(gelu(self.linear1(x)))


class SwinTransformerBlock(nn.Module):
    """MONAI's `SwinTransformerBlock`: `b x y z dim` -> the same; others as in `WindowAttention`.

    Attributes:
        shifted: whether windows are shifted by half their size.
        drop_path: probability that a sample skips a branch in training; from rng `dropout`.
        dtype: of the computation; norms and softmax are in float32 always.
    """

    dim: int
    num_heads: int
    window_size: Size
    shifted: bool
    drop_path: float
    attention: Attend
    dtype: DTypeLike

    def setup(self) -> None:
        self.norm1 = layer_norm(self.dtype)
        self.attn = WindowAttention(
            self.dim, self.num_heads, self.window_size, self.attention, self.dtype
        )
        self.norm2 = layer_norm(self.dtype)
        self.mlp = Mlp(self.dim, MLP_RATIO * self.dim, self.dtype)

    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = x + self._drop_path(self._attend(self.norm1(x)), train)
        return x + self._drop_path(self.mlp(self.norm2(x)), train)

    def _attend(self, x: jax.Array) -> jax.Array:
        size = spatial_size(x)
        window, shift = fit_window(size, self.window_size, self.shifted)
        # Padding comes after the norm, at the far end; padded tokens are keys like any other.
        padding = [(0, -extent % w) for extent, w in zip(size, window, strict=True)]
        x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
        padded = spatial_size(x)
        regions = None
        if any(shift):
            x = jnp.roll(x, [-s for s in shift], axis=(1, 2, 3))
            regions = shift_regions(padded, window, shift)
        x = window_reverse(self.attn(window_partition(x, window), regions), window, padded)
        if any(shift):
            x = jnp.roll(x, shift, axis=(1, 2, 3))
        return x[:, : size[0], : size[1], : size[2]]

    def _drop_path(self, x: jax.Array, train: bool) -> jax.Array:
        if not train or self.drop_path == 0:
            return x
        keep = 1 - self.drop_path
        kept = jax.random.bernoulli(self.make_rng("dropout"), keep, (x.shape[0], 1, 1, 1, 1))
        return jnp.where(kept, x / keep, 0).astype(x.dtype)


class PatchMerging(nn.Module):
    """MONAI's `PatchMerging` and `PatchMergingV2`: `b x y z dim` -> `b x/2 y/2 z/2 2*dim`."""

    dim: int
    patch_merging: str
    dtype: DTypeLike

    def setup(self) -> None:
        self.norm = layer_norm(self.dtype)
        self.reduction = linear(8 * self.dim, 2 * self.dim, self.dtype, bias=False)

    def __call__(self, x: jax.Array) -> jax.Array:
        order = NEIGHBOURS[self.patch_merging]
        x = jnp.concatenate([x[:, i::2, j::2, k::2] for i, j, k in order], axis=-1)
        return self.reduction(self.norm(x))


class BasicLayer(nn.Module):
    """One stage: `depth` blocks, every second one shifted, and a patch merging.

    `b x y z dim` -> `b x/2 y/2 z/2 2*dim`. Attributes as in `SwinTransformerBlock`; `drop_path` has
    one probability a block, `remat` recomputes each block in the gradient.
    """

    dim: int
    depth: int
    num_heads: int
    window_size: Size
    patch_merging: str
    drop_path: tuple[float, ...]
    remat: bool
    attention: Attend
    dtype: DTypeLike

    def setup(self) -> None:
        block = SwinTransformerBlock
        if self.remat:
            block = nn.remat(SwinTransformerBlock, static_argnums=(2,))
        self.blocks = [
            block(
                self.dim,
                self.num_heads,
                self.window_size,
                shifted=i % 2 == 1,
                drop_path=self.drop_path[i],
                attention=self.attention,
                dtype=self.dtype,
            )
            for i in range(self.depth)
        ]
        self.downsample = PatchMerging(self.dim, self.patch_merging, self.dtype)

    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        for block in self.blocks:
            x = block(x, train)
        return self.downsample(x)


class SwinTransformer(nn.Module):
    """MONAI's `SwinTransformer` with patch size 2 and four stages.

    `b x y z in` -> five arrays of (1, 2, 4, 8, 16) * features channels at 1/2, 1/4, 1/8, 1/16 and
    1/32 of the size, each through a LayerNorm without parameters; what flows on does not pass it.

    Attributes as in `swin_unetr.SwinUNETREncoder`.
    """

    features: int
    depths: tuple[int, ...]
    num_heads: tuple[int, ...]
    window_size: Size
    patch_merging: str
    use_v2: bool
    drop_path_rate: float
    remat: bool
    convolution: str
    attention: Attend
    dtype: DTypeLike

    def setup(self) -> None:
        self.patch_embed = PatchEmbed(self.features, self.dtype)
        rates = np.linspace(0, self.drop_path_rate, sum(self.depths)).tolist()
        for stage, (depth, heads) in enumerate(zip(self.depths, self.num_heads, strict=True)):
            dim = self.features * 2**stage
            if self.use_v2:
                block = residual_block(
                    dim, dim, convolution=self.convolution, remat=self.remat, dtype=self.dtype
                )
                setattr(self, f"layers{stage + 1}c", [block])
            layer = BasicLayer(
                dim,
                depth,
                heads,
                self.window_size,
                self.patch_merging,
                drop_path=tuple(rates[:depth]),
                remat=self.remat,
                attention=self.attention,
                dtype=self.dtype,
            )
            del rates[:depth]
            setattr(self, f"layers{stage + 1}", [layer])
        self.output_norm = layer_norm(self.dtype, affine=False)

    def __call__(self, x: jax.Array, train: bool) -> tuple[jax.Array, ...]:
        x = self.patch_embed(x)
        outputs = [self.output_norm(x)]
        for stage in range(1, len(self.depths) + 1):
            if self.use_v2:
                x = getattr(self, f"layers{stage}c")[0](x)
            x = getattr(self, f"layers{stage}")[0](x, train)
            outputs.append(self.output_norm(x))
        return tuple(outputs)
