"""Signs that pre-training goes wrong: in words, each with what to do. docs/health.md explains them.

Pure functions; the thresholds stand above, with the reason for each.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from voco_jax.config.pretraining import Crops, Pretraining
from voco_jax.data.crops import draw_origins, overlap_labels
from voco_jax.data.pipeline import Part
from voco_jax.data.volumes import dequantise
from voco_jax.training.health import Finding
from voco_jax.types import Size
from voco_jax.voco import losses
from voco_jax.voco.position import (
    GOOD_ERROR,
    PositionMetrics,
    accuracy_at,
    blind_accuracy,
    told_from_blind,
)

CONSTANT_SIMILARITY = 0.01  # spread over the bases under which a sub-volume's position is not told
VANISHING_SPREAD = 0.01  # of the unit embeddings; 1 - cos of about 8 degrees
# Until then, and during twice the warm-up, accuracy at chance is no bad sign: configs/demo.py
# leaves it within 40 updates.
CHANCE_STEPS = 500
# Standard deviation of a crop's voxels under which nothing is to be seen in it, in parts of the
# window: 8 HU of (-175, 250). The noise of a CT alone is more.
EMPTY_DEVIATION = 0.02
# Of the base crops. An empty one looks like every other empty one, so that as many sub-volumes
# have no place that could be told.
EMPTY_SHARE = 0.25
_DRAWN = 512  # volumes of sub-volumes, for `blind_loss`: known to about 2%
_UPDATES = 300  # it has converged by then


def collapsed(metrics: PositionMetrics) -> list[Finding]:
    """Whether the encoder has stopped to tell positions apart."""
    signs = []
    if metrics.similarity_spread < CONSTANT_SIMILARITY:
        signs.append(
            "similarities are constant over the base crops "
            f"(spread {metrics.similarity_spread:.4f}, expected {CONSTANT_SIMILARITY} or more)"
        )
    if metrics.embedding_spread < VANISHING_SPREAD:
        signs.append(
            "all crops have nearly one embedding "
            f"(spread {abs(metrics.embedding_spread):.4f}, expected {VANISHING_SPREAD} or more)"
        )
    if not signs:
        return []
    return [
        Finding(
            "collapsed",
            f"{' and '.join(signs)}: the encoder no longer tells positions apart",
            "a lower optimizer.learning_rate, a longer optimizer.warmup_steps or a larger "
            "batch_size, in a new workdir; and look at the picture: blank or identical volumes do "
            "this too",
        )
    ]


def at_chance(
    metrics: PositionMetrics, count: int, step: int, experiment: Pretraining
) -> list[Finding]:
    """Whether the accuracy is no better than a constant answer's, when it should be.

    Args:
        metrics: of a validation.
        count: sub-volumes that they are of.
        step: completed updates.
        experiment: the settings.
    """
    grid, optimizer, augment = experiment.crops.grid, experiment.optimizer, experiment.augment
    least = told_from_blind(count, grid)
    late = step >= max(CHANCE_STEPS, 2 * optimizer.warmup_steps)
    if not late or metrics.accuracy >= least or least > accuracy_at(GOOD_ERROR, grid):
        return []
    advice = [
        f"a tenth of optimizer.learning_rate ({optimizer.learning_rate:g}), or ten times as much "
        "if the loss does not move at all"
    ]
    if augment.flip_probability or augment.rotate_probability:
        advice.append(
            "augment.flip_probability=0 and augment.rotate_probability=0: left and right tell "
            "positions apart"
        )
    advice.append(
        "fewer base crops (crops.grid); and look at the picture: does the window show any anatomy?"
    )
    return [
        Finding(
            "chance",
            f"after {step} steps the position accuracy is {metrics.accuracy:.1%}; always naming "
            f"the middle of the grid reaches {blind_accuracy(grid):.1%}, and of {count} "
            f"sub-volumes {least:.1%} would be more than luck",
            "; ".join(advice),
        )
    ]


def is_empty(crop: np.ndarray) -> bool:
    """Whether a crop holds nearly nothing: air, padding, one grey.

    Args:
        crop: (x, y, z) as in the cache.
    """
    return float(dequantise(crop[::2, ::2, ::2]).std()) < EMPTY_DEVIATION  # an eighth will do


def empty_crops(empty: Sequence[bool]) -> list[Finding]:
    """Whether too many base crops hold nearly nothing.

    Args:
        empty: see `is_empty`, of each.
    """
    if sum(empty) < EMPTY_SHARE * len(empty):
        return []
    return [
        Finding(
            "empty_crops",
            f"{sum(empty)} of {len(empty)} base crops of held-out volumes hold nearly nothing "
            f"(their voxels deviate by less than {EMPTY_DEVIATION:.0%} of the window): nobody can "
            "tell where they are",
            "data.sources.*.chain.crop_foreground=True, a data.sources.*.chain.window that shows "
            "what is there, or fewer base crops (crops.grid); `python -m "
            "voco_jax.report.contact_sheet` shows the volumes",
        )
    ]


def few_volumes(training: Sequence[Part], grid: Size, batch_size: int) -> list[Finding]:
    """Whether there are too few different volumes to learn what is common to a place.

    With fewer volumes than base crops, a cell is seen in fewer bodies than a body has cells: to
    know bodies by heart is easier. And with fewer than twice the batch, a batch often has a volume
    twice, or, of voco_v2's comparison of different volumes, nothing else.
    """
    found, cells = count_volumes(training), int(np.prod(grid))
    needed = max(cells, 2 * batch_size)
    if found >= needed:
        return []
    return [
        Finding(
            "few_volumes",
            f"{found} different volumes to train on, for {cells} base crops and batches of "
            f"{batch_size}: expected {needed} or more; fewer are learned by heart, so that a "
            "falling loss says little",
            "more volumes, fewer base crops (crops.grid) or a smaller batch_size; data.held_out "
            "above 0 shows what is learned",
        )
    ]


def count_volumes(parts: Sequence[Part]) -> int:
    """Volumes that differ in their voxels."""
    return len({entry.digest for part in parts for entry in part.entries})


def blind_loss(
    recipe: losses.Recipe, crops: Crops, weigh: Callable[[losses.Losses], jax.Array]
) -> float:
    """The lowest loss of a network that gives all sub-volumes one embedding, whatever they show.

    Base crops are orthogonal, which costs nothing; their similarities with the one embedding are
    what is left to choose.

    Args:
        recipe: of the experiment.
        crops: of the experiment.
        weigh: terms -> what is minimised.
    """
    count, bases = crops.sub_volumes, int(np.prod(crops.grid))
    origins = draw_origins(np.random.default_rng(0), _DRAWN * count, crops.grid, crops.crop_size)
    labels = overlap_labels(origins, crops.grid, crops.crop_size).reshape(_DRAWN, count, bases)

    def loss(embedding: jax.Array) -> jax.Array:
        x = jnp.broadcast_to(embedding, (_DRAWN, count, bases + 1))
        b = jnp.broadcast_to(jnp.eye(bases, bases + 1), (_DRAWN, bases, bases + 1))
        names = {"x_student": x, "x_teacher": x, "bases_student": b, "bases_teacher": b}
        return weigh(recipe.loss(**names, labels=jnp.asarray(labels, jnp.float32)))

    optimizer = optax.adam(0.03)

    @jax.jit
    def minimise(embedding: jax.Array) -> jax.Array:
        def update(
            _: int, carried: tuple[jax.Array, optax.OptState]
        ) -> tuple[jax.Array, optax.OptState]:
            embedding, state = carried
            updates, state = optimizer.update(jax.grad(loss)(embedding), state)
            return optax.apply_updates(embedding, updates), state

        start = (embedding, optimizer.init(embedding))
        return loss(jax.lax.fori_loop(0, _UPDATES, update, start)[0])

    return float(minimise(jnp.full(bases + 1, 0.3)))
