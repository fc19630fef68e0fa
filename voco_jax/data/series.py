"""Folders with several DICOM series as so many volumes, and which of these are wanted.

`prepare` finds out that a folder holds several when it reads it. Whoever wants to choose, or to
know before, has all headers read first: `look`.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from voco_jax.data.datalists import Volume
from voco_jax.data.formats.dicom import fault_of
from voco_jax.data.formats.dicom_series import DicomVolume, find_volumes, is_series, place_of
from voco_jax.data.formats.readers import is_dicom_folder
from voco_jax.data.formats.stored import Aside, FormatError
from voco_jax.data.progress import bar
from voco_jax.data.storage import is_remote
from voco_jax.errors import InputError

Rule = Literal["largest", "thinnest"]
_Order = tuple[bool, bool, float, float, int, str]
RULES: tuple[Rule, ...] = ("largest", "thinnest")
_LOOKS = 16  # at folders, at the same time


@dataclass(frozen=True)
class Divided:
    """A folder that is several volumes."""

    volumes: tuple[Volume, ...]
    aside: tuple[Aside, ...]  # files of none of them


@dataclass(frozen=True)
class Choice:
    """Which DICOM series are wanted; all other files always are.

    Args:
        pattern: looked for in "SeriesNumber SeriesDescription"; None: any will do.
        rule: one of each study: the one with the most slices, or the thinnest ones (of equal ones
            the other counts, then the lowest SeriesNumber), what can be read before what cannot,
            original images before reformations; None: all.
    """

    pattern: re.Pattern[str] | None = None
    rule: Rule | None = None

    @classmethod
    def of(cls, pattern: str | None, rule: Rule | None) -> "Choice | None":
        """Of a command's flags; None: neither is given.

        Raises:
            InputError: no regular expression.
        """
        try:
            compiled = None if pattern is None else re.compile(pattern, re.IGNORECASE)
        except re.error as error:
            raise InputError(
                f"--series: found {pattern!r}, which is no regular expression ({error}), expected "
                "one as 'chest.*b30' or '^3 '"
            ) from error
        return cls(compiled, rule) if compiled or rule else None


@dataclass(frozen=True)
class Looked:
    """A volume and what its headers say; None: it is no DICOM series, or cannot be read."""

    volume: Volume
    dicom: DicomVolume | None
    beside: tuple[Aside, ...] = ()  # what else lies in its folder, of a folder's only volume


def divide(volume: Volume) -> Divided | None:
    """A folder that holds several series, or volumes of one; None: any other volume.

    Where something says that it is one, as a label, it is not divided.
    """
    looked, aside = _look(volume)
    if len(looked) < 2:
        return None
    return Divided(tuple(one.volume for one in looked), tuple(aside))


def look(volumes: Sequence[Volume], aside: list[Aside], progress: bool = True) -> list[Looked]:
    """Reads the headers of all DICOM series on this machine, and divides folders with several.

    Args:
        volumes: of lists and scans.
        aside: gets the files in divided folders that are no part of a volume.
        progress: whether to show a bar or lines now and then.
    """
    found = []
    with ThreadPoolExecutor(_LOOKS) as threads, bar("headers", len(volumes), progress) as shown:
        for looked, left in threads.map(_look, volumes):
            found += looked
            aside += left
            shown.update()
    return found


def choose(looked: Sequence[Looked], choice: Choice, aside: list[Aside]) -> list[Looked]:
    """Keeps the series that are wanted, and what is no series.

    Args:
        looked: of `look`.
        choice: what is wanted.
        aside: gets the files of what is not.

    Raises:
        InputError: nothing is left; tells which series there are.
    """
    kept = []
    for one in looked:
        if one.dicom is None or choice.pattern is None or choice.pattern.search(_name(one.dicom)):
            kept.append(one)
        else:
            _leave(one, f"a series not chosen: {_name(one.dicom)}", aside)
    if choice.rule:
        kept = _one_of_each_study(kept, choice.rule, aside)
    if not kept:
        there = sorted({_name(one.dicom) for one in looked if one.dicom})
        raise InputError(
            f"--series: none of {len(looked)} volumes fits, expected a SeriesNumber and "
            f"SeriesDescription as {'; '.join(there[:20])}"
        )
    return kept


def folder_of(volume: Volume) -> str:
    """Where the files of a DICOM volume are, as an id; of any other volume its id."""
    if is_series(Path(volume.path)):
        return volume.id.rpartition("/")[0]
    return volume.id.removesuffix("/.")


def _look(volume: Volume) -> tuple[list[Looked], list[Aside]]:
    path = Path(volume.path)
    if is_remote(volume.path) or not (is_series(path) or is_dicom_folder(path)):
        return [Looked(volume, None)], []
    folder, name = place_of(path)
    try:
        found, aside = find_volumes(folder)
    except (FormatError, OSError):
        return [Looked(volume, None)], []  # whoever reads it says what is wrong
    if name is not None:
        return [Looked(volume, next((one for one in found if one.full_name == name), None))], []
    if len(found) == 1:
        return [Looked(volume, found[0], tuple(aside))], []
    if volume.label is not None or volume.class_label is not None or volume.channels:
        return [Looked(volume, None)], []
    inside = volume.id.removesuffix("/.")
    parts = [
        replace(volume, id=f"{inside}/{part.name}", path=path / part.name, files=part.files)
        for part in found
    ]
    left = [(f"{inside}/{name}", why) for name, why in aside]
    return [Looked(*both) for both in zip(parts, found, strict=True)], left


def _name(dicom: DicomVolume) -> str:
    return f"{dicom.number} {dicom.description}".strip()


def _leave(one: Looked, why: str, aside: list[Aside]) -> None:
    """Sets all files of a series aside."""
    assert one.dicom is not None
    folder = folder_of(one.volume)
    names = [image.name for image in one.dicom.slices] + [name for name, _ in one.dicom.copies]
    names += one.dicom.damaged
    aside += [(f"{folder}/{name}", why) for name in names]
    aside += [(f"{folder}/{name}", other) for name, other in one.beside]


def _one_of_each_study(looked: Sequence[Looked], rule: Rule, aside: list[Aside]) -> list[Looked]:
    studies: dict[str, list[Looked]] = defaultdict(list)
    kept = [one for one in looked if one.dicom is None]
    for one in looked:
        if one.dicom is not None:
            studies[one.dicom.slices[0].tags["study"] or one.volume.id].append(one)
    for own in studies.values():
        best = min(own, key=_ORDERS[rule])
        kept.append(best)
        assert best.dicom is not None
        for one in own:
            if one is not best:
                _leave(
                    one, f"a series not chosen: {rule} of its study is {_name(best.dicom)}", aside
                )
    return sorted(kept, key=lambda one: one.volume.id)


def _largest(one: Looked) -> _Order:
    dicom = one.dicom
    assert dicom is not None
    thickness = dicom.thickness if len(dicom.slices) > 1 else float("inf")
    number = int(dicom.number) if re.fullmatch(r"\d{1,9}", dicom.number) else 0
    unreadable = bool(fault_of(dicom))
    return unreadable, dicom.derived, -len(dicom.slices), thickness, number, dicom.name


def _thinnest(one: Looked) -> _Order:
    unreadable, derived, count, thickness, number, name = _largest(one)
    return unreadable, derived, thickness, count, number, name


_ORDERS: dict[str, Callable[[Looked], _Order]] = {
    "largest": _largest,
    "thinnest": _thinnest,
}
