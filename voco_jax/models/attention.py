"""Attention inside windows, with a bias for each pair of places: ways to the same numbers.

`attend` leaves everything to XLA, which writes the scores (n n for each head and window, 343 x 343
in the first stages) to memory and reads them several times. `attend_fused` keeps them on the chip
of a TPU: one Pallas kernel forward, one for the gradient; `attention_gpu.attend_blocks` on a GPU's.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

MASKED = -100.0
"""Added to the attention logit of two tokens that only the shift brought into one window."""

Attend = Callable[[jax.Array, jax.Array, jax.Array | None], jax.Array]
"""(qkv, bias, regions) -> what the heads found, see `attend`."""


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
    query, key, value = (qkv[:, :, :, i] for i in range(3))
    query = query * query.shape[-1] ** -0.5
    wide = jnp.promote_types(qkv.dtype, jnp.float32)
    logits = jnp.einsum("bwqhd,bwkhd->bwhqk", query, key, preferred_element_type=wide) + bias
    if regions is not None:
        same = regions[:, :, None] == regions[:, None, :]
        logits = logits + jnp.where(same, 0.0, MASKED)[:, None]
    weights = jax.nn.softmax(logits, axis=-1).astype(qkv.dtype)
    return jnp.einsum("bwhqk,bwkhd->bwqhd", weights, value)


def attend_fused(
    qkv: jax.Array, bias: jax.Array, regions: jax.Array | None, *, interpret: bool = False
) -> jax.Array:
    """`attend` on a TPU, without writing the scores; arguments and result as there.

    Args:
        qkv: see `attend`.
        bias: see `attend`.
        regions: see `attend`.
        interpret: run the kernels as plain JAX, on any device; for tests.
    """
    b, windows, n, _, heads, d = qkv.shape
    # Tokens last: a TPU's memory holds 128 of the last axis side by side, and d is 16 or 32.
    columns = qkv.transpose(0, 1, 3, 4, 5, 2).reshape(b, windows, 3, heads, d, n)
    marks = None
    if regions is not None:
        # A product of one-hot rows is 1 within a region, 0 across: no mask has to be read.
        kinds = jnp.arange(_REGIONS, dtype=regions.dtype)
        marks = (regions[:, None, :] == kinds[:, None]).astype(qkv.dtype)
    out = _fused(columns, bias, marks, interpret)
    return out.transpose(0, 1, 4, 2, 3)


_REGIONS = 32  # at least the 27 parts that three shifted axes have


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _fused(
    columns: jax.Array, bias: jax.Array, marks: jax.Array | None, interpret: bool
) -> jax.Array:
    """`b windows 3 heads d n`, `heads n n`, `windows regions n` -> `b windows heads d n`."""
    b, windows, _, heads, d, n = columns.shape
    return pl.pallas_call(
        _forward_kernel if marks is not None else functools.partial(_unmarked, _forward_kernel),
        grid=(heads, b, windows),
        in_specs=_in_specs(columns, marks),
        out_specs=pl.BlockSpec((1, 1, 1, d, n), lambda h, i, w: (i, w, h, 0, 0)),
        out_shape=jax.ShapeDtypeStruct((b, windows, heads, d, n), columns.dtype),
        interpret=interpret,
        name="window_attention",
    )(columns, bias, *([] if marks is None else [marks]))


def _fused_forward(
    columns: jax.Array, bias: jax.Array, marks: jax.Array | None, interpret: bool
) -> tuple[jax.Array, tuple[Any, ...]]:
    return _fused(columns, bias, marks, interpret), (columns, bias, marks)


def _fused_backward(
    interpret: bool, saved: tuple[Any, ...], gradient: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    columns, bias, marks = saved
    b, windows, _, heads, d, n = columns.shape
    found = pl.pallas_call(
        _backward_kernel if marks is not None else functools.partial(_unmarked, _backward_kernel),
        grid=(heads, b, windows),
        in_specs=[
            pl.BlockSpec((1, 1, 1, d, n), lambda h, i, w: (i, w, h, 0, 0)),
            *_in_specs(columns, marks),
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
    )(gradient, columns, bias, *([] if marks is None else [marks]))
    zeros = None if marks is None else jnp.zeros_like(marks)
    return found[0], jnp.sum(found[1], axis=0), zeros


_fused.defvjp(_fused_forward, _fused_backward)


def _in_specs(columns: jax.Array, marks: jax.Array | None) -> list[pl.BlockSpec]:
    d, n = columns.shape[-2:]
    specs = [
        pl.BlockSpec((1, 1, 3, 1, d, n), lambda h, i, w: (i, w, 0, h, 0, 0)),
        pl.BlockSpec((1, n, n), lambda h, i, w: (h, 0, 0)),
    ]
    if marks is not None:
        specs.append(pl.BlockSpec((1, *marks.shape[1:]), lambda h, i, w: (w, 0, 0)))
    return specs


def _unmarked(kernel: Callable[..., None], *references: Any) -> None:
    """Runs a kernel whose last input, the marks, is missing."""
    inputs = 2 if kernel is _forward_kernel else 3
    kernel(*references[:inputs], None, *references[inputs:])


def _weights(columns: Any, bias: Any, marks: Any) -> tuple[jax.Array, ...]:
    """Queries (scaled), keys, values `d n` and softmax `n n`, a query's weights in a row."""
    query, key, value = (columns[0, 0, i, 0] for i in range(3))
    query = query * query.shape[0] ** -0.5
    scores = product(query, key, (0, 0)) + bias[0]
    if marks is not None:
        scores = scores + MASKED * (1 - product(marks[0], marks[0], (0, 0)))
    powers = jnp.exp(scores - jnp.max(scores, axis=1, keepdims=True))
    return query, key, value, powers / jnp.sum(powers, axis=1, keepdims=True)


def product(left: jax.Array, right: jax.Array, axes: tuple[int, int]) -> jax.Array:
    """The sum over one axis of each, in float32 or wider."""
    return lax.dot_general(
        left,
        right,
        (((axes[0],), (axes[1],)), ((), ())),
        precision=lax.Precision.DEFAULT if left.dtype == jnp.bfloat16 else lax.Precision.HIGHEST,
        preferred_element_type=jnp.promote_types(left.dtype, jnp.float32),
    )


def _forward_kernel(columns: Any, bias: Any, marks: Any, out: Any) -> None:
    _, _, value, weights = _weights(columns, bias, marks)
    out[0, 0, 0] = product(value, weights.astype(value.dtype), (1, 1)).astype(out.dtype)


def _backward_kernel(
    gradient: Any, columns: Any, bias: Any, marks: Any, columns_out: Any, bias_out: Any
) -> None:
    query, key, value, weights = _weights(columns, bias, marks)
    upper = gradient[0, 0, 0]
    narrow = weights.astype(value.dtype)
    of_weights = product(upper, value, (0, 0))
    of_scores = weights * (of_weights - jnp.sum(of_weights * weights, axis=1, keepdims=True))
    scores = of_scores.astype(value.dtype)
    of_query = product(key, scores, (1, 1)) * query.shape[0] ** -0.5
    columns_out[0, 0, 0, 0] = of_query.astype(columns_out.dtype)
    columns_out[0, 0, 1, 0] = product(query, scores, (1, 0)).astype(columns_out.dtype)
    columns_out[0, 0, 2, 0] = product(upper, narrow, (1, 0)).astype(columns_out.dtype)

    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        bias_out[0, 0] = of_scores

    @pl.when(pl.program_id(2) > 0)
    def _() -> None:
        bias_out[0, 0] += of_scores
