"""The encoder against live MONAI.

MONAI runs in float64 here: at these sizes its own float32 gradients are up to 4e-3 away from its
float64 ones (attention and InstanceNorm, summed in torch's order), ours up to 1e-5, and a
comparison in float32 would measure that. Where the last stage is 1x1x2, InstanceNorm of two
voxels is nearly a sign, so that both frameworks' float32 gradients are off by 1e-3 for the rounding
of its input: there ours runs in float64 too, and agrees to 1e-9.
"""

import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import monai_reference as reference
import numpy as np
import pytest
import torch
from conftest import shared_file

from voco_jax.models.swin_unetr import (
    EncoderOutput,
    SwinUNETREncoder,
    VoCoNetwork,
    check_crop_size,
)

SMALL: dict[str, Any] = {"feature_size": 12, "window_size": 4, "convolution": "planes"}
SMALL_SIZE = (32, 32, 64)


def shapes(model: SwinUNETREncoder | VoCoNetwork, size: tuple[int, int, int]) -> Any:
    """The abstract parameters."""
    crops = jnp.zeros((2, *size, model.in_channels))
    return jax.eval_shape(lambda key: model.init(key, crops, False), jax.random.key(0))["params"]


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
    draws = [reference.noise(tuple(x.shape), seed) for seed, x in enumerate([*hidden, pooled])]
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

    return jax.jit(run)


def check_close(output: EncoderOutput, hidden: list[np.ndarray], pooled: np.ndarray) -> None:
    for ours, theirs in zip((*output.hidden_states, output.pooled), [*hidden, pooled], strict=True):
        assert ours.shape == theirs.shape
        assert np.max(np.abs(ours - theirs)) < 1e-4
        assert reference.relative_error(ours, theirs) < 1e-5


@pytest.mark.parametrize(
    ("size", "feature_size", "window_size", "use_v2", "patch_merging", "convolution"),
    [
        ((64, 64, 64), 24, 4, True, "merging", "planes"),
        ((64, 64, 64), 12, 7, True, "legacy", "lax"),
        ((96, 64, 32), 12, 7, False, "mergingv2", "planes"),
    ],
)
def test_encoder_and_gradients_equal_monai(
    size: tuple[int, int, int],
    feature_size: int,
    window_size: int,
    use_v2: bool,
    patch_merging: str,
    convolution: str,
):
    options = {
        "feature_size": feature_size,
        "window_size": window_size,
        "use_v2": use_v2,
        "patch_merging": patch_merging,
    }
    crops = reference.crops_by_rule(0, 1, size)
    values, hidden, pooled, gradients = monai_values(options, crops)
    model = SwinUNETREncoder(**options, convolution=convolution)
    template = shapes(model, size)
    params = reference.load(template, {k: np.float32(v) for k, v in values.items()})
    run = run_with_gradient(model, projections(hidden_channels_first(hidden), pooled))
    output, gradient = run(params, crops)
    check_close(output, hidden, pooled)
    assert reference.relative_error(gradient, reference.load(template, gradients)) < 1e-4


def hidden_channels_first(hidden: list[np.ndarray]) -> list[np.ndarray]:
    return [np.moveaxis(state, -1, 1) for state in hidden]


def test_encoder_and_gradients_equal_monai_with_two_voxels_in_the_last_stage():
    options = {"feature_size": 12, "window_size": 7, "use_v2": True, "patch_merging": "merging"}
    options |= {"depths": (1, 2, 1, 1), "num_heads": (2, 3, 4, 6)}
    crops = reference.crops_by_rule(0, 2, SMALL_SIZE)
    values, hidden, pooled, gradients = monai_values(options, crops)
    with jax.enable_x64(True):
        model = SwinUNETREncoder(**options, convolution="planes", dtype=jnp.float64)
        template = shapes(model, SMALL_SIZE)
        params = reference.load(template, values)
        run = run_with_gradient(model, projections(hidden_channels_first(hidden), pooled))
        output, gradient = run(params, crops.astype(np.float64))
        check_close(output, hidden, pooled)
        for ours, theirs in zip((*output.hidden_states, output.pooled), [*hidden, pooled],
                                strict=True):  # fmt: skip
            assert reference.relative_error(ours, theirs) < 1e-9
        assert reference.relative_error(gradient, reference.load(template, gradients)) < 1e-9


@pytest.fixture(scope="module")
def small() -> tuple[Any, np.ndarray]:
    """Parameters of `SMALL` by the golden rule, and two crops."""
    network = VoCoNetwork(**SMALL, projector_size=16)
    template = shapes(network, SMALL_SIZE)
    values = {
        name: reference.weight_by_rule(name, reference.torch_shape(name, leaf))
        for name, leaf in reference.flatten(template).items()
    }
    return reference.load(template, values), reference.crops_by_rule(0, 2, SMALL_SIZE)


def test_network_is_encoder_and_projector(small: tuple[Any, np.ndarray]):
    params, crops = small
    encoder_params = {name: value for name, value in params.items() if name != "proj_head"}
    assert set(encoder_params) == set(reference.ENCODER)
    encoder, network = SwinUNETREncoder(**SMALL), VoCoNetwork(**SMALL, projector_size=16)
    output = jax.jit(lambda p, x: encoder.apply({"params": p}, x, False))(encoder_params, crops)
    assert output.pooled.shape == (2, 24 * 12)
    assert [feature.shape[1:] for feature in output.features] == [
        (32, 32, 64, 12), (16, 16, 32, 12), (8, 8, 16, 24), (4, 4, 8, 48), (1, 1, 2, 192),
    ]  # fmt: skip
    embeddings = jax.jit(lambda p, x: network.apply({"params": p}, x, False))(params, crops)
    assert embeddings.shape == (2, 16)
    bound = network.bind({"params": params})
    np.testing.assert_allclose(embeddings, bound.proj_head(output.pooled), atol=1e-3)


def test_recomputing_and_the_convolution_form_change_nothing(small: tuple[Any, np.ndarray]):
    params = {name: value for name, value in small[0].items() if name != "proj_head"}
    outputs = []
    for options in ({}, {"remat": True}, {"convolution": "lax"}):
        model = SwinUNETREncoder(**{**SMALL, "depths": (1, 1, 1, 1), **options})
        kept = shapes(model, SMALL_SIZE)
        kept = reference.load(kept, {
            name: reference.weight_by_rule(name, reference.torch_shape(name, leaf))
            for name, leaf in reference.flatten(kept).items()
        })  # fmt: skip
        assert set(kept) == set(params)

        def loss(params: Any, crops: Any, model: SwinUNETREncoder = model) -> jax.Array:
            output = model.apply({"params": params}, crops, True)
            return sum(jnp.sum(f**3) / f.size for f in output.features[:4])

        outputs.append(jax.jit(jax.value_and_grad(loss))(kept, small[1]))
    plain, recomputed, lax_form = outputs
    assert reference.relative_error(recomputed, plain) < 1e-6
    assert reference.relative_error(lax_form, plain) < 1e-4


def test_bfloat16_is_close_and_keeps_float32_parameters(small: tuple[Any, np.ndarray]):
    params = {name: value for name, value in small[0].items() if name != "proj_head"}
    crops = small[1]
    outputs = {}
    for dtype in (jnp.float32, jnp.bfloat16):
        model = SwinUNETREncoder(**SMALL, dtype=dtype)
        assert {leaf.dtype for leaf in jax.tree.leaves(shapes(model, SMALL_SIZE))} == {jnp.float32}
        outputs[dtype] = jax.jit(lambda p, x, m=model: m.apply({"params": p}, x, False))(
            params, crops
        )
    wide, narrow = outputs[jnp.float32], outputs[jnp.bfloat16]
    assert narrow.pooled.dtype == jnp.float32
    assert {x.dtype for x in (*narrow.hidden_states, *narrow.features)} == {jnp.dtype("bfloat16")}
    for a, b in zip(narrow.hidden_states, wide.hidden_states, strict=True):
        assert reference.relative_error(a, b) < 0.1


def test_swin_alone_pools_its_last_state():
    model = SwinUNETREncoder(**SMALL, conv_encoders=False, use_v2=False, depths=(1, 1, 1, 1))
    crops = reference.crops_by_rule(0, 2, SMALL_SIZE)
    params = model.init(jax.random.key(0), crops, False)
    assert set(params["params"]) == {"swinViT"}
    output = model.apply(params, crops, False)
    assert output.features == ()
    assert output.pooled.shape == (2, 16 * 12)
    np.testing.assert_allclose(
        output.pooled, np.mean(output.hidden_states[-1], axis=(1, 2, 3)), atol=1e-6
    )


@pytest.mark.parametrize(
    ("file", "patch_merging"),
    [
        ("voco_10k_step.npz", "merging"),
        ("voco_10k_step_legacy_merging.npz", "legacy"),
    ],
)
def test_published_step_has_these_stages_and_embeddings(file: str, patch_merging: str):
    golden = np.load(shared_file("golden", file))
    config = json.loads(str(golden["config"]))
    network = VoCoNetwork(
        feature_size=config["feature_size"],
        projector_size=config["hidden"],
        patch_merging=patch_merging,
        convolution="planes",
    )
    size = tuple(config["roi"])
    template = shapes(network, size)
    names = reference.flatten(template)
    assert sorted(names) == sorted(golden["param_keys"].tolist())
    params = reference.load(template, {
        name: reference.weight_by_rule(name, reference.torch_shape(name, leaf))
        for name, leaf in names.items()
    })  # fmt: skip
    count = config["batch"] * config["sub_volumes"]
    crops = np.concatenate([
        reference.crops_by_rule(config["seed"], count, size),
        reference.crops_by_rule(config["seed"] + 1, 16 * config["batch"], size),
    ])  # fmt: skip

    @jax.jit
    def run(params: Any, crops: Any) -> tuple[EncoderOutput, jax.Array]:
        bound = network.bind({"params": params})
        output = bound.encode(crops, False)
        return output, bound.proj_head(output.pooled)

    output, embeddings = run(params, crops)
    assert reference.relative_error(embeddings, golden["embed_student"]) < 1e-4
    for stage, state in enumerate(output.hidden_states):
        first = np.asarray(state[:2], np.float64)
        deviation = np.std(first, axis=(1, 2, 3), ddof=1)
        assert (
            reference.relative_error(np.mean(first, (1, 2, 3)), golden[f"stage{stage}_mean"]) < 1e-5
        )
        assert reference.relative_error(deviation, golden[f"stage{stage}_std"]) < 1e-5


def test_published_size_has_exactly_monais_parameters():
    theirs = reference.SwinUNETR(in_channels=1, out_channels=1, feature_size=48, use_v2=True)
    expected = {
        name: value.shape for name, value in reference.parameters(theirs, reference.ENCODER).items()
    }
    params = shapes(VoCoNetwork(), (64, 64, 64))
    projector = params.pop("proj_head")
    ours = {
        name: reference.torch_shape(name, leaf) for name, leaf in reference.flatten(params).items()
    }
    assert ours == expected
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 53_164_146
    assert {
        name: reference.torch_shape(name, leaf)
        for name, leaf in reference.flatten(projector).items()
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
    ("options", "message"),
    [
        ({"feature_size": 20}, "feature_size: found 20"),
        ({"depths": (2, 2, 2)}, "depths"),
        ({"num_heads": (3, 6, 12, 0)}, "num_heads"),
        ({"num_heads": (3, 5, 12, 24)}, "found 5 for stage 2, .* 96 channels"),
        ({"window_size": (7, 7)}, "window_size"),
        ({"window_size": 0}, "window_size"),
        ({"patch_merging": "v2"}, "patch_merging: found 'v2'.*mergingv2"),
        ({"convolution": "fft"}, "convolution: found 'fft'"),
        ({"drop_path_rate": 1.0}, "drop_path_rate"),
        ({"mlp_ratio": 0.0}, "mlp_ratio"),
        ({"projector_size": 0}, "projector_size"),
        ({"in_channels": 2}, r"\(batch, x, y, z, 2\)"),
    ],
)
def test_impossible_settings_are_errors(options: dict[str, Any], message: str):
    crops = jnp.zeros((2, 64, 64, 64, 1))
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda k: VoCoNetwork(**options).init(k, crops, False), jax.random.key(0))


def test_wrong_crops_are_an_error():
    crops = jnp.zeros((2, 32, 32, 32, 1))
    with pytest.raises(ValueError, match="64 or more"):
        jax.eval_shape(lambda k: VoCoNetwork().init(k, crops, False), jax.random.key(0))
