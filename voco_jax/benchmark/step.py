"""The training step by itself, on a batch that is on the device: time, FLOPs, memory."""

import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from voco_jax.benchmark.measure import (
    ChildError,
    Spread,
    bytes_text,
    in_own_process_within,
    peak_resident,
    seconds_text,
    spread,
    spread_text,
    table,
    time_calls,
    utilisation,
)
from voco_jax.config.pretraining import Pretraining
from voco_jax.data.crops import draw_origins, overlap_labels
from voco_jax.data.progress import log
from voco_jax.data.volumes import quantise
from voco_jax.plan.estimate import model_flops
from voco_jax.plan.flops import count_flops
from voco_jax.training import mesh as meshes
from voco_jax.training.task import Program
from voco_jax.voco.step import State
from voco_jax.voco.task import make_program

_CPU_PRODUCT, _PRODUCT = 2048, 8192  # rows and columns of the ceiling's matrices


@dataclasses.dataclass(frozen=True)
class Measured:
    """One row: a variant at a batch size. Bytes are of one device, FLOPs of all together."""

    devices: str
    dtype: str
    compile_seconds: float
    first: dict[str, float]  # the first step's metrics
    samples: list[float]  # seconds of each step
    seconds: Spread
    volumes_per_second: float
    flops_needed: float  # without recomputation
    flops_run: float  # with it
    utilisation: float | None  # model FLOP utilisation; None: no ceiling was measured
    arguments: int  # state and batch
    temporary: int  # activations, gradients
    peak: int
    peak_of: str  # "device"; "process": its resident memory, compiling included


@dataclasses.dataclass
class Built:
    """A compiled step with what it runs on; a step uses `state` up and leaves a new one."""

    config: Pretraining
    program: Program[State]
    compiled: Any
    compile_seconds: float
    flops_run: int
    state: State
    batch: dict[str, jax.Array]


def random_batch(config: Pretraining, seed: int = 0) -> dict[str, np.ndarray]:
    """A batch of waves, each crop its own, with the labels of random sub-volumes.

    Noise would do for the time, but its crops all look the same to an encoder: the losses of two
    programs would be those of their rounding.

    Returns:
        As `voco_jax.data.pipeline.CropBatch`.
    """
    generator = np.random.default_rng(seed)
    crops = config.crops
    origins = [
        draw_origins(generator, crops.sub_volumes, crops.grid, crops.crop_size)
        for _ in range(config.batch_size)
    ]
    labels = [overlap_labels(one, crops.grid, crops.crop_size) for one in origins]

    def wave() -> np.ndarray:
        x, y, z = (
            np.sin(np.linspace(0, generator.uniform(2, 20), extent) + generator.uniform(0, 6))
            for extent in crops.crop_size
        )
        unit = 0.5 + 0.5 * x[:, None, None] * y[:, None] * z
        return quantise(unit.astype(np.float32), config.data.dtype)

    def waves(count: int) -> np.ndarray:
        return np.stack([[wave() for _ in range(count)] for _ in range(config.batch_size)])

    return {
        "subs": waves(crops.sub_volumes),
        "bases": waves(math.prod(crops.grid)),
        "labels": np.stack(labels).astype(np.float32),
    }


def build(config: Pretraining, batch: Mapping[str, np.ndarray] | None = None) -> Built:
    """Compiles the real step for all devices here and makes its arguments.

    Args:
        config: with the batch size over all devices.
        batch: host arrays; None: `random_batch`.

    Raises:
        InputError: impossible settings.
    """
    program = make_program(config, meshes.make_mesh(config.mesh.fsdp))
    traced = program.step.trace(program.state, program.batch)
    begin = time.perf_counter()
    compiled = traced.lower().compile()
    seconds = time.perf_counter() - begin
    given = random_batch(config) if batch is None else batch
    return Built(
        config=config,
        program=program,
        compiled=compiled,
        compile_seconds=seconds,
        flops_run=count_flops(traced.jaxpr.jaxpr),
        state=program.init(),
        batch=meshes.to_devices(given, meshes.batch_sharding(program.mesh), config.batch_size),
    )


def run(built: Built, steps: int, warmup: int, ceiling: float | None) -> Measured:
    """Times the step.

    Args:
        built: of `build`.
        steps: timed.
        warmup: steps before those.
        ceiling: of `product_ceiling`; None: there is none to compare with.
    """
    first: dict[str, jax.Array] = {}

    def step() -> jax.Array:
        built.state, metrics = built.compiled(built.state, built.batch)
        if not first:
            first.update(metrics)
        return metrics["loss"]

    samples = time_calls(step, jax.block_until_ready, warmup, steps)
    found = spread(samples)
    needed = model_flops(built.config, built.program.mesh)
    sizes = built.compiled.memory_analysis()
    devices = built.program.mesh.devices
    peak = (devices.flat[0].memory_stats() or {}).get("peak_bytes_in_use")
    all_devices = None if ceiling is None else ceiling * devices.size
    return Measured(
        devices=meshes.describe(built.program.mesh),
        dtype=built.config.model.dtype,
        compile_seconds=built.compile_seconds,
        first={name: float(value) for name, value in jax.device_get(first).items()},
        samples=samples,
        seconds=found,
        volumes_per_second=built.config.batch_size / found.median,
        flops_needed=needed,
        flops_run=built.flops_run,
        utilisation=all_devices and utilisation(needed, found.median, all_devices),
        arguments=sizes.argument_size_in_bytes,
        temporary=sizes.temp_size_in_bytes,
        peak=peak_resident() if peak is None else peak,
        peak_of="process" if peak is None else "device",
    )


def measure_step(config: Pretraining, steps: int, warmup: int, ceiling: float | None) -> Measured:
    """`build`, then `run`, as a process of its own does: nothing is taken from a cache.

    Raises:
        InputError: impossible settings.
    """
    jax.config.update("jax_enable_compilation_cache", False)
    return run(build(config), steps, warmup, ceiling)


def product_ceiling(dtype: str, size: int | None = None, repeats: int = 7) -> float:
    """FLOP/s that one device reaches in a chain of square matrix products.

    Args:
        dtype: of the matrices; float32 as precise as JAX takes it by itself, as in the step.
        size: rows and columns; None: 8192, on a CPU 2048.
        repeats: timed; the median counts.
    """
    on_cpu = jax.default_backend() == "cpu"
    size = size or (_CPU_PRODUCT if on_cpu else _PRODUCT)
    count = 2 if on_cpu else 16
    generator = np.random.default_rng(0)
    # Of this scale products neither grow nor vanish.
    first, factor = (
        jnp.asarray(generator.standard_normal((size, size), np.float32) / size**0.5, dtype)
        for _ in range(2)
    )

    @jax.jit
    def chain(x: jax.Array, factor: jax.Array) -> jax.Array:
        for _ in range(count):
            x = x @ factor
        return x

    seconds = time_calls(lambda: chain(first, factor), jax.block_until_ready, 2, repeats)
    return 2 * count * size**3 / spread(seconds).median


@dataclasses.dataclass(frozen=True)
class Row:
    """What was tried, and what came of it."""

    variant: str
    batch_size: int
    problem: str | None  # None: it was measured
    measured: Measured | None


def compare_steps(
    variants: Mapping[str, Pretraining],
    batch_sizes: Sequence[int] | None,
    steps: int,
    warmup: int,
    limit: float | None = None,
) -> tuple[dict[str, float], list[Row]]:
    """Measures variants at batch sizes, each in a process of its own, with progress on stderr.

    Args:
        variants: by name.
        batch_sizes: None: each variant's own.
        steps: timed.
        warmup: before those.
        limit: seconds for one; None: as long as it takes.

    Returns:
        (ceiling FLOP/s of one device by dtype, rows). One that runs out of memory, takes too long
        or fails is a row that says so.

    Raises:
        InputError: impossible settings.
    """
    ceilings: dict[str, float] = {}
    rows = []
    for name, config in variants.items():
        for size in batch_sizes or [config.batch_size]:
            one = dataclasses.replace(config, batch_size=size)
            dtype = one.model.dtype
            if dtype not in ceilings:
                log(f"measuring {dtype} matrix products ...")
                ceilings[dtype] = in_own_process_within(None, product_ceiling, dtype)
            log(f"{name}, batch {size}: compiling (minutes for a large model), then running ...")
            measured, problem = None, None
            try:
                measured = in_own_process_within(
                    limit, measure_step, one, steps, warmup, ceilings[dtype]
                )
                log(f"  {spread_text(measured.seconds)} a step")
            except ChildError as error:
                problem = str(error)
                log(f"  {problem}")
            rows.append(Row(name, size, problem, measured))
    return ceilings, rows


def step_table(ceilings: Mapping[str, float], rows: Sequence[Row]) -> str:
    """The rows for people, with what the columns mean."""
    head = ["step", "batch", "dtype", "compile", "a step", "volumes/s", "MFU", "TFLOP needed"]
    head += ["run", "arguments", "temporary", "peak"]
    lines = []
    for row in rows:
        cells = [row.problem or "", *["-"] * (len(head) - 3)]
        if one := row.measured:
            cells = [
                one.dtype,
                seconds_text(one.compile_seconds),
                spread_text(one.seconds),
                f"{one.volumes_per_second:.3g}",
                percent(one.utilisation),
                *(f"{flops / 1e12:.3g}" for flops in (one.flops_needed, one.flops_run)),
                *(bytes_text(size) for size in (one.arguments, one.temporary, one.peak)),
            ]
        lines.append([row.variant, str(row.batch_size), *cells])
    measured = [row.measured for row in rows if row.measured]
    devices, peaks = {one.devices for one in measured}, {one.peak_of for one in measured}
    of = {"device": "the device's memory", "process": "the process's resident memory"}
    ceiling = ", ".join(f"{dtype} {rate / 1e12:.3g}" for dtype, rate in ceilings.items())
    notes = [
        f"devices: {'; '.join(sorted(devices)) or 'none'}",
        f"matrix products reach, TFLOP/s on one device: {ceiling}; MFU is the needed FLOPs' share",
        "a step: median [10th, 90th percentile]; arguments, temporary: of one compiled program",
        f"peak: {', '.join(of[name] for name in sorted(peaks)) or 'none'}",
    ]
    return "\n".join([table(head, lines), "", *notes])


def percent(share: float | None) -> str:
    """For people; "-" for none."""
    return "-" if share is None else f"{share:.1%}"
