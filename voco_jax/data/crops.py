"""Base grid, random sub-volumes and their overlap labels: integer geometry on the host.

Positions are in voxels of the cached volume; a crop is named by its lowest corner (x, y, z).
Everywhere `grid` is the number of base crops along (x, y, z), and `crop_size` the voxels (x, y, z)
of one crop.
"""

import numpy as np

from voco_jax.types import Size


def base_origins(grid: Size, crop_size: Size) -> np.ndarray:
    """Corners of the base crops.

    Returns:
        (n, 3) int64; base k = (i * grid_y + j) * grid_z + l stands at cell (i, j, l), which is
        the published k = i * 4 + j for the 4x4x1 grid.
    """
    cells = np.stack(np.meshgrid(*(np.arange(g) for g in grid), indexing="ij"), axis=-1)
    return cells.reshape(-1, 3) * np.asarray(crop_size)


def draw_origins(
    generator: np.random.Generator, count: int, grid: Size, crop_size: Size
) -> np.ndarray:
    """Corners of random sub-volumes.

    Centres are uniform over the integers crop/2 .. volume - crop/2 - 1 of every axis (48..335 of
    384 voxels), as in the published code; an axis with one cell is always taken whole.

    Returns:
        (count, 3) int64.
    """
    crop = np.asarray(crop_size)
    free = np.asarray(grid) * crop - crop  # corners 0 .. free - 1
    return generator.integers(0, np.maximum(free, 1), size=(count, 3), dtype=np.int64)


def draw_corner(generator: np.random.Generator, stored: Size, size: Size) -> Size:
    """Where a random part of a volume begins, every place equally likely (MONAI's RandSpatialCrop).

    Draws nothing where the volume has just the size of the part.
    """
    if stored == size:
        return (0, 0, 0)
    x, y, z = generator.integers(0, np.asarray(stored) - np.asarray(size) + 1).tolist()
    return x, y, z


def overlap_labels(origins: np.ndarray, grid: Size, crop_size: Size) -> np.ndarray:
    """Overlap ratios of sub-volumes with the base crops.

    Args:
        origins: (s, 3) corners of the sub-volumes, inside the volume.

    Returns:
        (s, n) float64: shared volume over the volume of a crop; every row sums to 1.
    """
    distance = np.abs(origins[:, None, :] - base_origins(grid, crop_size)[None, :, :])
    shared = np.prod(np.maximum(np.asarray(crop_size) - distance, 0), axis=-1)
    return shared / np.prod(crop_size)


def join(bases: np.ndarray, grid: Size) -> np.ndarray:
    """The volume (grid * crop size) of base crops (n, x, y, z), in the order of `base_origins`."""
    volume = bases.reshape(*grid, *bases.shape[1:]).transpose(0, 3, 1, 4, 2, 5)
    return volume.reshape(np.multiply(grid, bases.shape[1:]))


def cut(
    volume: np.ndarray, origins: np.ndarray, crop_size: Size, out: np.ndarray | None = None
) -> np.ndarray:
    """Copies crops out of a volume.

    Args:
        volume: (x, y, z).
        origins: (n, 3) corners.
        out: to copy them into, (n, *crop_size); None: a new array of the volume's dtype.

    Returns:
        `out`.
    """
    crops = np.empty((len(origins), *crop_size), volume.dtype) if out is None else out
    for crop, (x, y, z) in zip(crops, origins, strict=True):
        crop[...] = volume[x : x + crop_size[0], y : y + crop_size[1], z : z + crop_size[2]]
    return crops
