"""DICOM series: a folder whose files are the slices of one CT, read through SimpleITK (GDCM).

The slices must be one series on one regular grid; `dicom_files` says what else may lie in the
folder. Missing slices at either end cannot be told.
"""

import re
from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from voco_jax.data.formats.dicom_files import (
    DIRECTION_TOLERANCE,
    VOLUME_TAGS,
    Image,
    files_in,
    find_slices,
    itk_message,
    open_image,
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
_MOST_INTERLEAVED = 4  # volumes in one series whose slices alternate


def load_series(folder: Path) -> StoredVolume:
    """Reads the one series in a folder.

    Args:
        folder: subfolders are left aside, and so are files whose name begins with a dot.

    Returns:
        The volume, rescaled to HU slice by slice (int16, int32 or float32): x along a slice's rows,
        y along its columns, z along the normal of both.

    Raises:
        FormatError: no DICOM, several series, or volumes in one, a damaged file, slices that are
            not one regular upright grid, colours, several frames in a file.
        OSError: the folder cannot be read.
    """
    slices, affine, aside = _slices(folder)
    shape = checked_shape((*slices[0].shape, len(slices)))
    axes = checked_axes(affine)
    return StoredVolume(
        folder,
        _voxels(folder, slices, shape),
        slope=1.0,
        intercept=0.0,
        affine=affine,
        axes=axes,
        modality=slices[0].tags["modality"],
        aside=tuple(sorted(aside)),
    )


def ordered_slices(folder: Path) -> list[Path]:
    """The files of the one series in a folder, in the order of the volume's z axis.

    Raises:
        FormatError: see `load_series`.
        OSError: the folder cannot be read.
    """
    return [folder / one.name for one in _slices(folder)[0]]


def series_files(folder: Path) -> list[Path]:
    """The files in a folder, or the folder if there is none."""
    return [folder / name for name in files_in(folder)] or [folder]


def _slices(folder: Path) -> tuple[list[Image], np.ndarray, list[Aside]]:
    """The slices of the one volume in a folder, in order, their affine, and the files set aside."""
    images, aside = find_slices(folder)
    first = images[0]
    for other in images[1:]:
        same_size = (other.shape, other.spacing) == (first.shape, first.spacing)
        turned = np.abs(other.directions - first.directions).max() > DIRECTION_TOLERANCE
        if not same_size or turned:
            raise FormatError(
                f"mixed slices: {first.name} and {other.name} of one series differ in size, pixel "
                "spacing or orientation; move each volume to its own folder"
            )
    places = {image.name: float(image.position @ first.normal) for image in images}
    images = sorted(images, key=lambda one: places[one.name])
    slices: list[Image] = []
    for image in images:
        last = slices[-1] if slices else None
        copy = last and image.tags["uid"] == last.tags["uid"] != ""
        if last and copy and np.array_equal(image.position, last.position):
            aside.append((image.name, f"a copy: of {last.name}, with its SOPInstanceUID"))
        else:
            slices.append(image)
    _check_one_volume(slices, [places[image.name] for image in slices])
    return slices, _affine(slices), aside


def _check_one_volume(slices: Sequence[Image], places: Sequence[float]) -> None:
    """Whether slices, in order along their normal, are of one volume, as far as their tags say."""
    for tag in VOLUME_TAGS:
        found: dict[str, list[float]] = defaultdict(list)
        for image, place in zip(slices, places, strict=True):
            found[image.tags[tag]].append(place)
        ranges = sorted((own[0], own[-1]) for own in found.values())
        if "" not in found and any(first < end for (_, end), (first, _) in pairwise(ranges)):
            counts = ", ".join(f"{value} ({len(own)} images)" for value, own in found.items())
            raise FormatError(
                f"several volumes: one series with the {tag} {counts[:500]}, which lie between "
                "each other; move each volume to its own folder"
            )
    numbers = [image.tags["number"] for image in slices]
    if not all(re.fullmatch(r"\d{1,9}", number) for number in numbers):
        return
    for count in range(2, _MOST_INTERLEAVED + 1):
        parts = [list(map(int, numbers[start::count])) for start in range(count)]
        ends = sorted((min(part[0], part[-1]), max(part[0], part[-1])) for part in parts if part)
        in_order = all(len(part) > 2 and _is_monotonic(part) for part in parts)
        if in_order and all(last < first for (_, last), (first, _) in pairwise(ends)):
            said = ", ".join(f"{first} to {last}" for first, last in ends)
            raise FormatError(
                f"several volumes: one series with the InstanceNumbers {said}, whose slices "
                "alternate; move each volume to its own folder"
            )


def _is_monotonic(numbers: Sequence[int]) -> bool:
    """Whether numbers only grow or only shrink."""
    return sorted(numbers) in (list(numbers), list(reversed(numbers)))


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
