"""Images on the device, as every task takes them from the cache and changes them.

Images are (n, x, y, z), with or without channels behind; masks and turns are one value an image.
"""

import jax
import jax.numpy as jnp


def to_unit(images: jax.Array) -> jax.Array:
    """Cached voxels -> float32 0..1; uint8 is a 255th of the window a step."""
    unit = images.astype(jnp.float32)
    return unit / 255 if images.dtype == jnp.uint8 else unit


def flip(images: jax.Array, flips: jax.Array) -> jax.Array:
    """Flips each image along the axes that its row of `flips`, (n, 3) bool, says."""
    for axis in range(3):
        images = _flip_where(images, flips[:, axis], axis + 1)
    return images


def turn(images: jax.Array, turns: jax.Array) -> jax.Array:
    """Turns each image in the x-y plane by 90 degrees 0 to 3 times, as `numpy.rot90`.

    Args:
        images: with x = y; others stay as they are.
        turns: (n,) int32.
    """
    if images.shape[1] != images.shape[2]:
        return images
    # An odd turn is a transposition, then one flip; two turns are two flips.
    images = jnp.where(each(turns % 2 == 1, images), jnp.swapaxes(images, 1, 2), images)
    images = _flip_where(images, (turns == 1) | (turns == 2), 1)
    return _flip_where(images, (turns == 2) | (turns == 3), 2)


def each(values: jax.Array, images: jax.Array) -> jax.Array:
    """(n,) -> (n, 1, 1, ...): a value for every voxel of its image."""
    return values.reshape(-1, *[1] * (images.ndim - 1))


def _flip_where(images: jax.Array, mask: jax.Array, axis: int) -> jax.Array:
    return jnp.where(each(mask, images), jnp.flip(images, axis), images)
