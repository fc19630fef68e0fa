"""What is found amiss: in closed form, on made-up runs, and not on healthy ones."""

import dataclasses
import itertools
import math

import numpy as np
import pytest

from configs import demo, finetune_demo
from voco_jax.config.load import parse
from voco_jax.config.pretraining import Crops
from voco_jax.finetune.validation import Case, find_flat
from voco_jax.training.health import (
    Window,
    data_bound,
    diagnose,
    flat,
    make_window,
    rate_too_high,
    read_windows,
)
from voco_jax.voco import health, losses
from voco_jax.voco.position import PositionMetrics


def windows(values, *, rate=1e-3, gradient=1.0, waiting=0.0, seconds=60.0, every=10):
    """Log lines at every tenth step."""
    rates = np.broadcast_to(rate, len(values))
    return [
        Window(every * number, float(loss), gradient, float(one), seconds, waiting)
        for number, (loss, one) in enumerate(zip(values, rates, strict=True), start=1)
    ]


def noise(seed, count, share=0.1):
    return 1 + share * np.random.default_rng(seed).standard_normal(count)


def kinds(found):
    return [finding.kind for finding in found]


# ---- what any run can say


def test_waiting_for_input():
    calm = windows(np.ones(10), waiting=0.2)
    busy = windows(np.ones(3), waiting=0.5)
    (finding,) = data_bound([*calm, *busy])
    assert "50% of the last 3 minutes" in finding.text
    assert "data.workers" in finding.advice
    for healthy in (
        calm,
        [*calm, *busy[:2]],  # for a moment
        [*busy, *calm],  # at the start, from a cold cache
        windows(np.ones(10), waiting=0.9, seconds=1.0),  # in seconds: too short to tell
        [*busy[:2], *windows(np.ones(1), waiting=0.1), *busy[:1]],
        [],
    ):
        assert data_bound(healthy) == []


def test_a_loss_that_grows_again():
    fall = np.geomspace(1, 0.3, 40)
    (finding,) = rate_too_high(windows([*fall, *np.full(20, 0.9)], rate=0.1), None)
    assert "grown to 0.9000 from" in finding.text
    assert "the learning rate is 1.0e-01" in finding.text
    assert "optimizer.learning_rate" in finding.advice
    assert rate_too_high(windows([*fall, *np.full(20, 0.3)]), None) == []
    assert rate_too_high(windows([*fall, 3.0, *np.full(12, 0.3)]), None) == []  # one spike
    wild = np.abs(np.random.default_rng(0).standard_cauchy(60)) + 1
    assert rate_too_high(windows(wild), None) == []  # noise that hides everything


def test_weights_that_have_grown():
    first, high = windows([0.9], gradient=2.0), windows([0.7] * 30, gradient=0.05)
    (finding,) = rate_too_high([*first, *high], lambda: 0.35)
    assert "0.3500 is reached without a look at the input" in finding.text
    assert "shrunk to 0.05 from 2: the weights have grown" in finding.text
    low = windows([0.2] * 30, gradient=0.05)  # as where all is learned
    same = windows([0.7] * 30, gradient=1.0)  # as where the rate is too low
    for healthy in (low, same):
        assert rate_too_high([*first, *healthy], lambda: 0.35) == []
    assert rate_too_high([*first, *high], None) == []
    assert kinds(diagnose([*first, *high], (), (), lambda: 0.35)) == ["rate_too_high"]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("share", [0.03, 0.3])
def test_healthy_runs_are_left_in_peace_at_every_log_line(seed, share):
    """A VoCo loss: half of it goes fast, the rest slowly, and it ends on a plateau."""
    step = np.arange(1, 301)
    clean = 0.15 + 0.25 * np.exp(-step / 60) + 0.5 * np.exp(-step / 3)
    warm = np.minimum(step / 30, 1) * 0.5 * (1 + np.cos(np.pi * step / 300)) * 1e-3
    run = windows(clean * noise(seed, 300, share), rate=warm)
    for count in range(1, 301):
        found = diagnose(run[:count], (), (), lambda: 0.35)
        assert found == [], count


@pytest.mark.parametrize("seed", range(5))
def test_a_flat_loss_and_what_was_ruled_out(seed):
    run = windows(0.36 * noise(seed, 200, 0.05))
    (finding,) = flat(run, ["embeddings differ"], lambda: 0.35)
    assert finding.kind == "flat"
    assert "0.3500 is reached without a look at the input" in finding.text
    ruled_out = finding.text.split("Ruled out: ")[1]
    assert ruled_out == (
        "embeddings differ; the learning rate is 1.0e-03 and its warm-up over; the gradient's "
        "norm is 1"
    )
    assert "Why" not in finding.text
    assert kinds(diagnose(run, {"chance"}, (), lambda: 0.35)) == ["flat"]
    assert diagnose(run, {"collapsed"}, (), lambda: 0.35) == []


def test_a_plateau_is_not_flat_where_something_was_learned():
    run = windows([1.0, 0.9, 0.8] * 3 + [0.3] * 200)
    assert flat(run, (), lambda: 0.35) == []
    assert kinds(flat(run, (), lambda: 0.25)) == ["flat"]
    assert flat(run, (), None) == []
    assert kinds(flat(windows([1.0] * 200), (), None)) == ["flat"]


def test_causes_of_a_flat_loss():
    (finding,) = flat(windows([0.5] * 80, gradient=0.0), (), lambda: 0.4)
    assert "Why: the gradient's norm is 0.0e+00. Ruled out: the learning rate" in finding.text
    (finding,) = flat(windows([0.5] * 80, rate=0.0), (), lambda: 0.4)
    assert "Why: the learning rate is 0.0e+00. Ruled out: the gradient" in finding.text
    unknown = windows([0.5] * 80, rate=math.nan, gradient=math.nan)  # a task that has neither
    (finding,) = flat(unknown, (), lambda: 0.4)
    assert "Why" not in finding.text
    assert "Ruled out" not in finding.text


def test_what_is_no_flat_loss():
    still = [0.5] * 80
    assert flat(windows(still[:20]), (), lambda: 0.4) == []  # too early
    rising = np.arange(1, 81) / 80 * 1e-3
    assert flat(windows(still, rate=rising), (), lambda: 0.4) == []  # warm-up
    assert flat(windows(np.linspace(0.6, 0.5, 80)), (), lambda: 0.4) == []
    wide = 0.5 * noise(1, 80, 0.5)
    assert flat(windows(wide), (), None) == []  # a fall of 5% would not be seen
    assert flat(windows(wide), (), lambda: 0.45) == []  # nor is it above that for certain
    assert kinds(flat(windows(wide), (), lambda: 0.3)) == ["flat"]
    falls = windows(np.linspace(0.9, 0.6, 80) * noise(2, 80, 0.1))
    assert flat(falls, (), lambda: 0.3) == []


def test_windows_of_steps_and_of_an_earlier_run():
    steps = [{"loss": 1.0, "gradient_norm": 3.0}, {"loss": 2.0, "gradient_norm": 5.0}]
    found = make_window(20, steps, {"learning_rate": 0.1, "input_wait_fraction": 0.5}, 7.0)
    assert found == Window(20, 1.5, 4.0, 0.1, 7.0, 0.5)
    lines = ['{"step": 20, "loss": 1.5, "learning_rate": 0.1}', '{"step": 20, "validation/x": 1}']
    (earlier,) = read_windows(lines)
    assert (earlier.step, earlier.loss, earlier.rate, earlier.seconds) == (20, 1.5, 0.1, 0)
    assert math.isnan(earlier.gradient_norm)


# ---- what pre-training knows

HEALTHY = PositionMetrics(
    accuracy=0.6, chance=0.12, overlap_error=0.1, similarity_spread=0.2, embedding_spread=0.8
)


def metrics(**changes):
    return dataclasses.replace(HEALTHY, **changes)


def test_collapse():
    assert health.collapsed(HEALTHY) == []
    (finding,) = health.collapsed(metrics(similarity_spread=0.001))
    assert "similarities are constant" in finding.text
    assert "nearly one embedding" not in finding.text
    (finding,) = health.collapsed(metrics(embedding_spread=1e-5))
    assert "nearly one embedding" in finding.text


def test_accuracy_at_chance():
    """Of 3x3 cells the middle one is right a quarter of the time; 64 answers: 10.8% above it."""
    experiment = parse(demo.get_config())
    blind = metrics(accuracy=0.35)
    (finding,) = health.at_chance(blind, 64, 500, experiment)
    assert finding.kind == "chance"
    assert "is 35.0%; always naming the middle of the grid reaches 25.0%" in finding.text
    assert "of 64 sub-volumes 35.8% would be more than luck" in finding.text
    assert "augment.flip_probability" not in finding.advice
    flips = dataclasses.replace(experiment.augment, flip_probability=0.2)
    (finding,) = health.at_chance(blind, 64, 500, dataclasses.replace(experiment, augment=flips))
    assert "augment.flip_probability=0" in finding.advice
    assert health.at_chance(blind, 64, 499, experiment) == []  # too early
    assert health.at_chance(metrics(accuracy=0.36), 64, 500, experiment) == []
    assert health.at_chance(blind, 4, 500, experiment) == []  # 4 sub-volumes say nothing
    assert kinds(health.at_chance(blind, 9, 500, experiment)) == ["chance"]


def test_empty_crops(generator):
    air = np.zeros((32, 32, 64), np.uint8)
    scan = air.copy()
    scan[8:24, 8:24] = generator.integers(100, 140, (16, 16, 64))
    assert [health.is_empty(crop) for crop in (air, air + 100, scan)] == [True, True, False]
    tissue = (128 + generator.normal(0, 10 / 425 * 255, air.shape)).astype(np.uint8)
    assert not health.is_empty(tissue)  # noise of 10 HU
    assert health.is_empty(np.full(air.shape, 0.3, np.float16))
    assert health.empty_crops([True, False, False, False, False]) == []
    (finding,) = health.empty_crops([True, False, False, False])
    assert "1 of 4 base crops" in finding.text


class _Part:
    def __init__(self, *digests):
        self.entries = [type("Entry", (), {"digest": digest}) for digest in digests]


def test_too_few_volumes():
    nine = [_Part(*"abcde"), _Part(*"fghi")]
    assert health.few_volumes(nine, (3, 3, 1), 4) == []
    (finding,) = health.few_volumes(nine, (3, 3, 1), 5)  # twice the batch
    assert finding.text.startswith("9 different volumes to train on, for 9 base crops and batches")
    assert "expected 10 or more" in finding.text
    copies = [_Part(*"aaaaaaaaaaa"), _Part("a")]
    (finding,) = health.few_volumes(copies, (2, 1, 1), 1)
    assert finding.text.startswith("1 different volumes")


def test_the_loss_of_a_network_that_looks_at_nothing():
    """Two crops: every pair of similarities that one embedding can have to orthogonal ones."""
    crops = Crops(grid=(2, 1, 1), crop_size=(16, 4, 4), encoder_size=(16, 4, 4), sub_volumes=2)
    found = health.blind_loss(losses.RECIPES["paper"], crops, lambda terms: terms.total)
    first = np.arange(16) / 16  # the share of the second crop, by the corner
    y = np.stack([1 - first, first], axis=-1)
    pairs = list(itertools.product(range(16), repeat=2))  # of the two sub-volumes of a volume
    lowest = math.inf
    for one, other in itertools.product(np.linspace(0, 1, 41), repeat=2):
        if one**2 + other**2 > 1:
            continue
        p = np.array([one, other])
        positive, mismatch = y > 0, -np.log(1 - np.abs(y - p) + 1e-6)
        sums, counts = (mismatch * positive).sum(1), positive.sum(1)
        squares, others = (p**2 * ~positive).sum(1), (~positive).sum(1)
        total = [
            (sums[i] + sums[j]) / (counts[i] + counts[j])
            + (squares[i] + squares[j]) / max(others[i] + others[j], 1)
            for i, j in pairs
        ]
        lowest = min(lowest, float(np.mean(total)))
    assert found == pytest.approx(lowest, rel=0.03)


# ---- what segmentation knows


def test_a_dice_that_does_not_move():
    experiment = parse(finetune_demo.get_config())
    step = experiment.total_steps // 2

    def found(*scores, predicted=0.1, reference=0.1, intensity=0.5, step=step):
        cases = [Case("a", np.zeros(2), np.zeros(2), predicted, reference, intensity)]
        return find_flat(scores, cases, step, experiment)

    same = (0.1, 0.2, 0.2, 0.205)
    (finding,) = found(*same, predicted=0.0005)
    assert finding.kind == "flat"
    assert "0.2000, 0.2000, 0.2050 in the last 3 validations; the network predicts" in finding.text
    assert "background alone" in finding.text
    assert "crops.foreground" in finding.advice
    (finding,) = found(*same, intensity=0.999)
    assert "nearly constant" in finding.text
    assert "chain.window" in finding.advice
    (finding,) = found(*same, step=1)
    assert "the warm-up is not over" in finding.text
    assert found(0.2, 0.2) == []
    assert found(0.2, 0.2, 0.22) == []
    assert found(0.9, 0.9, 0.9) == []
