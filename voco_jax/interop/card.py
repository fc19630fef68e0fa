"""The JSON card beside an exported weight file: what the shapes of its tensors cannot say."""

import hashlib
from os import PathLike
from pathlib import Path
from typing import Any

from voco_jax.errors import InputError
from voco_jax.files import parse_object
from voco_jax.interop.match import printable
from voco_jax.models.encoder import Settings
from voco_jax.models.encoders import find_encoder

MAX_BYTES = 2**20
MAX_DEPTH = 20
"""Of lists and dicts in each other."""


def card_path(weights: str | PathLike[str]) -> Path:
    """Where the card of a weight file is: `voco.pt.json` for `voco.pt`."""
    path = Path(weights)
    return path.with_name(path.name + ".json")


def read_card(weights: str | PathLike[str]) -> dict[str, Any] | None:
    """The card of a weight file; None: it has none.

    Raises:
        InputError: the card is no JSON dict.
    """
    path = card_path(weights)
    if not path.is_file():
        return None
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"{path.stat().st_size} bytes")
        card = parse_object(path.read_bytes())
        if _is_deeper(card, MAX_DEPTH):
            raise ValueError(f"values nested deeper than {MAX_DEPTH}")
    except ValueError as error:
        raise InputError(
            f"{path}: found {printable(str(error))[:200]}, expected the JSON card of "
            f"{Path(weights).name}; delete it if it is not that file's"
        ) from error
    return card


def _is_deeper(value: Any, depth: int) -> bool:
    if not isinstance(value, dict | list):
        return False
    inner = value.values() if isinstance(value, dict) else value
    return depth == 0 or any(_is_deeper(item, depth - 1) for item in inner)


def file_sha256(path: str | PathLike[str]) -> str:
    """The file's SHA-256 in hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_card(weights: str | PathLike[str], model: Settings) -> list[str]:
    """Compares a weight file with the card beside it, and the card with the model.

    Args:
        weights: the weight file.
        model: the model's settings, as the config's `model` section.

    Returns:
        Notes for the reader.

    Raises:
        InputError: the file is not the card's, or it was trained with another encoder, or with
            other settings of those that no shape shows.
    """
    card = (read_card(weights) if Path(weights).is_file() else None) or {}
    if card.get("sha256") is not None and card["sha256"] != file_sha256(weights):
        raise InputError(
            f"{weights}: its SHA-256 is not the one in {card_path(weights)}: damaged or exchanged; "
            "export or fetch it again, or delete the card if it is another file's"
        )
    notes = []
    unseen = find_encoder(model.encoder).unseen
    for name in ("encoder", *unseen):
        what, ours, theirs = name.replace("_", " "), getattr(model, name), card.get(name)
        if theirs is not None and theirs != ours:
            said = printable(str(theirs))[:100]
            raise InputError(
                f"{weights}: its card says {what} {said!r}, the model has {ours!r}; set "
                f"model.{name}={said}"
            )
        if theirs is None and name in unseen:
            notes.append(
                f"the file does not say which {what} it was trained with; the model has {ours!r}, "
                f"and the wrong one gives other features without any error: {unseen[name]}"
            )
    return notes
