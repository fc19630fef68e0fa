"""Jobs on Dask, one at a time on each process (or thread): here, or on an existing cluster.

A job that asks for more memory than its process may have gets a MemoryError; one that takes longer
than TIME_LIMIT ends its process, in whatever library it hangs.
"""

import asyncio
import contextlib
import functools
import logging
import os
import resource
import signal
import tempfile
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, TypeVar

from voco_jax.errors import InputError

# Seconds for one job. The largest file that is read, 4 GiB, takes some minutes on one slow core;
# what takes longer hangs, and would hold a process for ever.
TIME_LIMIT = 1800.0

Job = TypeVar("Job")
Result = TypeVar("Result")

DEATHS = 3  # of workers that one job may cause; then it is given up
CONNECT_SECONDS = 20.0

# Dask's web pages tell whoever asks which files are read and what was logged; we need none.
NO_PAGES: dict[str, Any] = {
    "distributed.scheduler.http.routes": [],
    "distributed.worker.http.routes": [],
}


def available_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def dask_setup(worker: Any) -> None:
    """Called by Dask in each new worker: Ctrl-C is for the main process, which ends them.

    Dask looks at a worker's memory a few times a second and kills it when it is too late; the
    kernel refuses what is too much before it is taken, and the job can say so.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if worker.memory_manager.memory_limit:
        # Libraries in memory do not count here, but do for Dask, which kills at 95 %.
        limit = int(0.85 * worker.memory_manager.memory_limit)
        most = resource.getrlimit(resource.RLIMIT_DATA)[1]
        limit = limit if most == resource.RLIM_INFINITY else min(limit, most)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, most))


def within_time(function: Callable[[Job], Result], job: Job) -> Result:
    """Runs a function; after TIME_LIMIT seconds the kernel ends this process with SIGALRM.

    A signal that no Python code handles: it also ends C code that never comes back.
    """
    signal.setitimer(signal.ITIMER_REAL, TIME_LIMIT)
    try:
        return function(job)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


@contextlib.contextmanager
def local_workers(count: int) -> Iterator[Any]:
    """Starts so many Dask processes here, which end with this context; yields Dask's client.

    They listen on 127.0.0.1, where other users of this machine are, too: they obey only who has
    the certificate that is made here, and that no file keeps.
    """
    import dask
    from dask.distributed import Client, LocalCluster, Security

    settings = {
        **NO_PAGES,
        "distributed.scheduler.allowed-failures": DEATHS - 1,
        # Nothing is kept between tasks, so there is nothing to move to disk or to pause for.
        "distributed.worker.memory.target": False,
        "distributed.worker.memory.spill": False,
        "distributed.worker.memory.pause": False,
        "distributed.worker.memory.terminate": 0.95,
        "distributed.worker.preload": [dask_setup.__module__],
        # A process that dies is started anew, however often; Dask's own value gives up one that
        # happens to be away 15 s after a death.
        "distributed.deploy.lost-worker-timeout": "1 day",
        # Dask's own value makes glibc ask the system for every array anew: half the speed.
        "distributed.nanny.pre-spawn-environ": {"OMP_NUM_THREADS": 1, "OPENBLAS_NUM_THREADS": 1},
    }
    with (
        tempfile.TemporaryDirectory(prefix="voco_prepare_") as scratch,
        dask.config.set(settings),
        _unlogged("distributed"),
        LocalCluster(
            n_workers=count,
            threads_per_worker=1,
            processes=True,
            security=Security.temporary(),
            host="127.0.0.1",
            # Dask opens this port all the same; any one, for several may run at a time.
            dashboard_address="127.0.0.1:0",
            scheduler_kwargs={"dashboard": False},
            local_directory=scratch,
            silence_logs=logging.CRITICAL,
        ) as cluster,
        Client(cluster) as client,
    ):
        yield client


@contextlib.contextmanager
def _unlogged(name: str) -> Iterator[None]:
    """Leaves out what a logger says below CRITICAL.

    Dask's silence_logs does so for its own handler; where another library, as absl, has given the
    root logger one, Dask writes there, of every start, connection and end. Whoever starts the jobs
    tells which of them killed their workers.
    """
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def cluster_workers(address: str, check: Callable[[], str], log: Callable[[str], None]) -> Any:
    """Connects to a Dask cluster that runs already, and leaves it running.

    Args:
        address: of its scheduler, as tls://HOST:PORT, with the certificates of Dask's own settings
            (`distributed.comm.tls`); or as tcp://HOST:PORT.
        check: importable by name; runs on each worker, returns "" or what is wrong there.
        log: gets a line if there is no worker yet, and one if anyone may use the scheduler.

    Yields:
        Dask's client.

    Raises:
        InputError: no such scheduler, certificates that cannot be used, workers without this
            project or with other versions, or what `check` found.
    """
    from dask.distributed import Client

    if address.startswith(("tls://", "wss://")):
        _check_certificates(address)
    else:
        _check_without_certificates(address, log)
    try:
        client = Client(address, timeout=CONNECT_SECONDS)
    except (OSError, ValueError, TimeoutError) as error:
        raise InputError(
            f"--scheduler: no Dask scheduler answers at {address!r} ({error}), expected the "
            "address that it printed at its start, as tls://HOST:8786 (tcp:// if it has no "
            "certificates); or its Python, Dask or distributed is another version than here"
        ) from error
    with client:
        if not client.nthreads():
            log(f"waiting for a worker at {address} ...")
            while not client.nthreads():
                with contextlib.suppress(TimeoutError):
                    client.wait_for_workers(1, timeout=60)
        _check_workers(client, address, check)
        old = client.run_on_scheduler(_allow_failures, count=DEATHS - 1)
        try:
            yield client
        finally:
            with contextlib.suppress(Exception):  # the scheduler may be gone
                client.run_on_scheduler(_allow_failures, count=old)


def run_jobs(
    client: Any, function: Callable[[Job], Result], jobs: Sequence[Job]
) -> Generator[tuple[Job, Result | None], None, None]:
    """Runs a function on every job; a job whose worker dies is given to another one.

    Args:
        client: Dask's. Workers may come and go.
        function: importable by name.
        jobs: at least one; may be pickled.

    Yields:
        Each job as it ends, with its result; None: it killed its worker or took longer than
            TIME_LIMIT, `DEATHS` times.

    Raises:
        InputError: the cluster is gone.
        Exception: whatever the function raised.
    """
    from concurrent.futures import CancelledError  # of which Dask's own is a kind

    from dask.distributed import as_completed
    from distributed.scheduler import KilledWorker

    waiting = iter(jobs)
    running: dict[str, Job] = {}
    finished = as_completed()

    def fill() -> None:
        """Gives every thread of the workers one job, so that few die with a worker."""
        while len(running) < max(1, sum(client.nthreads().values())):
            job = next(waiting, None)
            if job is None:
                return
            future = client.submit(within_time, function, job, pure=False)
            running[future.key] = job
            finished.add(future)

    fill()
    for future in finished:
        job = running.pop(future.key)
        try:
            error = future.exception() if future.status == "error" else None
            if isinstance(error, KilledWorker):
                yield job, None
            elif error is not None:
                raise error
            else:
                yield job, future.result()
            fill()
        except (CancelledError, asyncio.CancelledError, ConnectionError) as gone:
            raise InputError(
                "the Dask scheduler is gone; what is prepared is kept: start it and its workers "
                "again and run the same command"
            ) from gone


def versions() -> tuple[str, ...]:
    """What has to be the same on the workers as here."""
    import platform

    import dask
    import numpy

    import voco_jax

    return (
        f"voco_jax {voco_jax.__version__}",
        f"Python {'.'.join(platform.python_version_tuple()[:2])}",
        f"dask {dask.__version__}",
        f"numpy {numpy.__version__.partition('.')[0]}",
    )


def _check_certificates(address: str) -> None:
    """Dask itself would end with a traceback that names no file."""
    import dask
    from dask.distributed import Security

    names = [f"distributed.comm.tls.{field}" for field in ("ca-file", "client.cert", "client.key")]
    try:
        complete = Security().get_connection_args("client")["ssl_context"] is not None
        problem = "" if complete else "not all are set"
    except (OSError, ValueError) as error:
        problem = str(error)
    if problem:
        # Of a certificate or key that is set itself, instead of its file, no more than the kind.
        values = (str(dask.config.get(name)).partition("\n")[0] for name in names)
        found = ", ".join(f"{name} {value}" for name, value in zip(names, values, strict=True))
        raise InputError(
            f"--scheduler {address}: no certificates to show there ({problem}), found {found}; "
            "expected PEM files, set in Dask's configuration or in the environment, as "
            "DASK_DISTRIBUTED__COMM__TLS__CA_FILE (docs/data.md); the key may be in the "
            "certificate's file"
        )


@functools.cache  # a config of many sources connects many times
def _check_without_certificates(address: str, log: Callable[[str], None]) -> None:
    """Warns; an error where Dask is told to encrypt."""
    import dask

    if dask.config.get("distributed.comm.require-encryption"):
        raise InputError(
            f"--scheduler: found {address}, expected tls://HOST:PORT, for Dask's configuration "
            "says distributed.comm.require-encryption"
        )
    log(
        f"warning: --scheduler {address}: without TLS anyone who reaches this port can run code "
        "as you, here and on the workers; use tls:// (docs/data.md) or a network of your own"
    )


def _check_workers(client: Any, address: str, check: Callable[[], str]) -> None:
    try:
        found = client.run(versions, on_error="return")
        bad = {}
        for worker, there in found.items():
            if isinstance(there, Exception):
                bad[worker] = (
                    f"it cannot import this project ({there}); install it there, or start the "
                    "worker in the project's folder, in the same environment"
                )
            elif there != versions():
                bad[worker] = f"it has {', '.join(there)}, expected {', '.join(versions())}"
        if not bad:
            seen = client.run(check, on_error="return")
            bad = {worker: str(there) for worker, there in seen.items() if there}
    except Exception as error:  # unpickling on the scheduler or a worker fails in many ways
        raise InputError(
            f"--scheduler {address}: its workers cannot run this project's code ({error!r}); start "
            "scheduler and workers in the same environment as this command"
        ) from error
    if bad:
        worker, reason = min(bad.items())
        raise InputError(
            f"--scheduler {address}: {len(bad)} of {len(found)} workers cannot be used; "
            f"{worker}: {reason}"
        )


def _allow_failures(count: int, dask_scheduler: Any = None) -> int:
    """Sets how many deaths of workers the scheduler forgives a task; returns how many it did."""
    old = dask_scheduler.allowed_failures
    dask_scheduler.allowed_failures = count
    return old
