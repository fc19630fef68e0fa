"""The prepared cache: what `prepare` writes and the pipeline reads.

    CACHE/volumes           Zarr v3 array (volume, x, y, z); one chunk, one file, is one volume
    CACHE/manifest.jsonl    one JSON line a volume, written after its chunk
    CACHE/cache.json        format and chain settings
    CACHE/failures.jsonl    what the last `prepare` could not do

A volume is there if the manifest says so. Slots of the array are never used twice: a run that is
killed leaves at most chunks that no line names, which the next run deletes, and a volume whose
file changed moves to a new slot, so no line is ever beside other voxels than its own.
"""

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import json
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import pydantic
import tensorstore

from voco_jax.config import Chain, differences
from voco_jax.data.datalists import Section
from voco_jax.data.volumes import Box
from voco_jax.errors import InputError

FORMAT = 1
ARRAY, MANIFEST, SETTINGS, LOCK = "volumes", "manifest.jsonl", "cache.json", "prepare.lock"
FAILURES = "failures.jsonl"


@dataclass(frozen=True)
class Entry:
    """One prepared volume: a line of the manifest. All of x y z is in RAS order."""

    id: str
    slot: int  # place on the array's first axis
    section: Section
    path: str  # of the CT file when it was prepared
    size: int  # of that file, bytes
    mtime_ns: int  # of that file
    axes: str  # of that file, as "LPS"
    shape: tuple[int, int, int]  # of that file, voxels
    spacing: tuple[float, float, float]  # of that file, mm
    window: tuple[float, float]  # HU that became 0 and 1
    box: Box  # what was kept of that file: first and last + 1 voxel
    stored: tuple[int, int, int]  # voxels of the prepared volume
    mean: float  # of the prepared voxels, 0..1
    checksum: str  # of the stored voxels


@dataclass(frozen=True)
class Cache:
    """A prepared cache, for reading. Picklable: every process opens the array for itself."""

    path: Path
    chain: Chain
    entries: tuple[Entry, ...]  # sorted by id

    @classmethod
    def open(cls, path: str | Path, chain: Chain) -> Self:
        """Opens a cache for reading.

        Args:
            path: its folder.
            chain: the settings that its volumes must have been prepared with.

        Returns:
            The cache with the volumes that are whole at this moment.

        Raises:
            InputError: not a cache, other settings, damaged, or empty.
        """
        folder = Path(path).resolve()
        check_settings(folder, chain)
        entries = _read_manifest(folder / MANIFEST)
        if not entries:
            raise InputError(f"{folder}: this cache is empty; {_HOW_TO_FILL}")
        return cls(folder, chain, tuple(entries[id] for id in sorted(entries)))

    def read(self, entry: Entry, corner: tuple[int, int, int] = (0, 0, 0)) -> np.ndarray:
        """Reads one volume, or of a larger one a part.

        Args:
            entry: one of `entries`.
            corner: first voxel of the part.

        Returns:
            x y z of `chain.volume_size`, in the stored dtype (uint8: 0..255; float16: 0..1).

        Raises:
            InputError: the volume is damaged or gone.
        """
        try:
            part = tuple(
                slice(first, first + size)
                for first, size in zip(corner, self.chain.volume_size, strict=True)
            )
            return self._array[entry.slot][part].read().result()
        except ValueError as error:
            raise InputError(
                f"{chunk_file(self.path, entry.slot)}: cannot read {entry.id} ({error}); "
                "delete this file and run prepare again"
            ) from error

    @cached_property
    def _array(self) -> Any:
        return _open_array(self.path)

    def __getstate__(self) -> dict[str, Any]:
        """The fields, without the opened array."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


class CacheWriter:
    """A cache being filled, by one process at a time; used as a context manager.

    Only this process changes the manifest; `write_volume` may run anywhere.

    Args:
        path: its folder; made if missing.
        chain: settings of its volumes.

    Raises:
        InputError: another process fills it, it has other settings, or it cannot be written.
    """

    def __init__(self, path: str | Path, chain: Chain) -> None:
        self.path = Path(path).resolve()
        self.chain = chain
        self.entries: dict[str, Entry] = {}  # by id, in the manifest's order
        self._array: Any = None
        with contextlib.ExitStack() as stack:
            try:
                self._open(stack)
            except OSError as error:
                raise InputError(
                    f"{self.path}: cannot write this cache: {error.strerror or error}"
                ) from error
            self._stack = stack.pop_all()

    def __enter__(self) -> Self:
        """Returns itself, open since its construction."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Closes the manifest and lets other processes fill the cache."""
        self._stack.close()

    def reserve(self, count: int) -> range:
        """Extends the array by slots that no run has ever used."""
        start = max(int(self._array.shape[0]), self._unused)
        if count:
            sizes = [start + count, *self.chain.volume_size]
            self._array = self._array.resize(exclusive_max=sizes).result()
        return range(start, start + count)

    def add(self, entry: Entry) -> None:
        """Makes a written volume part of the cache, in place of an older one with its id.

        Args:
            entry: its slot's chunk is already written.
        """
        self._manifest.write(_line(entry))
        self._manifest.flush()
        os.fsync(self._manifest.fileno())
        old = self.entries.get(entry.id)
        self.entries[entry.id] = entry
        if old is not None and old.slot != entry.slot:
            chunk_file(self.path, old.slot).unlink(missing_ok=True)

    def _open(self, stack: contextlib.ExitStack) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        present = set(os.listdir(self.path)) - {LOCK}
        if present and SETTINGS not in present and MANIFEST not in present:
            some = ", ".join(sorted(present)[:3])
            raise InputError(
                f"{self.path}: found other files ({some}), expected a prepared cache, an empty "
                "folder or none; name another folder"
            )
        lock = stack.enter_context((self.path / LOCK).open("a"))
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            raise InputError(
                f"{self.path}: another prepare is filling this cache; wait for it or stop it"
            ) from error
        if (self.path / SETTINGS).exists():
            check_settings(self.path, self.chain)
        else:
            settings = {"format": FORMAT, "chain": _plain(self.chain)}
            write_whole(self.path / SETTINGS, json.dumps(settings, indent=1) + "\n")
        _cut_torn_line(self.path / MANIFEST)
        self.entries = _read_manifest(self.path / MANIFEST)
        self._unused = max((entry.slot + 1 for entry in self.entries.values()), default=0)
        self._array = _open_array(self.path, create=self.chain)
        self._tidy_chunks()
        self._manifest = stack.enter_context((self.path / MANIFEST).open("a", encoding="utf-8"))

    def _tidy_chunks(self) -> None:
        """Deletes chunks that no line names; forgets lines whose chunk is gone."""
        present = {name for name in os.listdir(self.path / ARRAY) if name.startswith("c.")}
        named = {chunk_file(self.path, entry.slot).name for entry in self.entries.values()}
        for name in present - named:
            (self.path / ARRAY / name).unlink()
        whole = {
            id: entry
            for id, entry in self.entries.items()
            if chunk_file(self.path, entry.slot).name in present
        }
        if len(whole) < len(self.entries):
            write_whole(self.path / MANIFEST, "".join(map(_line, whole.values())))
            self.entries = whole


def write_volume(path: str | Path, slot: int, voxels: np.ndarray) -> None:
    """Writes one volume's chunk, whole or not at all.

    Args:
        path: the cache's folder.
        slot: one of `CacheWriter.reserve`.
        voxels: x y z, in the cache's dtype.

    Raises:
        OSError: disk full, no permission.
    """
    try:
        _open_array(Path(path))[slot].write(voxels).result()
    except ValueError as error:  # TensorStore's only kind
        raise OSError(str(error)) from error


def checksum(voxels: np.ndarray) -> str:
    """A hash of a volume's stored voxels, as in the manifest."""
    return hashlib.blake2b(np.ascontiguousarray(voxels).data, digest_size=16).hexdigest()


def check_settings(path: Path, chain: Chain) -> None:
    """Checks that a folder is a cache made with these settings.

    Args:
        path: the cache's folder.
        chain: the settings wanted.

    Raises:
        InputError: not a cache, another format, or other settings, each field named.
    """
    file = path / SETTINGS
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        found = content["format"], content["chain"]
    except FileNotFoundError as error:
        what = "no prepared cache here" if path.is_dir() else "no such folder"
        raise InputError(f"{path}: {what} (no {SETTINGS}); {_HOW_TO_FILL}") from error
    except OSError as error:
        raise InputError(f"{file}: cannot read: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file}: damaged; delete {path} and prepare again") from error
    if found[0] != FORMAT:
        raise InputError(
            f"{file}: found cache format {found[0]!r}, expected {FORMAT}; prepare into a new folder"
        )
    changed = differences({"chain": found[1]}, {"chain": _plain(chain)})
    if changed:
        raise InputError(
            f"{path}: this cache was made with other settings (cache -> wanted): "
            f"{'; '.join(changed)}; use the cache's settings or name another cache folder"
        )


def chunk_file(path: Path, slot: int) -> Path:
    """The file of one volume's voxels."""
    return path / ARRAY / f"c.{slot}.0.0.0"


def write_whole(path: Path, text: str) -> None:
    """Writes a text file so that it is there whole or not at all."""
    part = path.with_name(f"{path.name}.part")
    with open(part, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


_HOW_TO_FILL = (
    "fill it with: python -m voco_jax.data.prepare --datalist LIST.json --root DATA --cache CACHE"
)


def _line(entry: Entry) -> str:
    return json.dumps(dataclasses.asdict(entry)) + "\n"


def _plain(chain: Chain) -> dict[str, Any]:
    return json.loads(json.dumps(dataclasses.asdict(chain)))


def _open_array(path: Path, create: Chain | None = None) -> Any:
    spec: dict[str, Any] = {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": f"{path / ARRAY}/"},
        # A slot without its file is an error, not a volume of zeros.
        "fill_missing_data_reads": False,
        # No cache in memory: every volume is read once an epoch. One thread: callers have theirs.
        "context": {"cache_pool": {"total_bytes_limit": 0}, "data_copy_concurrency": {"limit": 1}},
    }
    if create is not None:
        wide = create.dtype == "float16"
        # LZ4 takes a sixth more disk than Zstandard and half its time to read.
        lz4 = {
            "cname": "lz4",
            "clevel": 5,
            "shuffle": "shuffle" if wide else "noshuffle",
            "typesize": 2 if wide else 1,
            "blocksize": 0,
        }
        chunks = {"chunk_shape": [1, *create.volume_size]}
        spec["metadata"] = {
            "data_type": create.dtype,
            "chunk_grid": {"name": "regular", "configuration": chunks},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
            "dimension_names": ["volume", "x", "y", "z"],
            "codecs": [
                {"name": "bytes", "configuration": {"endian": "little"}} if wide else "bytes",
                {"name": "blosc", "configuration": lz4},
                {"name": "crc32c"},
            ],
        }
        if not (path / ARRAY / "zarr.json").exists():
            spec["metadata"]["shape"] = [0, *create.volume_size]
    try:
        return tensorstore.open(spec, open=True, create=create is not None).result()
    except ValueError as error:
        raise InputError(f"{path / ARRAY}: not the array of a cache ({error})") from error


def _read_manifest(path: Path) -> dict[str, Entry]:
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise InputError(f"{path}: cannot read: {error.strerror or error}") from error
    entry_type = pydantic.TypeAdapter(Entry)
    entries = {}
    for number, line in enumerate(lines[:-1], 1):  # after the last newline: cut off by a kill
        try:
            entry = entry_type.validate_json(line)
        except pydantic.ValidationError as error:
            raise InputError(
                f"{path}: line {number} is damaged ({line[:80]!r}); delete this line and run "
                "prepare again"
            ) from error
        entries[entry.id] = entry
    return entries


def _cut_torn_line(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError), open(path, "r+b") as file:
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)
