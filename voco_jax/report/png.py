"""Pictures as files."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

from voco_jax.files import write_aside


def write_png(path: Path, picture: np.ndarray) -> None:
    """Writes a picture so that it is there complete or not at all.

    Args:
        path: of the file.
        picture: (rows, columns, 3) uint8.

    Raises:
        OSError: it cannot be written.
    """
    content = io.BytesIO()
    Image.fromarray(picture).save(content, "PNG")
    write_aside(path, content.getvalue()).replace(path)
