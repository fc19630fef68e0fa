"""Metrics of segmentations, on NumPy and SciPy: overlap, surfaces, volumes, intervals.

A surface is weighted by its area in mm2, as google's `surface-distance` package does: each corner
where eight voxels meet, some inside the mask and some not, is a piece of surface with the area of
the triangles that marching cubes lays there (between the middles of the edges), and it sits at the
corner. A mask that touches the border of the volume ends there: the border is surface.
"""

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage
from scipy.spatial import KDTree

_BLOCK = 2**20  # voxels or random numbers at a time


@dataclass(frozen=True)
class Overlap:
    """Voxels of each class; background is class 0."""

    both: np.ndarray  # (classes,) int64, in the reference and in the prediction
    reference: np.ndarray  # (classes,) int64
    prediction: np.ndarray  # (classes,) int64


@dataclass(frozen=True)
class SurfaceDistances:
    """How far each piece of a surface is from the other surface, nearest first."""

    reference: np.ndarray  # (r,) mm, from the reference's pieces to the prediction's; inf: none
    reference_areas: np.ndarray  # (r,) mm2
    prediction: np.ndarray  # (p,) mm, from the prediction's pieces to the reference's; inf: none
    prediction_areas: np.ndarray  # (p,) mm2


def confusion(reference: np.ndarray, prediction: np.ndarray, classes: int) -> np.ndarray:
    """Counts which class of the prediction stands on which of the reference.

    Args:
        reference: label map, integers of 0 to classes - 1, any shape.
        prediction: as the reference, of its shape.
        classes: with background.

    Returns:
        (classes, classes) int64 voxels; rows are the reference's.

    Raises:
        ValueError: other shapes, no integers, or a value outside the classes.
    """
    if reference.shape != prediction.shape:
        raise ValueError(f"found shapes {reference.shape} and {prediction.shape}, expected one")
    for name, labels in (("reference", reference), ("prediction", prediction)):
        if labels.dtype.kind not in "biu":
            raise ValueError(f"{name}: found {labels.dtype}, expected integers")
        low, high = (int(labels.min()), int(labels.max())) if labels.size else (0, 0)
        if low < 0 or high >= classes:
            raise ValueError(f"{name}: found values {low} to {high}, expected 0 to {classes - 1}")
    if reference.flags.f_contiguous:
        reference, prediction = reference.T, prediction.T
    flat = [labels.reshape(-1) for labels in (reference, prediction)]
    counts = np.zeros(classes * classes, np.int64)
    for start in range(0, reference.size, _BLOCK):
        rows, columns = (labels[start : start + _BLOCK].astype(np.int64) for labels in flat)
        counts += np.bincount(rows * classes + columns, minlength=len(counts))
    return counts.reshape(classes, classes)


def count_overlap(reference: np.ndarray, prediction: np.ndarray, classes: int) -> Overlap:
    """Counts the voxels that `dice` needs; of several volumes they can be added.

    Args:
        reference: label map, integers of 0 to classes - 1, any shape.
        prediction: as the reference, of its shape.
        classes: with background.

    Raises:
        ValueError: see `confusion`.
    """
    table = confusion(reference, prediction, classes)
    return Overlap(table.diagonal().copy(), table.sum(axis=1), table.sum(axis=0))


def dice(overlap: Overlap) -> np.ndarray:
    """2 both / (reference + prediction) of each class.

    Returns:
        (classes,) float64; 0 where only one of the two has the class, NaN where neither has.
    """
    total = overlap.reference + overlap.prediction
    return np.where(total > 0, 2.0 * overlap.both / np.maximum(total, 1), np.nan)


def surface_distances(
    reference: np.ndarray, prediction: np.ndarray, spacing: Sequence[float]
) -> SurfaceDistances:
    """Measures two masks' surfaces; time and memory follow their box and their surfaces.

    Args:
        reference: (x, y, z) bool.
        prediction: (x, y, z) bool.
        spacing: distance of neighbouring voxels along x y z, mm.

    Returns:
        All pieces of both surfaces; none for an empty mask, with infinite distances to it.

    Raises:
        ValueError: no masks of one 3-D shape.
    """
    if reference.shape != prediction.shape or reference.ndim != 3:
        raise ValueError(f"found {reference.shape} and {prediction.shape}, expected one 3-D shape")
    if reference.dtype != bool or prediction.dtype != bool:
        raise ValueError(f"found {reference.dtype} and {prediction.dtype}, expected bool")
    if reference.flags.f_contiguous:  # the order of memory, for speed
        reference, prediction, spacing = reference.T, prediction.T, spacing[::-1]
    places, areas = zip(*(_surface(mask, spacing) for mask in (reference, prediction)), strict=True)
    away = [_distances(places[i], places[1 - i], spacing) for i in range(2)]
    order = [np.lexsort((area, distance)) for area, distance in zip(areas, away, strict=True)]
    return SurfaceDistances(
        away[0][order[0]], areas[0][order[0]], away[1][order[1]], areas[1][order[1]]
    )


def normalised_surface_dice(distances: SurfaceDistances, tolerance: float) -> float:
    """The share of both surfaces' area that lies within a tolerance of the other surface.

    Args:
        distances: of `surface_distances`.
        tolerance: mm; a piece exactly so far away still counts.

    Returns:
        0..1; 0 if one mask is empty, NaN if both are.
    """
    total = distances.reference_areas.sum() + distances.prediction_areas.sum()
    if not total:
        return float("nan")
    near = distances.reference_areas[distances.reference <= tolerance].sum()
    near += distances.prediction_areas[distances.prediction <= tolerance].sum()
    return float(near / total)


def hausdorff95(distances: SurfaceDistances) -> float:
    """The distance within which 95 % of a surface's area lies; the larger of the two, mm.

    Args:
        distances: of `surface_distances`.

    Returns:
        mm; inf if one mask is empty, NaN if both are.
    """
    if not len(distances.reference) and not len(distances.prediction):
        return float("nan")
    if not len(distances.reference) or not len(distances.prediction):
        return float("inf")
    return max(
        _percentile95(distances.reference, distances.reference_areas),
        _percentile95(distances.prediction, distances.prediction_areas),
    )


def volume_ml(voxels: int, spacing: Sequence[float]) -> float:
    """The volume of so many voxels of a spacing in mm; 1 ml is 1000 mm3."""
    return float(voxels * np.prod(spacing) / 1000)


def volume_error(reference_ml: float, prediction_ml: float) -> tuple[float, float]:
    """Prediction minus reference: in ml, and in % of the reference (NaN if that is empty)."""
    error = prediction_ml - reference_ml
    return error, 100 * error / reference_ml if reference_ml else float("nan")


def bootstrap_interval(
    values: np.ndarray, seed: int = 0, resamples: int = 10_000, level: float = 0.95
) -> tuple[float, float]:
    """The percentile bootstrap's interval of a mean over cases; the same for the same arguments.

    Args:
        values: (cases,); NaNs are left out.
        seed: of the resampling.
        resamples: how often as many cases are drawn again, with replacement.
        level: the interval's share of the resampled means.

    Returns:
        Its ends; NaNs with fewer than two values, which say nothing about the spread.
    """
    known = np.asarray(values, np.float64)
    known = known[~np.isnan(known)]
    if len(known) < 2:
        return float("nan"), float("nan")
    generator = np.random.default_rng(seed)
    rows = max(1, _BLOCK // len(known))
    means = []
    for start in range(0, resamples, rows):
        drawn = generator.integers(len(known), size=(min(rows, resamples - start), len(known)))
        means.append(known[drawn].mean(axis=1))
    low, high = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2]).tolist()
    return low, high


# ---- surfaces

# The triangles at a corner where eight voxels meet: the voxels that are inside (numbers 4x + 2y + z
# of the eight), and each triangle's area projected along x, y and z, in eighths of a voxel's face.
# All others are one of these turned, mirrored or with inside and outside exchanged. Where two
# diagonal voxels of a face are inside and the other two are not, the fewer of the eight are kept
# apart.
_TRIANGLES: tuple[tuple[tuple[int, ...], tuple[tuple[int, int, int], ...]], ...] = (
    ((0,), ((1, 1, 1),)),
    ((0, 1), ((2, 2, 0), (2, 2, 0))),
    ((1, 2), ((1, 1, 1), (1, 1, 1))),
    ((3, 4), ((1, 1, 1), (1, 1, 1))),
    ((0, 1, 2), ((1, 1, 1), (2, 2, 2), (4, 0, 0))),
    ((1, 2, 4), ((1, 1, 1), (1, 1, 1), (1, 1, 1))),
    ((0, 3, 4), ((0, 2, 2), (0, 2, 2), (1, 1, 1))),
    ((0, 1, 2, 3), ((4, 0, 0), (4, 0, 0))),
    ((0, 1, 2, 4), ((1, 1, 1), (1, 1, 1), (2, 2, 2), (2, 2, 2))),
    ((0, 1, 3, 4), ((0, 2, 2), (1, 1, 1), (2, 0, 2), (3, 3, 3))),
    ((1, 2, 3, 4), ((1, 1, 1), (1, 1, 1), (2, 2, 2), (4, 0, 0))),
    ((2, 3, 4, 5), ((2, 2, 0), (2, 2, 0), (2, 2, 0), (2, 2, 0))),
    ((0, 3, 5, 6), ((1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1))),
)


@functools.lru_cache(maxsize=16)
def _areas(spacing: tuple[float, float, float]) -> np.ndarray:
    """(256,) mm2 of the surface at a corner; bit 4x + 2y + z: that voxel is inside."""
    x, y, z = spacing
    faces = np.array([y * z, x * z, x * y]) / 8
    areas = np.zeros(256)
    for inside, triangles in _TRIANGLES:
        for axes in itertools.permutations(range(3)):
            turned = np.array(triangles)[:, axes] * faces
            area = np.sqrt((turned**2).sum(axis=1)).sum()
            for flips in itertools.product((0, 1), repeat=3):
                code = 0
                for voxel in inside:
                    place = (voxel >> 2 & 1, voxel >> 1 & 1, voxel & 1)
                    new = [place[axis] ^ flip for axis, flip in zip(axes, flips, strict=True)]
                    code |= 1 << (4 * new[0] + 2 * new[1] + new[2])
                areas[[code, 255 - code]] = area
    return areas


def _surface(mask: np.ndarray, spacing: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """(n, 3) places of the pieces, in voxels, and their (n,) areas in mm2."""
    box = ndimage.find_objects(mask.view(np.uint8), max_label=1)[0]
    if box is None:
        return np.zeros((0, 3), np.int64), np.zeros(0)
    part = mask[box]
    padded = np.zeros(np.add(part.shape, 2), np.uint8)
    padded[1:-1, 1:-1, 1:-1] = part
    codes: np.ndarray = padded  # the neighbour along each axis in turn: 2, 4, then 8 bits
    codes = codes[:, :, :-1] | codes[:, :, 1:] << 1
    codes = codes[:, :-1] | codes[:, 1:] << 2
    codes = codes[:-1] | codes[1:] << 4
    found = np.nonzero((codes != 0) & (codes != 255))
    x, y, z = spacing
    areas = _areas((float(x), float(y), float(z)))[codes[found]]
    return np.stack(found, axis=1) + [side.start for side in box], areas


def _distances(places: np.ndarray, others: np.ndarray, spacing: Sequence[float]) -> np.ndarray:
    """mm from each of (n, 3) places to the nearest of the others; inf: there are none.

    A tree of the surfaces' pieces, not a distance transform of their box: of an organ that fills
    half of a volume a tenth of the time, and no more memory for a false spot far away.
    """
    if not len(others) or not len(places):
        return np.full(len(places), np.inf)
    tree = KDTree(others * np.asarray(spacing, np.float64), balanced_tree=False)
    _, nearest = tree.query(places * np.asarray(spacing, np.float64))
    # From whole voxels once more: a tolerance of one voxel must not fail by rounding.
    return np.sqrt((((places - others[nearest]) * np.asarray(spacing, np.float64)) ** 2).sum(1))


def _percentile95(distances: np.ndarray, areas: np.ndarray) -> float:
    share = np.cumsum(areas) / areas.sum()
    return float(distances[min(int(np.searchsorted(share, 0.95)), len(distances) - 1)])
