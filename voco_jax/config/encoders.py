"""The `model` section: what all encoders have, and a class of settings for each of them."""

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from voco_jax.config.common import STRICT, NotNegative, Positive, PositiveSize


@dataclass(frozen=True, config=STRICT, kw_only=True)
class Model:
    """An encoder; its own settings are in one of `ENCODERS`."""

    encoder: str  # a name of ENCODERS
    remat: bool  # recompute activations in the backward pass: less memory, more time
    crops_per_pass: NotNegative  # encoded at a time on each device: less memory; 0: all of them
    dtype: Literal["bfloat16", "float32"]  # of the computation; parameters are float32
    convolution: Literal["auto", "lax", "planes"]  # form of 3x3x3; auto: planes on a CPU, else lax
    attention: Literal["auto", "xla", "fused"]  # fused: kernels; auto: the device's best


@dataclass(frozen=True, config=STRICT, kw_only=True)
class SwinUNETR(Model):
    """The encoder of MONAI's SwinUNETR; names as there."""

    feature_size: Positive
    depths: tuple[Positive, Positive, Positive, Positive]
    num_heads: tuple[Positive, Positive, Positive, Positive]
    window_size: PositiveSize
    patch_merging: Literal["legacy", "merging", "mergingv2"]
    use_v2: bool
    conv_encoders: bool  # pool and concatenate encoder1 .. 10; else pool the last stage alone
    drop_path_rate: Annotated[float, Field(ge=0, lt=1)]


ENCODERS: dict[str, type[Model]] = {"swin_unetr": SwinUNETR}
"""The settings of each encoder; its code is in the table of the same names in `voco_jax.models`."""
