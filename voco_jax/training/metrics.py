"""Where numbers go: the console, JSON lines, TensorBoard (without TensorFlow)."""

import contextlib
import io
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from PIL import Image

from voco_jax.errors import kind_of
from voco_jax.files import parse_object, say, write_aside, write_atomically

# Where PyTorch is installed, tensorboardX imports it: seconds of every start, and not needed here.
_torch = sys.modules.setdefault("torch", None)  # type: ignore[arg-type]  # "not to be found"
from tensorboardX import summary  # noqa: E402
from tensorboardX.event_file_writer import EventsWriter  # noqa: E402
from tensorboardX.proto.event_pb2 import Event, SessionLog  # noqa: E402

if _torch is None:
    del sys.modules["torch"]

JSON_LINES, BOARD, CASES = "metrics.jsonl", "tensorboard", "cases.json"


@contextlib.contextmanager
def written(path: Path) -> Iterator[None]:
    """Around what writes to a path: a full disk is the user's to mend."""
    try:
        yield
    except OSError as error:
        raise kind_of(error)(
            f"{path}: cannot be written ({error}); free space or mend permissions, then run the "
            "same command: it resumes from the newest checkpoint"
        ) from error


class MetricsWriter:
    """Writes each measurement to WORKDIR/metrics.jsonl and WORKDIR/tensorboard.

    A run that resumes at `start_step` first forgets what lies behind that step: those steps are
    done again, and no step stands twice.

    All is written by the caller's own thread: tensorboardX's `SummaryWriter` has one, which dies
    of a full disk, and then waits for it for ever.

    Raises:
        InputError: on any call, a file cannot be written.
    """

    def __init__(self, workdir: Path, start_step: int) -> None:
        self._path, self._folder = workdir / JSON_LINES, workdir / BOARD
        with written(self._path):
            _keep_until(self._path, start_step)
        with written(self._folder):
            self._folder.mkdir(exist_ok=True)
            self._board = EventsWriter(str(self._folder / "events"))
        # TensorBoard, too, forgets what lies behind.
        self._event(start_step + 1, session_log=SessionLog(status=SessionLog.START))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One line of scalars for a step."""
        with written(self._path), self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            self._event(step, summary=summary.scalar(name, value))

    def picture(self, step: int, name: str, image: np.ndarray) -> None:
        """An image (rows, columns, 3) uint8 for TensorBoard."""
        self._event(step, summary=summary.image(name, image, dataformats="HWC"))

    def _event(self, step: int, **content: Any) -> None:
        with written(self._folder):
            self._board.write_event(Event(wall_time=time.time(), step=step, **content))
            self._board.flush()

    def close(self) -> None:
        """Lets go of the files; all is written already."""
        with contextlib.suppress(OSError):  # of a full disk, which was told before
            self._board.close()


def save_picture(image: np.ndarray, path: Path) -> None:
    """Writes a PNG.

    Args:
        image: (rows, columns, 3) uint8.
        path: the file; its folder is made if missing.

    Raises:
        InputError: it cannot be written.
    """
    with written(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)


def save_arrays(arrays: Mapping[str, np.ndarray], path: Path) -> None:
    """Writes an .npz so that it is there complete or not at all.

    Raises:
        InputError: it cannot be written.
    """
    content = io.BytesIO()
    np.savez(content, **arrays)  # type: ignore[arg-type]  # names of ours
    with written(path):
        write_aside(path, content.getvalue()).replace(path)


def write_cases(workdir: Path, step: int, cases: Sequence[Mapping[str, Any]]) -> None:
    """Writes WORKDIR/cases.json: what the newest validation found in each volume.

    Raises:
        InputError: it cannot be written.
    """
    path = workdir / CASES
    with written(path):
        write_atomically(path, json.dumps({"step": step, "cases": list(cases)}, indent=1) + "\n")


def metric_lines(workdir: Path) -> Iterator[str]:
    """The complete lines of metrics.jsonl.

    Raises:
        OSError: it cannot be read.
    """
    return (line for _, line in _lines(workdir / JSON_LINES))


def last_step(workdir: Path) -> int:
    """The last step that metrics.jsonl has a line of; 0: none.

    Raises:
        OSError: it cannot be read.
    """
    return max((step for step, _ in _lines(workdir / JSON_LINES)), default=0)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """(step, line) of each complete line; others are left aside."""
    if not path.exists():
        return
    for line in path.read_text("utf-8", "replace").splitlines():
        try:
            step = parse_object(line).get("step")
        except ValueError:  # the line that a kill cut off
            continue
        if type(step) is int:
            yield step, line


def _keep_until(path: Path, step: int) -> None:
    if not path.exists():
        return
    write_atomically(path, "".join(f"{line}\n" for at, line in _lines(path) if at <= step))


class Log:
    """Words for people: on the first process's console, and in each process's own file."""

    def __init__(self, workdir: Path, process: int) -> None:
        self._process = process
        folder = workdir / "logs"
        with written(folder):
            folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / f"process_{process}.log"

    def _open(self) -> TextIO:
        self._path.parent.mkdir(exist_ok=True)  # somebody may have cleared the logs away
        return self._path.open("a", encoding="utf-8", errors="backslashreplace")

    def __call__(self, text: str) -> None:
        """Writes one line or several.

        Raises:
            InputError: the file cannot be written.
        """
        if self._process == 0:
            say(text)
        self.keep(text)

    def keep(self, text: str) -> None:
        """Writes to this process's file only; raises as above."""
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        with written(self._path), self._open() as file:
            file.writelines(
                f"{now} process {self._process}: {line}\n" for line in text.splitlines()
            )


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


def duration(seconds: float) -> str:
    """h:mm:ss."""
    total = round(seconds)
    return f"{total // 3600}:{total // 60 % 60:02d}:{total % 60:02d}"
