"""Augmentation of crops and their labels, on the device and inside the jitted step.

Crops are (crops, x, y, z, channels), labels have no channels; values are 0..1 of the window. What
is drawn for a crop changes all its channels alike, but noise, which is of each voxel's own.
"""

import math
from functools import partial

import flax.struct
import jax
import jax.numpy as jnp

from voco_jax.training.images import each, flip, turn
from voco_jax.training.streams import stream


@flax.struct.dataclass
class Draws:
    """The random choices for n crops."""

    flips: jax.Array  # (n, 3) bool, per axis
    turns: jax.Array  # (n,) int32 in 0..3: rotations by 90 degrees in the x-y plane
    scales: jax.Array  # (n,) float32, times every voxel
    shifts: jax.Array  # (n,) float32, added to every voxel
    exponents: jax.Array  # (n,) float32, of every voxel between 0 and 1
    deviations: jax.Array  # (n,) float32, of the noise
    noise_key: jax.Array


def draw(
    key: jax.Array,
    count: int,
    *,
    flip_probability: tuple[float, float, float],
    rotate_probability: float,
    scale_probability: float,
    scale: float,
    shift_probability: float,
    shift: float,
    noise_probability: float,
    noise: float,
    gamma_probability: float,
    gamma: float,
) -> Draws:
    """Draws for `count` crops, independent of each other; the same on any number of devices.

    As MONAI's RandFlip, RandRotate90, RandScaleIntensity, RandShiftIntensity and RandGaussianNoise;
    exponents are e^u with u uniform in [-log(1 + gamma), log(1 + gamma)].
    """
    keyed = partial(stream, key)

    def sometimes(
        name: str, probability: float, low: float, high: float, else_: float
    ) -> jax.Array:
        chosen = jax.random.bernoulli(keyed(name), probability, (count,))
        values = jax.random.uniform(keyed(f"{name}s"), (count,), minval=low, maxval=high)
        return jnp.where(chosen, values, else_)

    turned = jax.random.bernoulli(keyed("rotate"), rotate_probability, (count,))
    turns = jax.random.randint(keyed("turns"), (count,), 1, 4)
    reach = math.log1p(gamma)
    return Draws(
        flips=jax.random.bernoulli(keyed("flip"), jnp.array(flip_probability), (count, 3)),
        turns=jnp.where(turned, turns, 0),
        scales=sometimes("scale", scale_probability, 1 - scale, 1 + scale, 1.0),
        shifts=sometimes("shift", shift_probability, -shift, shift, 0.0),
        exponents=jnp.exp(sometimes("gamma", gamma_probability, -reach, reach, 0.0)),
        deviations=sometimes("deviation", noise_probability, 0.0, noise, 0.0),
        noise_key=keyed("noise"),
    )


def apply(images: jax.Array, labels: jax.Array, draws: Draws) -> tuple[jax.Array, jax.Array]:
    """Flips and turns both; then changes the images' intensities, without clipping.

    Args:
        images: (n, x, y, z, c) float32, x = y wherever a crop may be turned an odd number of times.
        labels: (n, x, y, z) integers; or (n,), which stay as they are.
        draws: for n crops.
    """
    images = turn(flip(images, draws.flips), draws.turns)
    if labels.ndim > 1:
        labels = turn(flip(labels, draws.flips), draws.turns)
    inside = jnp.clip(images, 1e-6, 1)  # the slope of x^e is infinite at 0
    exponents = each(draws.exponents, images)
    images = jnp.where(exponents == 1, images, inside**exponents)
    images = images * each(draws.scales, images) + each(draws.shifts, images)
    noise = jax.random.normal(draws.noise_key, images.shape)
    return images + each(draws.deviations, images) * noise, labels
