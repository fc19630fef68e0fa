"""`prepare` without preparing: what is found, lists of it, and the cache by itself."""

import argparse
import collections

from voco_jax.config.common import WORKDIR
from voco_jax.data.cache import Cache, read_chain
from voco_jax.data.datalists import combine
from voco_jax.data.filling import as_known
from voco_jax.data.manifest import Entry, read_manifest
from voco_jax.data.prepare_options import Wanted
from voco_jax.data.storage import Folder
from voco_jax.data.tend import (
    Exclusion,
    check_prune,
    remembered,
    split_wanted,
    stale,
    tend_cache,
    volume_of,
    write_list,
)
from voco_jax.errors import InputError


def of_cache_alone(options: argparse.Namespace) -> bool:
    """Whether the flags ask for something that needs no files but the cache's."""
    asked = options.exclude or options.prune is not None or options.write_list or options.dry_run
    return bool(asked and options.cache) and not (
        options.datalist or options.scan or options.config
    )


def tend(options: argparse.Namespace, exclude: Exclusion | None) -> str:
    """Does what `of_cache_alone` found; returns what to print.

    Raises:
        InputError: nothing to do, no cache, or what `tend_cache` and `write_list` raise.
    """
    if options.write_list:
        cache = Cache.open(options.cache, read_chain(options.cache))
        before = remembered(options.cache)
        volumes, left = split_wanted(map(volume_of, cache.entries), exclude, before)
        told = write_list(volumes, options.write_list, options.root)
        return "\n".join([told, f"excluded: {len(left)} volumes", *_unused(exclude)])
    if exclude is None:
        raise InputError(
            "--prune, --dry-run: found neither --exclude nor lists or folders, so nothing says "
            "which volumes are wanted; add --exclude FILE, or --scan or --datalist"
        )
    return tend_cache(options.cache, exclude, options.prune, options.dry_run)


def show(wanted: Wanted, exclude: Exclusion | None, options: argparse.Namespace) -> str:
    """What would be prepared, and pruned; or writes a list of it. Returns what to print.

    Raises:
        InputError: what `write_list` and `check_prune` raise.
    """
    assert wanted.looked is not None
    entries = _entries(wanted.source.cache)
    before = None if WORKDIR in wanted.source.cache else remembered(wanted.source.cache)
    found = combine(wanted.volumes)
    named = as_known(found, entries)
    volumes, left = split_wanted(named, exclude, before)
    if options.write_list:
        told = write_list(volumes, options.write_list, [])
        return "\n".join([told, f"excluded: {len(left)} volumes", *_unused(exclude)])
    dicom = {one.volume.id: str(one.dicom) for one in wanted.looked if one.dicom}
    says = {new.id: dicom[old.id] for new, old in zip(named, found, strict=True) if old.id in dicom}
    ids = {volume.id for volume in volumes}
    lines = [f"{id}{f': {says[id]}' if id in says else ''}" for id in sorted(ids)]
    lines += [f"excluded: {volume.id}" for volume in left]
    reasons = collections.Counter(why.split(":")[0] for _, why in wanted.aside)
    lines += [f"set aside, {reason}: {count} files" for reason, count in reasons.most_common()]
    there = len(ids & entries.keys())
    lines.append(f"{len(ids)} volumes, {there} of them in the cache; {len(left)} excluded")
    if options.prune is not None:
        old = stale(entries, volumes, ids - says.keys())
        lines += [f"--prune would take out: {entry.id}" for entry in old]
        lines.append(f"--prune would take out {len(old)} of {len(entries)} volumes of the cache")
        try:
            check_prune(old, len(entries), options.prune)
        except InputError as error:
            lines.append(str(error))
    return "\n".join([*lines, *_unused(exclude), "dry run: nothing was changed"])


def _unused(exclude: Exclusion | None) -> list[str]:
    return [str(exclude)] if exclude and exclude.unused else []


def _entries(path: str) -> dict[str, Entry]:
    """The volumes of a cache; none of one that is not there yet."""
    return {} if WORKDIR in path else read_manifest(Folder.at(path))
