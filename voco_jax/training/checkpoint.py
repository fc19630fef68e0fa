"""Orbax checkpoints.

A step's folder holds an item for each field of the task's state (of VoCo's `student`, `teacher`,
`optimizer`), `info` (JSON: the step, the experiment's config, the data's fingerprint, which fields
are networks to export) and `digests.json` (of every other file). Steps are written asynchronously
and become visible when they are complete.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as preservation

from voco_jax.config.common import Checkpoint as Keep
from voco_jax.errors import InputError, kind_of
from voco_jax.files import parse_object
from voco_jax.training.task import S

FOLDER, DAMAGED = "checkpoints", "damaged_checkpoints"
DIGESTS = "digests.json"
OTHER_VERSION = (
    "written by voco_jax 0.1, whose random draws this version does not repeat: go on with that "
    "version, or begin a new --workdir with its exported weights as --config.init_from"
)
_COMMITTED = "_CHECKPOINT_METADATA"  # Orbax writes the time of the commit into it, last of all
# TensorStore reports a full disk as a ValueError. Not JAX's errors: another process has died.
_WRITE_ERRORS = (OSError, ValueError)
# Seconds that processes wait for each other in a save, however large or slow its disk: one that is
# dead is known by its heartbeat.
_SAVE_TIMEOUT = 7 * 24 * 3600


class Checkpoints:
    """The checkpoints of one workdir.

    Attributes:
        folder: where they are.
    """

    def __init__(self, workdir: Path, keep: Keep | None = None, state: Any = None) -> None:
        """Opens a workdir's checkpoints.

        Args:
            workdir: of the run.
            keep: which to keep; None: only to read, beside a run that saves.
            state: abstract, whose fields are saved and restored; None: nothing of it will be.
        """
        logging.getLogger("absl").setLevel(logging.ERROR)
        self.folder = (workdir / FOLDER).resolve()
        self._saving = 0
        if keep is None:
            options = ocp.CheckpointManagerOptions(read_only=True)
        else:
            policies: list[Any] = [preservation.LatestN(keep.keep)]
            if keep.keep_every_steps:
                policies.append(preservation.EveryNSteps(keep.keep_every_steps))
            if keep.keep_best:
                policies.append(
                    preservation.BestN(
                        get_metric_fn=_score,
                        n=keep.keep_best,
                        keep_checkpoints_without_metrics=False,
                    )
                )
            options = ocp.CheckpointManagerOptions(
                cleanup_tmp_directories=True,  # what a killed run left half-written
                preservation_policy=preservation.AnyPreservationPolicy(policies),
                best_fn=_score,
                async_options=ocp.AsyncOptions(
                    timeout_secs=_SAVE_TIMEOUT,
                    post_finalization_callback=self._write_digests,
                    create_directories_asynchronously=False,  # that has a limit of its own
                ),
            )
        items = ("info",) if state is None else ("info", *_saved_fields(state))
        self._manager = ocp.CheckpointManager(self.folder, item_names=items, options=options)
        # Signals are the loop's: Orbax would ask JAX, which does not take them here.
        self._manager.reached_preemption = lambda step: False

    def latest_step(self) -> int | None:
        """The last step that was saved, complete once `wait` has returned; None: nothing was."""
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        """All steps that are there, ascending."""
        return sorted(self._manager.all_steps())

    def best_score(self) -> float | None:
        """The best score among the checkpoints; None: none has one."""
        best = self._manager.best_step()
        metrics = None if best is None else self._manager.metrics(best)
        return None if metrics is None else _score(metrics)

    def save(self, state: S, info: Mapping[str, Any], score: float | None = None) -> None:
        """Starts to save the state under its step; returns once the arrays may change.

        Args:
            state: on the devices.
            info: for JSON.
            score: of the validation at this very step, if there was one.

        Raises:
            InputError: the folder cannot be written.
        """
        arguments = ocp.args.Composite(
            **{name: ocp.args.StandardSave(tree) for name, tree in _saved_fields(state).items()},
            info=ocp.args.JsonSave({**info, "step": int(state.step)}),
        )
        try:
            self._manager.wait_until_finished()  # of the step before: its digests need its number
            self._saving = int(state.step)
            metrics = None if score is None else {"score": score}
            self._manager.save(self._saving, args=arguments, metrics=metrics)
        except _WRITE_ERRORS as error:
            raise self._unwritable(error) from error

    def wait(self) -> None:
        """Returns when every started save is completely on disk.

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
            InputError: it is damaged, or of a version of this package that cannot be continued.
        """
        arguments = ocp.args.Composite(info=ocp.args.JsonRestore())
        with self._restore_errors(step):
            info = dict(self._manager.restore(step, args=arguments)["info"])
            if "task" not in info["config"]:
                raise InputError(f"{self.folder / str(step)}: {OTHER_VERSION}")
            names = ("config", "step", "data_fingerprint", "networks")
            return {name: info[name] for name in names}

    def restore_network(self, step: int, network: str) -> dict[str, Any]:
        """One network's parameters as nested dicts of NumPy arrays.

        Raises:
            InputError: they are damaged.
        """
        path = self.folder / str(step) / network
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        with self._restore_errors(step), ocp.StandardCheckpointer() as reader:
            saved = reader.metadata(path).item_metadata.tree
            wanted = jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), saved
            )
            arrays = reader.restore(path, wanted)  # on whatever devices it was saved
        return jax.tree.map(np.asarray, arrays)

    def restore(self, step: int, abstract: S) -> S:
        """The state of a step.

        Args:
            step: one of `steps()`.
            abstract: shapes, dtypes and shardings to restore to.

        Raises:
            InputError: the arrays are damaged or of another model.
        """
        arguments = ocp.args.Composite(
            **{
                name: ocp.args.StandardRestore(tree)
                for name, tree in _saved_fields(abstract).items()
            }
        )
        with self._restore_errors(step):
            found = self._manager.restore(step, args=arguments)
        number = jax.device_put(jnp.asarray(step, jnp.int32), abstract.step.sharding)
        return dataclasses.replace(abstract, step=number, **found)  # type: ignore[type-var]

    def close(self) -> None:
        """Waits for saves and lets go of the folder.

        Raises:
            InputError: a save failed.
        """
        try:
            self._manager.close()
        except _WRITE_ERRORS as error:
            raise self._unwritable(error) from error

    def _write_digests(self) -> None:
        """Called on process 0 when a step is written completely, before it becomes visible."""
        for folder in self.folder.glob(f"{self._saving}.orbax-checkpoint-tmp*"):
            text = json.dumps(_digests(folder), indent=1)
            (folder / DIGESTS).write_text(text, "utf-8")

    @contextlib.contextmanager
    def _restore_errors(self, step: int) -> Iterator[None]:
        try:
            yield
        except InputError:
            raise
        except (ValueError, KeyError, TypeError, OSError) as error:
            earlier = [s for s in self.steps() if s < step]
            raise kind_of(error)(
                f"{self.folder / str(step)}: this checkpoint cannot be restored "
                f"({type(error).__name__}: {error}); move it away to "
                + (f"resume from step {earlier[-1]}" if earlier else "start again")
            ) from error

    def _unwritable(self, error: Exception) -> InputError:
        self._manager.reload()  # it has forgotten those that were to make room
        last = self.latest_step()
        return kind_of(error)(
            f"{self.folder}: cannot save a checkpoint ({error}); free space or mend permissions, "
            "then run the same command: it resumes from "
            + (f"step {last}" if last is not None else "the start")
        )


def saved_steps(workdir: Path) -> list[int]:
    """The steps of a workdir's checkpoints, ascending, without opening them."""
    names = [folder.name for folder in (workdir / FOLDER).glob("*")]
    return sorted(int(name) for name in names if re.fullmatch("0|[1-9][0-9]*", name))


def _saved_fields(state: Any) -> dict[str, Any]:
    """What is saved of a state, by item; Orbax takes no empty tree."""
    fields = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    return {name: tree for name, tree in fields.items() if name != "step" and jax.tree.leaves(tree)}


def _score(metrics: Any) -> float:
    return float(metrics["score"])


def _digests(folder: Path) -> dict[str, str]:
    """Relative path -> BLAKE2b of each file."""

    def digest(path: Path) -> str:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "blake2b").hexdigest()

    later = (folder / DIGESTS, folder / _COMMITTED)
    files = sorted(f for f in folder.rglob("*") if f.is_file() and f not in later)
    with ThreadPoolExecutor() as pool:
        values = pool.map(digest, files)
        return {
            str(file.relative_to(folder)): value for file, value in zip(files, values, strict=True)
        }


def damage(folder: Path) -> str | None:
    """What is wrong with a step's folder, against its own digests; None: every bit is as saved."""
    if not (folder / DIGESTS).exists():
        return f"{DIGESTS} is missing: damaged, or saved before there were digests"
    name = _COMMITTED
    try:
        parse_object((folder / name).read_bytes())
        name = DIGESTS
        expected = parse_object((folder / name).read_bytes())
    except (OSError, ValueError) as error:
        return f"{name} cannot be read ({error!r})"
    try:
        found = _digests(folder)
    except OSError as error:
        return str(error)
    for name, value in expected.items():
        if name not in found:
            return f"{name} is missing"
        if found[name] != value:
            return f"{name} has changed since it was saved"
    return _other_step(folder)


def _other_step(folder: Path) -> str | None:
    """Which step a folder holds, if not that of its name."""
    name = "info/metadata"
    try:
        step = parse_object((folder / name).read_bytes()).get("step")
    except (OSError, ValueError) as error:
        return f"{name} cannot be read ({error!r})"
    return None if str(step) == folder.name else f"it holds step {step}: copied or renamed"


def set_damaged_aside(workdir: Path) -> str:
    """Makes the newest intact checkpoint the latest one: moves damaged newer ones away.

    And those older ones whose score cannot be read: Orbax reads all of them.
    To be called on one process, before any opens `Checkpoints`.

    Returns:
        A loud message about each; "": all is well.

    Raises:
        InputError: there are or were checkpoints, but none is intact.
    """
    folder = workdir / FOLDER
    steps = saved_steps(workdir)[::-1]
    damaged = []
    good = -1
    for step in steps:
        reason = damage(folder / str(step)) if good < 0 else _unreadable_score(folder / str(step))
        if reason is not None:
            damaged.append((step, reason))
        elif good < 0:
            good = step
    if steps and good < 0:
        listed = "; ".join(f"step {step}: {reason}" for step, reason in damaged)
        raise InputError(
            f"{folder}: every checkpoint is damaged ({listed}); bring one back from a backup "
            "to resume, or choose another --workdir to start again"
        )
    aside = workdir / DAMAGED
    if not steps and aside.is_dir() and any(aside.iterdir()):
        raise InputError(
            f"{folder}: holds no checkpoint, only {aside} does; bring one back from a backup to "
            "resume, or choose another --workdir to start again"
        )
    messages = []
    for bad, reason in damaged:
        away = aside / str(bad)
        away.parent.mkdir(exist_ok=True)
        if away.exists():
            away = away.with_name(f"{bad}_{time.time_ns()}")
        os.replace(folder / str(bad), away)
        messages.append(
            f"DAMAGED CHECKPOINT: step {bad} ({reason}); moved to {away}, "
            + (f"falling back to step {good}" if bad > good else f"step {good} is intact")
        )
    return "\n".join(messages)


def _unreadable_score(folder: Path) -> str | None:
    """Why a step's score cannot be read; None: it can, or there is none."""
    path = folder / "metrics" / "metrics"
    if not path.exists():
        return None
    try:
        _score(parse_object(path.read_bytes()))
    except (OSError, ValueError, TypeError, KeyError, OverflowError) as error:
        return f"metrics cannot be read ({error!r})"
    return None


def read_network(
    workdir: str | Path, network: str | None = None, step: int | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads one network of a training run, for export.

    Args:
        workdir: of the run.
        network: one of the run's `networks`, as "teacher"; None: the first of them.
        step: completed updates; None: the latest saved.

    Returns:
        (parameters as nested dicts of NumPy arrays, the checkpoint's info: config, step,
        data_fingerprint, networks, and which network it is).

    Raises:
        InputError: no checkpoint there, not of that step, or no such network.
    """
    folder = Path(workdir) / FOLDER
    if not folder.is_dir():
        raise InputError(
            f"{workdir}: found no folder {FOLDER!r} in it, expected the --workdir of a training run"
        )
    with contextlib.closing(Checkpoints(Path(workdir))) as checkpoints:
        steps = checkpoints.steps()
        if not steps:
            raise InputError(f"{folder}: found no complete checkpoint; train until one is saved")
        chosen = steps[-1] if step is None else step
        if chosen not in steps:
            raise InputError(
                f"{folder}: found no step {chosen}, expected one of {', '.join(map(str, steps))}"
            )
        reason = damage(checkpoints.folder / str(chosen))
        if reason is not None:
            others = ", ".join(str(other) for other in steps if other != chosen)
            raise InputError(
                f"{checkpoints.folder / str(chosen)}: this checkpoint is damaged ({reason}); "
                + (f"others: step {others}" if others else "there is no other")
            )
        info = checkpoints.restore_info(chosen)
        if not info["networks"]:
            raise InputError(f"{workdir}: this run's task has no network to export")
        network = network or info["networks"][0]
        if network not in info["networks"]:
            raise InputError(
                f"network: found {network!r}, expected one of {', '.join(info['networks'])}: no "
                "other part of this run's state holds an encoder"
            )
        return checkpoints.restore_network(chosen, network), {**info, "network": network}
