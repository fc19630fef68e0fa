"""Weights and crops by the golden files' rules, and a PyTorch module's names and weights as ours.

Written apart from `voco_jax.interop` on purpose: the two check each other. Needs no PyTorch.
"""

import zlib
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np


def weight_by_rule(key: str, shape: tuple[int, ...]) -> np.ndarray:
    """The golden files' rule for the weight `key`; see shared/golden/README.md."""
    draw = np.random.default_rng(zlib.crc32(key.encode())).standard_normal(shape)
    draw = draw.astype(np.float32)
    if key.endswith("relative_position_bias_table"):
        return np.float32(0.5) * draw
    if key.endswith(".bias"):
        return np.float32(0.05) * draw
    if len(shape) == 1:
        return 1 + np.float32(0.1) * draw
    return draw / np.float32(np.sqrt(np.prod(shape[1:])))


def crops_by_rule(seed: int, count: int, size: tuple[int, int, int]) -> np.ndarray:
    """The golden files' crops, `count x y z 1`; see shared/golden/README.md."""
    rng = np.random.default_rng(seed)
    axes = [np.linspace(0, 1, extent, dtype=np.float32) for extent in size]
    grid = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1)
    crops = []
    for _ in range(count):
        frequency = rng.uniform(-4, 4, (3, 3)).astype(np.float32)
        phase = rng.uniform(0, 2 * np.pi, 3).astype(np.float32)
        crops.append(0.5 + np.mean(np.sin(grid @ frequency.T * np.pi + phase), axis=-1) / 2)
    return np.stack(crops)[..., None].astype(np.float32)


def noise(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Standard normal float32 numbers."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def flatten(params: Mapping[str, Any]) -> dict[str, Any]:
    """Our parameter tree as PyTorch names -> leaves, still in our layout."""
    flat = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        *modules, name = (entry.key for entry in path)
        parts = []
        for module in modules:
            stem, _, number = module.rpartition("_")
            parts += [stem, number] if stem and number.isdigit() else [module]
        if name in ("kernel", "scale", "transposed_kernel"):
            name = "weight"
        flat[".".join([*parts, name])] = leaf
    return flat


def torch_shape(name: str, leaf: Any) -> tuple[int, ...]:
    """The shape that our leaf has in PyTorch's layout."""
    shape = tuple(leaf.shape)
    if name.endswith(".weight") and len(shape) > 1:
        front = shape[-2:] if _is_transposed(name) else shape[:-3:-1]
        return (*front, *shape[:-2])
    return shape


def our_layout(name: str, value: np.ndarray) -> np.ndarray:
    """A PyTorch tensor's value in our layout: kernels from `out in ...` to `... in out`.

    Those of transposed convolutions are `in out ...` there.
    """
    if name.endswith(".weight") and value.ndim > 1:
        return np.moveaxis(value, (0, 1), (-2, -1) if _is_transposed(name) else (-1, -2))
    return value


def _is_transposed(name: str) -> bool:
    return ".transp_conv." in name


def load(template: Any, values: Mapping[str, np.ndarray]) -> Any:
    """PyTorch `values` in the tree `template`; every name must be on both sides, shapes equal."""
    names = list(flatten(template))
    assert sorted(names) == sorted(values), set(names) ^ set(values)
    leaves, structure = jax.tree.flatten(template)
    loaded = [our_layout(name, np.asarray(values[name])) for name in names]
    for name, ours, theirs in zip(names, leaves, loaded, strict=True):
        assert ours.shape == theirs.shape, name
    return jax.tree.unflatten(structure, [np.ascontiguousarray(value) for value in loaded])


def abstract(model: nn.Module, *inputs: Any) -> Any:
    """The shapes of a Flax module's parameters, without the time that drawing them takes."""
    variables = jax.eval_shape(lambda key: model.init(key, *inputs), jax.random.key(0))
    return nn.unbox(variables)["params"]


def load_by_rule(template: Any) -> Any:
    """The golden files' weights in the tree `template`."""
    values = {
        name: weight_by_rule(name, torch_shape(name, leaf))
        for name, leaf in flatten(template).items()
    }
    return load(template, values)


def relative_error(ours: Any, theirs: Any) -> float:
    """The L2 norm of the difference over that of `theirs`, over all leaves together."""
    pairs = list(zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True))
    difference = sum(np.sum((np.float64(a) - np.float64(b)) ** 2) for a, b in pairs)
    scale = sum(np.sum(np.float64(b) ** 2) for _, b in pairs)
    return float(np.sqrt(difference / scale))
