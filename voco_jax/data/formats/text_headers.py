"""What NRRD and MetaImage share: a header of text, the voxels behind it or in a file beside it.

ITK reads neither here. Its MetaImage reader is not made for untrusted files: `NDims = 1e308` ends
the process, and one byte changed in a compressed CT changed two fifths of its voxels without an
error. The voxels of both are read straight into one array, in the stored type, with the checksums
of compressed data looked at.
"""

import io
import os
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from isal import igzip

from voco_jax.data.formats.stored import (
    StoredVolume,
    VolumeError,
    axes_of,
    check_affine,
    check_size,
    file_inside,
    fill,
    opened,
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
    """The first MAX_HEADER bytes of a file.

    Raises:
        VolumeError: not a regular file, or empty.
        OSError: as open().
    """
    with opened(path) as file:
        return file.read(MAX_HEADER)


def one_file(path: Path, name: str) -> Path:
    """The data file that a header names.

    Args:
        path: of the header.
        name: as it stands there.

    Raises:
        VolumeError: several files, or see `file_inside`.
    """
    if name.upper().split()[:1] == ["LIST"] or "%" in name:
        raise VolumeError(
            path, f"several data files: found {name[:100]!r}, expected the name of one file"
        )
    return file_inside(path.parent, name, path)


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
        VolumeError: see `check_affine` and `check_size`.
        Exception: see `readers.load`.
    """
    check_affine(path, affine)
    with opened(data.file) as file:
        found, offset = os.fstat(file.fileno()).st_size, data.offset
        count = int(np.prod(shape, dtype=object))
        if offset < 0:
            offset = max(0, found - count * dtype.itemsize)
        if data.packing:
            check_size(path, shape, dtype, 0, max(0, found - offset), True)
        else:
            check_size(path, shape, dtype, offset, found, False)
        file.seek(offset)
        voxels = np.empty(count, dtype)
        fill(_unpacked(file, data.packing), voxels)
    return StoredVolume(
        path=path,
        voxels=voxels.reshape(shape, order="F"),
        slope=1.0,
        intercept=0.0,
        affine=affine,
        axes=axes_of(affine),
    )


def _unpacked(file: IO[bytes], packing: str) -> Any:
    if packing == "gzip":
        return igzip.IGzipFile(fileobj=file)
    return _Inflated(file) if packing == "zlib" else file


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
