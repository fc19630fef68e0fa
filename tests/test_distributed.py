"""What processes agree on; that several train, stop and go on is in test_launch.py."""

import os
import signal
import socket
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
        (("host", 2, 0), "--coordinator: found 'host', expected HOST:PORT"),
    ],
)
def test_contradictory_flags(flags, message):
    with pytest.raises(InputError, match=message):
        distributed.start(*flags)


def test_a_port_that_is_taken():
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(InputError, match=f"cannot listen on port {port} .*another port"):
            distributed.start(f"127.0.0.1:{port}", 2, 0)


ALONE = """
import sys
from voco_jax.training import distributed
distributed.JOIN_TIMEOUT = 3  # seconds; users have an hour
distributed.start(sys.argv[1], 2, int(sys.argv[2]))
"""


def _python(code, *arguments, **environment):
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        cwd=processes.ROOT,
        env={**os.environ, **environment},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def test_who_waits_for_the_others_in_vain_says_for_whom():
    first, second = f"127.0.0.1:{processes.free_port()}", f"127.0.0.1:{processes.free_port()}"
    started = [_python(ALONE, first, "0"), _python(ALONE, second, "1")]
    for number, output in enumerate(processes.finish(started, timeout=120)):
        where = (first, second)[number]
        expected = f"error: --coordinator: joining: process {number} of 2 at {where}, not all are"
        assert expected in output
        assert "Fatal" not in output
    assert [process.returncode for process in started] == [1, 1]


def test_one_of_several_that_jax_does_not_detect():
    code = "from voco_jax.training import distributed; distributed.start(None, None, None)"
    started = _python(code, OMPI_COMM_WORLD_SIZE="2", OMPI_COMM_WORLD_RANK="1")
    (output,) = processes.finish([started])
    assert "InputError: --coordinator: this seems to be one of several processes" in output


@pytest.mark.parametrize(
    ("number", "status", "words"),
    [(signal.SIGTERM, 75, "preempted (SIGTERM)"), (signal.SIGINT, 130, "interrupted")],
)
def test_a_signal_before_the_first_step_ends_at_once(tmp_path, number, status, words):
    # What runs in the background of a script ignores Ctrl-C, and so does what it starts.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    (started,) = processes.start(tmp_path / "run", settings={"data.phantoms": 1000})
    while not (tmp_path / "run" / "logs").exists():
        assert started.poll() is None, started.communicate()[0]
        time.sleep(0.05)
    signal.signal(signal.SIGINT, before)
    started.send_signal(number)
    begin = time.monotonic()
    (output,) = processes.finish([started])
    assert started.returncode == status
    assert f"{words} before the first step" in output
    assert time.monotonic() - begin < 30


def test_a_batch_that_does_not_split_is_one_line(tmp_path):
    settings = {"batch_size": 1}
    (started,) = processes.start(tmp_path / "run", devices=2, settings=settings)
    (output,) = processes.finish([started])
    assert started.returncode == 2
    assert "error: batch_size: found 1 volumes for 2 devices, expected a multiple of 2" in output
    assert not (tmp_path / "run").exists()


def test_one_process_agrees_with_itself():
    assert distributed.is_process_0()
    assert distributed.broadcast("Größe") == "Größe"
    assert distributed.run_on_process_0(lambda: "text") == "text"
    np.testing.assert_array_equal(distributed.gather(np.arange(3)), [[0, 1, 2]])
    with pytest.raises(InputError, match="mend it"):
        distributed.run_on_all(lambda: (_ for _ in ()).throw(InputError("mend it")))


@pytest.mark.parametrize(
    ("coordinator", "address"),
    [
        ("127.0.0.1:55527", "127.0.0.1:55527"),
        ("127.0.1.1:1", "127.0.1.1:1"),
        ("localhost:55527", "localhost:55527"),
        ("[::1]:55527", "[::1]:55527"),
        ("10.0.0.1:55527", None),
        ("0.0.0.0:55527", None),
        ("[fd00::2]:55527", None),
        ("voco-workers-0-0.voco:55527", None),
        ("127.example.com:55527", None),
    ],
)
def test_one_machines_coordinator_listens_on_loopback(coordinator, address):
    assert distributed._bind_address(coordinator) == address


TWO = """
import os, psutil, signal, sys
from voco_jax.training import distributed
distributed.HEARTBEAT_TIMEOUT = 10  # seconds; users have 60
distributed.start(sys.argv[1], 2, int(sys.argv[2]))
assert distributed.broadcast(f"from {sys.argv[2]}") == "from 0"
port = int(sys.argv[1].rpartition(":")[2])
listening = [c.laddr for c in psutil.Process().net_connections() if c.status == psutil.CONN_LISTEN]
addresses = {ip.removeprefix("::ffff:") for ip, number in listening if number == port}
print("joined, listens on", *addresses, flush=True)
if sys.argv[2] == "1":
    os.kill(os.getpid(), signal.SIGKILL)
distributed.barrier()
"""


def test_the_other_ends_soon_when_one_is_killed():
    address = f"127.0.0.1:{processes.free_port()}"
    started = [_python(TWO, address, str(number)) for number in (0, 1)]
    assert started[1].wait(timeout=120) == -signal.SIGKILL
    begin = time.monotonic()
    output, lost = processes.finish(started)
    assert time.monotonic() - begin < 60
    assert "joined" in lost
    assert started[0].returncode != 0
    assert "joined, listens on 127.0.0.1\n" in output
    assert "Terminating process because" in output or "error" in output.lower(), output
    assert "AttributeError" not in output
