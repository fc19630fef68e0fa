"""Which volumes lie in a folder of DICOM files, as PACS archives and CDs fill it; their names.

A folder may hold many series, and a series several volumes: acquisitions, echoes, phases, kernels.
Of a folder with one volume the volume's path is the folder's. Of several each has the path
FOLDER/NAME, where no file is: NAME is "series-", the SeriesNumber, the SeriesDescription and six
digits of a hash of the SeriesInstanceUID, as "series-3-Chest_B30f-1a2b3c", and what sets it apart
from other volumes of the series, as "-echo_2". It stays the same when other series come or go;
also the only one left is found by it.
"""

import functools
import hashlib
import os
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np

from voco_jax.data.formats.dicom_files import (
    DIRECTION_TOLERANCE,
    VOLUME_TAGS,
    Image,
    Stack,
    files_in,
    find_stacks,
)
from voco_jax.data.formats.stored import Aside

_NAME = re.compile(r"series-([A-Za-z0-9._+]+-){1,2}[0-9a-f]{6}(-[A-Za-z0-9._+]+)*")
_MOST_INTERLEAVED = 4  # volumes in one series whose slices alternate
_SHORT = {  # of VOLUME_TAGS, in names
    "SeriesNumber": "number",
    "AcquisitionNumber": "acquisition",
    "TemporalPositionIdentifier": "time",
    "NominalPercentageOfCardiacPhase": "phase",
    "EchoNumbers": "echo",
    "KVP": "kv",
    "ConvolutionKernel": "kernel",
}
_VIEWS = ("sagittal", "coronal", "axial")  # by the axis that a slice's normal is closest to


@dataclass(frozen=True)
class DicomVolume:
    """A volume in a folder, as its headers describe it."""

    name: str  # ".": the folder's only one
    slices: tuple[Image, ...]  # in the order of their normal
    copies: tuple[Aside, ...]  # of slices
    fault: str  # why it cannot be read: a few fixed words, a colon, details; or ""
    damaged: tuple[str, ...] = ()  # names of files that would be slices
    parted: str = ""  # how it was told from others of its series
    full_name: str = ""  # the name that it has, or would have, beside others

    @property
    def number(self) -> str:
        """Its SeriesNumber."""
        return min(image.tags["SeriesNumber"] for image in self.slices)

    @property
    def series(self) -> str:
        """Its SeriesInstanceUID."""
        return self.slices[0].tags["series"]

    @property
    def description(self) -> str:
        """Its SeriesDescription, in whatever of two encodings it is."""
        raw = self.slices[0].tags["description"].encode("utf-8", "surrogateescape")
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            return raw.decode("latin-1")

    @property
    def files(self) -> int:
        """How many files it has, with copies."""
        return len(self.slices) + len(self.copies) + len(self.damaged)

    @property
    def thickness(self) -> float:
        """Typical distance of neighbouring slices, mm; NaN of a single one."""
        places = [float(image.position @ self.slices[0].normal) for image in self.slices]
        return float(np.median(np.diff(places))) if len(places) > 1 else float("nan")

    @property
    def derived(self) -> bool:
        """Whether it was computed of other images, as a reformation is."""
        return self.slices[0].tags["type"].upper().startswith("DERIVED")

    def __str__(self) -> str:
        """Number, description, modality, slices, size and spacing."""
        first = self.slices[0]
        (columns, rows), (x, y) = first.shape, first.spacing
        what = f"{self.number} {self.description}".strip() or "no description"
        return (
            f"{what} ({first.tags['modality'] or 'no modality'}, {len(self.slices)} slices, "
            f"{columns}x{rows}, {x:.3g}x{y:.3g}x{self.thickness:.3g} mm"
            f"{f', {self.parted}' if self.parted else ''})"
        )


def place_of(path: Path) -> tuple[Path, str | None]:
    """The folder of a volume and its name there; None: it is the folder's only one."""
    if is_series(path):
        return path.parent, path.name
    return path, None


def is_series(path: Path) -> bool:
    """Whether a path, by its name, is FOLDER/NAME of a series, and of no file of this name."""
    return bool(_NAME.fullmatch(path.name)) and not path.exists()


def find_volumes(folder: Path) -> tuple[list[DicomVolume], list[Aside]]:
    """The volumes in a folder, at least one, sorted by name, and the files of none.

    Raises:
        FormatError: no DICOM, nothing but localisers of several series, or a damaged file of which
            nobody can tell whose it is.
        OSError: the folder cannot be read.
    """
    return _find(folder, tuple(_signature(folder, name) for name in files_in(folder)))


@functools.lru_cache(maxsize=2)  # whoever reads one volume of a folder often reads the next
def _find(
    folder: Path, signature: tuple[tuple[str, int, int], ...]
) -> tuple[list[DicomVolume], list[Aside]]:
    """See `find_volumes`; the signature is another one once a file has changed."""
    del signature
    stacks, aside = find_stacks(folder)
    found = []
    for base, stack in zip(_names(stacks), stacks, strict=True):
        fault = stack.fault or _mixed(stack.images)
        slices, copies = _in_order(stack.images)
        for told, images in [("", slices)] if fault else _part(slices):
            own = {image.name for image in images}
            ours = tuple((name, why) for name, twin, why in copies if twin in own)
            name = f"{base}-{_slug(told)}" if told else base
            found.append(DicomVolume(name, tuple(images), ours, fault, stack.damaged, told))
    counts = Counter(volume.name for volume in found)
    found = [  # values that differ only in what no name has
        replace(one, name=f"{one.name}-{number}") if counts[one.name] > 1 else one
        for number, one in enumerate(found, 1)
    ]
    found = [replace(one, full_name=one.name) for one in found]
    if len(found) == 1:
        return [replace(found[0], name=".")], aside
    return sorted(found, key=lambda volume: volume.name), aside


def digest_of(uid: str) -> str:
    """Of a SeriesInstanceUID, which is not to be found everywhere a cache goes; of "" it is ""."""
    return hashlib.blake2b(uid.encode("utf-8", "replace"), digest_size=8).hexdigest() if uid else ""


def _signature(folder: Path, name: str) -> tuple[str, int, int]:
    path = folder / name
    found = os.stat(path) if path.exists() else os.lstat(path)  # a link that leads nowhere
    return name, found.st_size, found.st_mtime_ns


def several(volumes: Sequence[DicomVolume]) -> str:
    """What to say of a folder that should hold one volume."""
    if len({volume.series for volume in volumes}) > 1:
        what = f"several series: {len(volumes)} volumes in one folder"
    else:
        parts = ", ".join(f"{one.parted} ({len(one.slices)} images)" for one in volumes)
        what = f"several volumes: one series with {parts}"
    listed = "; ".join(f"{volume.name}: {volume}" for volume in volumes)
    return (
        f"{what}; name one as FOLDER/{volumes[0].name}, or scan the folder, which takes all. "
        f"There are {listed}"
    )[:2000]


def _names(stacks: Sequence[Stack]) -> list[str]:
    """Of stacks, before they are parted."""
    found = []
    for stack in stacks:
        first = stack.images[0]
        one = DicomVolume("", stack.images, (), "")
        digest = digest_of(first.tags["series"] or "none")[:6]
        words = (_slug(one.number) or "0", _slug(one.description)[:40])
        found.append("-".join(["series", *filter(None, words), digest]))
    views = [_VIEWS[int(np.abs(stack.images[0].normal).argmax())] for stack in stacks]
    return [
        f"{name}-{view}" if found.count(name) > 1 else name
        for name, view in zip(found, views, strict=True)
    ]


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.+]+", "_", text).strip("_.")


def _mixed(images: Sequence[Image]) -> str:
    """What is wrong with images of which some lie in another grid than the first; or ""."""
    first = images[0]
    for other in images[1:]:
        same_size = (other.shape, other.spacing) == (first.shape, first.spacing)
        turned = np.abs(other.directions - first.directions).max() > DIRECTION_TOLERANCE
        if not same_size or turned:
            return (
                f"mixed slices: {first.name} and {other.name} of one series differ in size, pixel "
                "spacing or orientation; move each volume to its own folder"
            )
    return ""


def _in_order(images: Sequence[Image]) -> tuple[list[Image], list[tuple[str, str, str]]]:
    """Images along their normal, and copies: name, of which one, and why they are set aside."""
    normal = images[0].normal
    slices: list[Image] = []
    copies = []
    for image in sorted(images, key=lambda one: float(one.position @ normal)):
        last = slices[-1] if slices else None
        copy = last and image.tags["uid"] == last.tags["uid"] != ""
        if last and copy and np.array_equal(image.position, last.position):
            why = f"a copy: of {last.name}, with its SOPInstanceUID"
            copies.append((image.name, last.name, why))
        else:
            slices.append(image)
    return slices, copies


def _part(slices: Sequence[Image]) -> list[tuple[str, list[Image]]]:
    """The volumes among slices in order, as far as their tags tell, each with what told it apart.

    Volumes lie between each other; what lies one after the other is one, as of a long scan.
    """
    normal = slices[0].normal
    for tag in VOLUME_TAGS:
        found: dict[str, list[Image]] = defaultdict(list)
        for image in slices:
            found[image.tags[tag]].append(image)
        ends = sorted(
            (float(own[0].position @ normal), float(own[-1].position @ normal))
            for own in found.values()
        )
        if "" not in found and any(first < end for (_, end), (first, _) in pairwise(ends)):
            parts = [(f"{_SHORT[tag]} {value}", own) for value, own in found.items()]
            break
    else:
        parts = _alternating(slices)
    if len(parts) < 2:
        return [("", list(slices))]
    return [
        (f"{told} {more}".strip(), images) for told, own in parts for more, images in _part(own)
    ]


def _alternating(slices: Sequence[Image]) -> list[tuple[str, list[Image]]]:
    """Volumes whose slices alternate and whose InstanceNumbers follow each other; else none."""
    texts = [image.tags["number"] for image in slices]
    if not all(re.fullmatch(r"\d{1,9}", text) for text in texts):
        return []
    numbers = list(map(int, texts))
    for count in range(2, _MOST_INTERLEAVED + 1):
        parts = [numbers[start::count] for start in range(count)]
        ends = [(min(part), max(part)) for part in parts if part]
        in_order = all(len(part) > 2 and _is_monotonic(part) for part in parts)
        if in_order and all(last < first for (_, last), (first, _) in pairwise(sorted(ends))):
            return [
                (f"images {first} to {last}", list(slices[start::count]))
                for start, (first, last) in enumerate(ends)
            ]
    return []


def _is_monotonic(numbers: Sequence[int]) -> bool:
    """Whether numbers only grow or only shrink."""
    return sorted(numbers) in (list(numbers), list(reversed(numbers)))
