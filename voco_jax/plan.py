"""What a run will need and take on devices that are not here: plan before you book.

Compiles the real sharded training step for the devices that --topology names and reads memory,
collectives and memory traffic off the program. Any TPU slice works without a TPU (libtpu compiles
ahead of time), and so do 1 to 8 GPUs of a host without a GPU (JAX's CUDA plugin does, without
CUDA); cpu:N and, where there is one, gpu:N compile for this machine.

Times are bounds by the chip's published peaks: a real step takes longer. Collectives are taken as
not hidden behind compute, so the efficiency of scaling errs on the low side, unless groups of
devices share links. Of a GPU's memory JAX takes three quarters, or XLA_CLIENT_MEM_FRACTION.
"""

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import json
import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from voco_jax.config import Config
from voco_jax.errors import InputError
from voco_jax.overrides import load_config, parse_overrides, positive
from voco_jax.report import gpu_targets

if TYPE_CHECKING:  # jax reads its environment when it is imported: see `_devices`
    import jax

    from voco_jax.report.estimate import Estimate

_PODS = {"v4": 4096, "v5e": 256, "v5p": 8960, "v6e": 256}  # chips
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


def _devices(topology: str) -> list["jax.Device"]:
    """The devices of a topology; call it before anything imports jax.

    Raises:
        InputError: a topology that there is not, or none such here.
    """
    kind, _, shape = topology.partition(":")
    if kind in ("cpu", "gpu") and (not re.fullmatch(r"[1-9]\d*", shape)):
        raise InputError(f"--topology: found {topology!r}, expected {kind}:N, as in {kind}:4")
    if kind == "gpu":
        return _local_gpus(int(shape))
    if kind in gpu_targets.NAMES:
        return _distant_gpus(topology)
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax

    if kind == "cpu":
        jax.config.update("jax_num_cpu_devices", int(shape))
        return list(jax.devices())
    if not re.fullmatch(r"v\d+[a-z]*:[1-9]\d*(x[1-9]\d*){1,2}", topology):
        raise InputError(
            f"--topology: found {topology!r}, expected a TPU slice as v5e:16x16 or v5p:4x4x4, "
            f"GPUs as h200:8 ({', '.join(gpu_targets.NAMES)}), cpu:N or gpu:N"
        )
    chips, pod = math.prod(map(int, shape.split("x"))), _PODS.get(kind, max(_PODS.values()))
    if chips > pod:
        raise InputError(
            f"--topology: found {topology!r}, {chips} chips, expected at most the {pod} of a pod"
        )
    if importlib.util.find_spec("libtpu") is None:
        raise InputError(
            f"--topology: {topology} is compiled by libtpu, which is not installed: "
            "pip install libtpu"
        )
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # there is no TPU whose metadata could be asked for
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # none is taken, so plans can run side by side
    # Any valid values do: they only keep libtpu from complaining of what this machine is not.
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")
    os.environ.setdefault("TPU_MIN_LOG_LEVEL", "3")
    from jax.experimental import topologies

    # JAX on a Cloud TPU sees a v4 chip's two cores as one device; libtpu by itself as two.
    options: dict[str, Any] = {"chip_config_name": "megacore"} if kind == "v4" else {}
    if topology in ("v5e:2x4", "v6e:2x4"):  # one machine with eight chips; larger ones have four
        options["chips_per_host_bounds"] = (2, 4, 1)
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology, **options)
    except jax.errors.JaxRuntimeError as error:
        raise InputError(f"--topology: {topology}: {str(error).splitlines()[0]}") from error
    return list(found.devices)


def _local_gpus(count: int) -> list["jax.Device"]:
    os.environ["JAX_PLATFORMS"] = "cuda,cpu"
    import jax

    try:
        here = jax.devices("gpu")
    except RuntimeError as error:
        raise InputError(f"--topology: gpu:{count}: found no GPU here ({error})") from error
    if len(here) < count:
        raise InputError(f"--topology: gpu:{count}: found {len(here)} GPUs here")
    return list(here[:count])


def _distant_gpus(topology: str) -> list["jax.Device"]:
    kind, _, count = topology.partition(":")
    if not re.fullmatch(r"[1-8]", count):
        raise InputError(
            f"--topology: found {topology!r}, expected the 1 to 8 GPUs of a host, as in {kind}:8; "
            "between hosts the links are not NVLink, whose speed the estimate takes"
        )
    if not any(_installed(f"jax_plugins.xla_cuda{version}") for version in (12, 13)):
        version = importlib.metadata.version("jax")
        raise InputError(
            f"--topology: {topology} is compiled by JAX's CUDA plugin, which is not installed: "
            f"pip install jax-cuda12-plugin=={version}"
        )
    os.environ["JAX_PLATFORMS"] = "cpu"
    # XLA chooses between its Triton kernels and cuBLAS by running both. Where it cannot, it takes
    # Triton, which has none for some shapes (of the relative position bias) and then gives up.
    flags = "--xla_gpu_enable_triton_gemm=false"
    os.environ["XLA_FLAGS"] = f"{flags} {os.environ.get('XLA_FLAGS', '')}".strip()
    import jax
    from jax.experimental import topologies

    try:
        found = topologies.get_topology_desc(
            platform="cuda",
            target_config=gpu_targets.target_config(kind),
            topology=f"1x1x{count}",  # partitions, hosts of each, GPUs of each
        )
    except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
        raise InputError(f"--topology: {topology}: {str(error).splitlines()[0]}") from error
    return list(found.devices)


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # not even its package
        return False


def _batch_size(options: argparse.Namespace, config: Config, devices: int) -> int:
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

    Args:
        arguments: of the command line; None: this process's.

    Returns:
        Exit status: 0 done, 1 the step does not fit the devices, 2 bad input.
    """
    options, rest = _parser().parse_known_args(arguments)
    try:
        if options.json and not Path(options.json).absolute().parent.is_dir():
            raise InputError(f"--json: {options.json}: no such folder; make it first")
        if options.json and Path(options.json).is_dir():
            raise InputError(f"--json: {options.json}: found a folder, expected a file")
        overrides = parse_overrides(rest)
        found = _run(options, overrides)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    values = {
        "config": options.config,
        "topology": options.topology,
        "overrides": overrides,
        **dataclasses.asdict(found),
    }
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(values, file, indent=2)
    return 1 if found.memory.fits is False else 0


def _run(options: argparse.Namespace, overrides: dict[str, Any]) -> "Estimate":
    """The estimate that the flags ask for, printed."""
    config = load_config(options.config, overrides)
    devices = _devices(options.topology)
    from voco_jax.report.estimate import estimate, table

    def of(volumes: int) -> "Estimate":
        return estimate(dataclasses.replace(config, batch_size=volumes), devices)

    batch_size = _batch_size(options, config, len(devices))
    if not options.find_batch:
        found = of(batch_size)
        print(f"{options.config} on {options.topology}\n{table(found)}")
        return found
    tried: dict[int, Estimate] = {}

    def fits(volumes: int) -> bool:
        one = tried[volumes] = of(volumes * len(devices))
        if one.memory.fits is None:
            raise InputError(f"--find-batch: the memory of {one.device} is not known")
        peak = "unknown" if one.memory.peak is None else f"{one.memory.peak / 2**30:.2f}"
        verdict = "fits" if one.memory.fits else "does not fit"
        print(f"{volumes} volumes a device: {peak} GiB, {verdict}", flush=True)
        return one.memory.fits

    best = largest(fits, batch_size // len(devices), _LIMIT)
    found = tried[best or 1]
    print(f"{options.config} on {options.topology}\n{table(found)}")
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m voco_jax.plan",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        epilog="""examples:
  python -m voco_jax.plan --config configs/voco_10k.py --topology v5e:16x16
  python -m voco_jax.plan --config configs/voco_10k.py --topology v5p:4x4x4 \\
      --config.model.feature_size=192 --config.mesh.fsdp=16 --json plan.json
  python -m voco_jax.plan --config configs/voco_10k.py --topology v4:2x2x1 --find-batch
  python -m voco_jax.plan --config configs/voco_10k.py --topology h200:8
  python -m voco_jax.plan --config configs/demo.py --topology cpu:4""",
    )
    add = parser.add_argument
    add("--config", required=True, metavar="PY", help="config file; --config.field=value as ever")
    add(
        "--topology",
        required=True,
        help="a TPU slice in chips (v4, v5e, v5p or v6e: v5e:16x16, v5p:4x4x4), a host's GPUs "
        f"({', '.join(gpu_targets.NAMES)}: h200:8), or what is here: cpu:N or gpu:N",
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


if __name__ == "__main__":
    sys.exit(main())
