"""A run, from an experiment to its end: one readable loop, for every task.

`step` is the number of completed updates, everywhere: step k used batch number k - 1.
"""

import contextlib
import time
import traceback
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from voco_jax.config.common import WORKDIR, Experiment, Profile, Run
from voco_jax.config.load import leaves, to_dict
from voco_jax.errors import InputError
from voco_jax.files import local_path
from voco_jax.training import mesh as meshes
from voco_jax.training import signals
from voco_jax.training.checkpoint import Checkpoints, saved_steps, set_damaged_aside
from voco_jax.training.compile import missing_options
from voco_jax.training.distributed import (
    barrier,
    compile_on_all,
    gather,
    is_process_0,
    run_on_all,
    run_on_process_0,
)
from voco_jax.training.events import Events
from voco_jax.training.health import not_finite
from voco_jax.training.jax_settings import check_jax_settings
from voco_jax.training.metrics import Log, duration
from voco_jax.training.reporting import Reporter
from voco_jax.training.steps import NotFiniteError, Steps
from voco_jax.training.task import LogLine, Method, Program, S, Task
from voco_jax.training.waiting import (
    Reader,
    StopRequestedError,
    Watch,
    batches_in_step,
    within_grace,
)
from voco_jax.training.workdir import claim_workdir, lock_workdir, write_environment


class DivergedError(RuntimeError):
    """The loss or its gradient is no longer a number; the message names step and checkpoint."""


class PreemptedError(RuntimeError):
    """A preemption signal came; everything is saved and the same command goes on."""


def run(experiment: Experiment, workdir: str | Path, method: Method[Any]) -> None:
    """Trains, or goes on training, until the experiment's end.

    Of a run of several processes each one calls this, with the same arguments.

    Args:
        experiment: the settings, "{workdir}" in them replaced.
        workdir: everything is written there; the same call again resumes.
        method: makes the task of the experiment.

    Raises:
        InputError: anything the user has to mend.
        DivergedError: NaN or infinite loss.
        PreemptedError: SIGTERM or SIGHUP reached a process; saved everywhere.
        InUseError: another run has this workdir.
    """
    start_time = time.monotonic()
    folder = local_path("--workdir", workdir)
    for name, value in leaves(to_dict(experiment)).items():
        if WORKDIR in str(value):
            raise InputError(f"{name}: found {value!r}, expected the folder's name for {WORKDIR}")
    note = check_jax_settings()
    mesh = meshes.make_mesh(experiment.mesh.fsdp)
    method.check(experiment)
    program = method.make_program(experiment, mesh)
    with contextlib.ExitStack() as stack:

        def claim() -> str:
            lock_workdir(folder, stack)
            claimed = claim_workdir(folder, experiment)
            write_environment(claimed, meshes.describe(mesh))
            return str(claimed)

        folder = Path(run_on_process_0(claim))
        log = Log(folder, jax.process_index())
        if note:
            log(note)
        _run(experiment, folder, method, program, log)
    log(f"done in {duration(time.monotonic() - start_time)}; everything is in {folder}")


def _run(
    experiment: Experiment, folder: Path, method: Method[Any], program: Program[Any], log: Log
) -> None:
    """In a workdir that is this run's own; why it ends is kept in the log and in the events."""
    events = run_on_all(lambda: Events(folder if is_process_0() else None))
    try:
        log(f"devices: {meshes.describe(program.mesh)}; workdir: {folder}")
        if message := run_on_process_0(lambda: set_damaged_aside(folder)):
            log(message)
        newest = _newest_step(folder)
        resumes, events.step = newest is not None, newest or 0
        task = method.make_task(experiment, program, workdir=folder, resumes=resumes, log=log)
        state = train(task, experiment.run, folder, log, events)
        if task.finish is not None:
            log(task.finish(state))
        events.write("finished")
    except (Exception, KeyboardInterrupt) as error:
        stopped = isinstance(error, PreemptedError | KeyboardInterrupt)
        expected = isinstance(error, InputError | DivergedError) or stopped
        reason = str(error) or ("interrupted" if stopped else type(error).__name__)
        with contextlib.suppress(InputError):  # of a full disk
            log.keep(f"ended: {reason}" if expected else traceback.format_exc())
            events.write("stopped" if stopped else "failed", reason=reason)
        raise


def _newest_step(workdir: Path) -> int | None:
    """The step of the newest checkpoint, on which all processes must agree."""
    latest = max(saved_steps(workdir), default=-1)
    seen = gather(np.asarray([latest]))[:, 0]
    if (seen != seen[0]).any():
        raise InputError(
            f"{workdir}: the processes find different checkpoints in it ({seen.tolist()}, -1: "
            "none); --workdir has to be one folder that all machines share"
        )
    return None if latest < 0 else latest


def train(task: Task[S], run: Run, workdir: Path, log: LogLine, events: Events) -> S:
    """Restores or starts, then trains until `run.total_steps`.

    Args:
        task: what to train.
        run: for how long, and what to do in between.
        workdir: of this experiment, without damaged checkpoints in it.
        log: for what people should know.
        events: of this process.

    Returns:
        The state at the end.

    Raises:
        InputError, DivergedError, PreemptedError: see `run`.
    """
    with contextlib.closing(Checkpoints(workdir, run.checkpoint, task.program.state)) as saved:
        state, first_step = _first_state(task, saved, run.total_steps, log)
        if first_step == run.total_steps:
            log(f"nothing left to train: {workdir} is at step {first_step}")
            return state
        try:
            return _train(task, run, workdir, log, events, saved, state, first_step)
        except NotFiniteError as error:
            events.found("training", [not_finite(str(error))])
            saved.wait()
            good = saved.latest_step()
            raise DivergedError(
                f"{error}; training stopped. Last good checkpoint: "
                f"{'none' if good is None else saved.folder / str(good)}. Try a lower learning "
                "rate or float32, in a new workdir"
            ) from error
        except KeyboardInterrupt:
            saved.wait()
            at = saved.latest_step()
            what = "no step was saved" if at is None else f"saved up to step {at}"
            log(f"\ninterrupted; {what}: the same command goes on from there")
            raise


def _first_state(
    task: Task[S], saved: Checkpoints, total_steps: int, log: LogLine
) -> tuple[S, int]:
    """The newest checkpoint's state, or a new one; and its number of completed updates."""
    latest = saved.latest_step()
    if latest is None:
        state = task.program.init()
        if task.warm_start is not None:
            state = task.warm_start(state)
        log("starting at step 0")
        return state, 0
    info = saved.restore_info(latest)
    before = info["config"].get("run", info["config"])["total_steps"]
    if total_steps < before:
        raise InputError(
            f"total_steps: found {total_steps}, expected at least {before}, with which "
            f"{saved.folder.parent} was begun: a run can be made longer, not shorter"
        )
    found = info["data_fingerprint"]
    if found != task.data_fingerprint:
        raise InputError(
            f"{saved.folder.parent}: found training data of fingerprint {task.data_fingerprint}, "
            f"expected those of the checkpoints, {found}; choose another --workdir"
        )
    state = saved.restore(latest, task.program.state)
    log(f"resuming at step {latest} of {total_steps}")
    if total_steps > before and task.learning_rate is not None:
        log(
            f"total_steps: {before} -> {total_steps}: the learning rate goes on along the schedule "
            f"of the new total, at {float(task.learning_rate(latest)):.2e}"
        )
    return state, latest


def _train(
    task: Task[S],
    run: Run,
    workdir: Path,
    log: LogLine,
    events: Events,
    saved: Checkpoints,
    state: S,
    first_step: int,
) -> S:
    program, best = task.program, saved.best_score()
    info = {
        "config": dict(task.experiment),
        "networks": list(task.networks),
        "data_fingerprint": task.data_fingerprint,
    }
    with (
        contextlib.closing(Reporter(task, run, workdir, log, events, first_step)) as report,
        contextlib.closing(Watch(log)) as watch,
    ):
        if lacking := missing_options(program.mesh):
            log(f"this XLA has no {', '.join(lacking)}: compiling without")
        log("compiling the step (minutes for a large model; the next time it is kept) ...")
        watch.at("compiling")
        compiled = compile_on_all(program.step, program.state, program.batch)
        signals.defer()
        reader = Reader()
        batches = batches_in_step(task.batches(first_step), reader, watch)
        on_devices = meshes.prefetch_to_device(batches, program.batch)
        steps = Steps(compiled, on_devices, state, first_step)
        score: float | None = None
        try:
            for step in range(first_step + 1, run.total_steps + 1):
                _profile(run, workdir, steps, first_step, step)
                steps.advance()
                watch.at(f"at step {step}")
                events.step = step
                last = step == run.total_steps
                if last or step == first_step + 1 or _due(step, run.log_every_steps):
                    report.training(step, steps)
                saving = (
                    last
                    or _due(step, run.checkpoint.every_steps)
                    or _due(step, run.checkpoint.keep_every_steps)
                )
                validating = run.validate_every_steps and (
                    last or _due(step, run.validate_every_steps)
                )
                if saving or validating:
                    steps.fetch()  # never validate or save what a NaN has reached
                score = None
                with report.pause(step, steps):
                    if task.validate is not None and validating:
                        watch.at(f"validating step {step}")
                        validate = partial(task.validate, steps.state, step)
                        score = report.validation(step, within_grace(validate, reader))
                        watch.at("waiting for the validation of the other processes")
                        barrier()  # for process 0 and its pictures; not in the next step
                    is_best = run.checkpoint.keep_best > 0 and _better(score, best)
                    # After validation: what is saved lacks nothing when the run is resumed.
                    if saving or is_best:
                        watch.at(f"saving step {step}")
                        steps.fetch()
                        saved.save(steps.state, info, score)
                        best = score if is_best else best
        except StopRequestedError as stop:
            watch.at(f"saving step {steps.number}")
            if steps.number not in (first_step, saved.latest_step()):
                steps.fetch()
                saved.save(steps.state, info, score)
            saved.wait()
            barrier()  # a launcher may end the others when the first leaves
            reached = f"saved step {steps.number}" if steps.number else "nothing to save yet"
            what = signals.describe(str(stop))
            raise PreemptedError(f"{what}; {reached}: the same command resumes there") from None
        watch.at(f"saving step {run.total_steps}")
        saved.wait()
    return steps.state


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _better(score: float | None, best: float | None) -> bool:
    return score is not None and (best is None or score > best)


def _profile(run: Run, workdir: Path, steps: Steps[Any], first_step: int, step: int) -> None:
    """Starts and stops the trace at the borders of its window, or of what is left of it."""
    profile: Profile = run.profile
    first = max(profile.start, first_step + 1)
    end = min(profile.start + profile.steps, run.total_steps)
    if profile.start and first < end and step in (first, end):
        steps.wait()
        if step == first:
            jax.profiler.start_trace(str(workdir / "profile"))
        else:
            jax.profiler.stop_trace()
