"""The input by itself: cached volumes -> batches on the host, all at once and in stages."""

import contextlib
import dataclasses
import multiprocessing
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from voco_jax.benchmark.measure import (
    Spread,
    bytes_from_disk,
    cpu_seconds,
    drop_from_page_cache,
    one_core,
    resident,
    seconds_text,
    spread,
    table,
    write_out,
)
from voco_jax.benchmark.volumes import files_of
from voco_jax.config.pretraining import Crops
from voco_jax.data.array import read_file
from voco_jax.data.pipeline import Part, batches, collate, draw
from voco_jax.data.workers import available_cores

STAGES = ("read the file", "decode", "crop and batch")


@dataclasses.dataclass(frozen=True)
class Stream:
    """The complete pipeline, running."""

    workers: int
    page_cache: str  # "warm" or "cold"
    cores: int  # that it may use
    samples: int
    samples_per_second: float
    samples_per_core_second: float
    cpu_seconds: float  # of one sample, all threads and processes
    disk_bytes: float | None  # of one sample; None: the kernel does not say
    resident_start: int  # bytes, of all its processes
    resident_end: int


@dataclasses.dataclass(frozen=True)
class Stages:
    """One thread that does one sample after the other, by hand."""

    page_cache: str
    seconds: dict[str, Spread]  # of one sample, by STAGES
    cpu_seconds: float  # of all of that
    disk_bytes: float | None


def measure_stream(
    parts: Sequence[Part],
    crops: Crops,
    *,
    batch_size: int,
    prefetch: int,
    workers: int,
    samples: int,
    cold: bool,
) -> Stream:
    """Takes batches as the training loop does, from this process; meant for one of its own.

    With no workers everything is on one core. Of a cold page cache the volumes are dropped after
    every batch.

    Args:
        parts: volumes; few enough to stay in the page cache.
        crops: what to cut.
        batch_size: volumes.
        prefetch: of `batches`.
        workers: of `batches`.
        samples: to be timed, rounded up to complete batches.
        cold: whether every volume comes from the disk.
    """
    files = files_of(parts)
    if cold:
        write_out(files)
    count = -(-samples // batch_size)
    ahead = 2 * max(workers, 1) * prefetch  # batches that are read before they are asked for
    with contextlib.nullcontext() if workers else one_core():
        stream = batches(
            parts, crops, seed=0, batch_size=batch_size, workers=workers, prefetch=prefetch
        )

        def take(number: int) -> None:
            for _ in range(number):
                next(stream)
                if cold:
                    drop_from_page_cache(files)

        # So many that every volume has been read and the worker processes have all delivered.
        take(max(-(-len(files) // batch_size), ahead))
        pids = [child.pid for child in multiprocessing.active_children() if child.pid]
        start_memory = resident(pids)
        take(ahead)  # uses up what was read ahead meanwhile
        disk, cpu = bytes_from_disk(pids), cpu_seconds(pids)
        begin = time.perf_counter()
        take(count)
        seconds = time.perf_counter() - begin
        cpu = cpu_seconds(pids) - cpu
        end_disk, samples = bytes_from_disk(pids), count * batch_size
        cores = min(max(workers, 1), available_cores())
    return Stream(
        workers=workers,
        page_cache="cold" if cold else "warm",
        cores=cores,
        samples=samples,
        samples_per_second=samples / seconds,
        samples_per_core_second=samples / seconds / cores,
        cpu_seconds=cpu / samples,
        disk_bytes=None if disk is None or end_disk is None else (end_disk - disk) / samples,
        resident_start=start_memory,
        resident_end=resident(pids),
    )


@one_core()
def measure_stages(parts: Sequence[Part], crops: Crops, *, samples: int, cold: bool) -> Stages:
    """Does what a sample takes step by step, on one core; meant for a process of its own.

    Decoding is the time of reading a volume from the cache less that of reading its file alone.
    Arguments as of `measure_stream`.
    """
    generator = np.random.default_rng(0)
    files = files_of(parts)
    if cold:
        write_out(files)
    places = [(part.cache, entry) for part in parts for entry in part.entries]
    found: dict[str, list[float]] = {name: [] for name in (*STAGES, "cpu")}
    volume: np.ndarray | None = None
    disk = 0

    def make_cold(index: int) -> None:
        if cold:
            drop_from_page_cache([files[index]])

    for number in range(-len(places), samples):  # the first round is not counted
        index = number % len(places)
        cache, entry = places[index]
        make_cold(index)
        _, reading = _timed(read_file, files[index])
        make_cold(index)
        drawn = draw(cache, entry, crops, crops.sub_volumes, generator)
        volume, both = _timed(cache.read, entry, drawn.corner, None, volume)
        make_cold(index)
        before, cpu = bytes_from_disk(), time.process_time()
        _, all_three = _timed(collate, [drawn], crops)
        cpu, after = time.process_time() - cpu, bytes_from_disk()
        if number >= 0:
            values = (reading, max(both - reading, 0.0), max(all_three - both, 0.0))
            for name, value in zip(STAGES, values, strict=True):
                found[name].append(value)
            found["cpu"].append(cpu)
            disk += (after or 0) - (before or 0)
    return Stages(
        page_cache="cold" if cold else "warm",
        seconds={name: spread(found[name]) for name in STAGES},
        cpu_seconds=float(np.median(found["cpu"])),
        disk_bytes=None if bytes_from_disk() is None else disk / samples,
    )


def _timed(work: Callable[..., Any], *args: Any) -> tuple[Any, float]:
    begin = time.perf_counter()
    result = work(*args)
    return result, time.perf_counter() - begin


def stream_table(rows: Sequence[Stream]) -> str:
    """The complete pipeline, for people."""
    head = ["pipeline", "page cache", "cores", "samples/s", "per core", "CPU a sample"]
    head += ["from disk a sample", "memory at start", "at end"]
    return table(
        head,
        (
            (
                f"{row.workers} workers" if row.workers else "threads",
                row.page_cache,
                str(row.cores),
                f"{row.samples_per_second:.3g}",
                f"{row.samples_per_core_second:.3g}",
                seconds_text(row.cpu_seconds),
                _disk_text(row.disk_bytes),
                f"{row.resident_start / 2**20:.0f} MiB",
                f"{row.resident_end / 2**20:.0f} MiB",
            )
            for row in rows
        ),
    )


def _disk_text(size: float | None) -> str:
    return "-" if size is None else f"{size / 1e6:.2f} MB"


def stages_table(rows: Sequence[Stages]) -> str:
    """Where a sample's time goes, for people."""
    lines = []
    for row in rows:
        total = sum(one.median for one in row.seconds.values())
        shares = [
            f"{seconds_text(one.median)} {one.median / total:.0%}" for one in row.seconds.values()
        ]
        times = (seconds_text(total), seconds_text(row.cpu_seconds))
        lines.append((row.page_cache, *shares, *times, _disk_text(row.disk_bytes)))
    return table(("page cache", *STAGES, "sum", "its CPU", "from disk"), lines)
