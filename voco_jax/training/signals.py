"""SIGTERM, SIGHUP of a closed terminal, and Ctrl-C: save and stop.

Python's own handlers wait for what the main thread does, as compiling; a thread reads them here.
"""

import os
import signal
import threading
from collections.abc import Callable

from voco_jax.files import say

INTERRUPT = signal.SIGINT.name
_STOPPING = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
_deferred = threading.Event()
_received: list[str] = []


def listen(early: Callable[[str], object], again: Callable[[], object]) -> None:
    """Takes the signals from now on. Process 1 of a container does not end of one by itself.

    Args:
        early: called with a signal's name, in another thread, for each that comes before `defer`.
        again: likewise, at the second Ctrl-C.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    for number in _STOPPING:
        # As nohup does of SIGHUP, and shells of Ctrl-C for what is in the background.
        if number == signal.SIGTERM or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda *_: None)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)

    def read() -> None:
        while True:
            number = os.read(reading, 1)[0]
            if number in _STOPPING:
                name = signal.Signals(number).name
                if not _deferred.is_set():
                    early(name)
                elif name == INTERRUPT and INTERRUPT in _received:
                    again()
                elif name == INTERRUPT:
                    say("interrupted: ends after this step; Ctrl-C again: at once")
                _received.append(name)

    threading.Thread(target=read, daemon=True).start()


def defer() -> None:
    """From now on a signal is only what `received` tells: someone asks, and saves."""
    _deferred.set()


def ignore() -> None:
    """From now on no signal changes how this process ends."""
    for number in _STOPPING:
        signal.signal(number, signal.SIG_IGN)


def received() -> str:
    """The name of the first signal that has come; "": none has."""
    return _received[0] if _received else ""


def describe(name: str) -> str:
    """What a signal does to a run."""
    return "interrupted" if name == INTERRUPT else f"preempted ({name})"
