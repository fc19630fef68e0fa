"""SIGTERM, and SIGHUP of a closed terminal: save and stop.

Python's own handlers wait for what the main thread does, as compiling; a thread reads them here.
"""

import os
import signal
import threading
from collections.abc import Callable

_STOPPING = (signal.SIGTERM, signal.SIGHUP)
_deferred = threading.Event()
_received: list[str] = []


def listen(early: Callable[[str], object]) -> None:
    """Takes the signals from now on. Process 1 of a container does not end of one by itself.

    Args:
        early: called with a signal's name, in another thread, for each that comes before `defer`.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    for number in _STOPPING:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # as nohup does
            signal.signal(number, lambda *_: None)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)

    def read() -> None:
        while True:
            number = os.read(reading, 1)[0]
            if number in _STOPPING:
                name = signal.Signals(number).name
                if not _deferred.is_set():
                    early(name)
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
