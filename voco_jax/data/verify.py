"""Re-reads a cache against its manifest: `prepare --verify`."""

import contextlib
import threading
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from voco_jax.data.cache import DAMAGE, GONE, Cache, CacheWriter, checksum, chunk_file, read_chain
from voco_jax.data.jobs import run_on_cluster
from voco_jax.data.manifest import Entry
from voco_jax.data.progress import bar
from voco_jax.data.workers import available_cores
from voco_jax.errors import InputError

_AHEAD = 4  # volumes waiting for each thread


@dataclass(frozen=True)
class Verified:
    """What was found."""

    cache: str
    intact: int  # volumes
    bad: dict[str, str]  # id -> where and what; these are no longer in the cache

    def __str__(self) -> str:
        """The lines that the command prints."""
        lines = [f"{id}: {reason}" for id, reason in sorted(self.bad.items())]
        lines.append(f"cache {self.cache}: {self.intact} volumes intact, {len(self.bad)} not")
        if self.bad:
            lines.append(
                "these are taken out of the cache; prepare again, with the same lists or folders, "
                "to bring them back"
            )
        return "\n".join(lines)


def verify(
    path: str | Path,
    workers: int | None = None,
    progress: bool = True,
    stop: threading.Event | None = None,
    scheduler: str | None = None,
) -> Verified:
    """Reads every volume of a cache and takes out of it what is damaged or missing.

    Args:
        path: of the cache.
        workers: threads; None: one for each core.
        progress: whether to show a bar or lines now and then.
        stop: ends it with KeyboardInterrupt after the next volume, once set.
        scheduler: address of a Dask cluster that reads, instead of threads here.

    Returns:
        What was found.

    Raises:
        InputError: not a cache, in use, or a cluster that cannot be used.
    """
    chain = read_chain(path)
    try:
        with CacheWriter(path, chain) as writer:
            cache = Cache(writer.path, chain, ())
            jobs = [_Check(cache, entry) for entry in writer.entries.values()]
            bad = {entry.id: f"{_file(cache, entry)} is missing" for entry in writer.lost}
            if scheduler is not None:
                found = _on_cluster(jobs, writer, scheduler)
            else:
                found = _in_threads(jobs, max(1, available_cores() if workers is None else workers))
            with contextlib.closing(found), bar("verify", len(jobs), progress) as shown:
                for job, reason in found:
                    if reason:
                        bad[job.entry.id] = f"{_file(cache, job.entry)} {reason}"
                        writer.forget([job.entry])
                    shown.set_postfix(bad=len(bad), refresh=False)
                    shown.update()
                    if stop is not None and stop.is_set():
                        raise KeyboardInterrupt
            return Verified(writer.path, len(writer.entries), bad)
    except OSError as error:
        raise InputError(f"{path}: cannot write this cache: {error.strerror or error}") from error


def _file(cache: Cache, entry: Entry) -> str:
    return chunk_file(cache.path, entry.slot)


@dataclass(frozen=True)
class _Check:
    cache: Cache
    entry: Entry


def _check(job: _Check) -> str:
    """Returns what is wrong with a volume, or ""."""
    entry, cache = job.entry, job.cache
    try:
        found = [checksum(cache.read_whole(entry))]
        if entry.label is not None:
            found += [checksum(cache.read_label(entry)), checksum(cache.read_file_label(entry))]
        if entry.channels:
            voxels = cache.read_channels(entry)
            found += [checksum(voxels[..., n]) for n in range(1, voxels.shape[-1])]
    except InputError as error:
        cause = str(error.__cause__)
        if not cause.startswith((GONE, *DAMAGE)):  # what fails now says nothing of the volume
            raise InputError(
                f"{_file(job.cache, job.entry)}: cannot be read now ({cause}); "
                "nothing is taken out of the cache for that: verify again when it can"
            ) from error
        return f"cannot be read: {cause}"
    return next(
        (
            f"has the checksum {a}, expected {b}"
            for a, b in zip(found, entry.digest.split(), strict=True)
            if a != b
        ),
        "",
    )


Found = Generator[tuple[_Check, str], None, None]


def _in_threads(jobs: Sequence[_Check], count: int) -> Found:
    with ThreadPoolExecutor(count) as threads:
        waiting: Iterator[_Check] = iter(jobs)
        running = {threads.submit(_check, job): job for job in islice(waiting, count * _AHEAD)}
        while running:
            for future in as_completed(tuple(running)):
                yield running.pop(future), future.result()
                for job in islice(waiting, 1):
                    running[threads.submit(_check, job)] = job


def _on_cluster(jobs: Sequence[_Check], writer: CacheWriter, scheduler: str) -> Found:
    if jobs:
        for job, reason in run_on_cluster(scheduler, writer, _check, jobs):
            yield job, "kills the worker that reads it" if reason is None else reason
