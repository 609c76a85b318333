"""Attention over a list of key/value segments.

The past of a query is a list of *segments*, each computed once at its own batch size: the constant part of a prompt at
batch 1, a prompt at batch A, the responses at batch A·G. A segment of batch b serves B = b·r query rows: row i of the
queries reads row i // r of the segment. The r repeats join the query axis of the product, so that nothing is stored or
computed twice. The partial softmax of each segment (maximum, sum, weighted values) is merged exactly.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Shaped

from nla_jax.models.cpu_forms import by_platform, few_rows_at_a_time, product_of_matrices, scores_of_matrices

MASKED = -1e30  # a finite stand-in for -inf: a segment without visible keys gets weight exp(-1e30 - max) = 0, not NaN
SAVED = "attention"  # the name under which a remat policy can save what the backward pass of `attend` needs
Queries = Float[Array, "B T M H"]


class Segment(NamedTuple):
    """Keys and values of one layer that queries may read. Heads come before positions, so that no read of a cache has
    to transpose it. `mask`: True where query t may read key s (None in a gradient)."""

    k: Float[Array, "b N S H"]
    v: Float[Array, "b N S H"]
    mask: Bool[Array, "#b #T S"] | None


def causal_mask(length: int) -> Bool[Array, "1 {length} {length}"]:
    """True where a key does not come after the query."""
    return jnp.tril(jnp.ones((1, length, length), bool))


def soft_cap(x: Float[Array, "*B"], cap: float | None) -> Float[Array, "*B"]:
    """cap · tanh(x / cap): nearly x for small x, never beyond ±cap. Without a cap: x."""
    return x if cap is None else cap * jnp.tanh(x / cap)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def attend(q: Queries, segments: Sequence[Segment], scale: float, cap: float | None = None) -> Queries:
    """softmax(scale · q kᵀ) v over the keys of all segments together; scores and softmax in float32.

    M query heads share N key/value heads in groups of g = M/N (grouped-query attention). `cap` bounds scores as Gemma 2
    does (`soft_cap`). The backward pass is that of flash attention: it keeps the result and the log-sum-exp of each
    row's scores, and computes the scores again."""
    return _attend_forward(q, segments, scale, cap)[0]


def _attend_forward(q, segments, scale, cap):
    forward = lambda rows, segments: (_forward(*rows, segments, scale, cap), None)
    results, _ = few_rows_at_a_time(forward, (q,), segments)
    out, log_total = (checkpoint_name(x, SAVED) for x in results)
    return out, (q, segments, out, log_total)


def _attend_backward(scale, cap, saved, d_out):
    """The gradients of q and of each segment's keys and values."""
    q, segments, out, log_total = saved
    backward = lambda rows, segments: _backward(*rows, segments, scale, cap)
    return few_rows_at_a_time(backward, (q, d_out.astype(q.dtype), out, log_total), segments)


attend.defvjp(_attend_forward, _attend_backward)


def _forward(q: Queries, segments: Sequence[Segment], scale: float, cap: float | None) -> tuple[Queries, Array]:
    """The result, and the log-sum-exp `[B, T, M]` of each row's scores."""
    parts = []
    for segment in segments:
        scores, _ = _scores(_fold(q, segment), segment, scale, cap)
        top = scores.max(-1)
        weights = jnp.exp(scores - top[..., None])
        out = product("bNrTgS,bNSH->bNrTgH", weights.astype(q.dtype), segment.v)
        parts.append([_unfold(x, q) for x in (top, weights.sum(-1), out)])
    top = functools.reduce(jnp.maximum, [part[0] for part in parts])
    total, out = 0.0, 0.0
    for part_top, part_total, part_out in parts:
        weight = jnp.exp(part_top - top)
        total += part_total * weight
        out += part_out * weight[..., None]
    return (out / total[..., None]).astype(q.dtype), top + jnp.log(total)


def _backward(
    q: Queries, d_out: Queries, out: Queries, log_total: Float[Array, "B T M"], segments: Sequence[Segment], scale, cap
) -> tuple[Queries, list[Segment]]:
    """With P = exp(scores - log_total): dv = Pᵀ do, d(scores) = P · (do vᵀ - Σ do · o)."""
    delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), -1)
    d_q, d_segments = 0.0, []
    for segment in segments:
        queries, d_o, log, mean = (_fold(x, segment) for x in (q, d_out, log_total, delta))
        scores, slope = _scores(queries, segment, scale, cap)
        weights = jnp.exp(scores - log[..., None])
        d_scores = weights * (product("bNrTgH,bNSH->bNrTgS", d_o, segment.v) - mean[..., None]) * slope
        weights, d_scores = weights.astype(q.dtype), d_scores.astype(q.dtype)
        d_q += _unfold(product("bNrTgS,bNSH->bNrTgH", d_scores, segment.k), q)
        # HS, then transposed: CPUs read the first operand by columns, slowly, and that of width H is the smaller one.
        d_k = product("bNrTgH,bNrTgS->bNHS", queries, d_scores).swapaxes(2, 3)
        d_v = product("bNrTgH,bNrTgS->bNHS", d_o, weights).swapaxes(2, 3)
        d_segments.append(Segment(d_k.astype(segment.k.dtype), d_v.astype(segment.v.dtype), None))
    return d_q.astype(q.dtype), d_segments


def _scores(queries: Float[Array, "b N r T g H"], segment: Segment, scale: float, cap: float | None) -> tuple:
    """Masked scores `[b, N, r, T, g, S]`, and the derivative of each by its dot product q·k."""
    scores, slope = scale * product("bNrTgH,bNSH->bNrTgS", queries, segment.k, scores_of_matrices), scale
    if cap is not None:
        scores = soft_cap(scores, cap)
        slope = scale * (1 - (scores / cap) ** 2)
    return jnp.where(segment.mask[:, None, None, :, None], scores, MASKED), slope


def product(letters: str, x: Array, y: Array, cpu: Callable = product_of_matrices) -> Float[Array, "b N ..."]:
    """The einsum of x and y `[b, N, ...]` for each b and N, summed in float32. `cpu`: the form that CPUs compute."""
    left, right, _ = letters.replace("->", ",").split(",")
    summed = [letter for letter in left[2:] if letter in right]
    # Not `jnp.einsum`: it sums in alphabetical order (T, g, r), for which XLA would transpose the operands.
    axes = tuple([operand.index(letter) for letter in summed] for operand in (left, right)), ((0, 1), (0, 1))
    plain = lambda x, y: jax.lax.dot_general(x, y, axes, preferred_element_type=jnp.float32)
    return by_platform(plain, functools.partial(cpu, letters))(x, y)


def _fold(x: Shaped[Array, "B T M *rest"], segment: Segment) -> Shaped[Array, "b N r T g *rest"]:
    """Groups queries by the row and head of the segment that they read."""
    b, N = segment.k.shape[:2]
    B, T, M, *rest = x.shape
    return jnp.moveaxis(x.reshape(b, B // b, T, N, M // N, *rest), 3, 1)


def _unfold(x: Shaped[Array, "b N r T g *rest"], q: Queries) -> Shaped[Array, "B T M *rest"]:
    """The inverse of `_fold`, for rows and heads as in q."""
    return jnp.moveaxis(x, 1, 3).reshape(*q.shape[:3], *x.shape[5:])
