"""Volumes go into a cache: here, in processes, or on a cluster."""

import contextlib
import threading
from collections import defaultdict
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm import tqdm

from voco_jax.data.cache import FAILURES, CacheWriter
from voco_jax.data.datalists import Volume
from voco_jax.data.formats.dicom_series import digest_of, is_series
from voco_jax.data.jobs import (
    Job,
    missing_from,
    prepare_one,
    run_on_cluster,
    signature_of,
    slots_of,
)
from voco_jax.data.manifest import Entry
from voco_jax.data.progress import bar
from voco_jax.data.series import Divided, look
from voco_jax.data.summary import Failure
from voco_jax.data.workers import local_workers, run_jobs
from voco_jax.files import printable

_KILLED = (
    "worker killed three times: as a rule out of memory (use fewer workers), "
    "else no end in half an hour"
)
_LOOKS = 32  # at folders, at the same time
Outcomes = Generator[tuple[Job, Entry | Divided | str | None], None, None]


@dataclass(frozen=True)
class How:
    """How volumes are prepared; see `prepare`."""

    workers: int
    scheduler: str | None
    progress: bool
    stop: threading.Event
    take_doubtful: bool


@dataclass(frozen=True)
class Done:
    """What became of some volumes."""

    prepared: int
    failures: list[Failure]
    divided: dict[str, Divided]  # by id of the folder

    def and_then(self, more: "Done") -> "Done":
        """Both."""
        return Done(self.prepared + more.prepared, self.failures + more.failures, self.divided)


def fill(cache: CacheWriter, volumes: Sequence[Volume], how: How) -> Done:
    """Prepares what a cache lacks of some volumes.

    Raises:
        KeyboardInterrupt: `how.stop` was set.
        InputError: a cluster that cannot be used.
        OSError: the cache cannot be written.
    """
    todo = missing_from(cache, volumes)
    arrays = slots_of(cache.chain)
    slots = cache.reserve(len(todo) * arrays)
    jobs = [
        Job(volume, cache.path, slot, cache.chain, how.take_doubtful)
        for volume, slot in zip(todo, slots[::arrays], strict=True)
    ]
    outcomes = _outcomes(jobs, cache, how.workers, how.scheduler)
    return _collect_outcomes(outcomes, cache, bar("prepare", len(jobs), how.progress), how.stop)


def as_known(volumes: Sequence[Volume], entries: Mapping[str, Entry]) -> list[Volume]:
    """The same volumes; a folder's only series has the id that a cache has it by.

    In such a folder there were several series, of which one is left.

    Args:
        volumes: of lists and scans.
        entries: of the cache.
    """
    below: dict[str, list[Entry]] = defaultdict(list)
    for id, entry in entries.items():
        if is_series(Path(entry.path)):
            below[id.rpartition("/")[0]].append(entry)
    divided = [one for one in volumes if one.id not in entries and _folder(one) in below]
    with ThreadPoolExecutor(_LOOKS) as threads:
        same = list(threads.map(lambda one: _holds(one, below[_folder(one)]), divided))
    doubtful = [one for one, holds in zip(divided, same, strict=True) if not holds]
    names = {}
    for one in look(doubtful, [], progress=False):
        for entry in below.get(_folder(one.volume), ()):
            name, dicom = entry.id.rpartition("/")[2], one.dicom
            if dicom and (name, entry.series) == (dicom.full_name, digest_of(dicom.series)):
                names[one.volume.id] = name
    return [
        replace(one, id=f"{_folder(one)}/{names[one.id]}", path=Path(one.path) / names[one.id])
        if one.id in names
        else one
        for one in volumes
    ]


def _folder(volume: Volume) -> str:
    return volume.id.removesuffix("/.")


def _holds(volume: Volume, parts: Sequence[Entry]) -> bool:
    """Whether a folder surely holds several series: no file has changed since it did."""
    try:
        found = signature_of(volume)
    except OSError:
        return True  # whoever reads it says what is wrong
    return len(parts) > 1 and all(entry.stamp == found for entry in parts)


def _outcomes(
    jobs: Sequence[Job], cache: CacheWriter, workers: int, scheduler: str | None
) -> Outcomes:
    """Does the jobs: on a cluster, in processes here, or in this one."""
    if not jobs:
        return
    if scheduler is not None:
        yield from run_on_cluster(scheduler, cache, prepare_one, jobs)
    elif workers:
        with local_workers(min(workers, len(jobs))) as client:
            yield from run_jobs(client, prepare_one, jobs)
    else:
        yield from ((job, prepare_one(job)) for job in jobs)


def _collect_outcomes(
    outcomes: Outcomes, cache: CacheWriter, shown: tqdm, stop: threading.Event
) -> Done:
    """Adds what is done to the cache, and logs and returns what failed."""
    failures: list[Failure] = []
    divided: dict[str, Divided] = {}
    prepared = 0
    with contextlib.closing(outcomes), cache.folder.log(FAILURES) as log, shown:
        for job, outcome in outcomes:
            if isinstance(outcome, Entry):
                cache.add(outcome)
                prepared += 1
            elif isinstance(outcome, Divided):
                divided[job.volume.id] = outcome
            else:
                failure = Failure(
                    printable(job.volume.id), printable(job.volume.path), outcome or _KILLED
                )
                failures.append(failure)
                log(failure.line())
            shown.set_postfix(failed=len(failures), refresh=False)
            shown.update()
            if stop.is_set():
                raise KeyboardInterrupt  # Dask's processes end with `outcomes`
    return Done(prepared, failures, divided)
