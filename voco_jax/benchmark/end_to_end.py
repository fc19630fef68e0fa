"""The real path (cache, crops, transfer, step) against the step alone on a resident batch."""

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from voco_jax.benchmark.measure import Spread, seconds_text, spread, spread_text, table, time_calls
from voco_jax.benchmark.step import Built, build, percent
from voco_jax.benchmark.volumes import allow_workers
from voco_jax.config import Config
from voco_jax.data.pipeline import Part, batches
from voco_jax.data.progress import say
from voco_jax.training import mesh as meshes
from voco_jax.training.metrics import StepTimes


@dataclasses.dataclass(frozen=True)
class EndToEnd:
    """What a run would see, and what the step by itself takes, over the same number of steps."""

    devices: str
    batch_size: int
    workers: int
    steps: int  # of each round
    first_batch_seconds: float  # from starting the pipeline to a batch on the device
    compile_seconds: float
    alone: Spread  # seconds of `steps` steps on a resident batch, over the rounds
    real: Spread  # of `steps` steps with their input
    ratio: Spread  # real / alone of each round: 1 is perfect
    waiting: Spread  # share of the time in which the device may have waited for input
    volumes_per_second: float  # of the real path


def measure_end_to_end(
    config: Config, parts: Sequence[Part], *, steps: int, warmup: int, rounds: int
) -> EndToEnd:
    """Times both, turn by turn: a machine's mood changes less in a round than over all of them.

    Args:
        config: with its batch size, workers and prefetch.
        parts: training volumes.
        steps: timed in each round, of either.
        warmup: steps before those.
        rounds: how often.

    Raises:
        InputError: settings that do not fit each other or the devices.
    """
    say("compiling the step (minutes for a large model) ...")
    built = build(config)
    say(f"compiled in {built.compile_seconds:.0f} s; starting the pipeline ...")
    return run(built, parts, steps=steps, warmup=warmup, rounds=rounds)


def run(built: Built, parts: Sequence[Part], *, steps: int, warmup: int, rounds: int) -> EndToEnd:
    """`measure_end_to_end` of a step that is compiled already."""
    allow_workers()
    config = built.config
    begin = time.perf_counter()
    stream = meshes.ahead_on_devices(
        batches(
            parts,
            config.crops,
            seed=config.seed,
            batch_size=config.batch_size,
            rows=meshes.local_rows(config.batch_size, built.mesh),
            workers=config.data.workers,
            prefetch=config.data.prefetch,
        ),
        config.batch_size,
        built.mesh,
    )
    jax.block_until_ready(next(stream))
    first_batch = time.perf_counter() - begin
    alone, real, waiting = [], [], []
    for number in range(1, rounds + 1):
        alone.append(_alone(built, steps, warmup))
        seconds, share = _real(built, stream, steps, warmup)
        real.append(seconds)
        waiting.append(share)
        say(
            f"round {number}/{rounds}: {steps} steps in {seconds_text(alone[-1])} alone, in "
            f"{seconds_text(seconds)} with their input"
        )
    return EndToEnd(
        devices=meshes.describe(built.mesh),
        batch_size=config.batch_size,
        workers=config.data.workers,
        steps=steps,
        first_batch_seconds=first_batch,
        compile_seconds=built.compile_seconds,
        alone=spread(alone),
        real=spread(real),
        ratio=spread(np.divide(real, alone)),
        waiting=spread(waiting),
        volumes_per_second=steps * config.batch_size / spread(real).median,
    )


def _alone(built: Built, steps: int, warmup: int) -> float:
    def step() -> jax.Array:
        built.state, metrics = built.compiled(built.state, built.batch)
        return metrics["loss"]

    return sum(time_calls(step, jax.block_until_ready, warmup, steps))


def _real(built: Built, stream: Any, steps: int, warmup: int) -> tuple[float, float]:
    """Seconds of the steps and the share of waiting, as `voco_jax.training.pretrain.run` does."""
    times, running, begin = StepTimes(), None, 0.0
    for number in range(warmup + steps):
        if number == warmup:
            jax.block_until_ready(running)
            running = None
            times.reset()
            begin = time.perf_counter()
        asked = time.monotonic()
        batch = next(stream)
        if running is None or running.is_ready():
            times.wait(time.monotonic() - asked)
        with jax.transfer_guard("disallow"):
            built.state, metrics = built.compiled(built.state, batch)
        if running is not None:
            running.block_until_ready()
            times.step()
        running = metrics["loss"]
    jax.block_until_ready(running)
    times.step()
    return time.perf_counter() - begin, times.report()[2]


def end_to_end_table(found: EndToEnd) -> str:
    """For people."""
    rows = [
        ("devices", found.devices),
        ("batch", f"{found.batch_size} volumes, {found.workers} workers"),
        ("compiled in", seconds_text(found.compile_seconds)),
        ("first batch on the device after", seconds_text(found.first_batch_seconds)),
        (f"{found.steps} steps alone", spread_text(found.alone)),
        (f"{found.steps} steps with their input", spread_text(found.real)),
        ("with input / alone", f"{found.ratio.median:.3f}"),
        ("device waits for input, at most", percent(found.waiting.median)),
        ("volumes/s", f"{found.volumes_per_second:.3g}"),
    ]
    return table(("end to end", "median [10th, 90th percentile of the rounds]"), rows)
