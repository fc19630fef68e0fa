"""FLOPs of a traced function: those of its matrix products and convolutions, loops included.

XLA's own count takes the body of a loop once, whatever its trip count (`HloCostAnalysis` says so),
and the step loops over microbatches; here each body counts as often as it runs.
"""

import math
from typing import Any

from jax.extend import core


def count_flops(jaxpr: core.Jaxpr) -> int:
    """2 x multiply-adds of all products and convolutions, recomputation (remat) included.

    Args:
        jaxpr: of the whole, unsharded function, as `jax.make_jaxpr` or `.trace` give it.

    Returns:
        FLOPs of one call on all devices together; additions, norms and the like are left out. Of
        a branch the costliest side counts, of a `while`, whose trip count is unknown, one round.
    """
    return sum(_count(equation) for equation in jaxpr.eqns)


def _count(equation: core.JaxprEqn) -> int:
    name, parameters = equation.primitive.name, equation.params
    if name == "dot_general":
        ((contracted, _), _) = parameters["dimension_numbers"]
        shape = _shape(equation.invars[0])
        return 2 * _size(equation) * math.prod(shape[axis] for axis in contracted)
    if name == "conv_general_dilated":
        # The kernel without its output features: what one output voxel sums over.
        kernel = _shape(equation.invars[1])
        features = kernel[parameters["dimension_numbers"].rhs_spec[0]]
        return 2 * _size(equation) * math.prod(kernel) // features
    if name == "cond":
        return max(count_flops(branch.jaxpr) for branch in parameters["branches"])
    if name == "pallas_call":
        # One round is a block's; what a kernel loops over inside itself counts as any loop.
        return count_flops(parameters["jaxpr"]) * math.prod(parameters["grid_mapping"].grid)
    inner = sum(count_flops(jaxpr) for jaxpr in map(_jaxpr, parameters.values()) if jaxpr)
    if name == "shard_map":  # the body is one device's; `mesh.on_each_device` uses all
        return inner * parameters["mesh"].size
    return inner * (parameters["length"] if name == "scan" else 1)


def _size(equation: core.JaxprEqn) -> int:
    return math.prod(_shape(equation.outvars[0]))


def _shape(variable: Any) -> tuple[int, ...]:
    return tuple(variable.aval.shape)


def _jaxpr(value: Any) -> core.Jaxpr | None:
    """What a parameter of an equation holds to be run, if anything."""
    if isinstance(value, core.ClosedJaxpr):
        return value.jaxpr
    return value if isinstance(value, core.Jaxpr) else None
