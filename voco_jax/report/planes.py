"""How slices of a volume lie in a picture: everywhere as radiologists look at them.

The patient's right is on the picture's left, the front (of sagittal slices: on the left) and the
head are at the top. Volumes are RAS: their indices grow to the right, the front and the head.
"""

from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes


@dataclass(frozen=True)
class View:
    """One of the three ways to cut a volume."""

    name: str
    through: int  # axis that a slice goes through
    shown: tuple[int, int]  # axes along the picture's width and height
    letters: tuple[
        str, str, str
    ]  # of the picture's left, right and top: R L A P S (superior: head)


AXIAL = View("axial", 2, (0, 1), ("R", "L", "A"))
CORONAL = View("coronal", 1, (0, 2), ("R", "L", "S"))
SAGITTAL = View("sagittal", 0, (1, 2), ("A", "P", "S"))
VIEWS = (AXIAL, CORONAL, SAGITTAL)


def as_shown(plane: np.ndarray) -> np.ndarray:
    """Turns a slice into rows and columns.

    Args:
        plane: (i, j, ...) of a RAS volume, the two axes of a `View.shown`.

    Returns:
        (rows, columns, ...) with the picture's top left first; a view of the memory.
    """
    return plane.swapaxes(0, 1)[::-1, ::-1]


def orient(axis: Axes, view: View, letters: bool = True) -> None:
    """Shows axes whose x and y are a view's two RAS axes, growing, the radiologists' way.

    Whatever is drawn in them lies as the slice does: outlines, boxes, maps. To be called when
    their limits are set.

    Args:
        axis: with x and y limits.
        view: that they show.
        letters: whether to say which side is which, small, at the edges.
    """
    axis.set_xlim(*sorted(axis.get_xlim(), reverse=True))
    axis.set_ylim(*sorted(axis.get_ylim()))
    if not letters:
        return
    left, right, top = view.letters
    places = ((left, 0.02, 0.5, "left"), (right, 0.98, 0.5, "right"), (top, 0.5, 0.97, "center"))
    for letter, x, y, side in places:
        axis.text(
            x,
            y,
            letter,
            transform=axis.transAxes,
            ha=side,
            va="top" if letter == top else "center",
            fontsize=8,
            color="white",
            bbox={"facecolor": "black", "alpha": 0.5, "linewidth": 0, "pad": 1},
        )
