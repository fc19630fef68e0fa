"""VoCo B, L and H: names, shapes and counts are MONAI's; a B goes in and out bit for bit.

A file of L holds 0.8 GB and one of H 3.4 GB. What size changes are names and shapes: these are
read by the inspect command from files of full length whose numbers are a hole in the disk.
"""

import functools
import json

import numpy as np
import pytest
import torch
from monai.networks.nets import SwinUNETR
from networks import network, shapes

from configs import voco_160k
from voco_jax.config.load import parse, to_dict
from voco_jax.interop.export import Card, export
from voco_jax.interop.files.weights import read
from voco_jax.interop.inspect import inspect
from voco_jax.interop.load import load_into
from voco_jax.interop.names import to_torch, torch_shapes

INDEX = "relative_position_index"
COUNTS = {"b": 53_164_146, "l": 211_999_362, "h": 847_276_194}  # encoder, without buffers


@functools.cache
def template(size):
    """Our parameters' shapes and dtypes, with the projector of the 160k release."""
    experiment = parse(voco_160k.get_config(size))
    options = {
        "feature_size": experiment.model.feature_size,
        "projector_size": experiment.projector_size,
    }
    return shapes(network(**options), (64, 64, 64))


@functools.cache
def monai_shapes(feature_size):
    """Name -> shape of SwinUNETR with 21 classes, as VoComni's, buffers included."""
    with pytest.MonkeyPatch.context() as patch, torch.device("meta"):
        # MONAI calls .item() on what linspace returns, which a tensor without values has not.
        patch.setattr(torch, "linspace", functools.partial(torch.linspace, device="cpu"))
        model = SwinUNETR(in_channels=1, out_channels=21, feature_size=feature_size, use_v2=True)
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def encoder_only(state):
    """The flat layout of VoCo_10k.pt and VoCo_B_SSL_head.pt."""
    return {k: v for k, v in state.items() if not k.startswith(("decoder", "out."))}


def hollow(path, shapes):
    """A safetensors file with these tensors, whose numbers take no room on the disk."""
    header, end = {}, 0
    for name, shape in shapes.items():
        dtype, item = ("I64", 8) if name.endswith(INDEX) else ("F32", 4)
        start, end = end, end + item * int(np.prod(shape))
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return path


@pytest.mark.parametrize(("size", "features"), [("b", 48), ("l", 96), ("h", 192)])
def test_names_shapes_and_counts_are_monais(tmp_path, size, features):
    theirs = monai_shapes(features)
    flat = {k: v for k, v in encoder_only(theirs).items() if not k.endswith(INDEX)}
    ours = torch_shapes(template(size))
    projector = {name: ours.pop(name) for name in list(ours) if name.startswith("proj_head.")}
    assert ours == flat
    assert projector["proj_head.layer1.0.weight"] == (1024, 24 * features)

    for name, stored, channels in (("SSL", encoder_only(theirs), None), ("omni", theirs, 21)):
        found = inspect(hollow(tmp_path / f"{name}.safetensors", stored))
        expected = {
            "model_size": size.upper(),
            "feature_size": features,
            "in_channels": 1,
            "use_v2": True,
            "window_size": [7, 7, 7],
            "depths": [2, 2, 2, 2],
            "num_heads": [3, 6, 12, 24],
            "conv_encoders": True,
            "projector_size": None,
            "decoder": channels is not None,
            "out_channels": channels,
        }
        assert {key: found[key] for key in expected} == expected
        assert found["parameters"]["encoder"] == COUNTS[size]
        others = [n for n in theirs if n.startswith(("decoder", "out."))] if channels else []
        match = {"matched": len(flat), "missing": [], "other_shape": [], "unexpected": others}
        assert found["match"] == match


@pytest.fixture(scope="module")
def published():
    """VoComni B's layout: a random number for every parameter, MONAI's own buffers."""
    small = SwinUNETR(in_channels=1, out_channels=1, feature_size=12, use_v2=True).state_dict()
    generator = torch.Generator().manual_seed(0)
    return {
        name: small[name] if name.endswith(INDEX) else torch.randn(shape, generator=generator)
        for name, shape in monai_shapes(48).items()
    }


def assert_same(found, expected):
    """Bit for bit."""
    assert found.keys() == expected.keys()
    for name, array in found.items():
        assert array.dtype == expected[name].numpy().dtype
        assert np.array_equal(array, expected[name].numpy()), name


def test_b_in_and_out_bit_for_bit(tmp_path, published):
    """A SwinUNETR of 21 classes in, the flat layout out (.pt and .safetensors), and in again."""
    flat = encoder_only(published)
    parameters = {name: value for name, value in flat.items() if not name.endswith(INDEX)}
    missing = [name for name in torch_shapes(template("b")) if name.startswith("proj_head.")]
    torch.save(published, tmp_path / "VoComni_B.pt")
    config = parse(voco_160k.get_config("b"))
    options = {"allow_missing": ["proj_head.*"], "model": config.model}
    params, report = load_into(
        template("b"),
        tmp_path / "VoComni_B.pt",
        allow_unexpected=["decoder*", "out.*"],
        **options,
    )
    (tmp_path / "VoComni_B.pt").unlink()
    assert sorted(report.matched) == sorted(parameters)
    assert sorted(report.missing) == sorted(missing)
    del params["proj_head"]
    assert_same(to_torch(params), parameters)

    card = Card(config=to_dict(config), step=1, network="student", data_fingerprint="f1e2")
    for suffix in (".pt", ".safetensors"):
        path = tmp_path / f"VoCo_B_SSL_head{suffix}"
        exported = export(params, path, card)
        assert exported.parameters == COUNTS["b"]
        assert_same(read(path), flat)
        back, report = load_into(template("b"), path, **options)
        assert not report.unexpected
        del back["proj_head"]
        assert_same(to_torch(back), parameters)
        path.unlink()
