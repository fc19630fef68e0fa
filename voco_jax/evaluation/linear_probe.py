"""A linear probe in closed form: ridge regression on the classes, each patient left out in turn.

No iteration and no folds: all that leaving a patient out would change follows from one singular
value decomposition. So it is cheap enough to be computed at every validation of a pre-training.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

RATIOS = 10.0 ** np.arange(-4, 4)
"""Of the ridge's strength to the number of rows; the one with the least left-out error is taken."""
_BLOCK = 4_000_000  # numbers of float64 at a time


@dataclass(frozen=True)
class LinearProbe:
    """A fitted probe.

    Attributes:
        weights: (features, classes) float64.
        bias: (classes,) float64.
        strength: of the ridge, in scikit-learn alpha.
        left_out: (rows, classes) float64: scores of the rows it was fitted to, each by the fit to
            all other groups.
    """

    weights: np.ndarray
    bias: np.ndarray
    strength: float
    left_out: np.ndarray

    def scores(self, features: np.ndarray) -> np.ndarray:
        """(rows, classes) float64; the largest is the predicted class, 1 is sure, 0 is another."""
        return features @ self.weights + self.bias


def fit_linear_probe(
    features: np.ndarray, labels: np.ndarray, groups: np.ndarray, classes: int
) -> LinearProbe:
    """Fits 1 for the row's class and 0 for the others by least squares with a ridge.

    Features are standardised; every class weighs the same, and the constant has no penalty. It is
    scikit-learn's `RidgeClassifier(class_weight="balanced")` behind a `StandardScaler`, with the
    strength chosen by the squared error of what was left out. A group g is left out exactly, by
    r_g = (1 - H_gg)^-1 (y_g - H y_g) with the hat matrix H; for groups of one row that is the
    well-known leave-one-out formula (Golub, Heath, Wahba 1979).

    Args:
        features: (rows, features).
        labels: (rows,) numbers of classes.
        groups: (rows,) of each row, as patients; they are left out together.
        classes: their number; a class without rows is never predicted.

    Raises:
        ValueError: fewer than two groups.
    """
    if len(np.unique(groups)) < 2:
        raise ValueError("found rows of one group, expected two or more")
    values = features.astype(np.float64)
    weights = balanced_weights(labels)
    centre, scale = np.average(values, axis=0, weights=weights), values.std(axis=0)
    scale[scale <= 1e-6 * np.abs(centre)] = 1.0  # constant, but for rounding
    targets = np.eye(classes)[labels]
    prior = np.average(targets, axis=0, weights=weights)
    root = np.sqrt(weights)[:, None]
    u, s, vt = np.linalg.svd(root * ((values - centre) / scale), full_matrices=False)
    rotated = u.T @ (root * (targets - prior))
    best = (np.inf, 0.0, targets)
    for strength in (len(labels) * RATIOS).tolist():
        shrink = s**2 / (s**2 + strength)
        residuals = root * (targets - prior) - u @ (shrink[:, None] * rotated)
        away = np.empty_like(residuals)
        for members in _groups_of_a_size(groups, u.shape[1]):
            own, constant = u[members], root[members] / np.linalg.norm(root)
            hat = (own * shrink) @ own.swapaxes(1, 2) + constant @ constant.swapaxes(1, 2)
            away[members] = np.linalg.solve(np.eye(hat.shape[1]) - hat, residuals[members])
        error = float((away**2).sum())
        if error < best[0]:
            best = (error, strength, targets - away / root)
    _, strength, left_out = best
    slopes = vt.T @ ((s / (s**2 + strength))[:, None] * rotated) / scale[:, None]
    return LinearProbe(slopes, prior - centre @ slopes, strength, left_out)


def balanced_weights(labels: np.ndarray) -> np.ndarray:
    """Weights of the rows so that each class that there is weighs the same; their mean is 1."""
    counts = np.bincount(labels)
    return (len(labels) / (np.count_nonzero(counts) * np.maximum(counts, 1)))[labels]


def _groups_of_a_size(groups: np.ndarray, rank: int) -> Iterator[np.ndarray]:
    """(groups, rows of each) indices of rows: of groups of one size, as many as fit in memory."""
    _, inverse, counts = np.unique(groups, return_inverse=True, return_counts=True)
    order, ends = np.argsort(inverse, kind="stable"), np.cumsum(counts)
    for size in np.unique(counts).tolist():
        first = (ends - counts)[counts == size]
        count = max(1, _BLOCK // (size * rank))
        for start in range(0, len(first), count):
            yield order[first[start : start + count, None] + np.arange(size)]
