"""Where numbers go: the console, JSON lines, TensorBoard (without TensorFlow)."""

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
from tensorboardX import SummaryWriter

JSON_LINES = "metrics.jsonl"


class MetricsWriter:
    """Writes each measurement to WORKDIR/metrics.jsonl and WORKDIR/tensorboard.

    A run that resumes at `start_step` first forgets what lies behind that step: those steps are
    done again, and no step stands twice.
    """

    def __init__(self, workdir: Path, start_step: int) -> None:
        self._path = workdir / JSON_LINES
        _keep_until(self._path, start_step)
        self._file = self._path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=start_step + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One line of scalars for a step."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def picture(self, step: int, name: str, image: np.ndarray) -> None:
        """An image (rows, columns, 3) uint8 for TensorBoard."""
        self._board.add_image(name, image, step, dataformats="HWC")

    def close(self) -> None:
        """Flushes everything."""
        self._file.close()
        self._board.close()


def _keep_until(path: Path, step: int) -> None:
    if not path.exists():
        return
    kept = []
    for line in path.read_text("utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError):  # the line that a kill cut off
            continue
    aside = path.with_name(path.name + ".tmp")
    aside.write_text("".join(kept), "utf-8")
    os.replace(aside, path)


class Log:
    """Words for people: on the first process's console, and in each process's own file."""

    def __init__(self, workdir: Path, process: int) -> None:
        self._process = process
        folder = workdir / "logs"
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / f"process_{process}.log"

    def __call__(self, text: str) -> None:
        """Writes one line or several."""
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        with self._path.open("a", encoding="utf-8") as file:
            for line in text.splitlines():
                file.write(f"{now} process {self._process}: {line}\n")
        if self._process == 0:
            print(text, flush=True)


class StepTimes:
    """Seconds of each step since the last report, and how much of them was waiting for input."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.reset()

    def reset(self) -> None:
        """Forgets everything and starts anew, as after a pause."""
        self._last = self._clock()
        self._seconds: list[float] = []
        self._waited = 0.0

    def wait(self, seconds: float) -> None:
        """The device may have had nothing to do for so long, because no batch was ready."""
        self._waited += seconds

    def step(self) -> None:
        """A step has ended."""
        now = self._clock()
        self._seconds.append(now - self._last)
        self._last = now

    def report(self) -> tuple[float, float, float]:
        """(median seconds of a step, the longest, fraction spent waiting: an upper bound)."""
        seconds = np.asarray(self._seconds or [0.0])
        fraction = self._waited / max(float(seconds.sum()), 1e-9)
        return float(np.median(seconds)), float(seconds.max()), min(fraction, 1.0)


class Progress:
    """Rate and time left, from the steps of this process."""

    def __init__(
        self, start_step: int, total_steps: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._total, self._clock = total_steps, clock
        self._last = (start_step, clock())

    def lap(self, step: int, paused: float = 0.0) -> tuple[float, str]:
        """(steps per second since the last lap without `paused` seconds, time left as h:mm:ss)."""
        last_step, last_time = self._last
        now = self._clock()
        self._last = (step, now)
        rate = (step - last_step) / max(now - last_time - paused, 1e-9)
        return rate, duration((self._total - step) / rate if rate else 0.0)


@contextlib.contextmanager
def still(say: Callable[[str], None], what: str, every: float = 15.0) -> Iterator[None]:
    """Says now and then that something long, which cannot tell how far it is, goes on.

    Args:
        say: takes a line.
        what: goes on.
        every: seconds.
    """
    start, done = time.monotonic(), threading.Event()

    def tell() -> None:
        while not done.wait(every):
            say(f"still {what}: {duration(time.monotonic() - start)} so far")

    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    try:
        yield
    finally:
        done.set()
        teller.join()


def duration(seconds: float) -> str:
    """h:mm:ss."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
