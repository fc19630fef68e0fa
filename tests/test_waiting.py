"""What a run waits for is told and can be given up; signals are not lost meanwhile."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from voco_jax.errors import InputError
from voco_jax.training import signals, waiting
from voco_jax.training.waiting import (
    Reader,
    StopRequestedError,
    Watch,
    batches_in_step,
    within_grace,
)

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def told(monkeypatch):
    """What a watch says, and the watch; half a minute takes a twentieth of a second here."""
    monkeypatch.setattr(waiting, "FIRST_WORD", 0.05)
    lines = []
    watch = Watch(lambda line: "starting" in line or lines.append(line))
    yield lines, watch
    watch.close()


@pytest.fixture
def stop(monkeypatch):
    """Asks the run to stop."""
    names = []
    monkeypatch.setattr(signals, "received", lambda: names[0] if names else "")
    return names.append


def _until(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def _stream(batches, told):
    return batches_in_step(batches, Reader(), told[1])


def test_batches_come_in_order(told):
    stream = _stream(iter([{"x": 1}, {"x": 2}]), told)
    assert [next(stream), next(stream)] == [{"x": 1}, {"x": 2}]


@pytest.mark.parametrize("error", [InputError("volume 3 is damaged"), OSError("gone"), KeyError(1)])
def test_what_reading_raises_arrives(told, error):
    def fails():
        yield {}
        raise error

    stream = _stream(fails(), told)
    next(stream)
    with pytest.raises(type(error)) as raised:
        next(stream)
    assert raised.value is error


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_read_that_never_returns_is_told_and_left(told, stop, name):
    lines, _ = told
    never = threading.Event()
    stream = _stream((never.wait() for _ in range(1)), told)
    threading.Thread(target=lambda: _until(lambda: len(lines) > 1) or stop(name)).start()
    with pytest.raises(StopRequestedError) as raised:
        next(stream)
    assert str(raised.value) == name
    assert lines[0].startswith("still waiting for input: 0:00:0")
    never.set()


def test_the_files_that_the_data_workers_have_open_are_named(told, monkeypatch, tmp_path):
    """As that of a read from a server that is gone."""
    if not Path("/proc/self/fd").exists():
        pytest.skip("need /proc")
    lines, _ = told
    volume, never = tmp_path / "c.7.0.0.0", threading.Event()
    volume.touch()
    reader = subprocess.Popen(["tail", "-f", volume])
    try:
        _until(
            lambda: str(volume) in map(os.path.realpath, Path(f"/proc/{reader.pid}/fd").iterdir())
        )
        monkeypatch.setattr(multiprocessing, "active_children", lambda: [reader])
        stream = _stream((never.wait() for _ in range(1)), told)
        threading.Thread(target=lambda: next(stream), daemon=True).start()
        _until(lambda: lines)
    finally:
        reader.kill()
        reader.wait()
        never.set()
    where = f"process {reader.pid} with {volume}"
    assert lines[0].startswith(f"still waiting for input of the data workers ({where}): 0:00:0")


def test_a_validation_that_never_ends_is_left_some_time_after_a_signal(stop, monkeypatch):
    monkeypatch.setattr(waiting, "GRACE", 0.1)
    reader, never, asked = Reader(), threading.Event(), threading.Event()
    assert within_grace(lambda: 7, reader) == 7
    with pytest.raises(InputError, match="damaged"):
        within_grace(lambda: (_ for _ in ()).throw(InputError("damaged")), reader)
    threading.Thread(target=lambda: asked.wait() and stop("SIGTERM")).start()
    with pytest.raises(StopRequestedError) as raised:
        within_grace(lambda: asked.set() or never.wait(), reader)
    assert str(raised.value) == "SIGTERM"
    never.set()
    monkeypatch.setattr(waiting, "GRACE", 60)
    assert within_grace(lambda: time.sleep(0.6) or 8, Reader()) == 8  # it ended in time


def test_a_signal_between_two_steps(told, stop):
    stream = _stream(iter([{}, {}]), told)
    next(stream)
    stop("SIGTERM")
    with pytest.raises(StopRequestedError):
        next(stream)


def test_each_kind_of_waiting_is_told_again_and_again_ever_less(told):
    lines, watch = told
    watch.at("saving step 4")
    _until(lambda: len(lines) > 1)
    assert watch._next >= 0.05 + 0.1
    watch.at(lambda: "waiting for the input of process 3")
    _until(lambda: lines[-1].startswith("still waiting for the input of process 3: 0:00:0"))
    assert all(line.startswith("still saving step 4: 0:00:0") for line in lines[:2])
    watch.close()
    count = len(lines)
    time.sleep(0.2)
    assert len(lines) == count


SIGNALS = """
import os, sys, time
from voco_jax.training import signals

def leave(name):
    print("left by", name, flush=True)
    os._exit(75)

signals.listen(leave, lambda: leave("a second one"))
if sys.argv[1] == "later":
    signals.defer()
print("ready", flush=True)
while not signals.received():
    time.sleep(0.01)
print("saved by", signals.received(), flush=True)
signals.ignore()
print("ending", flush=True)
time.sleep(0.2)
os._exit(75)
"""


def _signalled(when, *numbers, **options):
    with subprocess.Popen(
        [sys.executable, "-c", SIGNALS, when],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        **options,
    ) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(numbers[0])
        text = process.stdout.readline()
        for number in numbers[1:]:
            assert process.stdout.readline() == "ending\n"
            process.send_signal(number)
        process.communicate(timeout=60)
    return text.strip(), process.returncode


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_signals_end_at_once_or_wait_to_be_asked_for(number):
    assert _signalled("now", number) == (f"left by {number.name}", 75)
    assert _signalled("later", number, number) == (f"saved by {number.name}", 75)


def test_a_second_ctrl_c_ends_at_once():
    """The first one waits for a step that takes for ever."""
    code = SIGNALS.replace("while not signals.received():", "while True:")
    command = [sys.executable, "-c", code, "later"]
    with subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        assert "Ctrl-C again: at once" in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=60)[0] == "left by a second one\n"


def test_nohup_stays_nohup():
    shell = ["sh", "-c", 'trap "" HUP; exec "$0" -c "$1" now', sys.executable, SIGNALS]
    process = subprocess.Popen(shell, cwd=ROOT, text=True, stdout=subprocess.PIPE)
    with process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGHUP)
        time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        assert process.communicate(timeout=60)[0] == "left by SIGTERM\n"


def test_a_console_that_is_gone_ends_nothing():
    reading, writing = os.pipe()
    os.close(reading)
    code = (
        "import sys; from voco_jax.files import say; say('to nobody'); say('again'); "
        "print('alive', file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, text=True, stdout=writing, stderr=subprocess.PIPE
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "alive\n")
