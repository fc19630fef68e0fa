"""The probes: k nearest neighbours, logistic regression, and a linear probe in closed form."""

from collections.abc import Callable, Iterator

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from voco_jax.evaluation.class_metrics import balanced_accuracy
from voco_jax.evaluation.linear_probe import fit_linear_probe

NEIGHBOURS = 5
STRENGTHS = 10.0 ** np.arange(-4, 1)
"""Of logistic regression, scikit-learn's C; chosen inside of the training folds."""
INNER_FOLDS = 3

Score = Callable[[np.ndarray], np.ndarray]
"""Features -> (rows, classes), the largest is the predicted class."""
Fit = Callable[[np.ndarray, np.ndarray, np.ndarray, int], Score]
"""(training features, labels, patients, number of classes) -> its scores."""


def neighbours(
    features: np.ndarray, labels: np.ndarray, patients: np.ndarray, classes: int
) -> Score:
    """k nearest neighbours by cosine, features as they are; votes by 1 / distance.

    k is `NEIGHBOURS`, or as many rows as the rarest class has: with a row of each class all votes
    would be equal.
    """
    rarest = int(np.unique(labels, return_counts=True)[1].min())
    model = KNeighborsClassifier(
        min(NEIGHBOURS, rarest), weights="distance", metric="cosine", algorithm="brute"
    )
    return _spread(model.fit(features, labels), classes)


def logistic(features: np.ndarray, labels: np.ndarray, patients: np.ndarray, classes: int) -> Score:
    """Logistic regression on standardised features; every class weighs the same.

    C is that of `STRENGTHS` with the best balanced accuracy in folds of the training patients, the
    smallest of several; 1 where there are too few patients for folds.
    """

    def fit(strength: float, rows: np.ndarray) -> Score:
        model = LogisticRegression(C=strength, class_weight="balanced", max_iter=1_000)
        pipeline = make_pipeline(StandardScaler(), model)
        return _spread(pipeline.fit(features[rows], labels[rows]), classes)

    folds = min(INNER_FOLDS, fewest_patients(labels, patients))
    inner = list(partition(labels, patients, folds, 0)) if folds > 1 else []
    inner = [(train, test) for train, test in inner if len(np.unique(labels[train])) > 1]
    best = 1.0
    if inner:
        tested = np.concatenate([test for _, test in inner])
        scores = []
        for strength in STRENGTHS.tolist():
            found = [fit(strength, train)(features[test]).argmax(axis=1) for train, test in inner]
            scores.append(float(balanced_accuracy(labels[tested], np.concatenate(found))))
        best = float(STRENGTHS[int(np.argmax(scores))])
    return fit(best, np.arange(len(labels)))


def linear(features: np.ndarray, labels: np.ndarray, patients: np.ndarray, classes: int) -> Score:
    """The linear probe in closed form, its ridge chosen by leaving out training patients.

    Of a single patient rows are left out.
    """
    alone = len(np.unique(patients)) == 1
    groups = np.arange(len(labels)) if alone else patients
    return fit_linear_probe(features, labels, groups, classes).scores


def fit_probe(
    method: str, features: np.ndarray, labels: np.ndarray, patients: np.ndarray, classes: int
) -> Score:
    """Fits one of `METHODS`.

    Args:
        method: its name.
        features: (rows, features), for training.
        labels: (rows,) numbers of classes; if all are one, that is what is predicted.
        patients: (rows,), who stay together also where something is chosen by folds.
        classes: their number.
    """
    if len(np.unique(labels)) == 1:
        return lambda tested: np.tile(np.eye(classes)[labels[0]], (len(tested), 1))
    return METHODS[method](features, labels, patients, classes)


METHODS: dict[str, Fit] = {"knn": neighbours, "logistic": logistic, "linear": linear}


def _spread(model: KNeighborsClassifier | LogisticRegression, classes: int) -> Score:
    """Probabilities with a column for every class, also for those that were not trained on."""

    def scores(features: np.ndarray) -> np.ndarray:
        found = np.zeros((len(features), classes))
        found[:, model.classes_] = model.predict_proba(features)
        return found

    return scores


def fewest_patients(labels: np.ndarray, patients: np.ndarray) -> int:
    """Of the class that the fewest patients have."""
    return min(len(np.unique(patients[labels == number])) for number in np.unique(labels))


def partition(
    labels: np.ndarray, patients: np.ndarray, folds: int, seed: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(training, test) indices of each fold: no patient in both, the classes alike in all."""
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    return splitter.split(labels, labels, patients)
