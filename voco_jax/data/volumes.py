"""One CT file -> one prepared volume: the chain of `voco_jax.config.Chain`.

Without a new spacing it works on the stored numbers (int16 as a rule) through views; nothing of
the volume's size becomes float32 but what is kept.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import nibabel
import numpy as np

from voco_jax.config.common import Chain
from voco_jax.data.formats.readers import StoredVolume, VolumeError, load
from voco_jax.data.formats.stored import MAX_BYTES, Aside
from voco_jax.data.plausible import TAKE_ALL_THE_SAME, doubt
from voco_jax.data.resample import (
    center_crop,
    memory_order,
    pad,
    resample,
    resampled_ratios,
    resampled_size,
    resize,
)
from voco_jax.types import Size

Box = tuple[tuple[int, int, int], tuple[int, int, int]]  # first and last + 1 voxel, x y z

AIR = -1024.0  # HU; what is below it is padding


@dataclass(frozen=True)
class PreparedVolume:
    """A volume ready for the cache, and what it was."""

    voxels: np.ndarray  # x y z, float32, 0..1
    axes: str  # of the file, as "LPS"; everything below is in RAS order
    shape: tuple[int, int, int]  # of the file
    spacing: tuple[float, float, float]  # of the file, mm
    box: Box  # what was kept, in voxels of the file or, with `chain.spacing`, of that grid
    foreground: float  # share of the volume in the box of its foreground, cropped to it or not
    window: tuple[float, float]  # what became 0 and 1
    mean: float  # of the prepared voxels
    affine: np.ndarray  # of the file in RAS order, voxel index to mm
    doubt: str  # why it is hardly an image of the chain's kind, taken all the same; "": it is one
    aside: tuple[Aside, ...]  # files in its folder that are no part of it
    series: str  # digest of its SeriesInstanceUID, or ""
    study: str  # digest of its StudyInstanceUID, or ""


def orient_ras(source: StoredVolume) -> StoredVolume:
    """Turns the axes to right, anterior, superior: a view and its affine, nothing is resampled."""
    orientation = nibabel.io_orientation(source.affine)
    affine = source.affine @ nibabel.orientations.inv_ornt_aff(orientation, source.voxels.shape)
    voxels = nibabel.apply_orientation(source.voxels, orientation)
    return replace(source, voxels=voxels, affine=affine, axes="RAS")


def window(hu: np.ndarray, low: float, high: float) -> np.ndarray:
    """Maps float32 HU to 0..1, clipped, in place: `low` becomes 0 and `high` 1; returns `hu`."""
    hu -= low
    hu /= high - low
    return np.clip(hu, 0, 1, out=hu)


def foreground_box(source: StoredVolume, limits: tuple[float, float], threshold: float) -> Box:
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
    strides = source.voxels.strides
    outer, middle, inner = memory_order(source.voxels)
    # In the order of memory: NumPy is slow where it has to go backwards.
    forwards = [slice(None, None, -1 if stride < 0 else 1) for stride in strides]
    is_foreground = _foreground(source, limits, threshold)
    for index, plane in enumerate(source.voxels[tuple(forwards)].transpose(outer, middle, inner)):
        ends = source.hounsfield(np.array([plane.min(), plane.max()]))
        if not np.isfinite(ends).all():  # either is NaN if any voxel is
            raise VolumeError(
                source.path, "NaN or infinite voxels: expected HU; repair or leave out the file"
            )
        smallest, largest = min(smallest, float(ends.min())), max(largest, float(ends.max()))
        foreground = is_foreground(plane)
        hits[inner] |= foreground.any(axis=0)
        hits[middle] |= foreground.any(axis=1)
        hits[outer][index] = foreground.any()
    if smallest == largest:
        raise VolumeError(source.path, f"constant: every voxel is {smallest:g} HU")
    if not hits[outer].any():
        raise VolumeError(
            source.path,
            f"no foreground: the largest voxel is {largest:g} HU, expected some above "
            f"{limits[0] + threshold * (limits[1] - limits[0]):g}; is the file in HU?",
        )
    found = [np.flatnonzero(hit[way]) for hit, way in zip(hits, forwards, strict=True)]
    first, last = ([int(f[0]) for f in found], [int(f[-1]) + 1 for f in found])
    return (first[0], first[1], first[2]), (last[0], last[1], last[2])


def prepare_volume(path: str | Path, chain: Chain, take_doubtful: bool = False) -> PreparedVolume:
    """Runs the chain on a file that is all of an image; see `prepare_files`."""
    return prepare_files([path], chain, take_doubtful)[0]


def prepare_files(
    paths: Sequence[str | Path], chain: Chain, take_doubtful: bool = False
) -> tuple[PreparedVolume, ...]:
    """Runs the chain on an image.

    Orientation, spacing, window, foreground, then the fit to `chain.volume_size`: MONAI's
    Orientation("RAS"), Spacing(mode="bilinear", padding_mode="border"), ScaleIntensityRange or
    ScaleIntensityRangePercentiles (clip=True), CropForeground, and Resize(mode="trilinear",
    align_corners=True) or SpatialPad and CenterSpatialCrop.

    Args:
        paths: of a CT; of an image with several channels a file each.
        chain: what to do, see `voco_jax.config.Chain`.
        take_doubtful: whether to take what `plausible.doubt` finds no image of the chain's kind.

    Returns:
        Each channel before quantisation and facts for the manifest: of `chain.volume_size`, or with
        fit="random_crop" of its own size, at least that.

    Raises:
        VolumeError: a file is no usable volume; nothing else is raised for any file.
    """
    stored = []
    for path in paths:
        try:
            stored.append(load(path))
        except Exception as error:
            raise volume_error(path, error) from error
    return prepare_stored(stored, chain, take_doubtful)


def prepare_stored(
    channels: Sequence[StoredVolume], chain: Chain, take_doubtful: bool = False
) -> tuple[PreparedVolume, ...]:
    """`prepare_files` of what the files hold.

    The box that is kept holds the foreground of every channel, as MONAI's CropForeground.

    Raises:
        VolumeError: no usable volume, a doubtful one, or a channel on another grid than the first.
    """
    try:
        sources = [orient_ras(stored) for stored in channels]
        shape, spacing, affine = sources[0].voxels.shape, sources[0].spacing, sources[0].affine
        for other in sources[1:]:
            check_same_grid(other, shape, affine, "its image's first channel")
        if chain.spacing:
            sources = [_to_spacing(source, chain) for source in sources]
        limits = [_limits(source, chain) for source in sources]
        boxes = [
            foreground_box(source, own, chain.foreground_threshold)
            for source, own in zip(sources, _foreground_limits(limits, chain), strict=True)
        ]
        doubts = [doubt(source, own, chain) for source, own in zip(sources, limits, strict=True)]
        for source, found in zip(sources, doubts, strict=True):
            if found and not take_doubtful:
                raise VolumeError(source.path, f"{found}; {TAKE_ALL_THE_SAME}")
        first = np.min([box[0] for box in boxes], axis=0)
        last = np.max([box[1] for box in boxes], axis=0)
        size = sources[0].voxels.shape
        foreground = float(np.prod((last - first) / size))
        if not chain.crop_foreground:
            first, last = np.zeros(3, int), np.array(size)
        box: Box = (tuple(first.tolist()), tuple(last.tolist()))
        return tuple(
            PreparedVolume(
                voxels := _fit(source, own, box, chain),
                stored.axes,
                shape,
                spacing,
                box,
                foreground,
                own,
                float(voxels.mean(dtype=np.float64)),
                affine,
                why,
                stored.aside,
                stored.series,
                stored.study,
            )
            for stored, source, own, why in zip(channels, sources, limits, doubts, strict=True)
        )
    except Exception as error:
        raise volume_error(channels[0].path, error) from error


def _fit(source: StoredVolume, limits: tuple[float, float], box: Box, chain: Chain) -> np.ndarray:
    """The windowed voxels of a box, fitted to `chain.volume_size`: float32, 0..1."""
    kept = source.voxels[tuple(slice(a, b) for a, b in zip(*box, strict=True))]
    if chain.fit == "resize":
        return resize(kept, chain.volume_size, lambda p: window(source.hounsfield(p), *limits))
    voxels = pad(window(source.hounsfield(kept), *limits), chain.volume_size)
    return center_crop(voxels, chain.volume_size) if chain.fit == "center_crop" else voxels


def volume_error(path: str | Path, error: Exception) -> VolumeError:
    """Whatever went wrong with a file, so that one strange file never ends a run over thousands."""
    if isinstance(error, VolumeError):
        return error
    if isinstance(error, MemoryError):
        return VolumeError(path, "out of memory: use fewer workers")
    return VolumeError(path, f"unexpected: {type(error).__name__}: {error}")


def check_same_grid(
    other: StoredVolume, shape: tuple[int, ...], affine: np.ndarray, what: str = "its image"
) -> None:
    """Checks that a segmentation, or another channel, has the voxels of its image.

    Args:
        other: RAS.
        shape: of the image, RAS.
        affine: of the image, RAS.
        what: the image is called.

    Raises:
        VolumeError: another number of voxels, or some corner a tenth of a voxel away.
    """
    if other.voxels.shape != shape:
        raise VolumeError(
            other.path,
            f"another grid: {'x'.join(map(str, other.voxels.shape))} voxels in RAS order, expected "
            f"{'x'.join(map(str, shape))} as {what} has; resample it to {what}",
        )
    corners = np.array([[*corner, 1.0] for corner in np.ndindex(2, 2, 2)])
    corners[:, :3] *= np.subtract(shape, 1)
    apart = np.linalg.norm(((other.affine - affine) @ corners.T)[:3], axis=0).max()
    if apart > 0.1 * np.sqrt((affine[:3, :3] ** 2).sum(axis=0)).min():
        raise VolumeError(
            other.path,
            f"another grid: as many voxels as {what}, but up to {apart:.3g} mm away; do they "
            "belong together? If they do, give it the header of the image",
        )


def _to_spacing(source: StoredVolume, chain: Chain) -> StoredVolume:
    """All of the volume on a grid of `chain.spacing`, in float32 HU."""
    size = resampled_size(source.voxels.shape, source.spacing, chain.spacing)
    if 4 * math.prod(size) > MAX_BYTES:
        raise VolumeError(
            source.path,
            f"too large: {'x'.join(map(str, size))} voxels at {chain.spacing} mm; is the header's "
            f"spacing of {'x'.join(f'{length:g}' for length in source.spacing)} mm right?",
        )

    def convert(stored: np.ndarray) -> np.ndarray:
        hu = source.hounsfield(stored)
        # Padding of -2048 or -3024 would bleed into the body beside it.
        return np.maximum(hu, AIR, out=hu) if chain.window_unit == "HU" else hu

    return replace(
        source,
        voxels=resample(source.voxels, source.spacing, chain.spacing, convert),
        slope=1.0,
        intercept=0.0,
        affine=source.affine @ np.diag([*np.divide(chain.spacing, source.spacing), 1.0]),
    )


def file_positions(
    shape: Size, spacing: tuple[float, ...], chain: Chain, box: Box, stored: Size
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where the voxels of a file lie in the prepared volume, which was not resized.

    Args:
        shape: of the file, RAS.
        spacing: of the file, RAS, mm.
        chain: with which it was prepared.
        box: what was kept.
        stored: voxels of the prepared volume.

    Returns:
        For each axis, for each voxel of the file along it: voxels of the prepared volume.
    """
    x, y, z = (
        np.arange(count) * ratio - first + (length - (last - first)) // 2
        for count, ratio, first, last, length in zip(
            shape, resampled_ratios(spacing, chain.spacing or spacing), *box, stored, strict=True
        )
    )
    return x, y, z


def _limits(source: StoredVolume, chain: Chain) -> tuple[float, float]:
    """The values that become 0 and 1."""
    if chain.window_unit in ("HU", "value"):
        return chain.window
    values = source.hounsfield(source.voxels)
    if chain.window_unit == "deviation":
        inside = values[values != 0]
        if inside.size == 0 or inside.min() == inside.max():
            raise VolumeError(source.path, "constant: found no voxels that differ, 0 left aside")
        mean, deviation = inside.mean(dtype=np.float64), inside.std(dtype=np.float64)
        low, high = (mean + deviation * np.array(chain.window)).tolist()
        return low, high
    low, high = np.percentile(values, chain.window).tolist()  # NaN if any voxel is
    if low == high:
        raise VolumeError(
            source.path,
            f"constant: percentiles {chain.window[0]:g} and {chain.window[1]:g} are both {low:g}",
        )
    return low, high


def _foreground_limits(
    limits: Sequence[tuple[float, float]], chain: Chain
) -> list[tuple[float, float]]:
    """The window in which each channel's foreground is looked for: of deviations from 0 on."""
    return [(0.0 if chain.window_unit == "deviation" else low, high) for low, high in limits]


def quantise(volume: np.ndarray, dtype: str) -> np.ndarray:
    """Floats of 0..1, of any shape and order, as "uint8" (steps of 1/255) or "float16", C order."""
    layout = memory_order(volume)
    slices = volume.transpose(layout)
    stored = np.empty(slices.shape, dtype)
    for plane, out in zip(slices, stored, strict=True):
        out[...] = np.rint(plane * np.float32(255)) if dtype == "uint8" else plane
    return _c_order(stored.transpose(np.argsort(layout)))


def _c_order(volume: np.ndarray) -> np.ndarray:
    """An array with its last axis running fastest in memory.

    Of a volume planes that fit the processor's cache are turned one by one: straight from NIfTI's
    order NumPy takes four times as long.
    """
    fastest = memory_order(volume)[-1]
    if volume.ndim != 3 or fastest == 2:
        return np.ascontiguousarray(volume)
    other = 1 - fastest
    result = np.empty(volume.shape, volume.dtype)
    planes = np.ascontiguousarray(volume.transpose(other, 2, fastest))
    for plane, out in zip(planes, result.swapaxes(0, other), strict=True):
        out[...] = plane.T
    return result


def dequantise(volume: np.ndarray) -> np.ndarray:
    """The inverse of `quantise`: float32, 0..1."""
    if volume.dtype == np.uint8:
        return volume.astype(np.float32) / np.float32(255)
    return volume.astype(np.float32)


def _foreground(
    source: StoredVolume, limits: tuple[float, float], threshold: float
) -> Callable[[np.ndarray], np.ndarray]:
    """Stored numbers -> which are above the threshold of the window.

    For integers the smallest (or, with a negative slope, the largest) number that is: comparing
    them as they are takes a fraction of the time, with the same result.
    """

    def above(stored: np.ndarray) -> np.ndarray:
        return window(source.hounsfield(stored), *limits) > threshold

    dtype = source.voxels.dtype
    if dtype.kind == "f" or dtype.itemsize > 4:
        return above
    first, last = int(np.iinfo(dtype).min), int(np.iinfo(dtype).max)
    rising = source.slope > 0
    while first < last:  # bisect for the first number on the other side
        middle = (first + last) // 2
        if bool(above(np.array([middle], dtype))[0]) == rising:
            last = middle
        else:
            first = middle + 1
    if bool(above(np.array([first], dtype))[0]) != rising:  # all are on one side
        return above
    limit = dtype.type(first)
    return (lambda stored: stored >= limit) if rising else (lambda stored: stored < limit)
