"""Many processes as one run: joining, agreeing, and leaving together."""

import contextlib
import errno
import ipaddress
import itertools
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import numpy as np
from jax._src.distributed import global_state  # nothing public creates JAX's preemption notice
from jax.experimental import multihost_utils
from orbax.checkpoint import multihost

from voco_jax.errors import InputError

Result = TypeVar("Result")
# Seconds without a sign of life after which the other processes end themselves.
HEARTBEAT_TIMEOUT = 60
JOIN_TIMEOUT = 3600  # seconds for all processes to come: a cluster may still be making machines
_LONGEST_WAIT = 7 * 24 * 3600  # seconds for one process to do something for all, as preparing data
_barriers = itertools.count()


def start(coordinator: str | None, processes: int | None, process_id: int | None) -> None:
    """Joins the processes of a run; call it before anything asks for devices.

    With one process too: without it no preemption signal is noticed. That is what SIGTERM becomes
    with `watch_preemption`. If not all have come after `JOIN_TIMEOUT`, this process ends.

    Args:
        coordinator: HOST:PORT of process 0; None: found by JAX on TPU pods, SLURM, Open MPI 4 and
            (with the `kubernetes` package) Kubernetes, else one process.
        processes: how many; None as above.
        process_id: of this process; None as above.

    Raises:
        InputError: contradictory flags, or the others cannot be reached.
    """
    given = [value is not None for value in (coordinator, processes, process_id)]
    if any(given) and not all(given):
        raise InputError(
            "--coordinator, --processes and --process_id: give all three, or none to detect them; "
            f"found {coordinator}, {processes}, {process_id}"
        )
    if processes is not None and process_id is not None and not 0 <= process_id < processes:
        raise InputError(f"--process_id: found {process_id}, expected 0 to {processes - 1}")
    logging.getLogger("jax._src.distributed").setLevel(logging.ERROR)
    jax.config.update("jax_enable_preemption_service", False)  # until `watch_preemption`
    try:
        if coordinator is None and not _detected():
            alone = f"127.0.0.1:{_free_port()}"
            _initialize(alone, 1, 0, bind_address=alone)
        elif coordinator is not None:
            if process_id == 0:
                _check_port(coordinator)
            with _waiting(f"process {process_id} of {processes} at {coordinator}"):
                _initialize(coordinator, processes, process_id, _bind_address(coordinator))
    except RuntimeError as error:
        where = coordinator or "the detected coordinator"
        raise InputError(
            f"--coordinator: the processes did not find each other at {where} ({error}); check "
            "that process 0 runs there, that the port is open, and --processes"
        ) from error


def _initialize(
    address: str, processes: int | None, process_id: int | None, bind_address: str | None = None
) -> None:
    jax.distributed.initialize(
        address,
        processes,
        process_id,
        cluster_detection_method="deactivate",
        initialization_timeout=JOIN_TIMEOUT + 60,
        heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT,
        coordinator_bind_address=bind_address,
    )


def _detected() -> bool:
    try:
        with _waiting("the processes of this cluster's job"):
            jax.distributed.initialize(
                initialization_timeout=JOIN_TIMEOUT + 60,
                heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT,
            )
    except ValueError as error:  # no cluster was detected
        named = "JAX_COORDINATOR_ADDRESS" in os.environ
        # Open MPI 5 and other MPIs say only this much.
        ranks = [os.environ.get(f"{of}_SIZE", "1") for of in ("OMPI_COMM_WORLD", "PMI", "PALS")]
        if named or os.environ.get("JOB_COMPLETION_INDEX", "0") != "0" or set(ranks) != {"1"}:
            raise InputError(
                "--coordinator: this seems to be one of several processes, but JAX cannot tell "
                f"which ({error}); give --coordinator, --processes and --process_id"
            ) from error
        return False
    return True


@contextlib.contextmanager
def _waiting(what: str) -> Iterator[None]:
    """Tells what is waited for, and ends this process after `JOIN_TIMEOUT`.

    JAX's client would end it, too, but with a stack of C++.
    """
    joined = threading.Event()

    def tell() -> None:
        begin = time.monotonic()
        while not joined.wait(min(15, JOIN_TIMEOUT)):
            waited = time.monotonic() - begin
            text = f"joining: {what}, not all are there after {waited:.0f} s"
            if waited >= JOIN_TIMEOUT:
                print(
                    f"error: --coordinator: {text}; check that process 0 runs there, that the port "
                    "is open, and that as many processes were started as --processes says",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(1)  # a crash for the launchers: machines may only be late
            print(f"still {text}", flush=True)

    reporter = threading.Thread(target=tell, daemon=True)
    reporter.start()
    try:
        yield
    finally:
        joined.set()
        reporter.join()


def _check_port(coordinator: str) -> None:
    """JAX's service ends the process with a segmentation fault where it cannot listen."""
    port = coordinator.rpartition(":")[2]
    if not port.isdecimal() or not 0 < int(port) < 65536:
        raise InputError(f"--coordinator: found {coordinator!r}, expected HOST:PORT")
    with socket.socket() as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tried.bind(("", int(port)))
        except OSError as error:
            taken = error.errno == errno.EADDRINUSE
            raise InputError(
                f"--coordinator: process 0 cannot listen on port {port} ({error}); "
                + ("end what listens there (an older run?) or choose" if taken else "choose")
                + " another port, the same for all processes"
            ) from error


def _bind_address(coordinator: str) -> str | None:
    """Where process 0 listens: on loopback only, if that is its name; None: JAX's, everywhere."""
    host = coordinator.rpartition(":")[0].strip("[]")
    try:
        loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        loopback = host == "localhost"
    return coordinator if loopback else None


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def is_process_0() -> bool:
    """Whether this process is the one that writes what is written once."""
    return jax.process_index() == 0


def label() -> str:
    """Which process this is, for messages; "" if there is only one, or none has joined yet."""
    count = global_state.num_processes
    return f"process {global_state.process_id} of {count}: " if count > 1 else ""


def watch_preemption() -> None:
    """From now on SIGTERM to any process is what `should_stop` tells all of them.

    To be called on all processes at about the same time. Until then SIGTERM is whatever this
    process made of it: JAX would take it at once, and nobody would look for minutes.
    """
    if global_state.client is not None and global_state.preemption_sync_manager is None:
        jax.config.update("jax_enable_preemption_service", True)
        global_state.initialize_preemption_sync_manager()


def should_stop(step: int) -> bool:
    """Whether a preemption signal has reached any process; True at the same step on all.

    To be called on every process at every step.

    Args:
        step: counted from 1 since this run of the processes started: a signal that comes between
            `watch_preemption` and the first call is answered at step 1.
    """
    return bool(multihost_utils.reached_preemption_sync_point(step))


def gather(values: np.ndarray) -> np.ndarray:
    """(n,) numbers of each process -> (processes, n), on every process."""
    return np.asarray(multihost_utils.process_allgather(np.asarray(values))).reshape(
        jax.process_count(), -1
    )


def broadcast(text: str) -> str:
    """Process 0's text, on every process."""
    if jax.process_count() == 1:
        return text
    raw = np.frombuffer(text.encode(), np.uint8)
    length = int(multihost_utils.broadcast_one_to_all(np.int32(raw.size)))
    padded = np.zeros(length, np.uint8)
    padded[: min(length, raw.size)] = raw[:length]
    return bytes(np.asarray(multihost_utils.broadcast_one_to_all(padded))).decode()


def barrier() -> None:
    """Waits until every process is here, however long one takes; a dead one still ends all.

    To be called where processes may be minutes apart: a collective that connects them for the
    first time gives up much fast_compile (Gloo, on CPUs, after 30 seconds).
    """
    multihost.get_barrier_sync_fn()(key=f"voco_{next(_barriers)}", timeout_ms=_LONGEST_WAIT * 1000)


def compile_on_all(function: Any, *arguments: Any) -> Any:
    """Compiles a jitted function on every process, and waits for the slowest.

    Args:
        function: of `jax.jit`.
        arguments: of one call, arrays or abstract ones.

    Returns:
        What may be called with such arguments.
    """
    compiled = function.lower(*arguments).compile()
    barrier()
    return compiled


def run_on_all(function: Callable[[], Result]) -> Result:
    """Runs a function on every process; where one finds a mistake of the user's, all stop.

    Raises:
        InputError: the first process's that raised one.
    """
    if jax.process_count() == 1:
        return function()
    problem, result = "", None
    try:
        result = function()
    except InputError as error:
        problem = str(error)
    barrier()
    raw = np.frombuffer(problem.encode(), np.uint8)
    lengths = gather(np.array([raw.size]))[:, 0]
    if lengths.max():
        padded = np.zeros(lengths.max(), np.uint8)
        padded[: raw.size] = raw
        process = int(np.flatnonzero(lengths)[0])
        text = bytes(gather(padded)[process, : lengths[process]]).decode()
        raise InputError(f"process {process}: {text}")
    return result  # type: ignore[return-value]


def run_on_process_0(function: Callable[[], str]) -> str:
    """Runs a function on process 0; all get its text, or its InputError."""
    return broadcast(run_on_all(lambda: function() if is_process_0() else ""))
