"""The three published recipes: their losses and predictions, as pure functions of embeddings.

Symbols: `y` overlap label, `p` similarity relu(cos), n bases, s sub-volumes, d embedding size.
Every term is normalised per volume, then averaged over the batch. All arithmetic is float32.
"""

import dataclasses
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp

from voco_jax.models.projector import similarity

_LOG_EPS = 1e-6  # inside the logarithms and in the denominators, as published


@flax.struct.dataclass
class Losses:
    """Scalar terms, means over the batch. `total` is their sum, as published; `inter` is 0 where
    the recipe has none.
    """

    pos: jax.Array
    neg: jax.Array
    reg: jax.Array
    inter: jax.Array
    total: jax.Array


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What makes one published loss another.

    Attributes:
        loss: as `voco_10k` below, keyword arguments only.
        predict: the p of its loss, from the same embeddings; (batch, s, n) in [0, 1].
        inter: whether it compares volumes with each other.
    """

    loss: Callable[..., Losses]
    predict: Callable[..., jax.Array]
    inter: bool


def weighted_total(terms: Losses, *, pos: float, neg: float, reg: float, inter: float) -> jax.Array:
    """The weighted sum of the terms, to be minimised; with 1.0 each it is `terms.total`."""
    return pos * terms.pos + neg * terms.neg + inter * terms.inter + reg * terms.reg


def paper_prediction(
    *,
    x_student: jax.Array,
    bases_student: jax.Array,
    x_teacher: jax.Array | None = None,
    bases_teacher: jax.Array | None = None,
) -> jax.Array:
    """The paper's prediction p: sub-volumes against stop-gradient bases of the one network.

    Args: as `paper`. Returns: (batch, s, n) in [0, 1].
    """
    del x_teacher, bases_teacher
    return similarity(x_student, jax.lax.stop_gradient(bases_student))


def paper(
    *,
    x_student: jax.Array,
    bases_student: jax.Array,
    labels: jax.Array,
    x_teacher: jax.Array | None = None,
    bases_teacher: jax.Array | None = None,
) -> Losses:
    """The first public code: one network, p = relu cos(x, sg(b)).

    Args:
        x_student: (batch, s, d) embeddings of the sub-volumes.
        bases_student: (batch, n, d) embeddings of the base crops.
        labels: (batch, s, n) overlap ratios.
        x_teacher, bases_teacher: not used; accepted so that all recipes are called alike.

    Returns:
        pos: mean over y > 0 of -log(1 - |y - p|); neg: mean over y = 0 of p^2;
        reg: mean over pairs of bases of relu(cos)^2; inter: 0.
    """
    del x_teacher, bases_teacher
    _check(x_student, bases_student, labels)
    p = paper_prediction(x_student=x_student, bases_student=bases_student)
    y = labels.astype(jnp.float32)
    pos = _masked_mean(_mismatch(y, p), y > 0)
    neg = _masked_mean(p**2, y == 0)
    return _combine(pos, neg, _regularizer(bases_student, one_sided=False))


def voco_10k_prediction(
    *,
    x_student: jax.Array,
    bases_student: jax.Array,
    x_teacher: jax.Array,
    bases_teacher: jax.Array,
) -> jax.Array:
    """The voco_10k prediction p: mean of student-against-teacher and teacher-against-student.

    Args: as `voco_10k`. Returns: (batch, s, n) in [0, 1].
    """
    sg = jax.lax.stop_gradient
    return (similarity(x_student, sg(bases_teacher)) + similarity(sg(x_teacher), bases_student)) / 2


def voco_10k(
    *,
    x_student: jax.Array,
    bases_student: jax.Array,
    x_teacher: jax.Array,
    bases_teacher: jax.Array,
    labels: jax.Array,
) -> Losses:
    """The 10k release.

    Args:
        x_student, x_teacher: (batch, s, d) embeddings of the sub-volumes.
        bases_student, bases_teacher: (batch, n, d) embeddings of the base crops.
        labels: (batch, s, n) overlap ratios.

    Returns:
        pos: mean of -log(1 - |y - p|) weighted by y; neg: mean over y = 0 of p^2;
        reg: mean over pairs i < j of relu(cos(b_i, sg(b_j)))^2; inter: 0.
        No gradient reaches the teacher's embeddings.
    """
    _check(x_student, bases_student, labels)
    p = voco_10k_prediction(
        x_student=x_student,
        bases_student=bases_student,
        x_teacher=x_teacher,
        bases_teacher=bases_teacher,
    )
    y = labels.astype(jnp.float32)
    pos = _weighted_mismatch(y, p)
    neg = _masked_mean(p**2, y == 0)
    return _combine(pos, neg, _regularizer(bases_student, one_sided=True))


def voco_v2_prediction(
    *,
    x_student: jax.Array,
    bases_student: jax.Array,
    x_teacher: jax.Array,
    bases_teacher: jax.Array,
) -> jax.Array:
    """The voco_v2 prediction p: the student's sub-volumes against the teacher's bases.

    Args: as `voco_10k`. Returns: (batch, s, n) in [0, 1].
    """
    del bases_student, x_teacher
    return similarity(x_student, jax.lax.stop_gradient(bases_teacher))


def voco_v2(
    *,
    x_student: jax.Array,
    bases_student: jax.Array,
    x_teacher: jax.Array,
    bases_teacher: jax.Array,
    labels: jax.Array,
) -> Losses:
    """The 160k release, without its feature dropout (which belongs to the embeddings).

    Args: as `voco_10k`.

    Returns:
        pos, neg: intra-volume terms of p = relu cos(x_student, b_teacher);
        inter: the same two terms, added, of the student's similarities to the next volume's
        student bases, with the teacher's similarities there as labels; reg as voco_10k.
    """
    _check(x_student, bases_student, labels)
    sg = jax.lax.stop_gradient
    y = labels.astype(jnp.float32)
    p = voco_v2_prediction(
        x_student=x_student,
        bases_student=bases_student,
        x_teacher=x_teacher,
        bases_teacher=bases_teacher,
    )
    pos, neg = _weighted_mismatch(y, p), _log_negative(y, p)
    p_next = similarity(x_student, jnp.roll(bases_student, -1, axis=0))
    y_next = sg(similarity(x_teacher, jnp.roll(bases_teacher, -1, axis=0)))
    inter = _weighted_mismatch(y_next, p_next) + _log_negative(y_next, p_next)
    return _combine(pos, neg, _regularizer(bases_student, one_sided=True), inter)


RECIPES = {
    "paper": Recipe(paper, paper_prediction, inter=False),
    "voco_10k": Recipe(voco_10k, voco_10k_prediction, inter=False),
    "voco_v2": Recipe(voco_v2, voco_v2_prediction, inter=True),
}
"""By their names in the config."""


def _check(x: jax.Array, bases: jax.Array, labels: jax.Array) -> None:
    expected = (x.shape[0], x.shape[1], bases.shape[1])
    if labels.shape != expected:
        raise ValueError(f"labels: found shape {labels.shape}, expected {expected} (batch, s, n)")


def _mismatch(y: jax.Array, p: jax.Array) -> jax.Array:
    return -_log(1 - jnp.abs(y - p))


def _weighted_mismatch(y: jax.Array, p: jax.Array) -> jax.Array:
    """(batch,) sum(-y log(1 - |y - p|)) / sum(y)."""
    axes = (-2, -1)
    return jnp.sum(y * _mismatch(y, p), axis=axes) / (jnp.sum(y, axis=axes) + _LOG_EPS)


def _log_negative(y: jax.Array, p: jax.Array) -> jax.Array:
    return _masked_mean(-_log(1 - p), y == 0)


def _log(rest: jax.Array) -> jax.Array:
    # Without the maximum XLA makes (1 + eps) - ... of it, whose eps float32 rounds by 5%; and a
    # cosine may be rounded to more than 1.
    return jnp.log(jnp.maximum(rest, 0) + _LOG_EPS)


def _masked_mean(values: jax.Array, mask: jax.Array) -> jax.Array:
    """(batch,) mean of the masked values of each volume; 0 where there are none."""
    kept = jnp.sum(jnp.where(mask, values, 0), axis=(-2, -1))
    return kept / jnp.maximum(jnp.sum(mask, axis=(-2, -1)), 1)


def _regularizer(bases: jax.Array, *, one_sided: bool) -> jax.Array:
    """(batch,) mean over pairs i < j of relu(cos(b_i, b_j))^2; one_sided: b_j has no gradient."""
    n = bases.shape[-2]
    others = jax.lax.stop_gradient(bases) if one_sided else bases
    pairs = jnp.triu(similarity(bases, others) ** 2, k=1)
    return jnp.sum(pairs, axis=(-2, -1)) / (n * (n - 1) / 2)


def _combine(
    pos: jax.Array, neg: jax.Array, reg: jax.Array, inter: jax.Array | None = None
) -> Losses:
    pos, neg, reg = jnp.mean(pos), jnp.mean(neg), jnp.mean(reg)
    inter = jnp.zeros(()) if inter is None else jnp.mean(inter)
    return Losses(pos=pos, neg=neg, reg=reg, inter=inter, total=pos + neg + inter + reg)
