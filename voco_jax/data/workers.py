"""Jobs on Dask's local cluster, one at a time on each process.

A job that asks for more memory than its process may have gets a MemoryError; one that takes longer
than TIME_LIMIT ends its process, in whatever library it hangs.
"""

import logging
import os
import resource
import signal
import tempfile
from collections.abc import Callable, Generator, Sequence
from typing import Any, TypeVar

# Seconds for one job. The largest file that is read, 4 GiB, takes some minutes on one slow core;
# what takes longer hangs, and would hold a process for ever.
TIME_LIMIT = 1800.0

Job = TypeVar("Job")
Result = TypeVar("Result")


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


def in_processes(
    function: Callable[[Job], Result], jobs: Sequence[Job], workers: int
) -> Generator[tuple[Job, Result | None], None, None]:
    """Runs a function on every job, in processes that end with this generator.

    Args:
        function: importable by name.
        jobs: at least one; may be pickled.
        workers: how many processes.

    Yields:
        Each job as it ends, with its result; None: it killed its worker, or took longer than
            TIME_LIMIT, twice.

    Raises:
        Exception: whatever the function raised.
    """
    import dask
    from dask.distributed import Client, LocalCluster, as_completed
    from distributed.scheduler import KilledWorker

    workers = min(workers, len(jobs))
    settings = {
        "distributed.scheduler.allowed-failures": 1,  # one more try after a worker died
        # Nothing is kept between tasks, so there is nothing to move to disk or to pause for.
        "distributed.worker.memory.target": False,
        "distributed.worker.memory.spill": False,
        "distributed.worker.memory.pause": False,
        "distributed.worker.memory.terminate": 0.95,
        "distributed.worker.preload": [dask_setup.__module__],
        # Dask's own value makes glibc ask the system for every array anew: half the speed.
        "distributed.nanny.pre-spawn-environ": {"OMP_NUM_THREADS": 1, "OPENBLAS_NUM_THREADS": 1},
    }
    with (
        tempfile.TemporaryDirectory(prefix="voco_prepare_") as scratch,
        dask.config.set(settings),
        LocalCluster(
            n_workers=workers,
            threads_per_worker=1,
            processes=True,
            host="127.0.0.1",
            dashboard_address=None,
            local_directory=scratch,
            silence_logs=logging.CRITICAL,
        ) as cluster,
        Client(cluster) as client,
    ):
        waiting = iter(jobs)
        running = {}

        def submit() -> Any:
            job = next(waiting, None)
            if job is None:
                return None
            future = client.submit(within_time, function, job, pure=False)
            running[future.key] = job
            return future

        finished = as_completed([submit() for _ in range(workers)])
        for future in finished:
            job = running.pop(future.key)
            error = future.exception() if future.status == "error" else None
            if isinstance(error, KilledWorker):
                yield job, None
            elif error is not None:
                raise error
            else:
                yield job, future.result()
            following = submit()
            if following is not None:
                finished.add(following)
