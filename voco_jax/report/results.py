"""Tables of a fine-tuning run's newest validation, and of evaluations beside it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from voco_jax.report.charts import VALIDATION
from voco_jax.report.run import Evaluation, Run
from voco_jax.report.series import finite

WORST = 10  # cases that are listed
GRIDS = ("dice", "dice_resampled")


@dataclass(frozen=True)
class ClassRow:
    """A class of a segmentation; None: no number."""

    name: str
    dice: float | None  # mean of the newest validation, on the files' own grids
    resampled: float | None
    cases: int  # with a number
    worst: str  # id of the case with the lowest
    lowest: float | None


@dataclass(frozen=True)
class CaseRow:
    """A case of a segmentation, Dice by class; the last is the mean."""

    id: str
    dice: list[float | None]
    resampled: list[float | None]


@dataclass(frozen=True)
class Segmentations:
    """The tables of a segmentation run."""

    classes: list[ClassRow]
    cases: list[CaseRow]  # the worst first
    total: int


@dataclass(frozen=True)
class Confusion:
    """The tables of a classification run."""

    names: list[str]
    counts: list[list[int]]  # rows: what cases are, columns: what they are predicted to be
    shades: list[list[int]]  # 0..10, share of the row
    wrong: list[tuple[str, str, str, float]]  # id, is, predicted, its probability; surest first
    total: int


@dataclass(frozen=True)
class Cell:
    """A mean over cases; None: no number."""

    mean: float | None
    interval: tuple[float, float] | None
    cases: int


@dataclass(frozen=True)
class EvaluationView:
    """A folder's evaluation."""

    folder: str
    metrics: list[str]
    rows: list[tuple[str, list[Cell]]]  # class, of each metric
    worst: list[tuple[str, str, float]]  # case, class, Dice
    evaluated: int
    left_out: int


def segmentations(run: Run) -> Segmentations | None:
    """None: there is nothing of a segmentation."""
    if run.config.get("task") != "segmentation":
        return None
    cases = [case for case in run.cases if isinstance(case.get("dice"), dict)]
    classes = []
    for name in run.classes:
        own, other = ([_number(case, grid, name) for case in cases] for grid in GRIDS)
        known = [
            (value, case["id"]) for value, case in zip(own, cases, strict=True) if finite(value)
        ]
        lowest, worst = min(known, default=(None, ""))
        mean = run.last(f"{VALIDATION}dice_{name}")
        classes.append(ClassRow(name, mean, _mean(other), len(known), worst, lowest))
    if not any(row.dice is not None or row.cases for row in classes):
        return None
    rows = []
    for case in cases:
        own, other = ([_number(case, grid, name) for name in run.classes] for grid in GRIDS)
        rows.append(CaseRow(case["id"], [*own, _mean(own)], [*other, _mean(other)]))
    rows.sort(key=lambda row: 2.0 if row.dice[-1] is None else row.dice[-1])
    return Segmentations(classes, rows[:WORST], len(rows))


def confusion(run: Run) -> Confusion | None:
    """None: there is nothing of a classification."""
    cases = [case for case in run.cases if isinstance(case.get("probabilities"), dict)]
    names = list(cases[0]["probabilities"]) if cases else []
    if not names:
        return None
    table = np.zeros((len(names), len(names)), int)
    wrong = []
    for case in cases:
        shares = [_number(case, "probabilities", name) or 0.0 for name in names]
        is_, found = str(case.get("reference")), int(np.argmax(shares))
        if is_ not in names:
            continue
        table[names.index(is_), found] += 1
        if names[found] != is_:
            wrong.append((case["id"], is_, names[found], shares[found]))
    shades = np.rint(10 * table / np.maximum(table.sum(axis=1, keepdims=True), 1)).astype(int)
    wrong.sort(key=lambda row: -row[3])
    return Confusion(names, table.tolist(), shades.tolist(), wrong[:WORST], int(table.sum()))


def view(folder: str, found: Evaluation) -> EvaluationView:
    """The tables of an evaluation.

    Raises:
        LookupError, TypeError, ValueError, AttributeError: it is damaged.
    """
    summary = found.summary
    classes = {**summary["classes"], "mean of the classes": summary.get("mean") or {}}
    metrics = [
        name
        for name in next(iter(classes.values()), {})
        if name.startswith(("dice", "nsd", "hd95", "volume_error_ml"))
    ]
    rows = [
        (name, [_cell(entry.get(metric)) for metric in metrics]) for name, entry in classes.items()
    ]
    worst = []
    for row in found.cases:
        try:
            worst.append((row["case"], row["class"], float(row["dice"])))
        except (KeyError, ValueError, TypeError):
            continue  # left out, or no number
    worst.sort(key=lambda row: row[2])
    counts = summary["cases"]
    return EvaluationView(
        folder, metrics, rows, worst[:WORST], counts["evaluated"], counts["left_out"]
    )


def _cell(spread: Mapping[str, Any] | None) -> Cell:
    """As `evaluation.summary` writes it."""
    if not spread:
        return Cell(None, None, 0)
    mean, interval = spread["mean"], spread["interval"]
    return Cell(
        None if mean is None else float(mean),
        None if interval is None else (float(interval[0]), float(interval[1])),
        int(spread["cases"]),
    )


def _number(case: Mapping[str, Any], kind: str, name: str) -> float | None:
    values = case.get(kind)
    value = values.get(name) if isinstance(values, dict) else None
    return float(value) if value is not None and finite(value) else None


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None
