"""The devices of a topology that need not be here: JAX compiles for them all the same.

jax reads its environment when it is imported: here only after that is set.
"""

import contextlib
import importlib.metadata
import importlib.util
import math
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from voco_jax.accelerators import silence_compiler
from voco_jax.errors import InputError
from voco_jax.plan import gpu_targets

if TYPE_CHECKING:
    import jax

_PODS = {"v4": 4096, "v5e": 256, "v5p": 8960, "v6e": 256}  # chips


def find_devices(topology: str) -> list["jax.Device"]:
    """The devices of a topology; call it before anything imports jax.

    Args:
        topology: as --topology takes it.

    Raises:
        InputError: a topology that does not exist, or none such here.
    """
    silence_compiler()
    kind, _, shape = topology.partition(":")
    if kind in ("cpu", "gpu"):
        if not re.fullmatch(r"[1-9]\d*", shape):
            raise InputError(f"--topology: found {topology!r}, expected {kind}:N, as in {kind}:4")
        return _local(kind, int(shape))
    if kind in gpu_targets.NAMES:
        return _gpus_of_a_host(topology)
    if re.fullmatch(r"v\d+[a-z]*:[1-9]\d*(x[1-9]\d*){1,2}", topology):
        return _tpu_slice(topology)
    raise InputError(
        f"--topology: found {topology!r}, expected a TPU slice as v5e:16x16 or v5p:4x4x4, "
        f"GPUs as h200:8 ({', '.join(gpu_targets.NAMES)}), cpu:N or gpu:N"
    )


def _local(kind: str, count: int) -> list["jax.Device"]:
    os.environ["JAX_PLATFORMS"] = "cpu" if kind == "cpu" else "cuda,cpu"
    import jax

    if kind == "cpu":
        jax.config.update("jax_num_cpu_devices", count)
        return list(jax.devices())
    try:
        here = jax.devices("gpu")
    except RuntimeError as error:
        raise InputError(f"--topology: gpu:{count}: found no GPU here ({error})") from error
    if len(here) < count:
        raise InputError(f"--topology: gpu:{count}: found {len(here)} GPUs here")
    return list(here[:count])


def _tpu_slice(topology: str) -> list["jax.Device"]:
    kind, _, shape = topology.partition(":")
    chips, pod = math.prod(map(int, shape.split("x"))), _PODS.get(kind, max(_PODS.values()))
    if chips > pod:
        raise InputError(
            f"--topology: found {topology!r}, {chips} chips, expected at most the {pod} of a pod"
        )
    if not _installed("libtpu"):
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
    # JAX on a Cloud TPU sees a v4 chip's two cores as one device; libtpu by itself as two.
    options: dict[str, Any] = {"chip_config_name": "megacore"} if kind == "v4" else {}
    if topology in ("v5e:2x4", "v6e:2x4"):  # one machine with eight chips; larger ones have four
        options["chips_per_host_bounds"] = (2, 4, 1)
    return _described(topology, platform="tpu", topology_name=topology, **options)


def _gpus_of_a_host(topology: str) -> list["jax.Device"]:
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
    # XLA chooses between its Triton kernels and cuBLAS by running both. Where it cannot, it takes
    # Triton, which has none for some shapes (of the relative position bias) and then gives up.
    flags = "--xla_gpu_enable_triton_gemm=false"
    os.environ["XLA_FLAGS"] = f"{flags} {os.environ.get('XLA_FLAGS', '')}".strip()
    return _described(
        topology,
        platform="cuda",
        target_config=gpu_targets.target_config(kind),
        topology=f"1x1x{count}",  # partitions, hosts of each, GPUs of each
    )


def _described(named: str, platform: str, **options: Any) -> list["jax.Device"]:
    """Devices that only the compiler knows, for compiling ahead of time."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    # What the compilers say as they are loaded is of devices that are not here. What goes wrong
    # is an exception, with what was said.
    with _stderr_aside():
        import jax
        from jax.experimental import topologies

        try:
            found = topologies.get_topology_desc(platform=platform, **options)
        except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
            raise InputError(f"--topology: {named}: {str(error).splitlines()[0]}") from error
        jax.devices()  # looks through the plugins
    return list(found.devices)


@contextlib.contextmanager
def _stderr_aside() -> Iterator[None]:
    """Keeps what C++ and Python write to stderr; it is written only if there is an exception."""
    sys.stderr.flush()
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as aside:
        os.dup2(aside.fileno(), 2)
        try:
            yield
        except BaseException:
            aside.seek(0)
            os.write(stderr, aside.read())
            raise
        finally:
            sys.stderr.flush()
            os.dup2(stderr, 2)
            os.close(stderr)


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # not even its package
        return False
