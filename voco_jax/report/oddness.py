"""Which volumes of a cache are odd, and why: by what no image of a body can be, then by the others.

Absolute rules need no other volume, so that they hold however much of a folder is rubbish. The
others compare: a volume is odd if a number of it lies far from those of the volumes that pass the
absolute rules, more than 3.5 robust standard deviations from the median (Iglewicz and Hoaglin's
modified z-score, by the median absolute deviation).
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from voco_jax.config.common import Chain
from voco_jax.data.cache import Cache
from voco_jax.data.manifest import Entry
from voco_jax.data.progress import bar
from voco_jax.data.texture import Texture, texture_of
from voco_jax.data.volumes import dequantise
from voco_jax.data.workers import available_cores
from voco_jax.errors import InputError

LIMIT = 3.5  # robust standard deviations
# Absolute limits; see `texture` for what images have.
_SPAN, _GREY_VALUES, _LIKENESS = 26, 12.0, 0.3
# Millimetres: the longest side of a file; the longest; the longest across.
_SMALLEST, _LONGEST, _WIDEST = 20.0, 2300.0, 1000.0
UNREADABLE = "cannot be read: run prepare --verify"


@dataclass(frozen=True)
class Look:
    """One volume of the sheet."""

    entry: Entry
    extent: tuple[float, float, float]  # of what is stored, mm
    score: float  # largest of its z-scores, without sign; infinite: it breaks an absolute rule
    reasons: tuple[str, ...]  # why it is odd; (): it is not


def survey(cache: Cache, progress: bool = False, read: bool = True) -> list[Look]:
    """The odd volumes, oddest first, those that break absolute rules before; then the others by id.

    Args:
        cache: opened.
        progress: whether to show a bar or lines now and then where voxels are read.
        read: whether to read those of volumes that were prepared before their textures were kept;
            else these are judged by their numbers alone.
    """
    entries = cache.entries
    textures = _textures(cache, progress) if read else [entry.texture for entry in entries]
    reasons = [
        absolute_reasons(entry, texture, cache.chain)
        for entry, texture in zip(entries, textures, strict=True)
    ]
    if read:
        for texture, own in zip(textures, reasons, strict=True):
            if texture is None:
                own.append(UNREADABLE)
    first: dict[str, str] = {}
    for entry, own in zip(entries, reasons, strict=True):
        twin = first.setdefault(entry.digest, entry.id)
        if twin != entry.id:
            own.append(f"same voxels as {twin}")
    scores = np.where([bool(own) for own in reasons], np.inf, 0.0)
    good = np.flatnonzero(scores == 0)
    if len(good):
        numbers, found = _compare([entries[index] for index in good])
        scores[good] = numbers
        for index, more in zip(good, found, strict=True):
            reasons[index] += more
    looks = [
        Look(entry, extent_of(entry, cache.chain), float(score), tuple(why))
        for entry, score, why in zip(entries, scores, reasons, strict=True)
    ]
    return sorted(looks, key=lambda look: (-look.score if look.reasons else 0.0, look.entry.id))


def absolute_reasons(entry: Entry, texture: Texture | None, chain: Chain) -> list[str]:
    """Why a volume can be no image of a body, whatever the others are.

    Args:
        entry: of the manifest.
        texture: of its voxels; None: not known.
        chain: that it was prepared with.
    """
    found = [doubt.partition(",")[0] for doubt in filter(None, entry.doubt.split("; "))]
    if texture is None:
        pass
    elif texture.span == 0:
        found.append("constant: all voxels are equal after the window")
    elif texture.span < _SPAN:
        found.append(f"no contrast: {texture.span} of 255 steps from darkest to brightest")
    elif texture.grey_values < _GREY_VALUES:
        found.append(f"few grey values: {texture.grey_values:.1f} besides the background (a mask?)")
    elif texture.likeness < _LIKENESS:
        found.append(
            f"noise: voxels near each other are not alike (correlation {texture.likeness:.2f})"
        )
    if chain.window_unit != "value":  # pictures say nothing of millimetres
        x, y, z = (n * step for n, step in zip(entry.shape, entry.spacing, strict=True))
        size = f"{x:.0f}x{y:.0f}x{z:.0f} mm"
        if max(x, y, z) < _SMALLEST:
            found.append(f"too small for a body: {size}")
        elif max(x, y) > _WIDEST or z > _LONGEST:
            found.append(f"too large for a body: {size}")
    return found


def robust_scores(numbers: np.ndarray, least: float) -> np.ndarray:
    """How many robust standard deviations, at least `least` each, numbers are from the median.

    0.6745 (x - median) / MAD, or less.
    """
    away = numbers - np.median(numbers)
    return away / max(float(np.median(np.abs(away))) / 0.6745, least)


def extent_of(entry: Entry, chain: Chain) -> tuple[float, float, float]:
    """Of what is stored of a volume, mm."""
    if chain.fit == "resize":  # the box was stretched to fit
        lengths = np.subtract(entry.box[1], entry.box[0]) * (chain.spacing or entry.spacing)
    else:
        lengths = np.multiply(entry.stored, chain.spacing or entry.spacing)
    x, y, z = lengths.tolist()
    return x, y, z


def _compare(entries: Sequence[Entry]) -> tuple[np.ndarray, list[list[str]]]:
    """The largest score of each, and the reasons of those that are odd among these."""
    share = [100 * entry.foreground for entry in entries]
    flat = [float(np.sqrt(entry.spacing[0] * entry.spacing[1])) for entry in entries]
    # Name, numbers, smallest deviation that counts as one (of sets that are nearly uniform),
    # whether on a logarithmic scale, how it is written.
    quantities: list[tuple[str, list[float], float, bool, str]] = [
        ("x-y spacing", flat, 0.1, True, "{:.3g} mm"),
        ("z spacing", [entry.spacing[2] for entry in entries], 0.1, True, "{:.3g} mm"),
        ("foreground", share, 0.1, True, "{:.3g}% of the file"),
        ("mean", [entry.mean for entry in entries], 0.02, False, "{:.3f}"),
    ]
    scores = np.zeros(len(entries))
    reasons: list[list[str]] = [[] for _ in entries]
    for name, numbers, least, logarithmic, form in quantities:
        found = robust_scores(np.log(numbers) if logarithmic else np.asarray(numbers), least)
        scores = np.maximum(scores, np.abs(found))
        middle = form.format(float(np.median(numbers)))
        for index in np.flatnonzero(np.abs(found) > LIMIT):
            way, value = "high" if found[index] > 0 else "low", form.format(numbers[index])
            reasons[index].append(f"{way} {name}: {value} (median {middle.partition(' of')[0]})")
    return scores, reasons


def _textures(cache: Cache, progress: bool) -> list[Texture | None]:
    """As the manifest has them, else of the voxels; None: these cannot be read."""
    missing = [entry for entry in cache.entries if entry.texture is None]

    def read(entry: Entry) -> Texture | None:
        try:
            unit = dequantise(cache.read_whole(entry))
        except InputError:
            return None
        return texture_of(unit, cache.chain, entry.box)

    found: dict[str, Texture | None] = {}
    with (
        ThreadPoolExecutor(available_cores()) as threads,
        bar("look at voxels", len(missing), progress and bool(missing)) as shown,
    ):
        for entry, texture in zip(missing, threads.map(read, missing), strict=True):
            found[entry.id] = texture
            shown.update()
    return [entry.texture or found[entry.id] for entry in cache.entries]
