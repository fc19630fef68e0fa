"""Whole volumes, window by window, in bounded memory.

Windows and their weights are MONAI's (`sliding_window_inference`). Scores are kept for one slab of
the volume, as thick as a window: once all windows over a plane are done it becomes labels, and its
memory takes the next one. So memory is about classes x slab, never classes x volume.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from voco_jax.types import Size

Weights = Literal["constant", "gaussian"]
Predict = Callable[[np.ndarray], jax.Array]
"""(b, *size, channels) windows in the volume's dtype -> logits (b, *size, classes) float32."""


@dataclass(frozen=True)
class Windows:
    """How a volume is covered.

    Attributes:
        size: of a window, x y z; a volume must be at least as large.
        overlap: of neighbouring windows, as a share of one; 0 or more, less than 1.
        weights: of a window's voxels in the mean of all windows: `constant`, or `gaussian` around
            its middle, with a deviation of an eighth of its size.
        batch: windows predicted at a time.
    """

    size: Size
    overlap: float
    weights: Weights
    batch: int

    def starts(self, shape: Sequence[int]) -> list[list[int]]:
        """The windows' first voxels along each axis of a volume."""
        found = []
        for length, size in zip(shape, self.size, strict=True):
            step = size if size == length else max(int(size * (1 - self.overlap)), 1)
            count = math.ceil((length - size) / step) + 1
            found.append([min(index * step, length - size) for index in range(count)])
        return found

    def importance(self) -> np.ndarray:
        """The weights of a window's voxels, x y z float32: MONAI's compute_importance_map."""
        if self.weights == "constant":
            return np.ones(self.size, np.float32)
        lines = []
        for size in self.size:
            offsets = np.arange(size, dtype=np.float32) - np.float32((size - 1) / 2)
            lines.append(np.exp(-np.square(offsets) / np.float32(2 * (0.125 * size) ** 2)))
        found = functools.reduce(np.multiply.outer, lines)
        return np.maximum(found, max(float(found.min()), 1e-3))


@dataclass(frozen=True)
class Grid:
    """Voxels of another grid in those of the volume, axis by axis; both have the same axes.

    Attributes:
        positions: along each axis, for each voxel of the other grid, where it lies in the volume;
            more than half a voxel outside it is background.
    """

    positions: tuple[np.ndarray, np.ndarray, np.ndarray]

    @property
    def shape(self) -> Size:
        """Voxels of the other grid."""
        x, y, z = (len(one) for one in self.positions)
        return x, y, z


def segment(
    volume: np.ndarray,
    predict: Predict,
    windows: Windows,
    grid: Grid | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[np.ndarray, np.ndarray | None]:
    """Labels of a whole volume.

    Args:
        volume: x y z channels, as `predict` takes parts of it.
        predict: the network.
        windows: how the volume is covered.
        grid: also label the voxels of this grid: scores are interpolated linearly between the
            volume's voxels, then the highest is taken.
        progress: told how many windows of all are done.

    Returns:
        The most probable class of each voxel, uint8: of the volume, and of the other grid.
    """
    shape = volume.shape[:3]
    axis = min(range(3), key=lambda i: windows.size[i] * math.prod(shape) / shape[i])
    labels = np.empty(shape, np.uint8)
    others = None if grid is None else np.zeros(grid.shape, np.uint8)
    wanted = None if grid is None else _Wanted(grid, shape, axis)
    for slab in _slabs(volume, predict, windows, axis, progress):
        planes = np.asarray(_argmax(slab.scores))
        np.moveaxis(labels, axis, 0)[slab.start : slab.start + slab.count] = planes[: slab.count]
        if wanted is not None and others is not None:
            wanted.fill(np.moveaxis(others, axis, 0), slab)
    return labels, others


@dataclass(frozen=True)
class _Slab:
    """Planes of a volume, across one axis, whose scores are complete."""

    scores: jax.Array  # (planes, the two other axes, classes): sums of weighted logits
    totals: jax.Array  # (planes, the two other axes): sums of weights
    start: int  # the first plane's number
    count: int  # of the planes, from there on, those that are complete
    before: jax.Array | None  # mean logits of the plane before the first


def _slabs(
    volume: np.ndarray,
    predict: Predict,
    windows: Windows,
    axis: int,
    progress: Callable[[int, int], None],
) -> Iterator[_Slab]:
    starts = windows.starts(volume.shape[:3])
    along = starts.pop(axis)
    others = list(itertools.product(*starts))
    thick, flat = windows.size[axis], [n for i, n in enumerate(volume.shape[:3]) if i != axis]
    importance = jnp.moveaxis(jnp.asarray(windows.importance()), axis, 0)
    scores: jax.Array | None = None
    totals = jnp.zeros((thick, *flat), jnp.float32)
    before: jax.Array | None = None
    logits = jnp.zeros(())
    for number, start in enumerate(along):
        for first in range(0, len(others), windows.batch):
            some = others[first : first + windows.batch]
            corners = [(*corner[:axis], start, *corner[axis:]) for corner in some]
            parts = [_part(volume, corner, windows.size) for corner in corners]
            filled = parts + parts[:1] * (windows.batch - len(parts))  # one compiled shape
            running = predict(np.stack(filled))
            jax.block_until_ready(logits)  # one waits while another runs: no queue in memory
            logits = running
            if scores is None:
                scores = jnp.zeros((thick, *flat, logits.shape[-1]), jnp.float32)
            for row, corner in enumerate(some):
                one = jnp.moveaxis(logits[row], axis, 0)
                scores, totals = _add(scores, totals, one, importance, np.asarray(corner))
            progress(number * len(others) + first + len(some), len(along) * len(others))
        assert scores is not None
        last = number == len(along) - 1
        count = thick if last else along[number + 1] - start
        yield _Slab(scores, totals, start, count, before)
        if not last:
            before = _plane(scores, totals, count - 1)
            scores, totals = _move(scores, totals, count)


def _part(volume: np.ndarray, corner: Sequence[int], size: Size) -> np.ndarray:
    return volume[tuple(slice(a, a + n) for a, n in zip(corner, size, strict=True))]


@functools.partial(jax.jit, donate_argnums=(0, 1))
def _add(
    scores: jax.Array,
    totals: jax.Array,
    logits: jax.Array,
    importance: jax.Array,
    corner: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Adds a window's weighted logits at its corner in the two axes of the planes."""
    at = (0, corner[0], corner[1])

    def add(sums: jax.Array, values: jax.Array, start: tuple) -> jax.Array:
        old = jax.lax.dynamic_slice(sums, start, values.shape)
        return jax.lax.dynamic_update_slice(sums, old + values, start)

    return add(scores, logits * importance[..., None], (*at, 0)), add(totals, importance, at)


@functools.partial(jax.jit, donate_argnums=(0, 1))
def _move(scores: jax.Array, totals: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """Drops the first `count` planes, and adds as many empty ones behind."""

    def move(sums: jax.Array) -> jax.Array:
        kept = jnp.arange(sums.shape[0]) < sums.shape[0] - count
        moved = jnp.roll(sums, -count, axis=0)
        return jnp.where(kept.reshape(-1, *[1] * (sums.ndim - 1)), moved, 0)

    return move(scores), move(totals)


@jax.jit
def _argmax(scores: jax.Array) -> jax.Array:
    return jnp.argmax(scores, axis=-1).astype(jnp.uint8)


@jax.jit
def _plane(scores: jax.Array, totals: jax.Array, index: int) -> jax.Array:
    """Mean logits of one plane."""
    return scores[index] / totals[index][..., None]


@jax.jit
def _between(
    low: jax.Array, high: jax.Array, weight: jax.Array, rows: jax.Array, columns: jax.Array
) -> jax.Array:
    """Labels of a plane of the other grid, between two planes of mean logits."""
    mixed = low + (high - low) * weight
    exact = jax.lax.Precision.HIGHEST
    mixed = jnp.einsum("ay,yzc->azc", rows, mixed, precision=exact)
    mixed = jnp.einsum("bz,azc->abc", columns, mixed, precision=exact)
    return jnp.argmax(mixed, axis=-1).astype(jnp.uint8)


class _Wanted:
    """Which planes of the other grid can be labelled when, and how."""

    def __init__(self, grid: Grid, shape: tuple[int, ...], axis: int) -> None:
        lines = [_Line(p, n) for p, n in zip(grid.positions, shape, strict=True)]
        self._along = lines.pop(axis)
        self._inside = np.ix_(*(line.inside for line in lines))
        self._matrices = [jnp.asarray(line.matrix()) for line in lines]
        self._next = 0  # of `_along.inside`

    def fill(self, others: np.ndarray, slab: _Slab) -> None:
        """Labels all planes that lie before the slab's last complete one."""
        line, held = self._along, (-1, jnp.zeros(()))

        def plane(index: int) -> jax.Array:
            nonlocal held
            if index < slab.start:
                assert slab.before is not None
                return slab.before
            if held[0] != index:
                held = (index, _plane(slab.scores, slab.totals, index - slab.start))
            return held[1]

        complete = slab.start + slab.count
        while self._next < len(line.inside) and line.high[self._next] < complete:
            low, high = (int(ends[self._next]) for ends in (line.low, line.high))
            first = plane(low)
            second = first if high == low else plane(high)
            found = _between(first, second, line.weight[self._next], *self._matrices)
            others[line.inside[self._next]][self._inside] = np.asarray(found)
            self._next += 1


class _Line:
    """Linear interpolation along one axis, for those positions that lie in the volume."""

    def __init__(self, positions: np.ndarray, length: int) -> None:
        self.inside = np.flatnonzero((positions > -0.5 - 1e-6) & (positions < length - 0.5 + 1e-6))
        clipped = np.clip(positions[self.inside], 0, length - 1)
        self.low = np.floor(clipped).astype(np.intp)
        self.weight = (clipped - self.low).astype(np.float32)
        self.high = np.where(self.weight > 0, self.low + 1, self.low)
        self._length = length

    def matrix(self) -> np.ndarray:
        """(positions, length) float32."""
        found = np.zeros((len(self.inside), self._length), np.float32)
        rows = np.arange(len(self.inside))
        found[rows, self.low] = 1 - self.weight
        found[rows, self.high] += self.weight
        return found
