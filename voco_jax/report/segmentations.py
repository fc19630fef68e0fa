"""Pictures of segmentations: three slices of each case, with what is right and what was found."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from scipy import ndimage

from voco_jax.report.planes import VIEWS, View, orient

_REFERENCE, _PREDICTION, _EMPTY = "#3ddbd9", "#ff9f1c", "#18181b"
_MARGIN = 15.0  # mm around the masks
_WIDTH, _TALLEST = 11.0, 3.6  # inches, of the page and of the slices in a row


@dataclass(frozen=True)
class Segmentation:
    """One row of the picture."""

    title: str
    image: np.ndarray | None  # (x, y, z) RAS, float of 0..1; None: a dark ground
    reference: np.ndarray  # (x, y, z) RAS, integers, 0 is background
    prediction: np.ndarray  # (x, y, z) RAS, integers, 0 is background
    spacing: tuple[float, float, float]  # mm


@dataclass(frozen=True)
class _Slice:
    """What one panel shows."""

    name: str
    view: View
    image: np.ndarray | None  # (i, j) 0..1
    masks: tuple[np.ndarray, np.ndarray]  # (i, j) reference, prediction
    steps: tuple[float, float]  # mm

    @property
    def size(self) -> tuple[float, float]:
        """Width and height, mm."""
        width, height = self.masks[0].shape
        return width * self.steps[0], height * self.steps[1]


def draw_cases(rows: Iterable[Segmentation], title: str = "") -> np.ndarray:
    """A row for each case: axial, coronal and sagittal slice where most voxels are wrong.

    All are shown in millimetres, cropped to what is not background in either mask; the patient's
    right is on the left.

    Args:
        rows: at least one; taken one after the other, so that only one need be in memory.
        title: of the picture.

    Returns:
        (rows, columns, 3) uint8.

    Raises:
        ValueError: no rows, or arrays of different shapes.
    """
    drawn = [(row.title, _slices(row)) for row in rows]
    if not drawn:
        raise ValueError("found no rows, expected at least one")
    heights = [_height(panels) for _, panels in drawn]
    figure = Figure(figsize=(_WIDTH, 0.5 + sum(heights)), dpi=100, layout="constrained")
    figure.suptitle(title or " ", fontsize=11, x=0.01, ha="left")  # the legend is beside it
    lines = [
        Line2D([], [], color=_REFERENCE, linewidth=3, label="reference"),
        Line2D([], [], color=_PREDICTION, linewidth=1.4, label="prediction"),
    ]
    figure.legend(handles=lines, loc="upper right", ncols=2, facecolor=_EMPTY, labelcolor="white")
    parts = figure.subfigures(len(drawn), 1, squeeze=False, height_ratios=heights)[:, 0]
    for part, (name, panels) in zip(parts, drawn, strict=True):
        part.suptitle(name, fontsize=10, x=0.01, ha="left", parse_math=False)
        widths = [panel.size[0] for panel in panels]
        axes = part.subplots(1, 3, squeeze=False, width_ratios=widths)[0]
        for axis, panel in zip(axes, panels, strict=True):
            _draw(axis, panel)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def to_grey(values: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """An image as 0..1 float32, in a window that suits what is inside and around a mask.

    Args:
        values: (x, y, z) float32, HU or any other unit; not finite: black.
        mask: (x, y, z) bool; its box gives the window, the 1st to 99th percentile.
    """
    box = _box(mask, (1, 1, 1), 0) if mask.any() else (slice(None),) * 3
    inside = values[box]
    inside = inside[np.isfinite(inside)]
    low, high = np.percentile(inside, (1, 99)).tolist() if len(inside) else (0.0, 1.0)
    grey = (values - np.float32(low)) / np.float32(max(high - low, 1e-6))
    return np.clip(np.nan_to_num(grey, copy=False), 0, 1, out=grey)


def _slices(row: Segmentation) -> list[_Slice]:
    shapes = {
        array.shape for array in (row.image, row.reference, row.prediction) if array is not None
    }
    if len(shapes) != 1 or row.reference.ndim != 3:
        raise ValueError(f"{row.title}: found shapes {shapes}, expected one 3-D shape")
    wrong = row.reference != row.prediction
    shown = (row.reference > 0) | (row.prediction > 0)
    # Where most voxels are wrong; if none is, where most is shown; if nothing is, the middle.
    counted = wrong if wrong.any() else shown
    box = _box(shown, row.spacing, _MARGIN) if shown.any() else (slice(None),) * 3
    slices = []
    for view in VIEWS:
        axis, (i, j) = view.through, view.shown
        counts = counted.sum(axis=(i, j))
        index = int(counts.argmax()) if counts.any() else len(counts) // 2
        part: list[slice | int] = list(box)
        part[axis] = index
        take = tuple(part)
        slices.append(
            _Slice(
                f"{view.name}, {'xyz'[axis]} = {index}",
                view,
                None if row.image is None else row.image[take].copy(),
                (row.reference[take].copy(), row.prediction[take].copy()),
                (row.spacing[i], row.spacing[j]),
            )
        )
    return slices


def _box(
    mask: np.ndarray, spacing: tuple[float, float, float], margin: float
) -> tuple[slice, slice, slice]:
    """The smallest box around a mask that is not empty, and so many mm more."""
    box = []
    for side, step in zip(ndimage.find_objects(mask.view(np.uint8))[0], spacing, strict=True):
        more = round(margin / step)
        box.append(slice(max(side.start - more, 0), side.stop + more))
    return box[0], box[1], box[2]


def _height(panels: list[_Slice]) -> float:
    """Inches of a row, so that its panels fill the page's width; not more than _TALLEST."""
    scale = (_WIDTH - 1.2) / sum(panel.size[0] for panel in panels)
    return 0.9 + min(scale * max(panel.size[1] for panel in panels), _TALLEST)


def _draw(axis: Axes, panel: _Slice) -> None:
    (width, height), (step, rise) = panel.masks[0].shape, panel.steps
    axis.set_facecolor(_EMPTY)
    extent = (0.0, panel.size[0], 0.0, panel.size[1])
    if panel.image is not None:
        picture = axis.imshow(panel.image.T, origin="lower", cmap="gray", extent=extent)
        picture.set_clim(0, 1)
    # One voxel more on each side, so that contours close; at the voxels' middles.
    x, y = (np.arange(-1, width + 1) + 0.5) * step, (np.arange(-1, height + 1) + 0.5) * rise
    for labels, colour, thick in zip(
        panel.masks, (_REFERENCE, _PREDICTION), (2.6, 1.2), strict=True
    ):
        padded = np.pad(labels, 1).T
        for label in np.unique(labels[labels > 0]):
            axis.contour(x, y, padded == label, levels=[0.5], colors=colour, linewidths=thick)
    axis.set(xlim=extent[:2], ylim=extent[2:], xticks=[], yticks=[], aspect="equal")
    orient(axis, panel.view)
    axis.set_title(panel.name, fontsize=9)
