"""Whether features that tell a label may tell where the scan was made instead."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from voco_jax.evaluation.class_metrics import balanced_accuracy
from voco_jax.evaluation.probe_folds import (
    Fold,
    Labelled,
    Measured,
    draws,
    encode,
    make_folds,
    measure_all,
    predict,
)
from voco_jax.evaluation.probe_methods import fit_probe


@dataclass(frozen=True)
class Leak:
    """What a column that should not matter has to do with features and label.

    Balanced accuracies all; see `adjusted` for how two of them compare.

    Attributes:
        column: its name.
        values: those that are told apart, of enough patients for the folds.
        left_out: the others, and their numbers of patients.
        told: by method, of the column from the features; {}: there are no two values.
        alone: of the label from the column, without features.
        within: of the label from the features, among rows of one value; None: no value has two
            labels.
        chance_within: of `within`, by guessing; NaN without it.
    """

    column: str
    values: tuple[str, ...]
    left_out: dict[str, int]
    told: dict[str, Measured]
    alone: Measured
    within: Measured | None
    chance_within: float


def adjusted(measured: float, classes: int) -> float:
    """A balanced accuracy on a scale where guessing is 0 and all right is 1."""
    return (measured - 1 / classes) / (1 - 1 / classes)


def look_for_leak(
    column: str,
    values: np.ndarray,
    features: np.ndarray,
    labelled: Labelled,
    scores: np.ndarray,
    folds: int,
    seeds: int,
) -> Leak:
    """Probes a column as the label is probed, and the label given the column.

    Args:
        column: its name.
        values: (rows,) str, "" where it is unknown.
        features: (rows, features).
        labelled: the label of these rows.
        scores: (seeds, rows, classes) of the label, by the best method.
        folds: as for the label.
        seeds: likewise.
    """
    rows, leaking, left_out = encode(values, labelled.patients, folds)
    told: dict[str, Measured] = {}
    if len(leaking.names) > 1:
        own = make_folds(leaking, folds, (1.0,), seeds)
        found = predict(features[rows], leaking, own, lambda: None)
        for (method, _), measured in zip(
            found, measure_all(leaking, list(found.values())), strict=True
        ):
            told[method] = measured["balanced_accuracy"]
    _, codes = np.unique(values, return_inverse=True)
    alone = _alone(codes, labelled, make_folds(labelled, folds, (1.0,), seeds), seeds)
    within, chance = _within(labelled, codes, scores.argmax(axis=-1))
    return Leak(
        column=column,
        values=leaking.names,
        left_out=left_out,
        told=told,
        alone=measure_all(labelled, [alone])[0]["balanced_accuracy"],
        within=within,
        chance_within=chance,
    )


def _alone(codes: np.ndarray, labelled: Labelled, folds: Sequence[Fold], seeds: int) -> np.ndarray:
    """(seeds, rows, classes) scores of the label by the linear probe on the column's values."""
    one_hot = np.eye(codes.max() + 1)[codes]
    found = np.zeros((seeds, len(codes), len(labelled.names)))
    for fold in folds:
        known = labelled.labels[fold.train], labelled.patients[fold.train]
        model = fit_probe("linear", one_hot[fold.train], *known, len(labelled.names))
        found[fold.seed, fold.test] = model(one_hot[fold.test])
    return found


def _within(
    labelled: Labelled, codes: np.ndarray, predicted: np.ndarray
) -> tuple[Measured | None, float]:
    """The mean over values with several labels, by their rows; and what guessing would give."""
    parts = [codes == value for value in np.unique(codes)]
    parts = [rows for rows in parts if len(np.unique(labelled.labels[rows])) > 1]
    if not parts:
        return None, float("nan")
    sizes = np.array([rows.sum() for rows in parts], np.float64)
    chances = [1 / len(np.unique(labelled.labels[rows])) for rows in parts]

    def mean(found: np.ndarray, weights: np.ndarray | None) -> np.ndarray:
        values = [
            balanced_accuracy(
                labelled.labels[rows], found[rows], None if weights is None else weights[:, rows]
            )
            for rows in parts
        ]
        known = ~np.isnan(values)  # where a resample lacks a class, the value has no part in it
        shares = np.where(known, sizes.reshape(-1, *[1] * (known.ndim - 1)), 0.0)
        with np.errstate(invalid="ignore"):
            return (np.nan_to_num(values) * shares).sum(axis=0) / shares.sum(axis=0)

    resamples = [
        np.mean([mean(one, weights) for one in predicted], axis=0)
        for weights in draws(labelled.patients)
    ]
    seeds = np.array([float(mean(one, None)) for one in predicted])
    return Measured(seeds, np.concatenate(resamples)), float(np.average(chances, weights=sizes))


def in_words(leak: Leak, label: str, best: float, classes: int) -> list[str]:
    """What a reader should take from it.

    Args:
        leak: of `look_for_leak`.
        label: the label's name.
        best: balanced accuracy of the label, by the best method.
        classes: of the label.
    """
    column = leak.column
    if not leak.told:
        return [f"{column}: no two values of enough patients for the folds; it was not probed"]
    label_told = adjusted(best, classes)
    leak_told = adjusted(max(one.mean for one in leak.told.values()), len(leak.values))
    compared = f"({leak_told:.2f} against {label_told:.2f}, where 0 is guessing and 1 all right)"
    if leak_told >= label_told:
        lines = [
            f"{column} is told from the features as well as {label}, or better {compared}: they "
            f"may tell {column} rather than {label}"
        ]
    else:
        lines = [f"{column} is told from the features, but less well than {label} {compared}"]
        if max(one.interval[0] for one in leak.told.values()) <= 1 / len(leak.values):
            lines = [f"{column} is not told from the features {compared}"]
    if leak.alone.interval[0] > 1 / classes:
        lines.append(
            f"{column} alone, without any image, gives {label} with a balanced accuracy of "
            f"{leak.alone.mean:.2f}: the two go together in these data"
        )
    if leak.within is None:
        lines.append(
            f"no value of {column} has rows of two classes of {label}: these data cannot show "
            "which of the two the features tell"
        )
        return lines
    low, high = leak.within.interval
    at_chance = "" if low > leak.chance_within else f": no better than guessing {label}"
    lines.append(
        f"among rows with the same {column}, {label} is told with {leak.within.mean:.2f} "
        f"({low:.2f} to {high:.2f}; guessing {leak.chance_within:.2f}){at_chance}"
    )
    return lines
