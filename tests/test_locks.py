"""Locks of folders: held by one process that lives, on whatever file system."""

import contextlib
import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from voco_jax import locks
from voco_jax.errors import InUseError
from voco_jax.locks import locked, this_process

ROOT = Path(__file__).resolve().parents[1]
HOLD = """
import sys, time
from pathlib import Path
from voco_jax.locks import locked, this_process
with locked(Path(sys.argv[1]), this_process()):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def lock(tmp_path, monkeypatch):
    """A lock's path; a minute takes half a second here."""
    monkeypatch.setattr(locks, "DEAD_SECONDS", 0.5)
    monkeypatch.setattr(locks, "RENEW_SECONDS", 0.05)
    return tmp_path / "run.lock"


@pytest.fixture
def other_machine(lock):
    """Leaves a lock as a process of another machine does that lost its power."""
    owner = json.loads(this_process()) | {"host": "node7", "process": 4711, "machine": "another"}
    lock.write_text(json.dumps(owner | {"time": 0}))
    return lock


def _no_locks(number):
    def flock(descriptor, operation):
        raise OSError(number, os.strerror(number))

    return flock


@contextlib.contextmanager
def _held(path):
    """By a process of its own."""
    command = [sys.executable, "-c", HOLD, path]
    with subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE) as holder:
        try:
            assert holder.stdout.readline() == "held\n"
            yield holder
        finally:
            holder.kill()


def test_a_living_process_is_named(lock):
    with _held(lock) as holder:
        started = time.strftime("%Y-%m-%d %H:")
        for number in (signal.SIGCONT, signal.SIGSTOP):  # running, and frozen
            holder.send_signal(number)
            with (
                pytest.raises(InUseError, match=f"process {holder.pid} on .*, since {started}"),
                locked(lock, this_process()),
            ):
                pass
        assert str(holder.pid) in lock.read_text()


def test_one_that_was_killed_leaves_nothing_behind(lock, capsys):
    with _held(lock) as holder:
        pass
    assert str(holder.pid) in lock.read_text()
    begin = time.monotonic()
    with locked(lock, this_process()):
        assert time.monotonic() - begin < locks.DEAD_SECONDS  # nobody was watched
        assert json.loads(lock.read_text())["process"] == os.getpid()
    assert lock.read_text() == ""
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("has_locks", [True, False])
def test_of_another_machine_the_dead_are_watched_first(
    other_machine, has_locks, capsys, monkeypatch
):
    """A job that SLURM queued again, a pod that was started again: of both the host is another."""
    if not has_locks:
        monkeypatch.setattr(fcntl, "flock", _no_locks(errno.ENOLCK))
    with locked(other_machine, this_process()):
        assert json.loads(other_machine.read_text())["process"] == os.getpid()
    assert "of process 4711 on node7, since 1970-01-01" in capsys.readouterr().out


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_without_locks_of_the_file_system_a_sign_of_life_counts(lock, number, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", _no_locks(number))
    with locked(lock, this_process()):
        owner = lock.read_text()
        with pytest.raises(InUseError, match=rf"process {os.getpid()} on "):
            locked(lock, this_process()).__enter__()
        assert lock.read_text() == owner


def test_of_another_machine_the_living_are_not_overrun(other_machine, monkeypatch):
    """As where flock is this machine's own business: on BeeGFS, or NFS with local_lock."""
    looks = iter(range(10))
    watched = locks._is_renewed

    def watch(path):
        """Its owner renews it at the third look."""
        monkeypatch.setattr(time, "sleep", lambda _: next(looks) == 2 and os.utime(path, (1, 1)))
        return watched(path)

    monkeypatch.setattr(locks, "_is_renewed", watch)
    before = other_machine.read_text()
    with pytest.raises(InUseError, match="process 4711 on node7"):
        locked(other_machine, this_process()).__enter__()
    assert other_machine.read_text() == before


def test_a_server_that_keeps_the_lock_of_the_dead(other_machine, monkeypatch):
    """NFS 3 does, until that machine is back."""
    monkeypatch.setattr(fcntl, "flock", _no_locks(errno.EAGAIN))
    with locked(other_machine, this_process()):
        assert str(os.getpid()) in other_machine.read_text()


def test_who_was_away_and_lost_it_is_told(lock):
    lost = []
    with locked(lock, this_process(), lost=lost.append):
        new = json.dumps(json.loads(this_process()) | {"host": "node8"})
        lock.write_text(new)
        end = time.monotonic() + 10
        while not lost and time.monotonic() < end:
            time.sleep(0.01)
    assert "on node8, since" in lost[0]
    assert lock.read_text() == new  # it is not ours to end


@pytest.mark.parametrize("left", ["", "{}", "not JSON", '{"time": 1e400}'])
def test_what_is_no_owner_does_not_keep_us_out(lock, left):
    lock.write_text(left)
    with locked(lock, this_process()):
        pass


def test_what_cannot_be_written_is_an_os_error(lock, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", _no_locks(errno.EIO))
    with pytest.raises(OSError, match="Input/output error"):
        locked(lock, this_process()).__enter__()
    lock.unlink()
    lock.mkdir()
    with pytest.raises(IsADirectoryError):
        locked(lock, this_process()).__enter__()
