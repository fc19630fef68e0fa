"""Re-reads a cache against its manifest: `prepare --verify`."""

import threading
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from voco_jax.config import Chain
from voco_jax.data.cache import Cache, CacheWriter, checksum, chunk_file, read_settings
from voco_jax.data.jobs import SeesCache
from voco_jax.data.manifest import Entry, token_of
from voco_jax.data.progress import bar, say
from voco_jax.data.workers import available_cores, cluster_workers, run_jobs
from voco_jax.errors import InputError

# How TensorStore's errors of a file that is gone, cut or changed begin.
_DAMAGE = ("NOT_FOUND", "DATA_LOSS", "FAILED_PRECONDITION", "INVALID_ARGUMENT", "OUT_OF_RANGE")
_AHEAD = 4  # volumes waiting for each thread


@dataclass(frozen=True)
class Verified:
    """What was found."""

    cache: str
    whole: int  # volumes
    bad: dict[str, str]  # id -> where and what; these are no longer in the cache

    def __str__(self) -> str:
        """The lines that the command prints."""
        lines = [f"{id}: {reason}" for id, reason in sorted(self.bad.items())]
        lines.append(f"cache {self.cache}: {self.whole} volumes whole, {len(self.bad)} not")
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
    chain = Chain(**read_settings(path))
    try:
        with CacheWriter(path, chain) as writer:
            return _verify(writer, workers, progress, stop or threading.Event(), scheduler)
    except OSError as error:
        raise InputError(f"{path}: cannot write this cache: {error.strerror or error}") from error


def _verify(
    writer: CacheWriter,
    workers: int | None,
    progress: bool,
    stop: threading.Event,
    scheduler: str | None,
) -> Verified:
    cache = Cache(writer.path, writer.chain, ())
    bad = {entry.id: f"{chunk_file(writer.path, entry.slot)} is missing" for entry in writer.lost}
    jobs = [_Check(cache, entry) for entry in writer.entries.values()]
    if scheduler is not None:
        found = _on_cluster(jobs, writer, scheduler)
    else:
        found = _in_threads(jobs, max(1, available_cores() if workers is None else workers))
    try:
        with bar("verify", len(jobs), progress) as shown:
            for job, reason in found:
                if reason:
                    bad[job.entry.id] = f"{chunk_file(writer.path, job.entry.slot)} {reason}"
                    writer.forget([job.entry])
                shown.set_postfix(bad=len(bad), refresh=False)
                shown.update()
                if stop.is_set():
                    raise KeyboardInterrupt
    finally:
        found.close()
    return Verified(writer.path, len(writer.entries), bad)


@dataclass(frozen=True)
class _Check:
    cache: Cache
    entry: Entry


def _check(job: _Check) -> str:
    """Returns what is wrong with a volume, or ""."""
    try:
        found = checksum(job.cache.read_whole(job.entry))
    except InputError as error:
        cause = str(error.__cause__)
        if not cause.startswith(_DAMAGE):  # a disk or network that fails now says nothing of it
            raise InputError(
                f"{chunk_file(job.cache.path, job.entry.slot)}: cannot be read now ({cause}); "
                "nothing is taken out of the cache for that: verify again when it can"
            ) from error
        return f"cannot be read: {cause}"
    if found != job.entry.checksum:
        return f"has the checksum {found}, expected {job.entry.checksum}"
    return ""


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
        check = SeesCache(writer.path, token_of(writer.owner))
        with cluster_workers(scheduler, check, say) as client:
            for job, reason in run_jobs(client, _check, jobs):
                yield job, "kills the worker that reads it" if reason is None else reason
