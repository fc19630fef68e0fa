"""Nearest rows by cosine, exactly, and how many of them are of the same class."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from voco_jax.evaluation.class_metrics import interval
from voco_jax.evaluation.probe_folds import draws

_BLOCK = 16_000_000  # similarities at a time


@dataclass(frozen=True)
class Neighbours:
    """Of each query, nearest first.

    Attributes:
        rows: (queries, top) int64 indices of rows; -1: there are no more.
        similarities: (queries, top) float32 cosines; NaN there.
    """

    rows: np.ndarray
    similarities: np.ndarray


def find_neighbours(
    vectors: np.ndarray, queries: Sequence[int], groups: np.ndarray, top: int
) -> Neighbours:
    """The rows with the largest cosine to each query that are not of its group.

    Args:
        vectors: (rows, features).
        queries: indices of rows.
        groups: (rows,) as patients.
        top: so many; of equal ones the first rows.
    """
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit = (vectors / np.where(lengths > 0, lengths, 1)).astype(np.float32)
    _, groups = np.unique(groups, return_inverse=True)
    order = np.asarray(queries)
    rows = np.full((len(order), top), -1)
    similarities = np.full((len(order), top), np.nan, np.float32)
    count, taken = max(1, _BLOCK // len(vectors)), min(top, len(vectors))
    for start in range(0, len(order), count):
        block = order[start : start + count]
        found = unit[block] @ unit.T
        found[groups[block][:, None] == groups] = -np.inf
        # Sorting a few is enough; but of those as near as the last one the first are wanted.
        least = -np.partition(-found, taken - 1, axis=1)[:, taken - 1]
        for place, (line, limit) in enumerate(zip(found, least, strict=True), start):
            near = np.flatnonzero((line >= limit) & (line > -np.inf))
            best = near[np.argsort(-line[near], kind="stable")][:top]
            rows[place, : len(best)], similarities[place, : len(best)] = best, line[best]
    return Neighbours(rows, similarities)


def precision(
    neighbours: Neighbours, queries: Sequence[int], labels: np.ndarray, groups: np.ndarray
) -> dict[str, Any]:
    """The share of the neighbours that have the query's label, mean over the queries.

    Args:
        neighbours: of `find_neighbours`.
        queries: indices of rows.
        labels: (rows,) str.
        groups: (rows,) str, as patients.

    Returns:
        "mean", its 95 % "interval" (bootstrap over the queries' groups), and "chance": what rows
        drawn at random from the other groups would have.
    """
    known = neighbours.rows >= 0
    right = (labels[neighbours.rows] == labels[queries][:, None]) & known
    shares = right.sum(axis=1) / np.maximum(known.sum(axis=1), 1)
    chances = []
    for query in queries:
        others = labels[groups != groups[query]]
        chances.append(float((others == labels[query]).mean()) if len(others) else 0.0)
    resamples = [
        (weights @ shares) / weights.sum(axis=1) for weights in draws(groups[list(queries)])
    ]
    low, high = interval(np.concatenate(resamples))
    return {
        "mean": float(shares.mean()),
        "interval": [low, high] if len(np.unique(groups[list(queries)])) > 1 else None,
        "chance": float(np.mean(chances)),
    }
