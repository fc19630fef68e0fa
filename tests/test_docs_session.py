"""What README and docs/ say runs, run: page after page in one folder, with small networks and data.

The blocks are executed as they stand, but for /data/, which is a folder of the session, the size of
the network in MONAI, and `pip install`. The configs of the session are the shipped ones, shrunk.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import HAS_TORCH
from pages import PAGES, ROOT, SCRIPTS, blocks

from voco_jax.data.phantom import ORGANS, make_phantoms

pytestmark = [pytest.mark.scripts, pytest.mark.skipif(not HAS_TORCH, reason="need PyTorch")]

SHRUNK = '''
from originals import {name} as original
from originals.{name} import *


def get_config(*argument):
    """The shipped config of this name, for seconds."""
    config = original.get_config(*argument)
    config.total_steps = 2
    config.log_every_steps = 1
    config.optimizer.warmup_steps = 1
    config.validation.every_steps = config.checkpoint.every_steps = 2
    config.data.workers = 0
    config.data.phantoms = min(config.data.phantoms, 4)
    config.validation.volumes = 1
    config.model.feature_size = 12
    config.model.depths = (1, 1, 1, 1)
    config.model.window_size = (4, 4, 4)
    config.model.remat, config.model.crops_per_pass, config.model.dtype = False, 0, "float32"
    config.data.held_out = 0.25
    if config.task == "voco":
        config.batch_size = 1
        config.projector_size = 32
        config.validation.sub_volumes = 1
        config.crops.encoder_size = (32, 32, 64)
    return config
'''


def _session(folder: Path) -> None:
    """A checkout with small configs, and data of the names that the pages use."""
    for name in ("main.py", "voco_jax", "comparisons", "launch"):
        (folder / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "configs", folder / "originals")
    (folder / "configs").mkdir()
    for path in (ROOT / "configs").glob("*.py"):
        (folder / "configs" / path.name).write_text(SHRUNK.format(name=path.stem), "utf-8")
    shape = (96, 96, 48)
    make_phantoms(folder / "data" / "my_ct", 4, 0, shape)
    raw = folder / "data" / "nnUNet_raw" / "Dataset501_Organs"
    for name in ("imagesTr", "labelsTr"):
        (raw / name).mkdir(parents=True)
    for name in ("scans", "labels", "masks"):
        (folder / name).mkdir()
    made = folder / "data" / "labelled"
    make_phantoms(made, 2, 1, shape, labelled=True)
    for number, image in enumerate(sorted(made.glob("phantom_*.nii.gz"))):
        label = made / f"label_{image.name}"
        shutil.copy(image, raw / "imagesTr" / f"case{number}_0000.nii.gz")
        shutil.copy(label, raw / "labelsTr" / f"case{number}.nii.gz")
        shutil.copy(image, folder / "scans" / f"case{number}.nii.gz")
        shutil.copy(label, folder / "labels" / f"case{number}.nii.gz")
        shutil.copy(label, folder / "masks" / f"case{number}.nii.gz")
    labels = {"background": 0} | {name: value for value, name in enumerate(ORGANS, 1)}
    shutil.copy(folder / "scans" / "case0.nii.gz", folder / "ct.nii.gz")
    facts = {"channel_names": {"0": "CT"}, "labels": labels, "file_ending": ".nii.gz"}
    (raw / "dataset.json").write_text(json.dumps(facts), "utf-8")


def test_the_blocks_that_run(tmp_path):
    _session(tmp_path)
    prelude = "set -euo pipefail\npip() { :; }\n"
    for name, target in SCRIPTS.items():
        module, function = target.split(":")
        call = f"import sys; from {module} import {function}; sys.exit({function}())"
        prelude += f"{name}() {{ python -c '{call}' \"$@\"; }}\n"
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(tmp_path)}
    ran = 0
    for block in (one for page in PAGES for one in blocks(page) if one.mark == "runs"):
        text = block.text.replace("/data/", f"{tmp_path}/data/").replace(
            "feature_size=48",
            "feature_size=12, depths=(1, 1, 1, 1), window_size=(4, 4, 4)",
        )
        if block.language == "python":
            if "def get_config" in text:  # test_docs.py parses it
                continue
            command = [sys.executable, "-c", text]
        else:
            command = ["bash", "-c", prelude + text]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        print(f"{block}: {done.returncode}")
        assert done.returncode == 0, f"{block}\n{text}\n{done.stdout}\n{done.stderr}"
        ran += 1
        for name in ("", ".json"):  # as later pages call it
            weights = tmp_path / "runs" / "mine" / f"voco_encoder.safetensors{name}"
            if weights.exists():
                shutil.copy(weights, tmp_path / f"voco.safetensors{name}")
    assert ran > 10
    assert (tmp_path / "runs" / "finetune_demo" / "segmentation.safetensors").exists()
    assert (tmp_path / "data" / "nnUNet_raw" / "Dataset501_Organs" / "voco.json").exists()
