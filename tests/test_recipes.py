"""The three recipes: losses against a PyTorch oracle, what gets no gradient, labels, dropout."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import voco_reference as oracle
from hypothesis import example, given, settings
from hypothesis import strategies as st

from voco_jax.config import load, parse
from voco_jax.data.crops import draw_origins, overlap_labels
from voco_jax.errors import InputError
from voco_jax.voco import losses
from voco_jax.voco.step import dropout

TERMS = ("pos", "neg", "reg", "inter")
EMBEDDINGS = ("x_student", "bases_student", "x_teacher", "bases_teacher")
DIM = 8
CROP = (6, 4, 5)  # few voxels: labels of exactly 0, and sub-volumes just on a base, are common


def _labels(generator, grid, batch, sub_volumes):
    return np.stack(
        [
            overlap_labels(draw_origins(generator, sub_volumes, grid, CROP), grid, CROP)
            for _ in range(batch)
        ]
    ).astype(np.float32)


def _draw(seed, grid, batch, sub_volumes):
    """Random embeddings and labels at which every loss is differentiable and well conditioned.

    A prediction has a kink where a cosine is 0 (relu), and its error where it is y (abs): float32
    and float64 may stand on two sides of it. The logarithms magnify the rounding of what is near
    0: 1 - p, or 1 - |y - p| where y is nearly 1 and p is small. So embeddings are drawn anew until
    no cosine of a prediction is within 1e-5 of 0 or more than 0.97, and every p is either exactly
    0 (a negative cosine) or more than 1e-5 and less than 0.97 away from the y it is compared with.
    The regularizer's relu is squared and needs no care.
    """
    generator = np.random.default_rng(seed)
    origins = [draw_origins(generator, sub_volumes, grid, CROP) for _ in range(batch)]
    y = np.stack([overlap_labels(o, grid, CROP) for o in origins]).astype(np.float32)
    counts = {"x": sub_volumes, "bases": int(np.prod(grid))}
    for _ in range(100):
        shapes = {name: (batch, counts[name.split("_")[0]], DIM) for name in EMBEDDINGS}
        e = {name: generator.normal(size=s).astype(np.float32) for name, s in shapes.items()}
        if _is_smooth(e, y):
            return e, y
    raise AssertionError("no smooth point in 100 draws")


def _is_smooth(e, y):
    unit = {name: rows / np.linalg.norm(rows, axis=-1, keepdims=True) for name, rows in e.items()}

    def cosines(x, bases, shift=0):
        return unit[x] @ np.roll(unit[bases], -shift, axis=0).swapaxes(1, 2)

    every = np.stack(
        [
            cosines("x_student", "bases_student"),
            cosines("x_student", "bases_teacher"),
            cosines("x_teacher", "bases_student"),
            cosines("x_student", "bases_student", 1),
            cosines("x_teacher", "bases_teacher", 1),
        ]
    )
    paper, v2, crossed, inter, inter_label = np.maximum(every, 0)
    for label, p in ((y, paper), (y, (v2 + crossed) / 2), (y, v2), (inter_label, inter)):
        error = np.abs(label - p)[(label > 0) & (p > 0)]
        if error.min(initial=0.5) < 1e-5 or error.max(initial=0.5) > 0.97:
            return False
    return np.abs(every).min() > 1e-5 and every.max() < 0.97


def _weighed(e, y, weights, recipe):
    found = losses.RECIPES[recipe].loss(**e, labels=y)
    stacked = jnp.stack([getattr(found, name) for name in TERMS])
    return stacked @ weights, (stacked, found.total)


# A compilation for every shape: the least optimisation there is takes a third of the time.
@functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
def _ours(e, y, weights):
    """Of each recipe: ((weighted sum, (terms, total)), gradients of the weighted sum)."""
    return {
        recipe: jax.value_and_grad(functools.partial(_weighed, recipe=recipe), has_aux=True)(
            e, y, weights
        )
        for recipe in losses.RECIPES
    }


AXIS = st.integers(1, 4)


@settings(max_examples=10, deadline=None, derandomize=True, database=None)
@example(grid=(4, 4, 1), batch=2, sub_volumes=2, seed=0)
@example(grid=(2, 2, 3), batch=3, sub_volumes=2, seed=0)
@example(grid=(1, 1, 2), batch=1, sub_volumes=1, seed=0)
@given(
    grid=st.tuples(AXIS, AXIS, AXIS).filter(lambda grid: np.prod(grid) > 1),
    batch=st.integers(1, 3),
    sub_volumes=st.integers(1, 3),
    seed=st.integers(0, 2**32 - 1),
)
def test_losses_and_gradients_are_the_oracles(grid, batch, sub_volumes, seed):
    """Every term, and the gradients of a random weighting of them, which no error cancels in."""
    e, y = _draw(seed, grid, batch, sub_volumes)
    weights = np.random.default_rng(seed).uniform(0.5, 2, 4).astype(np.float32)
    for recipe, ((_, (terms, total)), gradients) in _ours(e, y, weights).items():
        leaves = {k: torch.tensor(v, dtype=torch.float64, requires_grad=True) for k, v in e.items()}
        expected = oracle.terms(recipe, leaves, torch.from_numpy(y).double())
        values = np.array([expected[name].item() for name in TERMS])
        np.testing.assert_allclose(terms, values, rtol=1e-5, atol=1e-7, err_msg=recipe)
        np.testing.assert_allclose(total, values.sum(), rtol=1e-5, err_msg=recipe)
        sum(w * expected[n] for w, n in zip(weights.tolist(), TERMS, strict=True)).backward()
        for name, leaf in leaves.items():
            exact = np.zeros(leaf.shape) if leaf.grad is None else leaf.grad.numpy()
            difference = np.linalg.norm(gradients[name] - exact)  # 0 where nothing comes through
            assert difference <= 1e-5 * np.linalg.norm(exact), (recipe, name)
