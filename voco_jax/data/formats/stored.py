"""A CT as its file stores it, and the checks that all file formats share.

Files are untrusted: a header's claims are checked before memory is taken, and a header leads to no
file outside its own folder.
"""

import math
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import nibabel
import numpy as np

from voco_jax.errors import InputError
from voco_jax.files import is_utf8, printable

MAX_BYTES = 4 * 2**30  # of uncompressed voxels: 2048 x 1024 x 1024 in int16
GZIP_RATIO = 1032  # deflate cannot compress more
SPACING_MM = (0.05, 25.0)  # smallest and largest plausible voxel
# Axes further from a right angle are a failure: 1 degree moves the end of a 300 mm scan by 5 mm,
# about one slice; headers that were rounded to a few digits stay far below.
TILT_DEGREES = 1.0
_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])  # ITK's and DICOM's x is to the left, y to the back
_BLOCK = 8 * 2**20


Aside = tuple[str, str]
"""Name of a file that is no part of a volume, and why: a few fixed words, a colon, details."""


class FormatError(Exception):
    """What a reader finds wrong with a file; `readers.load` makes a VolumeError of it."""


class VolumeError(InputError):
    """A file that is no usable CT volume; `reason` starts with a few fixed words, then a colon."""

    def __init__(self, path: str | Path, reason: str) -> None:
        super().__init__(str(path), reason)
        self.path = str(path)
        self.reason = reason

    def __str__(self) -> str:
        """File and reason."""
        return f"{self.path}: {self.reason}"


@dataclass(frozen=True)
class StoredVolume:
    """A CT as stored: the numbers of the file and what turns them into HU in space."""

    path: Path
    voxels: np.ndarray  # x y z, the file's dtype
    slope: float  # HU = voxels * slope + intercept
    intercept: float
    affine: np.ndarray  # 4 4, voxel index to mm; x to the right, y to the front, z up
    axes: str  # direction of each axis, as "LPS"
    modality: str = ""  # as "CT"; of DICOM alone
    aside: tuple[Aside, ...] = ()  # files in its folder that are no part of it
    series: str = ""  # digest of its SeriesInstanceUID; of DICOM alone
    study: str = ""  # digest of its StudyInstanceUID; of DICOM alone

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Distance of neighbouring voxels along x y z, mm."""
        x, y, z = np.sqrt((self.affine[:3, :3] ** 2).sum(axis=0)).tolist()
        return x, y, z

    def hounsfield(self, stored: np.ndarray) -> np.ndarray:
        """Stored numbers as new float32 HU (through float64 if scaled, as nibabel does)."""
        if (self.slope, self.intercept) == (1.0, 0.0):
            return stored.astype(np.float32)
        return (stored * np.float64(self.slope) + self.intercept).astype(np.float32)


def check_name(path: str | Path) -> None:
    """Checks that a name is UTF-8, as lists, caches and libraries need it.

    Raises:
        FormatError: it is not, as of old archives and some network file systems.
    """
    if not is_utf8(path):
        raise FormatError(
            f"name not UTF-8: {printable(path)}; rename it (convmv -f latin1 -t utf8 does so for "
            "whole folders)"
        )


def affine_from_lps(origin: Sequence[float] | np.ndarray, steps: np.ndarray) -> np.ndarray:
    """Voxel index to mm, in the axes of NIfTI, from ITK's and DICOM's.

    Args:
        origin: of the first voxel, mm, x to the left, y to the back, z up.
        steps: 3 3, mm; column i is the way from a voxel to the next along axis i.

    Returns:
        4 4; x to the right, y to the front, z up.
    """
    affine = np.eye(4)
    affine[:3, :3] = steps
    affine[:3, 3] = origin
    return _LPS_TO_RAS @ affine


def checked_shape(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """The shape without trailing axes of size 1, or of 0, as some programs write.

    Raises:
        FormatError: not three axes of at least two voxels.
    """
    while len(shape) > 3 and shape[-1] in (0, 1):
        shape = shape[:-1]
    if len(shape) != 3 or min(shape) < 2:
        raise FormatError(
            f"not 3-D: shape {'x'.join(map(str, shape))}, expected three axes of at least 2 voxels"
        )
    return shape[0], shape[1], shape[2]


def check_size(
    shape: tuple[int, ...], dtype: np.dtype, offset: int, found: int, packed: bool
) -> None:
    """Whether a file can hold what its header claims.

    Args:
        shape: claimed.
        dtype: claimed.
        offset: of the voxels in the file (the unpacked one, if packed).
        found: bytes of the file.
        packed: whether the file is compressed with deflate.

    Raises:
        FormatError: more than MAX_BYTES, more than the file can hold, or a file that ends early.
    """
    wanted = offset + math.prod(shape) * dtype.itemsize
    if wanted > (found * GZIP_RATIO if packed else MAX_BYTES) or wanted > MAX_BYTES:
        raise FormatError(
            f"absurd size: the header claims {'x'.join(map(str, shape))} voxels, {wanted} bytes, "
            f"in a file of {found}; at most {MAX_BYTES} are read"
        )
    if not packed and wanted > found:
        raise FormatError(
            f"truncated: found {found} bytes, expected {wanted} as the header says; copy it again"
        )


def checked_axes(affine: np.ndarray) -> str:
    """The direction of each axis, as "LPS".

    Raises:
        FormatError: the affine is none of a scanner: not finite, no plausible spacing, or axes that
            are not at right angles.
    """
    spacing = np.sqrt((affine[:3, :3] ** 2).sum(axis=0))
    low, high = SPACING_MM
    if not (np.isfinite(affine).all() and (spacing >= low).all() and (spacing <= high).all()):
        raise FormatError(
            f"absurd spacing: {'x'.join(f'{s:g}' for s in spacing)} mm, "
            f"expected {low} to {high} mm; correct the header"
        )
    directions = affine[:3, :3] / spacing
    if abs(np.linalg.det(directions)) < 1e-3:
        raise FormatError("absurd orientation: the header's affine is singular; correct the header")
    cosines = np.abs(directions.T @ directions - np.eye(3)).max()
    tilt = np.degrees(np.arcsin(min(float(cosines), 1.0)))
    if tilt > TILT_DEGREES:
        raise FormatError(
            f"gantry tilt: the axes are {tilt:.1f} degrees from right angles, expected at most "
            f"{TILT_DEGREES:g}; resample it to an upright grid"
        )
    return "".join(nibabel.aff2axcodes(affine))


def file_inside(folder: Path, name: str) -> Path:
    """The path of a file that a header in a folder names, or of one beside another.

    Args:
        folder: that it must be in or below; links are followed.
        name: relative to the folder.

    Raises:
        FormatError: it is missing, leads out of the folder or is no regular file.
    """
    root = os.path.realpath(folder)
    if "\0" in name or os.path.isabs(name) or ".." in name.replace("\\", "/").split("/"):
        raise FormatError(
            f"outside its folder: the header names the data file {name[:200]!r}, "
            "expected the name of a file beside it"
        )
    found = os.path.realpath(os.path.join(root, name))
    if os.path.commonpath([root, found]) != root:
        raise FormatError(
            f"outside its folder: {name[:200]!r} is a link out of {root}; put the file there"
        )
    try:
        regular = stat.S_ISREG(os.stat(found).st_mode)
    except (OSError, ValueError) as error:
        raise FormatError(
            f"missing file: its data are in {name[:200]!r}, which is not beside it"
        ) from error
    if not regular:
        raise FormatError(f"not a file: {name[:200]!r} is not a regular file")
    return Path(found)


def opened(path: Path) -> IO[bytes]:
    """A regular file, open; anything else (a pipe would wait for ever) is refused.

    Raises:
        FormatError: not a regular file, or empty.
        OSError: as open().
    """
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):
        raise FormatError("not a file: found a device, a pipe or a socket")
    if found.st_size == 0:
        raise FormatError("empty file: 0 bytes; copy it again")
    return open(path, "rb")


def read_array(stream: IO[bytes], shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Reads voxels, the first axis fastest; the read past their end makes gzip check its checksum.

    Raises:
        EOFError: the stream ends early.
    """
    voxels = np.empty(math.prod(shape), dtype)
    target = voxels.view(np.uint8).data
    done = 0
    while done < len(target):
        count = stream.readinto(target[done : done + _BLOCK])  # type: ignore[attr-defined]
        if not count:
            raise EOFError
        done += count
    stream.read(1)
    return voxels.reshape(shape, order="F")
