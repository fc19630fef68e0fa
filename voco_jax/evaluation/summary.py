"""What the cases say together: summary.json, cases.csv and the table for the console."""

import csv
import io
import json
import math
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy

import voco_jax
from voco_jax.evaluation.cases import Result, Score
from voco_jax.evaluation.masks import Classes
from voco_jax.evaluation.metrics import bootstrap_interval
from voco_jax.files import write_atomically

LEVEL, RESAMPLES, SEED = 0.95, 10_000, 0  # of the intervals


@dataclass(frozen=True)
class Evaluation:
    """All results, and what could not be compared."""

    results: Sequence[Result]  # of all pairs, by name; some may have failed
    no_prediction: Sequence[str]  # cases
    no_reference: Sequence[str]
    classes: Classes
    tolerances: tuple[float, ...]  # mm
    settings: Mapping[str, Any]  # what was asked for, for the record

    @property
    def evaluated(self) -> list[Result]:
        """Those with scores."""
        return [result for result in self.results if not result.failure]

    @property
    def left_out(self) -> dict[str, str]:
        """Case -> why it is in no mean."""
        reasons = {result.name: result.failure for result in self.results if result.failure}
        reasons |= dict.fromkeys(self.no_prediction, "no prediction file")
        return reasons | dict.fromkeys(self.no_reference, "no reference file")

    @property
    def metrics(self) -> dict[str, Callable[[Score], float]]:
        """The columns of numbers of cases.csv."""

        def at(index: int) -> Callable[[Score], float]:
            return lambda score: score.surface_dice[index]

        return {
            "dice": lambda score: score.dice,
            **{f"nsd_{mm:g}mm": at(index) for index, mm in enumerate(self.tolerances)},
            "hd95_mm": lambda score: score.hausdorff95,
            "reference_ml": lambda score: score.reference_ml,
            "prediction_ml": lambda score: score.prediction_ml,
            "volume_error_ml": lambda score: score.error[0],
            "volume_error_percent": lambda score: score.error[1],
        }


def summarise(evaluation: Evaluation) -> dict[str, Any]:
    """Means, medians and intervals over the cases, as JSON can hold them (null: no number)."""
    evaluated = evaluation.evaluated
    metrics = evaluation.metrics
    averaged = [name for name in metrics if name not in ("reference_ml", "prediction_ml")]
    classes = {}
    for place, name in enumerate(evaluation.classes):
        scores = {result.name: result.scores[place] for result in evaluated}
        notes = {case: score.note for case, score in scores.items()}
        classes[name] = {
            "labels": list(evaluation.classes[name]),
            "cases": sum(note != "in neither" for note in notes.values()),
            "empty_references": sum(not score.reference_ml for score in scores.values()),
            **{
                key: [case for case, note in notes.items() if note == key.replace("_", " ")]
                for key in ("no_prediction", "no_reference", "in_neither")
            },
            **{
                metric: _spread([metrics[metric](score) for score in scores.values()])
                for metric in averaged
            },
        }
    mean = {}
    for metric in averaged:
        if metric.startswith("volume"):  # adds up what is of different sizes and signs
            continue
        mean[metric] = _spread([_mean_of(map(metrics[metric], r.scores)) for r in evaluated])
    return {
        "how": {
            "mean": "over the classes of each case, then over the cases; background is in none",
            "interval": f"{100 * LEVEL:g} % percentile bootstrap of the mean over cases, "
            f"{RESAMPLES} resamples, seed {SEED}; null with fewer than two cases",
            "dice": "0 where only reference or prediction has the class; left out where neither",
            "nsd": "surface Dice, weighted by area in mm2; else as dice; tolerance "
            + ", ".join(f"{mm:g} mm" for mm in evaluation.tolerances),
            "hd95_mm": "95th percentile by area, the larger of both directions; infinite, and "
            "left out of the mean, where only reference or prediction has the class",
            "volume_error": "prediction minus reference; in % only where the reference has it",
        },
        "settings": dict(evaluation.settings),
        "versions": {
            "voco_jax": voco_jax.__version__,
            "python": platform.python_version(),
            "numpy": np.__version__,
            "scipy": scipy.__version__,
        },
        "cases": {
            "evaluated": len(evaluated),
            "left_out": len(evaluation.left_out),
            "no_prediction": list(evaluation.no_prediction),
            "no_reference": list(evaluation.no_reference),
            "failed": {r.name: r.failure for r in evaluation.results if r.failure},
            "taken_for_background": {
                what: {r.name: list(r.strays[what]) for r in evaluated if what in r.strays}
                for what in ("reference", "prediction")
            },
        },
        "mean": mean,
        "classes": classes,
    }


def write(evaluation: Evaluation, summary: Mapping[str, Any], output: Path) -> None:
    """Writes summary.json and cases.csv into an existing folder.

    Raises:
        OSError: it cannot.
    """
    text = json.dumps(summary, indent=1, ensure_ascii=False, allow_nan=False)
    write_atomically(output / "summary.json", text + "\n")
    lines = io.StringIO()
    table = csv.writer(lines, lineterminator="\n")
    metrics = evaluation.metrics
    table.writerow(["case", "class", *metrics, "note"])
    for result in evaluation.evaluated:
        for score in result.scores:
            numbers = [metric(score) for metric in metrics.values()]
            table.writerow([result.name, score.name, *map(_cell, numbers), score.note])
    for case, reason in evaluation.left_out.items():
        table.writerow([case, "", *[""] * len(metrics), f"left out: {reason}"])
    write_atomically(output / "cases.csv", lines.getvalue())


def as_text(evaluation: Evaluation, summary: Mapping[str, Any]) -> str:
    """The table for people: a line per class, then what is in no mean."""
    columns = ["dice", *(f"nsd_{mm:g}mm" for mm in evaluation.tolerances), "hd95_mm"]
    columns.append("volume_error_ml")
    rows = [["class", "Dice", "95 % interval"]]
    rows[0] += [f"NSD {mm:g} mm" for mm in evaluation.tolerances]
    rows[0] += ["HD95 mm", "volume error ml", "cases"]
    entries = {**summary["classes"], "mean of the classes": summary["mean"]}
    if len(summary["classes"]) == 1:
        del entries["mean of the classes"]
    for name, entry in entries.items():
        row = [name]
        for column in columns:
            spread = entry.get(column, _spread([]))
            row.append(_short(spread["mean"], column))
            if column == "dice":
                ends = spread["interval"]
                row.append("{:.3f} to {:.3f}".format(*ends) if ends else "-")
            elif column == "hd95_mm" and spread["cases"] < entry["dice"]["cases"]:
                row[-1] += f" ({spread['cases']})"
        rows.append([*row, str(entry["dice"]["cases"])])
    fewer = any("(" in row[-3] for row in rows[1:])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if place == 0 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    lines.insert(1, "-" * len(lines[0]))
    if len(entries) > 1:
        lines.insert(-1, "-" * len(lines[0]))
    if fewer:
        lines.append("(n): the mean of HD95 is over so many cases, those that have both surfaces")
    return "\n".join([*lines, *_remarks(evaluation, summary)])


def _remarks(evaluation: Evaluation, summary: Mapping[str, Any]) -> list[str]:
    lines = [""]
    for name, entry in summary["classes"].items():
        for key, what in (
            ("no_prediction", "predicted nowhere: Dice and NSD 0"),
            ("no_reference", "predicted, but not in the reference: Dice and NSD 0"),
            ("in_neither", "in neither reference nor prediction: in no mean"),
        ):
            if entry[key]:
                lines.append(f"{name}: {what}, in {_some(entry[key], 'case')}")
    for what, strays in summary["cases"]["taken_for_background"].items():
        if strays:
            values = _some(sorted({value for found in strays.values() for value in found}))
            lines.append(
                f"values of no class, taken for background: {values} in the {what}s of "
                f"{_some(list(strays), 'case')}"
            )
    for key, what in (
        ("no_prediction", "without a prediction"),
        ("no_reference", "without a reference"),
    ):
        if summary["cases"][key]:
            lines.append(f"left out, {what}: {_some(summary['cases'][key], 'case')}")
    lines += [f"failed: {case}: {why}" for case, why in summary["cases"]["failed"].items()]
    count = summary["cases"]["evaluated"]
    counts = f"{count} case{'s' * (count != 1)} evaluated"
    if evaluation.left_out:
        counts += f", {len(evaluation.left_out)} left out"
    return [*lines, counts] if len(lines) > 1 else ["", counts]


def _spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean, median and interval of the finite ones."""
    known = np.asarray([value for value in values if math.isfinite(value)])
    if not len(known):
        return {"mean": None, "median": None, "interval": None, "cases": 0}
    ends = bootstrap_interval(known, SEED, RESAMPLES, LEVEL)
    return {
        "mean": float(known.mean()),
        "median": float(np.median(known)),
        "interval": None if math.isnan(ends[0]) else list(ends),
        "cases": len(known),
    }


def _mean_of(values: Any) -> float:
    known = [value for value in values if math.isfinite(value)]
    return float(np.mean(known)) if known else float("nan")


def _cell(number: float) -> str:
    return "" if math.isnan(number) else f"{number:.6g}"


def _short(number: float | None, column: str) -> str:
    if column.startswith("volume"):
        return "" if number is None else f"{number:+.2f}"
    return "-" if number is None else f"{number:.1f}" if column == "hd95_mm" else f"{number:.3f}"


def _some(items: Sequence[Any], noun: str = "") -> str:
    """As "1, 2, 3", or with a noun "3 cases (a, b, c)"; the first five of them."""
    shown = f"{', '.join(map(str, items[:5]))}{', ...' * (len(items) > 5)}"
    return f"{len(items)} {noun}{'s' * (len(items) != 1)} ({shown})" if noun else shown
