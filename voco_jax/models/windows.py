"""Windows of a 3-D feature map: cutting, masks and relative positions; pure functions.

Every array is channels-last, `b x y z c`.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax

from voco_jax.types import Size


def spatial_size(x: jax.Array) -> Size:
    """`x y z` of `b x y z c`."""
    _, size_x, size_y, size_z, _ = x.shape
    return size_x, size_y, size_z


def fit_window(size: Size, window_size: Size, shifted: bool) -> tuple[Size, Size]:
    """Shrinks the window to the feature map, axis by axis; a shrunken axis is not shifted.

    Args:
        size: of the feature map, x y z.
        window_size: the full window.
        shifted: whether the block shifts its windows, by half the full window.

    Returns:
        The window and the shift to use, x y z each (MONAI's `get_window_size`).
    """
    window = tuple(min(pair) for pair in zip(size, window_size, strict=True))
    shift = tuple(
        full // 2 if shifted and extent > full else 0
        for extent, full in zip(size, window_size, strict=True)
    )
    return window, shift  # type: ignore[return-value]


def window_partition(x: jax.Array, window: Size) -> jax.Array:
    """`b x y z c` -> `b windows tokens c`; every axis a multiple of its window."""
    b, size_x, size_y, size_z, c = x.shape
    wx, wy, wz = window
    x = x.reshape(b, size_x // wx, wx, size_y // wy, wy, size_z // wz, wz, c)
    return x.transpose(0, 1, 3, 5, 2, 4, 6, 7).reshape(b, -1, wx * wy * wz, c)


def window_reverse(x: jax.Array, window: Size, size: Size) -> jax.Array:
    """`b windows tokens c` -> `b x y z c` of the given size: undoes `window_partition`."""
    b, c = x.shape[0], x.shape[-1]
    wx, wy, wz = window
    x = x.reshape(b, size[0] // wx, size[1] // wy, size[2] // wz, wx, wy, wz, c)
    return x.transpose(0, 1, 4, 2, 5, 3, 6, 7).reshape(b, *size, c)


def shift_regions(size: Size, window: Size, shift: Size) -> jax.Array:
    """A number for each token: those of a shifted window that were neighbours before have the same.

    MONAI's `compute_mask` makes a dense mask of them: 0 within a region, -100 across.

    Args:
        size: of the padded feature map, x y z.
        window: x y z.
        shift: x y z; 0 on an axis that is not shifted.

    Returns:
        `windows n` int32, less than 27.
    """
    region = jnp.zeros((1, *size, 1), jnp.int32)
    for axis in range(3):
        if shift[axis]:
            place = lax.broadcasted_iota(jnp.int32, (1, *size, 1), axis + 1)
            part = (place >= size[axis] - window[axis]).astype(jnp.int32)
            part += (place >= size[axis] - shift[axis]).astype(jnp.int32)
            region = 3 * region + part
    return window_partition(region, window)[0, :, :, 0]


def relative_position_bias(table: jax.Array, window_size: Size, tokens: int) -> jax.Array:
    """The table's row for each pair of tokens of a window, heads first.

    It is `table[relative_position_index(window_size)[:tokens, :tokens]]` (`swin_unetr_pytorch`).

    Products with one-hot matrices, one per axis, instead of a gather: exact, and the gradient needs
    no scatter (slow on TPU, not reproducible on GPU).

    Args:
        table: `(2 wx - 1)(2 wy - 1)(2 wz - 1) heads` float32.
        window_size: the full window, x y z.
        tokens: of the window in use. A shrunken window takes the first rows of the full one's
            index, as MONAI does, though they belong to other places.

    Returns:
        `heads tokens tokens` float32.
    """
    one_hot = []
    for size in window_size:
        place = jnp.arange(size)
        one_hot.append(
            jax.nn.one_hot(
                place[:, None] - place[None, :] + size - 1, 2 * size - 1, dtype=table.dtype
            )
        )
    bias = table.T.reshape(-1, *(2 * size - 1 for size in window_size))
    highest = lax.Precision.HIGHEST
    bias = jnp.einsum("habc,ipa->hbcip", bias, one_hot[0], precision=highest)
    bias = jnp.einsum("hbcip,jqb->hcipjq", bias, one_hot[1], precision=highest)
    bias = jnp.einsum("hcipjq,krc->hijkpqr", bias, one_hot[2], precision=highest)
    count = math.prod(window_size)
    return bias.reshape(-1, count, count)[:, :tokens, :tokens]
