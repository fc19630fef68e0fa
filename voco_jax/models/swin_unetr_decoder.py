"""The decoder half of MONAI's SwinUNETR; its parameter tree spells MONAI's names."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from voco_jax.models.conv_blocks import Pair, UnetResBlock, keep_convolutions
from voco_jax.models.initial_values import torch_uniform
from voco_jax.models.network import EncoderOutput


class TransposedConvolution(nn.Module):
    """A transposed convolution of kernel 2 and stride 2 without bias, which doubles each axis.

    `b x y z in` -> `b 2x 2y 2z features`. No two outputs share an input's products: it is a matrix
    product and an interleaving of its results.

    Attributes:
        features: output channels.
        dtype: of the computation; the parameter is float32.
    """

    features: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels = x.shape[-1]
        # PyTorch takes the second axis of its kernel, here the output channels, for the inputs.
        kernel = self.param(
            "transposed_kernel",
            torch_uniform(8 * self.features),
            (2, 2, 2, channels, self.features),
        )
        return _upsample(x.astype(self.dtype), kernel.astype(self.dtype))


@jax.custom_vjp
def _upsample(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """The transposed convolution: `b x y z i` and `2 2 2 i o` -> `b 2x 2y 2z o`."""
    b, size_x, size_y, size_z, _ = x.shape
    # Four products, so that only whole rows along z are interleaved: faster on a CPU.
    planes = [
        jnp.stack([jnp.einsum("bxyzi,kio->bxyzko", x, part) for part in parts], axis=3)
        for parts in kernel
    ]
    out = jnp.stack(planes, axis=2)  # b x 2 y 2 z 2 o
    return out.reshape(b, 2 * size_x, 2 * size_y, 2 * size_z, -1)


def _upsample_forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, Pair]:
    return _upsample(x, kernel), (x, kernel)


def _upsample_backward(saved: Pair, d_out: jax.Array) -> Pair:
    """One product for each gradient: the transposed four would copy every part of `d_out`."""
    x, kernel = saved
    b, size_x, size_y, size_z, channels = x.shape
    parts = d_out.reshape(b, size_x, 2, size_y, 2, size_z, -1).transpose(0, 1, 3, 5, 2, 4, 6)
    columns = parts.reshape(b, size_x, size_y, size_z, -1)  # b x y z (2 2 2 o)
    weights = jnp.moveaxis(kernel, 3, 0).reshape(channels, -1)  # i (2 2 2 o)
    d_x = jnp.einsum("bxyzk,ik->bxyzi", columns, weights)
    d_weights = jnp.einsum("bxyzi,bxyzk->ik", x, columns)
    return d_x, jnp.moveaxis(d_weights.reshape(channels, *kernel.shape[:3], -1), 0, 3)


_upsample.defvjp(_upsample_forward, _upsample_backward)


class OutputConvolution(nn.Module):
    """A 1x1x1 convolution with bias: `b x y z in` -> `b x y z features`, float32 or wider."""

    features: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels = x.shape[-1]
        init = torch_uniform(channels)
        kernel = self.param("kernel", init, (1, 1, 1, channels, self.features))
        bias = self.param("bias", init, (self.features,))
        x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
        wide = jnp.promote_types(self.dtype, jnp.float32)
        return jnp.einsum("bxyzi,io->bxyzo", x, kernel[0, 0, 0], preferred_element_type=wide) + bias


class Level(nn.Module):
    """Gives a module the level `conv` that MONAI's containers have."""

    conv: nn.Module

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.conv(x)


class UnetrUpBlock(nn.Module):
    """MONAI's `UnetrUpBlock(res_block=True)`: upsamples, joins the skip, a `UnetResBlock`.

    `b x y z in`, skip `b 2x 2y 2z features` -> `b 2x 2y 2z features`.

    Attributes:
        features: output channels.
        convolution: `lax` or `planes`, see `conv_blocks.Convolution`.
        dtype: of the computation; norms are in float32 always.
    """

    features: int
    convolution: str
    dtype: DTypeLike

    def setup(self) -> None:
        self.transp_conv = Level(TransposedConvolution(self.features, self.dtype))
        self.conv_block = UnetResBlock(
            2 * self.features, self.features, self.convolution, self.dtype
        )

    def __call__(self, x: jax.Array, skip: jax.Array) -> jax.Array:
        joined = jnp.concatenate([self.transp_conv(x), skip.astype(self.dtype)], axis=-1)
        return self.conv_block(joined)


class SwinUNETRDecoder(nn.Module):
    """MONAI's `SwinUNETR` from its encoders' outputs to its logits.

    `EncoderOutput` of a `SwinUNETREncoder` with convolution encoders -> `b x y z classes` of the
    image's size, float32 or wider.

    Attributes:
        feature_size: the encoder's.
        classes: the background among them.
        convolution: form of the 3x3x3 convolutions: `lax` (XLA's own) or `planes` (for CPUs).
        remat: recompute in the gradient what is not a 3x3x3 or 1x1x1 convolution.
        dtype: of the computation; parameters and norms are float32 always.
    """

    feature_size: int
    classes: int
    convolution: str
    remat: bool
    dtype: DTypeLike

    def setup(self) -> None:
        up_block = keep_convolutions(UnetrUpBlock) if self.remat else UnetrUpBlock
        block = functools.partial(up_block, convolution=self.convolution, dtype=self.dtype)
        fs = self.feature_size
        self.decoder5 = block(8 * fs)
        self.decoder4 = block(4 * fs)
        self.decoder3 = block(2 * fs)
        self.decoder2 = block(fs)
        self.decoder1 = block(fs)
        self.out = Level(Level(OutputConvolution(self.classes, self.dtype)))

    def __call__(self, encoded: EncoderOutput) -> jax.Array:
        first, second, third, fourth, x = encoded.features
        x = self.decoder5(x, encoded.hidden_states[3])
        x = self.decoder4(x, fourth)
        x = self.decoder3(x, third)
        x = self.decoder2(x, second)
        x = self.decoder1(x, first)
        return self.out(x)
