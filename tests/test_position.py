"""Position metrics in closed form, what they mean, and the picture."""

import numpy as np
import pytest

from voco_jax.data.crops import draw_origins, overlap_labels
from voco_jax.report.positions import draw_positions
from voco_jax.voco.position import (
    accuracy_at,
    blind_accuracy,
    describe_accuracy,
    measure,
    told_from_blind,
)


def test_perfect_predictions():
    labels = np.array([[0.7, 0.3, 0, 0], [0, 0.4, 0.6, 0]])
    found = measure(labels, labels, 0.5)
    assert (found.accuracy, found.chance, found.overlap_error) == (1.0, 0.25, 0.0)


def test_ties():
    labels = np.array([[0.5, 0.5, 0, 0]])
    found = measure(np.array([[0.1, 0.9, 0, 0]]), labels, 0.5)
    assert (found.accuracy, found.chance) == (1.0, 0.5)
    assert found.overlap_error == pytest.approx(0.2)
    # A constant prediction names everything: it is right as often as guessing.
    constant = measure(np.full((1, 4), 0.2), labels, 0.5)
    assert constant.accuracy == constant.chance


def test_guessing_reaches_chance(generator):
    labels = generator.dirichlet(np.ones(9), size=20000)
    found = measure(generator.random((20000, 9)), labels, 0.5)
    assert found.chance == pytest.approx(1 / 9)
    assert found.accuracy == pytest.approx(1 / 9, abs=0.01)


GRIDS = [(3, 3, 1), (4, 4, 1), (2, 2, 1), (2, 1, 1), (1, 5, 3)]
CROP = (200, 200, 200)  # so many that ties hardly count


@pytest.mark.parametrize("grid", GRIDS)
def test_what_one_answer_for_all_reaches(generator, grid):
    labels = overlap_labels(draw_origins(generator, 20000, grid, CROP), grid, CROP)
    each = [
        measure(np.tile(row, (20000, 1)), labels, 0.5).accuracy for row in np.eye(len(labels.T))
    ]
    assert blind_accuracy(grid) == pytest.approx(max(each), abs=0.02)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("error", [0.0, 0.1, 0.25])
def test_accuracy_of_one_who_errs(generator, grid, error):
    """Who sees each corner with an error of so many crops, to either side."""
    corners = draw_origins(generator, 20000, grid, CROP)
    seen = corners + generator.choice([-1, 1], corners.shape) * round(error * CROP[0])
    free = (np.array(grid) - 1) * CROP
    found = measure(
        overlap_labels(np.clip(seen, 0, free), grid, CROP),
        overlap_labels(corners, grid, CROP),
        0.5,
    )
    assert accuracy_at(error, grid) == pytest.approx(found.accuracy, abs=0.03)


def test_luck_is_no_learning(generator):
    """Of sets of 64 blind answers one in 40 or so is at the limit."""
    hits = generator.binomial(64, 0.25, 20000) / 64
    assert np.mean(hits >= told_from_blind(64, (3, 3, 1))) == pytest.approx(1 / 40, abs=0.015)


@pytest.mark.parametrize(
    ("accuracy", "count", "grid", "words"),
    [
        (0.25, 64, (3, 3, 1), "not above blind; 25% is blind, 56% good, 81% very good"),
        (0.37, 64, (3, 3, 1), "learning; 25% is blind, 56% good, 81% very good"),
        (0.57, 64, (3, 3, 1), "good; 25% is blind, 56% good, 81% very good"),
        (0.9, 64, (4, 4, 1), "very good; 11% is blind, 56% good, 81% very good"),
        (0.5, 64, (2, 1, 1), "not above blind; 50% is blind, 75% good, 90% very good"),
        (1.0, 1, (2, 1, 1), "1 sub-volumes are too few to judge it"),
    ],
)
def test_an_accuracy_in_words(accuracy, count, grid, words):
    assert describe_accuracy(accuracy, count, grid) == words


@pytest.mark.parametrize("grid", [(3, 2, 1), (1, 2, 2)])
def test_picture_shows_box_and_maps(generator, grid):
    crop = (16, 16, 8)
    size = np.multiply(grid, crop)
    n = int(np.prod(grid))
    origins = np.zeros((5, 3), int)
    maps = generator.random((5, n))
    image = draw_positions(
        np.zeros(size), origins, maps, maps, grid=grid, crop_size=crop, title="t"
    )
    assert image.dtype == np.uint8
    assert image.ndim == 3
    left = image[:, : image.shape[1] // 3].reshape(-1, 3)
    red = np.abs(left.astype(int) - [0xFF, 0x5A, 0x5F]).max(axis=1) < 24
    assert red.any()  # the first sub-volume's box
    assert len(np.unique(image.reshape(-1, 3), axis=0)) > 20  # the maps' colours


def test_picture_of_layers_and_oblong_crops(generator):
    """A row for each sub-volume wherever it is, with the maps of the layer that it is in."""
    grid, crop = (2, 3, 2), (16, 10, 12)
    volume = generator.random(np.multiply(grid, crop))

    def draw(origins, similarities):
        labels = overlap_labels(origins, grid, crop)
        return draw_positions(
            volume, origins, labels, similarities, grid=grid, crop_size=crop, title="t"
        )

    origins = np.array([[0, 0, 0], [15, 19, 11], [3, 7, 6]])
    assert draw(origins, generator.random((3, 12))).shape == (round(100 * (0.6 + 3.3 * 3)), 1100, 3)

    upper = origins[1:2]  # of 12 slices all but one are in the second layer
    plain = draw(upper, np.full((1, 12), 0.2))
    for layer, shown in ((0, False), (1, True)):
        similarities = np.full((1, 2, 3, 2), 0.2)
        similarities[..., layer] = 0.1
        changed = draw(upper, similarities.reshape(1, 12))
        assert (changed != plain).any() == shown
