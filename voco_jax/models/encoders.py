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
        raise InputError(f"model.encoder: found {name!r}, expected one of: {', '.join(ENCODERS)}")
    return ENCODERS[name]


def build_encoder(settings: Settings, platform: str, attention: Any, in_channels: int = 1) -> Any:
    """The `nn.Module` of a config's `model` section, see `Encoder.build`.

    Args:
        settings: the section.
        platform: JAX's name of the devices, as "cpu": chooses what is "auto".
        attention: `attention.attend`, or another way to the same.
        in_channels: of the image.
    """
    return find_encoder(settings.encoder).build(
        settings, in_channels=in_channels, attention=attention, **_computation(settings, platform)
    )


def build_decoder(settings: Settings, platform: str, classes: int) -> Any:
    """The decoder of a config's encoder, see `Encoder.build_decoder`.

    Args:
        settings: the config's `model` section.
        platform: as `build_encoder`'s.
        classes: the background among them.

    Raises:
        InputError: the encoder has no decoder, or not with these settings.
    """
    build = find_encoder(settings.encoder).build_decoder
    if build is None:
        names = [name for name, encoder in ENCODERS.items() if encoder.build_decoder]
        raise InputError(
            f"model.encoder: found {settings.encoder!r}, which has no decoder for segmentation, "
            f"expected one of: {', '.join(names)}"
        )
    return build(settings, classes=classes, **_computation(settings, platform))


def build_segmentation_network(
    settings: Settings, platform: str, channels: int, classes: int, attention: Any
) -> Any:
    """Encoder and decoder of a config's `model` section; see the two functions above."""
    from voco_jax.models.network import SegmentationNetwork

    return SegmentationNetwork(
        build_encoder(settings, platform, attention, channels),
        build_decoder(settings, platform, classes),
    )


def build_classification_network(
    settings: Settings, platform: str, classes: int, hidden: int, attention: Any
) -> Any:
    """Encoder and classifier of a config's `model` section; see `build_encoder`, `Classifier`."""
    from voco_jax.models.network import ClassificationNetwork

    return ClassificationNetwork(build_encoder(settings, platform, attention), classes, hidden)


def _computation(settings: Settings, platform: str) -> dict[str, Any]:
    """How it is computed: what encoders and decoders have in common."""
    import jax.numpy as jnp

    convolution = settings.convolution
    if convolution == "auto":
        convolution = "planes" if platform == "cpu" else "lax"
    return {
        "remat": settings.remat,
        "dtype": jnp.dtype(settings.dtype),
        "convolution": convolution,
    }
