"""What a run waits for: told when it takes long, and given up when the run is to stop."""

import contextlib
import multiprocessing
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from voco_jax.errors import InputError
from voco_jax.training import distributed
from voco_jax.training.metrics import duration
from voco_jax.training.task import LogLine
from voco_jax.types import Batch

FIRST_WORD = 30.0  # seconds of waiting after which it is told; again after twice as long
LONGEST_SILENCE = 600.0


class StopRequestedError(Exception):
    """A signal asks the run to stop; raised on all processes before the same step.

    Args:
        signal: its name.
        stuck: whether this process's input still waits for its data.
    """

    def __init__(self, signal: str, stuck: bool) -> None:
        super().__init__(signal)
        self.signal, self.stuck = signal, stuck


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
        self._thread.join()


class Batches:
    """A task's batches, each taken when all processes have theirs; a thread reads them.

    So that the main thread can leave a read that never returns, as of a server that is gone.
    """

    def __init__(self, batches: Iterator[Batch], watch: Watch) -> None:
        """Reads nothing yet.

        Args:
            batches: endless; this process's rows.
            watch: told of the waiting.
        """
        self._batches, self._watch, self._number = batches, watch, 0
        self._asked: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._arrived = threading.Event()
        threading.Thread(target=self._read, daemon=True).start()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        """The next batch.

        Raises:
            StopRequestedError: the run is to stop instead.
            Exception: whatever reading raised.
        """
        self._number += 1
        self._arrived.clear()
        self._asked.put(None)
        self._watch.at(self._waiting)
        if signal := distributed.stop_before(self._number, self._arrived.wait):
            raise StopRequestedError(signal, stuck=not self._arrived.is_set())
        batch, error = self._answers.get()
        self._watch.at("computing a step")
        if error is not None:
            raise error
        return batch

    def _read(self) -> None:
        while True:
            self._asked.get()
            self._answers.put(self._take())
            self._arrived.set()

    def _take(self) -> tuple[Batch | None, Exception | None]:
        try:
            return next(self._batches), None
        except Exception as error:
            return None, error

    def _waiting(self) -> str:
        if not self._arrived.is_set():
            return f"waiting for input{_workers()}"
        missing = ", ".join(map(str, distributed.late_for(self._number)))
        return f"waiting for the input of process {missing}" if missing else "waiting for process 0"


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
