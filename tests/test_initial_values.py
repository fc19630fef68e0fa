"""Initial values: PyTorch's distributions, the same for a seed wherever they are drawn."""

import os
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import networks
import numpy as np
import pytest
import torch

from voco_jax.interop.names import to_torch
from voco_jax.models.initial_values import (
    Distribution,
    initialise,
    shuffle_weights,
    torch_uniform,
)
from voco_jax.voco.step import describe_parameters


class Own(nn.Module):
    """One layer of each kind; `wider` adds a parameter before the others."""

    wider: bool = False

    @nn.compact
    def __call__(self, x):
        if self.wider:
            x = x + self.param("added", torch_uniform(3), (3,))
        init = torch_uniform(3)
        x = nn.Dense(64, kernel_init=init, bias_init=init, name="linear")(x)
        table = self.param("table", Distribution("normal", 0.02), (4000, 64))
        return x + table[0] + self.param("scale", Distribution("constant", 1), (64,))


class Mixed(nn.Module):
    """As `Own`, and a layer with Flax's initializers."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(8, name="flax")(Own(name="own")(x))


def draw(module, seed=0, shardings=None):
    def init(key):
        return module.init(key, jnp.zeros((2, 3)))["params"]

    key = jax.random.key(seed)
    return initialise(jax.eval_shape(init, key), init, key, shardings)


@pytest.mark.parametrize("on_the_host", [True, False])
def test_weights_are_spread_like_torch(on_the_host):
    layer, shape, distribution = torch.nn.Conv3d(4, 64, 3), (3, 3, 3, 4, 64), torch_uniform(4 * 27)
    if on_the_host:
        drawn = distribution.draw(np.random.default_rng(0), shape)
    else:
        drawn = nn.unbox(distribution(jax.random.key(0), shape))
    assert np.isclose(drawn.std(), layer.weight.std().item(), rtol=0.05)
    assert np.isclose(drawn.min(), layer.weight.min().item(), rtol=0.01)
    assert np.isclose(drawn.max(), layer.weight.max().item(), rtol=0.01)
    assert abs(drawn.mean()) < 0.001
    assert drawn.dtype == np.float32


def test_a_network_has_each_parameters_distribution():
    params = draw(Own())
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}
    assert 0.5 < jnp.abs(params["linear"]["kernel"]).max() <= 3**-0.5
    assert np.isclose(params["table"].std(), 0.02, rtol=0.01)
    assert params["table"].max() > 0.07
    np.testing.assert_array_equal(params["scale"], np.ones(64))


def test_values_are_the_paths_and_the_keys():
    """Not the order's: a parameter that is added moves no other one."""
    params, wider, other = draw(Own()), draw(Own(wider=True)), draw(Own(), seed=1)
    del wider["added"]
    jax.tree.map(np.testing.assert_array_equal, params, wider)
    assert (params["linear"]["bias"] != params["linear"]["kernel"][0]).any()
    assert (params["table"] != other["table"]).any()


SPLIT = """
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from test_initial_values import Own, draw
mesh = jax.sharding.Mesh(np.asarray(jax.devices()), ("data",))
split = NamedSharding(mesh, PartitionSpec("data"))
whole = draw(Own())
place = lambda leaf: split if leaf.shape[0] % 2 == 0 else NamedSharding(mesh, PartitionSpec())
parts = draw(Own(), shardings=jax.tree.map(place, whole))
assert [part.data.shape for part in parts["table"].addressable_shards] == [(2000, 64)] * 2
jax.tree.map(np.testing.assert_array_equal, whole, parts)
"""


def test_any_sharding_has_the_same_values():
    tests = Path(__file__).parent
    environment = {
        **os.environ,
        "JAX_NUM_CPU_DEVICES": "2",
        "PYTHONPATH": f"{tests}{os.pathsep}{tests.parent}",
    }
    done = subprocess.run(
        [sys.executable, "-c", SPLIT], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_flax_draws_what_has_its_own_initializer():
    params = draw(Mixed())
    expected = nn.unbox(Mixed().init(jax.random.key(0), jnp.zeros((2, 3))))["params"]
    jax.tree.map(np.testing.assert_array_equal, params["flax"], expected["flax"])
    assert (params["own"]["table"] != expected["own"]["table"]).any()


def test_our_encoder_leaves_nothing_to_compile():
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **_: compiled.append(event) if "backend_compile" in event else None
    )
    boxes, key = describe_parameters(networks.network(), (32, 32, 64)), jax.random.key(0)
    before = len(compiled)
    params = initialise(boxes, lambda key: pytest.fail("computed"), key)
    assert len(compiled) == before
    assert np.isfinite(np.concatenate([leaf.ravel() for leaf in to_torch(params).values()])).all()


def test_shuffled_weights_keep_each_arrays_values():
    params = draw(Own())
    once, again, other = (shuffle_weights(params, seed) for seed in (3, 3, 4))
    jax.tree.map(np.testing.assert_array_equal, once, again)
    for shuffled in (once, other):
        for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(shuffled), strict=True):
            assert a.shape == b.shape
            np.testing.assert_array_equal(np.sort(a, axis=None), np.sort(b, axis=None))
        assert np.mean(shuffled["table"] == params["table"]) < 0.01
    assert np.mean(once["table"] == other["table"]) < 0.01
    alone = shuffle_weights({"table": params["table"]}, 3)
    np.testing.assert_array_equal(alone["table"], once["table"])
