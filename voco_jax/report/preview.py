"""The picture of a predicted mask: three slices with the classes in colour over the image."""

from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from voco_jax.report.planes import VIEWS, orient
from voco_jax.report.segmentations import to_grey

_OPACITY = 0.45


def draw_preview(
    image: np.ndarray,
    labels: np.ndarray,
    names: Sequence[str],
    spacing: Sequence[float],
    title: str,
) -> np.ndarray:
    """Axial, coronal and sagittal slice, each where most voxels are of a class.

    Args:
        image: (x, y, z) RAS, any unit; its grey values are chosen by the mask.
        labels: (x, y, z) RAS, 0 is background.
        names: of all classes, the background first.
        spacing: mm.
        title: of the picture.

    Returns:
        (rows, columns, 3) uint8; the patient's right is on the left.
    """
    colours = np.array([(0.0, 0.0, 0.0), *(_colour(i) for i in range(len(names) - 1))])
    size = np.multiply(labels.shape, spacing)
    widths = [float(size[view.shown[0]]) for view in VIEWS]
    figure = Figure(figsize=(12, 5.2), dpi=100, layout="constrained", facecolor="white")
    figure.suptitle(title, fontsize=11, parse_math=False)
    axes = figure.subplots(1, 3, width_ratios=widths)
    for axis, view in zip(axes, VIEWS, strict=True):
        through, shown = view.through, view.shown
        counts = np.count_nonzero(labels, axis=shown)
        index = int(counts.argmax()) if counts.any() else labels.shape[through] // 2
        plane = labels.take(index, through)
        values = np.asarray(image.take(index, through), np.float32)
        grey = to_grey(values[..., None], plane[..., None] > 0)[..., 0]
        over = np.where(plane[..., None] > 0, _OPACITY, 0.0)
        mixed = grey[..., None] * (1 - over) + colours[plane] * over
        extent = (0, float(size[shown[0]]), 0, float(size[shown[1]]))
        axis.imshow(mixed.swapaxes(0, 1), origin="lower", extent=extent)
        axis.set(xticks=[], yticks=[])
        orient(axis, view)
        axis.set_title(f"{view.name}, slice {index}", fontsize=9)
    present = np.unique(labels)
    patches = [Patch(color=colours[i], label=names[i]) for i in present if i]
    if patches:
        figure.legend(handles=patches, loc="outside lower center", ncols=7, fontsize=9)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _colour(number: int) -> tuple[float, float, float]:
    """Of a class; twenty differ."""
    return to_rgb(matplotlib.colormaps["tab20"](number * 2 % 20 + number // 10 % 2))
