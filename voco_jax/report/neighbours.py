"""The picture of what was retrieved: queries with their nearest neighbours beside them."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from voco_jax.report.planes import AXIAL, CORONAL, as_shown

_VIEWS = (AXIAL, CORONAL)
_GREY, _QUERY, _RIGHT, _WRONG = "#9a9aa0", "#1f5fb4", "#2e8b57", "#c0392b"
_LETTERS = 26  # of a title's line
_EMPTY = 0.02  # standard deviation of a plane in which there is nothing to be seen
_WIDTH, _TALLEST = 2.0, 1.2  # inches of a column, and of its width


@dataclass(frozen=True)
class Tile:
    """A volume, crop or organ.

    Attributes:
        title: lines.
        planes: of `middle_planes`; None: it cannot be shown.
        spacing: mm, or any unit that gives its proportions.
        note: why it cannot be shown.
        right: whether its label is the query's; None: not known, or the query itself.
    """

    title: tuple[str, ...]
    planes: tuple[np.ndarray, ...] | None
    spacing: tuple[float, float, float]
    note: str = ""
    right: bool | None = None


def middle_planes(voxels: np.ndarray) -> tuple[np.ndarray, ...]:
    """The axial (x, y) and the coronal (x, z) plane through the middle of x y z voxels of 0..1.

    Where that is empty, the plane whose voxels differ most. Copies.
    """
    planes = []
    for view in _VIEWS:
        index = voxels.shape[view.through] // 2
        if voxels.take(index, view.through).std() < _EMPTY:
            index = int(voxels.std(axis=view.shown).argmax())
        planes.append(voxels.take(index, view.through).copy())
    return tuple(planes)


def draw_neighbours(rows: Sequence[Sequence[Tile]], title: str) -> np.ndarray:
    """Axial and coronal middle slices of each, the query first, blue; right ones green, others red.

    The patient's right is on the left.

    Args:
        rows: at least one query, each with as many neighbours.
        title: of the picture.

    Returns:
        (rows, columns, 3) uint8.
    """
    columns = len(rows[0])
    heights = [max(_height(tile, view) for line in rows for tile in line) for view in (0, 1)]
    size = (_WIDTH * columns, (sum(heights) + 0.6) * len(rows) + 0.4)
    figure = Figure(figsize=size, dpi=100, layout="constrained")
    figure.suptitle(title, fontsize=11, x=0.01, ha="left", parse_math=False)
    for part, tiles in zip(figure.subfigures(len(rows), 1, squeeze=False)[:, 0], rows, strict=True):
        panels = part.subplots(2, columns, squeeze=False, height_ratios=heights)
        for place, tile in enumerate(tiles):
            lines = "\n".join(_cut(line) for line in tile.title)
            panels[0, place].set_title(lines, fontsize=8, parse_math=False)
            colour = _GREY if tile.right is None else _RIGHT if tile.right else _WRONG
            for number, panel in enumerate(panels[:, place]):
                _draw(panel, tile, number, colour if place else _QUERY)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _height(tile: Tile, number: int) -> float:
    """Inches that its plane needs in a column."""
    across, up = _VIEWS[number].shown
    if tile.planes is None:
        return 0.5 * _WIDTH
    width, height = tile.planes[number].shape
    proportion = height * tile.spacing[up] / (width * tile.spacing[across])
    return _WIDTH * min(proportion, _TALLEST)


def _draw(panel: Axes, tile: Tile, number: int, colour: str) -> None:
    panel.set(xticks=[], yticks=[])
    for spine in panel.spines.values():
        spine.set(color=colour, linewidth=2.5)
    if tile.planes is None:
        panel.set_facecolor(_GREY)
        panel.set_aspect(1)
        words = textwrap.fill(tile.note, _LETTERS) if number == 0 else ""
        panel.text(0.5, 0.5, words, ha="center", va="center", fontsize=7, parse_math=False)
        return
    across, up = (tile.spacing[axis] for axis in _VIEWS[number].shown)
    plane = as_shown(tile.planes[number])
    panel.imshow(plane, cmap="gray", vmin=0, vmax=1, aspect=up / across)


def _cut(text: str) -> str:
    half = _LETTERS // 2
    return text if len(text) <= _LETTERS else f"{text[: half - 1]}…{text[-half:]}"
