"""The encoder against live MONAI.

MONAI runs in float64, so that its own rounding is not measured. Values are compared in float32.
Gradients are compared in float64, because in float32 no two programs agree to 1e-4 every time:
LeakyReLU's slope jumps at 0, and one of the 786,432 inputs in `layers1c` that rounds to the other
side changes the gradient by 5e-4 (with a smooth activation in its place float32 and float64 agree
to 3e-6; MONAI's own float32 and float64 gradients differ by up to 4e-3). Without v2 blocks no jump
is that large, and there float32 gradients are compared as well. Where the last stage is 1x1x2,
InstanceNorm of two voxels is nearly a sign and multiplies the rounding of its input by up to 300:
so encoder10's pooled float32 feature has a tolerance of its own there.
"""

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import by_rule
import jax
import jax.numpy as jnp
import monai_reference as reference
import numpy as np
import pytest
import torch
from conftest import MUCH_TO_COMPUTE, shared_file
from networks import network, shapes, swin_unetr

from configs import tiny
from voco_jax.config.load import parse
from voco_jax.errors import InputError
from voco_jax.models.network import EncoderOutput, Network
from voco_jax.models.swin_unetr import SwinUNETREncoder, check_crop_size
from voco_jax.training.mesh import make_mesh
from voco_jax.voco.task import make_network

SMALL: dict[str, Any] = {"feature_size": 12, "window_size": (4, 4, 4), "convolution": "planes"}
SMALL_SIZE = (32, 32, 64)


def monai_values(
    options: dict[str, Any], crops: np.ndarray
) -> tuple[dict[str, np.ndarray], list[np.ndarray], np.ndarray, dict[str, np.ndarray]]:
    """Weights, hidden states, pooled features and gradients of `projection`, in float64."""
    model = reference.swin_unetr(**options).double()
    hidden, features = reference.encode(model, reference.to_torch(crops).double())
    pooled = torch.cat([feature.mean((2, 3, 4)) for feature in features], dim=1)
    total = torch.zeros((), dtype=torch.float64)
    for output, weights in zip([*hidden, pooled], projections(hidden, pooled), strict=True):
        total = total + (output * torch.from_numpy(weights)).sum()
    total.backward()
    return (
        reference.parameters(model, reference.ENCODER),
        [reference.from_torch(state) for state in hidden],
        pooled.detach().numpy(),
        reference.gradients(model, reference.ENCODER),
    )


def projections(hidden: Any, pooled: Any) -> list[np.ndarray]:
    """Random weights for the sum of all outputs: `b c x y z` each, unit norm, and `b c`."""
    draws = [by_rule.noise(tuple(x.shape), seed) for seed, x in enumerate([*hidden, pooled])]
    return [draw / np.linalg.norm(draw) for draw in draws]


def run_with_gradient(
    model: SwinUNETREncoder, weights: list[np.ndarray]
) -> Callable[[Any, Any], tuple[EncoderOutput, Any]]:
    """A jitted function (params, crops) -> (output, gradient of the projection)."""

    def projection(params: Any, crops: Any) -> tuple[jax.Array, EncoderOutput]:
        output = model.apply({"params": params}, crops, False)
        outputs = (*output.hidden_states, output.pooled)
        rows = [np.moveaxis(w, 1, -1) for w in weights]
        return sum(jnp.sum(x * w) for x, w in zip(outputs, rows, strict=True)), output

    def run(params: Any, crops: Any) -> tuple[EncoderOutput, Any]:
        gradient, output = jax.grad(projection, has_aux=True)(params, crops)
        return output, gradient

    # XLA's own 3-D convolutions compute for longer than they compile.
    options = MUCH_TO_COMPUTE if model.convolution == "lax" else None
    return jax.jit(run, compiler_options=options)


def check_close(
    output: EncoderOutput,
    hidden: list[np.ndarray],
    pooled: np.ndarray,
    *,
    absolute: float,
    relative: float,
) -> None:
    for ours, theirs in zip((*output.hidden_states, output.pooled), [*hidden, pooled], strict=True):
        assert ours.shape == theirs.shape
        assert np.max(np.abs(ours - theirs)) < absolute
        assert by_rule.relative_error(ours, theirs) < relative


OPTIONS: dict[str, Any] = {
    "feature_size": 24,
    "window_size": (7, 7, 7),
    "use_v2": True,
    "patch_merging": "legacy",
    "depths": (2, 1, 2, 1),
    "num_heads": (2, 3, 4, 6),
}


def test_encoder_equals_monai():
    """Outputs, and gradients in float64; test_decoder.py has other options, with the decoder."""
    crops = by_rule.crops_by_rule(0, 1, SMALL_SIZE)
    values, hidden, pooled, gradients = monai_values(OPTIONS, crops)
    weights = projections([np.moveaxis(state, -1, 1) for state in hidden], pooled)

    with jax.enable_x64(True):
        model = swin_unetr(**OPTIONS, convolution="lax", dtype=jnp.float64)
        template = shapes(model, SMALL_SIZE)
        run = run_with_gradient(model, weights)
        output, gradient = run(by_rule.load(template, values), crops.astype(np.float64))
        check_close(output, hidden, pooled, absolute=1e-8, relative=1e-9)
        assert by_rule.relative_error(gradient, by_rule.load(template, gradients)) < 1e-9

    model = swin_unetr(**OPTIONS, convolution="lax")
    params = jax.tree.map(np.float32, by_rule.load(shapes(model, SMALL_SIZE), values))
    output = jax.jit(lambda p, x: model.apply({"params": p}, x, False))(params, crops)
    split = 8 * OPTIONS["feature_size"]
    assert by_rule.relative_error(output.pooled[:, split:], pooled[:, split:]) < 2e-4
    output = output.replace(pooled=output.pooled[:, :split])
    check_close(output, hidden, pooled[:, :split], absolute=1e-4, relative=1e-5)


@dataclasses.dataclass(frozen=True)
class Small:
    """The network `SMALL` with parameters by the golden rule, two crops, and its output."""

    network: Network
    params: Any
    crops: np.ndarray
    output: EncoderOutput
    embeddings: jax.Array


@pytest.fixture(scope="module")
def small() -> Small:
    both = network(**SMALL, projector_size=16)
    params = by_rule.load_by_rule(shapes(both))
    crops = by_rule.crops_by_rule(0, 2, SMALL_SIZE)
    encoder = swin_unetr(**SMALL)
    encoder_params = {name: value for name, value in params.items() if name != "proj_head"}
    assert set(encoder_params) == set(reference.ENCODER)

    @jax.jit
    def run(params: Any, encoder_params: Any, crops: Any) -> tuple[EncoderOutput, jax.Array]:
        output = encoder.apply({"params": encoder_params}, crops, False)
        return output, both.apply({"params": params}, crops, False)

    return Small(both, params, crops, *run(params, encoder_params, crops))


def test_network_is_encoder_and_projector(small: Small):
    assert small.output.pooled.shape == (2, 24 * 12)
    assert [feature.shape[1:] for feature in small.output.features] == [
        (32, 32, 64, 12),
        (16, 16, 32, 12),
        (8, 8, 16, 24),
        (4, 4, 8, 48),
        (1, 1, 2, 192),
    ]
    start = 0
    for feature in small.output.features:
        part = small.output.pooled[:, start : start + feature.shape[-1]]
        np.testing.assert_allclose(part, np.mean(feature, axis=(1, 2, 3)), atol=1e-5)
        start += feature.shape[-1]
    bound = small.network.bind({"params": small.params})
    expected = bound.proj_head(small.output.pooled)
    assert small.embeddings.shape == (2, 16)
    np.testing.assert_allclose(small.embeddings, expected, atol=1e-3)


def test_bfloat16_is_close_and_keeps_float32_parameters(small: Small):
    model = swin_unetr(**SMALL, dtype=jnp.bfloat16)
    leaves = jax.tree.leaves(shapes(model))
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype("float32")}
    params = {name: value for name, value in small.params.items() if name != "proj_head"}
    narrow = jax.jit(lambda p, x: model.apply({"params": p}, x, False))(params, small.crops)
    assert narrow.pooled.dtype == jnp.float32
    assert {x.dtype for x in (*narrow.hidden_states, *narrow.features)} == {jnp.dtype("bfloat16")}
    for a, b in zip(narrow.hidden_states, small.output.hidden_states, strict=True):
        assert by_rule.relative_error(a, b) < 0.1


def test_recomputing_keeps_the_parameters():
    assert shapes(network()) == shapes(network(remat=True))


def test_swin_alone_pools_its_last_state():
    model = swin_unetr(**SMALL, conv_encoders=False, use_v2=False, depths=(1, 1, 1, 1))
    crops = by_rule.crops_by_rule(0, 2, SMALL_SIZE)
    params = by_rule.load_by_rule(shapes(model))
    assert set(params) == {"swinViT"}
    output = jax.jit(lambda p, x: model.apply({"params": p}, x, False))(params, crops)
    assert output.features == ()
    assert output.pooled.shape == (2, 16 * 12)
    np.testing.assert_allclose(
        output.pooled, np.mean(output.hidden_states[-1], axis=(1, 2, 3)), atol=1e-6
    )


def test_published_legacy_stages():
    golden = np.load(shared_file("golden", "voco_10k_step_legacy_merging.npz"))
    config = json.loads(str(golden["config"]))
    size = tuple(config["roi"])
    options = {
        "feature_size": config["feature_size"],
        "patch_merging": "legacy",
        "convolution": "planes",
    }
    params = shapes(network(**options, projector_size=config["hidden"]), size)
    assert sorted(by_rule.flatten(params)) == sorted(golden["param_keys"].tolist())
    swin = swin_unetr(**options, conv_encoders=False)
    params = by_rule.load_by_rule({"swinViT": params["swinViT"]})
    crops = by_rule.crops_by_rule(config["seed"], 2, size)
    output = jax.jit(lambda p, x: swin.apply({"params": p}, x, False))(params, crops)
    for stage, state in enumerate(output.hidden_states):
        wide = np.asarray(state, np.float64)
        mean, deviation = np.mean(wide, axis=(1, 2, 3)), np.std(wide, axis=(1, 2, 3), ddof=1)
        for ours, theirs in ((mean, f"stage{stage}_mean"), (deviation, f"stage{stage}_std")):
            assert np.max(np.abs(ours - golden[theirs])) < 1e-4
            assert by_rule.relative_error(ours, golden[theirs]) < 1e-5


def test_published_projector_has_the_published_shapes():
    projector = shapes(network(), (64, 64, 64))["proj_head"]
    assert {
        name: by_rule.torch_shape(name, leaf)
        for name, leaf in by_rule.flatten(projector).items()
    } == {
        "layer1.0.weight": (2048, 1152), "layer1.0.bias": (2048,),
        "layer2.0.weight": (2048, 2048), "layer2.0.bias": (2048,),
        "layer3.0.weight": (2048, 2048), "layer3.0.bias": (2048,),
    }  # fmt: skip


@pytest.mark.parametrize("size", [(64, 64, 64), (32, 32, 64), (96, 32, 32)])
def test_fitting_crop_sizes(size: tuple[int, int, int]):
    check_crop_size(size)


@pytest.mark.parametrize(
    ("size", "nearest"),
    [
        ((32, 32, 32), r"\(64, 32, 32\)"),
        ((60, 60, 60), r"\(64, 32, 32\) and \(64, 64, 64\)"),
        ((0, 64, 64), r"\(32, 64, 64\)"),
        ((100, 64, 64), r"\(96, 64, 64\) and \(128, 64, 64\)"),
        ((64, 64), "three multiples of 32"),
    ],
)
def test_other_crop_sizes_are_errors(size: tuple[int, ...], nearest: str):
    with pytest.raises(ValueError, match=nearest) as error:
        check_crop_size(size)
    assert f"found {size}" in str(error.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"feature_size": 20}, r"model\.feature_size: found 20, expected a multiple of 12"),
        ({"depths": (2, 2, 2)}, r"model\.depths"),
        ({"num_heads": (3, 6, 12, 0)}, r"model\.num_heads"),
        ({"num_heads": (3, 5, 12, 24)}, r"model\.num_heads: found 5 for stage 2, .* 24 channels"),
        ({"window_size": (7, 7)}, r"model\.window_size"),
        ({"window_size": (7, 0, 7)}, r"model\.window_size"),
        ({"patch_merging": "v2"}, r"model\.patch_merging: found 'v2'.*mergingv2"),
        ({"convolution": "fft"}, r"model\.convolution: found 'fft'"),
        ({"drop_path_rate": 1.0}, r"model\.drop_path_rate"),
    ],
)
def test_impossible_settings_are_errors(settings: dict[str, Any], message: str):
    config = tiny.get_config()
    config.model.update(settings)
    with pytest.raises(InputError, match=message):
        make_network(parse(config), make_mesh())


@pytest.mark.parametrize(
    ("shape", "message"),
    [((32, 32, 32, 1), "64 or more"), ((32, 32, 64, 2), r"\(batch, x, y, z, 1\)")],
)
def test_wrong_crops_are_an_error(shape: tuple[int, ...], message: str):
    with pytest.raises(ValueError, match=message):
        by_rule.abstract(network(), jnp.zeros((2, *shape)), False)
