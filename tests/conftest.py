"""Shared set-up: one CPU backend, absl flags for grain's workers, the shared data folder."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from pathlib import Path

import numpy as np
import pytest
from absl import flags

flags.FLAGS.mark_as_parsed()

SHARED = Path(__file__).resolve().parents[2] / "shared"


def shared_file(*parts: str) -> Path:
    """A file of the data folder beside the checkout; skips the test where it is absent."""
    path = SHARED.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"needs {Path('shared', *parts)} beside the checkout")
    return path


@pytest.fixture
def generator() -> np.random.Generator:
    return np.random.default_rng(0)
