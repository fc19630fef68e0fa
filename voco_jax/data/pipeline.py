"""grain: prepared cache -> batches of crops and labels.

What batch number `step` holds is a pure function of (seed, step) and the data: order, crops and
labels do not change with the number of workers, threads or hosts.
"""

import dataclasses
import errno
import hashlib
import multiprocessing
import os
import re
import signal
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Protocol, TypedDict

import grain
import numpy as np
from absl import flags

from voco_jax.config.common import ClassifiedChain
from voco_jax.config.pretraining import Crops
from voco_jax.data.cache import Cache, Entry
from voco_jax.data.crops import base_origins, cut, draw_corner, draw_origins, overlap_labels
from voco_jax.errors import InputError, TransientError


class CropBatch(TypedDict):
    """What goes to the device.

    subs: (batch, s, x, y, z) sub-volumes, bases: (batch, n, x, y, z) base crops, both in the
    cache's dtype; labels: (batch, s, n) float32 overlap ratios.
    """

    subs: np.ndarray
    bases: np.ndarray
    labels: np.ndarray


class Sample(CropBatch):
    """One volume's part of a batch, without its first axis, and where its sub-volumes were cut."""

    origins: np.ndarray
    corner: tuple[int, int, int]  # where in the cached volume the part begins that was used


@dataclasses.dataclass(frozen=True)
class Part:
    """Volumes of one source."""

    source: str  # its name
    cache: Cache
    entries: tuple[Entry, ...]
    weight: float  # how often its volumes are drawn, against the other parts' weights


def fingerprint(parts: Sequence[Part]) -> str:
    """A hash of sets of volumes: ids, voxels, labels; the same on every machine, in any order."""
    lines = sorted(
        f"{part.source}\0{entry.id}\0{entry.digest}\n"
        + (f"{entry.class_label}\n" if isinstance(part.cache.chain, ClassifiedChain) else "")
        for part in parts
        for entry in part.entries
    )
    return hashlib.blake2b("".join(lines).encode(), digest_size=16).hexdigest()


def split(
    entries: Sequence[Entry], held_out: float, seed: int
) -> tuple[tuple[Entry, ...], tuple[Entry, ...]]:
    """Training and held-out volumes.

    Args:
        entries: of the cache.
        held_out: fraction of the training volumes to hold out (at least one, if not 0), chosen
            by a hash of (seed, id), with all volumes of a chosen one's DICOM study; volumes of a
            list's "validation" section always are.
        seed: of the experiment.

    Returns:
        (training, held-out), each in order of id.

    Raises:
        InputError: nothing is left to train on.
    """
    candidates = [entry for entry in entries if entry.section == "training"]
    candidates.sort(key=partial(shuffle_key, seed))
    count = max(1, round(held_out * len(candidates))) if held_out > 0 else 0
    studies = {entry.study for entry in candidates[:count]} - {""}
    kept = {entry.id for entry in candidates[count:] if entry.study not in studies}
    training = tuple(e for e in entries if e.id in kept)
    if not training:
        raise InputError(
            f"data.held_out: found {held_out} of {len(candidates)} training volumes in the cache, "
            "which leaves none to train on; expected at least one: prepare more volumes or lower "
            "data.held_out"
        )
    return training, tuple(e for e in entries if e.id not in kept)


def shuffle_key(seed: int, entry: Entry) -> bytes:
    """To sort by: a random order that other entries do not change, a hash of (seed, id)."""
    return hashlib.blake2b(f"{seed}/{entry.id}".encode()).digest()


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A volume, or a random part of it, and where its sub-volumes will be cut."""

    cache: Cache
    entry: Entry
    corner: tuple[int, int, int]  # where in the cached volume the part begins
    origins: np.ndarray  # (s, 3)


def draw(
    cache: Cache, entry: Entry, crops: Crops, sub_volumes: int, generator: np.random.Generator
) -> Drawn:
    """Draws what becomes of a volume; each stream by its name, so that another moves none."""
    seed = int(generator.integers(2**63))

    def stream(name: str) -> np.random.Generator:
        return np.random.default_rng((seed, zlib.crc32(name.encode())))

    corner = draw_corner(stream("corner"), entry.stored, cache.chain.volume_size)
    origins = draw_origins(stream("origins"), sub_volumes, crops.grid, crops.crop_size)
    return Drawn(cache, entry, corner, origins)


def collate(drawn: Sequence[Drawn], crops: Crops) -> CropBatch:
    """Reads the volumes of a batch and cuts their base crops and sub-volumes.

    Each voxel is decoded into memory that every batch uses again, and copied once, to its place.
    """
    size, dtype = crops.crop_size, np.dtype(drawn[0].cache.chain.dtype)
    bases = base_origins(crops.grid, size)
    labels = np.stack([overlap_labels(one.origins, crops.grid, size) for one in drawn])
    batch = CropBatch(
        subs=np.empty((len(drawn), len(drawn[0].origins), *size), dtype),
        bases=np.empty((len(drawn), len(bases), *size), dtype),
        labels=labels.astype(np.float32),
    )
    for row, one in enumerate(drawn):
        volume = one.cache.read(one.entry, one.corner, out=getattr(_memory, "volume", None))
        _memory.volume = volume
        cut(volume, one.origins, size, batch["subs"][row])
        cut(volume, bases, size, batch["bases"][row])
    return batch


_memory = threading.local()  # of each thread the volume that it read last


def sample(
    cache: Cache, entry: Entry, crops: Crops, sub_volumes: int, generator: np.random.Generator
) -> Sample:
    """Cuts the base crops and random sub-volumes of one volume, or of a random part of it."""
    drawn = draw(cache, entry, crops, sub_volumes, generator)
    batch = collate([drawn], crops)
    return Sample(
        subs=batch["subs"][0],
        bases=batch["bases"][0],
        labels=batch["labels"][0],
        origins=drawn.origins,
        corner=drawn.corner,
    )


def batches(parts: Sequence[Part], crops: Crops, **options: Any) -> Iterator[CropBatch]:
    """Endless training batches of pre-training.

    Args:
        parts: see `stream_batches`, which takes all further arguments too.
        crops: grid and crop sizes.
        options: of `stream_batches`.
    """
    drawing = partial(draw, crops=crops, sub_volumes=crops.sub_volumes)
    return stream_batches(parts, drawing, partial(collate, crops=crops), **options)


class Draw(Protocol):
    """Chooses what of a volume becomes a sample, by random numbers of the sample's own."""

    def __call__(self, cache: Cache, entry: Entry, *, generator: np.random.Generator) -> Any:
        """Returns what `collate` takes."""


@dataclasses.dataclass(frozen=True)
class _Draw:
    """(part, index) -> a sample to be read; pickled into the worker processes."""

    parts: tuple[Part, ...]
    draw: Draw

    def __call__(self, place: tuple[int, int], generator: np.random.Generator) -> Any:
        part = self.parts[place[0]]
        return self.draw(part.cache, part.entries[place[1]], generator=generator)


class _Rows:
    """Of each global batch only the rows of this process, in a random-access sequence."""

    def __init__(self, dataset: grain.MapDataset, batch_size: int, rows: Sequence[int]) -> None:
        self._dataset, self._batch_size, self._rows = dataset, batch_size, tuple(rows)

    def __len__(self) -> int:
        return len(self._dataset) // self._batch_size * len(self._rows)

    def __getitem__(self, index: int) -> Any:
        step, place = divmod(index, len(self._rows))
        return self._dataset[step * self._batch_size + self._rows[place]]


def stream_batches(
    parts: Sequence[Part],
    draw: Draw,
    collate: Callable[[Sequence[Any]], Any],
    *,
    seed: int,
    batch_size: int,
    rows: Sequence[int] | None = None,
    start_step: int = 0,
    workers: int = 0,
    prefetch: int = 2,
) -> Iterator[CropBatch]:
    """Endless training batches.

    Args:
        parts: the training volumes of each source, in an order that does not change between
            runs. Sources take turns so that their shares follow the weights at every moment.
        draw: what of a volume becomes a sample; reads nothing.
        collate: reads the samples of a batch.
        seed: of order and crops; every epoch has its own order.
        batch_size: volumes per batch, over all processes.
        rows: which of them this process needs; None: all.
        start_step: number of the first batch: what a resumed run passes.
        workers: processes that read and crop; 0: threads of this process.
        prefetch: batches kept ready (per worker).

    Returns:
        An iterator of what `collate` makes, of these rows.
    """
    places = [
        grain.MapDataset.source([(number, index) for index in range(len(part.entries))])
        .seed(seed)
        .shuffle()
        .repeat()
        for number, part in enumerate(parts)
    ]
    weights = [part.weight for part in parts]
    mixed = grain.MapDataset.mix(places, weights) if len(parts) > 1 else places[0]
    samples = mixed.seed(seed).random_map(_Draw(tuple(parts), draw))
    rows = range(batch_size) if rows is None else rows
    local = grain.MapDataset.source(_Rows(samples, batch_size, rows))[start_step * len(rows) :]
    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=prefetch)
    collated = local.batch(len(rows), drop_remainder=True, batch_fn=collate)
    stream = collated.to_iter_dataset(options)
    if workers:
        if not flags.FLAGS.is_parsed():  # grain asks absl's flags, which no command here has
            flags.FLAGS.mark_as_parsed()
        stream = stream.mp_prefetch(
            grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=prefetch),
            worker_init_fn=_start_worker,
        )
    return _in_words(iter(stream))


def _in_words(stream: Iterator[Any]) -> Iterator[Any]:
    """Batches; what their workers lack is told as what it is."""
    try:
        yield from stream
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise _no_room(error) from error
        raise
    except RuntimeError as error:
        ended = re.search(r"terminated unexpectedly with exit code -(\d+)", str(error))
        if ended is None:
            raise
        if int(ended[1]) == signal.SIGBUS:  # memory that it had been promised
            raise _no_room(error) from error
        raise TransientError(
            f"data: a worker was ended by signal {ended[1]}; as a rule for want of memory: lower "
            "data.workers or data.prefetch if it happens again"
        ) from error


def _no_room(error: Exception) -> InputError:
    return InputError(
        f"/dev/shm: no room for the batches of the data workers ({error}); make it larger (Docker: "
        "--shm-size; Kubernetes: an emptyDir of medium Memory), or lower data.workers or "
        "data.prefetch"
    )


def _start_worker(index: int, count: int) -> None:
    """Keeps a worker off the accelerator, and alive exactly as long as the main process.

    A signal to the whole group (Ctrl-C, a scheduler's SIGTERM, a closed terminal's SIGHUP) is for
    the main process.
    """
    del index, count
    os.environ["JAX_PLATFORMS"] = "cpu"
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def held_out_sample(
    cache: Cache, entry: Entry, crops: Crops, *, sub_volumes: int, seed: int
) -> Sample:
    """A sample for validation, the same at every call: crops depend on (seed, id) alone."""
    digest = hashlib.blake2b(f"validation/{seed}/{entry.id}".encode()).digest()
    generator = np.random.default_rng(np.frombuffer(digest, np.uint32))
    return sample(cache, entry, crops, sub_volumes, generator)
