"""What of a cache is wanted no more: lists of volumes to leave out, taking them out, new lists."""

import csv
import io
import json
import os
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from voco_jax.data.cache import EXCLUDED, Cache, CacheWriter, read_chain
from voco_jax.data.datalists import SECTIONS, Volume, read_text
from voco_jax.data.formats.dicom_series import is_series
from voco_jax.data.manifest import Entry
from voco_jax.data.storage import Folder, is_remote
from voco_jax.data.summary import pruned_line, some
from voco_jax.errors import InputError, kind_of
from voco_jax.files import expand, write_atomically

_COLUMNS = ("id", "path", "image")  # of a CSV file of volumes
_REMARK = "# left out by prepare; delete a line to take its volume in again\n"


class Exclusion:
    """Volumes to leave out, as a file names them: by id, by path, or by a folder that they are in.

    Paths are whole, or below the root as in lists.

    Args:
        path: a text file with one a line (empty lines and those that begin with "# " say nothing),
            as the contact sheet's exclude.txt; or CSV with a column id, path or image, else its
            first column.
        text: of the file; None: it is read.

    Raises:
        InputError: it cannot be read, or names nothing.
    """

    def __init__(self, path: str | Path, text: str | None = None) -> None:
        text = read_text(path) if text is None else text
        names = _column(text, path) if str(path).lower().endswith(".csv") else _lines(text)
        self.path = path
        self._names = {name.rstrip("/") for name in names if name.rstrip("/")}
        self._used: set[str] = set()
        if not self._names:
            raise InputError(f"{path}: names nothing, expected an id or a path in each line")

    def has(self, volume: Volume | Entry) -> bool:
        """Whether a volume is to be left out."""
        found = {
            name
            for place in (volume.id, _inside(volume), str(volume.path))
            for name in (place, *map(str, PurePosixPath(place).parents))
            if name in self._names
        }
        self._used |= found
        return bool(found)

    @property
    def unused(self) -> list[str]:
        """What names none of the volumes that were asked about."""
        return sorted(self._names - self._used)

    def __str__(self) -> str:
        """What is to be said about it; "": nothing."""
        if not self.unused:
            return ""
        return f"{self.path}: {len(self.unused)} lines name no volume: {some(self.unused)}"


def split_wanted(
    volumes: Iterable[Volume], *excluded: Exclusion | None
) -> tuple[list[Volume], list[Volume]]:
    """The volumes that are wanted, and those that any of some files excludes."""
    wanted: list[Volume] = []
    left: list[Volume] = []
    for volume in volumes:
        found = [one.has(volume) for one in excluded if one]  # each knows which lines are used
        (left if any(found) else wanted).append(volume)
    return wanted, left


def remembered(path: str | Path) -> Exclusion | None:
    """What runs before took out of a cache to leave it out: its excluded.txt; None: nothing.

    Raises:
        InputError: the file cannot be read.
    """
    folder = Folder.at(path)
    text = _read_excluded(folder)
    return Exclusion(f"{folder.path}/{EXCLUDED}", text) if _lines(text) else None


def remember(folder: Folder, ids: Iterable[str]) -> None:
    """Adds volumes to what `remembered` finds in a cache.

    Raises:
        InputError: the file cannot be read.
        OSError: it cannot be written.
    """
    text = _read_excluded(folder) or _REMARK
    new = sorted({id for id in ids if _lines(id) == [id]} - set(_lines(text)))  # one line each
    if new:
        lines = [*text.splitlines(), *new]
        folder.write(EXCLUDED, "".join(f"{line}\n" for line in lines).encode())


def _read_excluded(folder: Folder) -> str:
    file = f"{folder.path}/{EXCLUDED}"
    try:
        return (folder.read(EXCLUDED) or b"").decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: found bytes that are not UTF-8, expected UTF-8 text") from error
    except OSError as error:
        raise kind_of(error)(f"{file}: cannot read: {error}") from error


def stale(
    entries: Mapping[str, Entry], wanted: Collection[Volume], failed: Collection[str]
) -> list[Entry]:
    """The volumes of a cache that are not wanted, sorted by id.

    Args:
        entries: of the cache.
        wanted: volumes.
        failed: ids of those that could not be read now: a folder that would be divided cannot say
            which volumes it holds, so those that were found in it before stay.
    """
    named = {volume.id for volume in wanted}
    unsure = {id.removesuffix("/.") for id in failed}
    return sorted(
        (
            entry
            for id, entry in entries.items()
            if id not in named
            and not (is_series(Path(entry.path)) and id.rpartition("/")[0] in unsure)
        ),
        key=lambda entry: entry.id,
    )


def check_prune(stale: Sequence[Entry], total: int, most: int) -> None:
    """Refuses to take out so many volumes that it is hardly meant.

    Args:
        stale: that would be taken out.
        total: volumes in the cache.
        most: at most so many; 0: not said, then at most half of the cache.

    Raises:
        InputError: more, or all.
    """
    count = len(stale)
    names = some([entry.id for entry in stale])
    if count and count == total:
        raise InputError(
            f"--prune: would take out all {total} volumes of the cache ({names}); is the disk "
            "with the data there, are the lists the right ones? If it is meant, delete the cache"
        )
    if count > (most or total // 2):
        limit = f"at most {most}" if most else "at most half of them, unless their number is given"
        raise InputError(
            f"--prune: would take out {count} of {total} volumes ({names}), expected {limit}; "
            f"nothing is taken out. See all with --dry-run; if it is meant: --prune {count}"
        )


def tend_cache(path: str, exclude: Exclusion, prune: int | None, dry_run: bool) -> str:
    """Takes excluded volumes out of a cache, without looking at any other file.

    Args:
        path: of the cache.
        exclude: which.
        prune: see `check_prune`; None: only tells how many there are.
        dry_run: only tells which.

    Returns:
        What was done, for people.

    Raises:
        InputError: no cache, in use, cannot be written, or too many.
    """
    chain = read_chain(path)
    if prune is None or dry_run:
        cache = Cache.open(path, chain)
        found = [entry for entry in cache.entries if exclude.has(entry)]
        if prune is not None:
            check_prune(found, len(cache.entries), prune)
        lines = [entry.id for entry in found] if dry_run else []
        lines.append(f"{cache.path}: {len(found)} of {len(cache.entries)} volumes are excluded")
        lines[-1] += "; nothing was changed" if dry_run else "; take them out with --prune"
    else:
        try:
            with CacheWriter(path, chain) as writer:
                found = [entry for entry in writer.entries.values() if exclude.has(entry)]
                check_prune(found, len(writer.entries), prune)
                remember(writer.folder, [entry.id for entry in found])
                writer.forget(found)
        except OSError as error:
            raise InputError(
                f"{path}: cannot write this cache: {error.strerror or error}"
            ) from error
        lines = [pruned_line([entry.id for entry in found])] if found else []
        if found:
            lines.append(f"later runs leave them out: {writer.path}/{EXCLUDED}")
        lines.append(f"{writer.path}: {len(writer.entries)} volumes are left")
    return "\n".join(filter(None, [*lines, str(exclude)]))


def volume_of(entry: Entry) -> Volume:
    """A volume of a cache as a list would name it."""
    return Volume(
        entry.id,
        entry.path if is_remote(entry.path) else Path(entry.path),
        entry.section,
        None if entry.label is None else entry.label.path,
        entry.class_label,
        tuple(channel.path for channel in entry.channels),
        entry.fold,
    )


def write_list(volumes: Sequence[Volume], path: str | Path, roots: Sequence[str]) -> str:
    """Writes a Decathlon list of volumes, which --datalist reads.

    Args:
        volumes: of one root folder.
        path: of the file.
        roots: the root, or none: as the volumes' ids say.

    Returns:
        How many are in it, and how to use it.

    Raises:
        InputError: no volumes, volumes of several roots, a label that is outside, or the file
            cannot be written.
    """
    if not volumes:
        raise InputError("--write-list: found no volumes, expected at least one")
    places = Counter(_root_of(volume) for volume in volumes)
    root = str(expand(roots[0]).resolve()) if roots and not is_remote(roots[0]) else ""
    root = root or (roots[0].rstrip("/") if roots else places.most_common(1)[0][0])
    strays = [volume for volume in volumes if not _is_below(volume, root)]
    if strays:
        raise InputError(
            f"--write-list: {len(strays)} of {len(volumes)} volumes are not below {root} "
            f"({strays[0].path}); a list has one root: write one for each, as with --scan DIR"
        )
    content: dict[str, list[dict[str, Any]]] = {section: [] for section in SECTIONS}
    for volume in volumes:
        content[volume.section].append(_listed(volume, root))
    try:
        write_atomically(expand(path), json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    except OSError as error:
        raise InputError(f"{path}: cannot write this list: {error.strerror or error}") from error
    counts = ", ".join(f"{len(content[section])} {section}" for section in SECTIONS)
    return f"{path}: {counts}; use it with --datalist {path} --root {root}"


def _lines(text: str) -> list[str]:
    """The names in a text file, one a line."""
    return [line.strip() for line in text.splitlines() if line.strip() and line[:2] != "# "]


def _column(text: str, path: str | Path) -> list[str]:
    """The names in a CSV file."""
    try:
        rows = [row for row in csv.reader(io.StringIO(text), strict=True) if any(row)]
    except csv.Error as error:
        raise InputError(
            f"{path}: not CSV ({error}), expected rows with a column {', '.join(_COLUMNS)}, else "
            "names in the first"
        ) from error
    header = [cell.strip().lower() for cell in rows[0]] if rows else []
    column = next((header.index(name) for name in _COLUMNS if name in header), None)
    body = rows if column is None else rows[1:]
    return [row[column or 0].strip() for row in body if len(row) > (column or 0)]


def _inside(volume: Volume | Entry) -> str:
    return volume.id.partition("/")[2]


def _root_of(volume: Volume) -> str:
    """The root folder of a volume, by its id; of what is a link it may be another."""
    if _inside(volume) == ".":
        raise InputError(
            f"--write-list: {volume.path} is a volume and the scanned folder at once, expected "
            "volumes below it: scan the folder that it is in"
        )
    return str(volume.path).removesuffix(f"/{_inside(volume)}")


def _is_below(volume: Volume, root: str) -> bool:
    """Whether a root and what an id says lead to a volume."""
    if is_remote(root) or _root_of(volume) == root:
        return _root_of(volume) == root
    return os.path.realpath(os.path.join(root, _inside(volume))) == str(volume.path)


def _listed(volume: Volume, root: str) -> dict[str, Any]:
    def below(path: Path | str) -> str:
        inside = os.path.relpath(path, root) if not is_remote(path) else str(path)
        inside = inside.removeprefix(f"{root}/")
        if inside.startswith("..") or is_remote(inside):
            raise InputError(
                f"--write-list: {path} of {volume.id} is not below {root}, where a list's paths are"
            )
        return inside

    image: Any = _inside(volume)
    if volume.channels:
        image = [image, *map(below, volume.channels)]
    found: dict[str, Any] = {"image": image}
    if volume.label is not None:
        found["label"] = below(volume.label)
    elif volume.class_label is not None:
        found["label"] = volume.class_label
    if volume.fold is not None:
        found["fold"] = volume.fold
    return found
