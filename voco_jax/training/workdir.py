"""The workdir: whose it is."""

import json
import re
from os import PathLike
from pathlib import Path

from voco_jax.config import Config, differences, may_change, to_dict
from voco_jax.data.cache import write_whole
from voco_jax.errors import InputError
from voco_jax.training.checkpoint import FOLDER as CHECKPOINTS
from voco_jax.training.metrics import last_step

CONFIG = "config.json"


def local_path(field: str, path: str | PathLike[str]) -> Path:
    """A path of the file system; "gs://..." would be one, too: of a folder named "gs:".

    Args:
        field: for the error.
        path: as the user gave it.

    Raises:
        InputError: it is a URL.
    """
    if re.match(r"[a-z][a-z0-9+.-]+:/", str(path)):
        raise InputError(
            f"{field}: found {str(path)!r}, expected a folder of a file system that all machines "
            "see, as NFS or Lustre; only caches may be in gs:// or s3://"
        )
    return Path(path)


def claim_workdir(workdir: Path, config: Config) -> Path:
    """Makes the workdir this experiment's own, or checks that it is.

    Args:
        workdir: made if missing.
        config: compared with the one that the workdir was started with.

    Returns:
        The resolved path.

    Raises:
        InputError: the workdir holds another experiment, has lost its checkpoints, is a file or
            cannot be written.
    """
    path = workdir / CONFIG
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        # Before the first checkpoint there is nothing to resume: settings may still be mended.
        if any(folder.name.isdigit() for folder in (workdir / CHECKPOINTS).glob("*")):
            _check_same_experiment(path, config)
        else:
            _check_nothing_lost(workdir, config)
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


def _check_nothing_lost(workdir: Path, config: Config) -> None:
    """A run that came so far that a checkpoint was whole must not start from scratch.

    The first is whole when the second starts to be saved, if not before.
    """
    reached = last_step(workdir)
    try:
        old = json.loads((workdir / CONFIG).read_text("utf-8"))
        every = int(old["checkpoint"]["every_steps"])
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        every = config.checkpoint.every_steps
    if reached > 2 * every:
        raise InputError(
            f"{workdir / CHECKPOINTS}: found no checkpoint, though a run in this workdir came to "
            f"step {reached} and saved every {every} steps; bring them back to resume, or choose "
            "another --workdir to start again"
        )
