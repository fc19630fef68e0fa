"""What processes agree on; that several train, stop and go on is in test_launch.py."""

import signal
import subprocess
import sys
import time

import numpy as np
import processes
import pytest

from voco_jax.errors import InputError
from voco_jax.training import distributed


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("host:1", 2, None), "give all three"),
        ((None, None, 0), "give all three"),
        (("host:1", 2, 2), "--process_id: found 2, expected 0 to 1"),
    ],
)
def test_contradictory_flags(flags, message):
    with pytest.raises(InputError, match=message):
        distributed.start(*flags)


def test_one_process_agrees_with_itself():
    assert distributed.is_first()
    assert distributed.broadcast("Größe") == "Größe"
    assert distributed.on_first(lambda: "text") == "text"
    np.testing.assert_array_equal(distributed.gather(np.arange(3)), [[0, 1, 2]])
    with pytest.raises(InputError, match="mend it"):
        distributed.everywhere(lambda: (_ for _ in ()).throw(InputError("mend it")))


TWO = """
import os, signal, sys
from voco_jax.training import distributed
distributed.HEARTBEAT_TIMEOUT = 10  # seconds; users have 60
distributed.start(sys.argv[1], 2, int(sys.argv[2]))
assert distributed.broadcast(f"from {sys.argv[2]}") == "from 0"
print("joined", flush=True)
if sys.argv[2] == "1":
    os.kill(os.getpid(), signal.SIGKILL)
distributed.meet()
"""


def test_the_other_ends_soon_when_one_is_killed():
    address = f"127.0.0.1:{processes.free_port()}"
    started = [
        subprocess.Popen(
            [sys.executable, "-c", TWO, address, str(number)],
            cwd=processes.ROOT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for number in (0, 1)
    ]
    assert started[1].wait(timeout=120) == -signal.SIGKILL
    begin = time.monotonic()
    output, lost = processes.finish(started)
    assert time.monotonic() - begin < 60
    assert "joined" in lost
    assert started[0].returncode != 0
    assert "joined" in output
    assert "Terminating process because" in output or "error" in output.lower(), output
