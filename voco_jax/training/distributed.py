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
from jax._src.clusters import ClusterEnv  # nothing public tells before it joins
from jax._src.distributed import global_state  # nor what the processes tell each other
from jax.experimental import multihost_utils
from orbax.checkpoint import multihost

from voco_jax.errors import InputError, of_status
from voco_jax.files import say
from voco_jax.training import signals

Result = TypeVar("Result")
# Seconds without a sign of life after which the other processes end themselves.
HEARTBEAT_TIMEOUT = 60
JOIN_TIMEOUT = 3600  # seconds for all processes to come: a cluster may still be making machines
_LONGEST_WAIT = 7 * 24 * 3600  # seconds for one process to do something for all, as preparing data
_barriers = itertools.count()
_PAST_PROXY = "no_grpc_proxy"  # hosts, separated by commas; gRPC reads no upper case
_HERE, _DECIDED, _GO = "voco/here/", "voco/decided/", "go"  # see `stop_before`


def start(coordinator: str | None, processes: int | None, process_id: int | None) -> None:
    """Joins the processes of a run; call it before anything asks for devices.

    One process joins nothing: it would have itself to wait for, and JAX's service ends a process
    that was not heard of for a minute, as one that was stopped. If not all have come after
    `JOIN_TIMEOUT`, this process ends.

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
    jax.config.update("jax_enable_preemption_service", False)  # `signals` takes SIGTERM
    local = os.environ.get("JAX_LOCAL_DEVICE_IDS")
    devices = tuple(int(number) for number in local.split(",")) if local else None
    if coordinator is None:
        coordinator, processes, process_id, devices = _detect(devices)
    elif processes != 1 and process_id == 0:
        _check_port(coordinator)
    if processes == 1:
        for kind in ("cuda", "rocm") if local else ():  # as `jax.distributed.initialize` does
            jax.config.update(f"jax_{kind}_visible_devices", local)
        return
    assert coordinator is not None
    _go_past_proxies(coordinator)
    try:
        with _waiting(f"process {process_id} of {processes} at {coordinator}"):
            jax.distributed.initialize(
                coordinator,
                processes,
                process_id,
                devices,
                cluster_detection_method="deactivate",
                initialization_timeout=JOIN_TIMEOUT + 60,
                heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT,
                shutdown_timeout_seconds=_LONGEST_WAIT,
                coordinator_bind_address=_bind_address(coordinator),
            )
    except RuntimeError as error:
        raise InputError(
            f"--coordinator: the processes did not find each other at {coordinator} ({error}); "
            "check that process 0 runs there, that the port is open, and --processes"
        ) from error


def _detect(
    devices: tuple[int, ...] | None,
) -> tuple[str | None, int, int, tuple[int, ...] | None]:
    """(coordinator, processes, number of this one, its devices) of a cluster's job.

    Raises:
        InputError: one of several, but JAX cannot tell which.
    """
    named, problem = os.environ.get("JAX_COORDINATOR_ADDRESS"), ""
    try:
        address, processes, process_id, found = ClusterEnv.auto_detect_unset_distributed_params(
            named, None, None, devices, None, JOIN_TIMEOUT
        )
        if address is not None and processes is not None and process_id is not None:
            return address, processes, process_id, tuple(found) if found else None
    except Exception as error:  # of whatever asks the cluster, as Kubernetes' package
        problem = f"{type(error).__name__}: {error}"
    # Open MPI 5 and other MPIs say only this much; so does a pod that may not ask for more.
    sizes = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PALS_SIZE", "SLURM_STEP_NUM_TASKS")
    several = any(os.environ.get(name, "1") != "1" for name in sizes)
    index = os.environ.get("JOB_COMPLETION_INDEX", "0")
    if named or several or index != "0" or (problem and "JOB_COMPLETION_INDEX" in os.environ):
        raise InputError(
            "--coordinator: this seems to be one of several processes, but JAX cannot tell "
            f"which ({problem or 'it finds no cluster'}); give --coordinator=HOST:PORT of process "
            "0, --processes and --process_id, for one alone --coordinator=127.0.0.1:1 "
            "--processes=1 --process_id=0"
        )
    if problem:
        say(
            f"this looks like a cluster, but does not say of which job this is ({problem}): going "
            "on as one process; for several give --coordinator, --processes and --process_id"
        )
    return None, 1, 0, devices


def _go_past_proxies(coordinator: str) -> None:
    """For gRPC alone: it would send even 127.0.0.1 to a proxy that the environment names."""
    host = coordinator.rpartition(":")[0].strip("[]")
    others = os.environ.get(_PAST_PROXY) or os.environ.get("no_proxy")
    os.environ[_PAST_PROXY] = f"{others},{host}" if others else host


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


def is_process_0() -> bool:
    """Whether this process is the one that writes what is written once."""
    return jax.process_index() == 0


def label() -> str:
    """Which process this is, for messages; "" if there is only one, or none has joined yet."""
    count = global_state.num_processes
    return f"process {global_state.process_id} of {count}: " if count > 1 else ""


def stop_before(number: int, ready: Callable[[float], bool]) -> str:
    """Waits until every process has its batch of this number, or one of them was asked to stop.

    The answer is the same on all: nobody begins a step whose input another one still waits for, so
    that the last finished step is everybody's and can be saved. Process 0 decides.

    Args:
        number: of the batch, from 1; each is asked for once, in order.
        ready: seconds -> whether this process has its batch by then.

    Returns:
        "": take it; else the name of the signal that asks to stop instead.
    """
    client, mine, told = global_state.client, False, ""
    for turn in itertools.count():
        mine = mine or ready(0.5)
        signal = signals.received()
        if client is None:
            if signal or mine:
                return signal
            continue
        if (news := f"{number if mine else number - 1} {signal}") != told:
            client.key_value_set(f"{_HERE}{global_state.process_id}", news, allow_overwrite=True)
            told = news
        decided = _decide(client, number) if is_process_0() else _decided(client, number, mine)
        if decided:
            return "" if decided == _GO else decided
        time.sleep(min(turn, 50) / 1000)
    raise AssertionError


def _decide(client: Any, number: int) -> str:
    """Process 0: all go on when all have their batch, and stop when one is asked to."""
    states = [text.partition(" ") for _, text in client.key_value_dir_get(_HERE)]
    signal = next((signal for _, _, signal in states if signal), "")
    ready = [int(batch) >= number for batch, _, _ in states]
    if not signal and (len(ready) < global_state.num_processes or not all(ready)):
        return ""
    client.key_value_set(f"{_DECIDED}{number}", signal or _GO)
    if not signal and number > 1:
        client.key_value_delete(f"{_DECIDED}{number - 1}")  # all here for this one have read it
    return signal or _GO


def _decided(client: Any, number: int, patient: bool) -> str:
    """What process 0 has decided; "": nothing yet."""
    try:
        return str(client.blocking_key_value_get(f"{_DECIDED}{number}", 1000 if patient else 1))
    except jax.errors.JaxRuntimeError:  # too early; where process 0 is dead, JAX ends this one
        return ""


def late_for(number: int) -> list[int]:
    """The processes that have not got their batch of this number yet."""
    if global_state.client is None:
        return []
    told = dict(global_state.client.key_value_dir_get(_HERE))
    batches = {int(key.rpartition("/")[2]): int(text.split(" ")[0]) for key, text in told.items()}
    return [i for i in range(global_state.num_processes) if batches.get(i, 0) < number]


def shutdown() -> None:
    """Leaves with the other processes, which otherwise take the end of this one for a crash."""
    jax.distributed.shutdown()


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
    """Runs a function on every process; where one raises an InputError, all do.

    Raises:
        InputError: the first process's that raised one, of its kind.
    """
    if jax.process_count() == 1:
        return function()
    problem, result = b"", None
    try:
        result = function()
    except InputError as error:
        problem = bytes([error.status]) + str(error).encode(errors="backslashreplace")
    barrier()
    raw = np.frombuffer(problem, np.uint8)
    lengths = gather(np.array([raw.size]))[:, 0]
    if lengths.max():
        padded = np.zeros(lengths.max(), np.uint8)
        padded[: raw.size] = raw
        process = int(np.flatnonzero(lengths)[0])
        status, *text = bytes(gather(padded)[process, : lengths[process]])
        raise of_status(status)(f"process {process}: {bytes(text).decode()}")
    return result  # type: ignore[return-value]


def run_on_process_0(function: Callable[[], str]) -> str:
    """Runs a function on process 0; all get its text, or its InputError."""
    return broadcast(run_on_all(lambda: function() if is_process_0() else ""))
