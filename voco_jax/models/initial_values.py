"""Initial values: PyTorch's distributions, drawn on the host.

XLA compiles a loop of its own for each array that `jax.random` draws: more than 20 s for the
demo's network (docs/benchmarks.md). NumPy compiles nothing, and draws the same values of a seed for
every device, mesh and version of JAX.
"""

import dataclasses
import functools
import math
import zlib
from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from voco_jax.types import Params, Size


@dataclasses.dataclass(frozen=True)
class Distribution:
    """An initializer for Flax: of (key, shape, dtype) makes a boxed array, see `Drawn`.

    Attributes:
        kind: "uniform", between -scale and scale; "normal", of mean 0 and deviation `scale`; or
            "constant": `scale` itself.
        scale: see there.
    """

    kind: Literal["uniform", "normal", "constant"]
    scale: float

    def __call__(
        self,
        key: jax.Array,
        shape: tuple[int, ...],
        dtype: DTypeLike = jnp.float32,
        out_sharding: None = None,
    ) -> Any:  # Flax's modules see the array in it
        if self.kind == "uniform":
            value = jax.random.uniform(key, shape, dtype, -self.scale, self.scale)
        elif self.kind == "normal":
            value = self.scale * jax.random.normal(key, shape, dtype)
        else:
            value = jnp.full(shape, self.scale, dtype)
        return Drawn(value, self)

    def draw(self, generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        """Values of this distribution, float32."""
        if self.kind == "uniform":
            return (generator.random(shape, np.float32) * 2 - 1) * np.float32(self.scale)
        if self.kind == "normal":
            return generator.standard_normal(shape, np.float32) * np.float32(self.scale)
        return np.full(shape, self.scale, np.float32)


class Drawn(flax.struct.PyTreeNode, nn.meta.AxisMetadata[Any]):
    """A parameter that knows its distribution. Modules see the array, `nn.unbox` takes it out."""

    value: Any
    distribution: Distribution = flax.struct.field(pytree_node=False)

    def unbox(self) -> Any:
        return self.value

    def replace_boxed(self, val: Any) -> "Drawn":
        return self.replace(value=val)

    def add_axis(self, index: int, params: dict[Any, Any]) -> "Drawn":
        return self

    def remove_axis(self, index: int, params: dict[Any, Any]) -> "Drawn":
        return self


def torch_uniform(fan_in: int) -> Distribution:
    """PyTorch's default for the weights and biases of linear and convolution layers.

    Args:
        fan_in: number of inputs that one output sums over.

    Returns:
        U(-1/sqrt(fan_in), 1/sqrt(fan_in)), whatever the shape (`kaiming_uniform_(a=sqrt(5))` of
        the weight, and the rule of the bias).
    """
    return Distribution("uniform", 1 / math.sqrt(fan_in))


@functools.cache
def describe_parameters(network: nn.Module, size: Size, channels: int = 1) -> Any:
    """A network's abstract parameters, boxed in `Drawn`. Traces it: checks all sizes.

    Args:
        network: of images `b x y z channels` and `train`.
        size: x y z of the images.
        channels: of the images.

    Raises:
        InputError: settings that the encoder cannot take.
    """
    return jax.eval_shape(_initialiser(network, size, channels), jax.random.key(0))


def _initialiser(network: nn.Module, size: Size, channels: int) -> Callable[[jax.Array], Any]:
    def init(key: jax.Array) -> Any:
        images = jnp.zeros((2, *size, channels), jnp.float32)
        return network.init(key, images, False)["params"]

    return init


def initial_parameters(
    network: nn.Module, size: Size, key: jax.Array, shardings: Any = None, channels: int = 1
) -> Any:
    """A network's random parameters, see `initialise` and `describe_parameters`."""
    boxes = describe_parameters(network, size, channels)
    return initialise(boxes, _initialiser(network, size, channels), key, shardings)


def initialise(
    boxes: Any, init: Callable[[jax.Array], Any], key: jax.Array, shardings: Any = None
) -> Any:
    """A network's parameters, drawn on the host, array by array.

    Each array has a stream of its own, of the key and its path, so that a parameter that is added
    moves no other one.

    Args:
        boxes: `jax.eval_shape(init, key)`.
        init: key -> parameters, as `module.init`; compiled for those that are not `Drawn`, of
            modules with Flax's own initializers.
        key: of the network, one for all.
        shardings: of each array; None: the default device.
    """
    words = [int(word) for word in np.asarray(jax.random.key_data(key))]
    flat, _ = jax.tree_util.tree_flatten_with_path(boxes, is_leaf=_is_drawn)
    tree = jax.tree.structure(boxes, is_leaf=_is_drawn)
    others = [i for i, (_, leaf) in enumerate(flat) if not _is_drawn(leaf)]
    values: dict[int, Any] = {}
    if others:

        def compute(key: jax.Array) -> list[jax.Array]:
            leaves = jax.tree.leaves(init(key), is_leaf=_is_drawn)
            return [leaves[i] for i in others]

        values = dict(zip(others, jax.device_get(jax.jit(compute)(key)), strict=True))
    for i, (path, leaf) in enumerate(flat):
        if i not in values:
            generator = _generator(words, path)
            shape, dtype = leaf.value.shape, leaf.value.dtype
            values[i] = leaf.distribution.draw(generator, shape).astype(dtype, copy=False)
    drawn = jax.tree.unflatten(tree, [values[i] for i in range(len(flat))])
    if shardings is None:
        return jax.device_put(drawn)
    return jax.tree.map(_place, drawn, shardings)


def shuffle_weights(params: Params, seed: int) -> dict[str, Any]:
    """Permutes each array's values within it: the same distribution, without what was learned.

    A control for what pre-training is worth. Each array has a stream of its own, of the seed and
    its path, as in `initialise`.

    Args:
        params: nested dicts of arrays; not changed.
        seed: not negative.

    Returns:
        The same tree of NumPy arrays.
    """

    def shuffle(path: Any, array: Any) -> np.ndarray:
        values = np.asarray(array)
        return _generator([seed], path).permutation(values.reshape(-1)).reshape(values.shape)

    return jax.tree_util.tree_map_with_path(shuffle, dict(params))


def _generator(words: list[int], path: Any) -> np.random.Generator:
    """The stream of the parameter at a path, which no other parameter moves."""
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    return np.random.default_rng([*words, zlib.crc32(name.encode())])


def _is_drawn(leaf: Any) -> bool:
    return isinstance(leaf, Drawn)


def _place(values: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
    """Each process gives what lies on its devices."""
    return jax.make_array_from_callback(values.shape, sharding, lambda part: values[part])
