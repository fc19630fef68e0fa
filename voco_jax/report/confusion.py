"""The picture of a confusion matrix."""

from collections.abc import Sequence

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def draw_confusion(table: np.ndarray, names: Sequence[str], title: str = "") -> np.ndarray:
    """Rows are what cases are, columns what they are predicted to be.

    Each cell has the number of cases and their share of the row, which its colour shows.

    Args:
        table: (classes, classes) numbers of cases, see `evaluation.metrics.confusion`.
        names: of the classes.
        title: of the picture, lines of a few words.

    Returns:
        (rows, columns, 3) uint8.
    """
    shares = table / np.maximum(table.sum(axis=1, keepdims=True), 1)
    side = 2.0 + 0.8 * len(names)
    figure = Figure(figsize=(side + 1.2, side), dpi=100, layout="constrained")
    axis = figure.add_subplot()
    picture = axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(picture, ax=axis, label="share of the row")
    for (row, column), count in np.ndenumerate(table):
        share = shares[row, column]
        axis.text(
            column,
            row,
            f"{count}\n{share:.0%}",
            ha="center",
            va="center",
            color="white" if share > 0.5 else "black",
        )
    places = range(len(names))
    axis.set_xticks(places, names, rotation=30, ha="right")
    axis.set_yticks(places, names)
    axis.set(xlabel="prediction", ylabel="reference")
    axis.set_title(title, fontsize=10)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
