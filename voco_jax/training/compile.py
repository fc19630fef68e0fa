"""How programs are compiled for a mesh's devices."""

import functools
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from voco_jax.training import mesh as meshes
from voco_jax.training.task import Program, S
from voco_jax.types import Batch


def build_program(
    mesh: Mesh,
    *,
    state: S,
    batch: Mapping[str, jax.ShapeDtypeStruct],
    init: Callable[[S], S],
    step: Callable[[S, Batch], tuple[S, dict[str, jax.Array]]],
    predict: Callable[[S, Batch], Any] | None = None,
) -> Program[S]:
    """Shards the state by `mesh.state_sharding` and the batch by its first axis; compiles nothing.

    Args:
        mesh: of the devices.
        state: abstract.
        batch: abstract, global.
        init: shardings of the state -> random state.
        step: see `Program`; not yet jitted.
        predict: likewise.

    Raises:
        InputError: the batch does not split over the devices.
    """
    meshes.check_batch_size(next(iter(batch.values())).shape[0], mesh)
    shardings = meshes.state_sharding(mesh, state)
    replicated, by_row = meshes.replicated(mesh), meshes.batch_sharding(mesh)
    jit = functools.partial(
        jax.jit, in_shardings=(shardings, by_row), compiler_options=compiler_options(mesh)
    )

    def place(leaf: jax.ShapeDtypeStruct, sharding: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return Program(
        mesh=mesh,
        state=jax.tree.map(place, state, shardings),
        batch={name: place(leaf, by_row) for name, leaf in batch.items()},
        init=functools.partial(init, shardings),
        step=jit(step, out_shardings=(shardings, replicated), donate_argnums=0),
        predict=None if predict is None else jit(predict, out_shardings=replicated),
    )


def compiler_options(mesh: Mesh) -> dict[str, Any] | None:
    """For `jax.jit`; None: XLA's own.

    On a CPU, XLA would merge recomputed activations with the first ones, so that remat would save
    nothing; and a small step would compile for twice as long (docs/benchmarks.md). What XLA_FLAGS
    names is left to it, and what this XLA does not have is left out.
    """
    there = {name: value for name, value in _wanted(mesh).items() if has_option(name, value)}
    return there or None


def missing_options(mesh: Mesh) -> list[str]:
    """Which of the options that `compiler_options` would use this XLA does not have."""
    return [name for name, value in _wanted(mesh).items() if not has_option(name, value)]


def _wanted(mesh: Mesh) -> dict[str, Any]:
    """What `compiler_options` would use of an XLA that has everything."""
    if platform(mesh) != "cpu":
        return {}
    options: dict[str, Any] = {
        "xla_disable_hlo_passes": "cse_barrier_expander",
        "xla_cpu_use_fusion_emitters": False,
        "xla_backend_optimization_level": 1,
    }
    named = os.environ.get("XLA_FLAGS", "")
    return {name: value for name, value in options.items() if f"--{name}=" not in named}


@functools.cache
def has_option(option: str, value: Any) -> bool:
    """Whether this XLA has a compiler option, and takes this value for it."""
    try:
        jax.jit(lambda: 0, compiler_options={option: value})()
    except jax.errors.JaxRuntimeError:
        return False
    return True


def platform(mesh: Mesh) -> str:
    """JAX's name for the kind of devices: cpu, gpu or tpu."""
    return str(mesh.devices.flat[0].platform)
