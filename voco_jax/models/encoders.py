"""The encoders that a config can name. A new one is its own files and a line here."""

from voco_jax.errors import InputError
from voco_jax.models import swin_unetr_pytorch
from voco_jax.models.encoder import Encoder

ENCODERS: dict[str, Encoder] = {"swin_unetr": swin_unetr_pytorch.ENCODER}


def find_encoder(name: str) -> Encoder:
    """The encoder of this name.

    Raises:
        InputError: there is none.
    """
    if name not in ENCODERS:
        raise InputError(f"encoder: found {name!r}, expected one of: {', '.join(ENCODERS)}")
    return ENCODERS[name]
