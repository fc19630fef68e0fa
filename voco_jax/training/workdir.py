"""The workdir: whose it is, and which volumes its run began with."""

import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from voco_jax.config import Config, differences, may_change, to_dict
from voco_jax.data.cache import Cache, write_whole
from voco_jax.data.pipeline import Part, split
from voco_jax.errors import InputError
from voco_jax.training.checkpoint import FOLDER as CHECKPOINTS

CONFIG, VOLUMES = "config.json", "volumes.json"
_PARTS = ("training", "held_out")


def claim_workdir(workdir: Path, config: Config) -> Path:
    """Makes the workdir this experiment's own, or checks that it is.

    Args:
        workdir: made if missing.
        config: compared with the one that the workdir was started with.

    Returns:
        The resolved path.

    Raises:
        InputError: the workdir holds another experiment, is a file or cannot be written.
    """
    path = workdir / CONFIG
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        # Before the first checkpoint there is nothing to resume: settings may still be mended.
        if any(folder.name.isdigit() for folder in (workdir / CHECKPOINTS).glob("*")):
            _check_same_experiment(path, config)
        write_whole(path, json.dumps(to_dict(config), indent=2) + "\n")
    except OSError as error:
        raise InputError(
            f"{workdir}: cannot be used as --workdir ({error}); choose another"
        ) from error
    return workdir.resolve()


def _check_same_experiment(path: Path, config: Config) -> None:
    try:
        old = dict(json.loads(path.read_text("utf-8")))
    except (FileNotFoundError, ValueError, TypeError) as error:
        raise InputError(
            f"{path}: cannot be read ({error}), so it is not known whose checkpoints are beside "
            "it; choose another --workdir"
        ) from error
    changed = [
        line for line in differences(old, to_dict(config)) if not may_change(line.split(": ")[0])
    ]
    if changed:
        raise InputError(
            f"{path.parent}: holds another experiment; {'; '.join(changed)}. "
            "Choose another --workdir, or set these back to resume"
        )


def write_volumes(caches: Mapping[str, Cache], config: Config, workdir: Path) -> str:
    """Splits the caches' volumes anew and writes WORKDIR/volumes.json.

    Later the run goes on with these, so that a cache may gain volumes meanwhile.

    Args:
        caches: of each source.
        config: for `data.held_out` and the seed.
        workdir: gets the file.

    Returns:
        The file's path.

    Raises:
        InputError: nothing of a source is left to train on, or two sources contradict each other.
    """
    content = {}
    for source, cache in caches.items():
        chosen = split(cache.entries, config.data.held_out, config.seed)
        content[source] = {
            name: {entry.id: entry.checksum for entry in entries}
            for name, entries in zip(_PARTS, chosen, strict=True)
        }
    for (one, a), (other, b) in itertools.permutations(content.items(), 2):
        both = a["held_out"].keys() & b["training"].keys()
        if both:
            raise InputError(
                f"data.sources: {len(both)} volumes are held out of {one} and trained on in "
                f"{other} (as {min(both)}); a held-out volume must not be trained on: list them "
                'in one source only, or for "validation" in both with data.held_out=0'
            )
    write_whole(workdir / VOLUMES, json.dumps(content, indent=1) + "\n")
    return str(workdir / VOLUMES)


def read_volumes(
    caches: Mapping[str, Cache], config: Config, workdir: Path
) -> tuple[tuple[Part, ...], tuple[Part, ...]]:
    """The training and held-out volumes that the run began with, of this machine's caches.

    Args:
        caches: of each source.
        config: for the sources' weights.
        workdir: has the file.

    Returns:
        (training, held-out); sources in order of name, their volumes in order of id.

    Raises:
        InputError: one of them is gone or has changed.
    """
    path = workdir / VOLUMES
    try:
        old = json.loads(path.read_text("utf-8"))
        wanted = {name: [old[name][part] for part in _PARTS] for name in sorted(caches)}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path}: cannot be read ({error!r}), so it is not known which volumes this run began "
            "with; choose another --workdir (of several machines: one folder that all share)"
        ) from error
    found: tuple[list[Part], list[Part]] = ([], [])
    for source, both in wanted.items():
        cache, weight = caches[source], config.data.sources[source].weight
        entries = {entry.id: entry for entry in cache.entries}
        for parts, checksums in zip(found, both, strict=True):
            changed = [
                name
                for name, checksum in checksums.items()
                if name not in entries or entries[name].checksum != checksum
            ]
            if changed:
                raise InputError(
                    f"{cache.path}: {len(changed)} volumes that this run began with are gone or "
                    f"have changed ({', '.join(changed[:3])}{', ...' if len(changed) > 3 else ''})"
                    "; bring them back to resume, or choose another --workdir and "
                    "--config.init_from with this run's exported weights"
                )
            if checksums:
                chosen = tuple(entries[name] for name in sorted(checksums))
                parts.append(Part(source, cache, chosen, weight))
    return tuple(found[0]), tuple(found[1])


def check_data(info: Mapping[str, Any], data_fingerprint: str, workdir: Path) -> None:
    """Checks that a checkpoint saw the very volumes that the run is about to continue with.

    Args:
        info: of the checkpoint.
        data_fingerprint: of the training volumes now.
        workdir: named in the error.

    Raises:
        InputError: they differ.
    """
    if info["data_fingerprint"] != data_fingerprint:
        raise InputError(
            f"{workdir / VOLUMES}: found volumes of fingerprint {data_fingerprint}, expected those "
            f"of the checkpoints, {info['data_fingerprint']}; choose another --workdir"
        )
