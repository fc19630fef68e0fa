"""The segmentation of a volume -> numbers of classes on the prepared volume's grid."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from voco_jax.config.common import Chain, Classes, LabelledChain
from voco_jax.data.formats.readers import StoredVolume, VolumeError, load
from voco_jax.data.resample import pad, resample_nearest, resampled_positions
from voco_jax.data.volumes import Box, PreparedVolume, check_same_grid, orient_ras, volume_error
from voco_jax.types import Size


@dataclass(frozen=True)
class PreparedLabels:
    """A segmentation ready for the cache: numbers of classes, uint8, x y z."""

    voxels: np.ndarray  # of the prepared volume's size
    file_voxels: np.ndarray  # of the file, in RAS order


def prepare_labels(
    path: str | Path, chain: LabelledChain, volume: PreparedVolume
) -> PreparedLabels:
    """Runs the chain's geometry on the segmentation of a volume; nothing is interpolated.

    Args:
        path: of the segmentation.
        chain: of the volume.
        volume: what became of it.

    Returns:
        Numbers of classes; outside of the image they are 0.

    Raises:
        VolumeError: another grid than the image's, or values that are no class's; nothing else is
            raised for any file.
    """
    try:
        source = orient_ras(load(path))
        check_same_grid(source, volume.shape, volume.affine)
        whole = kept = class_numbers(source, chain.classes)
        if chain.spacing:
            positions = resampled_positions(volume.shape, volume.spacing, chain.spacing)
            kept = resample_nearest(whole, positions)
        kept = kept[tuple(slice(a, b) for a, b in zip(*volume.box, strict=True))]
        return PreparedLabels(pad(kept, chain.volume_size), whole)
    except Exception as error:
        raise volume_error(path, error) from error


def fit_labels(
    labels: np.ndarray, spacing: tuple[float, ...], chain: Chain, box: Box, stored: Size
) -> np.ndarray:
    """Brings the labels of a file's voxels to the grid of its prepared volume, whatever its fit.

    Args:
        labels: x y z of the file, RAS.
        spacing: of the file, RAS, mm.
        chain: with which the volume was prepared.
        box: what was kept.
        stored: voxels of the prepared volume.

    Returns:
        x y z of the size `stored`: the nearest label; 0 in what was padded.
    """
    grid: list[np.ndarray] = [np.arange(size) for size in labels.shape]  # that was cut, in voxels
    if chain.spacing:
        grid = resampled_positions(labels.shape, spacing, chain.spacing)
    positions, outside = [], []
    for first, last, size, along in zip(*box, stored, grid, strict=True):
        length, steps = last - first, np.arange(size, dtype=np.float64)
        if chain.fit == "resize":
            steps *= (length - 1) / max(size - 1, 1)
        else:  # padded on both sides, then the middle
            padded = max(length, size)
            steps += (padded // 2 - size // 2) - (padded - length) // 2
        positions.append(np.interp(first + steps, np.arange(len(along)), along))
        outside.append((steps < 0) | (steps > length - 1))
    found = resample_nearest(labels, positions)
    for axis, beyond in enumerate(outside):
        np.moveaxis(found, axis, 0)[beyond] = 0
    return found


def class_numbers(source: StoredVolume, classes: Classes) -> np.ndarray:
    """The numbers of the classes that a segmentation's values stand for.

    Args:
        source: as stored.
        classes: `LabelledChain.classes`.

    Returns:
        uint8, of the same axes.

    Raises:
        VolumeError: a value that is no class's.
    """
    values = source.voxels
    if values.dtype.kind == "f" or (source.slope, source.intercept) != (1.0, 0.0):
        scaled = source.hounsfield(values)
        values = np.rint(scaled)
        if not np.array_equal(values, scaled):  # NaN is not equal to itself either
            odd = scaled[values != scaled][0]
            raise VolumeError(
                source.path,
                f"unknown label: found the value {odd:g}, expected whole numbers; was it "
                "interpolated? Make it anew with nearest neighbours",
            )
    table = {value: number for number, (_, own) in enumerate(classes) for value in own}
    low, high = min(table), max(table)
    numbers_of = np.full(high - low + 2, -1, np.int16)  # its last element is for all other values
    numbers_of[np.array(list(table)) - low] = list(table.values())
    numbers, unknown = np.empty(values.shape, np.uint8), set()
    for plane, result in zip(values, numbers, strict=True):
        found = numbers_of[np.clip(plane.astype(np.int64), low - 1, high + 1) - low]
        unknown |= set(np.unique(plane[found < 0]).tolist())
        result[...] = found
    if unknown:
        raise VolumeError(
            source.path,
            f"unknown label: found the values {_listed(unknown)}, expected those of chain.classes, "
            f"{_listed(table)}; add them to a class, if they are none to the values of "
            f"{classes[0][0]!r}",
        )
    return numbers


def _listed(values: Iterable[float]) -> str:
    shown = [f"{value:g}" for value in sorted(values)]
    return ", ".join(shown[:20]) + (f" and {len(shown) - 20} more" if len(shown) > 20 else "")
