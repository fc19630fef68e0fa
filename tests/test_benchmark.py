"""voco_jax/benchmark: its arithmetic by closed forms, and each part once, as small as can be."""

import dataclasses
import itertools
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from configs import tiny
from voco_jax.benchmark import command, end_to_end, measure, pipeline, preparing, step
from voco_jax.benchmark.volumes import files_of, first_volumes, opened
from voco_jax.config.load import parse
from voco_jax.errors import InputError
from voco_jax.interop.names import to_torch
from voco_jax.plan.estimate import model_flops

ROOT = Path(__file__).resolve().parents[1]
CONFIG = parse(tiny.get_config())  # unchanged: other tests compile the same step


def test_spread_of_eleven_numbers():
    found = measure.spread(range(10, -1, -1))
    assert found == measure.Spread(median=5.0, low=1.0, high=9.0, count=11)
    assert measure.spread([3.0]) == measure.Spread(3.0, 3.0, 3.0, 1)


def test_utilisation_by_hand():
    # 11.9 TFLOP in 100 ms on a device that reaches 700 TFLOP/s: 17 ms were needed.
    assert measure.utilisation(11.9e12, 0.1, 700e12) == pytest.approx(0.17)


def test_calls_are_timed_with_one_queued(monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr(measure.time, "perf_counter", lambda: next(clock) ** 2)
    events, numbers = [], itertools.count()

    def call():
        events.append("call")
        return next(numbers)

    seconds = measure.time_calls(call, lambda number: events.append(number), 1, 3)
    assert events == ["call", 0, "call", "call", 1, "call", 2, 3]
    assert seconds == [1, 3, 5]


def test_table_is_markdown():
    assert measure.table(("a", "long head"), [("1", "2"), ("three", "4")]) == (
        "| a     | long head |\n| ----- | --------: |\n| 1     |         2 |\n| three |         4 |"
    )


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "-"), (0.01234, "12.3 ms"), (1.5, "1.5 s"), (351.4, "351 s"), (2e-5, "0.02 ms")],
)
def test_times_for_people(seconds, text):
    assert measure.seconds_text(seconds) == text


def test_variants_are_parsed():
    found = command.parse_variants(["lax: model.convolution=lax crops.grid=(3,3,1)", "b:seed=1"])
    assert found == {
        command.BASE: {},
        "lax": {"model.convolution": "lax", "crops.grid": "(3,3,1)"},
        "b": {"seed": "1"},
    }
    assert command.sizes("2,4,8") == [2, 4, 8]


@pytest.mark.parametrize(
    ("variants", "message"),
    [
        (["model.remat=True"], "expected another NAME"),
        (["a: model.remat"], "expected another NAME"),
        (["a: crops.grid=(3, 3, 1)"], "without spaces"),
        (["a: seed=1", "a: seed=2"], "expected another NAME"),
    ],
)
def test_wrong_variants_are_named(variants, message):
    with pytest.raises(InputError, match=message):
        command.parse_variants(variants)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["step", "--config", "no.py"], "no.py: no such config file"),
        (["pipeline", "--config", "configs/voco_10k.py"], "no such folder"),
        (["end_to_end", "--config", "configs/demo.py", "--config.data.phantoms=0"], "--phantoms"),
        (["prepare", "--config", "configs/demo.py"], "name files or folders with --ct"),
        (["step", "--config", "configs/demo.py", "--spets=3"], "found '--spets=3'"),
        (["step", "--config", "configs/demo.py", "--json", "no/x.json"], "no such folder"),
        (
            ["step", "--config", "configs/demo.py", "--config.data.sources.no.weight=2"],
            "data.sources.no.weight: no such field, did you mean data.sources.ct.weight",
        ),
        (
            ["step", "--config", "configs/demo.py", "--variant", "a: model.remet=True"],
            "did you mean model.remat",
        ),
    ],
)
def test_bad_input_is_one_line_and_status_2(capsys, arguments, message):
    assert command.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("part", ["step", "pipeline", "prepare", "end_to_end"])
def test_help_of_each_part_has_an_example(capsys, part):
    with pytest.raises(SystemExit) as ended:
        command.main([part, "--help"])
    assert ended.value.code == 0
    assert f"python -m voco_jax.benchmark {part} --config configs/" in capsys.readouterr().out


def test_processes_of_their_own_answer_fail_and_die():
    assert measure.in_own_process(os.getppid) == os.getpid()
    with pytest.raises(measure.ChildError, match="ValueError: math domain error"):
        measure.in_own_process(math.sqrt, -1)
    with pytest.raises(measure.ChildError, match=r"killed, as a rule out of memory"):
        measure.in_own_process(signal.raise_signal, signal.SIGKILL)
    with pytest.raises(measure.ChildError, match="stopped after 0 s"):
        measure.in_own_process_within(0.01, signal.pause)


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (MemoryError(), "out of memory"),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory\nallocating"), "out of memory"),
        (ValueError("two\nlines"), "ValueError: two lines"),
    ],
)
def test_errors_are_one_line(error, text):
    assert measure.reason(error) == text


def test_memory_is_that_of_this_process():
    """In a process where nothing else takes or frees any, as what other tests have left does."""
    code = """
import numpy as np
from voco_jax.benchmark import measure
before = measure.resident()
block = np.ones(2**25)  # 256 MiB
print(measure.resident() - before, measure.peak_resident())
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    taken, peak = map(int, done.stdout.split())
    assert taken == pytest.approx(2**28, rel=0.05)
    assert peak >= 2**28


@pytest.fixture(scope="module")
def volumes():
    with opened(parse(tiny.get_config()), 3) as parts:
        yield parts


def test_stages_and_stream_of_a_cache(volumes):
    (part,) = some = first_volumes(volumes, 2)
    assert len(part.entries) == 2
    found = pipeline.measure_stages(some, CONFIG.crops, samples=4, cold=True)
    assert set(found.seconds) == set(pipeline.STAGES)
    assert [one.count for one in found.seconds.values()] == [4, 4, 4]
    assert found.cpu_seconds > 0
    stream = pipeline.measure_stream(
        some, CONFIG.crops, batch_size=2, prefetch=1, workers=0, samples=4, cold=False
    )
    assert (stream.cores, stream.samples, stream.page_cache) == (1, 4, "warm")
    assert stream.samples_per_second == stream.samples_per_core_second > 0
    assert "| threads" in pipeline.stream_table([stream])
    assert "| cold" in pipeline.stages_table([found])
    assert sum(file.stat().st_size for file in files_of(some)) > 10_000


def test_preparing_one_file(volumes):
    entry = volumes[0].entries[0]
    found = preparing.measure_file(Path(entry.path), volumes[0].cache.chain, 2)
    assert found.shape == entry.shape
    assert found.cached_bytes == files_of(volumes)[0].stat().st_size
    assert found.read.count == found.chain.count == found.write.count == 2
    assert Path(entry.path).name in preparing.prepare_table([found])
    with pytest.raises(InputError, match=r"no\.nii: missing file"):
        preparing.measure_file(Path("no.nii"), volumes[0].cache.chain, 1)


BATCH = step.random_batch(CONFIG)


@pytest.fixture(scope="module")
def built():
    return step.build(CONFIG, BATCH)


@pytest.fixture(scope="module")
def measured(built, tmp_path_factory):
    """Our tiny step, measured once; and the folder with what PyTorch needs for the same."""
    folder = tmp_path_factory.mktemp("step")
    np.savez(folder / "batch_1.npz", **BATCH)
    for name in ("student", "teacher"):
        np.savez(folder / f"{name}.npz", **to_torch(jax.device_get(getattr(built.state, name))))
    return step.run(built, 1, 0, 1e12), folder


@pytest.mark.parametrize("form", [{"attention": "fused"}, {"convolution": "planes", "remat": True}])
def test_model_flops_are_the_same_in_every_form(form, built, measured):
    model = dataclasses.replace(CONFIG.model, **form)
    config = dataclasses.replace(CONFIG, model=model)
    assert model_flops(config, built.program.mesh) == measured[0].flops_needed


def test_step_is_measured(measured):
    found, _ = measured
    assert found.flops_run >= found.flops_needed > 1e9
    assert found.utilisation == found.flops_needed / found.seconds.median / 1e12
    assert found.volumes_per_second == 1 / found.seconds.median
    assert (found.dtype, found.peak_of) == ("float32", "process")
    ok = step.Row("ours", 1, None, found)
    lost = step.Row("other", 8, "out of memory", None)
    text = step.step_table({"float32": 1e12}, [ok, lost])
    assert "out of memory" in text
    values = json.loads(json.dumps([ok, lost], default=measure._plain))
    assert values[0]["measured"]["first"]["loss"] == found.first["loss"]


@pytest.mark.usefixtures("measured")  # the first steps are compared with PyTorch's
def test_end_to_end(built, volumes):
    found = end_to_end.run(built, volumes, steps=2, warmup=0, rounds=1)
    assert found.ratio.median == pytest.approx(found.real.median / found.alone.median)
    assert 0 <= found.waiting.median <= 1
    assert found.volumes_per_second == 2 / found.real.median
    assert "| 2 steps alone" in end_to_end.end_to_end_table(found)


def test_products_reach_something():
    assert step.product_ceiling("float32", size=128, repeats=2) > 1e6


def test_random_crops_have_labels_that_sum_to_one():
    batch = step.random_batch(dataclasses.replace(CONFIG, batch_size=3))
    assert batch["subs"].shape == (3, 1, 32, 32, 64)
    assert batch["bases"].shape == (3, 2, 32, 32, 64)
    assert batch["bases"].dtype == np.uint8
    np.testing.assert_allclose(batch["labels"].sum(-1), 1, rtol=1e-6)
