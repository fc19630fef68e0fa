"""DICOM series: a folder whose files are the slices of one CT, read through SimpleITK (GDCM).

What is no slice is set aside: files that are not DICOM, DICOM objects that are no images (reports,
structures, DICOMDIR), and series of at most LOCALISER_SLICES images beside a longer one. All the
rest must be one series on one regular grid; missing slices at either end cannot be told.
"""

import os
import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from voco_jax.data.formats.stored import (
    FormatError,
    StoredVolume,
    affine_from_lps,
    check_size,
    checked_axes,
    checked_shape,
    file_inside,
)

MAGIC_AT, MAGIC = 128, b"DICM"
SUFFIXES = (".dcm", ".dicom", ".ima")
_PROBES = 3  # files without a suffix that are looked into, in a folder that may be a series
LOCALISER_SLICES = 3  # scouts have one to three
# Of the typical distance of two slices. A missing slice doubles it; positions that were rounded to
# 0.1 mm change 1.25 mm by 8 %.
SPACING_TOLERANCE = 0.1
_DIRECTION_TOLERANCE = 1e-3  # of a unit vector: headers have six digits
_HEAD = 2048  # bytes that hold the class of a file
# DICOM objects without slices: DICOMDIR, presentation states, waveforms and reports, registrations
# and segmentations, encapsulated documents, radiotherapy objects other than images.
_NO_IMAGES = re.compile(
    rb"1\.2\.840\.10008\.(1\.3\.10"
    rb"|5\.1\.4\.1\.1\.(11|9|88|66|104|481\.[2-9]|481\.1\d)(\.[\d.]+)?)\0?$"
)


@dataclass(frozen=True)
class _Slice:
    name: str
    series: str
    shape: tuple[int, int]  # columns and rows: x y
    spacing: tuple[float, float]  # of neighbouring columns, of rows; mm
    directions: np.ndarray  # 2 3: along a row, along a column; x to the left, y to the back
    position: np.ndarray  # 3, of the first voxel, mm
    dtype: np.dtype  # of the rescaled voxels, as ITK reads them


def load_series(folder: Path) -> StoredVolume:
    """Reads the one series in a folder.

    Args:
        folder: subfolders are left aside, and so are files whose name begins with a dot.

    Returns:
        The volume, rescaled to HU slice by slice (int16, int32 or float32): x along a slice's rows,
        y along its columns, z along the normal of both.

    Raises:
        FormatError: no DICOM, several series, a damaged file, slices that are not one regular
            upright grid, colours, several frames in a file.
        OSError: the folder cannot be read.
    """
    slices, affine = _slices(folder)
    shape = checked_shape((*slices[0].shape, len(slices)))
    axes = checked_axes(affine)
    voxels = _voxels(folder, slices, shape)
    return StoredVolume(folder, voxels, slope=1.0, intercept=0.0, affine=affine, axes=axes)


def ordered_slices(folder: Path) -> list[Path]:
    """The files of the one series in a folder, in the order of the volume's z axis.

    Raises:
        FormatError: see `load_series`.
        OSError: the folder cannot be read.
    """
    return [folder / one.name for one in _slices(folder)[0]]


def is_dicom(path: str | Path) -> bool:
    """Whether a file begins as DICOM does; False for what cannot be read."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            return False
        with open(path, "rb") as file:
            return file.read(MAGIC_AT + len(MAGIC))[MAGIC_AT:] == MAGIC
    except OSError:
        return False


def series_in(names: Sequence[str], folder: str | None) -> list[str]:
    """Whether a folder is a series; see `readers.Format.volumes`.

    Files named .dcm are taken at their word; a few without a suffix are looked into.
    """
    if any(name.lower().endswith(SUFFIXES) for name in names):
        return ["."]
    unnamed = sorted(name for name in names if _may_be_slice(name) and name != "DICOMDIR")
    probes = unnamed[:_PROBES] if folder else []
    return ["."] if any(is_dicom(f"{folder}/{name}") for name in probes) else []


def series_files(folder: Path) -> list[Path]:
    """The files in a folder, or the folder if there is none."""
    return [folder / name for name in _files(folder)] or [folder]


def _files(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(e.name for e in entries if not e.name.startswith(".") and not e.is_dir())


def _may_be_slice(name: str) -> bool:
    """Whether a file's name is one that slices have: .dcm, no suffix, or a number as suffix."""
    suffix = os.path.splitext(name)[1].lower()
    return suffix in (*SUFFIXES, "") or suffix[1:].isdigit()


def _images(folder: Path) -> list[str]:
    """The names of the files that are DICOM images, sorted."""
    names = []
    for name in _files(folder):
        if not _may_be_slice(name):
            continue
        with open(file_inside(folder, name), "rb") as file:
            head = file.read(_HEAD)
        if head[MAGIC_AT : MAGIC_AT + 4] != MAGIC:
            if name.lower().endswith(SUFFIXES) or len(head) <= MAGIC_AT:
                raise FormatError(
                    f"damaged slice: {name} is no DICOM file ({len(head)} bytes looked at); "
                    "copy it again or take it away"
                )
            continue
        kind = re.search(rb"\x02\0\x02\0UI(..)", head, re.DOTALL)
        uid = head[kind.end() :][: int.from_bytes(kind[1], "little")] if kind else b""
        if not _NO_IMAGES.match(uid):
            names.append(name)
    if not names:
        raise FormatError(
            "no DICOM: found a folder without DICOM images, expected the slices of one CT"
        )
    return names


def _slices(folder: Path) -> tuple[list[_Slice], np.ndarray]:
    """The slices of the one series in a folder, in order, and their affine."""
    return _grid(_one_series([_slice(folder, name) for name in _images(folder)]))


def _slice(folder: Path, name: str) -> _Slice:
    try:
        reader = _reader(folder / name)
        dtype = _dtype(reader)
    except FormatError as error:
        raise FormatError(f"{error} ({name})") from error
    size = tuple(reader.GetSize())
    tags = {}
    for key in ("0020|000e", "0020|0032", "0020|0037", "0028|0030", "0028|0004"):
        # Text of any file: what is no text becomes a mark, not an error.
        tags[key] = str(reader.GetMetaData(key)).strip(" \0") if reader.HasMetaDataKey(key) else ""
    if len(size) > 2 and size[2] > 1:
        raise FormatError(
            f"several frames: {name} holds {size[2]} images, expected one for each file; "
            "convert it to NIfTI"
        )
    if tags["0028|0004"] != "MONOCHROME2":
        raise FormatError(
            f"not a grey image: {name} is {tags['0028|0004'][:30]!r}, expected MONOCHROME2"
        )
    position = _numbers(name, "position", tags["0020|0032"], 3)
    directions = _numbers(name, "orientation", tags["0020|0037"], 6).reshape(2, 3)
    rows, columns = _numbers(name, "pixel spacing", tags["0028|0030"], 2).tolist()
    if np.abs(directions @ directions.T - np.eye(2)).max() > _DIRECTION_TOLERANCE:
        raise FormatError(f"absurd orientation: the rows and columns of {name} are no unit vectors")
    return _Slice(
        name, tags["0020|000e"], (size[0], size[1]), (columns, rows), directions, position, dtype
    )


def _reader(path: Path) -> Any:
    """SimpleITK's reader after it has read a file's header."""
    import SimpleITK  # a quarter of a second: not for those who have NIfTI only

    SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)
    reader = SimpleITK.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")  # no other one looks at the file
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        reason = f"unreadable: {_message(error)}; copy it again or convert it"
        raise FormatError(reason) from error
    return reader


def _message(error: RuntimeError) -> str:
    """What ITK says, in one line: the innermost message, without places in its source."""
    lines = [line.strip() for line in str(error).splitlines()]
    lines = [line for line in lines if line and not re.search(r"xx:\d+|^Reason: ", line)]
    message = re.sub(r"(itk::|ITK |sitk::)ERROR: (\w+\(0x\w+\): )?", "", (lines or ["?"])[-1])
    return f"ITK found: {message[:300]}"


def _dtype(reader: Any) -> np.dtype:
    """The numpy type of an image's voxels, which are one number each."""
    import SimpleITK

    names = ("Int8", "UInt8", "Int16", "UInt16", "Int32", "UInt32", "Int64", "UInt64")
    kinds = {
        getattr(SimpleITK, f"sitk{name}"): np.dtype(name.lower())
        for name in (*names, "Float32", "Float64")
    }
    pixel = reader.GetPixelID()
    if pixel not in kinds or reader.GetNumberOfComponents() != 1:
        name = SimpleITK.GetPixelIDValueAsString(pixel)
        raise FormatError(
            f"not a grey image: voxels are {name}, {reader.GetNumberOfComponents()} numbers each, "
            "expected HU, one number each"
        )
    return kinds[pixel]


def _numbers(name: str, what: str, text: str, count: int) -> np.ndarray:
    try:
        values = np.array([float(part) for part in text.split("\\")])
    except ValueError:
        values = np.empty(0)
    if len(values) != count or not np.isfinite(values).all():
        raise FormatError(
            f"no {what}: found {text[:100]!r} in {name}, expected {count} numbers; "
            "such images have no place in space"
        )
    return values


def _one_series(slices: list[_Slice]) -> list[_Slice]:
    series: dict[str, list[_Slice]] = {}
    for one in slices:
        series.setdefault(one.series, []).append(one)
    long = [found for found in series.values() if len(found) > LOCALISER_SLICES]
    if len(long) == 1 or len(series) == 1:
        return long[0] if long else slices
    found = ", ".join(f"{uid or 'none'} ({len(of)} images)" for uid, of in series.items())
    raise FormatError(
        f"several series: {found[:1000]}; expected one in a folder (beside it, ones of at most "
        f"{LOCALISER_SLICES} images are left aside): move each to its own folder"
    )


def _grid(slices: list[_Slice]) -> tuple[list[_Slice], np.ndarray]:
    """The slices in order, and their affine."""
    first = slices[0]
    for other in slices[1:]:
        same_size = (other.shape, other.spacing) == (first.shape, first.spacing)
        turned = np.abs(other.directions - first.directions).max() > _DIRECTION_TOLERANCE
        if not same_size or turned:
            raise FormatError(
                f"mixed slices: {first.name} and {other.name} of one series differ in size, pixel "
                "spacing or orientation; move each volume to its own folder"
            )
    across, down = first.directions
    normal = np.cross(across, down)
    slices = sorted(slices, key=lambda one: float(one.position @ normal))
    positions = np.array([one.position for one in slices])
    step = np.zeros(3)
    if len(slices) > 1:
        step = (positions[-1] - positions[0]) / (len(slices) - 1)
        _check_steps(slices, positions, normal)
    steps = np.stack([across * first.spacing[0], down * first.spacing[1], step], axis=1)
    return slices, affine_from_lps(positions[0], steps)


def _check_steps(slices: list[_Slice], positions: np.ndarray, normal: np.ndarray) -> None:
    """Whether each slice lies one step after the one before."""
    gaps = np.diff(positions, axis=0)
    along = gaps @ normal
    typical = float(np.median(along))
    close = np.flatnonzero(along <= SPACING_TOLERANCE * max(typical, 0.01))
    if close.size:
        index = close[0]
        raise FormatError(
            f"duplicate slices: {slices[index].name} and {slices[index + 1].name} are at one "
            f"place, as {close.size} pairs are; expected one image for each place: separate the "
            "phases or take the copies away"
        )
    usual = np.median(gaps, axis=0)
    off = np.sqrt(((gaps - usual) ** 2).sum(axis=1))
    worst = int(off.argmax())
    if off[worst] > SPACING_TOLERANCE * typical:
        sideways = abs(along[worst] - typical) < off[worst] / 2
        raise FormatError(
            f"irregular slice spacing: {along[worst]:.4g} mm between {slices[worst].name} and "
            f"{slices[worst + 1].name}{', and sideways' if sideways else ''}, {typical:.4g} mm "
            f"elsewhere, expected within {SPACING_TOLERANCE:.0%}; is a slice missing?"
        )


def _voxels(folder: Path, slices: list[_Slice], shape: tuple[int, int, int]) -> np.ndarray:
    """All slices in HU: int16 as long as they fit into it."""
    import SimpleITK

    integers = all(one.dtype.kind in "iu" and one.dtype.itemsize <= 4 for one in slices)
    dtype = np.dtype(np.int16 if integers else np.float32)
    biggest = max(one.dtype.itemsize for one in slices)
    # Compressed slices may be smaller than their voxels: only the absolute limit holds for them.
    check_size(shape, np.dtype(f"V{biggest}"), 0, 2**62, False)
    voxels = np.empty(shape[::-1], dtype)
    for index, one in enumerate(slices):
        reader = _reader(folder / one.name)
        try:
            image = reader.Execute()
        except RuntimeError as error:
            reason = f"damaged slice: {one.name}: {_message(error)}; copy it again"
            raise FormatError(reason) from error
        plane = np.squeeze(SimpleITK.GetArrayViewFromImage(image))
        if plane.shape != voxels.shape[1:]:
            raise FormatError(f"damaged slice: {one.name}: its size is not that of its header")
        if integers and voxels.dtype == np.int16:
            limits = np.iinfo(np.int16)
            if int(plane.min()) < limits.min or int(plane.max()) > limits.max:
                voxels = voxels.astype(np.int32)
        voxels[index] = plane
    return voxels.transpose(2, 1, 0)
