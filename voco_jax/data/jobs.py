"""What is done for one volume, in whatever process: tasks of `prepare`."""

import contextlib
import dataclasses
import itertools
import os
import socket
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from voco_jax.config.common import Chain, LabelledChain
from voco_jax.data.array import count_in_chunks, largest, write_volume
from voco_jax.data.cache import CacheWriter, checksum
from voco_jax.data.datalists import Volume
from voco_jax.data.formats.dicom_series import is_series
from voco_jax.data.formats.readers import VolumeError, file_signature
from voco_jax.data.formats.remote import local_copy, remote_signature
from voco_jax.data.labels import PreparedLabels, prepare_labels
from voco_jax.data.manifest import LOCK, Channel, Entry, Label, token_of
from voco_jax.data.progress import log
from voco_jax.data.series import Divided, divide
from voco_jax.data.storage import Folder, is_remote
from voco_jax.data.texture import texture_of
from voco_jax.data.volumes import PreparedVolume, prepare_files, quantise
from voco_jax.data.workers import cluster_workers, run_jobs

_LOOKS = 32  # at files, at the same time: network file systems and object stores answer slowly
_PART = 64  # files that one thread looks at before it takes others


@dataclass(frozen=True)
class Job:
    """One volume to prepare."""

    volume: Volume
    cache: str
    slot: int  # of the volume, the first of `slots_of` the chain
    chain: Chain
    take_doubtful: bool  # see `volumes.prepare_files`


def slots_of(chain: Chain) -> int:
    """How many slots a volume takes.

    Its own; with a label that and the label as in the file; then one for each further channel.
    """
    return 2 + max(len(chain.channels), 1) if isinstance(chain, LabelledChain) else 1


def prepare_one(job: Job) -> Entry | Divided | str:
    """Prepares one volume.

    Returns:
        Its line of the manifest, its file in the cache written; or, of a folder with several DICOM
        series, these instead; or the reason why it failed.

    Raises:
        OSError: the cache cannot be written, which ends the run.
    """
    volume, chain = job.volume, job.chain
    try:
        found = signature_of(volume)  # before reading: a file changed meanwhile is done again
    except OSError:
        found = ""  # prepare_files says what is wrong
    labels = None
    try:
        with contextlib.ExitStack() as stack:
            paths = [
                stack.enter_context(local_copy(path)) for path in (volume.path, *volume.channels)
            ]
            prepared, *further = prepare_files(paths, chain, job.take_doubtful)
        if isinstance(chain, LabelledChain):
            assert volume.label is not None
            with local_copy(volume.label) as path:
                labels = prepare_labels(path, chain, prepared)
    except VolumeError as error:
        if error.reason.startswith("several ") and (divided := divide(volume)):
            return divided
        what = {str(volume.label): "label", **{str(path): "channel" for path in volume.channels}}
        about = what.get(error.path)
        return f"{about} {error.path}: {error.reason}" if about else error.reason
    except OSError as error:
        return f"cannot fetch: {error}"
    voxels = quantise(prepared.voxels, chain.dtype)
    room = largest(chain)
    if any(size > most for size, most in zip(voxels.shape, room, strict=True)):
        found, most = ("x".join(map(str, shape)) for shape in (voxels.shape, room))
        return (
            f"too large: {found} voxels to store, expected at most {most}; set a larger spacing in "
            "the chain"
        )
    write_volume(job.cache, job.slot, voxels)
    label = None if labels is None else _write_labels(job, labels, voxels.dtype)
    facts = {name: value for name, value in vars(prepared).items() if name in _FACTS}
    facts["doubt"] = "; ".join(one.doubt for one in (prepared, *further) if one.doubt)
    return Entry(
        id=volume.id,
        slot=job.slot,
        section=volume.section,
        path=str(volume.path),
        stamp=found,
        stored=voxels.shape,
        checksum=checksum(voxels),
        label=label,
        class_label=volume.class_label,
        channels=_write_channels(job, further),
        fold=volume.fold,
        texture=texture_of(prepared.voxels, chain, prepared.box),
        **facts,
    )


_FACTS = {field.name for field in dataclasses.fields(Entry)}


def _write_channels(job: Job, prepared: Sequence[PreparedVolume]) -> tuple[Channel, ...]:
    """Writes the further channels of a volume behind its labels."""
    found = []
    for path, slot, one in zip(
        job.volume.channels, itertools.count(job.slot + 3), prepared, strict=False
    ):
        voxels = quantise(one.voxels, job.chain.dtype)
        write_volume(job.cache, slot, voxels)
        found.append(Channel(str(path), slot, one.window, one.mean, checksum(voxels)))
    return tuple(found)


def _write_labels(job: Job, labels: PreparedLabels, dtype: np.dtype) -> Label:
    """Writes both arrays of a label beside its volume's."""
    both = [array.astype(dtype) for array in (labels.voxels, labels.file_voxels)]
    for slot, array in enumerate(both, job.slot + 1):
        write_volume(job.cache, slot, array)
    assert isinstance(job.chain, LabelledChain)
    return Label(
        path=str(job.volume.label),
        slot=job.slot + 1,
        file_slot=job.slot + 2,
        checksums=(checksum(both[0]), checksum(both[1])),
        chunks=count_in_chunks(labels.voxels, len(job.chain.classes)),
    )


def missing_from(cache: CacheWriter, volumes: Sequence[Volume]) -> list[Volume]:
    """Those volumes that a cache lacks, or whose file has changed since.

    A volume that only changed its section, its class or its fold is changed at once.
    """
    known = [volume for volume in volumes if volume.id in cache.entries]
    parts = [known[start : start + _PART] for start in range(0, len(known), _PART)]
    with ThreadPoolExecutor(_LOOKS) as threads:
        looks = itertools.chain.from_iterable(threads.map(_signatures, parts))
        signatures = {volume.id: look for volume, look in zip(known, looks, strict=True)}
    missing = []
    for volume in volumes:
        entry = cache.entries.get(volume.id)
        # None: the file is gone, as on a machine that has only the cache: what we have counts.
        if entry is None or signatures[volume.id] not in (None, entry.stamp):
            missing.append(volume)
            continue
        label = volume.class_label or entry.class_label  # a list for pre-training says nothing
        changed = dataclasses.replace(
            entry, section=volume.section, class_label=label, fold=volume.fold
        )
        if changed != entry:
            cache.add(changed)
    return missing


def signature_of(volume: Volume) -> str:
    """Another text once a volume's file, or that of its label or a channel, has changed.

    Raises:
        OSError: there is no such file.
    """
    found = [_signature(volume.path)]
    if volume.label is not None:
        found.append(f"label {_signature(volume.label)}")
    return "; ".join(found + [f"channel {_signature(path)}" for path in volume.channels])


def _signature(path: Path | str) -> str:
    if is_remote(path):
        return remote_signature(str(path))
    size, changed = file_signature(path)
    return f"{size} bytes, {changed} ns"


def _signatures(volumes: Sequence[Volume]) -> list[str | None]:
    """Of each volume; the files in a folder of several series are looked at once."""
    found: list[str | None] = []
    folders: dict[tuple[object, ...], str | None] = {}
    for volume in volumes:
        series = not is_remote(volume.path) and is_series(Path(volume.path))
        place = Path(volume.path).parent if series else volume.path
        key = (place, series, volume.label, volume.channels)
        if key not in folders:
            try:
                folders[key] = signature_of(volume)
            except OSError:
                folders[key] = None
        found.append(folders[key])
    return found


@dataclass(frozen=True)
class SeesCache:
    """Checks, on a worker of a cluster, that it can fill a cache."""

    cache: str  # its path or URL
    token: str  # of the run that fills it, see `token_of`

    def __call__(self) -> str:
        """Returns "", or what is wrong."""
        where = f"the cache {self.cache} on {socket.gethostname()}"
        shared = "name a folder that all machines see under one path, or a gs:// or s3:// URL"
        folder = Folder(self.cache)
        try:
            if self.token.encode() not in (folder.read(LOCK) or b""):
                return f"it does not see {where}; {shared}"
            probe = f"probe-{socket.gethostname()}-{os.getpid()}"
            folder.write(probe, b"")
            folder.delete(probe)
        except OSError as error:
            return f"it cannot write {where}: {error}; {shared}"
        return ""


def run_on_cluster(
    scheduler: str, cache: CacheWriter, function: Callable[[Any], Any], jobs: Sequence[Any]
) -> Generator[tuple[Any, Any], None, None]:
    """Runs jobs that use a cache on a Dask cluster; see `cluster_workers` and `run_jobs`."""
    check = SeesCache(cache.path, token_of(cache.owner))
    with cluster_workers(scheduler, check, log) as client:
        yield from run_jobs(client, function, jobs)
