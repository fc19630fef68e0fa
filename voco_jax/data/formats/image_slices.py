"""Slices as pictures: a folder whose PNG or JPEG files are the slices of one CT, as CC-CCII's.

Pictures say nothing of space. What is assumed: voxels of 1 mm; rows from front to back and columns
from the patient's right to left, as radiologists look at them; the lowest number at the feet.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from voco_jax.data.formats.stored import (
    MAX_BYTES,
    FormatError,
    StoredVolume,
    affine_from_lps,
    checked_shape,
    file_inside,
)

SUFFIXES = (".png", ".jpg", ".jpeg")
_FORMATS = ("PNG", "JPEG")
_DTYPES = {"L": np.uint8, "RGB": np.uint8, "I;16": np.uint16}  # by Pillow's mode
_NUMBER = re.compile(r"(\d+)\D*$")


def load_slices(folder: Path) -> StoredVolume:
    """Reads the pictures in a folder, in the order of the last number in each one's name.

    Args:
        folder: subfolders, other files and names that begin with a dot are left aside.

    Returns:
        The volume as stored, uint8 or uint16; of colours that are all grey, one channel.

    Raises:
        FormatError: no pictures, names without a number or with the same one, pictures of several
            sizes or kinds, colours, or a damaged one.
    """
    names = _in_order(folder)
    first = names[0]
    mode, (columns, rows) = _header(folder, first)
    if mode not in _DTYPES:
        raise FormatError(
            f"not grey: {first} is of Pillow's mode {mode}, expected 8 or 16 bits of grey "
            f"({', '.join(_DTYPES)}); convert the slices"
        )
    dtype = np.dtype(_DTYPES[mode])
    shape = checked_shape((columns, rows, len(names)))
    if columns * rows * len(names) * dtype.itemsize > MAX_BYTES:
        raise FormatError(
            f"absurd size: {len(names)} slices of {columns}x{rows}; at most {MAX_BYTES} bytes are "
            "read"
        )
    planes = np.empty((len(names), rows, columns), dtype)
    for plane, name in zip(planes, names, strict=True):
        plane[...] = _read(folder, name, mode, (columns, rows), first)
    affine = affine_from_lps(np.zeros(3), np.eye(3))
    assert planes.T.shape == shape
    return StoredVolume(folder, planes.T, slope=1.0, intercept=0.0, affine=affine, axes="LPS")


def slices_in(names: Sequence[str], folder: str | None) -> list[str]:
    """Whether a folder is a volume: all its files are pictures, named alike but for a number."""
    del folder
    stems = [os.path.splitext(name)[0] for name in names if name.lower().endswith(SUFFIXES)]
    alike = {re.sub(r"\d+$", "", stem) for stem in stems}
    numbered = all(stem[-1:].isdecimal() for stem in stems)
    found = len(stems) > 1 and len(stems) == len(names) and len(alike) == 1 and numbered
    return ["."] if found else []


def slice_files(folder: Path) -> list[Path]:
    """The pictures in a folder, or the folder if there is none."""
    return [folder / name for name in _pictures(folder)] or [folder]


def _pictures(folder: Path) -> list[str]:
    return [
        name
        for name in sorted(os.listdir(folder))
        if name.lower().endswith(SUFFIXES) and not name.startswith(".")
    ]


def _in_order(folder: Path) -> list[str]:
    by_number: dict[int, str] = {}
    for name in _pictures(folder):
        found = _NUMBER.search(os.path.splitext(name)[0])
        if found is None:
            raise FormatError(f"no number: {name} has none in its name, expected as slice_012.png")
        other = by_number.setdefault(int(found[1]), name)
        if other != name:
            raise FormatError(
                f"same number: {other} and {name}, expected one slice of each number; the folder "
                "has to hold one scan"
            )
    if not by_number:
        raise FormatError(f"no slices: found no {', '.join(SUFFIXES)} file in the folder")
    return [by_number[number] for number in sorted(by_number)]


def _header(folder: Path, name: str) -> tuple[str, tuple[int, int]]:
    """Mode and size of a picture."""
    with _opened(folder, name) as picture:
        return picture.mode, picture.size


def _opened(folder: Path, name: str) -> Any:
    from PIL import Image  # NIfTI needs none of it

    try:
        return Image.open(file_inside(folder, name), formats=_FORMATS)
    except FormatError:
        raise
    except Exception as error:  # whatever Pillow makes of a strange file
        raise FormatError(f"damaged slice: {name}: {error}; copy it again") from error


def _read(folder: Path, name: str, mode: str, size: tuple[int, int], first: str) -> np.ndarray:
    with _opened(folder, name) as picture:
        if (picture.mode, picture.size) != (mode, size):
            raise FormatError(
                f"another slice: {name} is {_described(picture.mode, picture.size)}, {first} "
                f"{_described(mode, size)}, expected one size and kind; the folder has to hold one "
                "scan"
            )
        try:
            values = np.asarray(picture)
        except Exception as error:
            raise FormatError(f"damaged slice: {name}: {error}; copy it again") from error
    if values.ndim == 2:
        return values
    grey = values[..., 0]
    if not (values == grey[..., None]).all():
        raise FormatError(f"not grey: {name} has colours, expected grey; convert the slices")
    return grey


def _described(mode: str, size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]} {mode}"
