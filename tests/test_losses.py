"""The three losses against the golden values and closed forms."""

import jax
import numpy as np
import pytest
from conftest import shared_file
from stored import stored

from voco_jax.data.crops import draw_origins, overlap_labels
from voco_jax.voco import losses

EMBEDDINGS = ("x_student", "bases_student", "x_teacher", "bases_teacher")


@pytest.mark.parametrize("recipe", ["paper", "voco_10k", "voco_v2"])
def test_golden_values_and_gradients(recipe):
    golden = np.load(shared_file("golden", "losses.npz"))
    inputs = {name: golden[f"{recipe}/{name}"] for name in (*EMBEDDINGS, "labels")}
    function = getattr(losses, recipe)

    terms = function(**inputs)
    if recipe == "voco_10k":
        found = [terms.pos, terms.neg]
        expected = [golden[f"{recipe}/pos"], golden[f"{recipe}/neg"]]
    else:  # the published code reports the two together
        found = [terms.pos + terms.neg]
        expected = [golden[f"{recipe}/pos"] + golden[f"{recipe}/neg"]]
    found += [terms.reg, terms.inter, terms.total]
    expected += [golden[f"{recipe}/{name}"] for name in ("reg", "inter", "total")]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)

    gradients = jax.grad(lambda e: function(**{**inputs, **e}).total)(
        {name: inputs[name] for name in EMBEDDINGS}
    )
    for name in ("x_student", "bases_student"):
        reference = golden[f"{recipe}/grad_{name}"]
        error = np.linalg.norm(gradients[name] - reference) / np.linalg.norm(reference)
        assert error < 1e-5, name
    for name in ("x_teacher", "bases_teacher"):
        assert not np.any(gradients[name]), name


@pytest.mark.parametrize("recipe", ["paper", "voco_10k", "voco_v2"])
def test_stored_values_and_gradients(recipe):
    """As the oracle in PyTorch has them, also where there is no PyTorch."""
    generator = np.random.default_rng(7)
    counts = {"x": 3, "bases": 8}
    sizes = {name: (2, counts[name.split("_")[0]], 6) for name in EMBEDDINGS}
    e = {name: generator.normal(size=size).astype(np.float32) for name, size in sizes.items()}
    origins = [draw_origins(generator, 3, (2, 2, 2), (6, 4, 5)) for _ in range(2)]
    y = np.stack([overlap_labels(o, (2, 2, 2), (6, 4, 5)) for o in origins]).astype(np.float32)

    def oracles():
        import torch
        import voco_reference

        leaves = {n: torch.tensor(v, dtype=torch.float64, requires_grad=True) for n, v in e.items()}
        terms = voco_reference.terms(recipe, leaves, torch.from_numpy(y).double())
        sum(terms.values()).backward()
        found = {name: term.item() for name, term in terms.items()}
        gradients = {
            name: np.zeros(rows.shape) if rows.grad is None else rows.grad
            for name, rows in leaves.items()
        }
        return found | {name: np.asarray(rows).tolist() for name, rows in gradients.items()}

    expected = stored(f"losses_{recipe}", oracles)

    def total(e):
        terms = losses.RECIPES[recipe].loss(**e, labels=y)
        return terms.total, terms

    (_, terms), gradients = jax.value_and_grad(total, has_aux=True)(e)
    for name in expected.keys() - gradients.keys():
        np.testing.assert_allclose(getattr(terms, name), expected[name], rtol=1e-6, err_msg=name)
    for name, rows in gradients.items():
        difference = np.linalg.norm(rows - np.asarray(expected[name]))
        assert difference <= 1e-6 * np.linalg.norm(expected[name]), name


def _constant_cosine(batch, rows, others, value, dim=8):
    """Embeddings whose every row has cosine `value` with every other's row."""
    x = np.zeros((batch, rows, dim), np.float32)
    bases = np.zeros((batch, others, dim), np.float32)
    x[..., 0] = 1
    bases[..., 0], bases[..., 1] = value, np.sqrt(1 - value**2)
    return x, bases


@pytest.mark.parametrize(("value", "pos", "neg"), [(0.0, 0.709, 0.0), (0.2, 0.361, 0.040)])
def test_collapse_has_the_published_signature(value, pos, neg):
    """Averages over random centres, see the reference of the method."""
    grid, crop = (4, 4, 1), (96, 96, 96)
    origins = draw_origins(np.random.default_rng(0), 2 * 2000, grid, crop).reshape(2000, 2, 3)
    labels = np.stack([overlap_labels(o, grid, crop) for o in origins])
    x, bases = _constant_cosine(2000, 2, 16, value)
    terms = losses.voco_10k(
        x_student=x, bases_student=bases, x_teacher=x, bases_teacher=bases, labels=labels
    )
    assert float(terms.pos) == pytest.approx(pos, abs=0.01)
    assert float(terms.neg) == pytest.approx(neg, abs=0.001)
    assert float(terms.reg) == pytest.approx(1.0, abs=1e-5)


def test_zero_embeddings_have_finite_gradients():
    zeros = np.zeros((1, 2, 4), np.float32)
    labels = np.full((1, 2, 2), 0.5)
    for recipe in (losses.paper, losses.voco_10k, losses.voco_v2):
        gradient = jax.grad(
            lambda x, recipe=recipe: (
                recipe(
                    x_student=x, bases_student=x, x_teacher=x, bases_teacher=x, labels=labels
                ).total
            )
        )(zeros)
        assert np.isfinite(gradient).all()


def test_wrong_label_shape_is_named():
    x = np.zeros((1, 2, 4), np.float32)
    with pytest.raises(ValueError, match=r"labels: found shape .* expected \(1, 2, 2\)"):
        losses.paper(x_student=x, bases_student=x, labels=np.zeros((1, 2, 3)))
