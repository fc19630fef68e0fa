"""The fused attention against plain attention, values and gradients; the plain one is MONAI's
(test_swin.py, test_swin_unetr.py)."""

import jax
import jax.numpy as jnp
import monai_reference as reference
import numpy as np
import pytest

from voco_jax.models import attention


def _arguments(b: int, windows: int, n: int, heads: int, d: int, regions: int):
    qkv = reference.noise((b, windows, n, 3, heads, d)).astype(np.float64) * 2
    bias = reference.noise((heads, n, n)).astype(np.float64)
    upper = reference.noise((b, windows, n, heads, d)).astype(np.float64)
    found = None
    if regions:
        found = jnp.asarray(np.random.default_rng(n).integers(0, regions, (windows, n)), jnp.int32)
    return jnp.asarray(qkv), jnp.asarray(bias), jnp.asarray(upper), found


def _both(function, qkv, bias, upper):
    value, back = jax.vjp(function, qkv, bias)
    return value, *back(upper)


@pytest.mark.parametrize(
    ("b", "windows", "n", "heads", "regions"),
    [(1, 1, 8, 1, 0), (2, 3, 21, 3, 0), (3, 4, 27, 2, 27)],
)
def test_fused_attention_is_plain_attention(b: int, windows: int, n: int, heads: int, regions: int):
    with jax.enable_x64(True):
        qkv, bias, upper, found = _arguments(b, windows, n, heads, 4, regions)
        plain = _both(lambda q, t: attention.attend(q, t, found), qkv, bias, upper)
        fused = _both(
            lambda q, t: attention.attend_fused(q, t, found, interpret=True), qkv, bias, upper
        )
    for ours, theirs in zip(fused, plain, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-12)


def test_bfloat16_is_rounded_where_plain_attention_rounds():
    qkv, bias, upper, found = _arguments(2, 3, 27, 2, 4, 8)
    arguments = qkv.astype(jnp.bfloat16), bias.astype(jnp.float32), upper.astype(jnp.bfloat16)
    plain = _both(lambda q, t: attention.attend(q, t, found), *arguments)
    fused = _both(lambda q, t: attention.attend_fused(q, t, found, interpret=True), *arguments)
    for ours, theirs in zip(fused, plain, strict=True):
        assert ours.dtype == theirs.dtype
        assert reference.relative_error(ours, theirs) < 1e-2
