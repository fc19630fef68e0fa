"""The picture of a validation: where sub-volumes are, and where the encoder thinks they are."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from voco_jax.report.planes import AXIAL, orient
from voco_jax.types import Size

_COLOURS = ("#ff5a5f", "#2ec4b6", "#ffbf00", "#9d7bff", "#5ab1ff", "#ff9f5a", "#a8e05f", "#ff7bd5")


def draw_positions(
    volume: np.ndarray,
    origins: np.ndarray,
    labels: np.ndarray,
    similarities: np.ndarray,
    *,
    grid: Size,
    crop_size: Size,
    title: str,
) -> np.ndarray:
    """One row for each sub-volume: its box on the grid, true overlaps, predicted similarities.

    Args:
        volume: (x, y, z) RAS, 0..1.
        origins: (s, 3) corners of the sub-volumes, voxels; the first eight are drawn.
        labels: (s, n) overlap ratios.
        similarities: (s, n) predicted.
        grid: base crops along (x, y, z).
        crop_size: voxels of one crop.
        title: of the picture.

    Returns:
        (rows, columns, 3) uint8; slice and maps with the patient's right on the left.
    """
    count = min(len(origins), len(_COLOURS))
    figure = Figure(figsize=(11, 0.6 + 3.3 * count), dpi=100, layout="constrained")
    figure.suptitle(title, fontsize=11, parse_math=False)
    axes = figure.subplots(count, 3, squeeze=False)
    extent = np.multiply(grid, crop_size)
    for row, (origin, colour) in enumerate(zip(origins[:count], _COLOURS, strict=False)):
        layer = min(round(origin[2] / crop_size[2]), grid[2] - 1)  # shares most of its z with it
        depth = origin[2] + crop_size[2] // 2
        _draw_slice(axes[row, 0], volume[:, :, depth], origin, colour, grid, crop_size)
        axes[row, 0].set_title(f"sub-volume {row + 1}, slice z = {depth}", fontsize=9)
        maps = (("true overlap", labels[row]), ("predicted similarity", similarities[row]))
        top = max(float(labels[row].max()), float(similarities[row].max()), 1e-6)
        for axis, (name, values) in zip(axes[row, 1:], maps, strict=True):
            table = values.reshape(grid)[:, :, layer]
            image = axis.imshow(
                table.T,
                origin="lower",
                cmap="viridis",
                vmin=0,
                vmax=top,
                extent=(0, extent[0], 0, extent[1]),
            )
            for i, j in np.ndindex(table.shape):
                axis.text(
                    (i + 0.5) * crop_size[0],
                    (j + 0.5) * crop_size[1],
                    f"{table[i, j]:.2f}",
                    ha="center",
                    va="center",
                    fontsize=8,
                    color="black" if table[i, j] > 0.6 * top else "white",
                )
            axis.set(xticks=[], yticks=[])
            orient(axis, AXIAL, letters=False)
            axis.set_title(name + (f", layer {layer + 1}" if grid[2] > 1 else ""), fontsize=9)
        figure.colorbar(image, ax=axes[row, 1:], shrink=0.8)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _draw_slice(
    axis: Axes, image: np.ndarray, origin: np.ndarray, colour: str, grid: Size, crop_size: Size
) -> None:
    axis.imshow(
        image.T,
        origin="lower",
        cmap="gray",
        vmin=0,
        vmax=1,
        extent=(0, image.shape[0], 0, image.shape[1]),
    )
    for draw, cells, length in zip((axis.axvline, axis.axhline), grid, crop_size, strict=False):
        for line in range(1, cells):
            draw(line * length, color="white", linewidth=0.8, alpha=0.6)
    corner = (float(origin[0]), float(origin[1]))
    axis.add_patch(Rectangle(corner, *crop_size[:2], fill=False, edgecolor=colour, linewidth=2))
    axis.set(xticks=[], yticks=[])
    orient(axis, AXIAL)
