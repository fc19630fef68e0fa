"""The name rule and its inverse, on random trees."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from voco_jax.interop.names import from_torch, to_torch, torch_name, torch_shapes

MODULES = st.one_of(
    st.from_regex(r"[a-zA-Z][a-zA-Z0-9]{0,6}(_[0-9]{1,2})?", fullmatch=True),
    st.sampled_from(["swinViT", "layers1_0", "layers1c_0", "encoder10", "proj_head", "layer_norm"]),
)
BIT_PATTERNS = st.integers(0, 2**32 - 1)


def leaves(dimensions):
    shapes = hnp.array_shapes(min_dims=dimensions[0], max_dims=dimensions[1], max_side=3)
    bits = hnp.arrays(np.uint32, shapes, elements=BIT_PATTERNS)
    return bits.map(lambda array: array.view(np.float32))


KERNEL_OR_SCALE = st.one_of(
    st.fixed_dictionaries({"kernel": leaves((2, 5))}),
    st.fixed_dictionaries({"transposed_kernel": leaves((2, 5))}),
    st.fixed_dictionaries({"scale": leaves((1, 1))}),
    st.fixed_dictionaries({"relative_position_bias_table": leaves((2, 2))}),
)
MODULE = st.builds(
    lambda weight, bias: {**weight, **bias},
    KERNEL_OR_SCALE,
    st.one_of(st.just({}), st.fixed_dictionaries({"bias": leaves((1, 1))})),
)
TREES = st.recursive(
    MODULE, lambda inner: st.dictionaries(MODULES, inner, min_size=1, max_size=3), max_leaves=6
)


def same_bits(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_bits(a[key], b[key]) for key in a)
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()


@pytest.mark.parametrize(
    ("path", "name"),
    [
        (
            "swinViT/layers1c_0/layer/conv1/conv/kernel",
            "swinViT.layers1c.0.layer.conv1.conv.weight",
        ),
        (
            "swinViT/layers1_0/blocks_1/attn/relative_position_bias_table",
            "swinViT.layers1.0.blocks.1.attn.relative_position_bias_table",
        ),
        ("proj_head/layer1_0/bias", "proj_head.layer1.0.bias"),
        ("swinViT/layers1_0/downsample/norm/scale", "swinViT.layers1.0.downsample.norm.weight"),
        ("decoder5/transp_conv/conv/transposed_kernel", "decoder5.transp_conv.conv.weight"),
        ("a_10/b_2c/kernel", "a.10.b_2c.weight"),
    ],
)
def test_names(path, name):
    assert torch_name(path.split("/")) == name


def test_axes():
    dense = np.arange(6.0).reshape(2, 3)
    conv = np.arange(2 * 3 * 4 * 5 * 6.0).reshape(2, 3, 4, 5, 6)
    tree = {"dense": {"kernel": dense}, "conv": {"kernel": conv}, "up": {"transposed_kernel": conv}}
    tensors = to_torch(tree)
    assert (tensors["dense.weight"] == dense.T).all()
    assert tensors["conv.weight"].shape == (6, 5, 2, 3, 4)
    assert tensors["conv.weight"][4, 3, 1, 2, 0] == conv[1, 2, 0, 3, 4]
    assert tensors["up.weight"].shape == (5, 6, 2, 3, 4)
    assert tensors["up.weight"][3, 4, 1, 2, 0] == conv[1, 2, 0, 3, 4]
    assert all(array.flags.c_contiguous for array in tensors.values())


@given(TREES)
@settings(max_examples=60, deadline=None)
def test_inverse_bit_for_bit(tree):
    tensors = to_torch(tree)
    assert torch_shapes(tree) == {name: array.shape for name, array in tensors.items()}
    back, report = from_torch(tensors, tree)
    assert same_bits(back, tree)
    assert set(report.matched) == set(tensors)
    assert not report.missing
    assert not report.unexpected
    assert not report.wrong_shape


def test_two_parameters_of_one_name():
    leaf = {"bias": np.zeros(1)}
    with pytest.raises(ValueError, match=r"a\.0\.bias"):
        to_torch({"a_0": leaf, "a": {"0": leaf}})


def test_what_does_not_match_keeps_the_template():
    template = {"a": {"kernel": np.ones((2, 3)), "bias": np.ones(3)}, "b": {"scale": np.ones(2)}}
    tensors = {"a.weight": np.zeros((2, 3)), "a.bias": np.zeros(3), "c.weight": np.zeros(2)}
    params, report = from_torch(tensors, template)
    assert report.matched == ("a.bias",)
    assert report.missing == ("b.weight",)
    assert report.unexpected == ("c.weight",)
    assert [(w.name, w.found, w.expected) for w in report.wrong_shape] == [
        ("a.weight", (2, 3), (3, 2))
    ]
    assert (params["a"]["kernel"] == 1).all()
    assert (params["a"]["bias"] == 0).all()
    text = report.text()
    assert "1 matched, 1 missing, 1 unexpected, 1 of another shape" in text
    assert "a.weight: file (2, 3), model (3, 2)" in text
