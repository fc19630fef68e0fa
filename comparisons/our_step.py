"""Our step for step_against_torch.py, in a process of its own; needs no PyTorch.

    python -m comparisons.our_step FILE    # JSON of what to run; what was found takes its place

is how step_against_torch.py starts it under another Python, whose JAX may be a newer one.
"""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from voco_jax import large_pages
from voco_jax.benchmark.measure import ChildError, write_json
from voco_jax.config.load import parse, to_dict
from voco_jax.config.pretraining import Pretraining


@dataclasses.dataclass(frozen=True)
class Row:
    """One side's variant at a batch size; `exact`: products in full float32, for the check."""

    side: str  # "voco_jax" or "PyTorch"
    variant: str
    config: Pretraining
    exact: bool = False


def without_augmentation(config: Pretraining, batch_size: int) -> Pretraining:
    """Of the same cost: what is drawn is applied with a mask, whatever the probability."""
    still = dataclasses.replace(
        config.augment, flip_probability=0.0, rotate_probability=0.0, shift_probability=0.0
    )
    rate = dataclasses.replace(config.optimizer, warmup_steps=0)
    return dataclasses.replace(config, augment=still, optimizer=rate, batch_size=batch_size)


def save_arrays(path: Path, arrays: Mapping[str, Any]) -> None:
    """As .npz, for either side."""
    np.savez(path, **arrays)


def platform() -> str:
    """Of the devices that JAX finds; for a process of its own."""
    import jax

    return jax.default_backend()


def run_ours(
    row: Row, folder: Path, steps: int, warmup: int, ceiling: float | None
) -> dict[str, Any]:
    """One row of our side, in the process that measures it; the first leaves its weights."""
    import jax

    from voco_jax.benchmark.step import build, run
    from voco_jax.interop.names import from_torch, to_torch

    jax.config.update("jax_enable_compilation_cache", False)
    if row.exact:
        jax.config.update("jax_default_matmul_precision", "highest")
    built = build(row.config, dict(np.load(folder / f"batch_{row.config.batch_size}.npz")))
    networks: dict[str, Any] = {"student": built.state.student, "teacher": built.state.teacher}
    for name, params in networks.items():
        path = folder / f"{name}.npz"
        if path.exists():
            values, report = from_torch(dict(np.load(path)), params)
            assert report.missing == report.wrong_shape == (), report
            networks[name] = jax.device_put(values, jax.tree.map(lambda x: x.sharding, params))
        else:
            save_arrays(path, to_torch(jax.device_get(params)))
    built.state = dataclasses.replace(built.state, **networks)
    before = jax.device_get(built.state.student)
    measured = run(built, steps, warmup, ceiling)
    found = {**dataclasses.asdict(measured), "version": f"jax {jax.__version__}"}
    if steps + warmup == 1:
        after = jax.device_get(built.state.student)
        changes = jax.tree.leaves(jax.tree.map(lambda a, b: np.sum((a - b) ** 2.0), after, before))
        found["first"]["update_norm"] = float(np.sqrt(sum(changes)))
    return found


def run_ours_with(
    python: str,
    limit: float | None,
    row: Row,
    folder: Path,
    steps: int,
    warmup: int,
    ceiling: float | None,
) -> dict[str, Any]:
    """`run_ours` under another Python.

    Raises:
        ChildError: it failed, or was stopped after `limit` seconds.
    """
    file = folder / "row.json"
    wanted = dataclasses.asdict(row) | {"config": to_dict(row.config)}
    how = {"folder": str(folder), "steps": steps, "warmup": warmup, "ceiling": ceiling}
    write_json(str(file), {"row": wanted, **how})
    environment = {**os.environ, large_pages.VARIABLE: large_pages.VALUE}
    command = [python, "-m", "comparisons.our_step", str(file)]
    try:
        status = subprocess.run(command, env=environment, timeout=limit).returncode
    except subprocess.TimeoutExpired as error:
        raise ChildError(f"stopped after {limit:.0f} s") from error
    if status:
        raise ChildError(f"{python} ended with exit status {status}")
    found: dict[str, Any] = json.loads(file.read_text("utf-8"))
    return found


def main() -> None:
    """Reads what `run_ours_with` wrote, runs it, and writes what was found."""
    file = Path(sys.argv[1])
    how = json.loads(file.read_text("utf-8"))
    wanted = how.pop("row")
    row = Row(**{**wanted, "config": parse(wanted["config"])})
    how["folder"] = Path(how["folder"])
    write_json(str(file), run_ours(row, **how))


if __name__ == "__main__":
    main()
