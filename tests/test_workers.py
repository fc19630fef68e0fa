"""Dask: what listens where, an existing cluster, and workers that die."""

import dataclasses
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import dask
import nibabel
import numpy as np
import psutil
import pytest
from chains import CHAIN_10K
from dask.distributed import LocalCluster, Security

import voco_jax
from voco_jax.data import workers as workers_module
from voco_jax.data.cache import Cache, CacheWriter, chunk_file
from voco_jax.data.collect import scan
from voco_jax.data.jobs import SeesCache
from voco_jax.data.manifest import token_of
from voco_jax.data.prepare import main, prepare
from voco_jax.data.workers import cluster_workers, local_workers, run_jobs, within_time
from voco_jax.errors import InputError

CHAIN = dataclasses.replace(CHAIN_10K, volume_size=(24, 24, 16))
TLS = "distributed.comm.tls"


@pytest.fixture(scope="module")
def logged():
    """What reaches a handler of the root logger, as absl gives it one in training."""
    records = []
    handler = logging.Handler()
    handler.emit = records.append
    logging.getLogger().addHandler(handler)
    yield records
    logging.getLogger().removeHandler(handler)


@pytest.fixture(scope="module")
def client(logged):
    """Two local workers; a cluster that runs already, for those who connect to its scheduler.

    Dask's settings hold its certificates, as those of a user would.
    """
    dask_logger = logging.getLogger("distributed")
    dask_logger.propagate, before = True, dask_logger.propagate  # as where Dask is imported later
    with local_workers(2) as client, dask.config.set(certificates(client.security)):
        yield client
    dask_logger.propagate = before


def test_dask_starts_without_a_word(client, logged):
    assert [record.getMessage() for record in logged if record.name.startswith("dist")] == []


def certificates(security):
    """The settings with which a client of this machine's user connects."""
    return {
        f"{TLS}.ca-file": security.tls_ca_file,
        f"{TLS}.client.cert": security.tls_client_cert,
        f"{TLS}.client.key": security.tls_client_key,
    }


@pytest.fixture
def data(tmp_path):
    """Forty links to one volume that takes some 20 ms."""
    folder = tmp_path / "data"
    folder.mkdir()
    hu = np.full((96, 96, 60), -1000, np.int16)
    hu[9:-9, 9:-9, 5:-5] = np.random.default_rng(0).integers(0, 200, (78, 78, 50))
    nibabel.save(nibabel.Nifti1Image(hu, np.diag([2, 2, 3, 1])), folder / "00.nii.gz")
    for index in range(1, 40):
        os.link(folder / "00.nii.gz", folder / f"{index:02d}.nii.gz")
    return folder


def address(client):
    return client.scheduler.address


def pids(client):
    return sorted(client.run(os.getpid).values())


def test_another_user_cannot_get_in(client, tmp_path):
    """A scheduler without certificates and a socket for all are tried, too: there all works."""
    if os.getuid() != 0:
        pytest.skip("need root, to become another user")
    secret = tmp_path / "secret"
    secret.write_text("secret")
    secret.chmod(0o600)
    script = Path(__file__).with_name("other_user.py")
    pages = {"distributed.scheduler.http.routes": ["distributed.http.scheduler.json"]}
    with (
        dask.config.set(pages),  # as Dask has it
        LocalCluster(n_workers=0, protocol="tcp", dashboard_address="127.0.0.1:0") as cluster,
        socket.socket(socket.AF_UNIX) as listening,
    ):
        listening.bind(f"\0{tmp_path}")
        listening.listen()
        dask_port = cluster.scheduler_address.removeprefix("tcp://")
        web_port = f"127.0.0.1:{cluster.scheduler.http_server.port}"
        done = subprocess.run(
            [sys.executable, script, secret, str(os.getpid())], capture_output=True, text=True
        )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    tried = {line.split()[1] for line in lines if line.startswith("tried: ")}
    assert sorted(set(lines) - {f"tried: {door}" for door in tried}) == [
        f"code: {dask_port} run_function without TLS",
        f"page: {web_port} json/counts.json",
        f"page: {web_port} status",
        f"socket: @{tmp_path}",
    ]
    # Scheduler and workers, each with a web server, and nannies.
    assert len(tried) == 3 + 8
    assert {door.rpartition(":")[0] for door in tried} == {"", "127.0.0.1"}


def test_a_worker_killed_in_the_middle_of_a_cluster(client, data, tmp_path, capsys):
    """The cache is complete and verified; a flipped bit is found, and repaired by a rerun."""
    cache = tmp_path / "cache"

    def kill():
        manifest = cache / "manifest.jsonl"
        while not manifest.exists() or manifest.read_bytes().count(b"\n") < 5:
            time.sleep(0.002)
        os.kill(victim, signal.SIGKILL)

    victim = pids(client)[0]
    killer = threading.Thread(target=kill)
    killer.start()
    flags = ["--scheduler", address(client), "--cache", str(cache)]
    arguments = [*flags, "--scan", str(data), "--size", "24", "24", "16", "--strict"]
    assert main(arguments) == 0
    killer.join()
    assert not psutil.pid_exists(victim)
    assert "40 prepared now, 0 already there, 0 failed" in capsys.readouterr().out
    assert main([*flags, "--verify"]) == 0
    assert "40 volumes intact, 0 not" in capsys.readouterr().out

    entry = Cache.open(cache, CHAIN).entries[7]
    with open(chunk_file(str(cache), entry.slot), "r+b") as file:
        file.seek(1000)
        (byte,) = file.read(1)
        file.seek(1000)
        file.write(bytes([byte ^ 4]))
    assert main([*flags, "--verify"]) == 1
    assert f"{entry.id}: " in capsys.readouterr().out
    assert main(arguments) == 0
    assert "1 prepared now, 39 already there, 0 failed" in capsys.readouterr().out
    assert main([*flags, "--verify"]) == 0


def die_of_two(job):
    number, folder = job
    if number == 2:
        (folder / f"{time.monotonic_ns()}").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return number * 10


def allowed(dask_scheduler):
    return dask_scheduler.allowed_failures


def nothing_wrong():
    return ""


def test_three_deaths_on_a_cluster_are_a_failure(client, tmp_path):
    client.run_on_scheduler(allow, number=7)
    with cluster_workers(address(client), nothing_wrong, print) as connected:
        jobs = [(number, tmp_path) for number in range(5)]
        found = {job[0]: result for job, result in run_jobs(connected, die_of_two, jobs)}
    assert found == {0: 0, 1: 10, 2: None, 3: 30, 4: 40}
    assert len(list(tmp_path.iterdir())) == 3
    assert client.run_on_scheduler(allowed) == 7  # as it was


def allow(number, dask_scheduler):
    dask_scheduler.allowed_failures = number


def test_workers_that_cannot_be_used(client, tmp_path, monkeypatch):
    client.wait_for_workers(2, timeout=30)
    with CacheWriter(tmp_path / "cache", CHAIN) as writer:
        right = SeesCache(writer.path, token_of(writer.owner))
        with cluster_workers(address(client), right, print):
            pass
        assert sorted(os.listdir(writer.path)) == [
            "cache.json",
            "manifest.jsonl",
            "prepare.lock",
            "volumes",
        ]
        wrong = dataclasses.replace(right, cache=str(tmp_path / "elsewhere"))
        for check in (wrong, dataclasses.replace(right, token="another")):
            with (
                pytest.raises(
                    InputError, match=r"2 of 2 workers cannot be used; tls.*does not see"
                ),
                cluster_workers(address(client), check, print),
            ):
                pass
        monkeypatch.setattr(voco_jax, "__version__", "0.0.0")
        with (
            pytest.raises(InputError, match=r"it has voco_jax .*, expected voco_jax 0\.0\.0"),
            cluster_workers(address(client), right, print),
        ):
            pass


def test_a_worker_without_this_project(client, tmp_path):
    bare = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    pem = tmp_path / "dask.pem"
    pem.write_text(client.security.tls_worker_key + client.security.tls_worker_cert)
    worker = subprocess.Popen(
        [
            *(sys.executable, "-m", "distributed.cli.dask_worker", address(client)),
            *("--no-nanny", "--nthreads", "1", "--no-dashboard", "--host", "127.0.0.1"),
            *("--protocol", "tls", "--tls-ca-file", pem, "--tls-cert", pem),
        ],
        cwd=tmp_path,
        env=bare,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        client.wait_for_workers(3, timeout=60)
        with (
            pytest.raises(InputError, match=r"1 of 3 .* cannot import this project .*install it"),
            cluster_workers(address(client), nothing_wrong, print),
        ):
            pass
    finally:
        worker.kill()
        worker.wait()


def test_no_scheduler(tmp_path, data, monkeypatch):
    monkeypatch.setattr(workers_module, "CONNECT_SECONDS", 0.2)
    with pytest.raises(InputError, match=r"no Dask scheduler answers at 'tcp://127\.0\.0\.1:1'"):
        prepare(scan(data), tmp_path / "c", CHAIN, scheduler="tcp://127.0.0.1:1", progress=False)


@pytest.fixture(scope="module")
def pem_files(tmp_path_factory):
    """A certificate with its key in one file, without it, the key of another, an empty file."""
    folder = tmp_path_factory.mktemp("pem")
    made, other = Security.temporary(), Security.temporary()
    texts = {
        "whole": made.tls_client_key + made.tls_client_cert,
        "no_key": made.tls_client_cert,
        "other_key": other.tls_client_key,
        "empty": "",
    }
    for name, text in texts.items():
        (folder / f"{name}.pem").write_text(text)
    return folder


@pytest.mark.parametrize(
    ("named", "reason"),
    [
        ({}, f"not all are set.* {TLS}.ca-file None, {TLS}.client.cert None"),
        ({"ca-file": "whole"}, f"not all are set.*{TLS}.client.cert None"),
        ({"client.cert": "whole"}, f"not all are set.*{TLS}.ca-file None"),
        ({"ca-file": "whole", "client.cert": "none"}, r"No such file.*client.cert .*none\.pem"),
        ({"ca-file": "empty", "client.cert": "whole"}, r"no certificate .*ca-file .*empty\.pem"),
        ({"ca-file": "whole", "client.cert": "no_key"}, r"PEM.*client.cert .*no_key\.pem"),
        (
            {"ca-file": "whole", "client.cert": "whole", "client.key": "other_key"},
            r"KEY_VALUES_MISMATCH.*client.key .*other_key\.pem",
        ),
    ],
)
def test_certificates_that_cannot_be_shown(pem_files, named, reason):
    settings = {f"{TLS}.{field}": str(pem_files / f"{name}.pem") for field, name in named.items()}
    none = dict.fromkeys((f"{TLS}.ca-file", f"{TLS}.client.cert", f"{TLS}.client.key"))
    with (
        dask.config.set(none | settings),
        pytest.raises(InputError, match=f"^--scheduler tls://127.0.0.1:1: .*{reason}"),
        cluster_workers("tls://127.0.0.1:1", nothing_wrong, print),
    ):
        pass


def test_a_key_is_never_printed():
    made = Security.temporary()
    settings = certificates(made) | {f"{TLS}.client.cert": made.tls_client_key}
    with (
        dask.config.set(settings),
        pytest.raises(InputError, match="no certificates to show") as raised,
        cluster_workers("tls://127.0.0.1:1", nothing_wrong, print),
    ):
        pass
    assert not [line for line in made.tls_client_key.split("\n")[1:-2] if line in str(raised.value)]


def test_another_clusters_certificates(client):
    with (
        dask.config.set(certificates(Security.temporary())),
        pytest.raises(InputError, match=r"no Dask scheduler answers .*certificate does not match"),
        cluster_workers(address(client), nothing_wrong, print),
    ):
        pass


@pytest.mark.parametrize("port", ["tcp://127.0.0.1:1", "ws://127.0.0.1:1", "127.0.0.1:1"])
def test_a_scheduler_without_tls_is_warned_of_once(port, monkeypatch):
    monkeypatch.setattr(workers_module, "CONNECT_SECONDS", 0.2)
    lines = []
    for _ in range(2):
        with (
            pytest.raises(InputError, match="no Dask scheduler answers"),
            cluster_workers(port, nothing_wrong, lines.append),
        ):
            pass
    (line,) = lines
    assert line.startswith(f"warning: --scheduler {port}: without TLS anyone who reaches this port")


def test_a_scheduler_without_tls_where_dask_is_told_to_encrypt():
    with (
        dask.config.set({"distributed.comm.require-encryption": True}),
        pytest.raises(InputError, match=r"found tcp://127\.0\.0\.1:2, expected tls://HOST:PORT"),
        cluster_workers("tcp://127.0.0.1:2", nothing_wrong, print),
    ):
        pass


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


def test_a_scheduler_that_is_gone_is_one_line(client):
    """Dask cancels what it waits for when it loses its scheduler."""

    def cancelled(*arguments, **options):
        future = client.submit(time.sleep, 60, pure=False)
        future.cancel()
        return future

    class Lost:
        nthreads = staticmethod(lambda: {"worker": 1})
        submit = staticmethod(cancelled)

    with pytest.raises(InputError, match=r"the Dask scheduler is gone; what is prepared is kept"):
        list(run_jobs(Lost(), len, ["abc"]))
