"""The commands as a user runs them: real CT in, PyTorch weights out; kill -9 and resume."""

import subprocess
import sys
from pathlib import Path

import jax
import monai_reference as reference
import numpy as np
import pytest
import torch
from conftest import shared_file
from monai.networks.nets import SwinUNETR
from networks import swin_unetr
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = {  # how the run here differs from configs/tiny.py
    "total_steps": 2,
    "data.phantoms": 0,
    "data.prepare": False,
    "data.workers": 1,
    "augment.flip_probability": 0.2,
    "augment.rotate_probability": 0.2,
    "model.use_v2": True,
    "validation.every_steps": 0,
}


def _command(module_or_file, *flags):
    start = [module_or_file] if module_or_file.endswith(".py") else ["-m", module_or_file]
    return [sys.executable, *start, *flags]


def _run(command, **options):
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _train(workdir, cache):
    flags = [f"--config.{name}={value}" for name, value in SETTINGS.items()]
    flags += [f"--workdir={workdir}", f"--config.data.sources.ct.cache={cache}"]
    return _command("main.py", "--config=configs/tiny.py", *flags)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    listed = shared_file("ct", "pretrain.json")
    folder = tmp_path_factory.mktemp("real") / "cache"
    flags = ["--datalist", listed, "--root", listed.parent, "--cache", folder]
    out = _run(
        _command("voco_jax.data.prepare", *map(str, flags), "--size", "64", "32", "64", "--strict")
    )
    assert "12 training and 3 validation volumes" in out
    return folder


@pytest.fixture(scope="module")
def whole(cache, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole")
    _run(_train(workdir, cache))
    return workdir


@pytest.mark.scripts
def test_random_kills_lose_nothing():
    """The short form of what docs/reliability.md records; the first kill comes in the start-up."""
    out = _run(_command("robustness.random_kills", "--resumes", "2", "--seed", "1"))
    assert "2 resumes that trained on" in out
    assert ", 0 losses differ" in out
    assert "0 problems" in out.splitlines()[-1]


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_exported_weights_are_monais(whole, tmp_path, suffix):
    from voco_jax.training.checkpoint import read_network

    output = tmp_path / f"voco{suffix}"
    out = _run(
        _command("voco_jax.interop.export", "--checkpoint", str(whole), "--output", str(output))
    )
    assert "SwinUNETR" in out
    model = SwinUNETR(
        in_channels=1,
        out_channels=2,
        feature_size=12,
        use_v2=True,
        window_size=4,
        depths=(1, 1, 1, 1),
    )
    weights = torch.load(output, weights_only=True) if suffix == ".pt" else load_file(output)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected
    assert missing
    assert all(name.startswith(("decoder", "out.")) for name in missing)

    params, info = read_network(whole, "teacher")
    assert info["step"] == 2
    params.pop("proj_head")
    params = jax.tree.map(np.float64, params)
    crops = np.random.default_rng(0).random((2, 64, 64, 64, 1))
    network = swin_unetr(
        feature_size=12,
        window_size=(4, 4, 4),
        depths=(1, 1, 1, 1),
        convolution="planes",
        dtype=np.float64,
    )
    with jax.enable_x64(True):
        ours = jax.jit(lambda p, x: network.apply({"params": p}, x, False))(params, crops)
    with torch.no_grad():
        states, features = reference.encode(model.double(), reference.to_torch(crops))
    for found, expected in zip(
        [*ours.hidden_states, *ours.features], [*states, *features], strict=True
    ):
        np.testing.assert_allclose(np.moveaxis(found, -1, 1), expected.numpy(), atol=1e-9)

    described = _run(_command("voco_jax.interop.inspect", str(output)))
    assert "feature size" in described.lower()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--config.model.nonsense=1"], "nonsense"),
        (["--config.crops.grid=(5, 1, 1)"], "crops.grid"),
        (["--config=configs/none.py"], "none.py"),
        (["extra"], "extra"),
        (["--nonsense"], "nonsense"),
    ],
)
def test_a_wrong_command_line_is_one_line(tmp_path, flags, message):
    command = _command("main.py", "--config=configs/demo.py", f"--workdir={tmp_path}", *flags)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1, done.stderr
    assert message in errors[0]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "command",
    ["main.py", "voco_jax.data.prepare", "voco_jax.interop.export", "voco_jax.interop.inspect"],
)
def test_help_has_an_example(command):
    done = subprocess.run(_command(command, "--help"), cwd=ROOT, capture_output=True, text=True)
    assert "xample" in done.stdout
    name = "main.py" if command == "main.py" else command
    assert f"python {name}" in done.stdout or f"python -m {name}" in done.stdout
