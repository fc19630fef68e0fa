"""Attention inside windows on a GPU, without writing the scores: Pallas kernels for Triton.

The scores go through the chip block by block, as in FlashAttention-2
(https://arxiv.org/abs/2307.08691): the gradient computes them
again from each row's log-sum-exp (`lse`).
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from voco_jax.models.attention import MASKED, optional_input, product

_BLOCK = 64  # queries, and keys, worked on at once; Triton wants powers of two from 16 on
_BIAS_PROGRAMS = 1024  # at least so many share `d_bias`, where there are windows enough
_PADDING_BIAS = -1e30  # of a key that only pads a block; exp makes 0 of it, and never nan


def attend_blocks(
    qkv: jax.Array, bias: jax.Array, regions: jax.Array | None, *, interpret: bool = False
) -> jax.Array:
    """`attention.attend` on a GPU; arguments and result as there.

    Memory holds queries, keys, values and results as the linear layers before and after do, so
    nothing is transposed. The gradient with respect to the bias is summed in float32 and in the
    same order every time.

    `interpret` runs the kernels as plain JAX, on any device; for tests.
    """
    b, windows, n, _, heads, d = qkv.shape
    block = min(_BLOCK, max(16, pl.next_power_of_2(n)))
    padding = -n % block
    padded = jnp.pad(bias, ((0, 0), (0, padding), (0, padding)))
    padded = jnp.where(jnp.arange(n + padding) < n, padded, _PADDING_BIAS)
    out = _blocks(qkv.reshape(b * windows, n, 3, heads, d), padded, regions, block, interpret)
    return out.reshape(b, windows, n, heads, d)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _blocks(
    qkv: jax.Array, bias: jax.Array, regions: jax.Array | None, block: int, interpret: bool
) -> jax.Array:
    """`windows n 3 heads d`, `heads m m` (m: n, padded), `regions n` -> `windows n heads d`."""
    return _forward(qkv, bias, regions, block, interpret)[0]


def _forward(
    qkv: jax.Array, bias: jax.Array, regions: jax.Array | None, block: int, interpret: bool
) -> tuple[jax.Array, tuple[Any, ...]]:
    windows, n, _, heads, d = qkv.shape
    out_spec, row_spec, inputs = _specs(qkv, bias, regions, 1)
    out, lse = pl.pallas_call(
        optional_input(_forward_kernel, 2, regions is not None, block=block),
        grid=(windows, heads, bias.shape[-1] // block),
        in_specs=inputs,
        out_specs=[out_spec, row_spec],
        out_shape=[
            jax.ShapeDtypeStruct((windows, n, heads, d), qkv.dtype),
            jax.ShapeDtypeStruct((windows, heads, n), bias.dtype),
        ],
        **_options(interpret, "window_attention", d),
    )(qkv, bias, *_optional(regions))
    return out, (qkv, bias, regions, out, lse)


def _backward(
    block: int, interpret: bool, saved: tuple[Any, ...], d_out: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
    qkv, bias, regions, out, lse = saved
    windows, _, _, heads, d = qkv.shape
    blocks = bias.shape[-1] // block
    arguments = d_out, out, lse, qkv, bias, *_optional(regions)
    out_spec, row_spec, inputs = _specs(qkv, bias, regions, 1)
    d_qkv = pl.pallas_call(
        optional_input(_backward_kernel, 5, regions is not None, block=block),
        grid=(windows, heads, blocks),
        in_specs=[out_spec, out_spec, row_spec, *inputs],
        out_specs=inputs[0],
        out_shape=jax.ShapeDtypeStruct(qkv.shape, qkv.dtype),
        **_options(interpret, "window_attention_gradient", d),
    )(*arguments)
    parts = _parts(windows, heads * blocks**2)
    out_spec, row_spec, inputs = _specs(qkv, bias, regions, windows // parts)
    d_bias = pl.pallas_call(
        optional_input(_bias_kernel, 5, regions is not None, block=block),
        grid=(parts, heads, blocks**2),
        in_specs=[out_spec, out_spec, row_spec, *inputs],
        out_specs=pl.BlockSpec(
            (None, None, block, block), lambda w, h, i: (w, h, i // blocks, i % blocks)
        ),
        out_shape=jax.ShapeDtypeStruct((parts, *bias.shape), bias.dtype),
        **_options(interpret, "window_attention_bias_gradient", d),
    )(*arguments)
    return d_qkv, jnp.sum(d_bias, axis=0), None


_blocks.defvjp(_forward, _backward)


def _parts(windows: int, programs: int) -> int:
    """Into how many equal sums of windows `d_bias` is cut: enough to fill the GPU."""
    wanted = -(-_BIAS_PROGRAMS // programs)
    return next(parts for parts in range(min(wanted, windows), 0, -1) if windows % parts == 0)


def _specs(
    qkv: jax.Array, bias: jax.Array, regions: jax.Array | None, each: int
) -> tuple[pl.BlockSpec, pl.BlockSpec, list[pl.BlockSpec]]:
    """What a program for `each` windows and one head sees.

    Returns:
        Of `out` `each n d`; of `lse` `each n`; of (qkv, bias, regions) `each n 3 d`, `m m` and,
        where there are any, all regions.
    """
    _, n, _, _, d = qkv.shape
    size = bias.shape[-1]
    inputs = [
        pl.BlockSpec((each, n, 3, None, d), lambda w, h, i: (w, 0, 0, h, 0)),
        pl.BlockSpec((None, size, size), lambda w, h, i: (h, 0, 0)),
    ]
    if regions is not None:
        inputs.append(pl.BlockSpec(regions.shape, lambda w, h, i: (0, 0)))
    out = pl.BlockSpec((each, n, None, d), lambda w, h, i: (w, 0, h, 0))
    return out, pl.BlockSpec((each, None, n), lambda w, h, i: (w, h, 0)), inputs


def _options(interpret: bool, name: str, d: int) -> dict[str, Any]:
    # Heads of 64 channels: with 4 warps an A100's gradient spills twice as many registers.
    parameters = triton.CompilerParams(num_warps=4 if d <= 32 else 8, num_stages=2)
    return {"interpret": interpret, "name": name, "compiler_params": parameters}


def _optional(regions: jax.Array | None) -> list[jax.Array]:
    return [] if regions is None else [regions]


def _forward_kernel(qkv: Any, bias: Any, regions: Any, out: Any, lse: Any, *, block: int) -> None:
    """One block of queries of one window and head, by an online softmax."""
    own, region_of = pl.program_id(2), _region_of(regions, pl.program_id(0))
    query = _query(qkv, 0, own, block)

    def add(j: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        row_max, row_sum, weighted = state
        key, value = (_tokens(qkv, 0, j, block, part) for part in (1, 2))
        scores = _scores(query, key, _tile(bias, own, j, block), region_of, own, j)
        new_max = jnp.maximum(row_max, jnp.max(scores, axis=1))
        exponentials, rescale = jnp.exp(scores - new_max[:, None]), jnp.exp(row_max - new_max)
        weighted = weighted * rescale[:, None]
        weighted = weighted + product(exponentials.astype(value.dtype), value, (1, 0))
        return new_max, row_sum * rescale + jnp.sum(exponentials, axis=1), weighted

    start = (
        jnp.full((block,), _PADDING_BIAS, bias.dtype),
        jnp.zeros((block,), bias.dtype),
        jnp.zeros(query.shape, bias.dtype),
    )
    row_max, row_sum, weighted = lax.fori_loop(0, bias.shape[-1] // block, add, start)
    _store(out, own, weighted / row_sum[:, None])
    place, mask = _rows(lse, 0, own, block)
    triton.store(place, row_max + jnp.log(row_sum), mask=mask)


def _backward_kernel(
    d_out: Any, out: Any, lse: Any, qkv: Any, bias: Any, regions: Any, d_qkv: Any, *, block: int
) -> None:
    """One block of tokens of one window and head: as queries, then as keys with their values."""
    own, region_of = pl.program_id(2), _region_of(regions, pl.program_id(0))
    blocks = bias.shape[-1] // block
    query = _query(qkv, 0, own, block)
    key, value = (_tokens(qkv, 0, own, block, part) for part in (1, 2))
    row = _row(d_out, out, lse, 0, own, block)
    zeros = jnp.zeros(query.shape, bias.dtype)

    def as_queries(j: jax.Array, d_query: jax.Array) -> jax.Array:
        keys, values = (_tokens(qkv, 0, j, block, part) for part in (1, 2))
        scores = _scores(query, keys, _tile(bias, own, j, block), region_of, own, j)
        _, d_scores = _gradient(scores, values, *row)
        return d_query + product(d_scores.astype(keys.dtype), keys, (1, 0))

    def as_keys(i: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        d_key, d_value = state
        queries, rows = _query(qkv, 0, i, block), _row(d_out, out, lse, 0, i, block)
        scores = _scores(queries, key, _tile(bias, i, own, block), region_of, i, own)
        weights, d_scores = _gradient(scores, value, *rows)
        d_key = d_key + product(d_scores.astype(queries.dtype), queries, (0, 0))
        return d_key, d_value + product(weights.astype(queries.dtype), rows[0], (0, 0))

    d_query = lax.fori_loop(0, blocks, as_queries, zeros)
    _store(d_qkv, own, d_query * qkv.shape[-1] ** -0.5, 0)
    d_key, d_value = lax.fori_loop(0, blocks, as_keys, (zeros, zeros))
    _store(d_qkv, own, d_key, 1)
    _store(d_qkv, own, d_value, 2)


def _bias_kernel(
    d_out: Any, out: Any, lse: Any, qkv: Any, bias: Any, regions: Any, d_bias: Any, *, block: int
) -> None:
    """One block of queries with one of keys, of one head, summed over its windows."""
    each, blocks = qkv.shape[0], bias.shape[-1] // block
    i, j = pl.program_id(2) // blocks, pl.program_id(2) % blocks
    first, tile = pl.program_id(0) * each, _tile(bias, i, j, block)

    def add(window: jax.Array, total: jax.Array) -> jax.Array:
        key, value = (_tokens(qkv, window, j, block, part) for part in (1, 2))
        query, region_of = _query(qkv, window, i, block), _region_of(regions, first + window)
        scores = _scores(query, key, tile, region_of, i, j)
        return total + _gradient(scores, value, *_row(d_out, out, lse, window, i, block))[1]

    d_bias[...] = lax.fori_loop(0, each, add, jnp.zeros((block, block), d_bias.dtype))


def _tile(bias: Any, i: Any, j: Any, block: int) -> jax.Array:
    return bias[pl.ds(i * block, block), pl.ds(j * block, block)]


def _scores(
    query: jax.Array,
    key: jax.Array,
    tile: jax.Array,
    region_of: Callable[..., jax.Array] | None,
    i: Any,
    j: Any,
) -> jax.Array:
    """The logits of block i of the queries (scaled) and block j of the keys; the bias' tile."""
    block = query.shape[0]
    scores = product(query, key, (1, 1)) + tile
    if region_of is None:
        return scores
    same = region_of(i, block)[:, None] == region_of(j, block)[None, :]
    return scores + jnp.where(same, 0.0, MASKED).astype(scores.dtype)


def _gradient(
    scores: jax.Array, value: jax.Array, d_out: jax.Array, delta: jax.Array, lse: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The softmax of a block of scores, and the gradient with respect to the scores."""
    weights = jnp.exp(scores - lse[:, None])
    return weights, weights * (product(d_out, value, (1, 1)) - delta[:, None])


def _row(
    d_out: Any, out: Any, lse: Any, window: Any, i: Any, block: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of block i of the queries `d_out`, `delta` (each row's sum of `d_out * out`) and `lse`."""
    gradient, output = (_tokens(reference, window, i, block) for reference in (d_out, out))
    wide = jnp.promote_types(gradient.dtype, jnp.float32)
    delta = jnp.sum(gradient.astype(wide) * output.astype(wide), axis=1)
    place, mask = _rows(lse, window, i, block)
    return gradient, delta, triton.load(place, mask=mask, other=0)


def _query(qkv: Any, window: Any, i: Any, block: int) -> jax.Array:
    return _tokens(qkv, window, i, block, 0) * qkv.shape[-1] ** -0.5


def _tokens(reference: Any, window: Any, i: Any, block: int, *part: int) -> jax.Array:
    """Block i of `windows n [3] d`; zeros where there is no such token or channel."""
    place, mask = _place(reference, window, i, block, *part)
    return triton.load(place, mask=mask, other=0)


def _store(reference: Any, i: Any, values: jax.Array, *part: int) -> None:
    """Block i of the first window."""
    place, mask = _place(reference, 0, i, values.shape[0], *part)
    triton.store(place, values.astype(reference.dtype), mask=mask)


def _place(reference: Any, window: Any, i: Any, block: int, *part: int) -> tuple[Any, jax.Array]:
    n, d = reference.shape[1], reference.shape[-1]
    wide = max(16, pl.next_power_of_2(d))
    mask = (i * block + jnp.arange(block) < n)[:, None] & (jnp.arange(wide) < d)[None]
    inner = [_number(index) for index in part]
    channels = pl.ds(_number(0), wide)  # JAX 0.12 refuses a plain 0 where `wide` goes beyond d
    return reference.at[_number(window), pl.ds(i * block, block), *inner, channels], mask


def _rows(reference: Any, window: Any, i: Any, block: int) -> tuple[Any, jax.Array]:
    """Block i of `windows n`."""
    mask = i * block + jnp.arange(block) < reference.shape[1]
    return reference.at[_number(window), pl.ds(i * block, block)], mask


def _number(index: Any) -> Any:
    """An index as an array: JAX's interpreter of kernels takes no plain integer beside a mask."""
    return lax.full((), index, jnp.int32) if isinstance(index, int) else index


def _region_of(regions: Any, window: Any) -> Callable[..., jax.Array] | None:
    """(i, block) -> the regions of block i of a window's tokens."""
    if regions is None:
        return None

    def load(i: Any, block: int) -> jax.Array:
        place, mask = _rows(regions, window % regions.shape[0], i, block)
        return triton.load(place, mask=mask, other=0)

    return load
