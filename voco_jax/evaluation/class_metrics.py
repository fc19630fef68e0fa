"""Metrics of classifications, with intervals over patients.

Every metric takes weights of the cases, many sets of them at once: a patient that a resample of the
bootstrap has drawn twice counts twice.
"""

from collections.abc import Sequence

import numpy as np


def accuracy(
    reference: np.ndarray, prediction: np.ndarray, weights: np.ndarray | None = None
) -> np.ndarray:
    """The share of the cases whose class is right.

    Args:
        reference: (cases,) numbers of classes.
        prediction: (cases,) numbers of classes.
        weights: (..., cases), 0 or more; None: all 1.

    Returns:
        (...) float64; NaN where all weights are 0.
    """
    weights = np.ones(len(reference)) if weights is None else weights
    return _divide(weights @ (reference == prediction).astype(np.float64), weights.sum(axis=-1))


def balanced_accuracy(
    reference: np.ndarray, prediction: np.ndarray, weights: np.ndarray | None = None
) -> np.ndarray:
    """`accuracy` of the cases of each class that `reference` has, and then the mean over these.

    Args: see `accuracy`.

    Returns:
        (...) float64; NaN where all cases of a class have the weight 0: without its hardest class
        a resample would look too good.
    """
    weights = np.ones(len(reference)) if weights is None else weights
    of_class = [
        accuracy(reference[own], prediction[own], weights[..., own])
        for own in (reference == number for number in np.unique(reference))
    ]
    return np.mean(of_class, axis=0)


def roc_auc(
    positive: np.ndarray, scores: np.ndarray, weights: np.ndarray | None = None
) -> np.ndarray:
    """Area under the receiver operating characteristic, of two classes.

    The share of the pairs of a positive and a negative case in which the positive one has the
    higher score; equal scores count half. By ranks: one sorting, whatever the number of pairs.

    Args:
        positive: (cases,) bool.
        scores: (cases,) the higher, the more probably positive.
        weights: (..., cases), 0 or more; None: all 1.

    Returns:
        (...) float64; NaN where there is no positive or no negative case.
    """
    weights = np.ones(len(scores)) if weights is None else weights
    order = np.argsort(scores, kind="stable")
    weights, positive, scores = weights[..., order], positive[order], scores[order]
    negatives = np.cumsum(np.where(positive, 0.0, weights), axis=-1)
    up_to = np.concatenate([np.zeros((*negatives.shape[:-1], 1)), negatives], axis=-1)
    first, end = (np.searchsorted(scores, scores, side) for side in ("left", "right"))
    below, until = up_to[..., first], up_to[..., end]  # negatives with lower, and equal, scores
    positives = np.where(positive, weights, 0.0)
    right = (positives * (below + until) / 2).sum(axis=-1)
    return _divide(right, positives.sum(axis=-1) * negatives[..., -1])


def one_against_rest(
    reference: np.ndarray, probabilities: np.ndarray, weights: np.ndarray | None = None
) -> np.ndarray:
    """`roc_auc` of each class, by its own probability.

    Args:
        reference: (cases,) numbers of classes.
        probabilities: (cases, classes).
        weights: (..., cases), 0 or more; None: all 1.

    Returns:
        (..., classes) float64; NaN where a class has no case, or all of them.
    """
    areas = [
        roc_auc(reference == number, column, weights)
        for number, column in enumerate(probabilities.T)
    ]
    return np.stack(areas, axis=-1)


def mean_known(values: np.ndarray) -> np.ndarray:
    """The mean over the last axis without NaNs; NaN where there is nothing else."""
    known = ~np.isnan(values)
    return _divide(np.where(known, values, 0).sum(axis=-1), known.sum(axis=-1))


def resample(groups: Sequence[str], seed: int = 0, resamples: int = 1_000) -> np.ndarray:
    """Weights of the cases in resamples of the bootstrap, which draws groups, as patients.

    Args:
        groups: of each case.
        seed: of the drawing.
        resamples: how often as many groups are drawn, with replacement.

    Returns:
        (resamples, cases) float64: how often each case's group was drawn.
    """
    names, of_case = np.unique(np.asarray(groups), return_inverse=True)
    generator = np.random.default_rng(seed)
    drawn = generator.multinomial(len(names), np.full(len(names), 1 / len(names)), resamples)
    return drawn[:, of_case].astype(np.float64)


def interval(values: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """The ends of the percentile bootstrap's interval.

    Args:
        values: (resamples,) of a metric; NaNs are left out.
        level: the interval's share of the others.

    Returns:
        NaNs with fewer than two values.
    """
    known = values[~np.isnan(values)]
    if len(known) < 2:
        return float("nan"), float("nan")
    low, high = np.quantile(known, [(1 - level) / 2, (1 + level) / 2]).tolist()
    return low, high


def _divide(total: np.ndarray, count: np.ndarray) -> np.ndarray:
    return np.where(count > 0, total / np.where(count > 0, count, 1), np.nan)
