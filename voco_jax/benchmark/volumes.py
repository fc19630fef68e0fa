"""The volumes that benchmarks read: a config's caches, or phantoms in a temporary folder."""

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from voco_jax.config.common import WORKDIR
from voco_jax.config.pretraining import Pretraining
from voco_jax.data.cache import chunk_file
from voco_jax.data.pipeline import Part
from voco_jax.data.sources import fill_caches, open_caches, read_volumes, write_volumes
from voco_jax.data.storage import is_remote
from voco_jax.errors import InputError


@contextlib.contextmanager
def opened(config: Pretraining, phantoms: int | None) -> Iterator[tuple[Part, ...]]:
    """The training volumes, for as long as this lasts.

    Args:
        config: its caches are only read.
        phantoms: so many are made instead; None: the config's, where it has its cache in the
            workdir, as configs/demo.py has.

    Raises:
        InputError: a cache is missing, or phantoms for more than one source.
    """
    data = config.data
    inside = [name for name, source in data.sources.items() if WORKDIR in source.cache]
    count = phantoms or (data.phantoms if inside else 0)
    if count and len(data.sources) > 1:
        raise InputError(
            f"--phantoms: found {count} with the sources {', '.join(data.sources)}, expected a "
            "config with one source"
        )
    if inside and not count:
        raise InputError(
            f"data.sources.{inside[0]}.cache: found {data.sources[inside[0]].cache!r}, expected a "
            "prepared cache: give --config.data.sources.NAME.cache=FOLDER or --phantoms N"
        )
    with tempfile.TemporaryDirectory(prefix="voco_benchmark_") as name:
        folder = Path(name)
        if count:
            ((only, source),) = data.sources.items()
            sources = {only: dataclasses.replace(source, cache=str(folder / "cache"))}
            data = dataclasses.replace(data, sources=sources, phantoms=count, prepare=True)
            fill_caches(data, config.seed, folder)
        caches = open_caches(data)
        write_volumes(caches, data, config.seed, folder)
        yield read_volumes(caches, data, folder)[0]


def first_volumes(parts: Sequence[Part], most: int) -> tuple[Part, ...]:
    """The same sources with fewer volumes of each."""
    return tuple(dataclasses.replace(part, entries=part.entries[:most]) for part in parts)


def files_of(parts: Sequence[Part]) -> list[Path]:
    """The files of some volumes' voxels.

    Raises:
        InputError: they are in an object store.
    """
    for part in parts:
        if is_remote(part.cache.path):
            raise InputError(
                f"{part.cache.path}: an object store has no page cache to measure with, expected "
                "a cache on this machine"
            )
    return [Path(chunk_file(part.cache.path, e.slot)) for part in parts for e in part.entries]
