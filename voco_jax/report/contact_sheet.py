"""Pages of pictures of a cache's volumes, the odd ones first, so that a person can look them over.

    python -m voco_jax.report.contact_sheet --cache CACHE --output DIR

Each volume is three slices through its middle (axial, coronal, sagittal, in true proportions, the
patient's right on the left) with its name and numbers. A volume is odd if it can be no image of a
body (another modality, constant, without contrast, a mask, noise, of an impossible size, a copy of
another one), or if a number of it lies far from those of all that can: more than 3.5 robust
standard deviations from the median. DIR/index.html shows them with boxes to tick and saves what is
ticked for `prepare --exclude`; DIR/index.csv lists all of them.
"""

import csv
import functools
import re
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from voco_jax.config.load import command_parser, load, parse_arguments, positive
from voco_jax.data.cache import Cache, read_chain
from voco_jax.data.progress import bar
from voco_jax.data.volumes import dequantise
from voco_jax.data.workers import available_cores
from voco_jax.errors import InputError
from voco_jax.report.oddness import UNREADABLE, Look, survey
from voco_jax.report.planes import VIEWS, as_shown
from voco_jax.report.tick_page import Tile, write_tick_page

COLUMNS, ROWS = 5, 8  # volumes on a page
_PANEL, _GAP, _LINE, _HEAD = 118, 6, 15, 44  # pixels
_TILE = (3 * _PANEL + 4 * _GAP, _PANEL + 5 * _LINE + 4 * _GAP)
_PAPER, _INK, _PALE, _RED = (24, 24, 27), (235, 235, 235), (150, 150, 155), (255, 99, 88)
_FRAME = (58, 58, 64)


def draw(
    cache: Cache, output: Path, pages: int | None = None, progress: bool = True
) -> tuple[list[Look], list[Path]]:
    """Writes the pages, DIR/index.html and DIR/index.csv; older pages there are deleted.

    Args:
        cache: opened.
        output: the folder; made if missing.
        pages: at most so many; index.csv has all volumes, index.html those on the pages. None: all.
        progress: whether to show a bar or lines now and then.

    Returns:
        What was found, and the files of the pages.

    Raises:
        InputError: the folder cannot be written.
    """
    looks = survey(cache, progress)
    odd = sum(bool(look.reasons) for look in looks)
    on_page = COLUMNS * ROWS
    total = -(-len(looks) // on_page)
    shown = looks[: on_page * (total if pages is None else pages)]
    files = []
    try:
        output.mkdir(parents=True, exist_ok=True)
        for old in output.iterdir():
            if re.fullmatch(r"page_\d{4,}\.png", old.name):
                old.unlink()
        _write_index(output / "index.csv", looks)
        with bar("contact sheet", len(shown), progress) as done:
            for number, tiles in enumerate(_tiles(cache, shown), 1):
                title = (
                    f"{cache.path}     page {number} of {total}     {len(looks)} volumes, "
                    f"{odd} odd ones first (red)"
                )
                files.append(output / f"page_{number:04d}.png")
                _page(tiles, title).save(files[-1], compress_level=1)
                done.update(len(tiles))
        ticks = [_tick_tile(number, look, len(shown)) for number, look in enumerate(shown)]
        write_tick_page(output / "index.html", cache.path, ticks, _TILE)
    except OSError as error:
        raise InputError(f"{output}: cannot write here: {error.strerror or error}") from error
    return looks, files


def _tiles(cache: Cache, looks: Sequence[Look]) -> Iterator[list[Image.Image]]:
    """The tiles of each page, drawn by all cores, a page ahead at most."""
    on_page = COLUMNS * ROWS
    with ThreadPoolExecutor(available_cores()) as threads:
        ahead: list[Any] = []
        for start in range(0, len(looks), on_page):
            page = looks[start : start + on_page]
            ahead.append([threads.submit(_tile, cache, look) for look in page])
            if len(ahead) > 1:
                yield [tile.result() for tile in ahead.pop(0)]
        for rest in ahead:
            yield [tile.result() for tile in rest]


def _tile(cache: Cache, look: Look) -> Image.Image:
    """One volume: three slices, its name, its numbers."""
    entry = look.entry
    tile = Image.new("RGB", _TILE, _PAPER)
    ink = ImageDraw.Draw(tile)
    reasons = list(look.reasons)
    try:
        panels = slices(cache, look)
    except InputError:
        panels = []
        reasons = reasons if UNREADABLE in reasons else [UNREADABLE, *reasons]
    for number, panel in enumerate(panels):
        left = _GAP + number * (_PANEL + _GAP) + (_PANEL - panel.width) // 2
        tile.paste(panel, (left, _GAP + (_PANEL - panel.height) // 2))
        for letter, side in zip(VIEWS[number].letters[:2], (0, _PANEL - 9), strict=True):
            place = (_GAP + number * (_PANEL + _GAP) + side, _GAP + _PANEL - 13)
            ink.text(place, letter, _PALE, _font(10), stroke_width=1, stroke_fill=_PAPER)
    shape, spacing = "x".join(map(str, entry.shape)), "x".join(f"{s:.3g}" for s in entry.spacing)
    extent = "x".join(f"{length:.0f}" for length in look.extent)
    share = 100 * entry.foreground
    lines = [
        (entry.id, _INK),
        (f"{shape}   {spacing} mm   {entry.section}", _PALE),
        (f"mean {entry.mean:.3f}   foreground {share:.3g}%   {extent} mm", _PALE),
    ]
    if len(reasons) > 2:
        reasons[1:] = [f"{reasons[1]} (and {len(reasons) - 2} more)"]
    lines += [(reason, _RED) for reason in reasons]
    for number, (text, colour) in enumerate(lines):
        place = (_GAP, _PANEL + 2 * _GAP + number * _LINE)
        ink.text(place, _fitting(text, _TILE[0] - 2 * _GAP), colour, _font(12))
    width, height = _TILE
    ink.rectangle((0, 0, width - 2, height - 2), outline=_RED if reasons else _FRAME, width=2)
    return tile


def slices(cache: Cache, look: Look) -> list[Image.Image]:
    """Axial, coronal and sagittal through a volume's middle, on one scale of millimetres.

    Raises:
        InputError: it cannot be read.
    """
    entry, size = look.entry, look.entry.stored
    middle = [length // 2 for length in size]
    planes = []
    volume = None if cache.chain.fit == "random_crop" else cache.read_whole(entry)
    for view in VIEWS:
        axis = view.through
        if volume is not None:
            plane = volume.take(middle[axis], axis)
        else:  # only the chunks of this plane
            corner = tuple(middle[i] if i == axis else 0 for i in range(3))
            part = tuple(1 if i == axis else size[i] for i in range(3))
            plane = cache.read(entry, corner, part).squeeze(axis)  # type: ignore[arg-type]
        planes.append(np.rint(dequantise(plane) * 255).astype(np.uint8))
    x, y, z = (length * _PANEL / max(look.extent) for length in look.extent)
    sizes = ((x, y), (x, z), (y, z))  # of VIEWS
    return [
        Image.fromarray(np.ascontiguousarray(as_shown(plane)))
        .resize((max(1, round(width)), max(1, round(height))), Image.Resampling.BOX)
        .convert("RGB")
        for plane, (width, height) in zip(planes, sizes, strict=True)
    ]


def _page_size(count: int) -> tuple[int, int]:
    """Of a page with so many tiles, pixels."""
    width, height = _TILE
    return COLUMNS * width + 2 * _GAP, _HEAD - (-count // COLUMNS) * height + _GAP


def _tick_tile(number: int, look: Look, total: int) -> Tile:
    """Where a volume is, of so many that are drawn."""
    page, place = divmod(number, COLUMNS * ROWS)
    row, column = divmod(place, COLUMNS)
    size = _page_size(min(total - page * COLUMNS * ROWS, COLUMNS * ROWS))
    corner = (_GAP + column * _TILE[0], _HEAD + row * _TILE[1])
    name = f"page_{page + 1:04d}.png"
    return Tile(look.entry.id, look.entry.section, look.reasons, name, (*corner, *size))


def _page(tiles: Sequence[Image.Image], title: str) -> Image.Image:
    width, height = _TILE
    page = Image.new("RGB", _page_size(len(tiles)), _PAPER)
    place = (2 * _GAP, 12)
    ImageDraw.Draw(page).text(place, _fitting(title, page.width - 4 * _GAP, 17), _INK, _font(17))
    for number, tile in enumerate(tiles):
        row, column = divmod(number, COLUMNS)
        page.paste(tile, (_GAP + column * width, _HEAD + row * height))
    return page


def _write_index(path: Path, looks: Sequence[Look]) -> None:
    with open(path, "w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        columns = ["page", "row", "column", "id", "reasons", "score", "section", "path"]
        for name in ("shape_{}", "spacing_{}_mm", "extent_{}_mm"):
            columns += map(name.format, "xyz")
        table.writerow([*columns, "foreground_share", "mean"])
        for number, look in enumerate(looks):
            page, place = divmod(number, COLUMNS * ROWS)
            row, column = divmod(place, COLUMNS)
            entry = look.entry
            table.writerow(
                [
                    *(page + 1, row + 1, column + 1, entry.id, "; ".join(look.reasons)),
                    *(f"{look.score:.2f}", entry.section, entry.path, *entry.shape),
                    *(f"{length:.6g}" for length in entry.spacing),
                    *(f"{length:.1f}" for length in look.extent),
                    *(f"{entry.foreground:.6f}", f"{entry.mean:.6f}"),
                ]
            )


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    path = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
    return ImageFont.truetype(str(path), size)


def _fitting(text: str, width: int, size: int = 12) -> str:
    """A text in one line, cut in its middle until it fits."""
    text = "".join(letter if letter.isprintable() else " " for letter in text)
    font = _font(size)
    if font.getlength(text) <= width:
        return text
    low, high = 0, len(text)  # so many characters fit
    while low < high - 1:
        count = (low + high) // 2
        low, high = (count, high) if font.getlength(_cut(text, count)) <= width else (low, count)
    return _cut(text, low)


def _cut(text: str, count: int) -> str:
    head = count // 2
    return f"{text[:head]}…{text[len(text) - (count - head) :]}"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; see --help. Returns the exit status: 0, or 2 for bad input."""
    parser = command_parser(
        "-m voco_jax.report.contact_sheet",
        __doc__,
        """
--cache cache/voco --output looks --pages 10
--config configs/voco_160k.py --output looks
""",
    )
    add = parser.add_argument
    add("--cache", help="folder, gs:// or s3:// URL of the cache")
    add(
        "--config",
        metavar="PY",
        help="config file, instead of --cache: all its data.sources, each in a folder of its name",
    )
    add("--output", required=True, metavar="DIR", help="folder for the pages")
    add("--pages", type=positive, metavar="N", help="only the first so many; default: all")
    try:
        options, overrides = parse_arguments(parser, arguments)
        if (options.cache is None) == (options.config is None) or (overrides and options.cache):
            raise InputError("give --cache CACHE or --config FILE")
        caches = {options.output: options.cache}
        if options.config:
            sources = load(options.config, overrides).data.sources
            caches = {f"{options.output}/{name}": s.cache for name, s in sources.items()}
        for output, path in caches.items():
            cache = Cache.open(path, read_chain(path))
            _tell(output, *draw(cache, Path(output), options.pages))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _tell(output: str, looks: Sequence[Look], files: Sequence[Path]) -> None:
    odd = [look for look in looks if look.reasons]
    for look in odd[:20]:
        print(f"{look.entry.id}: {'; '.join(look.reasons)}")
    if len(odd) > 20:
        print(f"and {len(odd) - 20} more odd ones")
    print(f"{len(looks)} volumes, {len(odd)} odd")
    print(f"{output}: index.html, index.csv and {len(files)} pages")


if __name__ == "__main__":
    sys.exit(main())
