"""What the report says of a run's volumes: numbers, what failed, and a look at a few."""

import collections
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from voco_jax.data.cache import ASIDE, FAILURES, Cache, read_chain
from voco_jax.data.storage import is_remote
from voco_jax.errors import InputError
from voco_jax.files import parse_object
from voco_jax.report.contact_sheet import Look, slices, survey
from voco_jax.report.images import Inline, inline, spread

LISTED = 20  # failures, and files set aside, that are shown one by one
_GAP, _GROUND, _LIMIT = 6, (24, 24, 27), 30_000


@dataclass(frozen=True)
class Left:
    """Volumes or files that are not in the cache."""

    total: int
    reasons: list[tuple[str, int]]  # the most frequent first
    some: list[tuple[str, str]]  # name and reason of the first


@dataclass(frozen=True)
class Thumbnail:
    """A volume: three slices."""

    id: str
    picture: Inline
    about: str
    reasons: tuple[str, ...]  # why it is odd


@dataclass
class SourceSummary:
    """What is known of a source."""

    name: str
    cache: str
    training: int
    held_out: int
    cached: int | None = None
    doubtful: int = 0
    ranges: list[tuple[str, str, str, str]] = field(default_factory=list)  # what, min, median, max
    failures: Left | None = None
    aside: Left | None = None
    thumbnails: list[Thumbnail] = field(default_factory=list)
    note: str = ""


def summarise_source(
    name: str,
    settings: Mapping[str, Any],
    parts: Mapping[str, list[str]],
    thumbnails: int,
    workdir: Path,
) -> SourceSummary:
    """Looks at a source's cache, if it is on this machine.

    Args:
        name: of the source.
        settings: the config's section of it.
        parts: "training" and "held_out" -> ids of volumes.
        thumbnails: volumes to draw, at most.
        workdir: of the run. A relative cache is looked for from here, and from above the workdir:
            the run may have been started in another folder.

    Returns:
        What was found; why nothing more is said in its note.
    """
    path = str(settings.get("cache", ""))
    counts = (len(parts.get("training", ())), len(parts.get("held_out", ())))
    summary = SourceSummary(name, path, *counts)
    if is_remote(path):
        summary.note = "The cache is in an object store: it was not looked at."
        return summary
    starts = (Path(), *workdir.resolve().parents)
    there = next((start / path for start in starts if (start / path).is_dir()), None)
    if there is None or not path:
        summary.note = "The cache is not on this machine (or not there any more)."
        return summary
    try:
        cache = Cache.open(there, read_chain(there))
        summary.failures = _read_left(there / FAILURES, "id")
        summary.aside = _read_left(there / ASIDE, "file")
    except (InputError, OSError, TypeError, ValueError) as error:
        summary.note = f"The cache cannot be read: {error}"
        return summary
    summary.cached = len(cache.entries)
    summary.doubtful = sum(bool(entry.doubt) for entry in cache.entries)
    summary.ranges = _ranges(cache)
    summary.thumbnails = _thumbnails(cache, thumbnails)
    return summary


def _read_left(path: Path, name: str) -> Left | None:
    """None: nothing was left out."""
    try:
        lines = path.read_text("utf-8", "replace").splitlines()
    except FileNotFoundError:
        return None
    found = []
    for line in lines:
        try:
            record = parse_object(line)
        except ValueError:
            continue
        found.append((str(record.get(name, "")), str(record.get("reason", ""))))
    reasons = collections.Counter(reason.split(":")[0] for _, reason in found)
    return Left(len(found), reasons.most_common(), found[:LISTED]) if found else None


def _ranges(cache: Cache) -> list[tuple[str, str, str, str]]:
    """Least, median and largest of what volumes differ in."""
    entries = cache.entries
    rows: list[tuple[str, list[float], str]] = [
        ("x size, voxels", [e.shape[0] for e in entries], "{:.0f}"),
        ("y size, voxels", [e.shape[1] for e in entries], "{:.0f}"),
        ("z size, voxels", [e.shape[2] for e in entries], "{:.0f}"),
        ("x spacing, mm", [e.spacing[0] for e in entries], "{:.3g}"),
        ("y spacing, mm", [e.spacing[1] for e in entries], "{:.3g}"),
        ("z spacing, mm", [e.spacing[2] for e in entries], "{:.3g}"),
        ("foreground, % of the file", [100 * e.foreground for e in entries], "{:.3g}"),
        ("mean, 0 to 1", [e.mean for e in entries], "{:.3f}"),
    ]
    return [
        (what, *(form.format(f(numbers)) for f in (min, np.median, max)))  # type: ignore[misc]
        for what, numbers, form in rows
    ]


def _thumbnails(cache: Cache, most: int) -> list[Thumbnail]:
    """Of odd volumes, at most half of them, and of others evenly; no other voxels are read."""
    if most == 0:
        return []
    looks = survey(cache, read=False)
    odd = [look for look in looks if look.reasons][: most // 2]
    others = [look for look in looks if not look.reasons]
    thumbnails = []
    for look in odd + spread(others, most - len(odd)):
        try:
            thumbnails.append(_thumbnail(look, slices(cache, look)))
        except InputError:
            continue  # damaged: prepare --verify says which
    return thumbnails


def _thumbnail(look: Look, panels: list[Image.Image]) -> Thumbnail:
    width = sum(panel.width for panel in panels) + _GAP * (len(panels) + 1)
    height = max(panel.height for panel in panels)
    sheet = Image.new("RGB", (width, height + 2 * _GAP), _GROUND)
    left = _GAP
    for panel in panels:
        sheet.paste(panel, (left, _GAP + (height - panel.height) // 2))
        left += panel.width + _GAP
    entry = look.entry
    shape, spacing = "×".join(map(str, entry.shape)), "×".join(f"{s:.3g}" for s in entry.spacing)
    about = f"{shape}, {spacing} mm, {entry.section}"
    return Thumbnail(entry.id, inline(sheet, _LIMIT), about, look.reasons)


def plain(value: Any) -> str:
    """A setting as text."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
