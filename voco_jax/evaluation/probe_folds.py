"""How well labels can be told from features: folds without a patient on both sides, intervals."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from threadpoolctl import threadpool_limits

from voco_jax.evaluation.class_metrics import (
    accuracy,
    balanced_accuracy,
    interval,
    one_against_rest,
    resample,
)
from voco_jax.evaluation.probe_methods import METHODS, fit_probe, partition

RESAMPLES = 1_000
METRICS = ("balanced_accuracy", "accuracy", "auroc")
_BLOCK = 4_000_000  # weights of rows in resamples at a time


@dataclass(frozen=True)
class Labelled:
    """What is probed: rows that have a label.

    Attributes:
        labels: (rows,) numbers of classes.
        names: of the classes.
        patients: (rows,) names.
    """

    labels: np.ndarray
    names: tuple[str, ...]
    patients: np.ndarray


@dataclass(frozen=True)
class Fold:
    """A training part and the rows that it predicts.

    Attributes:
        seed: number of the partition.
        fraction: of the training patients whose labels are known.
        train: (n,) indices of rows.
        test: (m,) indices of rows.
    """

    seed: int
    fraction: float
    train: np.ndarray
    test: np.ndarray


# ---- labels and folds


def encode(
    values: np.ndarray, patients: np.ndarray, folds: int
) -> tuple[np.ndarray, Labelled, dict[str, int]]:
    """Numbers the values of a column; those of too few patients for the folds are left out.

    Args:
        values: (rows,) str; "": unknown.
        patients: (rows,) str.
        folds: a value needs a patient in each.

    Returns:
        Indices of the rows that are left, their labels, and how many patients each value has that
        is left out.
    """
    counts = {name: len(np.unique(patients[values == name])) for name in np.unique(values).tolist()}
    unknown = counts.pop("", 0)
    names = tuple(name for name, count in counts.items() if count >= folds)
    left_out = {name: count for name, count in counts.items() if count < folds}
    if unknown:
        left_out["(none)"] = unknown
    rows = np.flatnonzero(np.isin(values, names))
    labels = np.searchsorted(names, values[rows]) if names else np.zeros(0, int)
    return rows, Labelled(labels, names, patients[rows]), left_out


def draw_patients(
    labels: np.ndarray, patients: np.ndarray, fraction: float, seed: int
) -> np.ndarray:
    """Indices of the rows of a share of the patients.

    Patients are drawn among those with the same most frequent label, at least one of each. A class
    that is no patient's most frequent one may be missing. Smaller shares are parts of larger ones.
    """
    taken = []
    unique = np.unique(patients)
    most = np.array([np.bincount(labels[patients == one]).argmax() for one in unique])
    generator = np.random.default_rng(seed)
    for number in np.unique(most):
        own = generator.permutation(unique[most == number])
        taken.append(own[: max(1, round(fraction * len(own)))])
    return np.flatnonzero(np.isin(patients, np.concatenate(taken)))


def make_folds(
    labelled: Labelled, folds: int, fractions: Sequence[float], seeds: int
) -> list[Fold]:
    """All training parts; every row is in the test part of one fold of each seed and fraction."""
    found = []
    for seed in range(seeds):
        for train, test in partition(labelled.labels, labelled.patients, folds, seed):
            for fraction in fractions:
                rows = draw_patients(
                    labelled.labels[train], labelled.patients[train], fraction, seed
                )
                found.append(Fold(seed, fraction, train[rows], test))
    return found


def predict(
    features: np.ndarray, labelled: Labelled, folds: Sequence[Fold], step: Callable[[], object]
) -> dict[tuple[str, float], np.ndarray]:
    """Scores of every row by fits that have not seen its patient.

    In one thread: BLAS's threads, each waiting for the others, take many times longer for fits as
    small as these, the more so on a busy machine.

    Args:
        features: (rows, features) float32.
        labelled: the rows' labels.
        folds: of `make_folds`.
        step: is called after each of them.

    Returns:
        By method and fraction (seeds, rows, classes) float32.
    """
    classes, seeds = len(labelled.names), 1 + max(fold.seed for fold in folds)
    shape = (seeds, len(features), classes)
    found = {
        (method, fold.fraction): np.zeros(shape, np.float32) for method in METHODS for fold in folds
    }
    with threadpool_limits(1):
        for fold in folds:
            known = labelled.labels[fold.train], labelled.patients[fold.train]
            for method in METHODS:
                fitted = fit_probe(method, features[fold.train], *known, classes)
                found[method, fold.fraction][fold.seed, fold.test] = fitted(features[fold.test])
            step()
    return found


# ---- metrics


def measure(
    labels: np.ndarray, scores: np.ndarray, weights: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """Each of `METRICS` for the scores of one seed.

    Args:
        labels: (rows,) numbers of classes.
        scores: (rows, classes).
        weights: (..., rows) or None, see `class_metrics`.

    Returns:
        (...) float64 each, NaN where a class has no weight; "auroc" is the mean of each class
        against the others.
    """
    predicted = scores.argmax(axis=1)
    return {
        "balanced_accuracy": balanced_accuracy(labels, predicted, weights),
        "accuracy": accuracy(labels, predicted, weights),
        "auroc": one_against_rest(labels, scores, weights).mean(axis=-1),
    }


@dataclass(frozen=True)
class Measured:
    """A metric of scores.

    Attributes:
        seeds: (seeds,) its values.
        resamples: (resamples,) means over the seeds when patients are drawn anew.
    """

    seeds: np.ndarray
    resamples: np.ndarray

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return float(self.seeds.mean())

    @property
    def interval(self) -> tuple[float, float]:
        """95 %, of the bootstrap over patients."""
        return interval(self.resamples)


def draws(patients: np.ndarray) -> Iterator[np.ndarray]:
    """(resamples, rows) weights of the bootstrap over patients, the same at every call, in parts.

    `RESAMPLES` in all, with no more than some memory at a time.
    """
    count = max(1, _BLOCK // len(patients))
    for start in range(0, RESAMPLES, count):
        yield resample(patients.tolist(), start, min(count, RESAMPLES - start))


def measure_all(labelled: Labelled, scores: Sequence[np.ndarray]) -> list[dict[str, Measured]]:
    """Metrics with what the bootstrap over patients makes of them, the same draws for all scores.

    Args:
        labelled: the rows' labels.
        scores: (seeds, rows, classes) each.
    """
    drawn: list[dict[str, list[np.ndarray]]] = [{name: [] for name in METRICS} for _ in scores]
    for weights in draws(labelled.patients):
        for into, of_seeds in zip(drawn, scores, strict=True):
            found = [measure(labelled.labels, one, weights) for one in of_seeds]
            for name in METRICS:
                into[name].append(np.mean([one[name] for one in found], axis=0))
    result = []
    for into, of_seeds in zip(drawn, scores, strict=True):
        values = [measure(labelled.labels, one) for one in of_seeds]
        result.append(
            {
                name: Measured(np.array([one[name] for one in values]), np.concatenate(into[name]))
                for name in METRICS
            }
        )
    return result
