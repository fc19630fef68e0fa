"""Trilinear interpolation of volumes, padding and centre crop; x y z arrays, nothing of files."""

import numpy as np

Size = tuple[int, int, int]

SAME_SPACING_MM = 1e-3  # MONAI's AFFINE_TOL: closer than this, an axis is left as it is


def resize(volume: np.ndarray, size: Size) -> np.ndarray:
    """Trilinear interpolation with aligned corners and no anti-aliasing, as PyTorch's.

    Args:
        volume: x y z, float32, any strides.
        size: new x y z.

    Returns:
        x y z, float32; memory order as that of `volume`.
    """
    positions = []
    for old, new in zip(volume.shape, size, strict=True):
        scale = np.float32(old - 1) / np.float32(new - 1) if new > 1 else np.float32(0)
        positions.append(scale * np.arange(new, dtype=np.float32))  # float32 as in PyTorch
    return _interpolate(volume, positions)


def resample(
    volume: np.ndarray, spacing: tuple[float, ...], new_spacing: tuple[float, ...]
) -> np.ndarray:
    """Trilinear interpolation on a grid of another spacing that begins at the same first voxel.

    As MONAI's Spacing(mode="bilinear", padding_mode="border", scale_extent=False), no
    anti-aliasing.

    Args:
        volume: x y z, float32, any strides.
        spacing: of it, mm.
        new_spacing: wanted, mm.

    Returns:
        x y z, float32; round((old size - 1) * spacing / new_spacing + 1) voxels along each axis.
    """
    positions = []
    for size, old, new in zip(volume.shape, spacing, new_spacing, strict=True):
        ratio = 1.0 if abs(old - new) <= SAME_SPACING_MM else new / old
        count = max(round((size - 1) / ratio + 1), 1)
        positions.append(np.minimum(ratio * np.arange(count), size - 1).astype(np.float32))
    return _interpolate(volume, positions)


def pad(volume: np.ndarray, size: Size) -> np.ndarray:
    """Zeros on both sides where an axis is shorter than `size`, as MONAI's SpatialPad."""
    missing = [max(new - old, 0) for old, new in zip(volume.shape, size, strict=True)]
    if not any(missing):
        return volume
    return np.pad(volume, [(width // 2, width - width // 2) for width in missing])


def center_crop(volume: np.ndarray, size: Size) -> np.ndarray:
    """The middle of a volume, as MONAI's CenterSpatialCrop; a view."""
    first = [old // 2 - new // 2 for old, new in zip(volume.shape, size, strict=True)]
    return volume[tuple(slice(a, a + new) for a, new in zip(first, size, strict=True))]


def _interpolate(volume: np.ndarray, positions: list[np.ndarray]) -> np.ndarray:
    """At all combinations of positions, axis by axis: the one that shrinks most first."""
    layout = np.argsort([-abs(stride) for stride in volume.strides], kind="stable").tolist()
    result = volume.transpose(layout)
    places = [positions[axis] for axis in layout]
    for axis in sorted(range(3), key=lambda axis: len(places[axis]) / result.shape[axis]):
        result = _interpolate_axis(result, axis, places[axis])
    return result.transpose(np.argsort(layout))


def _interpolate_axis(volume: np.ndarray, axis: int, position: np.ndarray) -> np.ndarray:
    """Linear, along one axis of a C-ordered array, slice by slice."""
    old, size = volume.shape[axis], len(position)
    if old == size and np.array_equal(position, np.arange(size)):
        return volume
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
