"""What a job may not do to the process that runs it."""

import signal
import subprocess
import sys

from voco_jax.data.workers import within_time


def test_a_job_that_hangs_in_c_code_ends_its_process():
    """A regular expression that backtracks for ever: C code that holds Python's lock."""
    code = (
        "import re, voco_jax.data.workers as workers\n"
        "workers.TIME_LIMIT = 0.2\n"
        "print(workers.within_time(len, 'abc'), flush=True)\n"
        "workers.within_time(re.compile('(a+)+$').match, 'a' * 60 + 'b')"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (ended.stdout, ended.returncode) == ("3\n", -signal.SIGALRM)


def test_the_clock_stops_with_the_job():
    assert within_time(len, "abc") == 3
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_memory_past_a_workers_limit_is_refused_not_taken():
    code = (
        "import numpy, types, voco_jax.data.workers as workers\n"
        "manager = types.SimpleNamespace(memory_limit=2**30)\n"
        "workers.dask_setup(types.SimpleNamespace(memory_manager=manager))\n"
        "numpy.empty(2**28, 'u1')\n"
        "try:\n    numpy.empty(2**30, 'u1')\nexcept MemoryError:\n    print('refused')"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert ended.stdout == "refused\n"
