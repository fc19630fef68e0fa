"""Orbax checkpoints: the only place that imports Orbax.

A step's folder holds `student`, `teacher` and `optimizer` (arrays) and `info` (JSON: the data
position and the experiment's config). Steps are written asynchronously and become visible whole.
"""

import contextlib
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from voco_jax.errors import InputError
from voco_jax.voco.step import State

FOLDER = "checkpoints"
_NETWORKS = ("student", "teacher")
_ITEMS = (*_NETWORKS, "optimizer", "info")
_WRITE_ERRORS = (OSError, ValueError)  # TensorStore reports a full disk as a ValueError


class Checkpoints:
    """The checkpoints of one workdir.

    Attributes:
        folder: where they are.
    """

    def __init__(self, workdir: Path, keep: int | None) -> None:
        """Opens a workdir's checkpoints.

        Args:
            workdir: of the run.
            keep: how many of the latest to keep; None: only to read, beside a run that saves.
        """
        logging.getLogger("absl").setLevel(logging.WARNING)
        self.folder = (workdir / FOLDER).resolve()
        if keep is None:
            options = ocp.CheckpointManagerOptions(read_only=True)
        else:
            # What a killed run left half-written is removed.
            options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
        self._manager = ocp.CheckpointManager(self.folder, item_names=_ITEMS, options=options)

    def latest_step(self) -> int | None:
        """The last step that was saved whole; None: nothing was."""
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        """All steps that are there, ascending."""
        return sorted(self._manager.all_steps())

    def save(self, state: State, info: Mapping[str, Any]) -> None:
        """Starts to save the state under its step; returns once the arrays may change.

        Args:
            state: on the devices.
            info: for JSON.

        Raises:
            InputError: the folder cannot be written.
        """
        arguments = ocp.args.Composite(
            student=ocp.args.StandardSave(state.student),
            teacher=ocp.args.StandardSave(state.teacher),
            optimizer=ocp.args.StandardSave(state.optimizer),
            info=ocp.args.JsonSave({**info, "step": int(state.step)}),
        )
        try:
            self._manager.save(int(state.step), args=arguments)
        except _WRITE_ERRORS as error:
            raise self._unwritable(error) from error

    def wait(self) -> None:
        """Returns when every started save is on disk whole.

        Raises:
            InputError: a save failed.
        """
        try:
            self._manager.wait_until_finished()
        except _WRITE_ERRORS as error:
            raise self._unwritable(error) from error

    def restore_info(self, step: int) -> dict[str, Any]:
        """The JSON of a step.

        Raises:
            InputError: it is damaged.
        """
        arguments = ocp.args.Composite(info=ocp.args.JsonRestore())
        with self._damage_named(step):
            info = dict(self._manager.restore(step, args=arguments)["info"])
            return {name: info[name] for name in ("config", "step", "data_fingerprint")}

    def restore_network(self, step: int, network: str) -> dict[str, Any]:
        """One network's parameters as nested dicts of NumPy arrays.

        Raises:
            InputError: they are damaged.
        """
        with self._damage_named(step), ocp.StandardCheckpointer() as reader:
            arrays = reader.restore(self.folder / str(step) / network)
        return jax.tree.map(np.asarray, arrays)

    def restore(self, step: int, abstract: State) -> State:
        """The state of a step.

        Args:
            step: one of `steps()`.
            abstract: shapes, dtypes and shardings to restore to.

        Raises:
            InputError: the arrays are damaged or of another model.
        """
        arguments = ocp.args.Composite(
            student=ocp.args.StandardRestore(abstract.student),
            teacher=ocp.args.StandardRestore(abstract.teacher),
            optimizer=ocp.args.StandardRestore(abstract.optimizer),
        )
        with self._damage_named(step):
            found = self._manager.restore(step, args=arguments)
        return State(
            step=jax.device_put(jnp.asarray(step, jnp.int32), abstract.step.sharding),
            student=found["student"],
            teacher=found["teacher"],
            optimizer=found["optimizer"],
        )

    def close(self) -> None:
        """Waits for saves and lets go of the folder."""
        self._manager.close()

    @contextlib.contextmanager
    def _damage_named(self, step: int) -> Iterator[None]:
        try:
            yield
        except (ValueError, KeyError, TypeError, OSError) as error:
            earlier = [s for s in self.steps() if s < step]
            raise InputError(
                f"{self.folder / str(step)}: this checkpoint cannot be restored "
                f"({type(error).__name__}: {error}); move it away to "
                + (f"resume from step {earlier[-1]}" if earlier else "start again")
            ) from error

    def _unwritable(self, error: Exception) -> InputError:
        last = self.latest_step()
        return InputError(
            f"{self.folder}: cannot save a checkpoint ({error}); free space or mend permissions, "
            "then run the same command: it resumes from "
            + (f"step {last}" if last is not None else "the start")
        )


def read_network(
    workdir: str | Path, network: str, step: int | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads one network of a training run, for export.

    Args:
        workdir: of the run.
        network: "student" or "teacher".
        step: completed updates; None: the latest saved.

    Returns:
        (parameters as nested dicts of NumPy arrays, the checkpoint's info: config, step,
        data_fingerprint, ...).

    Raises:
        InputError: no checkpoint there, or not of that step.
    """
    if network not in _NETWORKS:
        raise InputError(f"network: found {network!r}, expected one of {', '.join(_NETWORKS)}")
    folder = Path(workdir) / FOLDER
    if not folder.is_dir():
        raise InputError(
            f"{workdir}: found no folder {FOLDER!r} in it, expected the --workdir of a training run"
        )
    checkpoints = Checkpoints(Path(workdir), keep=None)
    try:
        steps = checkpoints.steps()
        if not steps:
            raise InputError(f"{folder}: found no whole checkpoint; train until one is saved")
        chosen = steps[-1] if step is None else step
        if chosen not in steps:
            raise InputError(
                f"{folder}: found no step {chosen}, expected one of {', '.join(map(str, steps))}"
            )
        return checkpoints.restore_network(chosen, network), checkpoints.restore_info(chosen)
    finally:
        checkpoints.close()
