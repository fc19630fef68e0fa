"""Attention inside windows on a GPU, without writing the scores: Pallas kernels for Triton.

The scores go through the chip block by block, as in FlashAttention-2
(https://arxiv.org/abs/2307.08691): the gradient computes them again from the rows' logarithms.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from voco_jax.models.attention import MASKED, product

_BLOCK = 64  # queries, and keys, worked on at once; Triton wants powers of two from 16 on
_BIAS_PROGRAMS = 1024  # at least so many share the bias' gradient, where there are windows enough
_NOTHING = -1e30  # the bias of a key that only fills a block; exp makes 0 of it, and never nan


def attend_blocks(
    qkv: jax.Array, bias: jax.Array, regions: jax.Array | None, *, interpret: bool = False
) -> jax.Array:
    """`attention.attend` on a GPU; arguments and result as there.

    Memory holds queries, keys, values and results as the linear layers before and after do, so
    nothing is transposed. The gradient with respect to the bias is summed in float32 and in the
    same order every time.

    Args:
        qkv: see `attend`.
        bias: see `attend`.
        regions: see `attend`.
        interpret: run the kernels as plain JAX, on any device; for tests.
    """
    b, windows, n, _, heads, d = qkv.shape
    block = min(_BLOCK, max(16, pl.next_power_of_2(n)))
    rest = -n % block
    filled = jnp.pad(bias, ((0, 0), (0, rest), (0, rest)))
    filled = jnp.where(jnp.arange(n + rest) < n, filled, _NOTHING)
    out = _blocks(qkv.reshape(b * windows, n, 3, heads, d), filled, regions, block, interpret)
    return out.reshape(b, windows, n, heads, d)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _blocks(
    qkv: jax.Array, bias: jax.Array, regions: jax.Array | None, block: int, interpret: bool
) -> jax.Array:
    """`windows n 3 heads d`, `heads m m` (m: n, filled), `kinds n` -> `windows n heads d`."""
    return _forward(qkv, bias, regions, block, interpret)[0]


def _forward(
    qkv: jax.Array, bias: jax.Array, regions: jax.Array | None, block: int, interpret: bool
) -> tuple[jax.Array, tuple[Any, ...]]:
    windows, n, _, heads, d = qkv.shape
    found, rows, inputs = _specs(qkv, bias, regions, 1)
    out, logs = pl.pallas_call(
        _kernel(_forward_kernel, 2, regions, block),
        grid=(windows, heads, bias.shape[-1] // block),
        in_specs=inputs,
        out_specs=[found, rows],
        out_shape=[
            jax.ShapeDtypeStruct((windows, n, heads, d), qkv.dtype),
            jax.ShapeDtypeStruct((windows, heads, n), bias.dtype),
        ],
        **_how(interpret, "window_attention", d),
    )(qkv, bias, *_given(regions))
    return out, (qkv, bias, regions, out, logs)


def _backward(
    block: int, interpret: bool, saved: tuple[Any, ...], upper: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
    qkv, bias, regions, out, logs = saved
    windows, _, _, heads, d = qkv.shape
    blocks = bias.shape[-1] // block
    given = upper, out, logs, qkv, bias, *_given(regions)
    found, rows, inputs = _specs(qkv, bias, regions, 1)
    of_qkv = pl.pallas_call(
        _kernel(_backward_kernel, 5, regions, block),
        grid=(windows, heads, blocks),
        in_specs=[found, found, rows, *inputs],
        out_specs=inputs[0],
        out_shape=jax.ShapeDtypeStruct(qkv.shape, qkv.dtype),
        **_how(interpret, "window_attention_gradient", d),
    )(*given)
    parts = _parts(windows, heads * blocks**2)
    found, rows, inputs = _specs(qkv, bias, regions, windows // parts)
    of_bias = pl.pallas_call(
        _kernel(_bias_kernel, 5, regions, block),
        grid=(parts, heads, blocks**2),
        in_specs=[found, found, rows, *inputs],
        out_specs=pl.BlockSpec(
            (None, None, block, block), lambda w, h, i: (w, h, i // blocks, i % blocks)
        ),
        out_shape=jax.ShapeDtypeStruct((parts, *bias.shape), bias.dtype),
        **_how(interpret, "window_attention_bias_gradient", d),
    )(*given)
    return of_qkv, jnp.sum(of_bias, axis=0), None


_blocks.defvjp(_forward, _backward)


def _parts(windows: int, programs: int) -> int:
    """Into how many equal sums of windows the bias' gradient is cut: enough to fill the GPU."""
    wanted = -(-_BIAS_PROGRAMS // programs)
    return next(parts for parts in range(min(wanted, windows), 0, -1) if windows % parts == 0)


def _specs(
    qkv: jax.Array, bias: jax.Array, regions: jax.Array | None, each: int
) -> tuple[pl.BlockSpec, pl.BlockSpec, list[pl.BlockSpec]]:
    """What a program for `each` windows and one head sees.

    Returns:
        Of what heads find `each n d`; of a number for each of its rows `each n`; of (qkv, bias,
        regions) `each n 3 d`, `m m` and, where there are any, all regions.
    """
    _, n, _, _, d = qkv.shape
    size = bias.shape[-1]
    inputs = [
        pl.BlockSpec((each, n, 3, None, d), lambda w, h, i: (w, 0, 0, h, 0)),
        pl.BlockSpec((None, size, size), lambda w, h, i: (h, 0, 0)),
    ]
    if regions is not None:
        inputs.append(pl.BlockSpec(regions.shape, lambda w, h, i: (0, 0)))
    found = pl.BlockSpec((each, n, None, d), lambda w, h, i: (w, 0, h, 0))
    return found, pl.BlockSpec((each, None, n), lambda w, h, i: (w, h, 0)), inputs


def _how(interpret: bool, name: str, d: int) -> dict[str, Any]:
    # Heads of 64 channels: with 4 warps an A100's gradient spills twice as many registers.
    parameters = triton.CompilerParams(num_warps=4 if d <= 32 else 8, num_stages=2)
    return {"interpret": interpret, "name": name, "compiler_params": parameters}


def _given(regions: jax.Array | None) -> list[jax.Array]:
    return [] if regions is None else [regions]


def _kernel(
    kernel: Callable[..., None], inputs: int, regions: jax.Array | None, block: int
) -> Callable[..., None]:
    """The kernel, with None for the regions where they are no input."""

    def run(*references: Any) -> None:
        nothing = [None] if regions is None else []
        kernel(*references[:inputs], *nothing, *references[inputs:], block=block)

    run.__name__ = kernel.__name__.strip("_")  # of the function on the GPU, for profiles
    return run


def _forward_kernel(qkv: Any, bias: Any, regions: Any, out: Any, logs: Any, *, block: int) -> None:
    """One block of queries of one window and head."""
    own, kinds = pl.program_id(2), _kinds(regions, pl.program_id(0))
    query = _query(qkv, 0, own, block)

    def add(j: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        top, total, sums = state
        key, value = (_tokens(qkv, 0, j, block, part) for part in (1, 2))
        scores = _scores(query, key, _tile(bias, own, j, block), kinds, own, j)
        higher = jnp.maximum(top, jnp.max(scores, axis=1))
        powers, shrink = jnp.exp(scores - higher[:, None]), jnp.exp(top - higher)
        sums = sums * shrink[:, None] + product(powers.astype(value.dtype), value, (1, 0))
        return higher, total * shrink + jnp.sum(powers, axis=1), sums

    start = (
        jnp.full((block,), _NOTHING, bias.dtype),
        jnp.zeros((block,), bias.dtype),
        jnp.zeros(query.shape, bias.dtype),
    )
    top, total, sums = lax.fori_loop(0, bias.shape[-1] // block, add, start)
    _store(out, own, sums / total[:, None])
    place, mask = _rows(logs, 0, own, block)
    triton.store(place, top + jnp.log(total), mask=mask)


def _backward_kernel(
    upper: Any, out: Any, logs: Any, qkv: Any, bias: Any, regions: Any, of_qkv: Any, *, block: int
) -> None:
    """One block of tokens of one window and head: as queries, then as keys with their values."""
    own, kinds = pl.program_id(2), _kinds(regions, pl.program_id(0))
    blocks = bias.shape[-1] // block
    query = _query(qkv, 0, own, block)
    key, value = (_tokens(qkv, 0, own, block, part) for part in (1, 2))
    row = _row(upper, out, logs, 0, own, block)
    empty = jnp.zeros(query.shape, bias.dtype)

    def as_queries(j: jax.Array, of_query: jax.Array) -> jax.Array:
        keys, values = (_tokens(qkv, 0, j, block, part) for part in (1, 2))
        scores = _scores(query, keys, _tile(bias, own, j, block), kinds, own, j)
        _, of_scores = _gradient(scores, values, *row)
        return of_query + product(of_scores.astype(keys.dtype), keys, (1, 0))

    def as_keys(i: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        of_key, of_value = state
        queries, rows = _query(qkv, 0, i, block), _row(upper, out, logs, 0, i, block)
        scores = _scores(queries, key, _tile(bias, i, own, block), kinds, i, own)
        weights, of_scores = _gradient(scores, value, *rows)
        of_key = of_key + product(of_scores.astype(queries.dtype), queries, (0, 0))
        return of_key, of_value + product(weights.astype(queries.dtype), rows[0], (0, 0))

    of_query = lax.fori_loop(0, blocks, as_queries, empty)
    _store(of_qkv, own, of_query * qkv.shape[-1] ** -0.5, 0)
    of_key, of_value = lax.fori_loop(0, blocks, as_keys, (empty, empty))
    _store(of_qkv, own, of_key, 1)
    _store(of_qkv, own, of_value, 2)


def _bias_kernel(
    upper: Any, out: Any, logs: Any, qkv: Any, bias: Any, regions: Any, of_bias: Any, *, block: int
) -> None:
    """One block of queries with one of keys, of one head, summed over its windows."""
    each, blocks = qkv.shape[0], bias.shape[-1] // block
    i, j = pl.program_id(2) // blocks, pl.program_id(2) % blocks
    first, tile = pl.program_id(0) * each, _tile(bias, i, j, block)

    def add(window: jax.Array, total: jax.Array) -> jax.Array:
        key, value = (_tokens(qkv, window, j, block, part) for part in (1, 2))
        query, kinds = _query(qkv, window, i, block), _kinds(regions, first + window)
        scores = _scores(query, key, tile, kinds, i, j)
        return total + _gradient(scores, value, *_row(upper, out, logs, window, i, block))[1]

    of_bias[...] = lax.fori_loop(0, each, add, jnp.zeros((block, block), of_bias.dtype))


def _tile(bias: Any, i: Any, j: Any, block: int) -> jax.Array:
    return bias[pl.ds(i * block, block), pl.ds(j * block, block)]


def _scores(
    query: jax.Array,
    key: jax.Array,
    tile: jax.Array,
    kinds: Callable[..., jax.Array] | None,
    i: Any,
    j: Any,
) -> jax.Array:
    """The logits of block i of the queries (scaled) and block j of the keys; the bias' tile."""
    block = query.shape[0]
    scores = product(query, key, (1, 1)) + tile
    if kinds is None:
        return scores
    same = kinds(i, block)[:, None] == kinds(j, block)[None, :]
    return scores + jnp.where(same, 0.0, MASKED).astype(scores.dtype)


def _gradient(
    scores: jax.Array, value: jax.Array, upper: jax.Array, mean: jax.Array, log: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The weights of a block of scores, and the gradient with respect to the scores."""
    weights = jnp.exp(scores - log[:, None])
    return weights, weights * (product(upper, value, (1, 1)) - mean[:, None])


def _row(
    upper: Any, out: Any, logs: Any, window: Any, i: Any, block: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of block i of the queries the gradient of what was found, its mean, and the logarithm.

    The mean is that of the gradients of a row's weights, weighed by them.
    """
    given, found = (_tokens(reference, window, i, block) for reference in (upper, out))
    wide = jnp.promote_types(given.dtype, jnp.float32)
    mean = jnp.sum(given.astype(wide) * found.astype(wide), axis=1)
    place, mask = _rows(logs, window, i, block)
    return given, mean, triton.load(place, mask=mask, other=0)


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
    return reference.at[_number(window), pl.ds(i * block, block), *inner, pl.ds(0, wide)], mask


def _rows(reference: Any, window: Any, i: Any, block: int) -> tuple[Any, jax.Array]:
    """Block i of `windows n`."""
    mask = i * block + jnp.arange(block) < reference.shape[1]
    return reference.at[_number(window), pl.ds(i * block, block)], mask


def _number(index: Any) -> Any:
    """An index as an array: JAX's interpreter of kernels takes no plain integer beside a mask."""
    return lax.full((), index, jnp.int32) if isinstance(index, int) else index


def _kinds(regions: Any, window: Any) -> Callable[..., jax.Array] | None:
    """(i, block) -> the regions of block i of a window's tokens."""
    if regions is None:
        return None

    def load(i: Any, block: int) -> jax.Array:
        place, mask = _rows(regions, window % regions.shape[0], i, block)
        return triton.load(place, mask=mask, other=0)

    return load
