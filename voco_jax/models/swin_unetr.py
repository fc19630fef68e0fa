"""The encoder half of MONAI's SwinUNETR.

The parameter tree spells MONAI's names, so that a PyTorch name is a rule (`interop.names`):
`swinViT/layers1c_0/layer/conv1/conv/kernel` is `swinViT.layers1c.0.layer.conv1.conv.weight`.
"""

import functools
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from voco_jax.errors import InputError
from voco_jax.models.attention import Attend
from voco_jax.models.conv_blocks import at_least_float32, residual_block
from voco_jax.models.network import EncoderOutput
from voco_jax.models.swin import SwinTransformer
from voco_jax.types import Size

REDUCTION = 32
"""Voxels of the input per voxel of the last stage, along each axis."""


def check_crop_size(crop_size: Sequence[int]) -> None:
    """Checks that the encoder can take crops of this size.

    Args:
        crop_size: x, y, z in voxels.

    Raises:
        InputError: an axis is no multiple of 32, or none is 64 or more: then the last stage is a
            single voxel, and InstanceNorm has nothing to normalise.
    """
    size = tuple(int(extent) for extent in crop_size)
    multiples = all(extent > 0 and extent % REDUCTION == 0 for extent in size)
    if len(size) == 3 and multiples and max(size) > REDUCTION:
        return
    message = (
        f"crop size: found {size}, expected three multiples of {REDUCTION}, "
        f"at least one of them {2 * REDUCTION} or more"
    )
    if len(size) == 3:
        message += (
            f"; the nearest sizes are {_fitting(size, up=False)} and {_fitting(size, up=True)}"
        )
    raise InputError(message)


def _fitting(size: Sequence[int], *, up: bool) -> tuple[int, ...]:
    """The next size the encoder takes, no axis smaller (or larger, where 32 allows it)."""
    extra = REDUCTION - 1 if up else 0
    fit = [max((extent + extra) // REDUCTION, 1) * REDUCTION for extent in size]
    if max(fit) == REDUCTION:
        fit[size.index(max(size))] = 2 * REDUCTION
    return tuple(fit)


class SwinUNETREncoder(nn.Module):
    """MONAI's `SwinUNETR` up to its encoders: `b x y z in_channels` -> `EncoderOutput`.

    Of the output `hidden_states` are the Swin transformer's five, each through a LayerNorm without
    parameters: sizes 1/2 ... 1/32, channels (1, 2, 4, 8, 16) * feature size; `features` are those
    of encoder1, 2, 3, 4 and 10: sizes 1, 1/2, 1/4, 1/8, 1/32, channels (1, 1, 2, 4, 16) * feature
    size, or none without convolution encoders; `pooled` has the averages over space of each of
    `features`, in that order, or without them of the last hidden state.

    Attributes:
        in_channels: of the image: 1 for CT.
        feature_size: channels of the first stage, a multiple of 12: 48 (B), 96 (L), 192 (H).
        depths: blocks of each of the four stages.
        num_heads: attention heads of each stage; stage i has 2**i * feature_size channels.
        window_size: voxels of an attention window of each stage's feature map, x y z.
        patch_merging: `legacy` (MONAI up to 1.4, all published VoCo weights), `merging` (1.5 and
            later) or `mergingv2`.
        use_v2: a residual convolution block before each stage.
        conv_encoders: with encoder1, 2, 3, 4 and 10; without: the Swin transformer alone.
        drop_path_rate: stochastic depth of the last block, rising linearly from 0 at the first;
            needs an rng named `dropout` when training.
        remat: recompute activations in the gradient: of each Swin block all, of each residual
            block what is not a convolution.
        convolution: form of the 3x3x3 convolutions: `lax` (XLA's own) or `planes` (for CPUs).
        attention: `attention.attend`, or another way to the same.
        dtype: of the computation; parameters, norms and softmax are float32 always.
    """

    in_channels: int
    feature_size: int
    depths: tuple[int, ...]
    num_heads: tuple[int, ...]
    window_size: Size
    patch_merging: str
    use_v2: bool
    conv_encoders: bool
    drop_path_rate: float
    remat: bool
    convolution: str
    attention: Attend
    dtype: DTypeLike

    def setup(self) -> None:
        fs = self.feature_size
        if fs % 12:
            raise InputError(f"feature_size: found {fs}, expected a multiple of 12")
        for stage, heads in enumerate(self.num_heads):
            channels = fs * 2**stage
            if channels % heads:
                raise InputError(
                    f"num_heads: found {heads} for stage {stage + 1}, expected a divisor of its "
                    f"{channels} channels"
                )
        self.swinViT = SwinTransformer(
            features=fs,
            depths=self.depths,
            num_heads=self.num_heads,
            window_size=self.window_size,
            patch_merging=self.patch_merging,
            use_v2=self.use_v2,
            drop_path_rate=self.drop_path_rate,
            remat=self.remat,
            convolution=self.convolution,
            attention=self.attention,
            dtype=self.dtype,
        )
        if self.conv_encoders:
            block = functools.partial(
                residual_block, convolution=self.convolution, remat=self.remat, dtype=self.dtype
            )
            self.encoder1 = block(self.in_channels, fs)
            self.encoder2 = block(fs, fs)
            self.encoder3 = block(2 * fs, 2 * fs)
            self.encoder4 = block(4 * fs, 4 * fs)
            self.encoder10 = block(16 * fs, 16 * fs)

    @property
    def pooled_size(self) -> int:
        """Channels of `EncoderOutput.pooled`."""
        return (24 if self.conv_encoders else 16) * self.feature_size

    def __call__(self, x: jax.Array, train: bool) -> EncoderOutput:
        """Runs the encoder.

        Args:
            x: `b x y z in_channels`, intensities in about 0..1.
            train: whether drop path is active; pass it by position.

        Raises:
            ValueError: the shape does not fit.
        """
        if x.ndim != 5 or x.shape[-1] != self.in_channels:
            raise ValueError(
                f"crops: found shape {x.shape}, expected (batch, x, y, z, {self.in_channels})"
            )
        check_crop_size(x.shape[1:4])
        hidden_states = self.swinViT(x, train)
        if not self.conv_encoders:
            return EncoderOutput(hidden_states, (), _average_pool(hidden_states[-1]))
        features = (
            self.encoder1(x),
            self.encoder2(hidden_states[0]),
            self.encoder3(hidden_states[1]),
            self.encoder4(hidden_states[2]),
            self.encoder10(hidden_states[4]),
        )
        pooled = jnp.concatenate([_average_pool(feature) for feature in features], axis=-1)
        return EncoderOutput(hidden_states, features, pooled)


def _average_pool(x: jax.Array) -> jax.Array:
    """`b x y z c` -> `b c`, float32."""
    return jnp.mean(at_least_float32(x), axis=(1, 2, 3))
