"""The VoCo step, ours beside PyTorch's on MONAI's SwinUNETR: the same losses first, then the time.

    python -m comparisons.step_against_torch                                  # minutes
    python -m comparisons.step_against_torch --size full                      # CPU: 25 minutes
    python -m comparisons.step_against_torch --size full --batch-sizes 2,4,8  # on a GPU
    python -m comparisons.step_against_torch --variant "lax: model.convolution=lax"
    python -m comparisons.step_against_torch --rounds 3 --steps 5 --python ENV/bin/python

Sizes: tiny is configs/tiny.py, demo configs/demo.py (feature size 12, crops of 32x32x64), full
configs/voco_10k.py; on a CPU in float32 and at batch 1, full with crops_per_pass 2. Any setting can
be set as --config.section.field=value.

The PyTorch side is the published step on MONAI's blocks. Its variants are words joined with "+":
float32 or bf16 (autocast), compile (torch.compile), channels_last, checkpoint (of the Swin blocks),
flash (MONAI's, of the teacher). Both sides take the same weights and the same random crops, which
lie on the device as uint8, resize them and augment nothing. First of all the losses of one step in
float32 are compared. Every row is a process of its own, ours with large pages of memory, as main.py
has them. Peak memory: of the device on a GPU, on a CPU resident. Needs the packages of
requirements-dev.txt.
"""

import argparse
import dataclasses
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from comparisons.our_step import (
    Row,
    platform,
    run_ours,
    run_ours_with,
    save_arrays,
    without_augmentation,
)
from comparisons.step_tables import add_utilisation, text
from voco_jax import large_pages
from voco_jax.benchmark.command import parse_variants, sizes
from voco_jax.benchmark.measure import (
    ChildError,
    in_own_process_within,
    machine,
    spread,
    spread_text,
    write_json,
)
from voco_jax.benchmark.step import product_ceiling
from voco_jax.config.encoders import SwinUNETR
from voco_jax.config.load import load_pretraining, parse_arguments, positive
from voco_jax.config.pretraining import Pretraining
from voco_jax.data.progress import log
from voco_jax.errors import InputError

ROOT = Path(__file__).resolve().parents[1]

SIZES = {"tiny": "configs/tiny.py", "demo": "configs/demo.py", "full": "configs/voco_10k.py"}
TERMS = ("pos", "neg", "reg")
# Relative; of the losses between any two float32 computations of one step.
LOSS_TOLERANCE, NORM_TOLERANCE, SMALL_TERM = 1e-4, 1e-2, 0.1
WORDS = ("float32", "bf16", "compile", "channels_last", "checkpoint", "flash")
GPU_VARIANTS = (
    "float32",
    "bf16+checkpoint",
    "bf16",
    "bf16+channels_last",
    "bf16+compile",
    "bf16+compile+channels_last",
    "bf16+compile+checkpoint",
)


class Table:
    """Runs rows, each once, and keeps what they gave."""

    def __init__(
        self, folder: Path, steps: int, warmup: int, limit: float | None, python: str | None
    ) -> None:
        self.folder, self.steps, self.warmup, self.limit = folder, steps, warmup, limit
        self.python = python
        self.platform: str = in_own_process_within(None, platform)
        self.ceilings: dict[str, float] = {}
        self.rows: list[dict[str, Any]] = []

    def ceiling(self, dtype: str) -> float:
        """FLOP/s of matrix products on this device."""
        if dtype not in self.ceilings:
            log(f"measuring {dtype} matrix products ...")
            self.ceilings[dtype] = in_own_process_within(None, product_ceiling, dtype)
        return self.ceilings[dtype]

    def run(self, row: Row, check: bool = False) -> dict[str, Any]:
        """Measures one row, in a process of its own; a problem is part of what is found."""
        path = self.folder / f"batch_{row.config.batch_size}.npz"
        if not path.exists():
            from voco_jax.benchmark.step import random_batch

            save_arrays(path, random_batch(row.config))
        steps, warmup = (1, 0) if check else (self.steps, self.warmup)
        log(f"{row.side}, {row.variant}, batch {row.config.batch_size} ...")
        try:
            found = self._measure(row, steps, warmup, None if check else self.limit)
        except ChildError as error:
            found = {"problem": str(error)}
        about = {"side": row.side, "variant": row.variant, "batch_size": row.config.batch_size}
        found = {"problem": None, **about, **found}
        result = found["problem"] or f"{spread_text(found['seconds'])} a step"
        log(f"  {result}")
        return found

    def _measure(self, row: Row, steps: int, warmup: int, limit: float | None) -> dict[str, Any]:
        if row.side == "voco_jax":
            ceiling = None if row.exact else self.ceiling(row.config.model.dtype)
            how = (row, self.folder, steps, warmup, ceiling)
            if self.python:
                found = run_ours_with(self.python, limit, *how)
            else:
                with mock.patch.dict(os.environ, {large_pages.VARIABLE: large_pages.VALUE}):
                    found = in_own_process_within(limit, run_ours, *how)
        else:
            found = in_own_process_within(
                limit,
                _run_torch,
                row.variant,
                row.config,
                self.folder,
                steps,
                warmup,
                row.exact,
            )
        seconds = found["seconds"]
        return {**found, "seconds": _spread(seconds)}


def _run_torch(*how: Any) -> dict[str, Any]:
    """`torch_step.run`; PyTorch is imported in the process that runs it alone."""
    from comparisons import torch_step

    return torch_step.run(*how)


def _spread(value: Any) -> Any:
    from voco_jax.benchmark.measure import Spread

    return Spread(**value) if isinstance(value, dict) else value


def check_settings(config: Pretraining, variants: Sequence[str]) -> None:
    """Checks that the PyTorch side can do what a config asks for.

    Raises:
        InputError: another recipe or model, or an unknown word in a variant.

    >>> from voco_jax.config.load import load
    >>> check_settings(load("configs/demo.py", {}), ["bf16+compile"])
    >>> check_settings(load("configs/demo.py", {"dropout.rate": 0.1}), ())
    Traceback (most recent call last):
    voco_jax.errors.InputError: dropout.rate: found 0.1, expected 0.0: the PyTorch step's
    >>> check_settings(load("configs/demo.py", {}), ["fp16"])
    Traceback (most recent call last):
    voco_jax.errors.InputError: --torch: found 'fp16', expected some of float32, bf16, compile, ...
    """
    model = config.model
    if not isinstance(model, SwinUNETR):
        raise InputError(
            f"model.encoder: found {model.encoder!r}, expected 'swin_unetr': the PyTorch step's"
        )
    wanted = {
        "recipe": (config.recipe, ("voco_10k",)),
        "teacher.scope": (config.teacher.scope, ("network",)),
        "model.conv_encoders": (model.conv_encoders, (True,)),
        "model.patch_merging": (model.patch_merging, ("merging", "mergingv2")),
        "model.drop_path_rate": (model.drop_path_rate, (0.0,)),
        "dropout.rate": (config.dropout.rate, (0.0,)),
    }
    for name, (found, expected) in wanted.items():
        if found not in expected:
            choices = " or ".join(map(repr, expected))
            raise InputError(f"{name}: found {found!r}, expected {choices}: the PyTorch step's")
    for variant in variants:
        words = variant.split("+")
        if not set(words) <= set(WORDS) or {"float32", "bf16"} <= set(words):
            raise InputError(
                f"--torch: found {variant!r}, expected some of {', '.join(WORDS)} joined with +, "
                "float32 or bf16 but not both"
            )


def compare(ours: Mapping[str, float], theirs: Mapping[str, float]) -> dict[str, float]:
    """Relative differences of a first step's loss terms and norms.

    Of a term below `SMALL_TERM` to that: such a term is the square of small cosines, and float32
    rounds a cosine by as much whether it is small or not.
    """
    norms = [name for name in ("gradient_norm", "update_norm") if name in ours and name in theirs]
    floors = dict.fromkeys(TERMS, SMALL_TERM) | dict.fromkeys(norms, 1e-12)
    return {
        name: abs(ours[name] - theirs[name]) / max(abs(theirs[name]), floor)
        for name, floor in floors.items()
    }


def within(differences: Mapping[str, float]) -> bool:
    """Whether two float32 computations of one step agree.

    >>> exact = {"pos": 1.0, "neg": 0.001, "reg": 0.5, "gradient_norm": 10.0}
    >>> near = {"pos": 1.00009, "neg": 0.001009, "reg": 0.5, "gradient_norm": 10.09}
    >>> within(compare(near, exact))
    True
    >>> wrong = {"pos": 1.0002, "neg": 0.00102, "reg": 0.4999, "gradient_norm": 10.2}
    >>> [within(compare({**exact, name: value}, exact)) for name, value in wrong.items()]
    [False, False, False, False]
    >>> within(compare({**exact, "reg": float("nan")}, exact))
    False
    """
    return all(
        value <= (LOSS_TOLERANCE if name in TERMS else NORM_TOLERANCE)
        for name, value in differences.items()
    )


def check(measure: Table, config: Pretraining) -> dict[str, Any]:
    """One float32 step of either side on the same weights and crops.

    Raises:
        InputError: a side came to no result.
    """
    plain = dataclasses.replace(config.model, dtype="float32")
    config = dataclasses.replace(config, model=plain)
    word = "float32+checkpoint" if config.model.remat else "float32"
    found = [
        measure.run(Row(side, word if side == "PyTorch" else "float32", config, exact=True), True)
        for side in ("voco_jax", "PyTorch")
    ]
    for one in found:
        if one["problem"]:
            raise InputError(f"the check of the losses: {one['side']}: {one['problem']}")
    differences = compare(found[0]["first"], found[1]["first"])
    good = within(differences)
    said = ", ".join(f"{name} {value:.1e}" for name, value in differences.items())
    log(f"relative differences of the first step in float32: {said}: {'agree' if good else 'NOT'}")
    return {
        "differences": differences,
        "agree": good,
        "ours": found[0]["first"],
        "theirs": found[1]["first"],
        "rows": found,
    }


def measure_all(
    config: Pretraining,
    ours: Mapping[str, Pretraining],
    theirs: Sequence[str] | None,
    batch_sizes: Sequence[int],
    *,
    steps: int,
    warmup: int,
    limit: float | None,
    rounds: int = 1,
    python: str | None = None,
    only_check: bool = False,
    save: Callable[[dict[str, Any]], None] = lambda values: None,
) -> dict[str, Any]:
    """The check, then every row; the check's rows are taken where they are what is asked for.

    Args:
        config: of the check, at the first batch size.
        ours: variants of our side, by name.
        theirs: PyTorch's variants; None: by the device.
        batch_sizes: volumes.
        steps: timed.
        warmup: steps before those.
        limit: seconds for a row.
        rounds: how often all rows of a batch size are measured, one after the other.
        python: of our side; None: this one.
        only_check: no rows.
        save: called after each row with what there is so far.

    Raises:
        InputError: settings that the PyTorch side does not have, or a check without a result.
    """
    check_settings(config, theirs or ())
    with tempfile.TemporaryDirectory(prefix="voco_benchmark_") as folder:
        measure = Table(Path(folder), steps, warmup, limit, python)
        on_cpu = measure.platform == "cpu"
        checked = check(measure, without_augmentation(config, batch_sizes[0]))
        if theirs is None:
            plain = "float32+checkpoint" if config.model.remat else "float32"
            theirs = (plain,) if on_cpu else GPU_VARIANTS
        found: dict[str, Any] = {"platform": measure.platform, "check": checked, "rows": []}
        if only_check or not checked["agree"]:
            return found
        for size in batch_sizes:
            rows = [
                Row("voco_jax", name, without_augmentation(variant, size))
                for name, variant in ours.items()
            ]
            rows += [Row("PyTorch", word, without_augmentation(config, size)) for word in theirs]
            for row in rows:
                found["rows"].append(_once(measure, row, checked["rows"], on_cpu))
                found["product_flops"] = measure.ceilings
                save(found)
            measured = found["rows"][-len(rows) :]
            for _ in range(rounds - 1):
                for row, before in zip(rows, measured, strict=True):
                    add_round(before, measure.run(row))
                    save(found)
    return found


def add_round(row: dict[str, Any], again: dict[str, Any]) -> None:
    """Adds another round's measurements to a row; a problem stays, or becomes the row's.

    >>> row = {"problem": None, "samples": [1.0, 3.0], "peak": 5, "batch_size": 2}
    >>> add_round(row, {**row, "samples": [2.0], "peak": 4})
    >>> row["samples"], row["seconds"].median, row["volumes_per_second"], row["peak"]
    ([1.0, 3.0, 2.0], 2.0, 1.0, 5)
    """
    if row["problem"] or again["problem"]:
        row["problem"] = row["problem"] or again["problem"]
        return
    row["samples"] = [*row["samples"], *again["samples"]]
    row["seconds"] = spread(row["samples"])
    row["volumes_per_second"] = row["batch_size"] / row["seconds"].median
    row["utilisation"] = None  # see `add_utilisation`
    row["peak"] = max(row["peak"], again["peak"])


def _once(
    measure: Table, row: Row, checked: Sequence[dict[str, Any]], on_cpu: bool
) -> dict[str, Any]:
    """Measures a row, unless the check did just that: on a CPU one step without warm-up."""
    if on_cpu and (measure.steps, measure.warmup) == (1, 0):
        for one in checked:
            same = (one["side"], one["batch_size"]) == (row.side, row.config.batch_size)
            first = row.side == "PyTorch" and one["variant"] == row.variant
            plain = row.side == "voco_jax" and row.variant == "as configured"
            if same and (first or (plain and row.config.model.dtype == "float32")):
                measure.ceiling("float32")
                return {**one, "variant": row.variant}
    return measure.run(row)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; exit status 0 measured, 1 the losses disagree, 2 bad input."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--size", choices=SIZES, default="demo", help="default demo")
    add("--batch-sizes", type=sizes, help="default: on a GPU 2,4,8, else 1")
    add("--check", action="store_true", help="only compare the losses of one step")
    add("--steps", type=positive, help="to time; default 10, of full on a CPU 1")
    add("--warmup", type=int, help="steps before those; default 2, of full on a CPU 0")
    add("--variant", action="append", default=[], help='ours: "NAME: field=value ..."; repeat')
    add("--torch", action="append", metavar="WORDS", help="PyTorch's: bf16+compile; repeat")
    add("--rounds", type=positive, default=1, help="ours and PyTorch's in turn; default 1")
    add("--python", metavar="PYTHON", help="of our side: an environment with another JAX")
    add("--limit", type=float, metavar="SECONDS", help="for one row; default: none")
    add("--json", metavar="FILE", help="write it as JSON too, after each row")
    try:
        options, overrides = parse_arguments(parser, arguments)
        if options.json:
            options.json = str(Path(options.json).absolute())
        os.chdir(ROOT)
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # PyTorch's step knows one GPU only
        on_cpu = in_own_process_within(None, platform) == "cpu"
        base = {"batch_size": 1, "model.dtype": "float32"} if on_cpu else {"batch_size": 2}
        if on_cpu and options.size == "full":
            base["model.crops_per_pass"] = 2  # memory is short here, and nothing waits for more
        changes = {**base, **overrides}
        path, variants = SIZES[options.size], parse_variants(options.variant)
        configs = {
            name: load_pretraining(path, {**changes, **one}) for name, one in variants.items()
        }
        once = on_cpu and options.size == "full"
        about = {"machine": machine(), "size": options.size, "overrides": changes}

        def save(values: dict[str, Any]) -> None:
            write_json(options.json, {**about, **values})

        found = measure_all(
            next(iter(configs.values())),
            configs,
            options.torch,
            options.batch_sizes or ([1] if on_cpu else [2, 4, 8]),
            only_check=options.check,
            steps=options.steps or (1 if once else 10),
            warmup=(0 if once else 2) if options.warmup is None else options.warmup,
            limit=options.limit,
            rounds=options.rounds,
            python=options.python,
            save=save,
        )
    except (InputError, ChildError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    add_utilisation(found)
    save(found)
    print(text(found))
    if not found["check"]["agree"]:
        print("error: the two sides do not compute the same losses", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
