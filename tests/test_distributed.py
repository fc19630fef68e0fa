"""What processes agree on; that several train, stop and go on is in test_launch.py."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
import types
from pathlib import Path

import jax
import numpy as np
import processes
import pytest

from voco_jax.errors import InputError, InUseError, TransientError
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
    (started,) = processes.start(tmp_path / "run", settings={"data.phantoms": 1000})
    while not (tmp_path / "run" / "logs").exists():
        assert started.poll() is None, started.communicate()[0]
        time.sleep(0.05)
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


@pytest.mark.parametrize("kind", [InputError, TransientError, InUseError])
def test_an_error_is_of_its_kind_on_all_processes(kind, monkeypatch):
    """Launchers go by its status: 2 is never started again."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(distributed, "barrier", lambda: None)
    monkeypatch.setattr(distributed, "gather", lambda mine: np.stack([0 * mine, mine]))

    def fails():
        raise kind("Größe of \udcff")

    with pytest.raises(InputError, match=r"^process 1: Größe of \\udcff$") as raised:
        distributed.run_on_all(fails)
    assert type(raised.value) is kind


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


SEVERAL_PROXIES = {
    "http_proxy": "http://127.0.0.1:9",  # nobody answers there
    "https_proxy": "http://proxy.invalid:3128",
    "grpc_proxy": "http://127.0.0.1:9",
    "all_proxy": "socks5://127.0.0.1:9",
    "no_proxy": "example.com",
}


@pytest.mark.parametrize("flags", [(None, None, None), ("127.0.0.1:1", 1, 0), ("node7", 1, 0)])
def test_one_process_joins_nothing(flags, monkeypatch):
    """So no proxy is asked, and no heartbeat is missed by a run that was stopped for a while."""
    for name, value in SEVERAL_PROXIES.items():
        monkeypatch.setenv(name, value)
    distributed.start(*flags)
    assert distributed.global_state.client is None
    assert distributed.label() == ""
    assert distributed.stop_before(1, lambda seconds: True) == ""


@pytest.mark.parametrize(
    ("coordinator", "before", "after"),
    [
        ("node7:1234", {}, "node7"),
        (
            "10.0.0.1:1234",
            {"no_proxy": "localhost,.example.com"},
            "localhost,.example.com,10.0.0.1",
        ),
        ("[fd00::1]:1234", {"no_grpc_proxy": "a", "no_proxy": "b"}, "a,fd00::1"),
    ],
)
def test_the_coordinator_is_not_behind_a_proxy(coordinator, before, after, monkeypatch):
    for name in ("no_proxy", "no_grpc_proxy"):
        monkeypatch.delenv(name, raising=False)
    for name, value in before.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("no_grpc_proxy", before.get("no_grpc_proxy", ""))  # to be set back
    distributed._go_past_proxies(coordinator)
    assert os.environ[distributed._PAST_PROXY] == after
    assert os.environ.get("no_proxy") == before.get("no_proxy")


class ConfigException(Exception):  # noqa: N818  # Kubernetes' name
    pass


def _kubernetes(load, **environment):
    """In a pod, whose `kubernetes` package does this when it looks for the pod's token."""

    class Client:
        class CoreV1Api:
            def list_namespaced_pod(self, **options):
                raise AssertionError("not reached: there is no namespace file here")

        BatchV1Api = CoreV1Api
        exceptions = type("exceptions", (), {"ApiException": ConfigException})

    package = types.ModuleType("kubernetes")
    package.config = type("config", (), {"load_incluster_config": staticmethod(load)})
    package.client = Client
    return package, {"KUBERNETES_SERVICE_HOST": "127.0.0.1", "HOSTNAME": "localhost"} | environment


def _no_token():
    raise ConfigException("Service token file does not exist.")


@pytest.mark.parametrize(
    ("load", "environment", "message"),
    [
        (_no_token, {}, "ConfigException: Service token file"),
        (Path("/no/such/ca.crt").read_bytes, {}, "FileNotFoundError"),
        (lambda: None, {}, "FileNotFoundError: .*namespace"),  # a token that may not ask more
        (lambda: [][0], {"SLURM_STEP_NUM_TASKS": "1"}, "IndexError"),
    ],
)
def test_a_pod_that_may_not_ask_runs_alone(load, environment, message, monkeypatch, capsys):
    package, variables = _kubernetes(load, **environment)
    monkeypatch.setitem(sys.modules, "kubernetes", package)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    distributed.start(None, None, None)
    assert distributed.global_state.client is None
    said = capsys.readouterr().out
    assert re.search(rf"{message}.*for several give --coordinator, --processes and --proc", said)


@pytest.mark.parametrize(
    "environment", [{"JOB_COMPLETION_INDEX": "0"}, {"JOB_COMPLETION_INDEX": "3"}, {"PMI_SIZE": "4"}]
)
def test_a_pod_of_several_that_may_not_ask_is_told_the_flags(environment, monkeypatch):
    package, variables = _kubernetes(_no_token, **environment)
    monkeypatch.setitem(sys.modules, "kubernetes", package)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=r"ConfigException.*; give --coordinator=HOST:PORT of pr"):
        distributed.start(None, None, None)


def test_one_task_of_slurm_joins_nothing_and_keeps_its_devices(monkeypatch):
    monkeypatch.setenv("JAX_LOCAL_DEVICE_IDS", "2")
    for name, value in (
        ("SLURM_JOB_ID", "7"),
        ("SLURM_STEP_NODELIST", "node7"),
        ("SLURM_NTASKS", "1"),
        ("SLURM_PROCID", "0"),
        ("SLURM_LOCALID", "0"),
    ):
        monkeypatch.setenv(name, value)
    seen = {}
    monkeypatch.setattr(jax.config, "update", seen.__setitem__)
    distributed.start(None, None, None)
    assert distributed.global_state.client is None
    assert (seen["jax_cuda_visible_devices"], seen["jax_rocm_visible_devices"]) == ("2", "2")


STOPPED = """
import os, sys, threading
from voco_jax.training import distributed, signals, waiting
waiting.FIRST_WORD = 0.2  # seconds; users have 30
signals.listen(print, os.abort)
signals.defer()
me = int(sys.argv[2])
distributed.start(sys.argv[1], 2, me)

def batches():
    for number in range(1, 1000):
        if me == 1 and number == 21:
            threading.Event().wait()  # a read that never returns
        yield {"number": number}

watch = waiting.Watch(lambda text: print(text, flush=True))
try:
    for batch in waiting.batches_in_step(batches(), waiting.Reader(), watch):
        taken = batch["number"]
except waiting.StopRequestedError as stop:
    print("stopped", taken, stop, flush=True)
distributed.shutdown()
os._exit(75)
"""


@pytest.mark.parametrize("victim", [0, 1])
def test_while_the_input_of_one_stalls_a_signal_stops_all_before_the_same_step(victim):
    """Past proxies that nobody answers at."""
    address = f"127.0.0.1:{processes.free_port()}"
    started = [_python(STOPPED, address, str(number), **SEVERAL_PROXIES) for number in (0, 1)]
    for line in started[0].stdout:
        if "still waiting for the input of process 1" in line:
            break
    assert started[0].poll() is None
    started[victim].send_signal(signal.SIGHUP)
    first, second = processes.finish(started, timeout=60)
    assert "stopped 20 SIGHUP" in first
    assert "stopped 20 SIGHUP" in second
    assert "still waiting for input: " in second
    assert [process.returncode for process in started] == [75, 75]


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
