"""The three recipes: losses against a PyTorch oracle, what gets no gradient, labels, dropout."""

import functools

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
import torch
import voco_reference as oracle
from hypothesis import example, given, settings
from hypothesis import strategies as st

from voco_jax.config.config_files import read
from voco_jax.config.load import parse
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


@jax.jit
def _ours(e, y, weights):
    """Of each recipe: ((weighted sum, (terms, total)), gradients of the weighted sum)."""
    return {
        recipe: jax.value_and_grad(functools.partial(_weighed, recipe=recipe), has_aux=True)(
            e, y, weights
        )
        for recipe in losses.RECIPES
    }


AXIS = st.integers(1, 4)


@settings(max_examples=8, deadline=None, derandomize=True, database=None)
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


def _terms(e, y, recipe):
    found = losses.RECIPES[recipe].loss(**e, labels=y)
    return {name: getattr(found, name) for name in TERMS}


@jax.jit
def _jacobians(e, y):
    """[recipe][term][embedding]: the gradient."""
    return {r: jax.jacrev(functools.partial(_terms, recipe=r))(e, y) for r in losses.RECIPES}


@pytest.fixture(scope="module")
def point():
    return _draw(7, (2, 2, 2), 3, 2)


@pytest.fixture(scope="module")
def gradients(point):
    return jax.device_get(_jacobians(*point))


REACHED = {  # embeddings that get a gradient, of each recipe and term; no other does
    "paper": {"pos": {"x_student"}, "neg": {"x_student"}, "reg": {"bases_student"}, "inter": {}},
    "voco_10k": {
        "pos": {"x_student", "bases_student"},
        "neg": {"x_student", "bases_student"},
        "reg": {"bases_student"},
        "inter": {},
    },
    "voco_v2": {
        "pos": {"x_student"},
        "neg": {"x_student"},
        "reg": {"bases_student"},
        "inter": {"x_student", "bases_student"},
    },
}


@pytest.mark.parametrize("recipe", REACHED)
def test_gradient_reaches_exactly_these(gradients, recipe):
    for term, reached in REACHED[recipe].items():
        for name in EMBEDDINGS:
            assert gradients[recipe][term][name].any() == (name in reached), (term, name)


def test_regularizer_is_one_sided_where_there_is_a_teacher(point, gradients):
    """b_j stands still in the pairs i < j: base i is pushed by those after it only.

    So the paper's gradient, which pushes both, is the sum of that in both orders of the bases.
    """
    e, y = point
    turned = {**e, "bases_student": e["bases_student"][:, ::-1]}
    backwards = _jacobians(turned, y)
    both = gradients["paper"]["reg"]["bases_student"]
    assert both[:, -1].any(axis=-1).all()
    for recipe in ("voco_10k", "voco_v2"):
        one = gradients[recipe]["reg"]["bases_student"]
        assert one[:, 0].any(axis=-1).all()
        assert not one[:, -1].any()
        other = backwards[recipe]["reg"]["bases_student"][:, ::-1]
        np.testing.assert_allclose(one + other, both, atol=1e-7)


@pytest.mark.parametrize("volume", range(3))
def test_inter_term_is_of_a_volume_and_the_next(point, volume):
    """Other volumes' x are 0: relu(cos) has no gradient there, so one volume's term is left."""
    e, y = point
    alone = np.zeros_like(e["x_student"])
    alone[volume] = e["x_student"][volume]
    found = _jacobians({**e, "x_student": alone}, y)["voco_v2"]["inter"]
    rows = found["bases_student"].any(axis=(1, 2))
    assert rows.tolist() == [other == (volume + 1) % 3 for other in range(3)]
    assert found["x_student"].any(axis=(1, 2)).tolist() == [other == volume for other in range(3)]


@pytest.mark.parametrize(
    ("grid", "crop"),
    [
        ((2, 2, 2), (4, 4, 4)),
        ((1, 1, 3), (3, 5, 4)),
        ((3, 1, 2), (2, 4, 3)),
        ((1, 4, 1), (5, 2, 6)),
        ((2, 3, 4), (3, 2, 1)),
    ],
)
def test_labels_are_shared_voxels(generator, grid, crop):
    """Counted on masks: base k = (i * grid_y + j) * grid_z + l is the cell (i, j, l)."""
    origins = draw_origins(generator, 20, grid, crop)
    labels = overlap_labels(origins, grid, crop)
    place = [
        axis // size for axis, size in zip(np.indices(np.multiply(grid, crop)), crop, strict=True)
    ]
    cell = (place[0] * grid[1] + place[1]) * grid[2] + place[2]
    for origin, row in zip(origins, labels, strict=True):
        mask = np.zeros(cell.shape, bool)
        mask[tuple(slice(o, o + size) for o, size in zip(origin, crop, strict=True))] = True
        shared = [np.sum(mask & (cell == k)) / np.prod(crop) for k in range(np.prod(grid))]
        np.testing.assert_allclose(row, shared, rtol=0, atol=1e-12)


RATE = 0.2


def _structure(found, x):
    """What was kept, after checking that the rest is 0 and the kept divided by 1 - rate."""
    kept = found != 0
    np.testing.assert_allclose(found[kept], x[kept] / (1 - RATE), rtol=1e-6)
    return kept


def test_embedding_dropout_is_torchs_dropout1d(generator):
    """Which takes two axes for (channels, length) and so drops whole rows; rates within 4 sigma."""
    x = generator.uniform(0.5, 1.5, (4000, 24)).astype(np.float32)
    torch.manual_seed(0)
    theirs = torch.nn.functional.dropout1d(torch.from_numpy(x), RATE, training=True).numpy()
    ours = np.asarray(dropout(x, jax.random.key(0), RATE, "embedding"))
    for found in (ours, theirs):
        kept = _structure(found, x)
        assert (kept.all(axis=1) | ~kept.any(axis=1)).all()
        assert abs(kept[:, 0].mean() - (1 - RATE)) < 4 * np.sqrt(RATE * (1 - RATE) / len(x))
        # Each row's error has mean 0 and a standard deviation of x * sqrt(rate / (1 - rate)).
        sigma = np.sqrt(RATE / (1 - RATE) * np.mean(x**2) / len(x))
        assert (abs((found - x).mean(axis=0)) < 4.5 * sigma).all()


def test_feature_dropout_is_elementwise(generator):
    x = generator.uniform(0.5, 1.5, (400, 240)).astype(np.float32)
    kept = _structure(np.asarray(dropout(x, jax.random.key(0), RATE, "feature")), x)
    assert abs(kept.mean() - (1 - RATE)) < 4 * np.sqrt(RATE * (1 - RATE) / x.size)
    # Independent numbers: both kinds of means scatter as those of coins do.
    for axis in (0, 1):
        expected = np.sqrt(RATE * (1 - RATE) / x.shape[axis])
        assert kept.mean(axis=axis).std() == pytest.approx(expected, rel=0.2)


CONFIGS = ("configs/voco_10k.py", "configs/voco_paper.py", "configs/voco_160k.py")


@pytest.mark.parametrize("path", CONFIGS)
def test_config_files_parse(path):
    config = parse(read(path))
    assert (config.teacher.scope == "none") == (path == CONFIGS[1])
    assert losses.RECIPES[config.recipe].inter == (path == CONFIGS[2])


def test_settings_of_the_recipes():
    """The published ones that differ from voco_10k's, which test_config.py checks."""
    paper, v2 = parse(read(CONFIGS[1])), parse(read(CONFIGS[2]))
    assert not paper.model.use_v2
    assert not paper.model.conv_encoders
    assert paper.projector_size == 2048
    assert v2.model.use_v2
    assert v2.model.conv_encoders
    assert (v2.projector_size, v2.teacher.scope, v2.teacher.momentum) == (
        1024,
        "projector",
        0.9,
    )
    assert (v2.dropout.rate, v2.dropout.kind) == (0.2, "embedding")
    assert (v2.crops.grid, v2.crops.crop_size, v2.crops.encoder_size) == (
        (3, 3, 1),
        (64, 64, 64),
        (64, 64, 64),
    )
    assert (v2.total_steps, v2.batch_size, v2.optimizer.warmup_steps) == (2_000_000, 16, 5_000)
    assert v2.augment.shift_probability == 0.5


@pytest.mark.parametrize(("size", "features"), [("b", 48), ("l", 96), ("h", 192)])
def test_sizes_of_the_160k_release(size, features):
    assert parse(read(f"{CONFIGS[2]}:{size}")).model.feature_size == features


def test_unknown_size_is_one_line():
    with pytest.raises(InputError, match=r"found size 'x', expected one of b, l, h") as caught:
        read(f"{CONFIGS[2]}:x")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("path", "changes", "message"),
    [
        (0, {"teacher": {"scope": "none"}}, r"teacher.scope: found 'none' with recipe 'voco_10k'"),
        (1, {"teacher": {"scope": "network"}}, r"teacher.scope: .*'paper', expected 'none'"),
        (1, {"teacher": {"scope": "all"}}, r"teacher.scope: found 'all', expected: .*'projector'"),
        (2, {"teacher": {"scope": "none"}}, r"teacher.scope: .*expected 'network' or 'projector'"),
        (2, {"batch_size": 1}, r"batch_size: found 1 with recipe 'voco_v2'.*loss.inter to 0"),
        (2, {"dropout": {"rate": 1.0}}, r"dropout.rate: found 1.0, expected: .* less than 1"),
        (2, {"dropout": {"kind": "row"}}, r"dropout.kind: found 'row', expected: .*'embedding'"),
        (0, {"loss": {"pos": -1.0}}, r"loss.pos: found -1.0, expected: .* greater than or equal"),
    ],
)
def test_contradictions_name_the_field(path, changes, message):
    config = ml_collections.ConfigDict(read(CONFIGS[path]))
    config.update(changes)
    with pytest.raises(InputError, match=message) as caught:
        parse(config)
    assert "\n" not in str(caught.value)


def test_a_single_volume_without_the_inter_term():
    config = ml_collections.ConfigDict(read(CONFIGS[2]))
    config.update({"batch_size": 1, "loss": {"inter": 0.0}})
    assert parse(config).batch_size == 1
