"""Geometry of base crops, sub-volumes and labels."""

import numpy as np
import pytest
from conftest import shared_file
from hypothesis import given, settings
from hypothesis import strategies as st

from voco_jax.data.crops import base_origins, cut, draw_origins, overlap_labels

GRIDS = st.tuples(*[st.integers(1, 4)] * 3)
SIZES = st.tuples(*[st.integers(1, 9)] * 3)


@pytest.mark.parametrize(
    ("file", "prefix", "grid", "crop"),
    [
        ("losses", "paper/", (4, 4, 1), (96, 96, 96)),
        ("losses", "voco_10k/", (4, 4, 1), (96, 96, 96)),
        ("losses", "voco_v2/", (3, 3, 1), (64, 64, 64)),
        ("voco_10k_step", "", (4, 4, 1), (96, 96, 96)),
    ],
)
def test_labels_equal_the_golden_ones_exactly(file, prefix, grid, crop):
    golden = np.load(shared_file("golden", f"{file}.npz"))
    centres = golden[f"{prefix}centers"]
    for rows, expected in zip(centres, golden[f"{prefix}labels"], strict=True):
        origins = np.concatenate([rows - crop[0] // 2, np.zeros((len(rows), 1), int)], axis=1)
        np.testing.assert_array_equal(overlap_labels(origins, grid, crop), expected)


@settings(max_examples=50, deadline=None)
@given(grid=GRIDS, crop=SIZES, seed=st.integers(0, 2**32 - 1))
def test_labels_count_shared_voxels(grid, crop, seed):
    origins = draw_origins(np.random.default_rng(seed), 3, grid, crop)
    labels = overlap_labels(origins, grid, crop)
    np.testing.assert_allclose(labels.sum(axis=1), 1)
    volume = np.zeros(np.multiply(grid, crop), int)
    for k, (x, y, z) in enumerate(base_origins(grid, crop)):
        volume[x : x + crop[0], y : y + crop[1], z : z + crop[2]] = k
    for crop_voxels, row in zip(cut(volume, origins, crop), labels, strict=True):
        counts = np.bincount(crop_voxels.ravel(), minlength=len(row))
        np.testing.assert_allclose(row, counts / np.prod(crop))


def test_base_order_is_the_published_one():
    origins = base_origins((4, 4, 1), (96, 96, 96))
    for i in range(4):
        for j in range(4):
            np.testing.assert_array_equal(origins[i * 4 + j], [96 * i, 96 * j, 0])


def test_centres_are_uniform_over_the_published_range(generator):
    origins = draw_origins(generator, 100_000, (4, 4, 1), (96, 96, 96))
    centres = origins + 48
    assert (centres[:, :2].min(), centres[:, :2].max()) == (48, 335)
    assert (centres[:, 2] == 48).all()
    counts = np.bincount(centres[:, 0])[48:]
    assert len(counts) == 288
    assert counts.std() == pytest.approx(np.sqrt(100_000 / 288), rel=0.2)
