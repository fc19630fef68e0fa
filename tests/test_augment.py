"""Device-side resize and augmentation against live MONAI."""

import jax
import jax.numpy as jnp
import monai.transforms as mt
import numpy as np
import pytest
import torch

from voco_jax.training.images import resize, to_unit
from voco_jax.voco import augment


def _crops(generator, *shape):
    return generator.random(shape, dtype=np.float32)


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ((96, 96, 96), (64, 64, 64)),
        ((24, 40, 32), (32, 32, 64)),
        ((5, 7, 9), (1, 7, 13)),
        ((1, 4, 4), (3, 4, 2)),
    ],
)
def test_resize_is_monais(generator, source, target):
    crops = _crops(generator, 2, *source)
    expected = [
        mt.Resize(target, mode="trilinear", align_corners=True)(torch.from_numpy(c)[None])[0]
        for c in crops
    ]
    np.testing.assert_allclose(resize(crops, target), np.stack(expected), atol=1e-5)


def test_uint8_is_a_255th_of_the_window():
    values = to_unit(jnp.array([0, 1, 255], jnp.uint8))
    np.testing.assert_allclose(values, [0, 1 / 255, 1], atol=1e-7)
    np.testing.assert_array_equal(to_unit(jnp.array([0.25], jnp.float16)), [0.25])


def _draws(count, *, flips=None, turns=None, shifts=None):
    return augment.Draws(
        flips=jnp.zeros((count, 3), bool) if flips is None else jnp.asarray(flips),
        turns=jnp.zeros(count, jnp.int32) if turns is None else jnp.asarray(turns),
        shifts=jnp.zeros(count) if shifts is None else jnp.asarray(shifts),
    )


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_flip_is_monais(generator, axis):
    crops = _crops(generator, 2, 4, 4, 6)
    flips = np.zeros((2, 3), bool)
    flips[1, axis] = True
    found = augment.apply(crops, _draws(2, flips=flips))
    np.testing.assert_array_equal(found[0], crops[0])
    expected = mt.Flip(spatial_axis=axis)(torch.from_numpy(crops[1])[None])[0]
    np.testing.assert_allclose(found[1], expected, atol=1e-5)


def test_rotation_is_monais(generator):
    crops = _crops(generator, 4, 4, 4, 6)
    found = augment.apply(crops, _draws(4, turns=[0, 1, 2, 3]))
    for turns in range(4):
        expected = mt.Rotate90(k=turns, spatial_axes=(0, 1))(torch.from_numpy(crops[turns])[None])
        np.testing.assert_allclose(found[turns], expected[0], atol=1e-5)


def test_shift_is_monais_and_not_clipped(generator):
    crops = _crops(generator, 2, 4, 4, 6)
    found = augment.apply(crops, _draws(2, shifts=[0.1, -0.1]))
    for crop, shift, out in zip(crops, (0.1, -0.1), found, strict=True):
        expected = mt.ShiftIntensity(offset=shift)(torch.from_numpy(crop)[None])[0]
        np.testing.assert_allclose(out, expected, atol=1e-5)
    assert found.max() > 1
    assert found.min() < 0


def test_flips_come_before_turns(generator):
    crop = _crops(generator, 1, 4, 4, 2)
    found = augment.apply(crop, _draws(1, flips=[[True, False, False]], turns=[1]))
    np.testing.assert_array_equal(found[0], np.rot90(crop[0][::-1]))


def test_draws_have_the_published_frequencies():
    count = 20000
    draws = augment.draw(
        jax.random.key(0),
        count,
        flip_probability=0.2,
        rotate_probability=0.2,
        shift_probability=0.1,
        shift=0.1,
    )
    np.testing.assert_allclose(np.mean(draws.flips, axis=0), 0.2, atol=0.01)
    frequencies = np.bincount(draws.turns, minlength=4) / count
    np.testing.assert_allclose(frequencies, [0.8, 0.2 / 3, 0.2 / 3, 0.2 / 3], atol=0.01)
    shifted = np.asarray(draws.shifts)[np.asarray(draws.shifts) != 0]
    assert len(shifted) / count == pytest.approx(0.1, abs=0.01)
    assert np.abs(shifted).max() <= 0.1
    assert shifted.std() == pytest.approx(0.2 / np.sqrt(12), rel=0.05)
    both = np.asarray(draws.flips)
    assert np.mean(both[:, 0] & both[:, 1]) == pytest.approx(0.04, abs=0.01)
