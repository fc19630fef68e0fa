"""Fine-tuning and prediction on a CPU, ours beside MONAI's: the same numbers first, then the time.

The training step: MONAI's SwinUNETR, DiceCELoss and WarmupCosineSchedule and PyTorch's AdamW beside
our step, from the same weights (exported by ours, loaded strictly into MONAI's), on the same crops
and labels of phantoms in the same order, in float32 and without augmentation (ours draws and masks
it all the same). The losses of the first 20 updates have to agree.

    python -m comparisons.finetune_against_monai step                      # minutes
    python -m comparisons.finetune_against_monai step --size tiny --float64
    python -m comparisons.finetune_against_monai step --size full --config.batch_size=2
    python -m comparisons.finetune_against_monai step --rounds 3 --python ENV/bin/python

Sizes: demo is configs/finetune_demo.py (feature size 12, two crops of 64x64x32), full
configs/finetune_btcv.py (feature size 48, one crop of 96x96x96), tiny smaller than either; all at
the learning rate of the latter, at which training multiplies what is rounded less. Any setting can
be set as --config.section.field=value.

Prediction: one volume of 512x512x300 voxels of 0.75x0.75x1.25 mm (an enlarged phantom) with random
weights of configs/finetune_btcv.py, windows of 96x96x96 that overlap by 0.25, one at a time, with
gaussian weights. Ours: voco_jax.evaluation.predict. MONAI: LoadImage, Orientation, Spacing,
ScaleIntensityRange, CropForeground, sliding_window_inference, Invertd of the scores, argmax. Two
things differ: ours rounds the image to chain.dtype, as training does, and labels nothing more than
half a voxel outside the foreground's box, MONAI up to a voxel.

    python -m comparisons.finetune_against_monai predict
    python -m comparisons.finetune_against_monai predict --tiny

The two sides in turn, each in a process of its own, ours with large pages of memory, as main.py has
them. Peak memory is the process's resident memory. Needs the packages of requirements-dev.txt.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import nibabel
import numpy as np

from comparisons import our_finetuning
from voco_jax.benchmark.measure import (
    ChildError,
    bytes_text,
    in_own_process,
    machine,
    seconds_text,
    spread,
    spread_text,
    table,
    write_json,
)
from voco_jax.config.encoders import SwinUNETR
from voco_jax.config.finetuning import SegmentationFinetuning
from voco_jax.config.load import command_parser, load, parse_arguments, positive, to_dict
from voco_jax.data.progress import log
from voco_jax.errors import InputError

ROOT = Path(__file__).resolve().parents[1]
OURS, THEIRS = "voco_jax", "MONAI"
COMPARED = 20  # updates
TOLERANCE = 1e-4  # of a loss
OVERLAP = 0.25

_SOURCE = "data.sources.ct.chain"
_BASE: dict[str, Any] = {
    "model.dtype": "float32",
    "data.workers": 0,
    "data.held_out": 0.0,
    "data.phantoms": 8,
    "optimizer.learning_rate": 3e-4,
    "augment.flip_probability": (0.0, 0.0, 0.0),
    **{
        f"augment.{name}_probability": 0.0
        for name in ("rotate", "scale", "shift", "noise", "gamma")
    },
}
_TINY = {
    "model.feature_size": 12,
    "model.depths": (1, 1, 1, 1),
    "model.window_size": (4, 4, 4),
    "model.remat": False,
    "crops.size": (32, 32, 64),
    f"{_SOURCE}.volume_size": (32, 32, 64),
}
_BTCV, _DEMO = "configs/finetune_btcv.py", "configs/finetune_demo.py"
SIZES: dict[str, tuple[str, dict[str, Any]]] = {
    "tiny": (_DEMO, {**_TINY, "data.phantoms": 2}),
    "demo": (_DEMO, {}),
    "full": (_BTCV, {"batch_size": 1}),
}
"""Of the step: config file and changes."""
VOLUMES: dict[bool, tuple[dict[str, Any], tuple[int, ...], tuple[float, ...]]] = {
    False: ({}, (512, 512, 300), (0.75, 0.75, 1.25)),
    True: (_TINY, (96, 96, 64), (0.75, 1.5, 2.25)),
}
"""Of the prediction, whether --tiny: changes, voxels, mm."""

Rows = list[dict[str, Any]]


def settings(path: str, changes: dict[str, Any]) -> dict[str, Any]:
    """A config file's settings, changed, as plain values.

    Raises:
        InputError: impossible settings, or such as MONAI's side cannot take.
    """
    experiment = load(path, changes)
    config = to_dict(experiment)
    check_settings(our_finetuning.read_settings(config, "."))
    return config


def check_settings(config: SegmentationFinetuning) -> None:
    """Checks that MONAI's side can do what a config asks for.

    Raises:
        InputError: it cannot.

    >>> from voco_jax.config.load import load
    >>> check_settings(load("configs/finetune_demo.py"))
    >>> check_settings(load("configs/finetune_demo.py", {"optimizer.layer_decay": 0.9}))
    Traceback (most recent call last):
    voco_jax.errors.InputError: optimizer.layer_decay: found 0.9, expected 1.0: the MONAI side's
    """
    model, optimizer = config.model, config.optimizer
    if not isinstance(model, SwinUNETR):
        raise InputError(
            f"model.encoder: found {model.encoder!r}, expected 'swin_unetr': the MONAI side's"
        )
    wanted = {
        "model.dtype": (model.dtype, ("float32",)),
        "model.patch_merging": (model.patch_merging, ("merging", "mergingv2")),
        "model.drop_path_rate": (model.drop_path_rate, (0.0,)),
        "optimizer.layer_decay": (optimizer.layer_decay, (1.0,)),
        "optimizer.freeze_encoder": (optimizer.freeze_encoder, (False,)),
    }
    for name, (found, expected) in wanted.items():
        if found not in expected:
            choices = " or ".join(map(repr, expected))
            raise InputError(f"{name}: found {found!r}, expected {choices}: the MONAI side's")


def _run_theirs(part: str, *args: Any, **how: Any) -> dict[str, Any]:
    """A part of MONAI's side; it is imported in the process that runs it alone."""
    from comparisons import monai_finetuning

    found: dict[str, Any] = getattr(monai_finetuning, part)(*args, **how)
    return found


def in_turn(
    rounds: int, sides: dict[str, Callable[[], dict[str, Any]]], save: Callable[[Rows], None]
) -> Rows:
    """Runs both sides, one after the other, so many times; a row each, with its problem if any."""
    rows: Rows = []
    for number in range(rounds):
        for side, run in sides.items():
            log(f"round {number + 1} of {rounds}: {side} ...")
            try:
                rows.append({"side": side, "problem": None, **run()})
            except ChildError as error:
                rows.append({"side": side, "problem": str(error)})
                log(f"  {error}")
            save(rows)
    return rows


def compare_losses(rows: Sequence[dict[str, Any]]) -> float:
    """The largest difference of the sides' first losses; NaN counts.

    >>> rows = [{"side": side, "losses": [2.0, value]} for side, value in (("a", 1.5), ("b", 1.25))]
    >>> compare_losses(rows), compare_losses([rows[0], {"losses": [2.0, float("nan")]}])
    (0.25, nan)
    """
    first, second = (row["losses"][:COMPARED] for row in rows[:2])
    found = [abs(a - b) for a, b in zip(first, second, strict=True)]
    return next((one for one in found if one != one), max(found))


def measure_step(
    options: argparse.Namespace, overrides: dict[str, str], save: Callable[..., None]
) -> int:
    """The training step of both sides; the exit status."""
    full = options.size == "full"
    path, changes = SIZES[options.size]
    wide = {f"{_SOURCE}.dtype": "float16"} if options.float64 else {}
    config = settings(path, {**_BASE, **changes, **wide, **overrides})
    steps = options.steps or (2 if full else COMPARED - 2)
    warmup = (1 if full else 2) if options.warmup is None else options.warmup
    with tempfile.TemporaryDirectory(prefix="voco_benchmark_") as folder:
        in_own_process(our_finetuning.save_batches, config, folder, steps + warmup)
        how: dict[str, Any] = {"config": config, "steps": steps, "warmup": warmup}
        how |= {"folder": folder, "wide": options.float64}

        def ours() -> dict[str, Any]:
            return our_finetuning.run_part(options.python, "run_steps", **how)

        def theirs() -> dict[str, Any]:
            return in_own_process(_run_theirs, "run_steps", **how)

        rows = in_turn(options.rounds, {OURS: ours, THEIRS: theirs}, save)
    for row in rows[:2]:
        if row["problem"]:
            raise ChildError(f"{row['side']}: {row['problem']}")
    difference = compare_losses(rows)
    count = len(rows[0]["losses"][:COMPARED])
    save(rows, difference=difference)
    print(step_table(rows, config["batch_size"]))
    kind = "float64" if options.float64 else "float32"
    print(
        f"\nlosses of the first {count} updates in {kind}, from {rows[1]['losses'][0]:.4f} to "
        f"{rows[1]['losses'][count - 1]:.4f}: they differ by at most {difference:.1e}"
    )
    if difference <= TOLERANCE:
        return 0
    hint = "" if options.float64 else "; is it rounding? See --size tiny --float64"
    print(f"error: they differ by more than {TOLERANCE:g}{hint}", file=sys.stderr)
    return 1


def step_table(rows: Rows, batch_size: int) -> str:
    """For people."""
    lines = []
    for side in (OURS, THEIRS):
        good = [row for row in rows if row["side"] == side and not row["problem"]]
        seconds = spread([one for row in good for one in row["samples"]])
        compiling = [row["compile_seconds"] for row in good if row["compile_seconds"] is not None]
        lines.append(
            [
                f"{side} ({good[0]['version']})",
                seconds_text(spread(compiling).median) if compiling else "-",
                spread_text(seconds),
                f"{batch_size / seconds.median:.3g}",
                bytes_text(max(row["peak"] for row in good)),
            ]
        )
    return table(["side", "compiling", "a step", "crops/s", "peak memory"], lines)


def agreement(folder: str) -> float:
    """The share of voxels on which both sides' masks agree.

    Args:
        folder: that both left theirs in.
    """
    image: Any = nibabel.load(Path(folder, our_finetuning.MASK))
    ours = np.asarray(image.dataobj)
    return float(np.mean(ours == np.load(Path(folder, our_finetuning.MONAI_MASK))))


def measure_prediction(
    options: argparse.Namespace, overrides: dict[str, str], save: Callable[..., None]
) -> int:
    """The prediction of both sides; the exit status."""
    changes, shape, spacing = VOLUMES[options.tiny]
    config = settings(_BTCV, {**_BASE, **changes, **overrides})
    with tempfile.TemporaryDirectory(prefix="voco_benchmark_") as folder:
        in_own_process(our_finetuning.save_weights, config, folder)
        log(f"making a volume of {'x'.join(map(str, shape))} voxels ...")
        in_own_process(our_finetuning.save_volume, folder, shape, spacing)

        def ours() -> dict[str, Any]:
            return our_finetuning.run_part(options.python, "predict", folder, overlap=OVERLAP)

        def theirs() -> dict[str, Any]:
            return in_own_process(_run_theirs, "predict", config, folder, OVERLAP)

        rows = in_turn(options.rounds, {OURS: ours, THEIRS: theirs}, save)
        share = None
        if not any(row["problem"] for row in rows):
            share = agreement(folder)
    save(rows, agreement=share)
    print(prediction_table(rows))
    if share is None:
        return 1
    print(f"\nthe masks agree in {share:.4%} of the voxels")
    return 0


def prediction_table(rows: Rows) -> str:
    """For people; medians over the rounds."""
    parts = ["reading", "preparing", "windows", "to the file's grid", "all"]
    lines = []
    for side in (OURS, THEIRS):
        good = [row for row in rows if row["side"] == side and not row["problem"]]
        if not good:
            problem = next(row["problem"] for row in rows if row["side"] == side)
            lines.append([side, problem, *["-"] * (len(parts) + 2)])
            continue
        compiling = good[0]["compile_seconds"]
        seconds = {part: [row["seconds"][part] for row in good] for part in parts}
        lines.append(
            [
                f"{side} ({good[0]['version']})",
                str(good[0]["windows"]),
                *(seconds_text(spread(seconds[part]).median) for part in parts),
                seconds_text(compiling),
                bytes_text(max(row["peak"] for row in good)),
            ]
        )
    head = ["side", "windows", *parts, "loading and compiling before", "peak memory"]
    return table(head, lines)


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "-m comparisons.finetune_against_monai", __doc__, "step\npredict --tiny"
    )
    commands = parser.add_subparsers(dest="part", required=True, metavar="step|predict")
    step = commands.add_parser("step", help="the training step", allow_abbrev=False)
    predict = commands.add_parser("predict", help="a whole volume", allow_abbrev=False)
    step.add_argument("--size", choices=SIZES, default="demo", help="default demo")
    step.add_argument("--steps", type=positive, help="to time; default 18, of full 2")
    step.add_argument("--warmup", type=int, help="updates before those; default 2, of full 1")
    step.add_argument("--float64", action="store_true", help="both sides in float64")
    predict.add_argument("--tiny", action="store_true", help="96x96x64 voxels, a small network")
    for one in (step, predict):
        one.add_argument("--rounds", type=positive, default=1, help="both in turn; default 1")
        one.add_argument("--python", metavar="PYTHON", help="of our side: with another JAX")
        one.add_argument("--json", metavar="FILE", help="write it as JSON too")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; exit status 0 measured, 1 the sides differ or one failed, 2 bad input."""
    try:
        options, overrides = parse_arguments(_parser(), arguments)
        if options.json:
            options.json = str(Path(options.json).absolute())
        about = {"machine": machine(), "options": vars(options), "overrides": overrides}

        def save(rows: Rows, **found: Any) -> None:
            write_json(options.json, {**about, "rows": rows, **found})

        wide = options.part == "step" and options.float64
        environment = {
            "JAX_PLATFORMS": "cpu",
            "CUDA_VISIBLE_DEVICES": "",
            "JAX_ENABLE_COMPILATION_CACHE": "false",
            "JAX_ENABLE_X64": str(wide).lower(),
        }
        measure = measure_step if options.part == "step" else measure_prediction
        before = Path.cwd()
        os.chdir(ROOT)
        try:
            with mock.patch.dict(os.environ, environment):
                return measure(options, overrides, save)
        finally:
            os.chdir(before)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except ChildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
