"""Images on the device, as every task takes them from the cache and changes them.

Images are (n, x, y, z), with or without channels behind; masks and turns are one value an image.
"""

import jax
import jax.numpy as jnp
import numpy as np

from voco_jax.types import Size


def to_unit(images: jax.Array) -> jax.Array:
    """Cached voxels -> float32 0..1; uint8 is a 255th of the window a step."""
    unit = images.astype(jnp.float32)
    return unit / 255 if images.dtype == jnp.uint8 else unit


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
        crops: (n, x, y, z) float32, with or without channels behind.
        size: target (x, y, z).

    Returns:
        (n, *size), with the channels.
    """
    for axis, (source, target) in enumerate(zip(crops.shape[1:4], size, strict=True), start=1):
        if source != target:
            matrix = interpolation_matrix(source, target)
            moved = jnp.tensordot(crops, matrix, (axis, 1), precision=jax.lax.Precision.HIGHEST)
            crops = jnp.moveaxis(moved, -1, axis)
    return crops


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
