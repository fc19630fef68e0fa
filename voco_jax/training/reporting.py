"""What a run says while it trains: log lines, numbers, pictures, warnings."""

import contextlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from voco_jax.config.common import Run
from voco_jax.training.distributed import gather, is_process_0
from voco_jax.training.events import Events
from voco_jax.training.health import Finding, Window, diagnose, make_window, read_windows
from voco_jax.training.metrics import (
    MetricsWriter,
    Progress,
    metric_lines,
    save_arrays,
    save_picture,
    write_cases,
)
from voco_jax.training.steps import Steps
from voco_jax.training.task import LogLine, Task, Validation


class Reporter:
    """Where a run's numbers go: log lines, metrics.jsonl, TensorBoard, pictures; and warnings.

    Args:
        task: that is trained.
        run: the loop's settings.
        workdir: of the run.
        log: for what people should know.
        events: of this process.
        first_step: completed updates when it began.

    Raises:
        InputError: on any call, a file cannot be written.
    """

    def __init__(
        self,
        task: Task[Any],
        run: Run,
        workdir: Path,
        log: LogLine,
        events: Events,
        first_step: int,
    ) -> None:
        self._task, self._run, self._workdir, self._log = task, run, workdir, log
        self._events, self._first_step = events, first_step
        self._progress = Progress(first_step, run.total_steps)
        self._paused = 0.0  # seconds of validation and of saving since the last line
        self._writer = MetricsWriter(workdir, first_step) if is_process_0() else None
        self._windows: list[Window] = []
        self._sound: tuple[str, ...] = ()
        if self._writer:
            self._windows = read_windows(metric_lines(workdir))
            self._events.write("resumed" if first_step else "started")
            self._warn("start", task.findings)

    def close(self) -> None:
        """Lets go of the files."""
        if self._writer:
            self._writer.close()

    @contextlib.contextmanager
    def pause(self, step: int, steps: Steps[Any]) -> Iterator[None]:
        """Around what is no training: its time counts for no step."""
        start = time.monotonic()
        yield
        seconds = time.monotonic() - start
        if seconds > 0.01 or step == self._first_step + 1:
            steps.times.reset()
        self._paused += seconds

    def training(self, step: int, steps: Steps[Any]) -> None:
        """The newest step's metrics and the speed since the last time."""
        values = steps.fetch()
        rate, left = self._progress.lap(step, self._paused)
        self._paused = 0.0
        if self._task.learning_rate is not None:
            values["learning_rate"] = float(self._task.learning_rate(step - 1))
        hosts = gather(np.asarray(steps.times.report()))
        steps.times.reset()
        first = step == self._first_step + 1
        if first:  # its time is the compiler's
            speed = f"compiled in {1 / rate:.0f} s"
        else:
            values["volumes_per_second"] = rate * self._run.batch_size
            values["step_seconds_median"] = float(np.median(hosts[:, 0]))
            values["step_seconds_longest"] = float(hosts[:, 1].max())
            values["input_wait_fraction"] = float(hosts[:, 2].max())
            speed = f"{values['volumes_per_second']:.2f} volumes/s  ETA {left}"
        if self._writer:
            self._writer.write(step, values)
        parts = [f"step {step}/{self._run.total_steps}", f"loss {values['loss']:.4f}"]
        if terms := " ".join(f"{n} {values[n]:.4f}" for n in self._task.console if n in values):
            parts[-1] += f" ({terms})"
        if "learning_rate" in values:
            parts.append(f"lr {values['learning_rate']:.2e}")
        self._log("  ".join([*parts, speed]))
        if not first and len(hosts) > 1:
            self._log(heartbeat(hosts))
        fetched = steps.lap()
        if self._writer:
            self._windows.append(
                make_window(step, fetched, values, 0.0 if first else len(fetched) / rate)
            )
            self._warn(
                "training",
                diagnose(self._windows, self._events.open, self._sound, self._task.blind_loss),
            )

    def _warn(self, source: str, findings: Sequence[Finding]) -> None:
        """Keeps what is amiss, and tells what is new of it."""
        for line in self._events.found(source, findings):
            self._log(line)

    def validation(self, step: int, found: Validation) -> float:
        """What a validation found; returns its score."""
        text = found.text
        if self._writer:
            named = {f"validation/{name}": value for name, value in found.metrics.items()}
            self._writer.write(step, named)
            for name, image in found.pictures.items():
                path = self._workdir / "pictures" / f"{name}_{step:07d}.png"
                self._writer.picture(step, name, image)
                save_picture(image, path)
                text += f", picture {path}"
            for name, arrays in found.arrays.items():
                save_arrays(arrays, self._workdir / f"{name}.npz")
            if found.cases:
                write_cases(self._workdir, step, found.cases)
        self._log(f"validation at step {step}: {text}")
        if self._writer:
            self._sound = found.sound
            self._warn("validation", found.findings)
        return found.score


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
