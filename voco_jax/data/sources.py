"""A run's volumes: its sources' caches filled and opened, and which volumes it began with."""

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from voco_jax.config.common import ClassifiedChain, Data, LabelledChain
from voco_jax.config.finetuning import LabelledData
from voco_jax.data.cache import Cache
from voco_jax.data.collect import collect
from voco_jax.data.datalists import labels_wanted
from voco_jax.data.folds import split_patients
from voco_jax.data.formats.stored import Aside
from voco_jax.data.phantom import make_phantoms
from voco_jax.data.pipeline import Part, split
from voco_jax.data.prepare import prepare
from voco_jax.errors import InputError
from voco_jax.files import parse_object, write_atomically

VOLUMES = "volumes.json"
_PARTS = ("training", "held_out")


def fill_caches(data: Data, seed: int, workdir: Path) -> str:
    """Makes phantoms and fills the caches where the config says so.

    Args:
        data: the config's section.
        seed: of the phantoms.
        workdir: gets the phantoms.

    Returns:
        The summaries, for people.

    Raises:
        InputError: nothing to prepare, or a cache that cannot be written.
    """
    if not data.prepare:
        return ""
    summaries = []
    for name, source in data.sources.items():
        lists, roots = source.lists, source.roots
        if data.phantoms:
            folder = workdir / "phantoms"
            print(f"making {data.phantoms} phantom CTs in {folder} ...", flush=True)
            made = make_phantoms(
                folder,
                data.phantoms,
                seed,
                labelled=isinstance(source.chain, LabelledChain),
                lesions=isinstance(source.chain, ClassifiedChain),
            )
            lists = (str(made),)
            roots = (str(folder),)
        if not roots:
            raise InputError(
                f"data.sources.{name}.roots: found none with data.prepare=True, expected folders "
                "with CT files (and their Decathlon lists, if they have any), or data.phantoms"
            )
        # Starting Dask takes longer than a few small phantoms do.
        workers = 0 if data.phantoms else None
        aside: list[Aside] = []
        volumes = collect(lists, roots, aside=aside, **labels_wanted(source.chain))
        summaries.append(str(prepare(volumes, source.cache, source.chain, workers, aside=aside)))
    return "\n".join(summaries)


def open_caches(data: Data) -> dict[str, Cache]:
    """The cache of each source, by name.

    Raises:
        InputError: one is missing, empty, damaged or was made with other settings.
    """
    return {name: Cache.open(source.cache, source.chain) for name, source in data.sources.items()}


def write_volumes(caches: Mapping[str, Cache], data: Data, seed: int, workdir: Path) -> str:
    """Splits the caches' volumes anew and writes WORKDIR/volumes.json.

    Later the run goes on with these, so that a cache may gain volumes meanwhile.

    Args:
        caches: of each source.
        data: the config's section, for `held_out`.
        seed: chooses what is held out.
        workdir: gets the file, whose path is returned.

    Raises:
        InputError: nothing of a source is left to train on, or two sources contradict each other.
    """
    content = {}
    for source, cache in caches.items():
        try:
            if isinstance(data, LabelledData):
                chosen = split_patients(cache.entries, data, seed)
            else:
                chosen = split(cache.entries, data.held_out, seed)
        except InputError as error:
            raise InputError(f"data.sources.{source}: {error}") from error
        content[source] = {
            name: {entry.id: entry.digest for entry in entries}
            for name, entries in zip(_PARTS, chosen, strict=True)
        }
    for one, other in itertools.permutations(content, 2):
        files = [
            {entry.path for entry in caches[name].entries if entry.id in content[name][part]}
            for name, part in ((one, "held_out"), (other, "training"))
        ]
        both = files[0] & files[1]
        if both:
            raise InputError(
                f"data.sources: {len(both)} volumes are held out of {one} and trained on in "
                f"{other} (as {min(both)}); a held-out volume must not be trained on: list them "
                'in one source only, or for "validation" in both with data.held_out=0'
            )
    write_atomically(workdir / VOLUMES, json.dumps(content, indent=1) + "\n")
    return str(workdir / VOLUMES)


def read_volumes(
    caches: Mapping[str, Cache], data: Data, workdir: Path
) -> tuple[tuple[Part, ...], tuple[Part, ...]]:
    """The training and held-out volumes that the run began with, of this machine's caches.

    Args:
        caches: of each source.
        data: the config's section, for the sources' weights.
        workdir: has the file.

    Returns:
        (training, held-out); sources in order of name, their volumes in order of id.

    Raises:
        InputError: one of them is gone or has changed.
    """
    path = workdir / VOLUMES
    try:
        old = parse_object(path.read_bytes())
        wanted = {name: [dict(old[name][part]) for part in _PARTS] for name in sorted(caches)}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path}: cannot be read ({error!r}), so it is not known which volumes this run began "
            "with; choose another --workdir (of several machines: one folder that all share)"
        ) from error
    found: tuple[list[Part], list[Part]] = ([], [])
    for source, both in wanted.items():
        cache, weight = caches[source], data.sources[source].weight
        entries = {entry.id: entry for entry in cache.entries}
        now = {entry.id: entry.digest for entry in cache.entries}
        for parts, digests in zip(found, both, strict=True):
            changed = [name for name, before in digests.items() if now.get(name) != before]
            if changed:
                raise InputError(
                    f"{cache.path}: {len(changed)} volumes that this run began with are gone or "
                    f"have changed ({', '.join(changed[:3])}{', ...' if len(changed) > 3 else ''})"
                    "; bring them back to resume, or choose another --workdir and "
                    "--config.init_from with this run's exported weights"
                )
            if digests:
                chosen = tuple(entries[name] for name in sorted(digests))
                parts.append(Part(source, cache, chosen, weight))
    return tuple(found[0]), tuple(found[1])


def describe_volumes(training: Sequence[Part], held_out: Sequence[Part]) -> list[str]:
    """Lines about what a run trains on, for people."""
    total = sum(part.weight for part in training)
    lines = [
        f"data: {sum(len(part.entries) for part in training)} volumes to train on, "
        f"{sum(len(part.entries) for part in held_out)} held out"
    ]
    if len(training) > 1:
        lines += [
            f"  {part.source}: {len(part.entries)} volumes, {part.weight / total:.1%} of the draws"
            for part in training
        ]
    return lines
