"""How well held-out sub-volumes find their place in the base grid, and what is good there.

docs/health.md has it in more words.
"""

import dataclasses

import numpy as np

from voco_jax.types import Size

DEVIATIONS = 2.0  # above blind, in standard deviations of it: one blind set in 40 gets there
# Mean error of a position, in crops along each axis that the grid splits; see `accuracy_at`.
GOOD_ERROR, VERY_GOOD_ERROR = 0.25, 0.1


@dataclasses.dataclass(frozen=True)
class PositionMetrics:
    """Averages over the sub-volumes of the held-out volumes."""

    accuracy: float  # the largest similarity names a base crop with the largest overlap
    chance: float  # what guessing would reach: about 1 / n
    overlap_error: float  # mean |overlap - similarity|
    similarity_spread: float  # standard deviation over the bases
    embedding_spread: float  # 1 - |mean unit embedding|^2


def measure(
    similarities: np.ndarray, labels: np.ndarray, embedding_spread: float
) -> PositionMetrics:
    """Compares predictions with overlaps.

    Args:
        similarities: (m, n) predicted, 0..1.
        labels: (m, n) overlap ratios.
        embedding_spread: see `voco_jax.voco.step.embedding_spread`.

    Returns:
        The metrics. A base crop that ties for the largest overlap is right too; a prediction that
        ties for the largest similarity counts as the share of right ones among them.
    """
    best = labels >= labels.max(axis=1, keepdims=True) - 1e-6
    named = similarities >= similarities.max(axis=1, keepdims=True)
    return PositionMetrics(
        accuracy=float(np.mean((best & named).sum(axis=1) / named.sum(axis=1))),
        chance=float(best.mean()),
        overlap_error=float(np.abs(labels - similarities).mean()),
        similarity_spread=float(similarities.std(axis=1).mean()),
        embedding_spread=float(embedding_spread),
    )


def split_axes(grid: Size) -> list[int]:
    """The numbers of base crops along the axes that have more than one."""
    return [cells for cells in grid if cells > 1]


def accuracy_at(error: float, grid: Size) -> float:
    """The accuracy of one who errs by `error` crops on average, along each axis of several crops.

    Corners of sub-volumes are uniform, and along an axis the right answer changes once in every
    crop, half way. An error of e crops, 1 at most, crosses such a place with probability e.
    """
    return float((1 - error) ** len(split_axes(grid)))


def blind_accuracy(grid: Size) -> float:
    """The accuracy of naming the same base crop always, the best one: in the middle of the grid.

    Along an axis of g crops the corner is uniform over g - 1 crops, and a crop that is not the
    first or the last is right over one of them; of two crops, each over half.
    """
    return float(np.prod([1 / 2 if cells == 2 else 1 / (cells - 1) for cells in split_axes(grid)]))


def told_from_blind(count: int, grid: Size) -> float:
    """The accuracy on `count` sub-volumes from which on it is better than always one answer."""
    blind = blind_accuracy(grid)
    return blind + DEVIATIONS * float(np.sqrt(blind * (1 - blind) / count))


def describe_accuracy(accuracy: float, count: int, grid: Size) -> str:
    """What an accuracy on `count` sub-volumes means for this grid, in a few words."""
    good, very_good = (accuracy_at(error, grid) for error in (GOOD_ERROR, VERY_GOOD_ERROR))
    least = told_from_blind(count, grid)
    if least > good:
        return f"{count} sub-volumes are too few to judge it"
    bands = ("very good", very_good), ("good", good), ("learning", least)
    word = next((word for word, lowest in bands if accuracy >= lowest), "not above blind")
    return (
        f"{word}; {blind_accuracy(grid):.0%} is blind, {good:.0%} good, {very_good:.0%} very good"
    )
