"""Networks with a decoder or a classifier: values beside live MONAI, files in and out.

As in test_swin_unetr.py gradients are compared in float64: at a LeakyReLU that rounds to the other
side no two float32 programs agree.
"""

import dataclasses
import functools
import itertools
from typing import Any

import by_rule
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import MUCH_TO_COMPUTE
from networks import settings
from strided_cnn import ENCODER as STRIDED_CNN

from voco_jax.errors import InputError
from voco_jax.interop.card import read_card
from voco_jax.interop.export import Card, export
from voco_jax.interop.inspect import inspect
from voco_jax.interop.inspect import main as inspect_main
from voco_jax.interop.load import load_into
from voco_jax.interop.names import to_torch, torch_shapes
from voco_jax.models.attention import attend
from voco_jax.models.encoders import ENCODERS, build_decoder, build_encoder
from voco_jax.models.network import ClassificationNetwork, SegmentationNetwork
from voco_jax.models.swin_unetr_decoder import TransposedConvolution
from voco_jax.models.swin_unetr_pytorch import architecture, decoder_shapes, encoder_shapes

SIZE = (32, 32, 64)
SMALL: dict[str, Any] = {
    "feature_size": 12,
    "depths": (1, 1, 1, 1),
    "window_size": (4, 4, 4),
    "patch_merging": "merging",
    "remat": False,
    "dtype": "float32",
}


def small(**changes):
    return settings(**{**SMALL, **changes})


def encoder(channels=1, dtype=jnp.float32, **changes):
    return build_encoder(small(**changes), "cpu", attend, channels).clone(dtype=dtype)


def segmentation(channels=1, classes=3, dtype=jnp.float32, **changes):
    decoder = build_decoder(small(**changes), "cpu", classes).clone(dtype=dtype)
    return SegmentationNetwork(encoder(channels, dtype, **changes), decoder)


def template(network, channels=1):
    return by_rule.abstract(network, jnp.zeros((1, *SIZE, channels)), False)


@functools.cache
def parameters(channels=1, classes=3):
    """Of a segmentation network, by the golden rule."""
    return by_rule.load_by_rule(template(segmentation(channels, classes), channels))


@functools.cache
def classification(hidden=0):
    """A network of three classes and its parameters by the golden rule."""
    network = ClassificationNetwork(encoder(), 3, hidden)
    return network, by_rule.load_by_rule(template(network))


def zeros(params):
    return jax.tree.map(np.zeros_like, params)


def load(params, tensors, *allowed, **changes):
    return load_into(params, tensors, *allowed, model=small(**changes))


def card(**config):
    config |= {"task": "segmentation", "total_steps": 9, "model": dataclasses.asdict(small())}
    return Card(config=config, step=9, network="network", data_fingerprint="f1e2")


def images(channels, count=1):
    crops = by_rule.crops_by_rule(0, count * channels, SIZE)[..., 0]
    return np.moveaxis(crops.reshape(count, channels, *SIZE), 1, -1)


def largest(x):
    return float(np.max(np.abs(x)))


@pytest.mark.parametrize(
    ("channels", "options", "convolution"),
    [
        (2, {"use_v2": True, "remat": True}, "planes"),
        (1, {"use_v2": False, "patch_merging": "mergingv2", "depths": (1, 2, 1, 1)}, "lax"),
    ],
)
def test_logits_and_gradients_are_monais(channels, options, convolution):
    """In float64 with `planes`, whose gradient compiles faster; logits in float32."""
    import monai_reference as reference
    import torch

    x = images(channels)
    names = ("feature_size", "depths", "window_size", "patch_merging", "use_v2")
    theirs = reference.swin_unetr(
        **{name: (SMALL | options)[name] for name in names},
        in_channels=channels,
        out_channels=3,
    ).double()
    expected = theirs(reference.to_torch(x).double())
    weights = by_rule.noise(tuple(expected.shape))
    (expected * torch.from_numpy(weights)).sum().backward()
    gradients = reference.gradients(theirs)
    values, expected = reference.parameters(theirs), reference.from_torch(expected)
    weights = np.moveaxis(weights, 1, -1)

    def projection(params, x):
        logits = network.apply({"params": params}, x, False)
        return jnp.sum(logits * weights), logits

    with jax.enable_x64(True):
        network = segmentation(channels, dtype=jnp.float64, convolution="planes", **options)
        shapes = template(network, channels)
        run = jax.jit(jax.grad(projection, has_aux=True))
        gradient, logits = jax.device_get(run(by_rule.load(shapes, values), np.float64(x)))
    assert largest(logits - expected) < 1e-9 * largest(expected)
    ours, gradients = by_rule.flatten(gradient), by_rule.flatten(by_rule.load(shapes, gradients))
    greatest = max(map(largest, gradients.values()))
    for name, value in gradients.items():
        assert largest(ours[name] - value) < 1e-9 * greatest, name
        assert by_rule.relative_error(ours[name], value) < 1e-6, name

    network = segmentation(channels, convolution=convolution, **options)
    params = jax.tree.map(np.float32, by_rule.load(shapes, values))
    compiler = MUCH_TO_COMPUTE if convolution == "lax" else None
    apply = jax.jit(
        lambda params, x: network.apply({"params": params}, x, False), compiler_options=compiler
    )
    narrow = apply(params, x)
    assert narrow.dtype == jnp.float32
    assert largest(narrow - expected) < 1e-4 * largest(expected)


def test_transposed_convolution_by_its_definition():
    x = by_rule.noise((2, 2, 3, 4, 5))
    module = TransposedConvolution(6, jnp.float32)
    kernel = by_rule.noise((2, 2, 2, 5, 6), 1)
    out = jax.jit(module.apply)({"params": {"transposed_kernel": kernel}}, x)
    assert out.shape == (2, 4, 6, 8, 6)
    for i, j, k in itertools.product((0, 1), repeat=3):
        np.testing.assert_allclose(out[:, i::2, j::2, k::2], x @ kernel[i, j, k], atol=1e-5)


def test_logits_are_float32_whatever_the_computation_is():
    network = segmentation(dtype=jnp.bfloat16)
    leaves = template(network)
    assert {leaf.dtype for leaf in jax.tree.leaves(leaves)} == {jnp.dtype("float32")}
    x = jnp.zeros((2, *SIZE, 1))
    for one in (network, ClassificationNetwork(encoder(dtype=jnp.bfloat16), 3, 8)):
        shape = jax.eval_shape(lambda x, one=one: one.init_with_output(key(), x, False)[0], x)
        assert shape.dtype == jnp.float32
        assert shape.shape == ((2, *SIZE, 3) if one is network else (2, 3))


def key():
    return jax.random.key(0)


def test_initial_values_are_pytorchs():
    x = jnp.zeros((1, *SIZE, 1))
    boxes = jax.eval_shape(lambda key: segmentation().init(key, x, False)["params"], key())
    scale = {
        "transp_conv": boxes["decoder4"]["transp_conv"]["conv"]["transposed_kernel"],
        "bias": boxes["out"]["conv"]["conv"]["bias"],
    }
    assert {name: box.distribution.scale for name, box in scale.items()} == pytest.approx(
        {
            "transp_conv": (8 * 48) ** -0.5,  # of PyTorch's ConvTranspose3d: by output channels
            "bias": 12**-0.5,
        }
    )


def test_names_and_shapes_of_the_whole():
    shapes = torch_shapes(parameters(2, 5))
    seen = architecture(shapes)
    assert (seen.in_channels, seen.out_channels) == (2, 5)
    assert shapes == encoder_shapes(seen) | decoder_shapes(12, 5)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_whole_network_to_monai_and_back(tmp_path, monkeypatch, suffix):
    """The card's snippet as it stands, strictly; and MONAI's own state into our network."""
    import torch

    params = parameters(2, 5)
    exported = export(params, tmp_path / f"whole{suffix}", card())
    assert "strict=False" not in exported.usage.snippet
    monkeypatch.chdir(tmp_path)
    seen: dict[str, Any] = {}
    exec(exported.usage.snippet, seen)
    state, ours = seen["model"].state_dict(), to_torch(params)
    assert {n for n in state if not n.endswith("position_index")} == ours.keys()
    for name, array in ours.items():
        assert state[name].numpy().tobytes() == array.tobytes(), name

    torch.save(state, tmp_path / "monai.pt")
    for path in (tmp_path / "monai.pt", exported.weights):
        back, report = load(zeros(params), path)
        assert len(report.matched) == len(ours)
        assert not [*report.missing, *report.unexpected, *report.wrong_shape]
        jax.tree.map(np.testing.assert_array_equal, back, params)


def test_card_and_inspect_of_a_whole_network(tmp_path, capsys):
    path = tmp_path / "whole.safetensors"
    chain = {"classes": [["background", [0]], ["liver", [1]], ["tumour", [2]]]}
    data, crops = {"sources": {"ct": {"chain": chain}}}, {"size": [32, 32, 64]}
    exported = export(parameters(), path, card(data=data, crops=crops))
    found = read_card(path)
    expected = {
        "task": "segmentation",
        "in_channels": 1,
        "out_channels": 3,
        "projector": False,
        "classes": ["background", "liver", "tumour"],
        "chain": chain,
        "crop_size": [32, 32, 64],
    }
    assert {name: found[name] for name in expected} == expected
    assert not {"recipe", "classifier"} & found.keys()
    assert "in_channels, out_channels, use_v2" in found["monai_note"]
    assert exported.parameters == sum(array.size for array in to_torch(parameters()).values())

    seen = inspect(path)
    assert seen["out_channels"] == 3
    assert len(seen["match"]["unexpected"]) == 22
    count = len(to_torch(parameters()))
    nothing = {"missing": [], "other_shape": [], "unexpected": []}
    assert seen["match_whole"] == {"matched": count, **nothing}
    assert inspect_main([str(path)]) == 0
    text = capsys.readouterr().out
    for line in (
        "in_channels    1\n",
        "decoder        yes, 3 output channels",
        "task segmentation, network, step 9",
        "classes        background, liver, tumour",
        "unexpected by part: decoder 22",
        "would match    SwinUNETR(in_channels=1, out_channels=3, feature_size=12, use_v2=True, ",
        f"{count} matched, 0 missing, 0 unexpected, 0 of another shape",
    ):
        assert line in text, line


@pytest.mark.parametrize("hidden", [0, 8])
def test_classification_network_to_pytorch_and_back(tmp_path, monkeypatch, capsys, hidden):
    network, params = classification(hidden)
    exported = export(params, tmp_path / "net.safetensors", card())
    back, report = load(zeros(params), exported.weights)
    assert len(report.matched) == len(to_torch(params))
    jax.tree.map(np.testing.assert_array_equal, back, params)
    sizes = [288, 8, 3] if hidden else [288, 3]
    assert read_card(exported.weights)["classifier"] == sizes
    assert inspect_main([str(exported.weights)]) == 0
    text = capsys.readouterr().out
    assert f"classifier     {' -> '.join(map(str, sizes))}" in text
    assert f"unexpected by part: classifier {4 if hidden else 2}" in text

    import monai_reference as reference
    import torch

    monkeypatch.chdir(tmp_path)
    seen: dict[str, Any] = {}
    exec(exported.usage.snippet, seen)
    x = images(1, 2)
    with torch.no_grad():
        theirs = seen["classify"](reference.to_torch(x)).numpy()
    assert theirs.shape == (2, 3)
    if hidden:
        ours = jax.jit(lambda params, x: network.apply({"params": params}, x, False))(params, x)
        np.testing.assert_allclose(ours, theirs, atol=1e-3)


def test_equal_channels_are_as_one():
    """The stem of a file of one channel, spread over three: float64, of the same image."""
    one = {name: value for name, value in parameters().items() if not name.startswith("d")}
    one = jax.tree.map(np.float64, {name: one[name] for name in one if name != "out"})
    x = images(1).astype(np.float64)
    with jax.enable_x64(True):
        options = {"dtype": jnp.float64, "convolution": "planes"}
        three = template(encoder(3, **options), 3)
        three = jax.tree.map(lambda leaf: np.zeros(leaf.shape), three)
        three, report = load(three, to_torch(one))
        outputs = [
            jax.jit(lambda p, x, n=n: encoder(n, **options).apply({"params": p}, x, False))(p, x)
            for n, p, x in ((1, one, x), (3, three, np.repeat(x, 3, axis=-1)))
        ]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-9), *outputs)
    assert not [*report.missing, *report.unexpected, *report.wrong_shape]
    (note,) = report.notes
    assert note.startswith("the file is of 1 input channel, the model of 3: repeated for each and ")
    for name in ("swinViT.patch_embed.proj", "encoder1.layer.conv1.conv", "encoder1.layer.conv3"):
        assert name in note


def test_what_does_not_fit_names_the_cause(tmp_path):
    params = parameters()
    alone = {n: a for n, a in to_torch(params).items() if not n.startswith(("decoder", "out."))}
    with pytest.raises(InputError, match=r"22 missing(.|\n)*the file has no decoder \(a pre-tra"):
        load(params, alone)
    with pytest.raises(InputError, match=r"with init.allow_missing=\(\) and init.allow_unexpect"):
        load(params, alone)
    loaded, report = load(zeros(params), alone, ("decoder*", "out.*"))
    assert len(report.missing) == 22
    assert not np.any(loaded["out"]["conv"]["conv"]["kernel"])
    np.testing.assert_array_equal(
        loaded["encoder2"]["layer"]["conv1"]["conv"]["kernel"],
        params["encoder2"]["layer"]["conv1"]["conv"]["kernel"],
    )

    five = to_torch(parameters(classes=5))
    with pytest.raises(InputError, match=r"has 5 classes, the model 3: .* unexpected 'out\.\*'"):
        load(params, five)
    _, report = load(params, five, ("out.*",), ("out.*",))
    assert {wrong.name for wrong in report.wrong_shape} == {
        "out.conv.conv.weight",
        "out.conv.conv.bias",
    }

    with pytest.raises(InputError, match=r"input channels is 2, the model's 1: take another file"):
        load(params, to_torch(parameters(channels=2)))

    (_, one), (_, two) = classification(0), classification(8)
    for template_, file, message in (
        (one, alone, r"has no classifier \(a pre-.* allow missing 'classifier\.\*'"),
        (params, one, r"has a classifier, the model has not: allow unexpected 'classifier\.\*'"),
        (two, one, r"layers \(288, 3\), the model's \(288, 8, 3\): .* missing and unexpected"),
    ):
        file = file if file is alone else to_torch(file)
        with pytest.raises(InputError, match=message):
            load(template_, file)


def test_encoders_without_a_decoder(monkeypatch):
    with pytest.raises(InputError, match=r"conv_encoders: found False, expected True: the decod"):
        build_decoder(small(conv_encoders=False), "cpu", 3)
    encoder_alone = dataclasses.replace(STRIDED_CNN, build_decoder=None)
    monkeypatch.setitem(ENCODERS, "strided_cnn", encoder_alone)
    with pytest.raises(InputError, match=r"'strided_cnn', which has no decoder .*: swin_unetr\Z"):
        build_decoder(small(encoder="strided_cnn"), "cpu", 3)


@pytest.mark.parametrize("shape", [(1, *SIZE, 1), (1, *SIZE, 3)])
def test_wrong_channels_are_an_error(shape):
    with pytest.raises(ValueError, match=r"expected \(batch, x, y, z, 2\)"):
        by_rule.abstract(segmentation(2), jnp.zeros(shape), False)
