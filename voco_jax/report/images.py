"""Pictures for the report: PNG in the page itself, small enough that all of them stay bounded."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from PIL import Image

BUDGET = 6_000_000  # bytes of all pictures of a page; as text they are a third more
LARGEST = 450_000  # bytes of one
_WIDTH, _PIXELS, _COLOURS = 1100, 60_000_000, 256

Item = TypeVar("Item")


@dataclass(frozen=True)
class Inline:
    """A picture as the page holds it."""

    source: str  # data:image/png;base64,...
    width: int
    height: int


def spread(items: Sequence[Item], most: int) -> list[Item]:
    """At most so many of a sequence: the first, the last, and evenly some between; 1: the last."""
    count = len(items)
    if count <= most:
        return list(items)
    if most == 1:
        return [items[-1]]
    return [items[round(place * (count - 1) / (most - 1))] for place in range(most)]


def _read(path: Path) -> Image.Image:
    try:
        with Image.open(path) as opened:
            if opened.width * opened.height > _PIXELS:
                raise ValueError(f"{opened.width}x{opened.height} pixels")
            return opened.convert("RGB")
    except (SyntaxError, Image.DecompressionBombError) as error:  # Pillow's, of damaged files
        raise ValueError(str(error)) from error


def inline(picture: Path | Image.Image, limit: int = LARGEST) -> Inline:
    """A picture, made smaller until it fits.

    Args:
        picture: a file, or what is drawn already.
        limit: bytes of the PNG.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is too large to be a picture of a run.
    """
    image = picture if isinstance(picture, Image.Image) else _read(picture)
    width = min(image.width, _WIDTH)
    while True:
        height = max(1, round(image.height * width / image.width))
        small = image.convert("RGB")
        if width < image.width:
            small = small.resize((width, height), Image.Resampling.LANCZOS)
        content = io.BytesIO()
        small.quantize(_COLOURS, Image.Quantize.FASTOCTREE).save(content, "PNG")
        if content.tell() <= limit or width <= 64:
            break
        width = int(width * 0.8)
    text = base64.b64encode(content.getvalue()).decode()
    return Inline(f"data:image/png;base64,{text}", width, height)
