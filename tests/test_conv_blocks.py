import by_rule
import jax
import jax.numpy as jnp
import monai_reference as reference
import numpy as np
import pytest
import torch
from monai.networks.blocks import UnetrBasicBlock as MonaiBlock

from voco_jax.models import conv_blocks
from voco_jax.models.conv_blocks import (
    convolve_lax,
    convolve_planes,
    instance_norm,
    residual_block,
)


@pytest.mark.parametrize("columns", [1, 1500, 7200, 2**19])
@pytest.mark.parametrize(
    "shape",
    [
        (2, 4, 6, 5, 3),
        (2, 4, 6, 5, 9),
        pytest.param((1, 1, 1, 2, 4), id="planes smaller than the kernel"),
        pytest.param((2, 3, 2, 5, 4), id="planes narrower than the kernel"),
    ],
)
def test_planes_is_lax(shape: tuple[int, ...], columns: int, monkeypatch: pytest.MonkeyPatch):
    """Whatever the kernel's gradient takes at once: a row, some, two planes, all."""
    monkeypatch.setattr(conv_blocks, "COLUMNS_AT_ONCE", columns)
    _check_planes(shape)


@pytest.mark.parametrize("shape", [(2, 4, 6, 5, 1), (2, 4, 2, 5, 1)])
def test_planes_of_an_image_are_lax(shape: tuple[int, ...]):
    _check_planes(shape)


def _check_planes(shape: tuple[int, ...]) -> None:
    """Values and gradients, of x of this shape."""
    x = by_rule.noise(shape)
    kernel = by_rule.noise((3, 3, 3, shape[-1], 7), seed=1)
    ours, pull_ours = jax.vjp(convolve_planes, x, kernel)
    theirs, pull_theirs = jax.vjp(convolve_lax, x, kernel)
    np.testing.assert_allclose(ours, theirs, atol=2e-5)
    gradient = by_rule.noise(ours.shape, seed=2)
    for a, b in zip(pull_ours(gradient), pull_theirs(gradient), strict=True):
        assert by_rule.relative_error(a, b) < 1e-6


@pytest.mark.parametrize("shape", [(1, 4, 4, 4, 2), (1, 4, 4, 4, 1), (1, 2, 2, 4, 2)])
def test_planes_in_bfloat16_keeps_dtypes(shape: tuple[int, ...]):
    x = jnp.asarray(by_rule.noise(shape), jnp.bfloat16)
    kernel = jnp.asarray(by_rule.noise((3, 3, 3, shape[-1], 3), seed=1), jnp.bfloat16)
    out, pull = jax.vjp(convolve_planes, x, kernel)
    gradients = pull(jnp.ones_like(out))
    assert [a.dtype for a in (out, *gradients)] == [jnp.bfloat16] * 3
    theirs, pull = jax.vjp(convolve_lax, x.astype(jnp.float32), kernel.astype(jnp.float32))
    for a, b in zip((out, *gradients), (theirs, *pull(jnp.ones_like(theirs))), strict=True):
        assert by_rule.relative_error(a, b) < 1e-2


def test_instance_norm_equals_torch_far_from_zero():
    x = 10 + 1e-2 * by_rule.noise((2, 32, 32, 32, 6))
    theirs = torch.nn.functional.instance_norm(reference.to_torch(x).double())
    ours = instance_norm(jnp.asarray(x))
    assert by_rule.relative_error(ours, reference.from_torch(theirs)) < 1e-3
    assert instance_norm(jnp.asarray(x, jnp.bfloat16)).dtype == jnp.bfloat16


@pytest.mark.parametrize("convolution", ["lax", "planes"])
@pytest.mark.parametrize(("in_channels", "features"), [(6, 6), (1, 6)])
def test_residual_block_equals_monai(in_channels: int, features: int, convolution: str):
    theirs = MonaiBlock(3, in_channels, features, 3, 1, "instance", res_block=True).double()
    block = residual_block(
        in_channels, features, convolution=convolution, remat=False, dtype=jnp.float32
    )
    x = by_rule.noise((2, 8, 6, 4, in_channels))
    params = by_rule.abstract(block, x)
    values = reference.parameters(theirs)
    params = by_rule.load(params, values)
    expected = theirs(reference.to_torch(x).double())
    weights = by_rule.noise(tuple(expected.shape), seed=1)
    (expected * torch.from_numpy(weights)).sum().backward()

    @jax.jit
    def run(params, x, weights):
        out, pull = jax.vjp(lambda params: block.apply({"params": params}, x), params)
        return out, pull(weights)[0]

    out, gradient = run(params, x, jnp.moveaxis(weights, 1, -1))
    np.testing.assert_allclose(out, reference.from_torch(expected), atol=1e-5)
    expected_gradient = by_rule.load(params, reference.gradients(theirs))
    assert by_rule.relative_error(gradient, expected_gradient) < 1e-5


def test_recomputing_changes_nothing():
    x = by_rule.noise((2, 4, 4, 4, 3))
    gradients = []
    for remat in (False, True):
        block = residual_block(3, 5, convolution="lax", remat=remat, dtype=jnp.float32)
        params = by_rule.load_by_rule(by_rule.abstract(block, x))
        gradient = jax.jit(jax.grad(lambda v, x, m=block: jnp.sum(m.apply({"params": v}, x) ** 3)))
        gradients.append(gradient(params, x))
    assert by_rule.relative_error(*gradients) < 1e-6
