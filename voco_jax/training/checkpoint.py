"""Orbax checkpoints: the only place that imports Orbax.

A step's folder holds `student`, `teacher` and `optimizer` (arrays) and `info` (JSON: the data
position and the experiment's config). Steps are written asynchronously and become visible whole.
"""

import logging
from collections.abc import Mapping
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


class Checkpoints:
    """The checkpoints of one workdir."""

    def __init__(self, workdir: Path, keep: int) -> None:
        logging.getLogger("absl").setLevel(logging.WARNING)
        self.folder = (workdir / FOLDER).resolve()
        self._manager = ocp.CheckpointManager(
            self.folder,
            item_names=_ITEMS,
            options=ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True),
        )

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
        except OSError as error:
            raise self._unwritable(error) from error

    def wait(self) -> None:
        """Returns when every started save is on disk whole.

        Raises:
            InputError: a save failed.
        """
        try:
            self._manager.wait_until_finished()
        except OSError as error:
            raise self._unwritable(error) from error

    def restore_info(self, step: int) -> dict[str, Any]:
        """The JSON of a step."""
        found = self._manager.restore(step, args=ocp.args.Composite(info=ocp.args.JsonRestore()))
        return dict(found["info"])

    def restore(self, step: int, abstract: State) -> State:
        """The state of a step.

        Args:
            step: one of `steps()`.
            abstract: shapes, dtypes and shardings to restore to.

        Raises:
            InputError: the arrays are damaged or of another model.
        """
        try:
            found = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    student=ocp.args.StandardRestore(abstract.student),
                    teacher=ocp.args.StandardRestore(abstract.teacher),
                    optimizer=ocp.args.StandardRestore(abstract.optimizer),
                ),
            )
        except (ValueError, KeyError, OSError) as error:
            earlier = [s for s in self.steps() if s != step]
            raise InputError(
                f"{self.folder / str(step)}: this checkpoint cannot be restored ({error}); "
                + (
                    f"move it away to resume from step {earlier[-1]}"
                    if earlier
                    else "move it away to start again"
                )
            ) from error
        return State(
            step=jax.device_put(jnp.asarray(step, jnp.int32), abstract.step.sharding),
            student=found["student"],
            teacher=found["teacher"],
            optimizer=found["optimizer"],
        )

    def close(self) -> None:
        """Waits for saves and lets go of the folder."""
        self._manager.close()

    def _unwritable(self, error: OSError) -> InputError:
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
    checkpoints = Checkpoints(Path(workdir), keep=1)
    try:
        steps = checkpoints.steps()
        if not steps:
            raise InputError(f"{folder}: found no whole checkpoint; train until one is saved")
        chosen = steps[-1] if step is None else step
        if chosen not in steps:
            raise InputError(
                f"{folder}: found no step {chosen}, expected one of {', '.join(map(str, steps))}"
            )
        with ocp.StandardCheckpointer() as reader:
            arrays = reader.restore(folder.resolve() / str(chosen) / network)
        info = checkpoints.restore_info(chosen)
    finally:
        checkpoints.close()
    return jax.tree.map(np.asarray, arrays), info
