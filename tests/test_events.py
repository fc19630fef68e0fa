"""events.jsonl: what a run writes of itself, and how often of what is amiss."""

import dataclasses
import datetime
import errno
import json
from pathlib import Path

import numpy as np
import pytest
import toy_task
from test_loop import stop_after
from toy_main import Toy, get_config

from voco_jax.config import load
from voco_jax.errors import InputError
from voco_jax.training import distributed, loop
from voco_jax.training.events import AGAIN, Events
from voco_jax.training.health import Finding
from voco_jax.training.task import Method, Task

FINDING = Finding("flat", "it does not move: 0.5", "a larger optimizer.learning_rate")


def run(workdir, change=lambda task: task, **settings):
    """The toy's run, of 40 steps with validations at 10, 20, 30 and 40."""
    values = get_config()
    values["run"] |= settings

    def make_task(*args, **options):
        return change(toy_task.make_task(*args, **options))

    method = Method(make_program=toy_task.make_program, make_task=make_task)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(load.EXPERIMENTS, "toy", Toy)
        loop.run(load.parse(values), workdir, method)


def events(workdir):
    return [json.loads(line) for line in (workdir / "events.jsonl").read_text("utf-8").splitlines()]


def kinds(workdir):
    return [(row["step"], row["event"], row.get("kind")) for row in events(workdir)]


def test_started_stopped_resumed_failed_finished(tmp_path):
    def broken(task):
        return dataclasses.replace(task, finish=lambda state: 1 / 0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, "stop_before", stop_after(11))
        with pytest.raises(loop.PreemptedError):
            run(tmp_path)
    with pytest.raises(ZeroDivisionError):
        run(tmp_path, broken)
    run(tmp_path)
    rows = events(tmp_path)
    assert [(row["step"], row["event"]) for row in rows] == [
        (0, "started"),
        (11, "stopped"),
        (11, "resumed"),
        (40, "failed"),
        (40, "finished"),
    ]
    assert "preempted (SIGTERM); saved step 11" in rows[1]["reason"]
    assert rows[3]["reason"] == "division by zero"
    times = [datetime.datetime.fromisoformat(row["time"]) for row in rows]
    assert times == sorted(times)
    now = datetime.datetime.now(datetime.UTC)
    assert abs(now - times[-1]) < datetime.timedelta(minutes=5)


def test_a_task_that_cannot_be_made_and_ctrl_c_while_it_is(tmp_path):
    def refuse(task):
        raise InputError("data: none")

    def interrupt(task):
        raise KeyboardInterrupt

    with pytest.raises(InputError):
        run(tmp_path, refuse)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, interrupt)
    found = [(row["step"], row["event"], row["reason"]) for row in events(tmp_path)]
    assert found == [(0, "failed", "data: none"), (0, "stopped", "interrupted")]


def test_a_loss_that_is_no_number_is_found_before_the_run_fails(tmp_path):
    def poison(task: Task):
        def batches(step):
            for number, batch in enumerate(task.batches(step), start=1):
                yield {"crops": batch["crops"] * (np.nan if number == 3 else 1)}

        return dataclasses.replace(task, batches=batches)

    with pytest.raises(loop.DivergedError):
        run(tmp_path, poison)
    assert [event for _, event, _ in kinds(tmp_path)] == ["started", "finding", "failed"]
    finding = events(tmp_path)[1]
    assert (finding["kind"], finding["source"]) == ("rate_too_high", "training")
    assert finding["text"] == "step 3: loss is not finite"
    assert "optimizer.learning_rate" in finding["advice"]


def test_what_a_validation_finds_and_keeps(tmp_path, capsys):
    def change(task):
        def validate(state, step):
            arrays = {"embeddings": {"step": np.array(step), "names": np.array(["a", "b"])}}
            findings = (FINDING,) if step in (10, 20) else ()
            return dataclasses.replace(task.validate(state, step), findings=findings, arrays=arrays)

        few = Finding("few_volumes", "1 volume", "more volumes")
        return dataclasses.replace(task, validate=validate, findings=(few,))

    run(tmp_path, change)
    assert kinds(tmp_path) == [
        (0, "started", None),
        (0, "finding", "few_volumes"),
        (10, "finding", "flat"),
        (30, "resolved", "flat"),
        (40, "finished", None),
    ]
    said = capsys.readouterr().out
    told = "WARNING flat: it does not move: 0.5. Try: a larger optimizer.learning_rate"
    assert said.count(told) == said.count("no longer flat") == 1
    with np.load(tmp_path / "embeddings.npz") as found:
        assert (int(found["step"]), found["names"].tolist()) == (40, ["a", "b"])
    assert not list(tmp_path.glob("*.part"))


@pytest.fixture
def clock():
    class Clock:
        now = 1e9

        def __call__(self):
            return self.now

    return Clock()


def test_a_finding_is_written_when_new_and_once_in_a_while(tmp_path, clock):
    found = Events(tmp_path, clock=clock)
    other = dataclasses.replace(FINDING, text="it does not move: 0.4")
    for step, minutes, findings, lines in (
        (1, 0, [FINDING], [str(FINDING)]),
        (2, 10, [other], []),  # not again so soon
        (3, 70, [other], [str(other)]),
        (4, 71, [], ["no longer flat"]),
        (5, 72, [], []),
        (6, 73, [FINDING], []),  # nor because it comes and goes,
        (7, 74, [], []),  # of which the console says nothing
        (8, 75, [FINDING], []),
        (9, 131, [FINDING], [str(FINDING)]),
        (10, 136, [FINDING], []),
        (11, 137, [], ["no longer flat"]),
    ):
        found.step, clock.now = step, 1e9 + 60 * minutes
        assert found.found("training", findings) == lines, step
        assert found.open == {one.kind for one in findings}, step
        assert Events(tmp_path, clock=clock).open == found.open, step
    assert kinds(tmp_path) == [
        (1, "finding", "flat"),
        (3, "finding", "flat"),
        (4, "resolved", "flat"),
        (6, "finding", "flat"),
        (7, "resolved", "flat"),
        (8, "finding", "flat"),
        (10, "finding", "flat"),
        (11, "resolved", "flat"),
    ]


def test_each_source_has_its_own(tmp_path, clock):
    found = Events(tmp_path, clock=clock)
    found.found("validation", [FINDING])
    assert found.found("training", [FINDING]) == []
    assert found.found("training", []) == []
    assert found.open == {"flat"}
    assert found.found("validation", []) == ["no longer flat"]
    assert found.open == set()


def test_the_next_process_goes_on_from_the_file(tmp_path, clock):
    Events(tmp_path, clock=clock).found("training", [FINDING])
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write('[1]\n{"event": "finding"}\n{"time": "20')  # others' lines, one cut off
    clock.now += AGAIN / 2
    again = Events(tmp_path, step=7, clock=clock)
    assert again.open == {"flat"}
    assert again.found("training", [FINDING]) == [str(FINDING)]  # its console knows nothing yet
    assert again.found("training", [FINDING]) == []
    again.write("resumed")
    lines = (tmp_path / "events.jsonl").read_text("utf-8").splitlines()
    assert len(lines) == 5
    assert json.loads(lines[-1])["event"] == "resumed"
    clock.now += AGAIN
    again.found("training", [FINDING])
    assert len((tmp_path / "events.jsonl").read_text("utf-8").splitlines()) == 6


def test_the_other_processes_hear_of_a_file_that_cannot_be_read(tmp_path, monkeypatch):
    (tmp_path / "events.jsonl").mkdir()
    heard = []

    def on_all(function):
        try:
            return distributed.run_on_all(function)
        except InputError as error:
            heard.append(str(error))
            raise

    monkeypatch.setattr(loop, "run_on_all", on_all)
    with pytest.raises(InputError, match=r"events\.jsonl"):
        run(tmp_path)
    assert len(heard) == 1


def test_other_processes_write_and_tell_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = Events(None)
    found.write("started")
    assert found.found("training", [FINDING]) == []
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_an_error_in_words(tmp_path, monkeypatch):
    found = Events(tmp_path)

    def fails(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "open", fails)
    with pytest.raises(InputError, match=r"events\.jsonl: cannot be written .*free space"):
        found.write("started")
