"""Trilinear interpolation of volumes, padding and centre crop; x y z arrays, nothing of files."""

import functools
from collections.abc import Callable, Sequence

import numpy as np

from voco_jax.types import Size

Spacing = tuple[float, ...]
Convert = Callable[[np.ndarray], np.ndarray]

SAME_SPACING_MM = 1e-3  # MONAI's AFFINE_TOL: closer than this, an axis is left as it is


def resize(volume: np.ndarray, size: Size, convert: Convert | None = None) -> np.ndarray:
    """Trilinear interpolation with aligned corners and no anti-aliasing, as PyTorch's.

    Args:
        volume: x y z, any strides; float32, or what `convert` takes.
        size: new x y z.
        convert: a slice of the volume -> float32.

    Returns:
        x y z, float32; memory order as that of `volume`.
    """
    positions = []
    for old, new in zip(volume.shape, size, strict=True):
        scale = np.float32(old - 1) / np.float32(new - 1) if new > 1 else np.float32(0)
        positions.append(scale * np.arange(new, dtype=np.float32))  # float32 as in PyTorch
    return _interpolate(volume, positions, convert)


def resample(
    volume: np.ndarray, spacing: Spacing, new_spacing: Spacing, convert: Convert | None = None
) -> np.ndarray:
    """Trilinear interpolation on a grid of another spacing that begins at the same first voxel.

    As MONAI's Spacing(mode="bilinear", padding_mode="border", scale_extent=False), no
    anti-aliasing.

    Args:
        volume: x y z, any strides; float32, or what `convert` takes.
        spacing: of it, mm.
        new_spacing: wanted, mm.
        convert: a slice of the volume -> float32.

    Returns:
        x y z, float32; round((old size - 1) * spacing / new_spacing + 1) voxels along each axis.
    """
    positions = resampled_positions(volume.shape, spacing, new_spacing)
    return _interpolate(volume, positions, convert)


def resample_nearest(volume: np.ndarray, positions: Sequence[np.ndarray]) -> np.ndarray:
    """The voxels nearest to all combinations of positions; for labels, which are never mixed.

    Args:
        volume: x y z, any dtype.
        positions: along each axis, in voxels; those outside are the nearest border's.
    """
    places = [
        np.clip(np.rint(along).astype(np.intp), 0, size - 1)
        for along, size in zip(positions, volume.shape, strict=True)
    ]
    return volume[np.ix_(*places)]


def resampled_positions(
    size: tuple[int, ...], spacing: Spacing, new_spacing: Spacing
) -> list[np.ndarray]:
    """Where along each axis the voxels of `resample` lie, in voxels of the volume, float32."""
    counts = resampled_size(size, spacing, new_spacing)
    return [
        np.minimum(_ratio(old, new) * np.arange(count), length - 1).astype(np.float32)
        for length, count, old, new in zip(size, counts, spacing, new_spacing, strict=True)
    ]


def resampled_size(size: tuple[int, ...], old: Spacing, new: Spacing) -> tuple[int, ...]:
    """The voxels that `resample` makes of so many along each axis."""
    return tuple(
        max(round((count - 1) / _ratio(before, after) + 1), 1)
        for count, before, after in zip(size, old, new, strict=True)
    )


def resampled_ratios(old: Spacing, new: Spacing) -> list[float]:
    """New voxels per old voxel along each axis."""
    return [1 / _ratio(before, after) for before, after in zip(old, new, strict=True)]


def _ratio(old: float, new: float) -> float:
    return 1.0 if abs(old - new) <= SAME_SPACING_MM else new / old


def pad(volume: np.ndarray, size: Size) -> np.ndarray:
    """Zeros on both sides where an axis is shorter than `size`, as MONAI's SpatialPad."""
    missing = [max(new - old, 0) for old, new in zip(volume.shape, size, strict=True)]
    if not any(missing):
        return volume
    return np.pad(volume, [(width // 2, width - width // 2) for width in missing])


def center_crop(volume: np.ndarray, size: Size) -> np.ndarray:
    """The middle of a volume, as MONAI's CenterSpatialCrop; a view."""
    first = middle_corner(volume.shape, size)
    return volume[tuple(slice(a, a + new) for a, new in zip(first, size, strict=True))]


def middle_corner(shape: Sequence[int], size: Size) -> Size:
    """The first voxel of the middle of a volume of this shape; see `center_crop`."""
    x, y, z = (old // 2 - new // 2 for old, new in zip(shape, size, strict=True))
    return x, y, z


def memory_order(volume: np.ndarray) -> list[int]:
    """The axes of an array, the one with the longest steps in memory first."""
    return np.argsort([-abs(stride) for stride in volume.strides], kind="stable").tolist()


def _interpolate(
    volume: np.ndarray, positions: Sequence[np.ndarray], convert: Convert | None
) -> np.ndarray:
    """At all combinations of positions, slice by slice along the outermost axis of memory.

    Only slices that a position needs are converted, and nothing but the result is ever as large
    as the volume.
    """
    layout = memory_order(volume)
    slices = volume.transpose(layout)
    outer, *inner = (_Line(volume.shape[axis], positions[axis]) for axis in layout)
    shrinks = outer.size <= outer.old

    @functools.lru_cache(maxsize=2)
    def plane(index: int) -> np.ndarray:
        found = slices[index] if convert is None else convert(slices[index])
        return found if shrinks else _plane(found, inner)

    result = np.empty((outer.size, *(line.size for line in inner)), np.float32)
    for index, (low, high, weight) in enumerate(
        zip(outer.low.tolist(), outer.high.tolist(), outer.weight, strict=True)
    ):
        mixed = plane(low) if weight == 0 else plane(low) * (1 - weight) + plane(high) * weight
        result[index] = _plane(mixed, inner) if shrinks else mixed
    return result.transpose(np.argsort(layout))


class _Line:
    """Linear interpolation along one axis: neighbours and weights of each new voxel."""

    def __init__(self, old: int, position: np.ndarray) -> None:
        self.old, self.size = old, len(position)
        self.same = old == self.size and np.array_equal(position, np.arange(old))
        self.low = np.minimum(position.astype(np.intp), old - 1)
        self.high = np.minimum(self.low + 1, old - 1)
        self.weight = position - self.low.astype(np.float32)


def _plane(plane: np.ndarray, lines: Sequence[_Line]) -> np.ndarray:
    """Interpolates both axes of one slice, the one that shrinks most first."""
    for axis in sorted((0, 1), key=lambda axis: lines[axis].size / lines[axis].old):
        line = lines[axis]
        if not line.same:
            weight = line.weight[:, None] if axis == 0 else line.weight
            mixed = plane.take(line.low, axis)
            mixed *= 1 - weight
            upper = plane.take(line.high, axis)
            upper *= weight
            mixed += upper
            plane = mixed
    return plane
