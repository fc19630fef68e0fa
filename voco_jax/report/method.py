"""The picture of the method in README: base crops, a sub-volume, and what is to be predicted.

    python -m voco_jax.report.method --output docs/method.png

A phantom through the chain of configs/voco_10k.py, its grid, and the overlaps that training uses as
targets. The vectors are a drawing; all else is data.
"""

import io
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import nibabel
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle
from PIL import Image

from voco_jax.config.config_files import DEFAULT
from voco_jax.config.load import command_parser, load_pretraining
from voco_jax.data.crops import base_origins, overlap_labels
from voco_jax.data.phantom import phantom
from voco_jax.data.volumes import prepare_volume
from voco_jax.errors import InputError
from voco_jax.files import local_path, write_aside
from voco_jax.types import Size

_PAPER, _INK, _PALE = "#ffffff", "#1f2328", "#59636e"
_BASE, _SUB = "#1f6feb", "#d9480f"
_WIDTH, _HEIGHT = 1240, 440  # pixels
_TOP = 88  # of all panels
_SIDE = 320  # of slice and overlaps
_COLOURS = 96  # of the file
_ORIGIN = (173, 67, 0)  # of the sub-volume: touches four base crops, unequally


def draw_method(
    volume: np.ndarray, origin: Sequence[int], *, grid: Size, crop_size: Size
) -> np.ndarray:
    """A slice with its grid and a sub-volume, the way through the encoder, and the overlaps.

    Args:
        volume: (x, y, z) RAS, 0..1, of grid * crop size voxels.
        origin: corner (x, y, z) of the sub-volume, voxels.
        grid: base crops along (x, y, z); one along z.
        crop_size: voxels of one crop.

    Returns:
        (rows, columns, 3) uint8; the patient's right is on the left, the front is up.
    """
    figure = Figure(figsize=(_WIDTH / 100, _HEIGHT / 100), dpi=100, facecolor=_PAPER)
    axis = figure.add_axes((0, 0, 1, 1), xlim=(0, _WIDTH), ylim=(_HEIGHT, 0))
    axis.set_axis_off()
    depth = int(origin[2]) + crop_size[2] // 2
    # Rows from the front to the back, columns from the patient's right to the left.
    picture = volume[::-1, ::-1, depth].T
    cells = [_corner(base, crop_size, volume.shape) for base in base_origins(grid, crop_size)]
    own = _corner(np.asarray(origin), crop_size, volume.shape)
    overlaps = overlap_labels(np.asarray(origin)[None], grid, crop_size)[0]

    _title(axis, 24, "1", "Cut", "base crops and a random sub-volume")
    _draw_volume(axis, (24, _TOP, _SIDE / picture.shape[1]), picture, cells, own, crop_size)
    _title(axis, 404, "2", "Encode", "every crop becomes a vector")
    _draw_encoding(axis, picture, cells, own, crop_size, grid)
    _title(axis, 896, "3", "Predict", "similarity must equal overlap")
    _draw_overlaps(axis, (896, _TOP, _SIDE / picture.shape[1]), cells, own, crop_size, overlaps)
    note = "known from the positions: no annotation"
    axis.text(896, _HEIGHT - 14, note, fontsize=10.5, color=_PALE)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _corner(origin: np.ndarray, crop_size: Size, shape: tuple[int, ...]) -> tuple[int, int]:
    """The left upper corner of a crop in the picture."""
    x, y = (shape[i] - int(origin[i]) - crop_size[i] for i in (0, 1))
    return x, y


def _title(axis: Axes, x: float, number: str, name: str, rest: str) -> None:
    axis.text(x, 44, f"{number}  {name}", fontsize=17, color=_INK, weight="bold")
    axis.text(x, 70, rest, fontsize=11.5, color=_PALE)


def _image(axis: Axes, image: np.ndarray, x: float, y: float, scale: float) -> None:
    rows, columns = image.shape
    extent = (x, x + scale * columns, y + scale * rows, y)
    axis.imshow(image, cmap="gray", vmin=0, vmax=1, extent=extent, interpolation="antialiased")
    axis.set(xlim=(0, _WIDTH), ylim=(_HEIGHT, 0), aspect="auto")


def _box(
    axis: Axes, corner: tuple[float, float], size: tuple[float, float], colour: str, width: float
) -> None:
    axis.add_patch(Rectangle(corner, *size, fill=False, edgecolor=colour, linewidth=width))


def _placed(corner: tuple[int, int], place: tuple[float, float, float]) -> tuple[float, float]:
    """A corner of the slice's, where the slice is drawn at (x, y) with a scale."""
    return place[0] + place[2] * corner[0], place[1] + place[2] * corner[1]


def _draw_volume(
    axis: Axes,
    place: tuple[float, float, float],
    picture: np.ndarray,
    cells: Sequence[tuple[int, int]],
    own: tuple[int, int],
    crop_size: Size,
) -> None:
    _image(axis, picture, *place)
    size = (place[2] * crop_size[0], place[2] * crop_size[1])
    for cell in cells:
        _box(axis, _placed(cell, place), size, "#79b8ff", 1.0)
    _box(axis, _placed(own, place), size, _SUB, 3.0)


def _draw_encoding(
    axis: Axes,
    picture: np.ndarray,
    cells: Sequence[tuple[int, int]],
    own: tuple[int, int],
    crop_size: Size,
    grid: Size,
) -> None:
    """The crops one by one, two encoders, their vectors."""

    def crop(corner: tuple[int, int]) -> np.ndarray:
        column, row = corner
        return picture[row : row + crop_size[1], column : column + crop_size[0]]

    left, gap, edge = 404, 6, 70
    _image(axis, crop(own), left, _TOP, edge / crop_size[0])
    _box(axis, (left, _TOP), (edge, edge), _SUB, 3.0)
    axis.text(left + edge + 10, _TOP + 30, "the sub-volume", fontsize=11.5, color=_SUB)
    below, small = _TOP + 110, 48
    for cell in cells:
        x = left + cell[0] / crop_size[0] * (small + gap)
        y = below + cell[1] / crop_size[1] * (small + gap)
        _image(axis, crop(cell), x, y, small / crop_size[0])
        _box(axis, (x, y), (small, small), _BASE, 1.2)
    block = grid[0] * (small + gap) - gap
    axis.text(left, below - 9, f"the {len(cells)} base crops", fontsize=11.5, color=_BASE)
    middle = below + block / 2
    for height, start, colour, count in (
        (_TOP + edge / 2, left + edge + 128, _SUB, 1),
        (middle, left + block, _BASE, len(cells)),
    ):
        _arrow(axis, (start + 6, height), (634, height))
        _node(axis, (676, height), (80, 44), "encoder")
        _arrow(axis, (718, height), (736, height))
        step = (block - 10) / max(len(cells) - 1, 1)
        for row in range(count):
            _vector(axis, 742, height - 5 + step * (row - (count - 1) / 2), colour, row)
    axis.plot([676, 676], [_TOP + edge / 2 + 22, middle - 22], color=_PALE, linestyle=":")
    meet = (_TOP + 160, 846)
    _arrow(axis, (810, _TOP + edge / 2), (meet[1] - 4, meet[0] - 18))
    _arrow(axis, (810, middle), (meet[1] - 6, meet[0] + 18))
    _node(axis, (meet[1], meet[0]), (42, 34), "cos")
    _arrow(axis, (meet[1] + 22, meet[0]), (892, meet[0]))


def _node(axis: Axes, middle: tuple[float, float], size: tuple[float, float], name: str) -> None:
    corner = (middle[0] - size[0] / 2, middle[1] - size[1] / 2)
    style = "round,pad=0,rounding_size=8"
    axis.add_patch(
        FancyBboxPatch(corner, *size, boxstyle=style, facecolor="#eef1f4", edgecolor=_PALE)
    )
    axis.text(*middle, name, ha="center", va="center", fontsize=12, color=_INK)


def _arrow(axis: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    axis.add_patch(
        FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=13, color=_PALE, shrinkA=0)
    )


def _vector(axis: Axes, x: float, y: float, colour: str, seed: int) -> None:
    """Six little squares, of any shades."""
    for index, shade in enumerate(np.random.default_rng(seed).uniform(0.25, 1, 6)):
        axis.add_patch(Rectangle((x + 10.5 * index, y), 10, 10, color=colour, alpha=shade, lw=0))


def _draw_overlaps(
    axis: Axes,
    place: tuple[float, float, float],
    cells: Sequence[tuple[int, int]],
    own: tuple[int, int],
    crop_size: Size,
    overlaps: np.ndarray,
) -> None:
    size = (place[2] * crop_size[0], place[2] * crop_size[1])
    for cell, share in zip(cells, overlaps, strict=True):
        x, y = _placed(cell, place)
        fill = Rectangle((x, y), *size, facecolor=_SUB, alpha=0.9 * float(share), linewidth=0)
        axis.add_patch(fill)
        _box(axis, (x, y), size, "#c9d1d9", 1.0)
        axis.text(
            x + size[0] / 2,
            y + size[1] / 2,
            f"{share:.0%}" if share else "0",
            ha="center",
            va="center",
            fontsize=13 if share else 12,
            weight="bold" if share else "normal",
            color=_INK if share else "#8b949e",
        )
    _box(axis, _placed(own, place), size, _SUB, 2.0)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; see --help. Returns the exit status: 0, or 2 for bad input."""
    parser = command_parser("-m voco_jax.report.method", __doc__, "--output docs/method.png")
    parser.add_argument("--output", required=True, metavar="PNG", help="the picture's file")
    try:
        options = parser.parse_args(arguments)
        output = local_path("--output", options.output)
        if not output.parent.is_dir():
            raise InputError(f"--output: {output.parent}: no such folder; make it first")
        config = load_pretraining(DEFAULT)
        chain = config.data.sources["ct"].chain
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "phantom.nii")
            nibabel.save(phantom(0, 3, (256, 256, 80))[0], file)
            volume = prepare_volume(file, chain).voxels
        size = config.crops.crop_size
        picture = draw_method(volume, _ORIGIN, grid=config.crops.grid, crop_size=size)
        content = io.BytesIO()
        few = Image.fromarray(picture).quantize(_COLOURS, dither=Image.Dither.NONE)
        few.save(content, "PNG", optimize=True)
        write_aside(output, content.getvalue()).replace(output)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
