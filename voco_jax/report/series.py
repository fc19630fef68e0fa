"""The numbers of metrics.jsonl, as columns."""

import json
import math
from array import array
from pathlib import Path
from typing import Any

import numpy as np

Series = tuple[np.ndarray, np.ndarray]
"""Steps (n,) int64, rising, and values (n,) float64; some may not be finite."""


def read_metrics(path: Path) -> dict[str, Series]:
    """The columns of metrics.jsonl; lines that a kill cut off are left out.

    Args:
        path: of the file.

    Returns:
        Name -> steps and values, one of each step (the last that was written).

    Raises:
        OSError: it cannot be read.
        ValueError: it is not empty, and no line of it is one of metrics.
    """
    steps: dict[str, array[int]] = {}
    values: dict[str, array[float]] = {}
    lines = good = 0
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            lines += 1
            try:
                record = json.loads(line)
                step = record.pop("step")
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                continue
            if type(step) is not int or not 0 <= step < 2**62:
                continue
            good += 1
            for name, value in record.items():
                if type(value) is not float:
                    if type(value) is not int or abs(value) > 2**53:
                        continue
                    value = float(value)
                if name not in steps:
                    steps[name], values[name] = array("q"), array("d")
                steps[name].append(step)
                values[name].append(value)
    if lines > 1 and not good:
        raise ValueError(f"{path.name}: none of its {lines} lines is a JSON object with a step")
    return {name: _rising(np.array(steps[name]), np.array(values[name])) for name in steps}


def _rising(steps: np.ndarray, values: np.ndarray) -> Series:
    """Each step once, with its last value."""
    if len(steps) > 1 and (np.diff(steps) <= 0).any():
        order = np.argsort(steps, kind="stable")
        steps, values = steps[order], values[order]
        last = np.append(np.diff(steps) > 0, True)
        steps, values = steps[last], values[last]
    return steps, values


def finite(value: Any) -> bool:
    """Whether something is a number that can be shown."""
    return isinstance(value, int | float) and math.isfinite(value)
