"""Attention inside windows with a relative position bias: several ways to the same numbers.

`attend` leaves everything to XLA, which writes the scores (n n for each head and window, 343 x 343
in the first stages) to memory and reads them several times. `attend_in_parts` keeps them in a CPU's
cache, a few windows after the other. `attend_fused` keeps them on the chip of a TPU: one Pallas
kernel forward, one for the gradient; `attention_gpu.attend_blocks` on a GPU's.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from voco_jax.models.conv_blocks import Pair, largest_divisor

MASKED = -100.0
"""Added to the attention logit of two tokens that only the shift brought into one window."""

Attend = Callable[[jax.Array, jax.Array, jax.Array | None], jax.Array]
"""(qkv, bias, regions) -> the heads' outputs, see `attend`."""


def attend(qkv: jax.Array, bias: jax.Array, regions: jax.Array | None) -> jax.Array:
    """softmax(q k / sqrt(d) + bias + mask) v of each window and head.

    Args:
        qkv: `b windows n 3 heads d`: queries, keys, values.
        bias: `heads n n` float32.
        regions: `windows n` int32; tokens of different numbers are masked as in MONAI, with -100.
            None: no mask.

    Returns:
        `b windows n heads d` in the dtype of `qkv`; logits and softmax are in float32 (or wider).
    """
    query, key, value = _split(qkv)
    logits = _logits(query, key, bias, regions)
    weights = jax.nn.softmax(logits, axis=-1).astype(qkv.dtype)
    return jnp.einsum("...hqk,...khd->...qhd", weights, value)


def _split(qkv: jax.Array) -> tuple[jax.Array, ...]:
    """`... n 3 heads d` -> queries (scaled), keys and values, `... n heads d` each."""
    query, key, value = (qkv[..., i, :, :] for i in range(3))
    return query * query.shape[-1] ** -0.5, key, value


def _logits(
    query: jax.Array, key: jax.Array, bias: jax.Array, regions: jax.Array | None
) -> jax.Array:
    """`... heads n n`: of each query with each key, in float32 or wider."""
    wide = jnp.promote_types(query.dtype, jnp.float32)
    logits = jnp.einsum("...qhd,...khd->...hqk", query, key, preferred_element_type=wide) + bias
    if regions is None:
        return logits
    same = regions[..., :, None] == regions[..., None, :]
    return logits + jnp.where(same, 0.0, MASKED)[..., None, :, :]


SCORES_AT_ONCE = 2**20
"""That `attend_in_parts` computes at once: about what a CPU's cache holds."""


@jax.custom_vjp
def attend_in_parts(qkv: jax.Array, bias: jax.Array, regions: jax.Array | None) -> jax.Array:
    """`attend` of a few windows after the other, whose scores the gradient computes again.

    What is divided by a softmax's sums is the output, and in the gradient `d_out`, both
    `windows n heads d`, not the scores. Reverse-mode differentiation only. Arguments and result as
    there.
    """
    return _parts_forward(qkv, bias, regions)[0]


def _parts_forward(
    qkv: jax.Array, bias: jax.Array, regions: jax.Array | None
) -> tuple[jax.Array, tuple[Any, ...]]:
    def attend_part(one: tuple[jax.Array, jax.Array | None]) -> jax.Array:
        query, key, value = _split(one[0])
        weights, total = _exponentials(query, key, bias, one[1])
        out = jnp.einsum("whqk,wkhd->wqhd", weights.astype(value.dtype), value)
        return (out / total).astype(value.dtype)

    out = lax.map(attend_part, _parts(qkv, bias, regions))
    return out.reshape(*qkv.shape[:3], *qkv.shape[4:]), (qkv, bias, regions)


def _parts_backward(saved: tuple[Any, ...], d_out: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    qkv, bias, regions = saved
    parts, regions_of_parts = _parts(qkv, bias, regions)
    wide = jnp.promote_types(bias.dtype, qkv.dtype)
    ones = jnp.ones(parts.shape[1], wide)

    def differentiate(d_bias: jax.Array, one: tuple[Any, ...]) -> Pair:
        qkv, regions, d_out = one
        query, key, value = _split(qkv)
        weights, total = _exponentials(query, key, bias, regions)
        d_out = (d_out / total).astype(value.dtype)
        d_value = jnp.einsum("whqk,wqhd->wkhd", weights.astype(value.dtype), d_out)
        d_weights = jnp.einsum("wqhd,wkhd->whqk", d_out, value, preferred_element_type=wide)
        # What each logit loses through its softmax's sum: `windows heads n 1`.
        lost = jnp.sum(weights * d_weights, axis=-1, keepdims=True) / total.swapaxes(1, 2)
        d_logits = weights * (d_weights - lost)
        narrow = d_logits.astype(value.dtype)
        d_query = jnp.einsum("whqk,wkhd->wqhd", narrow, key) * query.shape[-1] ** -0.5
        d_key = jnp.einsum("whqk,wqhd->wkhd", narrow, query)
        # A product: the sum over windows is ten times slower where jax is 0.10.2.
        d_bias = d_bias + jnp.einsum("w,whqk->hqk", ones, d_logits)
        return d_bias, jnp.stack([d_query, d_key, d_value], axis=2)

    d_out = d_out.reshape(*parts.shape[:3], *parts.shape[4:])
    scanned = (parts, regions_of_parts, d_out)
    d_bias, d_parts = lax.scan(differentiate, jnp.zeros(bias.shape, wide), scanned)
    return d_parts.reshape(qkv.shape), d_bias.astype(bias.dtype), None


attend_in_parts.defvjp(_parts_forward, _parts_backward)


def _exponentials(
    query: jax.Array, key: jax.Array, bias: jax.Array, regions: jax.Array | None
) -> Pair:
    """A softmax before its division: `windows heads n n`, and its sums, `windows n heads 1`."""
    logits = _logits(query, key, bias, regions)
    weights = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    return weights, jnp.sum(weights, axis=-1, keepdims=True).swapaxes(1, 2)


def _parts(
    qkv: jax.Array, bias: jax.Array, regions: jax.Array | None
) -> tuple[jax.Array, jax.Array | None]:
    """`parts windows n 3 heads d`, and the regions `parts windows n` if there are any."""
    b, windows, n, _, heads, d = qkv.shape
    together = largest_divisor(b * windows, SCORES_AT_ONCE // bias.size)
    if regions is not None:
        regions = jnp.broadcast_to(regions, (b, windows, n)).reshape(-1, together, n)
    return qkv.reshape(-1, together, n, 3, heads, d), regions


def attend_fused(
    qkv: jax.Array, bias: jax.Array, regions: jax.Array | None, *, interpret: bool = False
) -> jax.Array:
    """`attend` on a TPU, without writing the scores; arguments and result as there.

    `interpret` runs the kernels as plain JAX, on any device; for tests.
    """
    b, windows, n, _, heads, d = qkv.shape
    # Tokens last: a TPU's memory holds 128 of the last axis side by side, and d is 16 or 32.
    columns = qkv.transpose(0, 1, 3, 4, 5, 2).reshape(b, windows, 3, heads, d, n)
    one_hot = None
    if regions is not None:
        # A product of one-hot rows is 1 within a region, 0 across: no mask has to be read.
        numbers = jnp.arange(_REGIONS, dtype=regions.dtype)
        one_hot = (regions[:, None, :] == numbers[:, None]).astype(qkv.dtype)
    out = _fused(columns, bias, one_hot, interpret)
    return out.transpose(0, 1, 4, 2, 3)


_REGIONS = 32  # at least the 27 parts that three shifted axes have


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _fused(
    columns: jax.Array, bias: jax.Array, one_hot: jax.Array | None, interpret: bool
) -> jax.Array:
    """`b windows 3 heads d n`, `heads n n`, `windows regions n` -> `b windows heads d n`."""
    b, windows, _, heads, d, n = columns.shape
    return pl.pallas_call(
        optional_input(_forward_kernel, 2, one_hot is not None),
        grid=(heads, b, windows),
        in_specs=_in_specs(columns, one_hot),
        out_specs=pl.BlockSpec((1, 1, 1, d, n), lambda h, i, w: (i, w, h, 0, 0)),
        out_shape=jax.ShapeDtypeStruct((b, windows, heads, d, n), columns.dtype),
        interpret=interpret,
        name="window_attention",
    )(columns, bias, *([] if one_hot is None else [one_hot]))


def _fused_forward(
    columns: jax.Array, bias: jax.Array, one_hot: jax.Array | None, interpret: bool
) -> tuple[jax.Array, tuple[Any, ...]]:
    return _fused(columns, bias, one_hot, interpret), (columns, bias, one_hot)


def _fused_backward(
    interpret: bool, saved: tuple[Any, ...], d_out: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    columns, bias, one_hot = saved
    b, windows, _, heads, d, n = columns.shape
    d_columns, d_bias = pl.pallas_call(
        optional_input(_backward_kernel, 3, one_hot is not None),
        grid=(heads, b, windows),
        in_specs=[
            pl.BlockSpec((1, 1, 1, d, n), lambda h, i, w: (i, w, h, 0, 0)),
            *_in_specs(columns, one_hot),
        ],
        out_specs=[
            pl.BlockSpec((1, 1, 3, 1, d, n), lambda h, i, w: (i, w, 0, h, 0, 0)),
            # The windows of a crop follow each other, and their sum stays on the chip.
            pl.BlockSpec((1, 1, n, n), lambda h, i, w: (i, h, 0, 0)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct(columns.shape, columns.dtype),
            jax.ShapeDtypeStruct((b, heads, n, n), bias.dtype),
        ],
        interpret=interpret,
        name="window_attention_gradient",
    )(d_out, columns, bias, *([] if one_hot is None else [one_hot]))
    zeros = None if one_hot is None else jnp.zeros_like(one_hot)
    return d_columns, jnp.sum(d_bias, axis=0), zeros


_fused.defvjp(_fused_forward, _fused_backward)


def _in_specs(columns: jax.Array, one_hot: jax.Array | None) -> list[pl.BlockSpec]:
    d, n = columns.shape[-2:]
    specs = [
        pl.BlockSpec((1, 1, 3, 1, d, n), lambda h, i, w: (i, w, 0, h, 0, 0)),
        pl.BlockSpec((1, n, n), lambda h, i, w: (h, 0, 0)),
    ]
    if one_hot is not None:
        specs.append(pl.BlockSpec((1, *one_hot.shape[1:]), lambda h, i, w: (w, 0, 0)))
    return specs


def optional_input(
    kernel: Callable[..., None], place: int, given: bool, **options: Any
) -> Callable[..., None]:
    """The kernel with its options, and None for its input at this place where it is not given."""

    def run(*references: Any) -> None:
        kernel(*references[:place], *([] if given else [None]), *references[place:], **options)

    run.__name__ = kernel.__name__.strip("_")  # of the function on the device, for profiles
    return run


def _weights(columns: Any, bias: Any, one_hot: Any) -> tuple[jax.Array, ...]:
    """Queries (scaled), keys, values `d n` and softmax `n n`, a query's weights in a row."""
    query, key, value = (columns[0, 0, i, 0] for i in range(3))
    query = query * query.shape[0] ** -0.5
    scores = product(query, key, (0, 0)) + bias[0]
    if one_hot is not None:
        scores = scores + MASKED * (1 - product(one_hot[0], one_hot[0], (0, 0)))
    exponentials = jnp.exp(scores - jnp.max(scores, axis=1, keepdims=True))
    return query, key, value, exponentials / jnp.sum(exponentials, axis=1, keepdims=True)


def product(left: jax.Array, right: jax.Array, axes: tuple[int, int]) -> jax.Array:
    """The sum over one axis of each, in float32 or wider."""
    return lax.dot_general(
        left,
        right,
        (((axes[0],), (axes[1],)), ((), ())),
        precision=lax.Precision.DEFAULT if left.dtype == jnp.bfloat16 else lax.Precision.HIGHEST,
        preferred_element_type=jnp.promote_types(left.dtype, jnp.float32),
    )


def _forward_kernel(columns: Any, bias: Any, one_hot: Any, out: Any) -> None:
    _, _, value, weights = _weights(columns, bias, one_hot)
    out[0, 0, 0] = product(value, weights.astype(value.dtype), (1, 1)).astype(out.dtype)


def _backward_kernel(
    d_out: Any, columns: Any, bias: Any, one_hot: Any, d_columns: Any, d_bias: Any
) -> None:
    query, key, value, weights = _weights(columns, bias, one_hot)
    gradient = d_out[0, 0, 0]
    d_weights = product(gradient, value, (0, 0))
    delta = jnp.sum(d_weights * weights, axis=1, keepdims=True)
    d_scores = weights * (d_weights - delta)
    narrow = d_scores.astype(value.dtype)
    d_query = product(key, narrow, (1, 1)) * query.shape[0] ** -0.5
    d_columns[0, 0, 0, 0] = d_query.astype(d_columns.dtype)
    d_columns[0, 0, 1, 0] = product(query, narrow, (1, 0)).astype(d_columns.dtype)
    d_value = product(gradient, weights.astype(value.dtype), (1, 0))
    d_columns[0, 0, 2, 0] = d_value.astype(d_columns.dtype)

    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        d_bias[0, 0] = d_scores

    @pl.when(pl.program_id(2) > 0)
    def _() -> None:
        d_bias[0, 0] += d_scores
