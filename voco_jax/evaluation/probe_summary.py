"""What a probe found: the tables for the console, results.json, predictions.csv, curves."""

import csv
import io
import platform
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import sklearn

import voco_jax
from voco_jax.evaluation.features import FeatureTable
from voco_jax.evaluation.leaks import in_words
from voco_jax.evaluation.probe_folds import METRICS, RESAMPLES, Measured
from voco_jax.evaluation.probe_methods import METHODS, NEIGHBOURS
from voco_jax.evaluation.probing import RANDOM, TRAINED, Probed
from voco_jax.report.probes import Curve

NAMES = {
    "knn": f"{NEIGHBOURS} nearest neighbours",
    "logistic": "logistic regression",
    "linear": "linear, closed form",
}
_EASY = 0.98  # balanced accuracy of random weights above which there is nothing left to win


def as_results(probed: Probed, settings: Mapping[str, Any]) -> dict[str, Any]:
    """For results.json.

    Args:
        probed: of `probe`.
        settings: what was asked for.
    """
    labelled = probed.labelled
    rows = [
        {
            "features": name,
            "method": method,
            "fraction": fraction,
            "training_patients": probed.training_patients[fraction],
            **{metric: _plain(measured) for metric, measured in metrics.items()},
        }
        for (name, method, fraction), metrics in probed.measured.items()
    ]
    gains = []
    for method in METHODS:
        for fraction in probed.training_patients:
            mean, low, high = probed.gain(method, method, fraction)
            entry = {"method": method, "fraction": fraction}
            gains.append({**entry, "balanced_accuracy": mean, "interval": [low, high]})
    return {
        "how": {
            "folds": "by patient and stratified by the label; every row is predicted by fits that "
            "have not seen its patient; metrics are over all rows at once, then over the seeds",
            "fraction": "of the training patients whose labels are known, drawn among those with "
            "the same most frequent label, at least one of each; a class that is no patient's most "
            "frequent one may be missing; smaller ones are parts of larger ones",
            "interval": f"95 % percentile bootstrap over patients of the mean over the seeds, "
            f"{RESAMPLES} resamples",
            "auroc": "each class against the others, mean of the classes",
            "knn": f"{NEIGHBOURS} neighbours by cosine, or as many as the rarest class has "
            "training rows, if fewer; features as they are, votes by 1 / distance",
            "logistic": "standardised, classes weighted, C by folds inside of the training part",
            "linear": "standardised, classes weighted, ridge by leaving out training patients",
        },
        "settings": dict(settings),
        "versions": {
            "voco_jax": voco_jax.__version__,
            "python": platform.python_version(),
            "numpy": np.__version__,
            "scikit-learn": sklearn.__version__,
        },
        "label": {
            "column": probed.label,
            "classes": _counts(probed),
            "patients": len(np.unique(labelled.patients)),
            "left_out_patients": dict(probed.left_out),
            "notes": list(probed.notes),
        },
        "majority_class": probed.chance,
        "results": rows,
        "above_random_weights": gains,
        "leaks": [
            {
                "column": leak.column,
                "values": list(leak.values),
                "left_out_patients": leak.left_out,
                "told": {method: _plain(measured) for method, measured in leak.told.items()},
                "label_from_it_alone": _plain(leak.alone),
                "label_among_equals": _plain(leak.within) if leak.within else None,
                "label_among_equals_by_guessing": leak.chance_within if leak.within else None,
            }
            for leak in probed.leaks
        ],
        "words": in_sentences(probed),
    }


def in_sentences(probed: Probed) -> list[str]:
    """What a reader should take from it."""
    ours, theirs = probed.best(TRAINED), probed.best(RANDOM)
    mean, low, high = probed.gain(ours, theirs, probed.most)
    said = (
        f"(balanced accuracy {mean:+.2f}, {low:+.2f} to {high:+.2f}; {NAMES[ours]} against "
        f"{NAMES[theirs]}, the best of each)"
    )
    if low > 0:
        lines = [f"the weights tell {probed.label} better than random weights {said}"]
    elif high < 0:
        lines = [f"random weights tell {probed.label} better than the weights {said}"]
    elif probed.balanced(RANDOM, theirs, probed.most).mean > _EASY:
        lines = [
            f"random weights tell {probed.label} as well {said}: with all labels it is too easy to "
            "show what training has done; compare few labels, and nearest neighbours"
        ]
    else:
        lines = [
            f"the weights do not tell {probed.label} better than random weights do {said}: what "
            "they were trained for is of no use here, or the data are too few to show it"
        ]
    best = probed.balanced(TRAINED, ours, probed.most).mean
    for leak in probed.leaks:
        lines += in_words(leak, probed.label, best, len(probed.labelled.names))
    return lines


def as_text(probed: Probed) -> str:
    """The tables for the console."""
    classes = ", ".join(
        f"{name} {count['rows']} ({count['patients']})" for name, count in _counts(probed).items()
    )
    patients = len(np.unique(probed.labelled.patients))
    lines = [f"{probed.label}, rows (patients): {classes}; {patients} patients"]
    if probed.left_out:
        some = ", ".join(f"{name} ({count})" for name, count in list(probed.left_out.items())[:8])
        lines.append(f"left out, (patients) fewer than folds, or without a label: {some}")
    lines += probed.notes
    metrics = [metric.replace("_", " ").replace("auroc", "AUROC") for metric in METRICS]
    rows = [["labels of", "probe", "features", metrics[0], "95 % interval", *metrics[1:]]]
    for fraction, count in probed.training_patients.items():
        for method in METHODS:
            for name in (TRAINED, RANDOM):
                found = probed.measured[name, method, fraction]
                low, high = found[METRICS[0]].interval
                means = [f"{found[metric].mean:.3f}" for metric in METRICS]
                ends = f"{low:.3f} to {high:.3f}"
                who = f"{100 * fraction:g} % ({count:.0f})"
                rows.append([who, NAMES[method], name, means[0], ends, *means[1:]])
    guess = [f"{value:.3f}" for value in probed.chance.values()]
    rows.append(["", "majority class", "none", guess[0], "", *guess[1:]])
    lines += ["", *_aligned(rows)]
    if probed.leaks:
        lines += ["", *_aligned(_leak_rows(probed))]
    return "\n".join([*lines, "", *in_sentences(probed)])


def _leak_rows(probed: Probed) -> list[list[str]]:
    rows = [["leak check", "values", *(NAMES[method] for method in METHODS), "guessing"]]
    rows[0] += [f"{probed.label} from it alone", f"{probed.label} among equals"]
    for leak in probed.leaks:
        row = [leak.column, str(len(leak.values))]
        row += [f"{leak.told[name].mean:.3f}" if leak.told else "-" for name in METHODS]
        row += [f"{1 / len(leak.values):.3f}" if leak.values else "-", f"{leak.alone.mean:.3f}"]
        rows.append([*row, f"{leak.within.mean:.3f}" if leak.within else "-"])
    return rows


def predictions_csv(probed: Probed, table: FeatureTable) -> str:
    """A line for each row: its label, and what each method said with the most labels.

    The class is that of the highest score, and the score that of the row's own class, both of the
    mean over the seeds.
    """
    labelled, text = probed.labelled, io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    columns = [f"{method}{what}" for method in METHODS for what in ("", "_score_of_label")]
    lines.writerow(["id", "volume", "patient", "label", *columns])
    means = [probed.scores[TRAINED, method, probed.most].mean(axis=0) for method in METHODS]
    for place, row in enumerate(probed.rows.tolist()):
        label = int(labelled.labels[place])
        cells = [table.id[row], table.volume[row], labelled.patients[place], labelled.names[label]]
        for mean in means:
            cells += [labelled.names[int(mean[place].argmax())], f"{mean[place, label]:.4f}"]
        lines.writerow(cells)
    return text.getvalue()


def curves(probed: Probed) -> dict[str, dict[str, Curve]]:
    """For the picture."""

    def point(name: str, method: str, fraction: float) -> tuple[float, float, float, float]:
        measured = probed.measured[name, method, fraction][METRICS[0]]
        return fraction, measured.mean, *measured.interval

    return {
        NAMES[method]: {
            name: [point(name, method, fraction) for fraction in probed.training_patients]
            for name in (TRAINED, RANDOM)
        }
        for method in METHODS
    }


def _counts(probed: Probed) -> dict[str, dict[str, int]]:
    labelled = probed.labelled
    own = {name: labelled.labels == number for number, name in enumerate(labelled.names)}
    return {
        name: {"rows": int(rows.sum()), "patients": len(np.unique(labelled.patients[rows]))}
        for name, rows in own.items()
    }


def _plain(measured: Measured) -> dict[str, Any]:
    low, high = measured.interval
    ends = None if np.isnan(low) else [low, high]
    return {"mean": measured.mean, "interval": ends, "seeds": measured.seeds.tolist()}


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    return [lines[0], "-" * len(lines[0]), *lines[1:]]
