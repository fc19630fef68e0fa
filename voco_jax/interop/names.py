"""Flax parameter trees <-> PyTorch's flat names: pure renaming and moving of axes.

The rule: join the path with dots; a module name that ends in `_<digits>` ends in `.<digits>` there
(`layers1_0` is `layers1.0`); a leaf `kernel` is `weight` with its last two axes, in and out, moved
to the front as out, in; a leaf `transposed_kernel` (of a transposed convolution) is `weight` with
them moved to the front as in, out; a leaf `scale` is `weight`; other leaves keep their name and
axes. So `swinViT/layers1c_0/layer/conv1/conv/kernel` is
`swinViT.layers1c.0.layer.conv1.conv.weight`.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from voco_jax.interop.match import MatchReport, WrongShape
from voco_jax.types import Params

FRONT_AXES = {"kernel": (-1, -2), "transposed_kernel": (-2, -1)}
"""Leaf -> which of its axes are the first two in PyTorch."""


def torch_name(path: Sequence[str]) -> str:
    """The PyTorch name of the parameter at a path, for example of `("layers1_0", "kernel")`."""
    *modules, leaf = path
    parts = [re.sub(r"_(\d+)\Z", r".\1", module) for module in modules]
    return ".".join([*parts, "weight" if leaf == "scale" or leaf in FRONT_AXES else leaf])


def to_torch(params: Params) -> dict[str, np.ndarray]:
    """Renames a parameter tree to PyTorch's names and moves its axes.

    Returns:
        Name -> C-contiguous array of the same dtype, in the order of the tree. A kernel
        `(*space, in, out)` becomes `(out, in, *space)`, a transposed one `(in, out, *space)`.

    Raises:
        ValueError: two parameters get the same name.
    """
    tensors: dict[str, np.ndarray] = {}
    for path, leaf in _leaves(params, ()):
        name = torch_name(path)
        if name in tensors:
            raise ValueError(f"two parameters are called {name} in PyTorch, one is {path}")
        array = np.asarray(leaf)
        if path[-1] in FRONT_AXES:
            array = np.moveaxis(array, FRONT_AXES[path[-1]], (0, 1))
        # ascontiguousarray would make a scalar one-dimensional.
        tensors[name] = np.array(array, order="C")
    return tensors


def torch_shapes(params: Params) -> dict[str, tuple[int, ...]]:
    """PyTorch's name -> shape of each parameter; leaves only need a `shape`."""
    return {torch_name(path): _torch_shape(path, leaf) for path, leaf in _leaves(params, ())}


def from_torch(
    tensors: Mapping[str, np.ndarray], template: Params, source: str = "the weights"
) -> tuple[dict[str, Any], MatchReport]:
    """Fills a parameter tree from tensors with PyTorch's names; the inverse of `to_torch`.

    Args:
        tensors: name -> array, as `weights.read` returns them.
        template: the tree to fill: nested dicts of arrays (or of anything with `shape` and
            `dtype`), which says names, shapes and dtypes.
        source: what the tensors are called in the report.

    Returns:
        A tree like `template`, and what matched. Parameters that no tensor of the same name and
        shape fills keep the template's leaf: look at the report.
    """
    matched: list[str] = []
    missing: list[str] = []
    wrong: list[WrongShape] = []

    def fill(path: tuple[str, ...], leaf: Any) -> Any:
        name, shape = torch_name(path), _torch_shape(path, leaf)
        if name not in tensors:
            missing.append(name)
            return leaf
        array = tensors[name]
        if array.shape != shape:
            wrong.append(WrongShape(name=name, found=array.shape, expected=shape))
            return leaf
        matched.append(name)
        if path[-1] in FRONT_AXES:
            array = np.moveaxis(array, (0, 1), FRONT_AXES[path[-1]])
        with np.errstate(over="ignore"):  # `load.load_into` refuses what becomes infinite
            return np.array(array, dtype=leaf.dtype, order="C")

    def walk(tree: Params, path: tuple[str, ...]) -> dict[str, Any]:
        return {
            key: walk(value, (*path, key))
            if isinstance(value, Mapping)
            else fill((*path, key), value)
            for key, value in tree.items()
        }

    params = walk(template, ())
    known = {*matched, *(item.name for item in wrong)}
    return params, MatchReport(
        source=source,
        matched=tuple(matched),
        missing=tuple(missing),
        unexpected=tuple(name for name in tensors if name not in known),
        wrong_shape=tuple(wrong),
    )


def _leaves(tree: Params, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, (*path, key))
        else:
            yield (*path, key), value


def _torch_shape(path: Sequence[str], leaf: Any) -> tuple[int, ...]:
    shape = tuple(int(extent) for extent in leaf.shape)
    if path[-1] not in FRONT_AXES:
        return shape
    first, second = FRONT_AXES[path[-1]]
    return (shape[first], shape[second], *shape[:-2])
