"""Attention over a list of key/value segments.

The past of a query is a list of *segments*, each computed once at its own batch size: the constant part of a prompt at
batch 1, a prompt at batch A, the responses at batch A·G. A segment of batch b serves B = b·r query rows, row i of the
queries reading row i // r of the segment; the r repeats are folded into the query axis of the matrix product, so that
nothing equal is stored or computed twice. Each segment yields a partial softmax (maximum, sum, weighted values); the
partials are merged exactly, as flash attention merges its blocks.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float

MASKED = -1e30  # a finite stand-in for -inf: a segment without visible keys gets weight exp(-1e30 - max) = 0, not NaN


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


def attend(
    q: Float[Array, "B T M H"], segments: Sequence[Segment], scale: float, cap: float | None = None
) -> Float[Array, "B T M H"]:
    """softmax(scale · q kᵀ) v over the union of all segments' keys; scores and softmax in float32.

    M query heads share N key/value heads in groups of M/N (grouped-query attention). `cap` bends scores as Gemma 2 does
    (`soft_cap`).
    """
    parts = [_partial(q, segment, scale, cap) for segment in segments]
    top = functools.reduce(jnp.maximum, [part[0] for part in parts])
    total, out = 0.0, 0.0
    for part_top, part_total, part_out in parts:
        weight = jnp.exp(part_top - top)
        total += part_total * weight
        out += part_out * weight[..., None]
    return (out / total[..., None]).astype(q.dtype)


def soft_cap(x: Float[Array, "*B"], cap: float | None) -> Float[Array, "*B"]:
    """cap · tanh(x / cap): nearly x for small x, never beyond ±cap; x where there is no cap."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def _partial(q, segment: Segment, scale: float, cap: float | None):
    """One segment's maximum `[B, T, M]`, sum of exponentials `[B, T, M]` and unnormalised values `[B, T, M, H]`."""
    B, T, M, H = q.shape
    b, N, S, _ = segment.k.shape
    q = q.reshape(b, B // b, T, N, M // N, H)
    scores = scale * jnp.einsum("brtngh,bnsh->bngrts", q, segment.k, preferred_element_type=jnp.float32)
    scores = jnp.where(segment.mask[:, None, None, None], soft_cap(scores, cap), MASKED)
    # The merged result does not depend on the reference point, so no gradient need flow through it.
    top = jax.lax.stop_gradient(scores.max(-1))
    weights = jnp.exp(scores - top[..., None])
    out = jnp.einsum("bngrts,bnsh->brtngh", weights.astype(q.dtype), segment.v, preferred_element_type=jnp.float32)
    rows = lambda x: x.transpose(0, 3, 4, 1, 2).reshape(B, T, M)
    return rows(top), rows(weights.sum(-1)), out.reshape(B, T, M, H)
