"""Sliding windows against MONAI live; the other grid against SciPy."""

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.ndimage import map_coordinates

from voco_jax.evaluation.sliding_window import Grid, Windows, segment

CLASSES = 4
MIX = np.random.default_rng(1).normal(size=(CLASSES, 3)).astype(np.float32)
CASES = [  # shape of the volume, of a window, overlap, weights
    ((40, 37, 50), (16, 24, 16), 0.5, "gaussian"),
    ((33, 70, 20), (32, 32, 20), 0.25, "constant"),
    ((32, 20, 45), (16, 8, 16), 0.75, "gaussian"),
    ((24, 16, 16), (24, 16, 16), 0.6, "constant"),
]


def _logits(numpy, windows):
    """Scores that depend on the intensity and on the place in the window: `b x y z classes`."""
    place = np.linspace(-1, 1, windows.shape[1], dtype=np.float32)[:, None, None]
    place = place + np.linspace(-2, 1, windows.shape[3], dtype=np.float32)
    parts = windows, windows * windows, windows * 0 + place
    return numpy.stack([sum(m * one for m, one in zip(row, parts, strict=True)) for row in MIX], -1)


def _ours(windows):
    return jnp.asarray(_logits(np, windows[..., 0]))


def _monais(volume, size, overlap, weights):
    """Mean logits of a whole volume, `classes x y z`."""
    import torch
    from monai.inferers import sliding_window_inference

    def predict(windows):
        return torch.from_numpy(np.moveaxis(_logits(np, windows[:, 0].numpy()), -1, 1).copy())

    image = torch.from_numpy(volume)[None, None]
    found = sliding_window_inference(image, size, 2, predict, overlap=overlap, mode=weights)
    return found[0].numpy()


@pytest.mark.parametrize(("shape", "size", "overlap", "weights"), CASES)
def test_as_monai(generator, shape, size, overlap, weights):
    volume = generator.normal(size=shape).astype(np.float32)
    labels, none = segment(volume[..., None], _ours, Windows(size, overlap, weights, 3))
    assert none is None
    mean = _monais(volume, size, overlap, weights)
    best = np.sort(mean, 0)
    clear = best[-1] - best[-2] > 1e-5  # where rounding does not decide
    assert clear.mean() > 0.999
    np.testing.assert_array_equal(labels[clear], mean.argmax(0)[clear])


@pytest.mark.parametrize(("shape", "size", "overlap", "weights"), CASES[:3])
def test_the_other_grid_is_interpolated_linearly(generator, shape, size, overlap, weights):
    """Finer, coarser, shifted, and beyond the volume, where it is background."""
    volume = generator.normal(size=shape).astype(np.float32)
    counts = (int(shape[0] * 1.7), shape[1] // 2, shape[2])
    positions = tuple(
        np.linspace(-2, n + 1.5, count) for n, count in zip(shape, counts, strict=True)
    )
    windows = Windows(size, overlap, weights, 2)
    labels, found = segment(volume[..., None], _ours, windows, Grid(positions))
    np.testing.assert_array_equal(labels, segment(volume[..., None], _ours, windows)[0])
    mean = _monais(volume, size, overlap, weights).astype(np.float64)
    ends = [np.clip(p, 0, n - 1) for p, n in zip(positions, shape, strict=True)]
    places = np.stack(np.meshgrid(*ends, indexing="ij"))
    scores = np.stack([map_coordinates(one, places, order=1, mode="nearest") for one in mean])
    inside = np.ix_(*((p > -0.5) & (p < n - 0.5) for p, n in zip(positions, shape, strict=True)))
    expected = np.zeros(counts, int)
    expected[inside] = scores.argmax(0)[inside]
    best = np.sort(scores, 0)
    clear = best[-1] - best[-2] > 1e-5
    assert clear.mean() > 0.999
    np.testing.assert_array_equal(found[clear], expected[clear])


def test_the_same_grid_gives_the_same_labels(generator):
    volume = generator.normal(size=(20, 33, 18)).astype(np.float32)
    grid = Grid(tuple(np.arange(n, dtype=float) for n in volume.shape))
    labels, found = segment(
        volume[..., None], _ours, Windows((16, 16, 16), 0.5, "gaussian", 1), grid
    )
    np.testing.assert_array_equal(labels, found)


def test_every_window_is_told_once():
    seen = []
    segment(
        np.zeros((20, 20, 40, 1), np.float32),
        _ours,
        Windows((16, 16, 16), 0.5, "constant", 3),
        progress=lambda done, total: seen.append((done, total)),
    )
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert seen[-1] == (16, 16)
