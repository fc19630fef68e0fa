"""The command that fills the cache, on Dask: one task reads one CT and writes its own chunk.

A volume that fails is a line in CACHE/failures.jsonl and never the end of the run. The same
command again does only what is missing, has failed, or whose file has changed (size or time);
a volume whose file is gone, or that no list names any more, stays in the cache and is trained on,
unless --prune takes it out. A folder with several DICOM series is as many volumes.
"""

import argparse
import dataclasses
import signal
import sys
import threading
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from voco_jax.config.common import Chain
from voco_jax.config.load import parse_arguments
from voco_jax.data.cache import ARRAY, ASIDE, FAILURES, CacheWriter
from voco_jax.data.datalists import Volume, combine
from voco_jax.data.dry_run import of_cache_alone, show, tend
from voco_jax.data.filling import Done, How, as_known, fill
from voco_jax.data.formats.dicom_series import is_series
from voco_jax.data.formats.stored import Aside
from voco_jax.data.manifest import Entry
from voco_jax.data.prepare_options import find_sources, find_wanted, make_parser
from voco_jax.data.series import folder_of
from voco_jax.data.storage import Folder
from voco_jax.data.summary import Summary, aside_line
from voco_jax.data.tend import (
    Exclusion,
    check_prune,
    remember,
    remembered,
    split_wanted,
    stale,
    volume_of,
)
from voco_jax.data.verify import verify
from voco_jax.data.workers import available_cores
from voco_jax.errors import InputError
from voco_jax.files import printable

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


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
    exclude: Exclusion | None = None,
    prune: int | None = None,
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
        exclude: volumes to leave out, beside those that the cache's excluded.txt names.
        prune: whether to take out of the cache, at the end, what is excluded or not among the
            volumes, and at most how many, see `tend.check_prune`; None: no. What is excluded then
            goes into the cache's excluded.txt.

    Returns:
        The summary; its str() is for people.

    Raises:
        InputError: no volumes, contradictory volumes, a cache that cannot be written, or a cluster
            that cannot be used.
        PrepareError: nothing at all is in the cache at the end; too much would be taken out of it;
            or, if strict, any failure.
    """
    start = time.monotonic()
    before = remembered(cache_path)
    asked, excluded = split_wanted(combine(volumes), exclude, before)
    if not asked:
        what = f", all {len(excluded)} are excluded" if excluded else ""
        what += f" (see also {before.path})" if excluded and before else ""
        raise InputError(f"prepare: found no volumes to prepare, expected at least one{what}")
    count = workers if workers is not None else available_cores()
    how = How(count, scheduler, progress, stop or threading.Event(), take_doubtful)
    try:
        with CacheWriter(cache_path, chain) as cache:
            asked, more = split_wanted(as_known(asked, cache.entries), exclude, before)
            excluded += more
            done = fill(cache, asked, how)
            if done.divided:
                parts = [part for one in done.divided.values() for part in one.volumes]
                parts, more = split_wanted(parts, exclude, before)
                excluded += more
                asked = [one for one in asked if one.id not in done.divided] + parts
                cache.forget([cache.entries[id] for id in done.divided if id in cache.entries])
                done = done.and_then(fill(cache, combine(parts), how))
            asked = combine(asked)
            failed = {one.id for one in done.failures}
            old = stale(cache.entries, asked, failed)
            _, there = split_wanted(map(volume_of, cache.entries.values()), exclude, before)
            too_many = ""
            if prune is not None:
                _, own = split_wanted([*excluded, *there], exclude)
                too_many = _prune(cache, old, prune, own)
            left = [*aside, *_aside_of(asked, cache.entries)]
            left += [file for one in done.divided.values() for file in one.aside]
            summary = _summarise(cache, asked, done, left)
            summary = dataclasses.replace(
                summary,
                divided=len(done.divided),
                parts=sum(len(one.volumes) for one in done.divided.values()),
                excluded=len(excluded),
                files_excluded=sum(max(one.files, 1) for one in excluded),
                excluded_before=len(excluded) - len(split_wanted(excluded, exclude)[1]),
                excluded_there=len({one.id for one in there} & cache.entries.keys()),
                pruned=() if prune is None or too_many else tuple(entry.id for entry in old),
                unused=str(exclude or ""),
                seconds=time.monotonic() - start,
            )
            cache.folder.write(
                FAILURES, "".join(f"{failure.line()}\n" for failure in summary.failures).encode()
            )
            left += [_excluded_by(one, exclude, before) for one in excluded]
            cache.folder.write(ASIDE, "".join(f"{aside_line(one)}\n" for one in left).encode())
    except OSError as error:
        raise InputError(
            f"{Folder.at(cache_path).path}: cannot write this cache: {error.strerror or error}; "
            "what is prepared is kept: run the same command again"
        ) from error
    if not cache.entries:
        raise PrepareError(f"{summary.cache}: no volume could be prepared\n{summary}")
    if too_many:
        raise PrepareError(f"{summary}\n{too_many}")
    if strict and done.failures:
        raise PrepareError(
            f"{summary.cache}: {len(done.failures)} volumes failed (strict)\n{summary}"
        )
    return summary


def _prune(cache: CacheWriter, old: Sequence[Entry], most: int, excluded: Sequence[Volume]) -> str:
    """Takes volumes out of a cache, and keeps excluded ones out; returns why it refused to."""
    try:
        check_prune(old, len(cache.entries), most)
    except InputError as error:
        return str(error)
    remember(cache.folder, [one.id for one in excluded])
    cache.forget(old)
    return ""


def _excluded_by(volume: Volume, *files: Exclusion | None) -> Aside:
    """An excluded volume, and the first file that names it."""
    return volume.id, f"excluded: by {next(one.path for one in files if one and one.has(volume))}"


def _summarise(
    cache: CacheWriter, asked: Sequence[Volume], done: Done, left: Sequence[Aside]
) -> Summary:
    entries = cache.entries.values()
    taken, failed = _count_files(asked, cache.entries, {one.id for one in done.failures})
    return Summary(
        cache=cache.path,
        total=len(asked),
        done=done.prepared,
        skipped=len(asked) - done.prepared - len(done.failures),
        failed=len(done.failures),
        failures=tuple(sorted(done.failures, key=lambda failure: failure.id)),
        training=sum(entry.section == "training" for entry in entries),
        validation=sum(entry.section == "validation" for entry in entries),
        unlisted=len(cache.entries.keys() - {volume.id for volume in asked}),
        doubtful=sum(bool(entry.doubt) for entry in entries),
        aside=tuple(left),
        files_taken=taken,
        files_failed=failed,
        size=cache.folder.size(ARRAY),
        shared_series=_shared_series(entries),
    )


def _shared_series(entries: Iterable[Entry]) -> tuple[str, ...]:
    """Ids of the volumes whose series is in another volume's folder, too."""
    folders: dict[str, dict[str, list[str]]] = {}
    for entry in entries:
        if entry.series:
            path = entry.path
            folder = path.rpartition("/")[0] if is_series(Path(path)) else path
            folders.setdefault(entry.series, {}).setdefault(folder, []).append(entry.id)
    return tuple(
        id for own in folders.values() if len(own) > 1 for ids in own.values() for id in ids
    )


def _aside_of(volumes: Sequence[Volume], entries: Mapping[str, Entry]) -> Iterator[Aside]:
    """What lies in the folders of volumes and is no part of them; ids and names as one path."""
    for volume in volumes:
        entry = entries.get(volume.id)
        for name, why in entry.aside if entry else ():
            yield f"{folder_of(volume)}/{name}", why


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
        options, overrides = parse_arguments(make_parser(__doc__), arguments)
        if options.verify:
            return _verify_all(options, overrides, stop)
        status = 0
        names = ("workers", "strict", "scheduler", "take_doubtful", "prune")
        exclude = Exclusion(options.exclude) if options.exclude else None
        flags = {name: getattr(options, name) for name in names} | {"exclude": exclude}
        if of_cache_alone(options):
            print(tend(options, exclude))
            return 0
        for one in find_wanted(options, overrides):
            if one.looked is not None and (options.dry_run or options.write_list):
                print(show(one, exclude, options))
                continue
            source = one.source
            try:
                print(
                    prepare(
                        one.volumes, source.cache, source.chain, stop=stop, aside=one.aside, **flags
                    )
                )
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


def _verify_all(
    options: argparse.Namespace, overrides: dict[str, str], stop: threading.Event
) -> int:
    """Verifies the cache named, or those of the config's sources; returns the exit status."""
    if options.datalist or options.root or options.scan:
        raise InputError(
            "--verify: found lists or folders beside it, expected only --cache, or --config; what "
            "is damaged is done anew by the next run without --verify"
        )
    beside = ("exclude", "dry_run", "write_list", "series", "one_series")
    wrong = [f"--{name.replace('_', '-')}" for name in beside if getattr(options, name)]
    wrong += ["--prune"] if options.prune is not None else []
    if wrong:
        raise InputError(
            f"--verify: found {', '.join(wrong)} beside it, which it does not know: it takes "
            "all that is damaged out of the cache, and nothing else; expected --verify by itself"
        )
    if not (options.cache or options.config):
        raise InputError("--verify: name the cache with --cache, or --config")
    paths = [options.cache]
    if options.config:
        paths = [source.cache for source in find_sources(options, overrides).values()]
    status = 0
    for path in paths:
        found = verify(path, options.workers, stop=stop, scheduler=options.scheduler)
        print(found)
        status = max(status, 1 if found.bad else 0)
    return status


if __name__ == "__main__":
    # By its real name: tasks pickled from __main__ would carry this whole file to the workers.
    from voco_jax.data.prepare import main as named_main

    sys.exit(named_main())
