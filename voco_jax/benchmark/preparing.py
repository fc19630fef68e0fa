"""Preparing CT files, by stage, on one core: file -> voxels in the cache."""

import dataclasses
import itertools
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from voco_jax.benchmark.measure import (
    ChildError,
    Spread,
    in_own_process,
    one_core,
    peak_resident,
    seconds_text,
    spread,
    table,
)
from voco_jax.config.common import Chain
from voco_jax.data.array import ARRAY, chunk_name, write_volume
from voco_jax.data.cache import CacheWriter, checksum
from voco_jax.data.datalists import Volume
from voco_jax.data.formats.readers import VolumeError, load
from voco_jax.data.progress import log
from voco_jax.data.volumes import prepare_volume, quantise
from voco_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Prepared:
    """One file."""

    path: str
    shape: tuple[int, int, int]
    read: Spread  # seconds; of an unpacked file only the header, whose voxels the chain then reads
    chain: Spread  # orientation to resize
    write: Spread  # quantise, checksum, compress, write
    cached_bytes: int
    peak: int  # resident memory of the process


def measure_file(path: Path, chain: Chain, repeats: int) -> Prepared:
    """Prepares a file several times on one core; meant for a process of its own.

    Raises:
        InputError: no CT that can be used.
    """
    found: dict[str, list[float]] = {"read": [], "chain": [], "write": []}
    with one_core(), tempfile.TemporaryDirectory(prefix="voco_benchmark_") as folder:
        try:
            with CacheWriter(folder, chain) as cache:
                for slot in cache.reserve(repeats + 1):
                    times = [time.perf_counter()]
                    load(path)
                    times.append(time.perf_counter())
                    prepared = prepare_volume(path, chain)
                    times.append(time.perf_counter())
                    voxels = quantise(prepared.voxels, chain.dtype)
                    checksum(voxels)
                    write_volume(cache.path, slot, voxels)
                    times.append(time.perf_counter())
                    read, prepare, write = (b - a for a, b in itertools.pairwise(times))
                    if slot:  # the first warms libraries and the page cache
                        found["read"].append(read)
                        found["chain"].append(max(prepare - read, 0.0))
                        found["write"].append(write)
            size = Path(folder, ARRAY, chunk_name(1)).stat().st_size
        except VolumeError as error:
            raise InputError(str(error)) from error
    stages = {name: spread(seconds) for name, seconds in found.items()}
    return Prepared(
        path=str(path), shape=prepared.shape, cached_bytes=size, peak=peak_resident(), **stages
    )


def measure_files(
    volumes: Sequence[Volume], chain: Chain, repeats: int
) -> tuple[list[Prepared], list[str]]:
    """`measure_file` of each, with progress on stderr; and a line for each that failed."""
    rows, failures = [], []
    for number, volume in enumerate(volumes, start=1):
        log(f"{number}/{len(volumes)}: {volume.path}")
        try:
            rows.append(in_own_process(measure_file, Path(str(volume.path)), chain, repeats))
        except (InputError, ChildError) as error:
            failures.append(f"{volume.path}: {error}")
    return rows, failures


def prepare_table(rows: Sequence[Prepared]) -> str:
    """For people."""
    head = ["file", "voxels", "read", "chain", "write", "all", "in the cache", "peak memory"]
    return table(
        head,
        (
            (
                Path(row.path).name,
                "x".join(map(str, row.shape)),
                *(seconds_text(part.median) for part in (row.read, row.chain, row.write)),
                seconds_text(row.read.median + row.chain.median + row.write.median),
                f"{row.cached_bytes / 1e6:.2f} MB",
                f"{row.peak / 1e9:.2f} GB",
            )
            for row in rows
        ),
    )
