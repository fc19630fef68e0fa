"""What the 3x3x3 convolutions of a step cost on a CPU: XLA's own, as planes, PyTorch's.

    python -m comparisons.convolutions                       # configs/demo.py
    python -m comparisons.convolutions --config configs/tiny.py --config.model.feature_size=24

Every convolution that the encoder has, on all crops of one volume: forward and the gradients that a
step needs, float32, on the CPU. The three are compared first.
"""

import argparse
import collections
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax.extend import core

from voco_jax.benchmark.measure import seconds_text, spread, table, time_calls
from voco_jax.config.load import load_pretraining, parse_arguments, positive
from voco_jax.config.pretraining import Pretraining
from voco_jax.errors import InputError
from voco_jax.models.conv_blocks import convolve_lax, convolve_planes
from voco_jax.training.compile import compiler_options
from voco_jax.training.mesh import make_mesh
from voco_jax.voco.step import describe_parameters, encode
from voco_jax.voco.task import make_network

Shapes = tuple[tuple[int, ...], tuple[int, ...]]  # of the input, of the kernel
TOLERANCE = 1e-4  # of float32 sums over many voxels, relative to the largest


def shapes(config: Pretraining) -> collections.Counter[Shapes]:
    """How often the encoder convolves what with what in one pass over one volume's crops.

    Raises:
        RuntimeError: some of its kernels were not seen, or others were.
    """
    network = make_network(config, make_mesh(1, jax.devices()[:1]))
    count = config.crops.sub_volumes + int(np.prod(config.crops.grid))
    crops = jax.ShapeDtypeStruct((count, *config.crops.encoder_size), jnp.float32)
    params = nn.unbox(describe_parameters(network, config.crops.encoder_size))
    traced = jax.make_jaxpr(lambda params, x: encode(network, params, x))(params, crops)
    found: collections.Counter[Shapes] = collections.Counter()
    _collect(traced.jaxpr, found)
    seen = sorted(kernel for _, kernel in found.elements())
    kernels = sorted(leaf.shape for leaf in jax.tree.leaves(params) if leaf.shape[:3] == (3, 3, 3))
    if seen != kernels:
        raise RuntimeError(f"found kernels of {seen}, expected the encoder's: {kernels}")
    return found


def _collect(jaxpr: core.Jaxpr, found: collections.Counter[Shapes]) -> None:
    for one in jaxpr.eqns:
        if one.primitive.name == "conv_general_dilated":
            values: list[Any] = [variable.aval for variable in one.invars]
            x, kernel = (tuple(value.shape) for value in values)
            if kernel[:3] == (3, 3, 3):
                found[x, kernel] += 1
        for value in one.params.values():
            inner = getattr(value, "jaxpr", value)
            if isinstance(inner, core.Jaxpr):
                _collect(inner, found)


Call = Callable[[], Sequence[Any]]


def in_jax(convolve: Callable[..., jax.Array], arrays: Sequence[np.ndarray]) -> Call:
    """Returns a call that gives the result and the gradients of input (no image) and kernel."""

    def both(x: jax.Array, kernel: jax.Array, upper: jax.Array) -> tuple[jax.Array, ...]:
        if x.shape[-1] == 1:  # an image: it needs no gradient
            out, back = jax.vjp(partial(convolve, x), kernel)
        else:
            out, back = jax.vjp(convolve, x, kernel)
        return out, *back(upper)

    options = compiler_options(make_mesh(1, jax.devices()[:1]))  # as the step
    compiled = jax.jit(both, compiler_options=options).lower(*arrays).compile()
    placed = [jnp.asarray(one) for one in arrays]
    return lambda: compiled(*placed)


def in_torch(arrays: Sequence[np.ndarray]) -> Call:
    """The same by PyTorch, channels first as MONAI has them."""
    x, upper = (torch.from_numpy(arrays[n].transpose(0, 4, 1, 2, 3).copy()) for n in (0, 2))
    kernel = torch.from_numpy(arrays[1].transpose(4, 3, 0, 1, 2).copy())
    x.requires_grad_()
    kernel.requires_grad_()

    def call() -> Sequence[torch.Tensor]:
        out = torch.nn.functional.conv3d(x, kernel, padding=1)
        wanted = (kernel,) if x.shape[1] == 1 else (x, kernel)
        return out.detach(), *torch.autograd.grad(out, wanted, upper)

    return call


def compare(ours: Sequence[Any], theirs: Sequence[torch.Tensor]) -> float:
    """The largest difference, relative to the largest number."""
    turned = [one.numpy().transpose(0, 2, 3, 4, 1) for one in theirs[:-1]]
    turned.append(theirs[-1].numpy().transpose(2, 3, 4, 1, 0))
    return max(
        float(np.abs(np.asarray(a) - b).max() / np.abs(b).max())
        for a, b in zip(ours, turned, strict=True)
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; exit status 0 measured, 1 the three differ, 2 bad input."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="configs/demo.py", help="default configs/demo.py")
    parser.add_argument("--repeat", type=positive, default=5, help="default 5; the median counts")
    jax.config.update("jax_platforms", "cpu")
    try:
        options, overrides = parse_arguments(parser, arguments)
        config = load_pretraining(options.config, {**overrides, "model.convolution": "lax"})
        found = shapes(config)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    generator, rows, sums = np.random.default_rng(0), [], np.zeros(3)
    for (x, kernel), times in found.items():
        out = (*x[:-1], kernel[-1])
        arrays = [generator.standard_normal(size).astype(np.float32) for size in (x, kernel, out)]
        calls = [in_jax(convolve_lax, arrays), in_jax(convolve_planes, arrays), in_torch(arrays)]
        exact = calls[2]()
        differences = [compare(call(), exact) for call in calls[:2]]
        if not all(one <= TOLERANCE for one in differences):
            print(f"error: {x} with {kernel}: they differ by {differences}", file=sys.stderr)
            return 1
        seconds = [
            spread(time_calls(call, jax.block_until_ready, 0, options.repeat)).median
            for call in calls
        ]
        sums += times * np.asarray(seconds)
        shape = f"{x[0]} x {' x '.join(map(str, x[1:4]))}, {kernel[3]} to {kernel[4]}"
        rows.append((shape, str(times), *map(seconds_text, seconds)))
    rows.append(("all of one pass", str(found.total()), *map(seconds_text, sums)))
    print(table(("crops, channels", "times", "lax", "planes", "PyTorch"), rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
