"""DICOM series: slices of one CT in a folder, read through SimpleITK (GDCM).

The slices must be on one regular grid; `dicom_files` and `dicom_series` say what else may lie in
the folder. Missing slices at either end cannot be told.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from voco_jax.data.formats.dicom_files import Image, files_in, itk_message, open_image
from voco_jax.data.formats.dicom_series import (
    DicomVolume,
    digest_of,
    find_volumes,
    place_of,
    several,
)
from voco_jax.data.formats.stored import (
    Aside,
    FormatError,
    StoredVolume,
    affine_from_lps,
    check_size,
    checked_axes,
    checked_shape,
)

# Of the typical distance of two slices. A missing slice doubles it; positions that were rounded to
# 0.1 mm change 1.25 mm by 8 %.
SPACING_TOLERANCE = 0.1


def load_series(path: Path) -> StoredVolume:
    """Reads a series.

    Args:
        path: of a folder that holds one; subfolders are left aside, and so are files whose name
            begins with a dot. Of several in a folder FOLDER/NAME, see `dicom_series`.

    Returns:
        The volume, rescaled to HU slice by slice (int16, int32 or float32): x along a slice's rows,
        y along its columns, z along the normal of both.

    Raises:
        FormatError: no DICOM, several series, or volumes in one, a damaged file, slices that are
            not one regular upright grid, colours, several frames in a file.
        OSError: the folder cannot be read.
    """
    folder, slices, aside = _slices(path)
    affine = _affine(slices)
    shape = checked_shape((*slices[0].shape, len(slices)))
    axes = checked_axes(affine)
    return StoredVolume(
        path,
        _voxels(folder, slices, shape),
        slope=1.0,
        intercept=0.0,
        affine=affine,
        axes=axes,
        modality=slices[0].tags["modality"],
        aside=tuple(sorted(aside)),
        series=digest_of(slices[0].tags["series"]),
        study=digest_of(slices[0].tags["study"]),
    )


def fault_of(volume: DicomVolume) -> str:
    """Why a volume cannot be read, as far as its headers tell; or ""."""
    try:
        checked_shape((*volume.slices[0].shape, len(volume.slices)))
        checked_axes(_affine(volume.slices))
    except FormatError as error:
        return volume.fault or str(error)
    return volume.fault


def ordered_slices(path: Path) -> list[Path]:
    """The files of a series, in the order of the volume's z axis.

    Raises:
        FormatError: see `load_series`.
        OSError: the folder cannot be read.
    """
    folder, slices, _ = _slices(path)
    return [folder / one.name for one in slices]


def series_files(path: Path) -> list[Path]:
    """The files in the folder of a series, or the path if there is none."""
    folder, _ = place_of(path)
    return [folder / name for name in files_in(folder)] or [path]


def _slices(path: Path) -> tuple[Path, Sequence[Image], list[Aside]]:
    """The folder, the slices of a volume, in order, and the files that are no part of it."""
    folder, name = place_of(path)
    volumes, aside = find_volumes(folder)
    if name is None and len(volumes) > 1:
        raise FormatError(several(volumes))
    wanted = [volume for volume in volumes if name in (None, volume.full_name)]
    if not wanted:
        there = ", ".join(volume.full_name for volume in volumes)
        raise FormatError(
            f"missing file: {folder} holds no series of this name, only {there[:1000]}"
        )
    (volume,) = wanted
    if volume.fault:
        raise FormatError(volume.fault)
    return folder, volume.slices, [*volume.copies, *(aside if name is None else ())]


def _affine(slices: Sequence[Image]) -> np.ndarray:
    """Of slices in order, which have to be a regular stack."""
    first = slices[0]
    across, down = first.directions
    positions = np.array([one.position for one in slices])
    step = np.zeros(3)
    if len(slices) > 1:
        step = (positions[-1] - positions[0]) / (len(slices) - 1)
        _check_steps(slices, positions, first.normal)
    steps = np.stack([across * first.spacing[0], down * first.spacing[1], step], axis=1)
    return affine_from_lps(positions[0], steps)


def _check_steps(slices: Sequence[Image], positions: np.ndarray, normal: np.ndarray) -> None:
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


def _voxels(folder: Path, slices: Sequence[Image], shape: tuple[int, int, int]) -> np.ndarray:
    """All slices in HU: int16 as long as they fit into it."""
    import SimpleITK

    integers = all(one.dtype.kind in "iu" and one.dtype.itemsize <= 4 for one in slices)
    dtype = np.dtype(np.int16 if integers else np.float32)
    biggest = max(one.dtype.itemsize for one in slices)
    # Compressed slices may be smaller than their voxels: only the absolute limit holds for them.
    check_size(shape, np.dtype(f"V{biggest}"), 0, 2**62, False)
    voxels = np.empty(shape[::-1], dtype)
    for index, one in enumerate(slices):
        reader = open_image(folder / one.name)
        try:
            image = reader.Execute()
        except RuntimeError as error:
            reason = f"damaged slice: {one.name}: {itk_message(error)}; copy it again"
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
