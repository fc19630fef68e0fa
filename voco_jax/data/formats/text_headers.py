"""What NRRD and MetaImage share: a header of text, the voxels behind it or in a file beside it.

ITK reads neither here. Its MetaImage reader is not made for untrusted files: `NDims = 1e308` ends
the process, and one byte changed in a compressed CT changed two fifths of its voxels without an
error. The voxels of both are read straight into one array, in the stored type, with the checksums
of compressed data looked at.
"""

import io
import math
import os
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from isal import igzip

from voco_jax.data.formats.stored import (
    FormatError,
    StoredVolume,
    check_size,
    checked_axes,
    file_inside,
    opened,
    read_array,
)

MAX_HEADER = 2**20  # bytes; real ones have some thousands
_BLOCK = 2**18


@dataclass(frozen=True)
class DataFile:
    """Where the voxels are."""

    file: Path
    offset: int  # of the first byte; -1: they are the last bytes of the file
    packing: str  # "", "gzip" or "zlib"


def head_of(path: Path) -> bytes:
    """The first MAX_HEADER bytes of a file; see `opened`."""
    with opened(path) as file:
        return file.read(MAX_HEADER)


def one_file(path: Path, name: str) -> Path:
    """The data file that a header, at `path`, names.

    Raises:
        FormatError: several files, or see `file_inside`.
    """
    if name.upper().split()[:1] == ["LIST"] or "%" in name:
        raise FormatError(f"several data files: found {name[:100]!r}, expected one file's name")
    return file_inside(path.parent, name)


def read_voxels(
    path: Path, data: DataFile, shape: tuple[int, int, int], dtype: np.dtype, affine: np.ndarray
) -> StoredVolume:
    """The volume of a header.

    Args:
        path: of the header.
        data: where the voxels are; x runs fastest.
        shape: x y z.
        dtype: of the file, with its byte order.
        affine: see `StoredVolume`.

    Raises:
        FormatError: see `checked_axes` and `check_size`.
        Exception: see `readers.load`.
    """
    axes = checked_axes(affine)
    with opened(data.file) as file:
        found, offset = os.fstat(file.fileno()).st_size, data.offset
        if offset < 0:
            offset = max(0, found - math.prod(shape) * dtype.itemsize)
        skipped = 0 if data.packing else offset
        check_size(shape, dtype, skipped, found - offset + skipped, bool(data.packing))
        file.seek(offset)
        stream: Any = file
        if data.packing:
            stream = igzip.IGzipFile(fileobj=file) if data.packing == "gzip" else _Inflated(file)
        voxels = read_array(stream, shape, dtype)
    return StoredVolume(path, voxels, slope=1.0, intercept=0.0, affine=affine, axes=axes)


class _Inflated(io.RawIOBase):
    """What a zlib (or gzip) stream holds; its end is an error if its checksum was not seen."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._zlib = zlib.decompressobj(zlib.MAX_WBITS | 32)

    def readable(self) -> bool:
        """True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fills a part of a buffer; 0 at the stream's end."""
        while not self._zlib.eof:
            packed = self._zlib.unconsumed_tail or self._file.read(_BLOCK)
            if not packed:
                raise EOFError
            part = self._zlib.decompress(packed, len(buffer))
            if part:
                buffer[: len(part)] = part
                return len(part)
        return 0
