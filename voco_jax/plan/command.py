"""What a run will need and take on devices that are not here: plan before you book.

Compiles the real sharded training step for the devices that --topology names and reads memory,
collectives and memory traffic off the program. Any TPU slice works without a TPU (libtpu compiles
ahead of time), and so do 1 to 8 GPUs of a host without a GPU (JAX's CUDA plugin does, without
CUDA); cpu:N and, where there is one, gpu:N compile for this machine.

Times are a roofline by the chip's published peaks: a real step takes longer. Collectives are taken
as not hidden behind compute, so the weak scaling efficiency errs on the low side, unless groups of
devices share links. Of a GPU's memory JAX takes three quarters, or XLA_CLIENT_MEM_FRACTION.
"""

import argparse
import contextlib
import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from voco_jax.config.load import command_parser, load_pretraining, parse_arguments, positive
from voco_jax.config.pretraining import Pretraining
from voco_jax.data.progress import log
from voco_jax.errors import InputError
from voco_jax.plan.devices import find_devices
from voco_jax.plan.gpu_targets import NAMES as GPUS

if TYPE_CHECKING:  # jax reads its environment when it is imported: see `find_devices`
    from voco_jax.plan.estimate import Estimate

_LIMIT = 512  # volumes per device that --find-batch tries at most


def largest(fits: Callable[[int], bool], start: int, limit: int) -> int:
    """The largest number that fits, where all smaller ones do: doubling, then halving the gap.

    Args:
        fits: asked as rarely as can be: each answer is a compilation.
        start: tried first.
        limit: not more than that is tried.

    Returns:
        The number; 0 if not even 1 fits.
    """
    low, high = 0, min(start, limit)
    while high <= limit and fits(high):
        low, high = high, min(2 * high, limit) if high < limit else limit + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _batch_size(options: argparse.Namespace, config: Pretraining, devices: int) -> int:
    """Volumes over all devices, by the flags or the config.

    Raises:
        InputError: they do not split evenly.
    """
    if options.batch_per_device is not None:
        return int(options.batch_per_device) * devices
    if options.batch_size is None:
        return config.batch_size if config.batch_size % devices == 0 else devices
    if options.batch_size < 1 or options.batch_size % devices:
        raise InputError(
            f"--batch-size: found {options.batch_size} volumes for {devices} devices, expected a "
            f"multiple of {devices}"
        )
    return int(options.batch_size)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; see --help.

    Returns:
        Exit status: 0 done, 1 the step does not fit the devices, 2 bad input.
    """
    try:
        options, overrides = parse_arguments(_parser(), arguments)
        if options.json and not Path(options.json).absolute().parent.is_dir():
            raise InputError(f"--json: {options.json}: no such folder; make it first")
        if options.json and Path(options.json).is_dir():
            raise InputError(f"--json: {options.json}: found a folder, expected a file")
        found = _run(options, overrides)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.json:
        asked = {"config": options.config, "topology": options.topology, "overrides": overrides}
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump({**asked, **dataclasses.asdict(found)}, file, indent=2)
    return 1 if found.memory.fits is False else 0


def _run(options: argparse.Namespace, overrides: dict[str, str]) -> "Estimate":
    """The estimate that the flags ask for, printed."""
    config = load_pretraining(options.config, overrides)
    devices = find_devices(options.topology)
    from voco_jax.plan.estimate import estimate
    from voco_jax.plan.table import table
    from voco_jax.training.waiting import Watch

    def of(volumes: int) -> "Estimate":
        log(
            f"compiling the step of {volumes} volumes for {options.topology} (minutes for a large "
            "model; a quarter of an hour and more for a TPU) ..."
        )
        with contextlib.closing(Watch(log)) as watch:
            watch.at("compiling")
            return estimate(dataclasses.replace(config, batch_size=volumes), devices)

    tried: dict[int, Estimate] = {}

    def fits(volumes: int) -> bool:
        one = tried[volumes] = of(volumes * len(devices))
        if one.memory.fits is None:
            raise InputError(f"--find-batch: the memory of {one.device} is not known")
        peak = "unknown" if one.memory.peak is None else f"{one.memory.peak / 2**30:.2f}"
        verdict = "fits" if one.memory.fits else "does not fit"
        print(f"{volumes} volumes a device: {peak} GiB, {verdict}", flush=True)
        return one.memory.fits

    batch_size = _batch_size(options, config, len(devices))
    if options.find_batch:
        found = tried[largest(fits, batch_size // len(devices), _LIMIT) or 1]
    else:
        found = of(batch_size)
    print(f"{options.config} on {options.topology}\n{table(found)}")
    return found


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "-m voco_jax.plan",
        __doc__,
        """
--config configs/voco_10k.py --topology v5e:16x16
--config configs/voco_160k.py:h --topology v5p:4x4x4 --config.mesh.fsdp=16 --json plan.json
--config configs/voco_10k.py --topology v4:2x2x1 --find-batch
--config configs/voco_10k.py --topology h200:8
--config configs/demo.py --topology cpu:4
""",
    )
    add = parser.add_argument
    add("--config", required=True, metavar="PY", help="config file; --config.field=value as ever")
    add(
        "--topology",
        required=True,
        help="a TPU slice in chips (v4, v5e, v5p or v6e: v5e:16x16, v5p:4x4x4), a host's GPUs "
        f"({', '.join(GPUS)}: h200:8), or what is here: cpu:N or gpu:N",
    )
    batch = parser.add_mutually_exclusive_group()
    batch.add_argument("--batch-size", type=int, metavar="N", help="volumes over all devices")
    batch.add_argument(
        "--batch-per-device",
        type=positive,
        metavar="N",
        help="volumes; default: the config's batch size if it divides, else 1",
    )
    add("--find-batch", action="store_true", help="plan the largest batch that fits (compiles)")
    add("--json", metavar="FILE", help="write it as JSON too")
    return parser
