"""3-D convolutions and the residual block of MONAI's UNETR encoders.

Every array is channels-last, `b x y z c`; every kernel is `kx ky kz in out`.
"""

import itertools
from collections.abc import Callable
from typing import Any, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from voco_jax.models.initial_values import torch_uniform

SAVED_CONVOLUTION = "convolution"
"""Name under which a residual block's convolution outputs can be kept by a remat policy."""
Block = TypeVar("Block", bound=nn.Module)
_SPACE = (1, 2, 3)
EPSILON = 1e-5  # PyTorch's


def at_least_float32(x: jax.Array) -> jax.Array:
    """`x` for sums that bfloat16 cannot carry: in float32, or as it is if wider."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


Pair = tuple[jax.Array, jax.Array]
"""The two factors of a product, or the gradients of both."""


@jax.custom_vjp
def pointwise(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """What a linear layer or a 1x1x1 convolution multiplies: `... in` and `in out` -> `... out`.

    Its gradients are written in the order in which XLA needs no transposed copy on a CPU.
    """
    return x @ kernel


def _pointwise_forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, Pair]:
    return pointwise(x, kernel), (x, kernel)


def _pointwise_backward(saved: Pair, d_out: jax.Array) -> Pair:
    x, kernel = saved
    inputs, d_outputs = (one.reshape(-1, one.shape[-1]) for one in (x, d_out))
    return jnp.einsum("...o,io->...i", d_out, kernel), jnp.einsum("ki,ko->io", inputs, d_outputs)


pointwise.defvjp(_pointwise_forward, _pointwise_backward)


def _dot_general(x: jax.Array, kernel: jax.Array, *_: Any, **__: Any) -> jax.Array:
    """`pointwise`, as `nn.Dense` calls it."""
    return pointwise(x, kernel)


def linear(
    fan_in: int, features: int, dtype: DTypeLike, *, bias: bool = True, name: str | None = None
) -> nn.Dense:
    """A linear layer with PyTorch's default initialisation."""
    init = torch_uniform(fan_in)
    return nn.Dense(
        features,
        use_bias=bias,
        dtype=dtype,
        kernel_init=init,
        bias_init=init,
        dot_general=_dot_general,
        name=name,
    )


@jax.custom_vjp
def instance_norm(x: jax.Array) -> jax.Array:
    """Normalises each channel of each sample over space, in float32, without parameters.

    Its gradient is written out: it keeps `x` and two numbers a channel, where differentiating
    would keep, or write and read again, several arrays in float32 (docs/benchmarks.md).

    Returns:
        `b x y z c` in the dtype of `x`; as `torch.nn.InstanceNorm3d`, with the biased variance.
    """
    return _normalise(x, *_moments(x))


def _moments(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and 1 / standard deviation over space, `b 1 1 1 c`; neither sum waits for the other.

    Squares are summed of the distance to one plane's mean, which is near enough to the mean that
    little cancels.
    """
    middle = x.shape[1] // 2
    wide = at_least_float32(x)
    near = jnp.mean(wide[:, middle : middle + 1], _SPACE, keepdims=True)
    mean = jnp.mean(wide, _SPACE, keepdims=True)
    second = jnp.mean(jnp.square(wide - near), _SPACE, keepdims=True)
    variance = jnp.maximum(second - jnp.square(mean - near), 0)
    return mean, lax.rsqrt(variance + EPSILON)


def _normalise(x: jax.Array, mean: jax.Array, scale: jax.Array) -> jax.Array:
    return ((at_least_float32(x) - mean) * scale).astype(x.dtype)


def _norm_forward(x: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    mean, scale = (checkpoint_name(one, SAVED_CONVOLUTION) for one in _moments(x))
    return _normalise(x, mean, scale), (x, mean, scale)


def _norm_backward(saved: tuple[jax.Array, ...], d_out: jax.Array) -> tuple[jax.Array]:
    x, mean, scale = saved
    wide, normalised = at_least_float32(d_out), (at_least_float32(x) - mean) * scale
    constant = jnp.mean(wide, _SPACE, keepdims=True)
    slope = jnp.mean(wide * normalised, _SPACE, keepdims=True)
    return ((scale * (wide - constant - slope * normalised)).astype(x.dtype),)


instance_norm.defvjp(_norm_forward, _norm_backward)


def convolve_lax(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """The 3x3x3 convolution of stride 1 with zero padding, as XLA's own 3-D convolution.

    Args:
        x: `b x y z in`.
        kernel: `3 3 3 in out`.

    Returns:
        `b x y z out`.
    """
    return lax.conv_general_dilated(
        x, kernel, (1, 1, 1), "SAME", dimension_numbers=("NDHWC", "DHWIO", "NDHWC")
    )


@jax.custom_vjp
def convolve_planes(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`convolve_lax` as one 2-D convolution of every plane, summed over three neighbours along x.

    The same sums, on a CPU several times faster than XLA's 3-D convolution (docs/benchmarks.md).
    XLA's gradient of the kernel would be slow again, so it is written out as matrix products.
    Reverse-mode differentiation only. Arguments and result as there.
    """
    batch, size_x, size_y, size_z, channels = x.shape
    features = kernel.shape[-1]
    if min(size_y, size_z) < 3:
        return _convolve_few(x, kernel)
    out = lax.conv_general_dilated(
        x.reshape(batch * size_x, size_y, size_z, channels),
        jnp.moveaxis(kernel, 0, 3).reshape(3, 3, channels, 3 * features),
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        preferred_element_type=jnp.promote_types(x.dtype, jnp.float32),
    ).reshape(batch, size_x, size_y, size_z, 3, features)
    before = _pad(out[:, :-1, :, :, 0], 1, (1, 0))
    after = _pad(out[:, 1:, :, :, 2], 1, (0, 1))
    return (before + out[:, :, :, :, 1] + after).astype(x.dtype)


def _convolve_few(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`convolve_lax` as one matrix product, of columns that are x at its 27 offsets.

    For planes narrower than the kernel along y or z, which XLA convolves very slowly on a CPU: it
    has YNNPACK do it for wider planes only.
    """
    columns = jnp.concatenate(_neighbours(x), axis=-1)
    return columns @ kernel.reshape(columns.shape[-1], -1)


def _neighbours(x: jax.Array) -> list[jax.Array]:
    """x at its 27 offsets, zeros outside: `b x y z c` each, in the order of a kernel."""
    size_x, size_y, size_z = x.shape[1:4]
    padded = jnp.pad(x, [(0, 0), (1, 1), (1, 1), (1, 1), (0, 0)])
    return [
        padded[:, i : i + size_x, j : j + size_y, k : k + size_z]
        for i, j, k in itertools.product(range(3), repeat=3)
    ]


def _pad(x: jax.Array, axis: int, widths: tuple[int, int]) -> jax.Array:
    """Zeros before and after one axis."""
    return jnp.pad(x, [widths if i == axis else (0, 0) for i in range(x.ndim)])


def _planes_forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, Pair]:
    return convolve_planes(x, kernel), (x, kernel)


def _planes_backward(saved: Pair, d_out: jax.Array) -> Pair:
    """Of x: the convolution with the mirrored kernel. Of the kernel: matrix products."""
    x, kernel = saved
    mirrored = jnp.flip(kernel, (0, 1, 2)).swapaxes(3, 4)
    return convolve_planes(d_out, mirrored), _kernel_gradient(x, d_out).astype(kernel.dtype)


COLUMNS_AT_ONCE = 2**19
"""Values of the matrices that `_shifted_products` multiplies at once: about what a cache holds."""


def _kernel_gradient(x: jax.Array, d_out: jax.Array) -> jax.Array:
    """`3 3 3 in out`: for each offset the sum over `b x y z` of x there times `d_out`."""
    if x.shape[-1] == 1:
        return _image_gradient(x, d_out)
    if d_out.shape[-1] <= x.shape[-1]:  # d_out lies at the opposite offset from x
        return jnp.flip(_shifted_products(x, d_out), (0, 1)).swapaxes(3, 4)
    return jnp.flip(_shifted_products(d_out, x), 2)


def _image_gradient(x: jax.Array, d_out: jax.Array) -> jax.Array:
    """`_kernel_gradient` of one channel: a product a crop, whose rows are x at its 27 offsets.

    They take 27 times a crop's memory: at 48 channels about half of what `d_out` takes.
    """
    wide = jnp.promote_types(x.dtype, jnp.float32)

    def of_crop(one: Pair) -> jax.Array:
        x, d_out = one
        rows = jnp.stack(_neighbours(x[None])).reshape(27, -1)
        return jnp.matmul(rows, d_out.reshape(-1, d_out.shape[-1]), preferred_element_type=wide)

    return jnp.sum(lax.map(of_crop, (x, d_out)), axis=0).reshape(3, 3, 3, 1, -1)


def _shifted_products(at_z: jax.Array, at_xy: jax.Array) -> jax.Array:
    """Sums over space of all products of two arrays, one moved along z and one along x and y.

    As one matrix product a block of a few planes, or rows of one, along x: columns that are one
    array at its three offsets, with columns that are the other at its nine.

    Args:
        at_z: `b x y z c`; zeros lie outside.
        at_xy: `b x y z d`, likewise; the one of fewer channels, whose columns are three times more.

    Returns:
        `3 3 3 d c`: offsets -1, 0, 1 of `at_xy` along x and y and of `at_z` along z.
    """
    batch, size_x, size_y, size_z, channels = at_z.shape
    others = at_xy.shape[-1]
    row = batch * size_z * (3 * channels + 9 * others)
    y = largest_divisor(size_y, COLUMNS_AT_ONCE // row)
    x = largest_divisor(size_x, COLUMNS_AT_ONCE // (row * size_y)) if y == size_y else 1
    steps = size_y // y
    at_z = _pad(at_z, 3, (1, 1))
    at_xy = _pad(_pad(at_xy, 1, (1, 1)), 2, (1, 1))
    wide = jnp.promote_types(at_z.dtype, jnp.float32)

    def add(i: int, total: jax.Array) -> jax.Array:
        start = (0, i // steps * x, i % steps * y, 0, 0)
        near = lax.dynamic_slice(at_z, start, (batch, x, y, size_z + 2, channels))
        left = jnp.concatenate([near[:, :, :, k : k + size_z] for k in range(3)], axis=-1)
        near = lax.dynamic_slice(at_xy, start, (batch, x + 2, y + 2, size_z, others))
        parts = [near[:, j : j + x, k : k + y] for j in range(3) for k in range(3)]
        right = jnp.concatenate(parts, axis=-1)
        return total + jnp.einsum("bxyzi,bxyzo->io", left, right, preferred_element_type=wide)

    zero = jnp.zeros((3 * channels, 9 * others), wide)
    total = lax.fori_loop(0, size_x // x * steps, add, zero)
    # (z c), (x y d) -> x y z d c
    return total.reshape(3, channels, 3, 3, others).transpose(2, 3, 0, 4, 1)


def largest_divisor(size: int, limit: int) -> int:
    """The largest divisor of a size that is at most the limit, or 1."""
    return max(n for n in range(1, size + 1) if size % n == 0 and n <= max(limit, 1))


convolve_planes.defvjp(_planes_forward, _planes_backward)

CONVOLUTIONS: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "lax": convolve_lax,
    "planes": convolve_planes,
}
"""Forms of the 3x3x3 convolution, by their names in a config."""


class Convolution(nn.Module):
    """A convolution of stride 1 without bias: `b x y z in` -> `b x y z features`.

    Attributes:
        features: output channels.
        kernel_size: 3 (zero padding keeps the size) or 1.
        convolution: `lax` or `planes`: how the 3x3x3 convolution is computed.
        dtype: of the computation; the parameter is float32.
    """

    features: int
    kernel_size: int
    convolution: str
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array, *, normalise: bool = False) -> jax.Array:
        """With `normalise` through `instance_norm`."""
        channels = x.shape[-1]
        kernel = self.param(
            "kernel",
            torch_uniform(self.kernel_size**3 * channels),
            (self.kernel_size,) * 3 + (channels, self.features),
        )
        if normalise and self.kernel_size == channels == 1:
            return _normalised_multiples(x, kernel[0, 0, 0, 0]).astype(self.dtype)
        x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
        if self.kernel_size == 1:
            out = pointwise(x, kernel[0, 0, 0])
        else:
            out = CONVOLUTIONS[self.convolution](x, kernel)
        out = checkpoint_name(out, SAVED_CONVOLUTION)
        return instance_norm(out) if normalise else out


def _normalised_multiples(x: jax.Array, factors: jax.Array) -> jax.Array:
    """`instance_norm(x * factors)` from the moments of `x` alone, without an array of products.

    Args:
        x: `b x y z 1`.
        factors: `c`.

    Returns:
        `b x y z c` in float32 or wider.
    """
    wide = at_least_float32(x)
    centred = wide - jnp.mean(wide, _SPACE, keepdims=True)
    variance = jnp.mean(jnp.square(centred), _SPACE, keepdims=True)
    return centred * (factors * lax.rsqrt(jnp.square(factors) * variance + EPSILON))


class ConvolutionLayer(nn.Module):
    """MONAI's `Convolution` container, its `conv` and norm; gives the name its level."""

    features: int
    kernel_size: int
    convolution: str
    dtype: DTypeLike

    def setup(self) -> None:
        self.conv = Convolution(self.features, self.kernel_size, self.convolution, self.dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.conv(x, normalise=True)


class UnetResBlock(nn.Module):
    """MONAI's `UnetResBlock`: conv3-norm-lrelu-conv3-norm, + shortcut, lrelu.

    The shortcut is the identity, or a 1x1x1 convolution and a norm where the number of channels
    changes. `b x y z in_channels` -> `b x y z features`.

    Attributes:
        in_channels: input channels.
        features: output channels.
        convolution: `lax` or `planes`, see `Convolution`.
        dtype: of the computation; norms are in float32 always.
    """

    in_channels: int
    features: int
    convolution: str
    dtype: DTypeLike

    def setup(self) -> None:
        self.conv1 = ConvolutionLayer(self.features, 3, self.convolution, self.dtype)
        self.conv2 = ConvolutionLayer(self.features, 3, self.convolution, self.dtype)
        if self.in_channels != self.features:
            self.conv3 = ConvolutionLayer(self.features, 1, self.convolution, self.dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        out = self.conv2(nn.leaky_relu(self.conv1(x), 0.01))
        shortcut = self.conv3(x) if self.in_channels != self.features else x.astype(self.dtype)
        return nn.leaky_relu(out + shortcut, 0.01)


class UnetrBasicBlock(nn.Module):
    """MONAI's `UnetrBasicBlock(res_block=True)`: one `UnetResBlock` under the name `layer`."""

    in_channels: int
    features: int
    convolution: str
    dtype: DTypeLike

    def setup(self) -> None:
        self.layer = UnetResBlock(self.in_channels, self.features, self.convolution, self.dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.layer(x)


def residual_block(
    in_channels: int, features: int, *, convolution: str, remat: bool, dtype: DTypeLike
) -> UnetrBasicBlock:
    """A `UnetrBasicBlock`, with its norms and activations recomputed in the gradient if asked.

    With `remat` only the convolutions' outputs are kept for the gradient. The other arguments are
    `UnetResBlock`'s.

    Returns:
        The unbound module: `b x y z in_channels` -> `b x y z features`.
    """
    block = keep_convolutions(UnetrBasicBlock) if remat else UnetrBasicBlock
    return block(in_channels, features, convolution, dtype)


def keep_convolutions(block: type[Block]) -> type[Block]:
    """The block that keeps only its convolutions' outputs for the gradient, computes the rest."""
    policy = jax.checkpoint_policies.save_only_these_names(SAVED_CONVOLUTION)
    return nn.remat(block, policy=policy)
