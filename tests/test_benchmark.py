"""Benchmarks: their arithmetic by closed forms, and each part once, as small as can be."""

import dataclasses
import itertools
import json
import math
import os
import signal
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from tiny import tiny_config
from voco_reference import terms

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import convolutions
import gpu
import pipeline_against_monai as input_against
import step_against_torch as against
import step_tables
import torch_step

from voco_jax.benchmark import command, end_to_end, measure, pipeline, preparing, step
from voco_jax.benchmark.volumes import files_of, first_volumes, opened
from voco_jax.config import parse
from voco_jax.errors import InputError
from voco_jax.interop.names import to_torch
from voco_jax.plan.estimate import model_flops
from voco_jax.training.mesh import make_mesh
from voco_jax.training.program import make_network
from voco_jax.voco import augment
from voco_jax.voco.step import step_keys

CONFIG = parse(tiny_config())  # unchanged: other tests compile the same step


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
        "lax": {"model.convolution": "lax", "crops.grid": (3, 3, 1)},
        "b": {"seed": 1},
    }
    assert command.sizes("2,4,8") == [2, 4, 8]


@pytest.mark.parametrize(
    ("variants", "message"),
    [
        (["model.remat=True"], "expected another NAME"),
        (["a: model.remat"], "expected another NAME"),
        (["a: crops.grid=(3, 3, 1)"], "without spaces"),
        (["a: seed=1", "a: seed=2"], "expected another NAME"),
        (["a: model.remet=True"], "did you mean model.remat"),
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
            "found no 'no', expected one of ct",
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
    before = measure.resident()
    block = np.ones(2**25)  # 256 MiB
    assert measure.resident() - before == pytest.approx(block.nbytes, rel=0.05)
    assert measure.peak_resident() >= block.nbytes


@pytest.fixture(scope="module")
def volumes():
    with opened(parse(tiny_config()), 3) as parts:
        yield parts


def test_stages_and_stream_of_a_cache(volumes):
    (part,) = some = first_volumes(volumes, 2)
    assert len(part.entries) == 2
    options = {"batch_size": 2, "samples": 4}
    found = pipeline.measure_stages(some, CONFIG.crops, cold=True, **options)
    assert set(found.seconds) == set(pipeline.STAGES)
    assert [one.count for one in found.seconds.values()] == [4, 4, 4]
    assert found.cpu_seconds > 0
    stream = pipeline.measure_stream(
        some, CONFIG.crops, prefetch=1, workers=0, cold=False, **options
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
    assert model_flops(config, built.mesh) == measured[0].flops_needed


def test_every_convolution_of_the_encoder_is_timed():
    model = dataclasses.replace(CONFIG.model, convolution="lax")
    found = convolutions.shapes(dataclasses.replace(CONFIG, model=model))
    network = make_network(CONFIG, make_mesh(1, jax.devices()[:1]))
    x = jax.ShapeDtypeStruct((2, *CONFIG.crops.encoder_size, 1), np.float32)
    params = jax.eval_shape(lambda x: network.init(jax.random.key(0), x, False), x)
    kernels = [leaf.shape for leaf in jax.tree.leaves(params) if leaf.shape[:3] == (3, 3, 3)]
    assert sorted(kernel for _, kernel in found.elements()) == sorted(kernels)


@pytest.mark.parametrize("size", [1, 5])
def test_a_convolution_is_the_same_three_times(size, generator):
    shapes = [(2, 4, 3, size, 3), (3, 3, 3, 3, 2), (2, 4, 3, size, 2)]
    arrays = [generator.standard_normal(shape).astype(np.float32) for shape in shapes]
    exact = convolutions.in_torch(arrays)()
    for form in (convolutions.convolve_lax, convolutions.convolve_planes):
        assert convolutions.compare(convolutions.in_jax(form, arrays)(), exact) < 1e-5
    wrong = convolutions.in_jax(lambda x, kernel: convolutions.convolve_lax(x, -kernel), arrays)
    assert convolutions.compare(wrong(), exact) > 1


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


def test_pytorchs_step_computes_the_same(measured):
    ours, folder = measured
    # PyTorch's augments nothing; nor does ours in this step, with probabilities of 0, 0 and 0.1.
    key, _, _ = step_keys(jax.random.key(CONFIG.seed), jnp.zeros((), jnp.int32))
    draws = augment.draw(key, 3, **dataclasses.asdict(CONFIG.augment))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(draws))
    theirs = torch_step.run("float32", CONFIG, folder, 1, 0, exact=True)
    assert against.within(against.compare(ours.first, theirs["first"]))
    assert theirs["first"]["gradient_norm"] > 0


def test_pytorchs_losses_are_the_published_ones():
    generator = torch.Generator().manual_seed(0)
    rows, rows_t = (torch.randn(2 * 6, 8, generator=generator) for _ in range(2))
    labels = torch.rand(2, 2, 4, generator=generator).mul(2).sub(1).clamp(min=0)
    both = {"student": rows.reshape(2, 6, 8), "teacher": rows_t.reshape(2, 6, 8)}
    embeddings = {f"x_{name}": value[:, :2] for name, value in both.items()}
    embeddings |= {f"bases_{name}": value[:, 2:] for name, value in both.items()}
    expected = terms("voco_10k", embeddings, labels)
    found = torch_step.losses(rows, rows_t, labels)
    for name, value in zip(("pos", "neg", "reg"), found, strict=True):
        assert float(value) == pytest.approx(float(expected[name]), rel=1e-5), name


def test_two_computations_of_one_step_agree_or_not():
    found = {"pos": 1.0, "neg": 0.001, "reg": 0.5, "gradient_norm": 10.0, "loss": 1.501}
    near = found | {"pos": 1.00009, "neg": 0.001009, "gradient_norm": 10.09}
    assert against.within(against.compare(near, found))
    for name, factor in (("pos", 1.0002), ("neg", 1.02), ("reg", 0.9998), ("gradient_norm", 1.02)):
        wrong = found | {name: factor * found[name]}
        assert not against.within(against.compare(wrong, found)), name
    assert not against.within(against.compare(found | {"reg": math.nan}, found))


def test_pytorchs_limits_are_named():
    paper = dataclasses.replace(
        CONFIG, recipe="paper", teacher=dataclasses.replace(CONFIG.teacher, scope="none")
    )
    with pytest.raises(InputError, match="recipe: found 'paper', expected 'voco_10k'"):
        torch_step.check_settings(paper, ())
    with pytest.raises(InputError, match=r"--torch: found 'fp16', expected some of float32"):
        torch_step.check_settings(CONFIG, ["bf16+compile", "fp16"])


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


def _row(side, variant, size, rate, peak=1, problem=None):
    return {
        "side": side,
        "variant": variant,
        "batch_size": size,
        "problem": problem,
        "volumes_per_second": rate,
        "peak": peak,
    }


def test_best_of_both_sides_are_compared():
    rows = [
        _row("voco_jax", "a", 2, 10.0, 3),
        _row("voco_jax", "b", 2, 8.0),
        _row("PyTorch", "eager", 2, 2.0, 6),
        _row("PyTorch", "compile", 2, 4.0, 6),
        _row("voco_jax", "a", 4, 12.0),
        _row("PyTorch", "eager", 4, None, problem="out of memory"),
    ]
    found = step_tables.ratios(rows)
    assert list(found) == [2]
    assert found[2].startswith("ours (a) does 2.50 times the volumes/s of PyTorch (compile)")
    assert found[2].endswith("0.50 times its peak memory")
    assert gpu.fastest(rows) == ("a", 4)
    assert gpu.fastest([_row("voco_jax", "a", 8, None, problem="x")]) is None


def test_losses_of_two_precisions():
    exact = np.linspace(2, 1, 40)
    assert gpu.compare_losses(exact, exact)["agree"]
    far = gpu.compare_losses(1.06 * exact, exact)
    assert far["late"] == pytest.approx(0.06)
    assert not far["agree"]
    assert len(far["windows"]) == 10
    assert not gpu.compare_losses([*exact[1:], math.nan], exact)["agree"]


def test_input_ratios_by_hand():
    def row(side, cache, seconds, cpu):
        one = measure.spread([seconds])
        return input_against.Row(side, cache, one, 1 / seconds, cpu, None, 0, 0)

    rows = [row("voco_jax", cache, 0.02, 0.01) for cache in ("warm", "cold")]
    rows += [row("MONAI", cache, 0.3, 0.2) for cache in ("warm", "cold")]
    rows.append(row("voco_jax, on the device", "warm", 0.08, 0.08))
    found = input_against.ratios(rows)["cold"]
    assert found["host"] == pytest.approx(15)
    assert found["host_cpu"] == pytest.approx(20)
    assert found["with_device_part"] == pytest.approx(3)
