"""The pre-training run, from a config to weights: one readable loop.

`step` is the number of completed updates, everywhere: step k used batch number k - 1.
"""

import contextlib
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
from jax.sharding import Mesh

from voco_jax.config import Config, parse, to_dict
from voco_jax.data.pipeline import batches, fingerprint
from voco_jax.errors import InputError
from voco_jax.evaluation.position import collapse_warning
from voco_jax.interop.export import Card, check_output, export
from voco_jax.interop.load import load_into
from voco_jax.training import mesh as meshes
from voco_jax.training.checkpoint import Checkpoints, set_damaged_aside
from voco_jax.training.distributed import (
    compile_together,
    everywhere,
    gather,
    is_first,
    on_first,
    should_stop,
    watch_preemption,
)
from voco_jax.training.metrics import Log, MetricsWriter, Progress, StepTimes, duration, still
from voco_jax.training.optimizer import schedule
from voco_jax.training.program import Program, make_program
from voco_jax.training.sources import (
    check_data,
    describe_volumes,
    fill_caches,
    open_caches,
    read_volumes,
    write_volumes,
)
from voco_jax.training.validate import Validator, save_picture
from voco_jax.training.workdir import claim_workdir, local_path
from voco_jax.voco.step import PROJECTOR, State


class DivergedError(RuntimeError):
    """The loss or its gradient is no longer a number; the message names step and checkpoint."""


class PreemptedError(RuntimeError):
    """A preemption signal came; everything is saved and the same command goes on."""


def run(config_dict: ml_collections.ConfigDict | Mapping[str, Any], workdir: str | Path) -> None:
    """Trains, or goes on training, until `total_steps`; then exports the encoder.

    Of a run of several processes each one calls this, with the same arguments.

    Args:
        config_dict: as a config file returns it.
        workdir: everything is written there; the same call again resumes.

    Raises:
        InputError: anything the user has to mend.
        DivergedError: NaN or infinite loss.
        PreemptedError: SIGTERM reached a process; saved everywhere.
    """
    start_time = time.monotonic()
    folder = local_path("--workdir", workdir)
    config = _fill_in(parse(config_dict), folder)
    mesh = meshes.make_mesh(config.mesh.fsdp)
    program = make_program(config, mesh)
    if config.export_to:
        check_output(local_path("export_to", config.export_to))
    folder = Path(on_first(lambda: str(claim_workdir(folder, config))))
    say = Log(folder, jax.process_index())
    try:
        say(f"devices: {meshes.describe(mesh)}; workdir: {folder}")
        _train(config, folder, mesh, program, say)
    except Exception as error:
        expected = isinstance(error, InputError | DivergedError | PreemptedError)
        with contextlib.suppress(InputError):  # of a full disk
            say.keep(f"ended: {error}" if expected else traceback.format_exc())
        raise
    say(f"done in {duration(time.monotonic() - start_time)}; everything is in {folder}")


def _train(
    config: Config, workdir: Path, mesh: Mesh, program: Program, say: Callable[[str], None]
) -> None:
    """`run`, in a workdir that is this experiment's."""
    # ---- data
    message = on_first(lambda: set_damaged_aside(workdir))
    if message:
        say(message)
    checkpoints = Checkpoints(workdir, config.checkpoint)
    latest = checkpoints.latest_step()
    seen = gather(np.asarray([-1 if latest is None else latest]))[:, 0]
    if (seen != seen[0]).any():
        raise InputError(
            f"{workdir}: the processes find different checkpoints in it ({seen.tolist()}, -1: "
            "none); --workdir has to be one folder that all machines share"
        )
    summary = on_first(lambda: fill_caches(config, workdir))
    if summary:
        say(summary)
    caches = everywhere(lambda: open_caches(config))
    if latest is None:
        on_first(lambda: write_volumes(caches, config, workdir))
    training, held_out = everywhere(lambda: read_volumes(caches, config, workdir))
    data_fingerprint = fingerprint(training)
    for line in describe_volumes(training, held_out):
        say(line)

    # ---- state: restored, or new
    if latest is None:
        state = program.init()
        if config.init_from:
            state = initialise_from(config, state, mesh, say)
        say("starting at step 0")
    else:
        check_data(checkpoints.restore_info(latest), data_fingerprint, workdir)
        state = checkpoints.restore(latest, program.state)
        say(f"resuming at step {latest} of {config.total_steps}")
    first_step = int(state.step)
    info: dict[str, Any] = {
        "config": to_dict(config),
        "seed": config.seed,
        "batch_size": config.batch_size,
        "data_fingerprint": data_fingerprint,
    }
    validator = Validator(config, held_out, program.predict, mesh) if held_out else None

    # ---- the loop
    writer = MetricsWriter(workdir, first_step) if is_first() else None
    learning_rate = schedule(config.optimizer, config.total_steps)
    progress = Progress(first_step, config.total_steps)
    times = StepTimes()
    pending = _Pending(checkpoints)
    paused = 0.0  # seconds of validation and of saving since the last lap
    best = checkpoints.best_accuracy()
    running: Any = None  # the loss of the step before, perhaps still to come
    try:
        if first_step < config.total_steps:
            say("compiling the step (minutes for a large model; the next time it is kept) ...")
            with still(say, "compiling"):
                train_step = compile_together(program.step, program.state, program.batch)
            watch_preemption()
            stream = meshes.ahead_on_devices(
                batches(
                    training,
                    config.crops,
                    seed=config.seed,
                    batch_size=config.batch_size,
                    rows=meshes.local_rows(config.batch_size, mesh),
                    start_step=first_step,
                    workers=config.data.workers,
                    prefetch=config.data.prefetch,
                ),
                config.batch_size,
                mesh,
            )
        for step in range(first_step + 1, config.total_steps + 1):
            _profile(config, first_step, step, workdir, running)
            asked = time.monotonic()
            batch = next(stream)
            if running is None or running.is_ready():
                times.wait(time.monotonic() - asked)
            with jax.transfer_guard("disallow"):  # nothing moves unseen: only input and fetch
                state, metrics = train_step(state, batch)
            pending.add(step, metrics)
            if running is not None:  # at most one step is queued, so that times mean something
                running.block_until_ready()
                times.step()
            running = metrics["loss"]

            last = step == config.total_steps
            if step == first_step + 1 or step % config.log_every_steps == 0 or last:
                values = pending.fetch()
                times.step()
                running = None
                rate, left = progress.lap(step, paused)
                paused = 0.0
                values["learning_rate"] = float(learning_rate(step - 1))
                hosts = gather(np.asarray(times.report()))
                times.reset()
                if step == first_step + 1:  # its time is the compiler's
                    speed = f"compiled in {1 / rate:.0f} s"
                else:
                    values["volumes_per_second"] = rate * config.batch_size
                    values["step_seconds_median"] = float(np.median(hosts[:, 0]))
                    values["step_seconds_longest"] = float(hosts[:, 1].max())
                    values["input_wait_fraction"] = float(hosts[:, 2].max())
                    speed = f"{values['volumes_per_second']:.2f} volumes/s  ETA {left}"
                if writer:
                    writer.write(step, values)
                terms = [n for n in ("pos", "neg", "reg", "inter") if n in values]
                say(
                    f"step {step}/{config.total_steps}  loss {values['loss']:.4f} "
                    f"({' '.join(f'{n} {values[n]:.4f}' for n in terms)})  "
                    f"lr {values['learning_rate']:.2e}  {speed}"
                )
                if step > first_step + 1 and jax.process_count() > 1:
                    say(heartbeat(hosts))

            every, keep_every = config.validation.every_steps, config.checkpoint.keep_every_steps
            validating = bool(validator and every and (step % every == 0 or last))
            saving = (
                last
                or step % config.checkpoint.every_steps == 0
                or (keep_every > 0 and step % keep_every == 0)
            )
            if running is not None and (validating or saving):
                pending.fetch()  # never save what a NaN has reached
                times.step()
                running = None
            pause_start = time.monotonic()
            accuracy: float | None = None
            if validator and validating:
                accuracy = _validate(validator, state, step, writer, workdir, say)
            is_best = bool(
                config.checkpoint.keep_best
                and accuracy is not None
                and (best is None or accuracy > best)
            )
            preempted = should_stop(step - first_step)
            # After validation: what is saved lacks nothing when the run is resumed.
            if saving or is_best or preempted:
                pending.fetch()
                checkpoints.save(state, info, accuracy)
                best = accuracy if is_best else best
            if preempted and not last:
                checkpoints.wait()
                gather(np.zeros(1))  # on all: a launcher may end the others when the first leaves
                raise PreemptedError(
                    f"preempted (SIGTERM); saved step {step}: the same command resumes there"
                )
            if time.monotonic() - pause_start > 0.01 or step == first_step + 1:
                times.reset()
            paused += time.monotonic() - pause_start
        checkpoints.wait()
        if first_step == config.total_steps:
            say(f"nothing left to train: {workdir} is at step {first_step}")
    except KeyboardInterrupt:
        checkpoints.wait()
        saved = checkpoints.latest_step()
        say(f"\ninterrupted; saved up to step {saved}: the same command resumes there")
        raise
    finally:
        if writer:
            writer.close()
        checkpoints.close()

    # ---- weights
    if config.export_to:
        network = config.teacher.exported
        params = meshes.fetch(getattr(state, network), mesh)
        card = Card(
            config=info["config"],
            step=int(state.step),
            network=network,
            data_fingerprint=data_fingerprint,
        )
        say(on_first(lambda: export(params, config.export_to, card).text()))


def heartbeat(hosts: np.ndarray) -> str:
    """One line about all processes.

    Args:
        hosts: (processes, 3) of `StepTimes.report`.
    """
    slowest, waiting = int(hosts[:, 1].argmax()), int(hosts[:, 2].argmax())
    return (
        f"heartbeat: {len(hosts)} processes, median step {np.median(hosts[:, 0]):.3f} s; slowest: "
        f"process {slowest} with {hosts[slowest, 1]:.3f} s; waiting for input: process {waiting} "
        f"{hosts[waiting, 2]:.0%} of the time"
    )


def initialise_from(config: Config, state: State, mesh: Mesh, say: Callable[[str], None]) -> State:
    """Replaces both networks' weights by those of `config.init_from`, and says what matched.

    A teacher that is only a projector takes that of the file, if it has one.

    Raises:
        InputError: the file cannot be read or does not fit.
    """

    def load(params: Any) -> tuple[Any, Any]:
        values = meshes.fetch(params, mesh)
        found, report = everywhere(
            lambda: load_into(
                values,
                config.init_from,
                config.init.allow_missing,
                config.init.allow_unexpected,
                window_size=config.model.window_size,
                patch_merging=config.model.patch_merging,
            )
        )
        return jax.device_put(found, jax.tree.map(lambda leaf: leaf.sharding, params)), report

    student, report = load(state.student)
    teacher = state.teacher
    if config.teacher.scope == "network":
        teacher, _ = load(teacher)
    elif any(name.startswith(f"{PROJECTOR}.") for name in report.matched):
        teacher = {name: student[name] for name in teacher}
    say(report.text())
    return state.replace(student=student, teacher=teacher)  # type: ignore[attr-defined]


def _fill_in(config: Config, workdir: Path) -> Config:
    """Replaces "{workdir}" in paths."""
    values = to_dict(config)
    caches = [(source, "cache") for source in values["data"]["sources"].values()]
    for section, name in ((values, "export_to"), *caches):
        section[name] = section[name].replace("{workdir}", str(workdir))
    return parse(values)


def _profile(
    config: Config, first_step: int, step: int, workdir: Path, running: jax.Array | None
) -> None:
    """Starts and stops the trace at the borders of its window, or of what is left of it."""
    start, steps = config.profile.start, config.profile.steps
    first, end = max(start, first_step + 1), min(start + steps, config.total_steps)
    if start and first < end and step in (first, end):
        if running is not None:
            running.block_until_ready()
        if step == first:
            jax.profiler.start_trace(str(workdir / "profile"))
        else:
            jax.profiler.stop_trace()


class _Pending:
    """Metrics that are still on the device: fetched seldom, but every step's is checked."""

    def __init__(self, checkpoints: Checkpoints) -> None:
        self._checkpoints = checkpoints
        self._steps: list[tuple[int, dict[str, jax.Array]]] = []
        self._last: dict[str, float] = {}

    def add(self, step: int, metrics: dict[str, jax.Array]) -> None:
        self._steps.append((step, metrics))

    def fetch(self) -> dict[str, float]:
        """The newest step's metrics.

        Raises:
            DivergedError: NaN or infinity in any step since the last call.
        """
        for step, metrics in jax.device_get(self._steps):
            self._last = {name: float(value) for name, value in metrics.items()}
            broken = [name for name, value in self._last.items() if not np.isfinite(value)]
            if broken:
                self._checkpoints.wait()
                saved = self._checkpoints.latest_step()
                good = f"{self._checkpoints.folder / str(saved)}" if saved is not None else "none"
                raise DivergedError(
                    f"step {step}: {', '.join(broken)} is not finite; training stopped. "
                    f"Last good checkpoint: {good}. Try a lower optimizer.learning_rate or "
                    "model.dtype=float32, in a new workdir"
                )
        self._steps.clear()
        return dict(self._last)


def _validate(
    validator: Validator,
    state: State,
    step: int,
    writer: MetricsWriter | None,
    workdir: Path,
    say: Callable[[str], None],
) -> float:
    """Validates, reports, and returns the position accuracy."""
    found = validator(state, step)
    metrics = found.metrics
    picture = workdir / "pictures" / f"positions_{step:07d}.png"
    if writer:
        writer.write(
            step,
            {
                "validation/position_accuracy": metrics.accuracy,
                "validation/chance": metrics.chance,
                "validation/overlap_error": metrics.overlap_error,
                "validation/similarity_spread": metrics.similarity_spread,
                "validation/embedding_spread": metrics.embedding_spread,
            },
        )
        writer.picture(step, "positions", found.image)
        save_picture(found.image, picture)
    say(
        f"validation at step {step}: position accuracy {metrics.accuracy:.1%} "
        f"({metrics.accuracy / metrics.chance:.1f} times chance), mean absolute error of overlaps "
        f"{metrics.overlap_error:.4f}, picture {picture}"
    )
    warning = collapse_warning(metrics)
    if warning:
        say(warning)
    return metrics.accuracy
