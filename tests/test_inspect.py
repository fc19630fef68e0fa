"""What the inspect command says of files of the wild."""

import functools
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from monai.networks.nets import SwinUNETR
from safetensors.numpy import save_file

from voco_jax.interop.card import card_path, file_sha256
from voco_jax.interop.inspect import inspect, main
from voco_jax.models.swin_unetr_pytorch import Architecture, encoder_shapes, window_of


@functools.cache
def monai_state(**options):
    model = SwinUNETR(in_channels=options.pop("in_channels", 1), out_channels=21, **options)
    return dict(model.state_dict())


def encoder_only(state):
    return {k: v for k, v in state.items() if not k.startswith(("decoder", "out."))}


def said(capsys, path, *options):
    assert main([str(path), *options]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(
    "options",
    [
        {"feature_size": 12, "use_v2": True, "window_size": 7},
        {"feature_size": 24, "use_v2": False, "window_size": (4, 4, 4), "in_channels": 2},
        {"feature_size": 12, "use_v2": True, "depths": (1, 2, 3, 1), "num_heads": (2, 2, 4, 8)},
    ],
)
def test_options_are_recognised(tmp_path, options):
    torch.save(monai_state(**options), tmp_path / "w.pt")
    found = inspect(tmp_path / "w.pt")
    window = options.get("window_size", 7)
    assert found["feature_size"] == options["feature_size"]
    assert found["use_v2"] is options["use_v2"]
    assert found["in_channels"] == options.get("in_channels", 1)
    assert found["window_size"] == ([window] * 3 if isinstance(window, int) else list(window))
    assert found["depths"] == list(options.get("depths", (2, 2, 2, 2)))
    assert found["num_heads"] == list(options.get("num_heads", (3, 6, 12, 24)))
    assert found["out_channels"] == 21
    assert not found["match"]["missing"]
    assert not found["match"]["other_shape"]
    assert all(name.startswith(("decoder", "out.")) for name in found["match"]["unexpected"])


def test_published_size_has_published_count():
    """VoCo_10k and VoCo B: 53,164,146 parameters without the projector and buffers."""
    model = Architecture(
        feature_size=48,
        in_channels=1,
        use_v2=True,
        depths=(2, 2, 2, 2),
        num_heads=(3, 6, 12, 24),
        window_size=(7, 7, 7),
        conv_encoders=True,
        decoder=False,
        out_channels=None,
    )
    assert sum(np.prod(shape) for shape in encoder_shapes(model).values()) == 53_164_146


@pytest.mark.parametrize(
    ("rows", "tokens", "window"),
    [
        (13**3, None, (7, 7, 7)),
        (7**3, 64, (4, 4, 4)),
        (1, None, (1, 1, 1)),
        (7 * 7 * 13, 112, (4, 4, 7)),
        (7 * 7 * 13, 5, None),
        (2, None, None),
        (10**18, None, None),
    ],
)
def test_window_from_the_table(rows, tokens, window):
    assert window_of(rows, tokens) == window


def test_training_checkpoint(tmp_path, capsys):
    state = encoder_only(monai_state(feature_size=12, use_v2=True))
    state["proj_head.layer1.0.weight"] = torch.zeros(64, 288)
    both = {f"module.{who}.{k}": v for who in ("student", "teacher") for k, v in state.items()}
    torch.save({"state_dict": both, "epoch": 3, "optimizer": {"lr": 0.1}}, tmp_path / "w.pth")
    text = said(capsys, tmp_path / "w.pth")
    for line in (
        "wrappers       state_dict",
        "prefixes       module.teacher.",
        "networks       teacher, student; shown: teacher",
        "set aside      epoch, optimizer",
        "feature size 12 (none of VoCo B, L, H), v2 convolution blocks, convolution encoders: yes",
        "in_channels    1",
        "window         7 7 7",
        "projector      64 wide",
        "decoder        none",
        "parameters     encoder 3,514,134",
        "patch merging  not in the file",
        "SwinUNETR(in_channels=1, feature_size=12, use_v2=True)",
        "137 matched, 0 missing, 1 unexpected, 0 of another shape",
        "unexpected by part: projector 1",
    ):
        assert line in text, line
    assert "shown: student" in said(capsys, tmp_path / "w.pth", "--network", "student")


def test_incomplete_and_strange(tmp_path, capsys):
    state = encoder_only(monai_state(feature_size=12, use_v2=True))
    del state["encoder10.layer.conv1.conv.weight"]
    state["encoder10.layer.conv2.conv.weight"] = torch.zeros(1)
    state["fc\x1b[2J.weight"] = torch.zeros(3)
    arrays = {key: value.numpy() for key, value in state.items()}
    save_file(arrays, tmp_path / "w.safetensors")
    text = said(capsys, tmp_path / "w.safetensors")
    assert "135 matched, 1 missing, 1 unexpected, 1 of another shape" in text
    assert "missing:\n      encoder10.layer.conv1.conv: weight" in text
    assert "of another shape:\n      encoder10.layer.conv2.conv: weight" in text
    assert "\x1b" not in text
    assert "fc\\x1b[2J: weight" in text


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool])
def test_whole_numbers_and_a_prefix(tmp_path, capsys, dtype):
    state = encoder_only(monai_state(feature_size=12, use_v2=True))
    torch.save({f"model.net.{k}": v.to(dtype) for k, v in state.items()}, tmp_path / "w.pt")
    text = said(capsys, tmp_path / "w.pt")
    assert "prefixes       model.net.\n" in text
    assert f"weights        WARNING: whole numbers ({str(dtype)[6:]}), refused" in text
    assert "137 matched, 0 missing, 0 unexpected" in text


@pytest.mark.parametrize(
    "card",
    [
        "[" * 10**6,
        json.dumps({"patch_merging": json.loads("[" * 900 + "]" * 900)}),
        '{"patch_merging": [' + "[]," * 400_000 + "[]]}",
        '{"step": ' + "9" * 5000 + "}",
    ],
    ids=["deep", "nested", "long", "digits"],
)
def test_hostile_cards(tmp_path, capsys, card):
    torch.save(encoder_only(monai_state(feature_size=12, use_v2=True)), tmp_path / "w.pt")
    card_path(tmp_path / "w.pt").write_text(card)
    text = said(capsys, tmp_path / "w.pt")
    assert "card           WARNING: " in text
    assert max(map(len, text.splitlines())) < 700


def test_another_network(tmp_path, capsys):
    torch.save({"fc.weight": torch.zeros(3, 4)}, tmp_path / "w.pt")
    text = said(capsys, tmp_path / "w.pt")
    assert "encoder        none of swin_unetr\n" in text
    assert "nothing: names and shapes are not those of a complete encoder" in text


def test_model_size_b(tmp_path, capsys):
    """Only names and shapes matter: the tensors of a feature size of 48 that decide."""
    content = {"swinViT.patch_embed.proj.weight": torch.zeros(48, 1, 2, 2, 2)}
    torch.save({"net": content}, tmp_path / "w.bin")
    assert "feature size 48 (VoCo B), no v2" in said(capsys, tmp_path / "w.bin")


def test_card_beside_the_file(tmp_path, capsys):
    path = tmp_path / "w.pt"
    torch.save(encoder_only(monai_state(feature_size=12, use_v2=True)), path)
    card = {
        "recipe": "voco_10k",
        "network": "teacher",
        "step": 40,
        "patch_merging": "legacy",
        "monai_versions": "<1.5",
        "data_fingerprint": "f1e2",
        "sha256": file_sha256(path),
    }
    card_path(path).write_text(json.dumps(card))
    text = said(capsys, path)
    assert "patch merging  legacy (its card; MONAI <1.5)" in text
    assert "recipe voco_10k, teacher, step 40, data f1e2" in text
    assert "WARNING" not in text
    card_path(path).write_text(json.dumps({**card, "sha256": "0"}))
    assert "WARNING: its sha256 is not this file's" in said(capsys, path)
    card_path(path).write_text("{")
    assert "WARNING" in said(capsys, path)


def test_json(tmp_path, capsys):
    torch.save(encoder_only(monai_state(feature_size=12, use_v2=True)), tmp_path / "w.pt")
    found = json.loads(said(capsys, tmp_path / "w.pt", "--json"))
    assert found == inspect(tmp_path / "w.pt")
    assert found["parameters"] == {"encoder": 3_514_134, "buffers": 8 * 343**2}


def test_errors(tmp_path, capsys):
    (tmp_path / "w.pt").write_bytes(b"nonsense")
    assert main([str(tmp_path / "w.pt")]) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / 'w.pt'}: found a file that")


def test_command_imports_neither_jax_nor_torch(tmp_path):
    torch.save({"swinViT.a": torch.zeros(2)}, tmp_path / "w.pt")
    code = (
        "import sys; from voco_jax.interop.inspect import main; main(sys.argv[1:]); "
        "assert not {'jax', 'torch', 'flax'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "w.pt")], check=True)
    command = [sys.executable, "-m", "voco_jax.interop.inspect", "--help"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "python -m voco_jax.interop.inspect VoCo_10k.pt" in printed
