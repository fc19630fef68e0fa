from typing import Any

import by_rule
import jax
import jax.numpy as jnp
import monai_reference as reference
import numpy as np
import pytest
import torch
from monai.networks.nets import swin_unetr as monai_swin
from networks import swin_unetr

from voco_jax.models import swin, swin_unetr_pytorch, windows
from voco_jax.models.attention import attend
from voco_jax.types import Size

MERGINGS = {
    "legacy": reference.LegacyPatchMerging,
    "merging": monai_swin.PatchMerging,
    "mergingv2": monai_swin.PatchMergingV2,
}


@pytest.mark.parametrize("window", [(7, 7, 7), (4, 4, 4), (2, 3, 5)])
def test_relative_positions_equal_monai(window: Size):
    attention = monai_swin.WindowAttention(6, 3, window)
    index = swin_unetr_pytorch.relative_position_index(window)
    np.testing.assert_array_equal(index, attention.relative_position_index.numpy())
    table = by_rule.noise((int(index.max()) + 1, 3))
    for tokens in (index.shape[0], 8, 1):
        bias = windows.relative_position_bias(jnp.asarray(table), window, tokens)
        expected = table[index[:tokens, :tokens]].transpose(2, 0, 1)
        np.testing.assert_array_equal(bias, expected)


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-6), (jnp.bfloat16, 2**-8)])
def test_gelu_is_torchs(dtype: Any, tolerance: float):
    """In bfloat16 too but for the result's rounding."""
    x = jnp.linspace(-9, 9, 1001, dtype=dtype)
    exact = torch.from_numpy(np.asarray(x, np.float64)).requires_grad_()
    expected = torch.nn.functional.gelu(exact)
    upper = jnp.linspace(-2, 3, 1001, dtype=dtype)
    expected.backward(torch.from_numpy(np.asarray(upper, np.float64)))
    ours, pull = jax.vjp(swin.gelu, x)
    for a, b in ((ours, expected), (pull(upper)[0], exact.grad)):
        assert a.dtype == dtype
        np.testing.assert_allclose(
            np.asarray(a, np.float64), b.detach().numpy(), rtol=tolerance, atol=2e-6
        )


@pytest.mark.parametrize("size", [(12, 12, 12), (12, 8, 4), (8, 4, 2)])
def test_shift_regions_equal_monai(size: Size):
    window, shift = windows.fit_window(size, (4, 4, 4), shifted=True)
    assert (window, shift) == monai_swin.get_window_size(size, (4, 4, 4), (2, 2, 2))
    regions = windows.shift_regions(size, window, shift)
    assert (regions >= 0).all()
    assert (regions < 27).all()
    mask = jnp.where(regions[:, :, None] == regions[:, None, :], 0.0, -100.0)
    expected = monai_swin.compute_mask(size, window, shift, "cpu").numpy()
    np.testing.assert_array_equal(mask, expected)


def test_shift_regions_are_no_constant():
    run = jax.jit(lambda x: x + windows.shift_regions((28, 28, 28), (7, 7, 7), (3, 3, 3)))
    text = run.lower(jax.ShapeDtypeStruct((64, 343), jnp.int32)).as_text()
    assert len(text) < 20_000


def test_windows_come_back():
    x = jnp.asarray(by_rule.noise((2, 4, 6, 10, 3)))
    cut = windows.window_partition(x, (2, 3, 5))
    expected = monai_swin.window_partition(torch.from_numpy(np.array(x)), (2, 3, 5))
    np.testing.assert_array_equal(cut.reshape(expected.shape), expected.numpy())
    np.testing.assert_array_equal(windows.window_reverse(cut, (2, 3, 5), (4, 6, 10)), x)


@pytest.mark.parametrize("patch_merging", list(MERGINGS))
def test_patch_merging_equals_monai(patch_merging: str):
    theirs = MERGINGS[patch_merging](6)
    ours = swin.PatchMerging(6, patch_merging, jnp.float32)
    x = by_rule.noise((2, 4, 2, 6, 6))
    params = by_rule.abstract(ours, x)
    params = by_rule.load(params, reference.parameters(theirs))
    expected = theirs(torch.from_numpy(x)).detach().numpy()
    np.testing.assert_allclose(ours.apply({"params": params}, x), expected, atol=1e-5)


@pytest.mark.parametrize("size", [(9, 8, 3), (4, 4, 4), (6, 2, 2)])
@pytest.mark.parametrize("shifted", [False, True])
def test_block_equals_monai_with_padding_and_shrunken_windows(size: Size, shifted: bool):
    full = (4, 4, 4)
    shift = (2, 2, 2) if shifted else (0, 0, 0)
    theirs = monai_swin.SwinTransformerBlock(10, 5, full, shift)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            value = by_rule.weight_by_rule(name, tuple(parameter.shape))
            parameter.copy_(torch.from_numpy(value))
    ours = swin.SwinTransformerBlock(10, 5, full, shifted, 0.0, attend, jnp.float32)
    x = by_rule.noise((2, *size, 10))
    params = by_rule.abstract(ours, x, False)
    params = by_rule.load(params, reference.parameters(theirs))
    window, used = monai_swin.get_window_size(size, full, shift)
    padded = [-(-extent // w) * w for extent, w in zip(size, window, strict=True)]
    mask = monai_swin.compute_mask(padded, window, used, "cpu")
    expected = theirs(torch.from_numpy(x), mask).detach().numpy()
    out = jax.jit(lambda p, x: ours.apply({"params": p}, x, False))(params, x)
    np.testing.assert_allclose(out, expected, atol=1e-5)


def test_drop_path():
    x = jnp.asarray(by_rule.noise((512, 2, 2, 2, 6)))
    block = swin.SwinTransformerBlock(6, 2, (4, 4, 4), False, 0.4, attend, jnp.float32)
    kept = block.clone(drop_path=0.0)
    variables = {"params": by_rule.load_by_rule(by_rule.abstract(block, x, False))}
    np.testing.assert_array_equal(block.apply(variables, x, False), kept.apply(variables, x, False))

    first = block.apply(variables, x, True, rngs={"dropout": jax.random.key(1)})
    again = block.apply(variables, x, True, rngs={"dropout": jax.random.key(1)})
    other = block.apply(variables, x, True, rngs={"dropout": jax.random.key(2)})
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)

    untouched = np.mean(np.all(np.asarray(first) == np.asarray(x), axis=(1, 2, 3, 4)))
    assert abs(untouched - 0.4**2) < 0.06  # both branches of a sample dropped, independently
    branch = block.apply(
        variables, x, True, method="_drop_path", rngs={"dropout": jax.random.key(3)}
    )
    ratio = np.asarray(branch / x).reshape(512, -1)
    assert set(np.round(np.unique(ratio), 4)) == {np.float32(0.0), np.round(np.float32(1 / 0.6), 4)}
    assert abs(ratio.mean() - 1) < 0.1


@pytest.mark.parametrize("drop_path", [0.0, 0.5])
def test_recomputing_changes_nothing(drop_path: float):
    gradients = []
    with jax.enable_x64(True):
        x = by_rule.noise((2, 6, 6, 4, 6)).astype(np.float64)
        for remat in (False, True):
            rates = (0.0, drop_path)
            stage = swin.BasicLayer(
                6, 2, 3, (4, 4, 4), "merging", rates, remat, attend, jnp.float64
            )
            params = by_rule.load_by_rule(by_rule.abstract(stage, x, False))
            variables = {"params": jax.tree.map(np.float64, params)}

            def loss(variables: Any, x: Any, stage: swin.BasicLayer = stage) -> jax.Array:
                rngs = {"dropout": jax.random.key(5)}
                return jnp.sum(stage.apply(variables, x, True, rngs=rngs) ** 3)

            gradients.append(jax.jit(jax.grad(loss))(variables, x))
            assert ("remat" in str(jax.make_jaxpr(loss)(variables, x))) == remat
        assert by_rule.relative_error(*gradients) < 1e-12


def test_drop_path_rates_rise_from_zero():
    model = swin_unetr(depths=(1, 2, 1, 1), drop_path_rate=0.4)
    bound = model.bind({"params": {}}).swinViT
    stages = [bound.layers1, bound.layers2, bound.layers3, bound.layers4]
    rates = [block.drop_path for (stage,) in stages for block in stage.blocks]
    np.testing.assert_allclose(rates, torch.linspace(0, 0.4, 5).numpy(), rtol=1e-6)
