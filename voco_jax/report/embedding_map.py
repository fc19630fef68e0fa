"""The map of embeddings: held-out base crops in two dimensions, coloured by their grid cell."""

import math
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from markupsafe import Markup

from voco_jax.report.svg import element

FILE = "embeddings.npz"
_SIDE, _EDGE = 440, 16  # of the map
_MOST = 1500  # crops that are drawn, and compared
# Of the grid's four corners in x and y; a cell between them is between their colours.
_CORNERS = np.array(
    [[(0, 114, 178), (0, 158, 115)], [(204, 121, 167), (230, 120, 0)]], dtype=np.float64
)
_SHAPES = ("circle", "square", "diamond", "triangle")  # of the grid's layers


@dataclass(frozen=True)
class EmbeddingMap:
    """What is known of the embeddings of held-out base crops."""

    step: int
    crops: int
    volumes: int
    grid: tuple[int, int, int]
    explained: float  # share of the variance that the two axes hold
    nearest: float | None  # share of crops whose nearest of another volume is of their own cell
    chance: float  # of `nearest`
    svg: Markup
    legend: list[tuple[int, Markup]]  # layers (z), each a picture of its cells


def read_map(path: Path) -> EmbeddingMap:
    """Reads WORKDIR/embeddings.npz and draws it.

    Raises:
        OSError: it cannot be read.
        ValueError, KeyError: it is damaged, or of fewer than three crops.
    """
    with np.load(path, allow_pickle=False) as file:
        vectors = np.asarray(file["embeddings"], np.float64)
        cells, names = np.asarray(file["cells"]), np.asarray(file["volumes"])
        step = int(file["step"])
    count = len(vectors)
    if vectors.ndim != 2 or cells.shape != (count, 3) or names.shape != (count,) or count < 3:
        raise ValueError(f"shapes {vectors.shape}, {cells.shape}, {names.shape} of crops")
    if not np.isfinite(vectors).all() or cells.min() < 0:
        raise ValueError("values that are not finite, or cells below 0")
    grid = tuple(int(n) + 1 for n in cells.max(axis=0))
    if math.prod(grid) > 512:
        raise ValueError(f"a grid of {grid}")
    shown = np.linspace(0, count - 1, min(count, _MOST)).astype(int)
    vectors, cells, names = vectors[shown], cells[shown], names[shown]
    places, explained = project(vectors)
    nearest, chance = nearest_cells(vectors, cells, names)
    x, y, z = grid
    return EmbeddingMap(
        step=step,
        crops=count,
        volumes=len(np.unique(names)),
        grid=(x, y, z),
        explained=explained,
        nearest=nearest,
        chance=chance,
        svg=_draw(places, cells, (x, y, z), names),
        legend=[(layer, _legend((x, y, z), layer)) for layer in range(z)],
    )


def project(vectors: np.ndarray) -> tuple[np.ndarray, float]:
    """Principal component analysis.

    Args:
        vectors: (m, d).

    Returns:
        (m, 2) places along the two directions of most variance, each one's sign so that its
        largest weight is positive; and the share of the variance that they hold.
    """
    centred = vectors - vectors.mean(axis=0)
    _, sizes, directions = np.linalg.svd(centred, full_matrices=False)
    axes = np.zeros((2, vectors.shape[1]))
    axes[: len(directions[:2])] = directions[:2]
    largest = np.abs(axes).argmax(axis=1)
    axes *= np.where(axes[[0, 1], largest] < 0, -1.0, 1.0)[:, None]
    total = float((sizes**2).sum())
    return centred @ axes.T, float((sizes[:2] ** 2).sum()) / total if total else 0.0


def nearest_cells(
    vectors: np.ndarray, cells: np.ndarray, volumes: np.ndarray
) -> tuple[float | None, float]:
    """How often a crop's nearest neighbour in other volumes is of its own cell.

    Args:
        vectors: (m, d), compared by cosine.
        cells: (m, 3).
        volumes: (m,) whose crops they are.

    Returns:
        The share, None with a single volume; and what guessing would reach.
    """
    units = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    other = volumes[:, None] != volumes[None]
    same = (cells[:, None] == cells[None]).all(axis=2)
    kept = other.any(axis=1)
    if not kept.any():
        return None, 0.0
    best = np.where(other, units @ units.T, -np.inf).argmax(axis=1)
    found = same[np.arange(len(cells)), best][kept]
    chance = (same & other).sum(axis=1)[kept] / other.sum(axis=1)[kept]
    return float(found.mean()), float(chance.mean())


def colour(cell: tuple[int, int], grid: tuple[int, int, int]) -> str:
    """Of a cell, by its place in x and y: neighbours have similar ones."""
    x, y = (place / max(count - 1, 1) for place, count in zip(cell, grid, strict=False))
    weights = np.outer([1 - x, x], [1 - y, y])[..., None]
    red, green, blue = (weights * _CORNERS).sum(axis=(0, 1)).round().astype(int)
    return f"#{red:02x}{green:02x}{blue:02x}"


def _number(cell: tuple[int, int, int], grid: tuple[int, int, int]) -> int:
    """Of a cell, from 1, as the position pictures list them (C order)."""
    return int(np.ravel_multi_index(cell, grid)) + 1


def _draw(
    places: np.ndarray, cells: np.ndarray, grid: tuple[int, int, int], names: np.ndarray
) -> Markup:
    svg = element("svg", viewBox=f"0 0 {_SIDE} {_SIDE}", role="img", class_="map")
    element("title", svg).text = "Embeddings of held-out base crops, coloured by grid cell"
    low, high = places.min(axis=0), places.max(axis=0)
    scale = (_SIDE - 2 * _EDGE) / max(float((high - low).max()), 1e-12)
    middle = (low + high) / 2
    at = _SIDE / 2 + (places - middle) * scale * (1, -1)
    element("rect", svg, x=0.5, y=0.5, width=_SIDE - 1, height=_SIDE - 1, class_="frame")
    radius = 3.4 if len(at) <= 400 else 2.4
    for (x, y), cell, name in zip(at.tolist(), cells.tolist(), names.tolist(), strict=True):
        dot = _symbol(svg, cell[2], x, y, radius)
        dot.set("fill", colour((cell[0], cell[1]), grid))
        element("title", dot).text = f"{name}, cell {_number(tuple(cell), grid)}"
    centres = {
        tuple(cell): at[(cells == cell).all(axis=1)].mean(axis=0).tolist()
        for cell in np.unique(cells, axis=0).tolist()
    }
    for (i, j, k), (x, y) in centres.items():  # the net of neighbours in a layer
        for neighbour in ((i + 1, j, k), (i, j + 1, k)):
            if neighbour in centres:
                a, b = centres[neighbour]
                places_of = {"x1": f"{x:.1f}", "y1": f"{y:.1f}", "x2": f"{a:.1f}", "y2": f"{b:.1f}"}
                element("line", svg, class_="net", **places_of)
    for cell, (x, y) in centres.items():
        group = element("g", svg, class_="cell")
        disc = element("circle", group, cx=f"{x:.1f}", cy=f"{y:.1f}", r=10)
        disc.set("fill", colour((cell[0], cell[1]), grid))
        text = element("text", group, x=f"{x:.1f}", y=f"{y:.1f}", dy="0.35em")
        text.text = str(_number(cell, grid))
    return Markup(ET.tostring(svg, encoding="unicode"))


def _symbol(svg: ET.Element, layer: int, x: float, y: float, r: float) -> ET.Element:
    shape = _SHAPES[layer % len(_SHAPES)]
    if shape == "circle":
        return element("circle", svg, cx=f"{x:.1f}", cy=f"{y:.1f}", r=r)
    if shape == "square":
        corner = {"x": f"{x - r:.1f}", "y": f"{y - r:.1f}"}
        return element("rect", svg, width=2 * r, height=2 * r, **corner)
    corners = [(0, -1.3), (1.3, 0), (0, 1.3), (-1.3, 0)]
    if shape == "triangle":
        corners = [(0, -1.3), (1.2, 0.9), (-1.2, 0.9)]
    points = " ".join(f"{x + a * r:.1f},{y + b * r:.1f}" for a, b in corners)
    return element("polygon", svg, points=points)


def _legend(grid: tuple[int, int, int], layer: int) -> Markup:
    """The cells as a radiologist sees them: the patient's right on the left, the front on top."""
    size = 30
    columns, rows = grid[0], grid[1]
    svg = element("svg", viewBox=f"0 0 {columns * size} {rows * size}", role="img", class_="cells")
    svg.set("width", str(columns * size))
    element("title", svg).text = f"Colours and numbers of the cells of layer {layer + 1}"
    for i in range(columns):
        for j in range(rows):
            x, y = (columns - 1 - i) * size, (rows - 1 - j) * size
            group = element("g", svg, class_="cell")
            box = element("rect", group, x=x + 1, y=y + 1, width=size - 2, height=size - 2, rx=3)
            box.set("fill", colour((i, j), grid))
            text = element("text", group, x=x + size / 2, y=y + size / 2, dy="0.35em")
            text.text = str(_number((i, j, layer), grid))
    return Markup(ET.tostring(svg, encoding="unicode"))
