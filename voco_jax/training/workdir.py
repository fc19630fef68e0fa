"""The workdir: whose it is."""

import contextlib
import json
import os
import platform
import sys
from importlib import metadata
from pathlib import Path

import voco_jax
from voco_jax.config.common import Experiment
from voco_jax.config.load import differences, may_change, to_dict
from voco_jax.errors import InputError, InUseError, kind_of
from voco_jax.files import parse_object, write_atomically
from voco_jax.locks import locked, this_process
from voco_jax.training.checkpoint import FOLDER as CHECKPOINTS
from voco_jax.training.checkpoint import OTHER_VERSION, saved_steps
from voco_jax.training.metrics import last_step

CONFIG, LOCK, ENVIRONMENT = "config.json", "run.lock", "environment.json"
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def lock_workdir(workdir: Path, stack: contextlib.ExitStack) -> None:
    """Keeps other runs out of a workdir.

    Args:
        workdir: made if missing.
        stack: lets others in.

    Raises:
        InUseError: another run has it.
        InputError: it is a file or cannot be written.
    """

    def leave(new: str) -> None:
        print(f"error: {workdir}: taken over by another run ({new})", file=sys.stderr, flush=True)
        os._exit(InUseError.status)  # nothing may be written any more

    try:
        workdir.mkdir(parents=True, exist_ok=True)
        stack.enter_context(locked(workdir / LOCK, this_process(), lost=leave))
    except InUseError as owner:
        raise InUseError(
            f"{workdir}: another run is at work in it ({owner}); wait for it, or stop it to go on "
            "from what it has saved, or choose another --workdir"
        ) from owner
    except OSError as error:
        raise _unusable(workdir, error) from error


def _unusable(workdir: Path, error: OSError) -> InputError:
    return kind_of(error)(f"{workdir}: cannot be used as --workdir ({error}); choose another")


def claim_workdir(workdir: Path, experiment: Experiment) -> Path:
    """Makes the workdir this experiment's own, or checks that it is.

    Args:
        workdir: locked by this run.
        experiment: compared with the one that the workdir was started with.

    Returns:
        The resolved path.

    Raises:
        InputError: the workdir holds another experiment, has lost its checkpoints, is a file or
            cannot be written.
    """
    path = workdir / CONFIG
    try:
        # Before the first checkpoint there is nothing to resume: settings may still be mended.
        if saved_steps(workdir):
            _check_same_experiment(path, experiment)
        else:
            _check_nothing_lost(workdir, experiment)
        write_atomically(path, json.dumps(to_dict(experiment), indent=2) + "\n")
    except OSError as error:
        raise _unusable(workdir, error) from error
    return workdir.resolve()


def write_environment(workdir: Path, devices: str) -> None:
    """Writes WORKDIR/environment.json: where this run, as it was last started, runs.

    Args:
        workdir: of this run.
        devices: in words.

    Raises:
        InputError: it cannot be written.
    """
    versions = {"python": platform.python_version(), "voco_jax": voco_jax.__version__}
    for name in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    found = {
        "devices": devices,
        "host": platform.node(),
        "system": platform.platform(),
        "versions": versions,
    }
    try:
        write_atomically(workdir / ENVIRONMENT, json.dumps(found, indent=2) + "\n")
    except OSError as error:
        raise _unusable(workdir, error) from error


def _check_same_experiment(path: Path, experiment: Experiment) -> None:
    try:
        old = parse_object(path.read_bytes())
    except (FileNotFoundError, ValueError) as error:
        raise InputError(
            f"{path}: cannot be read ({error}), so it is not known whose checkpoints are beside "
            "it; choose another --workdir"
        ) from error
    if "task" not in old:
        raise InputError(f"{path.parent}: {OTHER_VERSION}")
    changed = [
        line
        for line in differences(old, to_dict(experiment))
        if not may_change(line.split(": ")[0], experiment.runtime_fields)
    ]
    if changed:
        raise InputError(
            f"{path.parent}: holds another experiment; {'; '.join(changed)}. "
            "Choose another --workdir, or set these back to resume"
        )


def _check_nothing_lost(workdir: Path, experiment: Experiment) -> None:
    """A run that came so far that a checkpoint was complete must not start from scratch.

    The first is complete when the second starts to be saved, if not before.
    """
    reached = last_step(workdir)
    try:
        old = parse_object((workdir / CONFIG).read_bytes())
        every = int(old.get("run", old)["checkpoint"]["every_steps"])
    except (FileNotFoundError, ValueError, TypeError, KeyError, OverflowError):
        every = experiment.run.checkpoint.every_steps
    if reached > 2 * every:
        raise InputError(
            f"{workdir / CHECKPOINTS}: found no checkpoint, though a run in this workdir came to "
            f"step {reached} and saved every {every} steps; bring them back to resume, or choose "
            "another --workdir to start again"
        )
