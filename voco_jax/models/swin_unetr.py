"""The encoder half of MONAI's SwinUNETR, and VoCo's network: the encoder and a projector.

The parameter tree spells MONAI's names, so that a PyTorch name is a rule: join the path with dots;
a name that ends in `_<digits>` ends in `.<digits>` there (`layers1_0` is `layers1.0`); a leaf
`kernel` or `scale` is `weight`, with a kernel's last two axes, in and out, moved to the front as
out, in: `swinViT/layers1c_0/layer/conv1/conv/kernel`, `swinViT.layers1c.0.layer.conv1.conv.weight`.
"""

from collections.abc import Sequence

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from voco_jax.errors import InputError
from voco_jax.models.attention import Attend, attend
from voco_jax.models.conv_blocks import CONVOLUTIONS, at_least_float32, residual_block
from voco_jax.models.projector import Projector
from voco_jax.models.swin import NEIGHBOURS, Size3, SwinTransformer

REDUCTION = 32
"""Voxels of the input per voxel of the last stage, along each axis."""


@flax.struct.dataclass
class EncoderOutput:
    """What the encoder returns.

    Attributes:
        hidden_states: the five outputs of the Swin transformer, `b x y z c`, each through a
            LayerNorm without parameters: sizes 1/2 ... 1/32, channels (1, 2, 4, 8, 16) * feature
            size.
        features: the outputs of encoder1, 2, 3, 4 and 10, `b x y z c`: sizes 1, 1/2, 1/4, 1/8,
            1/32, channels (1, 1, 2, 4, 16) * feature size; empty without convolution encoders.
        pooled: `b c` float32: the average over space of each of `features`, concatenated in that
            order (24 * feature size); without them of the last hidden state (16 * feature size).
    """

    hidden_states: tuple[jax.Array, ...]
    features: tuple[jax.Array, ...]
    pooled: jax.Array


def check_crop_size(crop_size: Sequence[int]) -> None:
    """Checks that the encoder can take crops of this size.

    Args:
        crop_size: x, y, z in voxels.

    Raises:
        ValueError: an axis is no multiple of 32, or none is 64 or more: then the last stage is a
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


class EncoderModules(nn.Module):
    """The modules of SwinUNETR's encoder, and their use; the base of the two networks below.

    Attributes:
        in_channels: of the image.
        feature_size: channels of the first stage, a multiple of 12: 48 (B), 96 (L), 192 (H).
        depths: blocks of each of the four stages.
        num_heads: attention heads of each stage; stage i has 2**i * feature_size channels.
        window_size: voxels of an attention window of each stage's feature map, one number or x y z.
        patch_merging: `legacy` (MONAI up to 1.4, all published VoCo weights), `merging` (1.5 and
            later) or `mergingv2`.
        use_v2: a residual convolution block before each stage.
        mlp_ratio: hidden channels of the MLPs over their channels.
        qkv_bias: whether queries, keys and values have a bias.
        drop_path_rate: stochastic depth of the last block, rising linearly from 0 at the first;
            needs an rng named `dropout` when training.
        conv_encoders: with encoder1, 2, 3, 4 and 10; without: the Swin transformer alone.
        remat: recompute activations in the gradient: of each Swin block all, of each residual
            block what is not a convolution.
        convolution: form of the 3x3x3 convolutions: `lax` (XLA's own) or `planes` (for CPUs).
        attention: `attend`, or another way to the same.
        dtype: of the computation; parameters, norms and softmax are float32 always.
    """

    in_channels: int = 1
    feature_size: int = 48
    depths: tuple[int, ...] = (2, 2, 2, 2)
    num_heads: tuple[int, ...] = (3, 6, 12, 24)
    window_size: int | Size3 = 7
    patch_merging: str = "legacy"
    use_v2: bool = True
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    drop_path_rate: float = 0.0
    conv_encoders: bool = True
    remat: bool = False
    convolution: str = "lax"
    attention: Attend = attend
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        self._check()
        fs = self.feature_size
        window = self.window_size
        wx, wy, wz = (window,) * 3 if isinstance(window, int) else window
        self.swinViT = SwinTransformer(
            features=fs,
            depths=tuple(self.depths),
            num_heads=tuple(self.num_heads),
            window_size=(wx, wy, wz),
            patch_merging=self.patch_merging,
            use_v2=self.use_v2,
            mlp_ratio=self.mlp_ratio,
            qkv_bias=self.qkv_bias,
            drop_path_rate=self.drop_path_rate,
            remat=self.remat,
            convolution=self.convolution,
            attention=self.attention,
            dtype=self.dtype,
        )
        if self.conv_encoders:
            self.encoder1 = self._encoder(self.in_channels, fs)
            self.encoder2 = self._encoder(fs, fs)
            self.encoder3 = self._encoder(2 * fs, 2 * fs)
            self.encoder4 = self._encoder(4 * fs, 4 * fs)
            self.encoder10 = self._encoder(16 * fs, 16 * fs)

    def _encoder(self, in_channels: int, features: int) -> nn.Module:
        return residual_block(
            in_channels,
            features,
            convolution=self.convolution,
            remat=self.remat,
            dtype=self.dtype,
        )

    def _check(self) -> None:
        if self.feature_size <= 0 or self.feature_size % 12:
            raise InputError(
                f"feature_size: found {self.feature_size}, expected a positive multiple of 12"
            )
        for name in ("depths", "num_heads"):
            value = tuple(getattr(self, name))
            if len(value) != 4 or min(value) < 1:
                raise InputError(f"{name}: found {value}, expected four positive numbers")
        for stage, heads in enumerate(self.num_heads):
            channels = self.feature_size * 2**stage
            if channels % heads:
                raise InputError(
                    f"num_heads: found {heads} for stage {stage + 1}, expected a divisor of its "
                    f"{channels} channels"
                )
        window = self.window_size
        sizes = (window,) * 3 if isinstance(window, int) else tuple(window)
        if len(sizes) != 3 or min(sizes) < 1:
            raise InputError(f"window_size: found {window}, expected one or three positive numbers")
        if self.patch_merging not in NEIGHBOURS:
            raise InputError(
                f"patch_merging: found {self.patch_merging!r}, expected one of {list(NEIGHBOURS)}"
            )
        if self.convolution not in CONVOLUTIONS:
            raise InputError(
                f"convolution: found {self.convolution!r}, expected one of {list(CONVOLUTIONS)}"
            )
        if self.mlp_ratio <= 0:
            raise InputError(f"mlp_ratio: found {self.mlp_ratio}, expected a positive number")
        if not 0 <= self.drop_path_rate < 1:
            raise InputError(
                f"drop_path_rate: found {self.drop_path_rate}, expected 0 or more and less than 1"
            )

    @property
    def pooled_size(self) -> int:
        """Channels of `EncoderOutput.pooled`."""
        return (24 if self.conv_encoders else 16) * self.feature_size

    def encode(self, x: jax.Array, train: bool) -> EncoderOutput:
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


class SwinUNETREncoder(EncoderModules):
    """MONAI's `SwinUNETR` up to its encoders: `b x y z in_channels` -> `EncoderOutput`.

    Attributes as in `EncoderModules`. Children: `swinViT`, `encoder1` ... `encoder4`, `encoder10`.
    """

    def __call__(self, x: jax.Array, train: bool) -> EncoderOutput:
        return self.encode(x, train)


class VoCoNetwork(EncoderModules):
    """The encoder and a projector: crops `b x y z in_channels` -> embeddings `b projector_size`.

    Attributes as in `EncoderModules`, and
        projector_size: of the projector's hidden layers and of the embeddings.

    Children: those of `SwinUNETREncoder` at the same level, and `proj_head`, so that the parameters
    of the encoder alone are this tree without `proj_head`.
    """

    projector_size: int = 2048

    def setup(self) -> None:
        super().setup()
        if self.projector_size < 1:
            raise InputError(
                f"projector_size: found {self.projector_size}, expected a positive number"
            )
        self.proj_head = Projector(self.pooled_size, self.projector_size, self.dtype)

    def __call__(self, crops: jax.Array, train: bool) -> jax.Array:
        return self.project(self.encode(crops, train).pooled)

    def project(self, pooled: jax.Array) -> jax.Array:
        """Pooled features `b pooled_size` of all crops of a batch -> embeddings."""
        return self.proj_head(pooled)
