"""The encoders that a config can name. A new one is its own files and a line here."""

from typing import Any

from voco_jax.errors import InputError
from voco_jax.models import swin_unetr_pytorch
from voco_jax.models.encoder import Encoder, Settings

ENCODERS: dict[str, Encoder] = {"swin_unetr": swin_unetr_pytorch.ENCODER}


def find_encoder(name: str) -> Encoder:
    """The encoder of this name.

    Raises:
        InputError: there is none.
    """
    if name not in ENCODERS:
        raise InputError(f"encoder: found {name!r}, expected one of: {', '.join(ENCODERS)}")
    return ENCODERS[name]


def build_encoder(settings: Settings, platform: str, attention: Any) -> Any:
    """The `nn.Module` of a config's `model` section, see `Encoder.build`.

    Args:
        settings: the section.
        platform: JAX's name of the devices, as "cpu": chooses what is "auto".
        attention: `attention.attend`, or another way to the same.
    """
    import jax.numpy as jnp

    convolution = settings.convolution
    if convolution == "auto":
        convolution = "planes" if platform == "cpu" else "lax"
    return find_encoder(settings.encoder).build(
        settings,
        remat=settings.remat,
        dtype=jnp.dtype(settings.dtype),
        convolution=convolution,
        attention=attention,
    )
