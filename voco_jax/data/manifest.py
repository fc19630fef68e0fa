"""The manifest of a cache: which volumes it holds, as lines that are only ever added.

Here it is one file, manifest.jsonl, and every line is on the disk before the next volume. Object
stores cannot append: there it is a series of objects, manifest/000001.jsonl, ..., each written
complete, every 30 seconds or 500 lines; a run that is killed there loses at most the lines since.
Reading takes both, so that a cache may be copied from one kind of place to the other.
"""

import contextlib
import json
import os
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

import pydantic

from voco_jax.data.datalists import Section
from voco_jax.data.formats.stored import Aside
from voco_jax.data.storage import Folder
from voco_jax.data.texture import Texture
from voco_jax.data.volumes import Box
from voco_jax.errors import InputError, InUseError, kind_of
from voco_jax.files import parse_object
from voco_jax.locks import locked, this_process

MANIFEST, SERIES, LOCK = "manifest.jsonl", "manifest", "prepare.lock"
FLUSH_SECONDS, FLUSH_LINES = 30.0, 500  # of the series
STALE_SECONDS = 600.0  # a lock object that was not renewed for so long counts no more
_FORGET = b'{"forget": '


@dataclass(frozen=True, slots=True)
class Label:
    """The segmentation of a prepared volume; its voxels are numbers of classes."""

    path: str  # of its file when it was prepared
    slot: int  # on the volume's grid: of the same size
    file_slot: int  # on the grid of the file, in RAS order, nothing cut off
    checksums: tuple[str, str]  # of both
    chunks: tuple[tuple[tuple[int, int], ...], ...]  # for each class but the background: where it
    # is in the first: number of a chunk (of `array.CHUNK` voxels, C order), voxels in it


@dataclass(frozen=True, slots=True)
class Channel:
    """A further channel of a prepared volume, on the grid of the first."""

    path: str  # of its file when it was prepared
    slot: int
    window: tuple[float, float]  # values that became 0 and 1
    mean: float  # of the prepared voxels, 0..1
    checksum: str  # of the stored voxels


@dataclass(frozen=True, slots=True)
class Entry:
    """One prepared volume: a line of the manifest. All of x y z is in RAS order."""

    id: str
    slot: int  # place on the array's first axis
    section: Section
    path: str  # of the CT file when it was prepared
    stamp: str  # of that file or its parts and of its label; another one: it has changed
    axes: str  # of that file, as "LPS"
    shape: tuple[int, int, int]  # of that file, voxels
    spacing: tuple[float, float, float]  # of that file, mm
    window: tuple[float, float]  # HU (of an MRI: values) that became 0 and 1
    box: Box  # what was kept of that file, or of its grid of `chain.spacing`: first and last + 1
    foreground: float  # share of it in the box of the foreground
    stored: tuple[int, int, int]  # voxels of the prepared volume
    mean: float  # of the prepared voxels, 0..1
    checksum: str  # of the stored voxels
    label: Label | None = None  # of a `LabelledChain`
    class_label: str | None = None  # of a `ClassifiedChain`, as its list has it
    channels: tuple[Channel, ...] = ()  # after the first, which is the volume itself
    fold: int | None = None  # as its list has it
    doubt: str = ""  # why it is hardly an image of the chain's kind; taken all the same
    aside: tuple[Aside, ...] = ()  # files in its folder that are no part of it
    series: str = ""  # digest of its SeriesInstanceUID, where it has one
    study: str = ""  # digest of its StudyInstanceUID, where it has one
    texture: Texture | None = None  # of the prepared voxels; None: of an older version

    @property
    def slots(self) -> tuple[int, ...]:
        """All its places on the array's first axis."""
        label = self.label
        labels = () if label is None else (label.slot, label.file_slot)
        return (self.slot, *labels, *(channel.slot for channel in self.channels))

    @property
    def digest(self) -> str:
        """Another text once anything stored of it is another."""
        label = self.label.checksums if self.label else ()
        return " ".join([self.checksum, *label, *(channel.checksum for channel in self.channels)])


def read_manifest(folder: Folder) -> dict[str, Entry]:
    """The volumes of a cache by id, in the order in which they came.

    Raises:
        InputError: it cannot be read, or a line of it is damaged.
    """
    names = [MANIFEST, *_series(folder)]
    try:
        with ThreadPoolExecutor(16) as threads:
            contents = list(threads.map(folder.read, names))
    except OSError as error:
        raise kind_of(error)(f"{folder.path}/{MANIFEST}: cannot read: {error}") from error
    entries: dict[str, Entry] = {}
    for name, content in zip(names, contents, strict=True):
        lines = (content or b"").split(b"\n")
        for number, line in enumerate(lines[:-1], 1):  # after the last newline: cut off by a kill
            try:
                if line.startswith(_FORGET):
                    entries.pop(parse_object(line)["forget"], None)
                    continue
                entry = _read_entry(line)
            except (ValueError, TypeError) as error:  # pydantic's too
                raise InputError(
                    f"{folder.path}/{name}: line {number} is damaged ({line[:80]!r}); delete this "
                    "line and run prepare again"
                ) from error
            entries[entry.id] = entry
    return entries


def _read_entry(line: bytes) -> Entry:
    r"""A line of the manifest.

    Until names that are not UTF-8 were refused, they went in as JSON's \udcNN, which is no text:
    what is in such a cache is read all the same.

    Raises:
        ValueError: it is damaged.
    """
    try:
        return _ENTRY.validate_json(line)
    except ValueError:
        if b"\\udc" not in line:
            raise
        return _ENTRY.validate_json(re.sub(rb"\\udc([0-9a-f]{2})", rb"\\\\x\1", line))


_ENTRY = pydantic.TypeAdapter(Entry)


def _series(folder: Folder) -> list[str]:
    """The objects of a manifest that is a series, in order; not what else lies beside them."""
    return sorted(
        f"{SERIES}/{name}"
        for name in folder.names(SERIES)
        if re.fullmatch(r"[0-9]{6,18}\.jsonl", name)
    )


def line_of(volume: Entry | str) -> str:
    """A volume that is there, or the id of one that is there no more."""
    return json.dumps({"forget": volume} if isinstance(volume, str) else asdict(volume)) + "\n"


class LocalManifest:
    """Adds lines to the manifest of a cache on this machine, for one process at a time.

    Args:
        folder: of the cache; must exist.
        stack: closes it and lets other processes in.

    Raises:
        InUseError: another process fills this cache.
        OSError: no permission.
    """

    def __init__(self, folder: Folder, stack: contextlib.ExitStack) -> None:
        self.owner = this_process()
        self._lost: list[str] = []
        path = Path(folder.path, LOCK)
        try:
            stack.enter_context(locked(path, self.owner, lost=self._lost.append))
        except InUseError as error:
            raise InUseError(
                f"{folder.path}: another prepare is filling this cache ({error}); wait for it or "
                "stop it"
            ) from error
        _make_one_file(folder)
        path = Path(folder.path, MANIFEST)
        self._file: IO[str] = stack.enter_context(path.open("a", encoding="utf-8"))

    def add(self, *lines: str) -> None:
        """Adds lines; they are on the disk when it returns."""
        if self._lost:
            raise OSError(f"another prepare has taken this cache over ({self._lost[0]})")
        self._file.writelines(lines)
        self._file.flush()
        os.fsync(self._file.fileno())


def _make_one_file(folder: Folder) -> None:
    """Leaves one file of complete lines.

    A manifest that was copied here from an object store is a series; its lines are older than those
    that are added here, but a reader takes them last. A kill may have cut the last line off.
    """
    series = _series(folder)
    parts = [folder.read(name) or b"" for name in (MANIFEST, *series)]
    complete = b"".join(part[: part.rfind(b"\n") + 1] for part in parts)
    if complete != parts[0]:
        folder.write(MANIFEST, complete)
    for name in series:
        folder.delete(name)


class RemoteManifest:
    """Adds lines to the manifest of a cache in an object store.

    Its lock is an object that is renewed every 30 seconds: enough against a second run started by
    mistake, not against two that start in the same moment (on S3), or a run that was cut off from
    the store for ten minutes and comes back.

    Args:
        folder: of the cache.
        stack: writes what is left and lets other processes in.

    Raises:
        InUseError: another process fills this cache.
        OSError: the store cannot be written.
    """

    def __init__(self, folder: Folder, stack: contextlib.ExitStack) -> None:
        self._folder = folder
        self.owner = this_process()
        self._lock()
        stack.callback(self._unlock)
        numbers = [int(Path(name).stem) for name in _series(folder)]
        self._next = max(numbers, default=0) + 1
        self._lines: list[str] = []
        self._guard = threading.Lock()
        self._failed: Exception | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._now_and_then, daemon=True)
        self._thread.start()
        stack.callback(self._end)

    def add(self, *lines: str) -> None:
        """Adds lines; they are in the store 30 seconds or 500 lines later."""
        if self._failed is not None:
            raise self._failed
        with self._guard:
            self._lines += lines
            full = len(self._lines) >= FLUSH_LINES
        if full:
            self._flush()

    def _flush(self) -> None:
        with self._guard:
            if self._lines:
                content = "".join(self._lines).encode()
                self._folder.write(f"{SERIES}/{self._next:06d}.jsonl", content)
                self._next += 1
                self._lines = []

    def _lock(self) -> None:
        if self._folder.write_new(LOCK, self.owner.encode()):
            return
        found = (self._folder.read(LOCK) or b"").decode(errors="replace")
        try:
            age = time.time() - parse_object(found)["time"]
        except (ValueError, KeyError, TypeError):
            age = STALE_SECONDS + 1  # not ours; nothing says that it lives
        if age < STALE_SECONDS:
            raise InUseError(
                f"{self._folder.path}: another prepare is filling this cache ({found}); wait for "
                f"it or stop it. If it was killed: its lock ends {STALE_SECONDS / 60:.0f} minutes "
                f"after its last sign of life, {age:.0f} seconds ago, or delete {LOCK} there"
            )
        self._folder.write(LOCK, self.owner.encode())

    def _now_and_then(self) -> None:
        while not self._ended.wait(FLUSH_SECONDS):
            try:
                if self._folder.read(LOCK) != self.owner.encode():
                    raise OSError("another prepare has taken this cache over")
                self._flush()
                self.owner = json.dumps(json.loads(self.owner) | {"time": time.time()})
                self._folder.write(LOCK, self.owner.encode())
            except OSError as error:
                self._failed = error
                return

    def _end(self) -> None:
        self._ended.set()
        self._thread.join()
        if self._failed is None:
            self._flush()

    def _unlock(self) -> None:
        if self._folder.read(LOCK) == self.owner.encode():
            self._folder.delete(LOCK)


def token_of(owner: str) -> str:
    """What of an owner never changes."""
    return json.loads(owner)["token"]
