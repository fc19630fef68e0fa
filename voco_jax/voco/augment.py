"""Resize and augmentation of crops, on the device and inside the jitted step.

Crops are (crops, x, y, z) without a channel axis; values are 0..1 of the HU window.
"""

from functools import partial

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from voco_jax.training.images import each, flip, turn
from voco_jax.training.streams import stream
from voco_jax.types import Size


@flax.struct.dataclass
class Draws:
    """The random choices for n crops."""

    flips: jax.Array  # (n, 3) bool, per axis
    turns: jax.Array  # (n,) int32 in 0..3: rotations by 90 degrees in the x-y plane
    shifts: jax.Array  # (n,) float32, added to every voxel


def interpolation_matrix(source: int, target: int) -> np.ndarray:
    """Linear interpolation with aligned corners: (target, source) float32, rows sum to 1.

    As torch.nn.functional.interpolate(..., align_corners=True) along one axis.
    """
    positions = np.linspace(0, source - 1, target) if target > 1 else np.zeros(1)
    lower = np.minimum(positions.astype(int), max(source - 2, 0))
    fraction = positions - lower
    rows = np.arange(target)
    matrix = np.zeros((target, source))
    matrix[rows, lower] = 1 - fraction
    matrix[rows, np.minimum(lower + 1, source - 1)] += fraction
    return matrix.astype(np.float32)


def resize(crops: jax.Array, size: Size) -> jax.Array:
    """Trilinear resize with aligned corners and no anti-aliasing (MONAI's Resize).

    Args:
        crops: (n, x, y, z) float32.
        size: target (x, y, z).

    Returns:
        (n, *size).
    """
    for axis, (source, target) in enumerate(zip(crops.shape[1:], size, strict=True), start=1):
        if source != target:
            matrix = interpolation_matrix(source, target)
            moved = jnp.tensordot(crops, matrix, (axis, 1), precision=jax.lax.Precision.HIGHEST)
            crops = jnp.moveaxis(moved, -1, axis)
    return crops


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
