"""The prepared cache: what `prepare` writes and the pipeline reads.

    CACHE/volumes           Zarr v3 array (volume, x, y, z); one file, or object, is one volume
    CACHE/manifest.jsonl    one JSON line a volume, written after its file (see manifest.py)
    CACHE/cache.json        format and chain settings
    CACHE/failures.jsonl    what the last `prepare` could not do
    CACHE/set_aside.jsonl   files that it saw and that are no part of a volume
    CACHE/excluded.txt      ids that --exclude with --prune took out, which later runs leave out
    CACHE/unused.json       since when `prepare` has seen files that no line names

A volume is there if the manifest says so. Slots of the array are never used twice: a volume whose
file changed moves to a new slot, so no line is ever beside other voxels than its own. The old
file, and what a run that was killed had written, stays for `KEEP_SECONDS`: training reads the
volumes of the manifest as it was when it began.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np

from voco_jax.config.common import Chain, ClassifiedChain, LabelledChain
from voco_jax.config.load import differences
from voco_jax.data.array import ARRAY, chunk_name, open_array, read_chunk
from voco_jax.data.manifest import (
    LOCK,
    MANIFEST,
    Entry,
    LocalManifest,
    RemoteManifest,
    line_of,
    read_manifest,
)
from voco_jax.data.storage import UNFINISHED, Folder, as_os_error, is_remote
from voco_jax.errors import InputError, TransientError, kind_of
from voco_jax.files import parse_object
from voco_jax.types import Size

FORMAT = 2
SETTINGS, FAILURES, ASIDE = "cache.json", "failures.jsonl", "set_aside.jsonl"
UNUSED, EXCLUDED = "unused.json", "excluded.txt"
KEEP_SECONDS = 30 * 24 * 3600  # files that no line names any more: longer than a run reads them
# How TensorStore's errors of a file that is cut or changed begin; that of one that is not there.
DAMAGE = ("DATA_LOSS", "FAILED_PRECONDITION", "INVALID_ARGUMENT", "OUT_OF_RANGE")
GONE = "NOT_FOUND"


@dataclass(frozen=True)
class Cache:
    """A prepared cache, for reading. Picklable: every process opens the array for itself."""

    path: str  # absolute, or a gs:// or s3:// URL
    chain: Chain
    entries: tuple[Entry, ...]  # sorted by id

    @classmethod
    def open(cls, path: str | Path, chain: Chain) -> Self:
        """Opens a cache for reading.

        Args:
            path: its folder, here or in an object store.
            chain: the settings that its volumes must have been prepared with.

        Raises:
            InputError: not a cache, other settings, damaged, or empty.
        """
        folder = Folder.at(path)
        check_settings(folder, chain)
        entries = read_manifest(folder)
        if not entries:
            raise InputError(f"{folder.path}: this cache is empty; {_HOW_TO_FILL}")
        return cls(folder.path, chain, tuple(entries[id] for id in sorted(entries)))

    def read(
        self,
        entry: Entry,
        corner: Size = (0, 0, 0),
        size: Size | None = None,
        out: np.ndarray | None = None,
    ) -> np.ndarray:
        """Reads one volume, or of a larger one a part and no more of the file than it needs.

        Args:
            entry: one of `entries`.
            corner: first voxel of the part.
            size: of the part; None: `chain.volume_size`.
            out: memory of a volume before, which this one may overwrite: saves making it.

        Returns:
            x y z of this size, in the stored dtype (uint8: 0..255; float16: 0..1).

        Raises:
            InputError: the volume is damaged.
            TransientError: it is gone, or cannot be read now.
        """
        part = tuple(
            slice(first, first + length)
            for first, length in zip(corner, size or self.chain.volume_size, strict=True)
        )
        try:
            if self.chain.fit == "random_crop" or is_remote(self.path):
                return self._array[entry.slot][part].read().result()
            shape, dtype = self.chain.volume_size, np.dtype(self.chain.dtype)
            # Decoded in C order: into any other memory it would be a copy that is lost.
            fits = out is not None and (out.shape, out.dtype) == (shape, dtype)
            if out is None or not (fits and out.flags.c_contiguous and out.flags.writeable):
                out = np.empty(shape, dtype)
            read_chunk(self.path, entry.slot, out)
            return out[part]
        except (OSError, ValueError) as error:
            raise self._unreadable(entry, entry.slot, error) from error

    def read_whole(self, entry: Entry) -> np.ndarray:
        """Reads all that is stored of a volume; see `read`."""
        return self.read(entry, size=entry.stored)

    def read_channels(
        self, entry: Entry, corner: Size = (0, 0, 0), size: Size | None = None
    ) -> np.ndarray:
        """Reads a part of a volume, or all that is stored, x y z channels; see `read`."""
        size = size or entry.stored
        first = self.read(entry, corner, size)
        further = [self._read_slot(entry, one.slot, corner, size) for one in entry.channels]
        return np.stack([first, *further], axis=-1)

    def read_label(
        self, entry: Entry, corner: Size = (0, 0, 0), size: Size | None = None
    ) -> np.ndarray:
        """Reads a part of a volume's segmentation, on the volume's grid; see `read`.

        Args:
            entry: one of `entries`, of a cache with labels.
            corner: first voxel of the part.
            size: of the part; None: all that is stored.

        Returns:
            x y z, numbers of classes in the cache's dtype.
        """
        assert entry.label is not None
        return self._read_slot(entry, entry.label.slot, corner, size or entry.stored)

    def read_file_label(self, entry: Entry) -> np.ndarray:
        """Reads a volume's segmentation on the grid of its file, RAS; see `read_label`."""
        assert entry.label is not None
        return self._read_slot(entry, entry.label.file_slot, (0, 0, 0), entry.shape)

    def _read_slot(self, entry: Entry, slot: int, corner: Size, size: Size) -> np.ndarray:
        part = tuple(slice(a, a + n) for a, n in zip(corner, size, strict=True))
        try:
            return self._array[slot][part].read().result()
        except (OSError, ValueError) as error:
            raise self._unreadable(entry, slot, error) from error

    def _unreadable(self, entry: Entry, slot: int, error: Exception) -> InputError:
        kind = InputError if str(error).startswith(DAMAGE) else TransientError
        return kind(
            f"{chunk_file(self.path, slot)}: cannot read {entry.id} ({error}); "
            "find all damage with: python -m voco_jax.data.prepare --verify --cache "
            f"{self.path}; then prepare again as before, which does those volumes anew"
        )

    @cached_property
    def _array(self) -> Any:
        return open_array(Folder(self.path))

    def __getstate__(self) -> dict[str, Any]:
        """The fields, without the opened array."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


class CacheWriter:
    """A cache being filled, by one process at a time; used as a context manager.

    Only this process changes the manifest; `array.write_volume` may run anywhere.

    Args:
        path: its folder; made if missing.
        chain: settings of its volumes.

    Raises:
        InputError: another process fills it, it has other settings, or it cannot be written.
    """

    def __init__(self, path: str | Path, chain: Chain) -> None:
        self.folder = Folder.at(path)
        self.path = self.folder.path
        self.chain = chain
        self.entries: dict[str, Entry] = {}  # by id, in the manifest's order
        self.lost: tuple[Entry, ...] = ()  # forgotten just now: their files are gone
        self._array: Any = None
        with contextlib.ExitStack() as stack:
            try:
                self._open(stack)
            except OSError as error:
                raise kind_of(error)(
                    f"{self.path}: cannot write this cache: {error.strerror or error}"
                ) from error
            self._stack = stack.pop_all()

    def __enter__(self) -> Self:
        """Returns itself, open since its construction."""
        return self

    def __exit__(self, *_: object) -> None:
        """Closes the manifest and lets other processes fill the cache."""
        self._stack.close()

    @property
    def owner(self) -> str:
        """Who fills this cache: what its lock says."""
        return self._manifest.owner

    def reserve(self, count: int) -> range:
        """Extends the array by slots that no run has ever used."""
        start = max(int(self._array.shape[0]), self._unused)
        if count:
            with as_os_error():
                shape = [start + count, *self._array.shape[1:]]
                self._array = self._array.resize(exclusive_max=shape).result()
        return range(start, start + count)

    def add(self, entry: Entry) -> None:
        """Makes a volume whose file is written part of the cache, instead of one with its id."""
        self._manifest.add(line_of(entry))
        self.entries[entry.id] = entry

    def forget(self, entries: Sequence[Entry]) -> None:
        """Takes volumes out of the cache; their files are deleted later."""
        self._manifest.add(*(line_of(entry.id) for entry in entries))
        for entry in entries:
            del self.entries[entry.id]

    def _open(self, stack: contextlib.ExitStack) -> None:
        if not self.folder.remote:
            os.makedirs(self.path, exist_ok=True)
        begun = self.folder.read(SETTINGS) is not None
        if not begun:
            present = set(self.folder.names()) - {LOCK, SETTINGS + UNFINISHED, EXCLUDED}
            if present and MANIFEST not in present:
                some = ", ".join(sorted(present)[:3])
                raise InputError(
                    f"{self.path}: found other files ({some}), expected a prepared cache, an empty "
                    "folder or none; name another folder"
                )
        manifest = RemoteManifest if self.folder.remote else LocalManifest
        self._manifest = manifest(self.folder, stack)
        if begun:
            check_settings(self.folder, self.chain)
        else:
            settings = {"format": FORMAT, "chain": _plain(self.chain)}
            self.folder.write(SETTINGS, (json.dumps(settings, indent=1) + "\n").encode())
        self.entries = read_manifest(self.folder)
        used = [slot for entry in self.entries.values() for slot in entry.slots]
        self._unused = max(used, default=-1) + 1
        self._array = open_array(self.folder, create=self.chain)
        present = {name for name in self.folder.names(ARRAY) if name.startswith("c.")}
        self._clear_away(present - {chunk_name(slot) for slot in used})
        self.lost = tuple(
            entry
            for entry in self.entries.values()
            if not present.issuperset(map(chunk_name, entry.slots))
        )
        if self.lost:
            self.forget(self.lost)

    def _clear_away(self, names: set[str]) -> None:
        """Deletes files that no line names: unfinished ones, and others after `KEEP_SECONDS`.

        By this machine's clock and first sight: object stores tell no times of their own.
        """
        now = int(time.time())
        try:
            known = parse_object(self.folder.read(UNUSED) or b"{}")
        except ValueError:
            known = {}
        kept = {}
        for name in names:
            since = known.get(name, now)
            since = min(since, now) if isinstance(since, int) else now
            if since > now - KEEP_SECONDS and not name.endswith(UNFINISHED):
                kept[name] = since
        for name in names - kept.keys():
            self.folder.delete(f"{ARRAY}/{name}")
        if kept != known:
            self.folder.write(UNUSED, json.dumps(kept, indent=1).encode())


def checksum(voxels: np.ndarray) -> str:
    """A hash of a volume's stored voxels, as in the manifest."""
    return hashlib.blake2b(np.ascontiguousarray(voxels).data, digest_size=16).hexdigest()


def read_chain(path: str | Path) -> Chain:
    """The chain settings of a cache.

    Raises:
        InputError: not a cache, or of another format.
    """
    values = _read_settings(path)
    return LabelledChain(**values) if "classes" in values else Chain(**values)


def _read_settings(path: str | Path) -> dict[str, Any]:
    """The chain settings of a cache, as plain values.

    Raises:
        InputError: not a cache, or of another format.
    """
    folder = Folder.at(path)
    file = f"{folder.path}/{SETTINGS}"
    try:
        content = folder.read(SETTINGS)
    except OSError as error:
        raise kind_of(error)(f"{file}: cannot read: {error}") from error
    if content is None:
        there = folder.remote or os.path.isdir(folder.path)
        what = "no prepared cache here" if there else "no such folder"
        raise InputError(f"{folder.path}: {what} (no {SETTINGS}); {_HOW_TO_FILL}")
    try:
        plain = parse_object(content)
        found, chain = plain["format"], dict(plain["chain"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file}: damaged; delete {folder.path} and prepare again") from error
    if found != FORMAT:
        raise InputError(
            f"{file}: found cache format {found!r}, expected {FORMAT}; prepare into a new folder"
        )
    return chain


def check_settings(folder: Folder, chain: Chain) -> None:
    """Checks that a folder is a cache made with these settings.

    Raises:
        InputError: not a cache, another format, or other settings, each field named.
    """
    changed = differences({"chain": _read_settings(folder.path)}, {"chain": _plain(chain)})
    if changed:
        raise InputError(
            f"{folder.path}: this cache was made with other settings (cache -> wanted): "
            f"{'; '.join(changed)}; use the cache's settings or name another cache folder"
        )


def chunk_file(path: str, slot: int) -> str:
    """The file or object of one volume's voxels."""
    return f"{path}/{ARRAY}/{chunk_name(slot)}"


_HOW_TO_FILL = (
    "fill it with: python -m voco_jax.data.prepare --datalist LIST.json --root DATA --cache CACHE"
)


def _plain(chain: Chain) -> dict[str, Any]:
    """What of the settings changes what is stored."""
    values = json.loads(json.dumps(dataclasses.asdict(chain)))
    if isinstance(chain, ClassifiedChain):
        del values["classes"]
    if not values.get("channels"):
        values.pop("channels", None)  # as caches say that are older than this setting
    return values
