"""Exported files in MONAI's SwinUNETR, the card, and the command."""

import contextlib
import functools
import json
import os
import resource
import subprocess
import sys
import types

import jax
import numpy as np
import pytest
import torch
from by_rule import crops_by_rule, weight_by_rule
from monai_reference import encode
from monai_reference import from_torch as image_from_torch
from monai_reference import to_torch as image_to_torch
from networks import network, settings, shapes, swin_unetr

from voco_jax.config.config_files import read as read_config
from voco_jax.config.load import differences, override, parse, to_dict
from voco_jax.errors import InputError
from voco_jax.interop.card import card_path, file_sha256, read_card
from voco_jax.interop.export import Card, export, main, without_folders
from voco_jax.interop.files.weights import read
from voco_jax.interop.load import load_into
from voco_jax.interop.names import from_torch, to_torch, torch_shapes
from voco_jax.models.swin import PatchMerging

CROP = (1, 32, 32, 64, 1)


def config(*, window_size=4, use_v2=True, patch_merging="merging", depths=(2, 2, 2, 2)):
    return {
        "task": "voco",
        "recipe": "voco_10k",
        "total_steps": 100,
        "model": {
            "encoder": "swin_unetr",
            "feature_size": 12,
            "depths": list(depths),
            "num_heads": [3, 6, 12, 24],
            "window_size": [window_size] * 3,
            "patch_merging": patch_merging,
            "use_v2": use_v2,
            "conv_encoders": True,
        },
    }


def card(settings):
    return Card(config=settings, step=40, network="teacher", data_fingerprint="f1e2")


@functools.cache
def parameters(window_size=4, use_v2=True, depths=(2, 2, 2, 2)):
    """Our network's parameters, by the golden files' rule."""
    template = shapes(
        network(
            feature_size=12,
            depths=depths,
            window_size=(window_size,) * 3,
            use_v2=use_v2,
            projector_size=16,
        )
    )
    values = {
        name: weight_by_rule(name, shape).astype(np.float32)
        for name, shape in torch_shapes(template).items()
    }
    return from_torch(values, template)[0]


def load(params, path, *allowed, **changes):
    """Into a model of window 4."""
    return load_into(params, path, *allowed, model=settings(window_size=(4, 4, 4), **changes))


@pytest.mark.parametrize(
    ("suffix", "options"),
    [
        (".pt", {"window_size": 4, "use_v2": True, "patch_merging": "merging"}),
        (".safetensors", {"window_size": 7, "use_v2": False, "patch_merging": "mergingv2"}),
    ],
)
def test_monai_loads_it_and_agrees(tmp_path, monkeypatch, suffix, options):
    """The card's own snippet, run as it stands; then MONAI's features are ours.

    In float64: encoder10 ends in an InstanceNorm over two voxels, which enlarges rounding up to 300
    times, by the machine (PyTorch's float32 is 2e-4 from its own float64 there).
    """
    depths = (2, 1, 1, 1)
    params = parameters(options["window_size"], options["use_v2"], depths)
    exported = export(params, tmp_path / f"voco{suffix}", card(config(**options, depths=depths)))
    monkeypatch.chdir(tmp_path)
    seen = {}
    exec(exported.usage.snippet, seen)
    assert all(key.startswith(("decoder", "out.")) for key in seen["missing"])
    assert len(seen["missing"]) == 22
    assert seen["unexpected"] == []

    options["window_size"] = (options["window_size"],) * 3
    encoder = swin_unetr(
        feature_size=12, depths=depths, convolution="planes", dtype=np.float64, **options
    )
    x = crops_by_rule(0, 1, CROP[1:4]).astype(np.float64)
    kept = {key: tree for key, tree in params.items() if key != "proj_head"}
    kept = jax.tree.map(np.float64, kept)
    apply = jax.jit(lambda params, x: encoder.apply({"params": params}, x, False))
    with jax.enable_x64(True):
        ours = jax.device_get(apply(kept, x))
    with torch.no_grad():
        hidden, features = encode(seen["model"].double().eval(), image_to_torch(x))
    pairs = zip((*ours.hidden_states, *ours.features), (*hidden, *features), strict=True)
    for mine, theirs in pairs:
        np.testing.assert_allclose(mine, image_from_torch(theirs), rtol=0, atol=1e-9)
    pooled = torch.cat([feature.mean((2, 3, 4)) for feature in features], 1)
    np.testing.assert_allclose(ours.pooled, pooled.numpy(), rtol=0, atol=1e-9)


def test_snippet_for_legacy_merging(tmp_path, monkeypatch):
    """With the snippet's merging today's MONAI computes what our legacy merging does."""
    legacy = card(config(patch_merging="legacy"))
    exported = export(parameters(), tmp_path / "voco.pt", legacy, with_projector=True)
    monkeypatch.chdir(tmp_path)
    seen = {}
    exec(exported.usage.snippet, seen)
    assert seen["unexpected"] == []
    theirs = seen["model"].swinViT.layers2[0].downsample
    assert type(theirs).__name__ == "LegacyPatchMerging"
    x = np.random.default_rng(0).standard_normal((2, 4, 6, 2, 24)).astype(np.float32)
    ours = PatchMerging(24, "legacy", np.float32).apply(
        {"params": parameters()["swinViT"]["layers2_0"]["downsample"]}, x
    )
    with torch.no_grad():
        np.testing.assert_allclose(ours, theirs(torch.from_numpy(x)).numpy(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("with_projector", [True, False])
def test_it_comes_back_bit_for_bit(tmp_path, suffix, with_projector):
    path = tmp_path / "deep" / f"voco{suffix}"
    exported = export(parameters(), path, card(config()), with_projector=with_projector)
    tensors = read(path)
    ours = to_torch(parameters())
    kept = {k: v for k, v in ours.items() if with_projector or not k.startswith("proj_head")}
    buffers = {name for name in tensors if name.endswith("relative_position_index")}
    assert len(buffers) == 8
    assert tensors.keys() - buffers == kept.keys()
    for name, array in kept.items():
        assert tensors[name].tobytes() == array.tobytes()
    assert exported.tensors == len(tensors)
    assert exported.parameters == sum(array.size for array in kept.values())
    missing = () if with_projector else ("proj_head.*",)
    back, report = load(parameters(), path, missing)
    assert not report.unexpected
    assert report.notes == ()
    assert to_torch(back).keys() == ours.keys()


def test_an_encoder_without_convolutions_says_so(tmp_path, monkeypatch):
    """As the paper's recipe trains it: the card's snippet leaves MONAI's convolutions at random."""
    params = parameters(use_v2=False)
    swin = {"swinViT": params["swinViT"]}
    changed = config(use_v2=False)
    with pytest.raises(InputError, match="not of the config's model: conv_encoders differ"):
        export(swin, tmp_path / "voco.pt", card(changed))
    changed["model"]["conv_encoders"] = False
    exported = export(swin, tmp_path / "voco.pt", card(changed))
    monkeypatch.chdir(tmp_path)
    seen = {}
    exec(exported.usage.snippet, seen)
    assert {name.split(".")[0].rstrip("0123456789") for name in seen["missing"]} == {
        "encoder",
        "decoder",
        "out",
    }
    assert "start at random" in read_card(exported.weights)["monai_note"]
    with pytest.raises(InputError, match=r"has no convolution encoders: .* missing 'encoder\*'"):
        load(parameters(use_v2=False), exported.weights, ["proj_head.*"])
    whole = export(params, tmp_path / "whole.pt", card(config(use_v2=False)))
    with pytest.raises(InputError, match=r"set model\.conv_encoders=True or allow unexpected"):
        load(swin, whole.weights)


def test_card(tmp_path):
    path = tmp_path / "voco.pt"
    exported = export(parameters(), path, card(config()))
    assert exported.card == card_path(path)
    found = json.loads((tmp_path / "voco.pt.json").read_text())
    expected = {
        "file": "voco.pt",
        "task": "voco",
        "recipe": "voco_10k",
        "network": "teacher",
        "step": 40,
        "total_steps": 100,
        "encoder": "swin_unetr",
        "feature_size": 12,
        "in_channels": 1,
        "use_v2": True,
        "window_size": [4, 4, 4],
        "patch_merging": "merging",
        "monai_versions": ">=1.5",
        "projector": False,
        "data_fingerprint": "f1e2",
        "sha256": file_sha256(path),
        "config": config(),
    }
    assert {key: found[key] for key in expected} == expected
    assert "use_v2" in found["monai_note"]
    assert "window_size" in found["monai_note"]
    assert sorted(os.listdir(tmp_path)) == ["voco.pt", "voco.pt.json"]


@pytest.mark.parametrize(
    ("merging", "window", "versions"),
    [
        ("legacy", 7, "<1.5"),
        ("merging", 7, ">=1.5"),
        ("mergingv2", 7, "all"),
        ("legacy", 4, "none by itself"),
        ("mergingv2", 4, ">=1.5"),
    ],
)
def test_monai_versions(tmp_path, merging, window, versions):
    changed = config(window_size=window, patch_merging=merging)
    export(parameters(window), tmp_path / "voco.safetensors", card(changed))
    assert read_card(tmp_path / "voco.safetensors")["monai_versions"] == versions


def test_card_guards_the_weights(tmp_path):
    path = tmp_path / "voco.safetensors"
    export(parameters(), path, card(config()))
    with pytest.raises(InputError, match="card says patch merging 'merging', the model has 'leg"):
        load(parameters(), path, ["proj_head.*"], patch_merging="legacy")
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match="SHA-256 is not the one in"):
        load(parameters(), path, ["proj_head.*"])
    card_path(path).write_text("[1]")
    with pytest.raises(InputError, match="expected the JSON card"):
        load(parameters(), path, ["proj_head.*"])
    card_path(path).unlink()
    _, report = load(parameters(), path, ["proj_head.*"], patch_merging="legacy")
    assert any("does not say which patch merging" in note for note in report.notes)


@contextlib.contextmanager
def _files_of_at_most(size):
    """Writing more ends as on a full disk, after so many bytes and with an error of the system."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("size", [0, 100_000])
def test_failed_export_leaves_the_old_files(tmp_path, suffix, size):
    path = tmp_path / f"voco{suffix}"
    export(parameters(), path, card(config()))
    before = {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}
    with (
        _files_of_at_most(size),
        pytest.raises(InputError, match=r"voco.*cannot be written \(.*File too large.*free space"),
    ):
        export(parameters(), path, card(config()))
    assert {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)} == before


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("umask", [0o022, 0o027, 0o002])
def test_files_have_the_umask_s_mode_and_nothing_of_a_kill_stays(tmp_path, suffix, umask):
    path = tmp_path / f"voco{suffix}"
    for target in (path, card_path(path)):
        target.with_name(f"{target.name}.part").write_text("what a kill left")
        target.with_name(f"{target.name}.part").chmod(0o600)
    before = os.umask(umask)
    try:
        export(parameters(), path, card(config()))
    finally:
        os.umask(before)
    modes = {file.name: file.stat().st_mode & 0o777 for file in tmp_path.iterdir()}
    assert modes == {path.name: 0o666 & ~umask, card_path(path).name: 0o666 & ~umask}


@pytest.mark.parametrize("name", ["voco_10k", "finetune_btcv", "finetune_ccii"])
@pytest.mark.parametrize("lists", [(), ("/home/dr_who/St_Mary.json",)])
def test_a_card_s_config_names_no_folders_and_is_still_an_experiment(name, lists):
    values = read_config(f"configs/{name}.py")
    (source,) = values["data"]["sources"]
    flags = {
        f"data.sources.{source}.cache": "/mnt/St_Mary/cache",
        f"data.sources.{source}.roots": ("/mnt/St_Mary/pacs",),
        f"data.sources.{source}.lists": lists,
        "init_from": "/home/dr_who/old.pt",
    }
    experiment = parse(override(values, flags), "/home/dr_who/run")
    public = without_folders(to_dict(experiment))
    text = json.dumps(public)
    assert not [word for word in ("St_Mary", "dr_who", "pacs") if word in text]
    assert public["init_from"] == "old.pt"
    again = parse(public)
    changed = {line.split(": ")[0] for line in differences(to_dict(experiment), to_dict(again))}
    paths = {f"data.sources.{source}.{what}" for what in ("cache", "roots", "lists")}
    assert changed <= paths | {"init_from", "export_to"}


def test_what_cannot_be_exported(tmp_path):
    with pytest.raises(InputError, match=r"found suffix '\.onnx', expected \.pt or \.safetensors"):
        export(parameters(), tmp_path / "voco.onnx", card(config()))
    with pytest.raises(InputError, match="not of the config's model: window_size differ"):
        export(parameters(), tmp_path / "voco.pt", card(config(window_size=7)))
    with pytest.raises(InputError, match="not of the config's model: use_v2 differ"):
        export(parameters(), tmp_path / "voco.pt", card(config(use_v2=False)))
    broken = {**parameters(), "encoder1": {"layer": {"bias": np.float32([np.nan])}}}
    with pytest.raises(InputError, match=r"NaN or infinite values in encoder1\.layer: bias"):
        export(broken, tmp_path / "voco.pt", card(config()))
    assert not os.listdir(tmp_path)


@pytest.fixture
def checkpoint(monkeypatch):
    """A stand-in for voco_jax.training.checkpoint; returns the calls of read_network."""
    calls = []

    def read_network(workdir, network, step):
        calls.append((workdir, network, step))
        if step == 7:
            raise InputError(f"{workdir}: no step 7")
        info = {"config": config(), "step": 40, "data_fingerprint": "f1e2"}
        return parameters(), {**info, "network": network or "teacher"}

    module = types.ModuleType("voco_jax.training.checkpoint")
    module.read_network = read_network
    monkeypatch.setitem(sys.modules, "voco_jax.training.checkpoint", module)
    return calls


def test_command(tmp_path, capsys, checkpoint):
    output = tmp_path / "voco.pt"
    assert main(["--checkpoint", "runs/demo", "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    assert f"wrote {output}: 145 tensors, 3,347,274 parameters" in printed
    assert f"wrote {output}.json" in printed
    assert "SwinUNETR(" in printed
    assert read_card(output)["network"] == "teacher"
    options = ["--network", "student", "--step", "40", "--with-projector"]
    assert main(["--checkpoint", "runs/demo", "--output", str(output), *options]) == 0
    assert read_card(output)["network"] == "student"
    assert 'startswith("proj_head.")' in capsys.readouterr().out
    assert checkpoint == [("runs/demo", None, None), ("runs/demo", "student", 40)]


def test_command_errors(tmp_path, capsys, checkpoint):
    output = str(tmp_path / "voco.pt")
    assert main(["--checkpoint", "runs/demo", "--output", output, "--step", "7"]) == 2
    assert capsys.readouterr().err == "error: runs/demo: no step 7\n"
    assert main(["--checkpoint", "runs/demo", "--output", "voco.txt"]) == 2
    assert capsys.readouterr().err.startswith("error: voco.txt: found suffix '.txt'")
    (tmp_path / "file").write_text("")
    assert main(["--checkpoint", "runs/demo", "--output", str(tmp_path / "file" / "a.pt")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_help_shows_an_example():
    command = [sys.executable, "-m", "voco_jax.interop.export", "--help"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    example = "python -m voco_jax.interop.export --checkpoint runs/demo --config configs/demo.py"
    assert example in printed


def test_safetensors_without_torch(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    export(parameters(), tmp_path / "voco.safetensors", card(config()))
    with pytest.raises(InputError, match=r"pip install torch, or write \.safetensors"):
        export(parameters(), tmp_path / "voco.pt", card(config()))
    assert sorted(os.listdir(tmp_path)) == ["voco.safetensors", "voco.safetensors.json"]
