"""comparisons/ as a user runs them, at their smallest; they end with 1 where two sides differ."""

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import HAS_TORCH

ROOT = Path(__file__).resolve().parents[1]
pytestmark = [pytest.mark.scripts, pytest.mark.skipif(not HAS_TORCH, reason="need PyTorch")]


def _run(module, *flags):
    done = subprocess.run(
        [sys.executable, "-m", module, *flags],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_examples_in_their_docstrings():
    names = ("step_tables", "step_against_torch", "gpu", "pipeline_against_monai")
    names += ("finetune_against_monai",)
    files = [f"comparisons/{name}.py" for name in names]
    out = _run("doctest", "-v", "-o", "ELLIPSIS", *files)
    assert out.count("Test passed.") == len(files)


def test_pytorchs_step_computes_the_same():
    """In a row of three cells, so that each sub-volume has a base crop that it does not touch."""
    changes = ("crops.grid=(3, 1, 1)", "data.sources.ct.chain.volume_size=(96, 32, 64)")
    flags = [f"--config.{change}" for change in changes]
    out = _run("comparisons.step_against_torch", "--size", "tiny", "--check", *flags)
    assert "first step in float32, relative differences: pos " in out


def test_convolutions_compute_the_same():
    out = _run("comparisons.convolutions", "--config", "configs/tiny.py", "--repeat", "1")
    assert "| all of one pass" in out
