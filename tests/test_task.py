"""A second task through the same loop and the same main.py: nothing under training/ knows it."""

import itertools
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
IN_USE, PREEMPTED, INTERRUPTED = 4, 75, 130


def _start(workdir, *flags, terminal=None):
    """With a terminal: in a session of its own, as after a login, where closing it is SIGHUP."""
    script = "tests/toy_main.py"
    command = [sys.executable, script, f"--config={script}", f"--workdir={workdir}", *flags]
    if terminal:
        command = ["sh", "-c", 'exec "$@" <>"$0" >&0 2>&0', terminal, *command]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": "."},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=bool(terminal),
    )


def _finish(process, status=0):
    output = process.communicate(timeout=120)[0]
    assert process.returncode == status, output
    return output


def _rows(workdir):
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return {
        (row["step"], name): row[name]
        for row in map(json.loads, lines)
        for name in ("loss", "validation/error")
        if name in row
    }


def _wait_for(workdir, step, process):
    for _ in itertools.takewhile(lambda _: process.poll() is None, itertools.count()):
        if (workdir / "checkpoints" / str(step)).exists():
            return
        time.sleep(0.01)
    pytest.fail(process.communicate()[0])


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("toy") / "unbroken"
    output = _finish(_start(workdir))
    assert "validation at step 40: error" in output
    assert "wrote w.npy" in output
    assert f"report: {workdir}/report.html" in output
    assert ">finished</span>" in (workdir / "report.html").read_text("utf-8")
    return workdir


def test_it_learns_and_validates(unbroken):
    rows = _rows(unbroken)
    assert sorted(step for step, name in rows if name == "loss") == list(range(1, 41))
    errors = [rows[step, "validation/error"] for step in (10, 20, 30, 40)]
    assert errors[-1] < errors[0] / 2
    saved = sorted(int(f.name) for f in (unbroken / "checkpoints").iterdir())
    best = 10 * (1 + int(np.argmin(errors)))
    assert saved == sorted({best, 35, 40})


def test_killed_frozen_hung_up_and_interrupted_it_goes_on_bit_for_bit(unbroken, tmp_path):
    workdir = tmp_path / "broken"
    killed = _start(workdir)
    _wait_for(workdir, 5, killed)
    killed.kill()
    killed.communicate()

    terminal, inside = pty.openpty()
    preempted = _start(workdir, terminal=os.ttyname(inside))
    _wait_for(workdir, 15, preempted)
    preempted.send_signal(signal.SIGSTOP)  # while it is frozen, too, the workdir is its own
    double = _finish(_start(workdir), IN_USE)
    assert f"broken: another run is at work in it (process {preempted.pid} on " in double
    preempted.send_signal(signal.SIGCONT)
    os.close(inside)
    os.close(terminal)
    _finish(preempted, PREEMPTED)
    log = (workdir / "logs" / "process_0.log").read_text()
    assert "resuming at step" in log
    assert "preempted (SIGHUP); saved step" in log

    interrupted = _start(workdir)
    _wait_for(workdir, 25, interrupted)
    interrupted.send_signal(signal.SIGINT)
    output = _finish(interrupted, INTERRUPTED)
    step = int(re.search(r"interrupted: ends after this step(?s:.*)saved step (\d+)", output)[1])
    last = max(step for step, name in _rows(workdir) if name == "loss")
    assert step in (last, last + 1)  # the last finished step, not only every fifth

    assert "resuming at step" in _finish(_start(workdir))
    assert _rows(workdir) == _rows(unbroken)
    np.testing.assert_array_equal(np.load(workdir / "w.npy"), np.load(unbroken / "w.npy"))


def test_its_settings_are_its_own(unbroken):
    output = _finish(_start(unbroken, "--config.seed=1"), 2)
    assert "holds another experiment; seed: 0 -> 1" in output
    output = _finish(_start(unbroken, "--config.model.remat=True"), 2)
    assert "error: config: model.remat: no such field" in output
    assert "nothing left to train" in _finish(_start(unbroken, "--config.run.log_every_steps=3"))
