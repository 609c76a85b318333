"""Attention over a list of key/value segments.

The past of a query is a list of *segments*, each computed once at its own batch size: the constant part of a prompt at
batch 1, a prompt at batch A, the responses at batch A·G. A segment of batch b serves B = b·r query rows, row i of the
queries reading row i // r of the segment; the r repeats are folded into the query axis of the matrix product, so that
nothing equal is stored or computed twice. Each segment yields a partial softmax (maximum, sum, weighted values); the
partials are merged exactly, as flash attention merges its blocks.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float

MASKED = -1e30  # a finite stand-in for -inf: a segment without visible keys gets weight exp(-1e30 - max) = 0, not NaN
CACHE = 4 * 2**20  # bytes of scores that a CPU computes at a time, where there are many more than that
SAVED = "attention"  # the name by which a remat policy knows what the backward pass of `attend` wants kept


@struct.dataclass
class Segment:
    """Keys and values that queries may read.

    `k, v`: `[b, N, S, H]` (N key/value heads), or `[L, b, N, S, H]` for all layers of a model together: heads before
    positions, so that no read of a cache has to transpose it.
    `mask`: `[b or 1, T or 1, S]`, True where query t may read key s. `start`: the position of its first key.
    """

    k: Float[Array, "*L b N S H"]
    v: Float[Array, "*L b N S H"]
    mask: Bool[Array, "b|1 T|1 S"]
    start: int = struct.field(pytree_node=False, default=0)


def causal_mask(length: int) -> Bool[Array, "1 T T"]:
    return jnp.tril(jnp.ones((1, length, length), bool))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def attend(
    q: Float[Array, "B T M H"], segments: Sequence[Segment], scale: float, cap: float | None = None
) -> Float[Array, "B T M H"]:
    """softmax(scale · q kᵀ) v over the union of all segments' keys; scores and softmax in float32.

    M query heads share N key/value heads in groups of M/N (grouped-query attention). `cap` bends scores as Gemma 2 does
    (`soft_cap`). The backward pass is flash attention's: it keeps the result and the logarithm of each row's sum, and
    computes the scores again."""
    return _attend_forward(q, segments, scale, cap)[0]


def _forward(q, segments: Sequence[Segment], scale: float, cap: float | None):
    """The result `[B, T, M, H]` and the log-sum-exp of each row's scores `[B, T, M]`."""
    parts = [_partial(q, segment, scale, cap) for segment in segments]
    top = functools.reduce(jnp.maximum, [part[0] for part in parts])
    total, out = 0.0, 0.0
    for part_top, part_total, part_out in parts:
        weight = jnp.exp(part_top - top)
        total += part_total * weight
        out += part_out * weight[..., None]
    return (out / total[..., None]).astype(q.dtype), top + jnp.log(total)


def soft_cap(x: Float[Array, "*B"], cap: float | None) -> Float[Array, "*B"]:
    """cap · tanh(x / cap): nearly x for small x, never beyond ±cap; x where there is no cap."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def _attend_forward(q, segments, scale, cap):
    results, _ = _few_rows_at_a_time(lambda q, segments: (_forward(*q, segments, scale, cap), None), (q,), segments)
    out, log_total = (checkpoint_name(x, SAVED) for x in results)
    return out, (q, segments, out, log_total)


def _attend_backward(scale, cap, saved, d_out):
    q, segments, out, log_total = saved
    rows = q, d_out.astype(q.dtype), out, log_total
    return _few_rows_at_a_time(lambda rows, segments: _backward(*rows, segments, scale, cap), rows, segments)


def _backward(q, d_out, out, log_total, segments: Sequence[Segment], scale: float, cap: float | None):
    """With P = exp(scores - log_total): dv = Pᵀ do, d(scores) = P · (do vᵀ - Σ do · o). The products that give dk and dv are
    written so that the small operand (of width H, not S) is the one read by columns, which CPUs do slowly."""
    delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), -1)
    d_q, d_segments = 0.0, []
    for segment in segments:
        queries, d_o, log, mean = (_fold(x, segment) for x in (q, d_out, log_total, delta))
        scores, slope = _scores(queries, segment, scale, cap)
        weights = jnp.exp(scores - log[..., None])
        d_scores = weights * (_dot(d_o, segment.v, (5,), (3,)) - mean[..., None]) * slope
        weights, d_scores = weights.astype(q.dtype), d_scores.astype(q.dtype)
        d_q += _unfold(_dot(d_scores, segment.k, (5,), (2,)), q.shape)
        rows = (2, 3, 4)
        d_k, d_v = (_dot(a, b, rows, rows).swapaxes(2, 3) for a, b in ((queries, d_scores), (d_o, weights)))
        d_segments.append(segment.replace(k=d_k.astype(segment.k.dtype), v=d_v.astype(segment.v.dtype), mask=None))
    return d_q.astype(q.dtype), d_segments


attend.defvjp(_attend_forward, _attend_backward)


def _few_rows_at_a_time(function: Callable, rows: tuple, segments: Sequence[Segment]):
    """`function(rows, segments) -> (results of the rows, results of each segment or None)`; on a CPU for so few rows at a time
    that their scores stay in its cache, results of a segment that all rows read being summed."""
    B, T, M, _ = rows[0].shape
    whole = [c for c in range(1, B + 1) if B % c == 0 and all(c * len(s.k) % B == 0 for s in segments if len(s.k) > 1)]
    row_bytes = 4 * T * M * sum(s.k.shape[2] for s in segments)
    c = max((c for c in whole if c * row_bytes <= CACHE), default=min(whole))
    few = c == B or B * row_bytes <= 8 * CACHE  # what is not much larger than the cache gains nothing
    if few or jax.sharding.get_abstract_mesh().size > 1:  # on a mesh every device's rows would have to be cut
        return function(rows, segments)

    def by_parts(rows, segments):
        leaves, tree = jax.tree.flatten(segments)
        cut = [len(x) > 1 for x in leaves]

        def some(x):
            rows, own = x
            own = iter(own)
            return function(rows, tree.unflatten([next(own) if cut else x for x, cut in zip(leaves, cut)]))

        parts = lambda x: x.reshape(B // c, -1, *x.shape[1:])
        joined = lambda x: x.reshape(-1, *x.shape[2:])
        own = [x for x, cut in zip(leaves, cut) if cut]
        results, of_segments = jax.lax.map(some, jax.tree.map(parts, (rows, own)))
        if of_segments is not None:
            summed = lambda x: jnp.sum(x, 0)
            of_segments = [jax.tree.map(joined if len(s.k) > 1 else summed, r) for r, s in zip(of_segments, segments)]
        return jax.tree.map(joined, results), of_segments

    return jax.lax.platform_dependent(rows, segments, cpu=by_parts, default=function)


def _partial(q, segment: Segment, scale: float, cap: float | None):
    """One segment's maximum `[B, T, M]`, sum of exponentials `[B, T, M]` and unnormalised values `[B, T, M, H]`."""
    scores, _ = _scores(_fold(q, segment), segment, scale, cap)
    top = scores.max(-1)
    weights = jnp.exp(scores - top[..., None])
    out = _dot(weights.astype(q.dtype), segment.v, (5,), (2,))
    return [_unfold(x, q.shape) for x in (top, weights.sum(-1), out)]


def _scores(queries, segment: Segment, scale: float, cap: float | None):
    """Masked scores `[b, N, r, T, M/N, S]` of folded queries, and the derivative of each by the dot product q·k."""
    scores, slope = scale * _products(queries, segment.k), scale
    if cap is not None:
        scores = soft_cap(scores, cap)
        slope = scale * (1 - (scores / cap) ** 2)
    return jnp.where(segment.mask[:, None, None, :, None], scores, MASKED), slope


def _products(queries, keys):
    """q·k of all queries and keys. Of two operands a CPU reads the second by columns, which it does slowly: when decoding, that
    should be the few queries."""
    plain = lambda queries, keys: _dot(queries, keys, (5,), (3,))
    if np.prod(queries.shape[2:5]) >= keys.shape[2]:
        return plain(queries, keys)
    swapped = lambda queries, keys: jnp.moveaxis(_dot(keys, queries, (3,), (5,)), 2, -1)
    return jax.lax.platform_dependent(queries, keys, cpu=swapped, default=plain)


def _dot(x, y, x_axes: tuple[int, ...], y_axes: tuple[int, ...]):
    """The product of x and y over the named axes, for each of their first two (batch, key/value head), in float32."""

    batch, product = ((0, 1), (0, 1)), functools.partial(jax.lax.dot_general, preferred_element_type=jnp.float32)
    plain = lambda x, y: product(x, y, ((x_axes, y_axes), batch))

    def of_matrices(x, y):
        """The same with all queries of a row and head in one axis: of several, a CPU would write transposed copies first."""
        axes = tuple((3,) if axes == (z.ndim - 1,) else (2,) for z, axes in ((x, x_axes), (y, y_axes)))
        rows = (z.reshape(*z.shape[:2], -1, z.shape[-1]) for z in (x, y))
        return product(*rows, (axes, batch)).reshape(jax.eval_shape(plain, x, y).shape)

    if jax.sharding.get_abstract_mesh().size > 1:  # which may cut the queries along any of their axes
        return plain(x, y)
    return jax.lax.platform_dependent(x, y, cpu=of_matrices, default=plain)


def _fold(x, segment: Segment):
    """`[B, T, M, ...]` as `[b, N, r, T, M/N, ...]`: beside each row and head of a segment all the queries that read it."""
    b, N = segment.k.shape[:2]
    B, T, M, *rest = x.shape
    x = x.reshape(b, B // b, T, N, M // N, *rest)
    return jnp.moveaxis(x, 3, 1)


def _unfold(x, shape):
    """The inverse of `_fold`, for queries of the given shape `[B, T, M, H]`."""
    return jnp.moveaxis(x, 1, 3).reshape(*shape[:3], *x.shape[5:])
