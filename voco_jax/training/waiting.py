"""What a run waits for: told when it takes long, and given up when the run is to stop."""

import contextlib
import itertools
import multiprocessing
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypeVar

import jax

from voco_jax.errors import InputError
from voco_jax.training import distributed, signals
from voco_jax.training.metrics import duration
from voco_jax.training.task import LogLine
from voco_jax.types import Batch

Result = TypeVar("Result")
FIRST_WORD = 30.0  # seconds of waiting after which it is told; again after twice as long
LONGEST_SILENCE = 600.0
GRACE = 120.0  # of the five minutes that launchers give to save


class StopRequestedError(Exception):
    """A signal of this name asks the run to stop; raised on all processes before the same step."""


class Watch:
    """Tells in a thread of its own what a run has been at for long; closed by its context."""

    def __init__(self, log: LogLine) -> None:
        self._log = log
        self._ended = threading.Event()
        self.at("starting")
        self._thread = threading.Thread(target=self._tell, daemon=True)
        self._thread.start()

    def at(self, what: str | Callable[[], str]) -> None:
        """What begins now; a function is asked when there is something to tell."""
        self._what, self._since, self._next = what, time.monotonic(), FIRST_WORD

    def _tell(self) -> None:
        while not self._ended.wait(min(1.0, FIRST_WORD / 4)):
            what, seconds = self._what, time.monotonic() - self._since
            if seconds < self._next:
                continue
            self._next = seconds + min(seconds, LONGEST_SILENCE)
            with contextlib.suppress(InputError):  # of a full disk
                text = what if isinstance(what, str) else what()
                self._log(f"still {text}: {duration(seconds)} so far")

    def close(self) -> None:
        """Says nothing more."""
        self._ended.set()
        self._thread.join(timeout=5)  # the log may be on a server that is gone


class Reader:
    """Reads in a thread of its own, so that the main thread can leave a read that never returns."""

    def __init__(self) -> None:
        self._asked: queue.SimpleQueue[Callable[[], Any]] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._arrived = threading.Event()
        threading.Thread(target=self._run, daemon=True).start()

    def read(
        self, function: Callable[[], Result], stop: Callable[[Callable[[float], bool]], str]
    ) -> Result:
        """What a function returns, or raises.

        Args:
            function: runs in the other thread.
            stop: given (seconds -> whether the function has ended by then), waits for that; or
                returns the name of the signal for which it is left.

        Raises:
            StopRequestedError: it was left.
        """
        self._arrived.clear()
        self._asked.put(function)
        if signal := stop(self._arrived.wait):
            raise StopRequestedError(signal)
        result, error = self._answers.get()
        if error is not None:
            raise error
        return result

    @property
    def waits(self) -> bool:
        """Whether a read has not ended."""
        return not self._arrived.is_set()

    def _run(self) -> None:
        while True:
            self._answers.put(_outcome(self._asked.get()))
            self._arrived.set()


def _outcome(function: Callable[[], Any]) -> tuple[Any, Exception | None]:
    try:
        return function(), None
    except Exception as error:
        return None, error


def batches_in_step(batches: Iterator[Batch], reader: Reader, watch: Watch) -> Iterator[Batch]:
    """A task's batches, each taken when all processes have theirs.

    Args:
        batches: endless; this process's rows.
        reader: reads them.
        watch: told of the waiting.

    Raises:
        StopRequestedError: the run is to stop instead.
        Exception: whatever reading raised.
    """
    for number in itertools.count(1):
        watch.at(partial(_missing, number, reader))
        batch = reader.read(partial(next, batches), partial(distributed.stop_before, number))
        watch.at("computing a step")
        yield batch


def _missing(number: int, reader: Reader) -> str:
    if reader.waits:
        return f"waiting for input{_workers()}"
    late = ", ".join(map(str, distributed.late_for(number)))
    return f"waiting for the input of process {late}" if late else "waiting for process 0"


def within_grace(function: Callable[[], Result], reader: Reader) -> Result:
    """What a function returns that need not be waited for once a signal has come.

    Of several processes each waits for its end: all take part in it.

    Raises:
        StopRequestedError: it has not ended `GRACE` after the signal.
        Exception: whatever the function raised.
    """

    def stop(ended: Callable[[float], bool]) -> str:
        while not ended(0.5):
            if signals.received() and not ended(GRACE):
                return signals.received()
        return ""

    return function() if jax.process_count() > 1 else reader.read(function, stop)


def _workers() -> str:
    """The data workers, and which files each has open: one of those reads does not return.

    What /proc says of them asks no file server.
    """
    lines = []
    for worker in multiprocessing.active_children():
        files = []
        with contextlib.suppress(OSError):  # it has just ended, or this is not Linux
            for number in os.listdir(f"/proc/{worker.pid}/fd"):
                path = os.readlink(f"/proc/{worker.pid}/fd/{number}")
                if int(number) > 2 and path.startswith("/") and not path.startswith("/dev/"):
                    files.append(path)
        reads = f" with {' '.join(sorted(files))}" if files else ""
        lines.append(f"process {worker.pid}{reads}")
    return f" of the data workers ({', '.join(lines)})" if lines else ""
