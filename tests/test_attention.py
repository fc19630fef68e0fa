"""The fused attention against plain attention, values and gradients; the plain one is MONAI's
(test_swin.py, test_swin_unetr.py)."""

from functools import partial
from types import SimpleNamespace

import by_rule
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh

from voco_jax.errors import InputError
from voco_jax.models import attention, attention_gpu
from voco_jax.plan.flops import count_flops
from voco_jax.training import attention_backend as kernels
from voco_jax.training.mesh import make_mesh


def _arguments(b: int, windows: int, n: int, heads: int, d: int, regions: int):
    qkv = by_rule.noise((b, windows, n, 3, heads, d)).astype(np.float64) * 2
    bias = by_rule.noise((heads, n, n)).astype(np.float64)
    upper = by_rule.noise((b, windows, n, heads, d)).astype(np.float64)
    found = None
    if regions:
        found = jnp.asarray(np.random.default_rng(n).integers(0, regions, (windows, n)), jnp.int32)
    return jnp.asarray(qkv), jnp.asarray(bias), jnp.asarray(upper), found


def _both(function, *arguments):
    """(qkv, bias, upper) -> the value, and the gradients with respect to qkv and bias."""

    @jax.jit
    def run(qkv, bias, upper):
        value, back = jax.vjp(function, qkv, bias)
        return value, *back(upper)

    return run(*arguments)


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


@pytest.mark.parametrize("scores", [1, 2 * 3 * 8**2, 2**20])
def test_attention_in_parts_is_plain_attention(scores, monkeypatch):
    """One window after the other, two, all."""
    monkeypatch.setattr(attention, "SCORES_AT_ONCE", scores)
    with jax.enable_x64(True):
        for regions in (0, 4):
            *arguments, found = _arguments(2, 3, 8, 3, 4, regions)
            plain = _both(lambda q, t, r=found: attention.attend(q, t, r), *arguments)
            parts = _both(lambda q, t, r=found: attention.attend_in_parts(q, t, r), *arguments)
            for ours, theirs in zip(parts, plain, strict=True):
                np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "attend", [partial(attention.attend_fused, interpret=True), attention.attend_in_parts]
)
def test_attention_in_bfloat16_stays_near_plain_attention(attend):
    """Also where keys and values are far from zero, and what a softmax's sum takes is much."""
    qkv, bias, upper, found = _arguments(2, 3, 27, 2, 4, 8)
    qkv = qkv + jnp.array([0, 1, 3])[:, None, None]
    exact = qkv.astype(jnp.float32), bias.astype(jnp.float32), upper.astype(jnp.float32)
    arguments = qkv.astype(jnp.bfloat16), exact[1], upper.astype(jnp.bfloat16)
    plain = _both(lambda q, t: attention.attend(q, t, found), *exact)
    others = _both(lambda q, t: attend(q, t, found), *arguments)
    for ours, theirs, dtype in zip(
        others, plain, (jnp.bfloat16, jnp.bfloat16, jnp.float32), strict=True
    ):
        assert ours.dtype == dtype
        assert by_rule.relative_error(ours, theirs) < 1e-2


def test_attention_in_parts_takes_mixed_widths():
    with jax.enable_x64(True):
        qkv, bias, upper, found = _arguments(1, 3, 8, 2, 4, 4)
        arguments = qkv, bias.astype(jnp.float32), upper
        plain = _both(lambda q, t: attention.attend(q, t, found), *arguments)
        parts = _both(lambda q, t: attention.attend_in_parts(q, t, found), *arguments)
    for ours, theirs in zip(parts, plain, strict=True):
        assert ours.dtype == theirs.dtype
        assert by_rule.relative_error(ours, theirs) < 1e-6


@pytest.mark.parametrize(
    ("n", "d", "dtype", "tolerance"),
    [(70, 5, jnp.float32, 1e-5), (21, 16, jnp.bfloat16, 1e-2)],
    ids=["two blocks, channels filled up", "bfloat16"],
)
def test_attention_in_blocks_is_plain_attention(n, d, dtype, tolerance, monkeypatch):
    """By JAX's interpreter of kernels; on a GPU, with JAX_PLATFORMS=cuda, by the kernels."""
    monkeypatch.setattr(attention_gpu, "_BIAS_PROGRAMS", 16)  # each sums several windows
    qkv, bias, upper, found = _arguments(2, 3, n, 2, d, 4)
    arguments = qkv.astype(dtype), bias.astype(jnp.float32), upper.astype(dtype)
    interpret = jax.default_backend() != "gpu"
    with jax.default_matmul_precision("highest"):
        plain = _both(lambda q, t: attention.attend(q, t, found), *arguments)
    blocks = _both(
        lambda q, t: attention_gpu.attend_blocks(q, t, found, interpret=interpret), *arguments
    )
    for ours, theirs in zip(blocks, plain, strict=True):
        assert ours.dtype == theirs.dtype
        assert by_rule.relative_error(ours, theirs) < tolerance


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")  # JAX 0.12
@pytest.mark.parametrize(("heads", "n", "d", "regions"), [(3, 343, 16, 1), (24, 8, 24, 0)])
def test_triton_has_every_operation_of_the_kernels(heads, n, d, regions):
    def both(qkv, bias, upper, *found):
        value, back = jax.vjp(lambda q, t: attention_gpu.attend_blocks(q, t, *found), qkv, bias)
        return value, back(upper)

    shapes = [
        jax.ShapeDtypeStruct((2, 3, n, 3, heads, d), jnp.bfloat16),
        jax.ShapeDtypeStruct((heads, n, n), jnp.float32),
        jax.ShapeDtypeStruct((2, 3, n, heads, d), jnp.bfloat16),
    ]
    found = jax.ShapeDtypeStruct((3, n), jnp.int32) if regions else None
    gpu = AbstractDevice(device_kind="NVIDIA H100", num_cores=132, platform="gpu")
    mesh = AbstractMesh((1,), ("data",), (AxisType.Auto,), abstract_device=gpu)
    with use_abstract_mesh(mesh):  # JAX after 0.10.2 asks which GPU is meant
        text = jax.jit(both).trace(*shapes, found).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("xla.gpu.triton") == 3


def test_the_kernels_products_are_counted():
    qkv, bias = np.zeros((2, 3, 8, 3, 2, 4), np.float32), np.zeros((2, 8, 8), np.float32)
    plain, fused = (
        count_flops(jax.make_jaxpr(lambda q, t, f=one: f(q, t, None))(qkv, bias).jaxpr)
        for one in (attention.attend, attention.attend_fused)
    )
    assert fused == plain == 2 * 2 * (2 * 3 * 2) * 8 * 8 * 4


def _chosen(wanted: str, **device: str):
    mesh = SimpleNamespace(devices=np.array([SimpleNamespace(**device)]))
    function = kernels.choose_attention(SimpleNamespace(attention=wanted), mesh)
    return getattr(function, "func", function)


def test_every_device_gets_the_attention_written_for_it():
    a100 = {"platform": "gpu", "device_kind": "A100", "compute_capability": "8.0"}
    v100 = {"platform": "gpu", "device_kind": "V100", "compute_capability": "7.0"}
    mi300 = {"platform": "gpu", "device_kind": "MI300", "compute_capability": "gfx942"}
    assert _chosen("auto", platform="tpu") is attention.attend_fused
    assert _chosen("auto", platform="cpu") is attention.attend_in_parts
    assert _chosen("xla", platform="cpu") is attention.attend
    assert _chosen("auto", **a100) is attention_gpu.attend_blocks
    assert _chosen("fused", **a100) is attention_gpu.attend_blocks
    assert _chosen("xla", **a100) is attention.attend
    for other in (v100, mi300):
        assert _chosen("auto", **other) is attention.attend
        with pytest.raises(InputError, match=f"'fused' on {other['device_kind']}"):
            _chosen("fused", **other)


MODEL = SimpleNamespace(
    encoder="swin_unetr",
    attention="auto",
    window_size=(2, 2, 2),
    feature_size=12,
    num_heads=(3,),
    dtype="bfloat16",
)


def test_kernels_are_tried_before_they_are_used(monkeypatch):
    """With a CPU taken for a device that has kernels."""
    (device,) = jax.local_devices()
    right = partial(attention.attend_fused, interpret=True)
    shape = 8, 4, jnp.dtype(jnp.bfloat16)
    assert kernels.find_problem(right, *shape, device) is None
    problem = kernels.find_problem(lambda q, t, r: right(q, 2 * t, r), *shape, device)
    assert problem is not None
    assert problem.startswith("their result differs by 0.")
    monkeypatch.setattr(kernels, "_runs_triton", lambda device: True)
    monkeypatch.setattr(kernels, "attend_fused", lambda q, t, r, interpret: 1 / 0)
    with pytest.warns(UserWarning, match=r"do not work on cpu \(ZeroDivisionError: division by"):
        assert kernels.choose_attention(MODEL, make_mesh()) is attention.attend


def test_kernels_that_fail_on_another_process_are_used_on_none(monkeypatch):
    monkeypatch.setattr(kernels, "_runs_triton", lambda device: True)
    working = make_mesh()
    assert kernels.choose_attention(MODEL, working) is not attention.attend
    monkeypatch.setattr(kernels, "gather", lambda own: np.array([[own[0]], [True]]))
    with pytest.warns(UserWarning, match=r"do not work on process 1 \(its log says why\)"):
        assert kernels.choose_attention(MODEL, working) is attention.attend
