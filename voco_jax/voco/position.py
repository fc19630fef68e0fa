"""How well held-out sub-volumes find their place in the base grid, and signs of collapse."""

import dataclasses

import numpy as np

CONSTANT_SIMILARITY = 0.01  # spread over the bases under which a sub-volume's position is not told
VANISHING_SPREAD = 0.01  # of the unit embeddings; 1 - cos of about 8 degrees


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


def collapse_warning(metrics: PositionMetrics) -> str | None:
    """Words for a user whose encoder has stopped to tell positions apart; None: it has not."""
    signs = []
    if metrics.similarity_spread < CONSTANT_SIMILARITY:
        signs.append(
            "similarities are constant over the base crops "
            f"(spread {metrics.similarity_spread:.4f}, expected {CONSTANT_SIMILARITY} or more)"
        )
    if metrics.embedding_spread < VANISHING_SPREAD:
        signs.append(
            "all crops have nearly one embedding "
            f"(spread {metrics.embedding_spread:.4f}, expected {VANISHING_SPREAD} or more)"
        )
    if not signs:
        return None
    return (
        f"COLLAPSE: {' and '.join(signs)}: the encoder no longer tells positions apart. "
        "Try a lower optimizer.learning_rate, a longer optimizer.warmup_steps or a larger "
        "batch_size, and look at the picture: blank or identical volumes do this too."
    )
