"""One CT file -> one prepared volume: read, orient, window, crop to the foreground, resize.

The chain of the VoCo 10k release, equal to MONAI's LoadImage, Orientation("RAS"),
ScaleIntensityRange(clip=True), CropForeground, Resize(mode="trilinear", align_corners=True).
It works on the stored numbers (int16 as a rule) through views; only the foreground box becomes
float32.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import nibabel
import numpy as np

from voco_jax.config import Chain
from voco_jax.data.readers import Source, VolumeError, load

Box = tuple[tuple[int, int, int], tuple[int, int, int]]  # first and last + 1 voxel, x y z


@dataclass(frozen=True)
class PreparedVolume:
    """A volume ready for the cache, and what it was."""

    voxels: np.ndarray  # x y z, float32, 0..1
    axes: str  # of the file, as "LPS"; everything below is in RAS order
    shape: tuple[int, int, int]  # of the file
    spacing: tuple[float, float, float]  # of the file, mm
    box: Box  # foreground, in voxels of the file
    mean: float  # of the prepared voxels


def orient_ras(source: Source) -> Source:
    """Turns the axes to right, anterior, superior; a view, nothing is resampled.

    Args:
        source: any orientation.

    Returns:
        The same volume with its axes permuted and flipped, and its affine changed with them.
    """
    orientation = nibabel.io_orientation(source.affine)
    affine = source.affine @ nibabel.orientations.inv_ornt_aff(orientation, source.voxels.shape)
    voxels = nibabel.apply_orientation(source.voxels, orientation)
    return replace(source, voxels=voxels, affine=affine, axes="RAS")


def window(hu: np.ndarray, low: float, high: float) -> np.ndarray:
    """Maps HU to 0..1, in place.

    Args:
        hu: float32, overwritten.
        low: HU that becomes 0.
        high: HU that becomes 1.

    Returns:
        `hu`, clipped to 0..1.
    """
    hu -= low
    hu /= high - low
    return np.clip(hu, 0, 1, out=hu)


def foreground_box(source: Source, limits: tuple[float, float], threshold: float) -> Box:
    """The smallest box that holds all voxels above a threshold of the window.

    Args:
        source: any orientation.
        limits: window, HU.
        threshold: 0..1 of the window; foreground is larger.

    Returns:
        First and last + 1 index of each axis.

    Raises:
        VolumeError: NaN or infinite voxels, all voxels equal, or no foreground.
    """
    hits = [np.zeros(size, bool) for size in source.voxels.shape]
    smallest, largest = np.inf, -np.inf
    outer = int(np.argmax(np.abs(source.voxels.strides)))
    others = [axis for axis in range(3) if axis != outer]
    for index, part in _slabs(source.voxels.shape, outer):
        hu = source.hounsfield(part)
        low, high = float(hu.min()), float(hu.max())
        if not np.isfinite(low) or not np.isfinite(high):  # either is NaN if any voxel is
            raise VolumeError(
                source.path, "NaN or infinite voxels: expected HU; repair or leave out the file"
            )
        smallest, largest = min(smallest, low), max(largest, high)
        foreground = window(hu, *limits) > threshold
        hits[outer][index] = foreground.any()
        for axis in others:
            away = tuple(other for other in range(3) if other != axis)
            hits[axis] |= foreground.any(axis=away)
    if smallest == largest:
        raise VolumeError(source.path, f"constant: every voxel is {smallest:g} HU")
    if not hits[outer].any():
        raise VolumeError(
            source.path,
            f"no foreground: the largest voxel is {largest:g} HU, expected some above "
            f"{limits[0] + threshold * (limits[1] - limits[0]):g}; is the file in HU?",
        )
    found = [np.flatnonzero(hit) for hit in hits]
    first, last = ([int(f[0]) for f in found], [int(f[-1]) + 1 for f in found])
    return (first[0], first[1], first[2]), (last[0], last[1], last[2])


def resize(volume: np.ndarray, size: tuple[int, int, int]) -> np.ndarray:
    """Trilinear interpolation with aligned corners and no anti-aliasing, as PyTorch's.

    Axis by axis, the one that shrinks most first, in the order of memory.

    Args:
        volume: x y z, float32, any strides.
        size: new x y z.

    Returns:
        x y z, float32; memory order as that of `volume`.
    """
    layout = np.argsort([-abs(stride) for stride in volume.strides], kind="stable").tolist()
    result = volume.transpose(layout)
    sizes = [size[axis] for axis in layout]
    for axis in sorted(range(3), key=lambda axis: sizes[axis] / result.shape[axis]):
        result = _resize_axis(result, axis, sizes[axis])
    return result.transpose(np.argsort(layout))


def prepare_volume(path: str | Path, chain: Chain) -> PreparedVolume:
    """Runs the whole chain on one file.

    Args:
        path: a NIfTI file.
        chain: window, threshold and size.

    Returns:
        The volume before quantisation, of `chain.volume_size`, and facts for the manifest.

    Raises:
        VolumeError: the file is no usable CT volume; nothing else is raised for any file.
    """
    try:
        stored = load(path)
        source = orient_ras(stored)
        box = foreground_box(source, chain.window, chain.foreground_threshold)
        part = tuple(slice(first, last) for first, last in zip(*box, strict=True))
        voxels = resize(window(source.hounsfield(part), *chain.window), chain.volume_size)
        mean = float(voxels.mean(dtype=np.float64))
        return PreparedVolume(voxels, stored.axes, source.voxels.shape, source.spacing, box, mean)
    except VolumeError:
        raise
    except MemoryError as error:
        raise VolumeError(path, "out of memory: use fewer workers") from error
    except Exception as error:  # one strange file never ends a run over thousands
        raise VolumeError(path, f"unexpected: {type(error).__name__}: {error}") from error


def quantise(volume: np.ndarray, dtype: str) -> np.ndarray:
    """Stores 0..1 in few bits.

    Args:
        volume: float, 0..1.
        dtype: "uint8" (steps of 1/255) or "float16".

    Returns:
        The same shape, C order.
    """
    if dtype == "uint8":
        return np.ascontiguousarray(np.rint(volume * np.float32(255)).astype(np.uint8))
    return np.ascontiguousarray(volume.astype(np.float16))


def dequantise(volume: np.ndarray) -> np.ndarray:
    """The inverse of `quantise`: float32, 0..1."""
    if volume.dtype == np.uint8:
        return volume.astype(np.float32) / np.float32(255)
    return volume.astype(np.float32)


def _slabs(shape: tuple[int, ...], axis: int) -> Iterator[tuple[int, tuple[slice, ...]]]:
    """Slices of thickness 1 along an axis."""
    for index in range(shape[axis]):
        part = [slice(None)] * 3
        part[axis] = slice(index, index + 1)
        yield index, tuple(part)


def _resize_axis(volume: np.ndarray, axis: int, size: int) -> np.ndarray:
    """Linear interpolation along one axis of a C-ordered array, slice by slice."""
    old = volume.shape[axis]
    if old == size:
        return volume
    scale = np.float32(old - 1) / np.float32(size - 1) if size > 1 else np.float32(0)
    position = scale * np.arange(size, dtype=np.float32)  # float32 as in PyTorch
    low = np.minimum(position.astype(np.intp), old - 1)
    high = np.minimum(low + 1, old - 1)
    weight = position - low.astype(np.float32)
    shape = list(volume.shape)
    shape[axis] = size
    result = np.empty(shape, np.float32)
    if axis == 0:
        for index in range(size):
            np.multiply(volume[low[index]], 1 - weight[index], out=result[index])
            result[index] += volume[high[index]] * weight[index]
        return result
    weight = weight[:, None] if axis == 1 else weight
    for index in range(len(volume)):
        np.multiply(volume[index].take(low, axis - 1), 1 - weight, out=result[index])
        result[index] += volume[index].take(high, axis - 1) * weight
    return result
