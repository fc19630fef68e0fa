"""What PyTorch computed, kept for machines without it: tests/stored/*.json.

`UPDATE_GOLDEN=1 pytest ...` writes them anew; with PyTorch they are checked each time.
"""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import by_rule
import numpy as np
from conftest import HAS_TORCH

FOLDER = Path(__file__).parent / "stored"


def stored(name: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Named lists of numbers that PyTorch computes: anew where it is installed, else as stored."""
    file = FOLDER / f"{name}.json"
    if not HAS_TORCH:
        return json.loads(file.read_text("utf-8"))
    found = compute()
    if "UPDATE_GOLDEN" in os.environ:
        file.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    known = json.loads(file.read_text("utf-8"))
    assert known.keys() == found.keys()
    for key, value in found.items():
        np.testing.assert_allclose(value, known[key], rtol=1e-6, atol=1e-12, err_msg=key)
    return found


def digest(arrays: Mapping[str, Any], prefix: str) -> dict[str, list[float]]:
    """Of each array its norm, and its product with random numbers: both of about the same size."""
    found = {}
    for name, array in arrays.items():
        values = np.asarray(array, np.float64)
        random = by_rule.noise(values.shape, seed=values.size)
        found[f"{prefix}{name}"] = [float(np.linalg.norm(values)), float(np.sum(values * random))]
    return found
