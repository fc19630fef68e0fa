"""Which attention the devices of a run compute: the form written for them, or XLA's."""

import re
import warnings
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from voco_jax.config.encoders import Model
from voco_jax.errors import InputError
from voco_jax.models.attention import Attend, attend, attend_fused, attend_in_parts
from voco_jax.models.encoders import find_encoder
from voco_jax.training import mesh as meshes
from voco_jax.training.distributed import barrier, gather

_TOLERANCE = 0.03  # relative; bfloat16 differs by 0.005, a wrong kernel by about 1


def choose_attention(model: Model, mesh: Mesh) -> Attend:
    """How the devices compute attention, by `model.attention`.

    With `auto` a CPU takes a few windows after the other. Kernels are tried once on a device of
    each process, against XLA's attention: where they fail or find other numbers on one, a warning
    says so and all take XLA's.

    Raises:
        InputError: `fused` on GPUs that the kernels are not for.
    """
    device, wanted = mesh.devices.flat[0], model.attention
    kernels = device.platform == "tpu" or _runs_triton(device)
    if wanted == "auto" and device.platform == "cpu" and not kernels:
        return meshes.on_each_device(attend_in_parts, mesh, replicated=2)
    if wanted == "xla" or (wanted == "auto" and not kernels):
        return attend
    if not kernels and device.platform != "cpu":
        raise InputError(
            f"model.attention: found 'fused' on {device.device_kind}, expected 'xla' or 'auto': "
            "its kernels are for TPUs and for NVIDIA GPUs from compute capability 8.0 (A100) on "
            "(a CPU interprets them, slowly)"
        )
    if device.platform == "gpu":
        from voco_jax.models.attention_gpu import attend_blocks  # needs Pallas for Triton

        fused: Attend = attend_blocks
    else:
        fused = partial(attend_fused, interpret=device.platform == "cpu")
    # A program may also be compiled for devices that are not here.
    here = [one for one in jax.local_devices() if one.platform == device.platform]
    if wanted == "auto" and here and any(device is one for one in jax.devices()):
        shape = find_encoder(model.encoder).attention_shape(model)
        if shape is None:
            return attend
        problem = find_problem(fused, *shape, jnp.dtype(model.dtype), here[0])
        barrier()
        broken = np.flatnonzero(gather(np.asarray([problem is not None])))
        if broken.size:
            where = device.device_kind if problem else f"process {broken[0]}"
            warnings.warn(
                f"model.attention: the fused kernels do not work on {where} "
                f"({problem or 'its log says why'}); XLA's slower attention is used, as with "
                "model.attention='xla'",
                stacklevel=2,
            )
            return attend
    return meshes.on_each_device(fused, mesh, replicated=2)


def _runs_triton(device: jax.Device) -> bool:
    """Whether it is a GPU that Triton compiles for; AMD's have names in place of the number."""
    capability = getattr(device, "compute_capability", "")
    return bool(re.fullmatch(r"\d+\.\d+", capability)) and float(capability) >= 8


def find_problem(
    function: Attend, tokens: int, head_size: int, dtype: jnp.dtype, device: jax.Device
) -> str | None:
    """Runs a small window through a function and through `attend`, with gradients.

    Args:
        function: instead of `attend`.
        tokens: of the window.
        head_size: channels of a head.
        dtype: of the computation.
        device: to run on.

    Returns:
        What is wrong, in a few words; None: nothing.
    """
    n, heads = tokens, 2
    generator = np.random.default_rng(0)

    def noise(*shape: int) -> np.ndarray:
        return generator.normal(size=shape).astype(np.float32)

    qkv, d_out = noise(1, 2, n, 3, heads, head_size), noise(1, 2, n, heads, head_size)
    bias, regions = noise(heads, n, n), jnp.asarray(generator.integers(0, 8, (2, n)), jnp.int32)

    def both(attention: Attend) -> list[np.ndarray]:
        def run(qkv: jax.Array, bias: jax.Array, d_out: jax.Array) -> tuple[jax.Array, ...]:
            value, back = jax.vjp(lambda q, t: attention(q, t, regions), qkv.astype(dtype), bias)
            return tuple(one.astype(jnp.float32) for one in (value, *back(d_out.astype(dtype))))

        arguments = jax.device_put((qkv, bias, d_out), device)
        return [np.asarray(one) for one in jax.device_get(jax.jit(run)(*arguments))]

    try:
        found = both(function)
    except Exception as error:  # of a compiler: anything
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
    for what, ours, expected in zip(
        ("result", "gradient", "gradient of the bias"), found, both(attend), strict=True
    ):
        difference = float(np.linalg.norm(ours - expected) / np.linalg.norm(expected))
        if not difference < _TOLERANCE:
            return f"their {what} differs by {difference:.3g}"
    return None
