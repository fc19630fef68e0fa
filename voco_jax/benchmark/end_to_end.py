"""The real path (cache, crops, transfer, step) against the step alone on a resident batch."""

import dataclasses
import itertools
import time
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from voco_jax.benchmark.measure import Spread, seconds_text, spread, spread_text, table
from voco_jax.benchmark.step import Built, build, percent
from voco_jax.config.pretraining import Pretraining
from voco_jax.data.pipeline import Part, batches
from voco_jax.data.progress import log
from voco_jax.errors import InputError
from voco_jax.training import mesh as meshes
from voco_jax.training.steps import NotFiniteError, Steps
from voco_jax.types import Batch


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
    config: Pretraining, parts: Sequence[Part], *, steps: int, warmup: int, rounds: int
) -> EndToEnd:
    """Times both, turn by turn: a machine's mood changes less in a round than over all of them.

    Args:
        config: with its batch size, workers and prefetch.
        parts: training volumes.
        steps: timed in each round, of either.
        warmup: steps before those.
        rounds: how often.

    Raises:
        InputError: settings that do not fit each other or the devices, or that diverge.
    """
    log("compiling the step (minutes for a large model) ...")
    built = build(config)
    log(f"compiled in {built.compile_seconds:.0f} s; starting the pipeline ...")
    try:
        return run(built, parts, steps=steps, warmup=warmup, rounds=rounds)
    except NotFiniteError as error:
        raise InputError(f"{error}: lower optimizer.learning_rate, or take float32") from error


def run(built: Built, parts: Sequence[Part], *, steps: int, warmup: int, rounds: int) -> EndToEnd:
    """`measure_end_to_end` of a step that is compiled already."""
    config = built.config
    begin = time.perf_counter()
    stream = meshes.prefetch_to_device(
        batches(
            parts,
            config.crops,
            seed=config.seed,
            batch_size=config.batch_size,
            rows=meshes.local_rows(config.batch_size, built.program.mesh),
            workers=config.data.workers,
            prefetch=config.data.prefetch,
        ),
        built.program.batch,
    )
    jax.block_until_ready(next(stream))
    first_batch = time.perf_counter() - begin
    alone, real, waiting = [], [], []
    for number in range(1, rounds + 1):
        alone.append(_time(built, itertools.repeat(built.batch), steps, warmup)[0])
        seconds, share = _time(built, stream, steps, warmup)
        real.append(seconds)
        waiting.append(share)
        log(
            f"round {number}/{rounds}: {steps} steps in {seconds_text(alone[-1])} alone, in "
            f"{seconds_text(seconds)} with their input"
        )
    return EndToEnd(
        devices=meshes.describe(built.program.mesh),
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


def _time(built: Built, stream: Iterator[Batch], steps: int, warmup: int) -> tuple[float, float]:
    """Seconds of the training loop's steps, and the share of waiting for input."""
    running = Steps(built.compiled, stream, built.state)
    for _ in range(warmup):
        running.advance()
    running.fetch()
    running.times.reset()
    begin = time.perf_counter()
    for _ in range(steps):
        running.advance()
    running.wait()
    seconds = time.perf_counter() - begin
    running.fetch()
    built.state = running.state
    return seconds, running.times.report()[2]


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
