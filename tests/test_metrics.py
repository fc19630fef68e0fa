"""Metrics against google's surface-distance, brute force and closed forms."""

import itertools
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from voco_jax.evaluation.metrics import (
    bootstrap_interval,
    confusion,
    count_overlap,
    dice,
    hausdorff95,
    normalised_surface_dice,
    surface_distances,
    volume_error,
    volume_ml,
)

SPACINGS = [(1, 1, 1), (0.7, 0.7, 2.5), (2.5, 0.5, 1.3)]


def blobs(generator, shape, smooth=1.5, level=0.0):
    return ndimage.gaussian_filter(generator.standard_normal(shape), smooth) > level


def box(shape, start, size):
    mask = np.zeros(shape, bool)
    mask[tuple(slice(a, a + n) for a, n in zip(start, size, strict=True))] = True
    return mask


# ---- overlap


@given(st.integers(0, 2**32 - 1), st.integers(2, 6), st.sampled_from("CF"))
@settings(max_examples=30, deadline=None)
def test_overlap_is_counted_class_by_class(seed, classes, order):
    generator = np.random.default_rng(seed)
    shape = tuple(generator.integers(1, 9, 3))
    reference, prediction = (
        np.asarray(generator.integers(0, classes, shape).astype(np.uint8), order=order)
        for _ in range(2)
    )
    found = count_overlap(reference, prediction, classes)
    for label in range(classes):
        a, b = reference == label, prediction == label
        counts = found.both[label], found.reference[label], found.prediction[label]
        assert counts == ((a & b).sum(), a.sum(), b.sum())
        total = a.sum() + b.sum()
        expected = 2 * (a & b).sum() / total if total else np.nan
        np.testing.assert_equal(dice(found)[label], expected)
    swapped = count_overlap(prediction, reference, classes)
    np.testing.assert_array_equal(dice(swapped), dice(found))
    assert found.both.dtype == found.reference.dtype == found.prediction.dtype == np.int64


def test_confusion_has_the_reference_in_rows_and_spans_blocks():
    reference = np.zeros((3, 700, 700), np.uint16)  # more than a block
    prediction = reference.copy()
    reference[:2], prediction[1:] = 1, 2
    assert confusion(reference, prediction, 3).tolist() == [
        [0, 0, 490_000],
        [490_000, 0, 490_000],
        [0, 0, 0],
    ]


def test_dice_of_what_is_missing():
    reference, prediction = np.array([0, 1, 2, 2]), np.array([0, 1, 1, 3])
    np.testing.assert_array_equal(
        dice(count_overlap(reference, prediction, 5)), [1, 2 / 3, 0, 0, np.nan]
    )


@pytest.mark.parametrize(
    ("reference", "prediction", "words"),
    [
        (np.zeros(3, int), np.zeros(4, int), "shapes"),
        (np.zeros(3), np.zeros(3, int), "reference: found float64, expected integers"),
        (np.zeros(3, int), np.array([0, 5, 1]), "prediction: found values 0 to 5, expected 0 to 2"),
        (np.array([-1, 0, 0]), np.zeros(3, int), "reference: found values -1 to 0"),
    ],
)
def test_label_maps_that_cannot_be_counted(reference, prediction, words):
    with pytest.raises(ValueError, match=words):
        count_overlap(reference, prediction, 3)


# ---- surfaces


@pytest.mark.parametrize("spacing", SPACINGS)
def test_surfaces_are_those_of_surface_distance(generator, spacing):
    google = pytest.importorskip("surface_distance", reason="need surface-distance")
    for smooth, level in itertools.product((0, 1, 2), (0.0, 0.15)):
        # No smoothing has all 256 neighbourhoods in it.
        reference = blobs(generator, (17, 12, 9), smooth, level)
        prediction = blobs(generator, (17, 12, 9), 1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # it uses old names of SciPy
            theirs = google.compute_surface_distances(reference, prediction, spacing)
        ours = surface_distances(reference, prediction, spacing)
        np.testing.assert_allclose(ours.reference, theirs["distances_gt_to_pred"], atol=1e-9)
        np.testing.assert_allclose(ours.prediction, theirs["distances_pred_to_gt"], atol=1e-9)
        for mine, name in (
            (ours.reference_areas, "surfel_areas_gt"),
            (ours.prediction_areas, "surfel_areas_pred"),
        ):  # sorted: of equal distances the last bit differs, and so the order
            np.testing.assert_allclose(np.sort(mine), np.sort(theirs[name]), atol=1e-9)
        for tolerance in (0, 0.5, 0.7, 1, 1.3, 2.5):
            np.testing.assert_allclose(
                normalised_surface_dice(ours, tolerance),
                google.compute_surface_dice_at_tolerance(theirs, tolerance),
                atol=1e-5,
            )
        expected = google.compute_robust_hausdorff(theirs, 95)
        np.testing.assert_allclose(hausdorff95(ours), expected, atol=1e-5)


def test_shifted_plates_in_closed_form():
    """Two parallel faces, shifted by two voxels: all is 2 x 1.5 mm away."""
    shape, spacing = (40, 60, 60), (1.5, 1, 2)
    one, other = box(shape, (5, 0, 0), (20, 60, 60)), box(shape, (7, 0, 0), (20, 60, 60))
    found = surface_distances(one, other, spacing)
    assert hausdorff95(found) == 3.0
    assert normalised_surface_dice(found, 3.0) == 1.0
    inside = box(shape, (10, 20, 20), (10, 10, 10))
    apart = surface_distances(one, inside, spacing)
    assert normalised_surface_dice(apart, 1.0) == 0.0


def test_areas_add_up_to_a_box_s_without_its_edges():
    """Marching cubes cuts edges and corners; the faces, far from them, are exact."""
    spacing = (0.5, 1.0, 2.0)
    n = np.array((30, 24, 18))
    mask = box(n + 2, (1, 1, 1), n)
    found = surface_distances(mask, mask, spacing).reference_areas.sum()
    a, b, c = (n - 1) * spacing  # of the flat parts
    x, y, z = spacing
    edges = 4 * (a * np.hypot(y, z) + b * np.hypot(x, z) + c * np.hypot(x, y)) / 2
    corners = 8 * np.sqrt((y * z) ** 2 + (x * z) ** 2 + (x * y) ** 2) / 8
    assert found == pytest.approx(2 * (a * b + b * c + a * c) + edges + corners)


@given(st.integers(0, 2**32 - 1), st.permutations(range(3)), st.tuples(*[st.booleans()] * 3))
@settings(max_examples=25, deadline=None)
def test_turned_and_mirrored_masks_have_the_same_metrics(seed, axes, flips):
    generator = np.random.default_rng(seed)
    masks = [blobs(generator, (9, 7, 6), 1) for _ in range(2)]
    spacing = (0.7, 1.1, 2.3)

    def metrics(one, other, steps):
        found = surface_distances(one, other, steps)
        return [normalised_surface_dice(found, 1.1), hausdorff95(found)]

    turned = [
        np.flip(mask, [i for i in range(3) if flips[i]]).transpose(axes) for mask in masks
    ]  # of any order in memory
    steps = [spacing[axis] for axis in axes]
    expected = metrics(masks[0], masks[1], spacing)
    np.testing.assert_allclose(metrics(turned[0], turned[1], steps), expected)
    np.testing.assert_allclose(metrics(masks[1], masks[0], spacing), expected)  # nor which is which
    swollen = [np.pad(mask, ((3, 0), (1, 4), (0, 2))) for mask in masks]  # nor where they are
    np.testing.assert_allclose(metrics(swollen[0], swollen[1], spacing), expected)
    assert metrics(masks[0], masks[0], spacing) in (
        [1, 0],
        [pytest.approx(np.nan, nan_ok=True)] * 2,
    )


def test_empty_masks():
    mask, empty = box((6, 5, 4), (1, 1, 1), (2, 2, 2)), np.zeros((6, 5, 4), bool)
    for one, other in ((mask, empty), (empty, mask)):
        found = surface_distances(one, other, (1, 1, 1))
        assert normalised_surface_dice(found, 5) == 0
        assert hausdorff95(found) == np.inf
    found = surface_distances(empty, empty, (1, 1, 1))
    assert np.isnan(normalised_surface_dice(found, 5))
    assert np.isnan(hausdorff95(found))


def test_masks_that_are_none():
    mask = np.zeros((3, 3, 3), bool)
    with pytest.raises(ValueError, match="one 3-D shape"):
        surface_distances(mask, mask[:2], (1, 1, 1))
    with pytest.raises(ValueError, match="expected bool"):
        surface_distances(mask, mask.astype(int), (1, 1, 1))


# ---- volumes and intervals


def test_volumes():
    assert volume_ml(500, (1, 2, 2)) == 2.0
    assert volume_error(2.0, 2.5) == (0.5, 25.0)
    error, percent = volume_error(0.0, 2.5)
    assert error == 2.5
    assert np.isnan(percent)


def test_intervals():
    values = np.random.default_rng(3).normal(0.8, 0.1, 200)
    low, high = bootstrap_interval(values)
    half = 1.96 * values.std() / np.sqrt(200)  # what many cases come to
    assert low == pytest.approx(values.mean() - half, abs=0.002)
    assert high == pytest.approx(values.mean() + half, abs=0.002)
    assert bootstrap_interval(values) == (low, high)
    assert bootstrap_interval(values, seed=1) != (low, high)
    assert bootstrap_interval(np.append(values, np.nan)) == (low, high)
    narrow = bootstrap_interval(values, level=0.5)
    assert low < narrow[0] < narrow[1] < high
    many = np.tile(values, 600)  # resamples in several blocks
    assert np.diff(bootstrap_interval(many, resamples=40)) < 0.002
    assert bootstrap_interval(np.array([0.5, 0.5])) == (0.5, 0.5)
    assert np.isnan(bootstrap_interval(np.array([0.5, np.nan]))).all()
