"""The command that fills the cache, on Dask: one task reads one CT and writes its own chunk.

A volume that fails is a line in CACHE/failures.jsonl and never the end of the run. The same
command again does only what is missing, has failed, or whose file has changed (size or time);
a volume whose file is gone, or that no list names any more, stays in the cache and is trained on.
"""

import argparse
import contextlib
import dataclasses
import signal
import sys
import threading
import time
from collections.abc import Collection, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import pydantic
from tqdm import tqdm

from voco_jax.config.common import WORKDIR, Chain, Source
from voco_jax.config.load import DEFAULT, command_parser, load, parse_arguments
from voco_jax.data.cache import ARRAY, ASIDE, FAILURES, CacheWriter
from voco_jax.data.collect import collect
from voco_jax.data.datalists import Volume, combine, labels_wanted
from voco_jax.data.formats.stored import Aside
from voco_jax.data.jobs import Job, missing_from, prepare_one, run_on_cluster, slots_of
from voco_jax.data.manifest import Entry
from voco_jax.data.progress import bar
from voco_jax.data.storage import Folder
from voco_jax.data.summary import Failure, Summary, aside_line
from voco_jax.data.verify import verify
from voco_jax.data.workers import available_cores, local_workers, run_jobs
from voco_jax.errors import InputError
from voco_jax.files import printable

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_KILLED = (
    "worker killed three times: as a rule out of memory (use fewer workers), "
    "else no end in half an hour"
)
Outcomes = Generator[tuple[Job, Entry | str | None], None, None]


class PrepareError(InputError):
    """The run came to its end, but not to what was asked: nothing prepared, or strict."""


def prepare(
    volumes: Sequence[Volume],
    cache_path: str | Path,
    chain: Chain,
    workers: int | None = None,
    strict: bool = False,
    progress: bool = True,
    stop: threading.Event | None = None,
    scheduler: str | None = None,
    take_doubtful: bool = False,
    aside: Sequence[Aside] = (),
) -> Summary:
    """Fills a cache with what it lacks of some volumes.

    Args:
        volumes: of lists and scans.
        cache_path: its folder; made if missing.
        chain: settings; an existing cache must have the same.
        workers: Dask processes; 0: none, all in this process; None: one for each core.
        strict: whether a failed volume is an error, raised after all others are done.
        progress: whether to show a bar (on a terminal) or a line now and then.
        stop: ends the run with KeyboardInterrupt after the next volume, once set.
        scheduler: address of a Dask cluster that does the work, instead of processes here.
        take_doubtful: see `volumes.prepare_files`.
        aside: files that are no part of a volume, as `collect` found them.

    Returns:
        The summary; its str() is for people.

    Raises:
        InputError: no volumes, contradictory volumes, a cache that cannot be written, or a cluster
            that cannot be used.
        PrepareError: nothing at all is in the cache at the end; or, if strict, any failure.
    """
    start = time.monotonic()
    volumes = combine(volumes)
    if not volumes:
        raise InputError("prepare: found no volumes to prepare, expected at least one")
    count = workers if workers is not None else available_cores()
    try:
        with CacheWriter(cache_path, chain) as cache:
            todo = missing_from(cache, volumes)
            arrays = slots_of(chain)
            slots = cache.reserve(len(todo) * arrays)
            jobs = [
                Job(volume, cache.path, slot, chain, take_doubtful)
                for volume, slot in zip(todo, slots[::arrays], strict=True)
            ]
            outcomes = _outcomes(jobs, cache, count, scheduler)
            shown = bar("prepare", len(jobs), progress)
            failures = _collect_outcomes(outcomes, cache, shown, stop or threading.Event())
            entries = cache.entries.values()
            left = [*aside, *_aside_of(volumes, cache.entries)]
            taken, failed = _count_files(volumes, cache.entries, {one.id for one in failures})
            summary = Summary(
                cache=cache.path,
                total=len(volumes),
                done=len(jobs) - len(failures),
                skipped=len(volumes) - len(jobs),
                failed=len(failures),
                failures=tuple(sorted(failures, key=lambda failure: failure.id)),
                training=sum(entry.section == "training" for entry in entries),
                validation=sum(entry.section == "validation" for entry in entries),
                unlisted=len(cache.entries.keys() - {volume.id for volume in volumes}),
                doubtful=sum(bool(entry.doubt) for entry in entries),
                aside=tuple(left),
                files_taken=taken,
                files_failed=failed,
                size=cache.folder.size(ARRAY),
                seconds=time.monotonic() - start,
            )
            cache.folder.write(
                FAILURES, "".join(f"{failure.line()}\n" for failure in summary.failures).encode()
            )
            cache.folder.write(ASIDE, "".join(f"{aside_line(one)}\n" for one in left).encode())
    except OSError as error:
        raise InputError(
            f"{Folder.at(cache_path).path}: cannot write this cache: {error.strerror or error}; "
            "what is prepared is kept: run the same command again"
        ) from error
    if not entries:
        raise PrepareError(f"{summary.cache}: no volume could be prepared\n{summary}")
    if strict and failures:
        raise PrepareError(f"{summary.cache}: {len(failures)} volumes failed (strict)\n{summary}")
    return summary


def _aside_of(volumes: Sequence[Volume], entries: Mapping[str, Entry]) -> Iterator[Aside]:
    """What lies in the folders of volumes and is no part of them; ids and names as one path."""
    for volume in volumes:
        entry = entries.get(volume.id)
        for name, why in entry.aside if entry else ():
            yield f"{volume.id.removesuffix('/.')}/{name}", why


def _count_files(
    volumes: Sequence[Volume], entries: Mapping[str, Entry], failed: Collection[str]
) -> tuple[int, int]:
    """How many files are of volumes that are there, and how many of those that failed."""
    counts = [0, 0]
    for volume in volumes:
        entry = entries.get(volume.id)
        aside = len(entry.aside) if entry else 0
        counts[printable(volume.id) in failed] += max(volume.files - aside, 1)
    return counts[0], counts[1]


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
) -> list[Failure]:
    """Adds what is done to the cache, and logs and returns what failed."""
    failures: list[Failure] = []
    with contextlib.closing(outcomes), cache.folder.log(FAILURES) as log, shown:
        for job, outcome in outcomes:
            if isinstance(outcome, Entry):
                cache.add(outcome)
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
    return failures


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; see --help.

    Args:
        arguments: of the command line; None: this process's.

    Returns:
        Exit status: 0 done (failed volumes or not), 1 nothing prepared, a failure with --strict,
        or damage found by --verify, 2 bad input, 130 interrupted.
    """
    stop = threading.Event()

    def interrupt(*_: object) -> NoReturn:
        stop.set()  # in case the exception is raised where Python ignores it, as in a __del__
        raise KeyboardInterrupt

    def ignored(error: "sys.UnraisableHookArgs") -> None:
        if not isinstance(error.exc_value, KeyboardInterrupt):
            sys.__unraisablehook__(error)

    handlers = {number: signal.signal(number, interrupt) for number in _SIGNALS}
    sys.unraisablehook, hook = ignored, sys.unraisablehook
    try:
        options, overrides = parse_arguments(_parser(), arguments)
        if options.verify:
            return _verify_all(options, overrides, stop)
        status = 0
        names = ("workers", "strict", "scheduler", "take_doubtful")
        flags = {name: getattr(options, name) for name in names}
        for volumes, aside, source in _wanted(options, overrides):
            try:
                print(prepare(volumes, source.cache, source.chain, stop=stop, aside=aside, **flags))
            except PrepareError as error:  # the other sources are done all the same
                print(f"error: {error}", file=sys.stderr)
                status = 1
        return status
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            "interrupted: every volume finished so far is kept; "
            "run the same command again to go on",
            file=sys.stderr,
        )
        return 130
    finally:
        sys.unraisablehook = hook
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "-m voco_jax.data.prepare",
        __doc__,
        """
--datalist lists/btcv.json --root data/BTCV --cache cache/voco
--scan /data/my_ct --cache cache/mine --size 192 192 64
--config configs/voco_10k.py --scheduler tls://HOST:8786
--config configs/voco_10k.py --config.data.sources.ct.lists="()"
--verify --cache cache/voco
""",
    )
    add = parser.add_argument
    add("--datalist", action="append", default=[], metavar="JSON", help="list, JSON or CSV; repeat")
    add("--root", action="append", default=[], metavar="DIR", help="of all lists, or of each")
    add("--scan", action="append", default=[], metavar="DIR", help="folder of CT volumes; repeat")
    add(
        "--config",
        metavar="PY",
        help="config file; what the flags here do not set is as in its data.sources, and "
        "--config.field=value as ever; default: the chain of configs/voco_10k.py",
    )
    add("--source", action="append", metavar="NAME", help="only this source of --config; repeat")
    add("--cache", metavar="DIR", help="folder, gs:// or s3:// URL, instead of the config's")
    add("--window", nargs=2, type=float, metavar=("LOW", "HIGH"), help="HU")
    add("--threshold", type=float, help="foreground, 0..1 of the window")
    add("--size", nargs=3, type=int, metavar=("X", "Y", "Z"), help="of the volumes, voxels")
    add("--dtype", choices=("uint8", "float16"), help="of the cache")
    add("--workers", type=int, help="processes; default: the cores; 0: only this process")
    add(
        "--scheduler",
        metavar="ADDRESS",
        help="Dask cluster that does the work: tls://HOST:PORT, with certificates of Dask's own "
        "settings (distributed.comm.tls, docs/data.md), or tcp://HOST:PORT, which is open to all",
    )
    add("--verify", action="store_true", help="re-read the cache; take out what is damaged")
    add(
        "--take-doubtful",
        action="store_true",
        help="prepare what seems to be no CT in HU, too (a mask, MR, 0..1); the manifest says so",
    )
    add("--strict", action="store_true", help="exit with status 1 if any volume fails")
    return parser


def _verify_all(
    options: argparse.Namespace, overrides: dict[str, str], stop: threading.Event
) -> int:
    """Verifies the cache named, or those of the config's sources; returns the exit status."""
    if options.datalist or options.root or options.scan:
        raise InputError(
            "--verify: found lists or folders beside it, expected only --cache, or --config; what "
            "is damaged is done anew by the next run without --verify"
        )
    if not (options.cache or options.config):
        raise InputError("--verify: name the cache with --cache, or --config")
    paths = [options.cache]
    if options.config:
        paths = [source.cache for source in _sources(options, overrides).values()]
    status = 0
    for path in paths:
        found = verify(path, options.workers, stop=stop, scheduler=options.scheduler)
        print(found)
        status = max(status, 1 if found.bad else 0)
    return status


def _wanted(
    options: argparse.Namespace, overrides: dict[str, str]
) -> list[tuple[list[Volume], list[Aside], Source]]:
    """Volumes, files set aside and settings of each source, by the flags and the config."""
    if options.workers is not None and options.workers < 0:
        raise InputError(f"--workers: found {options.workers}, expected 0 or more")
    if bool(options.datalist) != bool(options.root):
        raise InputError("--datalist and --root: give both; a list's paths are relative to a root")
    named = bool(options.datalist or options.scan)
    if not (named or options.config):
        raise InputError("give --datalist LIST.json --root DATA, --scan DIR or --config FILE")
    if options.source and not options.config:
        raise InputError("--source: names a source of a config file; give --config with it")
    if not (options.cache or options.config):
        raise InputError("--cache: missing; name the folder to fill")
    sources = _sources(options, overrides)
    if named and len(sources) > 1:
        raise InputError(
            f"--datalist, --scan: found beside the sources {', '.join(sources)} of "
            f"{options.config}, expected one: choose it with --source"
        )
    found = []
    for name, source in sources.items():
        aside: list[Aside] = []
        how = {**labels_wanted(source.chain), "aside": aside}
        if named:
            volumes = collect(options.datalist, options.root, options.scan, **how)
        elif source.roots:
            volumes = collect(source.lists, source.roots, **how)
        else:
            raise InputError(
                f"{options.config}: data.sources.{name}.roots is empty, expected folders with CT "
                "files"
            )
        found.append((volumes, aside, source))
    return found


def _sources(options: argparse.Namespace, overrides: dict[str, str]) -> dict[str, Source]:
    """The sources of the config that are asked for, with what the flags set of them."""
    path = options.config or DEFAULT
    if not options.config and not DEFAULT.is_file():
        raise InputError(
            f"--config: missing, and {DEFAULT}, whose chain is the default, is not there; name a "
            "config file"
        )
    sources = load(path, overrides).data.sources
    wanted = options.source or list(sources)
    unknown = [name for name in wanted if name not in sources]
    if unknown:
        raise InputError(
            f"--source: found {', '.join(unknown)}, expected some of {', '.join(sources)}, the "
            f"data.sources of {path}"
        )
    if options.cache and len(wanted) > 1:
        raise InputError(
            f"--cache: found one for the sources {', '.join(wanted)}; choose one with --source, "
            "or set each one's cache in the config"
        )
    flags = {"window": options.window, "foreground_threshold": options.threshold}
    flags |= {"volume_size": options.size, "dtype": options.dtype}
    given = {field: value for field, value in flags.items() if value is not None}
    found = {}
    for name in wanted:
        source = sources[name]
        cache = options.cache or source.cache
        if WORKDIR in cache:
            raise InputError(
                f"{path}: data.sources.{name}.cache is {cache!r}: name it with --cache"
            )
        try:
            chain = dataclasses.replace(source.chain, **given)
        except pydantic.ValidationError as error:
            problems = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
            raise InputError(f"--window, --threshold, --size: {'; '.join(problems)}") from error
        found[name] = dataclasses.replace(source, cache=cache, chain=chain)
    return found


if __name__ == "__main__":
    # By its real name: tasks pickled from __main__ would carry this whole file to the workers.
    from voco_jax.data.prepare import main as named_main

    sys.exit(named_main())
