"""Augmentation of crops, on the device and inside the jitted step.

Crops are (crops, x, y, z) without a channel axis; values are 0..1 of the HU window.
"""

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
    shifts: jax.Array  # (n,) float32, added to every voxel


def draw(
    key: jax.Array,
    count: int,
    *,
    flip_probability: float,
    rotate_probability: float,
    shift_probability: float,
    shift: float,
) -> Draws:
    """Draws for `count` crops, independent of each other; the same on any number of devices.

    Turns are 1, 2 or 3 with equal probability where there is one (MONAI's RandRotate90), shifts
    uniform in [-shift, shift] (RandShiftIntensity).
    """
    keyed = partial(stream, key)
    turned = jax.random.bernoulli(keyed("rotate"), rotate_probability, (count,))
    turns = jax.random.randint(keyed("turns"), (count,), 1, 4)
    shifted = jax.random.bernoulli(keyed("shift"), shift_probability, (count,))
    shifts = jax.random.uniform(keyed("shifts"), (count,), minval=-shift, maxval=shift)
    return Draws(
        flips=jax.random.bernoulli(keyed("flip"), flip_probability, (count, 3)),
        turns=jnp.where(turned, turns, 0),
        shifts=jnp.where(shifted, shifts, 0.0),
    )


def apply(crops: jax.Array, draws: Draws) -> jax.Array:
    """Flips, then turns, then shifts each crop; nothing is clipped.

    Args:
        crops: (n, x, y, z) with x = y wherever a crop may be turned an odd number of times.
        draws: for n crops.

    Returns:
        (n, x, y, z).
    """
    return turn(flip(crops, draws.flips), draws.turns) + each(draws.shifts, crops)
