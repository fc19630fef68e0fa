"""Any encoder makes the same network, and a second one is its own files and a line in two tables.

Outside its own files (here strided_cnn.py) a new encoder touches voco_jax/models/encoders.py and
voco_jax/config/encoders.py, one line each.
"""

import by_rule
import flax.linen as nn
import jax
import jax.numpy as jnp
import monai_reference as reference
import networks
import numpy as np
import pytest
import strided_cnn
import strided_main
import torch

from voco_jax.config import encoders as settings
from voco_jax.config.load import parse, to_dict
from voco_jax.errors import InputError
from voco_jax.interop.card import read_card
from voco_jax.interop.export import Card, export
from voco_jax.interop.inspect import inspect, main
from voco_jax.interop.load import load_into
from voco_jax.interop.names import to_torch
from voco_jax.models.encoders import ENCODERS
from voco_jax.models.network import Network
from voco_jax.training import loop
from voco_jax.training.checkpoint import read_network
from voco_jax.training.mesh import make_mesh
from voco_jax.voco.task import METHOD, make_network, make_program


@pytest.fixture
def values(monkeypatch):
    """What a config file says."""
    monkeypatch.setitem(ENCODERS, "strided_cnn", strided_cnn.ENCODER)
    monkeypatch.setitem(settings.ENCODERS, "strided_cnn", strided_cnn.Settings)
    values = strided_main.get_config()
    values["model"]["attention"] = "fused"  # it has none to fuse
    return values


@pytest.fixture
def config(values):
    return parse(values)


def test_network_starts_as_its_encoder_alone():
    """Flax draws by a parameter's path: at the top level it is that of the encoder by itself."""
    crops, key = jnp.zeros((2, 8, 8, 8, 1)), jax.random.key(5)
    encoder = strided_cnn.StridedCNN((2, 4, 8), jnp.float32)
    both = nn.unbox(Network(encoder, 16, jnp.float32).init(key, crops, False)["params"])
    alone = encoder.init(key, crops, False)["params"]
    assert both.keys() - alone.keys() == {"proj_head"}
    jax.tree.map(np.testing.assert_array_equal, {name: both[name] for name in alone}, alone)


def test_its_settings_are_its_own(values):
    values["model"]["feature_size"] = 12
    with pytest.raises(InputError, match=r"model.feature_size: no such field, did you mean"):
        parse(values)
    values["model"]["encoder"] = "unet"
    with pytest.raises(InputError, match=r"model.encoder: found 'unet', expected one of swin_unet"):
        parse(values)


def test_it_trains_by_its_config_alone(values, tmp_path, capsys):
    """The whole run, from phantoms to weights; and again from these."""
    loop.run(parse(values, str(tmp_path)), tmp_path, METHOD)
    assert "validation at step 4: position accuracy" in capsys.readouterr().out
    weights, (teacher, _) = tmp_path / "voco_encoder.safetensors", read_network(tmp_path)
    found, _ = load_into(teacher, weights, ["proj_head.*"], model=parse(values).model)
    jax.tree.map(np.testing.assert_array_equal, found, teacher)
    values |= {"init_from": str(weights), "total_steps": 2}
    loop.run(parse(values, str(tmp_path / "again")), tmp_path / "again", METHOD)
    assert "matched" in capsys.readouterr().out


def test_a_second_encoder_trains(config):
    program = make_program(config, make_mesh(1, jax.devices()[:1]))
    generator = np.random.default_rng(0)
    batch = {
        name: jnp.asarray(generator.random(leaf.shape), leaf.dtype)
        if leaf.dtype == jnp.float32
        else jnp.asarray(generator.integers(0, 256, leaf.shape), leaf.dtype)
        for name, leaf in program.batch.items()
    }
    state = program.init()
    start = to_torch(jax.device_get(state.student))
    assert {name.split(".")[0] for name in start} == {"conv", "proj_head"}
    history = []
    for _ in range(3):
        state, metrics = program.step(state, batch)
        history.append(float(metrics["loss"]))
        assert float(metrics["gradient_norm"]) > 0
    assert np.isfinite(history).all()
    assert int(state.step) == 3
    changed = to_torch(jax.device_get(state.student))
    assert all((changed[name] != value).any() for name, value in start.items() if "weight" in name)


def test_its_weights_go_to_pytorch_and_come_back(config, tmp_path, monkeypatch, capsys):
    network = make_network(config, make_mesh(1, jax.devices()[:1]))
    crops = by_rule.crops_by_rule(0, 2, config.crops.encoder_size)
    params = jax.device_get(nn.unbox(network.init(jax.random.key(3), crops, False)["params"]))
    card = Card(config=to_dict(config), step=3, network="teacher", data_fingerprint="f1e2")
    exported = export(params, tmp_path / "cnn.safetensors", card)
    assert read_card(exported.weights)["encoder"] == "strided_cnn"
    assert "to load it into PyTorch:" in exported.text()

    monkeypatch.chdir(tmp_path)
    seen = {}
    exec(exported.usage.snippet, seen)
    x = reference.to_torch(crops)
    with torch.no_grad():
        for layer in seen["model"]["conv"]:
            x = layer(x).relu()
    pooled = network.apply({"params": params}, crops, False, method="encode").pooled
    np.testing.assert_allclose(pooled, x.mean((2, 3, 4)).numpy(), atol=1e-6)

    zeros = jax.tree.map(np.zeros_like, params)
    back, report = load_into(zeros, exported.weights, ["proj_head.*"], model=config.model)
    assert report.notes == ()
    kept = {name: a for name, a in to_torch(params).items() if not name.startswith("proj_head")}
    assert len(kept) == len(report.matched) == 6
    assert all(to_torch(back)[name].tobytes() == array.tobytes() for name, array in kept.items())
    swin = networks.settings()
    with pytest.raises(InputError, match=r"its card says encoder 'strided_cnn', the model has 'sw"):
        load_into(zeros, exported.weights, ["proj_head.*"], model=swin)

    assert inspect(exported.weights)["card"]["encoder"] == "strided_cnn"
    assert main([str(exported.weights)]) == 0
    assert "encoder        none of swin_unetr, strided_cnn" in capsys.readouterr().out
