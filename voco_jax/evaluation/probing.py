"""Features and random weights probed side by side, and what should not matter."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from tqdm import tqdm

from voco_jax.errors import InputError
from voco_jax.evaluation.class_metrics import interval
from voco_jax.evaluation.features import FeatureTable
from voco_jax.evaluation.label_columns import Row, column, patients
from voco_jax.evaluation.leaks import Leak, look_for_leak
from voco_jax.evaluation.probe_folds import (
    Labelled,
    Measured,
    encode,
    make_folds,
    measure_all,
    predict,
)
from voco_jax.evaluation.probe_methods import METHODS

TRAINED, RANDOM = "these weights", "random weights"
MANY = 20
"""Different numbers in a column that are more than classes."""


@dataclass(frozen=True)
class Probed:
    """All that was found.

    Attributes:
        label: name of its column.
        labelled: the rows' labels.
        rows: (rows,) their indices in the table.
        left_out: numbers of patients by value of the label, of those left out.
        notes: on the patients and fractions.
        training_patients: by fraction, the mean over the folds.
        scores: by features, method and fraction (seeds, rows, classes).
        measured: metrics by features, method and fraction.
        leaks: one for each column asked for.
    """

    label: str
    labelled: Labelled
    rows: np.ndarray
    left_out: Mapping[str, int]
    notes: Sequence[str]
    training_patients: Mapping[float, float]
    scores: Mapping[tuple[str, str, float], np.ndarray]
    measured: Mapping[tuple[str, str, float], Mapping[str, Measured]]
    leaks: Sequence[Leak]

    @property
    def chance(self) -> dict[str, float]:
        """Metrics of always saying the most frequent class."""
        shares = np.bincount(self.labelled.labels) / len(self.labelled.labels)
        balanced = 1 / len(shares)
        return {"balanced_accuracy": balanced, "accuracy": float(shares.max()), "auroc": 0.5}

    @property
    def most(self) -> float:
        """The largest fraction."""
        return max(self.training_patients)

    def best(self, features: str) -> str:
        """The method with the best balanced accuracy with the most labels."""
        return max(METHODS, key=lambda method: self.balanced(features, method, self.most).mean)

    def balanced(self, features: str, method: str, fraction: float) -> Measured:
        """The balanced accuracy."""
        return self.measured[features, method, fraction]["balanced_accuracy"]

    def gain(self, method: str, other: str, fraction: float) -> tuple[float, float, float]:
        """Balanced accuracy above that of random weights by another method: mean, low, high."""
        ours = self.balanced(TRAINED, method, fraction)
        theirs = self.balanced(RANDOM, other, fraction)
        return ours.mean - theirs.mean, *interval(ours.resamples - theirs.resamples)


def probe(
    table: FeatureTable,
    random: FeatureTable,
    rows: Sequence[Row],
    label: str,
    *,
    patient: str | None = None,
    folds: int = 5,
    fractions: Sequence[float] = (1.0,),
    seeds: int = 3,
    leaks: Sequence[str] = (),
    progress: bool = False,
) -> Probed:
    """Probes a label in both tables, on the same folds.

    Args:
        table: of features of one kind.
        random: see `same_rows`.
        rows: of the CSV file for each row, see `label_columns.match`.
        label: name of its column.
        patient: of the patients' column; None: each volume is one.
        folds: 2 or more.
        fractions: of the training patients whose labels are known, growing; one that has the
            patients of the next is left out.
        seeds: so many other folds and draws.
        leaks: columns that should not matter.
        progress: whether to show a bar.

    Raises:
        InputError: columns that are not there, or a label that cannot be probed.
    """
    people, notes = patients(table, rows, patient)
    values = column(table, rows, label)
    _check_classes(values, label)
    leak_values = {name: column(table, rows, name) for name in leaks}
    kept, labelled, left_out = encode(values, people, folds)
    if len(labelled.names) < 2:
        counts = ", ".join(f"{name} ({count})" for name, count in left_out.items())
        raise InputError(
            f"column {label}: found {len(labelled.names)} classes of {folds} or more patients; "
            f"with fewer: {counts or 'none'}; expected two classes: take fewer --folds, merge "
            "classes, embed more volumes, or name the column of the patients with --patient"
        )
    parts = make_folds(labelled, folds, fractions, seeds)
    known: dict[float, list[int]] = {fraction: [] for fraction in fractions}
    for part in parts:
        known[part.fraction].append(len(np.unique(labelled.patients[part.train])))
    for less, more in pairwise(fractions):
        if known[less] == known[more]:  # smaller ones are parts of larger ones: the same patients
            del known[less]
            notes.append(f"left out: {100 * less:g} %, as it has the patients of {100 * more:g} %")
    parts = [part for part in parts if part.fraction in known]
    scores: dict[tuple[str, str, float], np.ndarray] = {}
    with tqdm(desc="probe", total=2 * len(parts), unit=" fits", disable=not progress) as bar:
        for name, vectors in ((TRAINED, table.vectors), (RANDOM, random.vectors)):
            found = predict(vectors[kept], labelled, parts, lambda: bar.update())
            scores |= {(name, *key): value for key, value in found.items()}
    measured = dict(zip(scores, measure_all(labelled, list(scores.values())), strict=True))
    training_patients = {fraction: float(np.mean(counts)) for fraction, counts in known.items()}
    result = Probed(
        label, labelled, kept, left_out, notes, training_patients, scores, measured, leaks=[]
    )
    best = scores[TRAINED, result.best(TRAINED), result.most]
    found_leaks = [
        look_for_leak(name, own[kept], table.vectors[kept], labelled, best, folds, seeds)
        for name, own in leak_values.items()
    ]
    return replace(result, leaks=found_leaks)


def _check_classes(values: np.ndarray, label: str) -> None:
    different = set(values.tolist()) - {""}
    if len(different) <= MANY:
        return
    try:
        numbers = np.array(sorted(different), np.float64)
    except ValueError:
        return
    raise InputError(
        f"column {label}: found {len(numbers)} different numbers from {numbers.min():g} to "
        f"{numbers.max():g}, expected classes; add a column of classes, as {label}_over_"
        f"{np.median(numbers):g} with yes and no"
    )
