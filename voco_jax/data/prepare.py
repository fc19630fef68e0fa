"""The command that fills the cache, on Dask: one task reads one CT and writes its own chunk.

A volume that fails is a line in CACHE/failures.jsonl and never the end of the run. The same
command again does only what is missing, has failed, or whose file has changed (size or time);
a volume whose file is gone, or that no list names any more, stays in the cache and is trained on.
"""

import argparse
import dataclasses
import signal
import sys
import threading
import time
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import NoReturn

import pydantic

from voco_jax.config import Chain, Source, load, parse
from voco_jax.data.cache import ARRAY, FAILURES, CacheWriter
from voco_jax.data.datalists import Volume, collect, combine
from voco_jax.data.jobs import Job, SeesCache, missing_from, prepare_one
from voco_jax.data.manifest import Entry, token_of
from voco_jax.data.progress import bar, say
from voco_jax.data.storage import Folder
from voco_jax.data.summary import Failure, Summary
from voco_jax.data.verify import verify
from voco_jax.data.workers import available_cores, cluster_workers, local_workers, run_jobs
from voco_jax.errors import InputError

CHAIN_10K = Chain(
    axes="RAS",
    spacing=(),
    window=(-175.0, 250.0),
    window_unit="HU",
    crop_foreground=True,
    foreground_threshold=0.3,
    fit="resize",
    volume_size=(384, 384, 96),
    dtype="uint8",
)
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_KILLED = (
    "worker killed three times: as a rule out of memory (use fewer workers), "
    "else no end in half an hour"
)


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
            jobs = [
                Job(volume, cache.path, slot, chain)
                for volume, slot in zip(todo, cache.reserve(len(todo)), strict=True)
            ]
            outcomes = _outcomes(jobs, cache, count, scheduler)
            failures = _collect_outcomes(jobs, outcomes, cache, progress, stop or threading.Event())
            listed = {volume.id for volume in volumes}
            entries = cache.entries.values()
            summary = Summary(
                cache=cache.path,
                total=len(volumes),
                done=len(jobs) - len(failures),
                skipped=len(volumes) - len(jobs),
                failed=len(failures),
                failures=tuple(sorted(failures, key=lambda failure: failure.id)),
                training=sum(entry.section == "training" for entry in entries),
                validation=sum(entry.section == "validation" for entry in entries),
                unlisted=len(cache.entries.keys() - listed),
                size=cache.folder.size(ARRAY),
                seconds=time.monotonic() - start,
            )
            cache.folder.write(
                FAILURES, "".join(f"{failure.line()}\n" for failure in summary.failures).encode()
            )
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


def _outcomes(
    jobs: Sequence[Job], cache: CacheWriter, workers: int, scheduler: str | None
) -> Generator[tuple[Job, Entry | str | None], None, None]:
    """Does the jobs: on a cluster, in processes here, or in this one."""
    if not jobs:
        return
    if scheduler is not None:
        check = SeesCache(cache.path, token_of(cache.owner))
        with cluster_workers(scheduler, check, say) as client:
            yield from run_jobs(client, prepare_one, jobs)
    elif workers:
        with local_workers(min(workers, len(jobs))) as client:
            yield from run_jobs(client, prepare_one, jobs)
    else:
        yield from ((job, prepare_one(job)) for job in jobs)


def _collect_outcomes(
    jobs: Sequence[Job],
    outcomes: Generator[tuple[Job, Entry | str | None], None, None],
    cache: CacheWriter,
    progress: bool,
    stop: threading.Event,
) -> list[Failure]:
    """Adds what is done to the cache, and says what failed."""
    failures: list[Failure] = []
    try:
        with cache.folder.log(FAILURES) as log, bar("prepare", len(jobs), progress) as shown:
            for job, outcome in outcomes:
                if isinstance(outcome, Entry):
                    cache.add(outcome)
                else:
                    failure = Failure(job.volume.id, str(job.volume.path), outcome or _KILLED)
                    failures.append(failure)
                    log(failure.line())
                shown.set_postfix(failed=len(failures), refresh=False)
                shown.update()
                if stop.is_set():
                    raise KeyboardInterrupt
    finally:
        outcomes.close()  # ends Dask's processes now
    return failures


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; see --help.

    Args:
        arguments: of the command line; None: this process's.

    Returns:
        Exit status: 0 done (failed volumes or not), 1 nothing prepared, a failure with --strict,
        or damage found by --verify, 2 bad input, 130 interrupted.
    """
    options = _parser().parse_args(arguments)
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
        if options.verify:
            return _verify_all(options, stop)
        status = 0
        for volumes, cache, chain in _wanted(options):
            try:
                summary = prepare(
                    volumes,
                    cache,
                    chain,
                    options.workers,
                    options.strict,
                    stop=stop,
                    scheduler=options.scheduler,
                )
                print(summary)
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
    parser = argparse.ArgumentParser(
        prog="python -m voco_jax.data.prepare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="""examples:
  python -m voco_jax.data.prepare --datalist lists/btcv.json --root data/BTCV --cache cache/voco
  python -m voco_jax.data.prepare --scan /data/my_ct --cache cache/mine --size 192 192 64
  python -m voco_jax.data.prepare --config configs/voco_10k.py --scheduler tcp://HOST:8786
  python -m voco_jax.data.prepare --verify --cache cache/voco""",
    )
    add = parser.add_argument
    add("--datalist", action="append", default=[], metavar="JSON", help="Decathlon list; repeat")
    add("--root", action="append", default=[], metavar="DIR", help="of all lists, or of each")
    add("--scan", action="append", default=[], metavar="DIR", help="folder of CT volumes; repeat")
    add("--config", metavar="PY", help="take lists, roots, cache and chain from a config file")
    add("--source", action="append", metavar="NAME", help="only this source of --config; repeat")
    add(
        "--cache",
        metavar="DIR",
        help="folder, gs:// or s3:// URL; with --config: instead of the config's",
    )
    add("--window", nargs=2, type=float, metavar=("LOW", "HIGH"), help="HU; default -175 250")
    add("--threshold", type=float, help="foreground, 0..1 of the window; default 0.3")
    add("--size", nargs=3, type=int, metavar=("X", "Y", "Z"), help="voxels; default 384 384 96")
    add("--dtype", choices=("uint8", "float16"), help="of the cache; default uint8")
    add("--workers", type=int, help="processes; default: the cores; 0: only this process")
    add("--scheduler", metavar="ADDRESS", help="Dask cluster that does the work: tcp://HOST:PORT")
    add("--verify", action="store_true", help="re-read the cache; take out what is damaged")
    add("--strict", action="store_true", help="exit with status 1 if any volume fails")
    return parser


def _verify_all(options: argparse.Namespace, stop: threading.Event) -> int:
    """Verifies the cache named, or those of the config's sources; returns the exit status."""
    if options.datalist or options.root or options.scan:
        raise InputError(
            "--verify: found lists or folders beside it, expected only --cache, or --config; what "
            "is damaged is done anew by the next run without --verify"
        )
    if not (options.cache or options.config):
        raise InputError("--verify: name the cache with --cache, or --config")
    paths = [cache for _, cache, _ in _sources(options)] if options.config else [options.cache]
    status = 0
    for path in paths:
        found = verify(path, options.workers, stop=stop, scheduler=options.scheduler)
        print(found)
        status = max(status, 1 if found.bad else 0)
    return status


def _wanted(options: argparse.Namespace) -> list[tuple[list[Volume], str, Chain]]:
    """Volumes, cache and chain from the flags, or of each source of the config."""
    if options.workers is not None and options.workers < 0:
        raise InputError(f"--workers: found {options.workers}, expected 0 or more")
    chain_flags = {
        "window": options.window,
        "foreground_threshold": options.threshold,
        "volume_size": options.size,
        "dtype": options.dtype,
    }
    given = {name: value for name, value in chain_flags.items() if value is not None}
    if options.config:
        if given or options.datalist or options.root or options.scan:
            raise InputError(
                "--config: lists, roots and the chain come from the config file; give only "
                "--source, --cache, --workers and --strict with it"
            )
        return _of_config(options)
    if options.source:
        raise InputError("--source: names a source of a config file; give --config with it")
    if not (options.datalist or options.scan):
        raise InputError("give --datalist LIST.json --root DATA, --scan DIR or --config FILE")
    if bool(options.datalist) != bool(options.root):
        raise InputError("--datalist and --root: give both; a list's paths are relative to a root")
    if not options.cache:
        raise InputError("--cache: missing; name the folder to fill")
    try:
        chain = Chain(**(dataclasses.asdict(CHAIN_10K) | given))
    except pydantic.ValidationError as error:
        problems = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        raise InputError(f"--window, --threshold, --size: {'; '.join(problems)}") from error
    volumes = collect(options.datalist, options.root, options.scan)
    return [(volumes, options.cache, chain)]


def _of_config(options: argparse.Namespace) -> list[tuple[list[Volume], str, Chain]]:
    """Of each source of the config, or of one."""
    found = []
    for name, cache, source in _sources(options):
        if not source.roots:
            raise InputError(
                f"{options.config}: data.sources.{name}.roots is empty, expected folders with CT "
                "files"
            )
        found.append((collect(source.lists, source.roots), cache, source.chain))
    return found


def _sources(options: argparse.Namespace) -> list[tuple[str, str, Source]]:
    """Name, cache and settings of each source of the config that is asked for."""
    sources = parse(load(options.config)).data.sources
    wanted = options.source or list(sources)
    unknown = [name for name in wanted if name not in sources]
    if unknown:
        raise InputError(
            f"--source: found {', '.join(unknown)}, expected some of {', '.join(sources)}, the "
            f"data.sources of {options.config}"
        )
    if options.cache and len(wanted) > 1:
        raise InputError(
            f"--cache: found one for the sources {', '.join(wanted)}; choose one with --source, "
            "or set each one's cache in the config"
        )
    found = []
    for name in wanted:
        cache = options.cache or sources[name].cache
        if "{workdir}" in cache:
            raise InputError(
                f"{options.config}: data.sources.{name}.cache is {cache!r}: name it with --cache"
            )
        found.append((name, cache, sources[name]))
    return found


if __name__ == "__main__":
    # By its real name: tasks pickled from __main__ would carry this whole file to the workers.
    from voco_jax.data.prepare import main as named_main

    sys.exit(named_main())
