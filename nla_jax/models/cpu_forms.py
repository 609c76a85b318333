"""Faster forms of some computations for CPUs. All other platforms compute the plain forms in attention.py and layers.py.

XLA's CPU backend is slow where rows of a matrix product are spread over several axes (it first writes a transposed copy),
where it reads the larger operand by columns, and where scores of attention outgrow the cache. Each operation chooses its
form once, with `by_platform`; both forms give the same result up to rounding.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

CACHE = 4 * 2**20  # bytes of attention scores that a CPU computes at a time, if there are many times more


def by_platform(plain: Callable, cpu: Callable) -> Callable:
    """A function that computes `cpu` on a CPU and `plain` elsewhere. Both take and return the same arrays.

    On a mesh it is always `plain`: CPU forms merge axes, and the mesh may cut those."""
    if jax.sharding.get_abstract_mesh().size > 1:
        return plain
    return lambda *operands: jax.lax.platform_dependent(*operands, cpu=cpu, default=plain)


def product_of_matrices(letters: str, x: Float[Array, "b N ..."], y: Float[Array, "b N ..."]) -> Float[Array, "b N ..."]:
    """`attention.product` with all queries of a row and head (axes r, T, g) in one axis q."""
    left, right, result = letters.replace("->", ",").split(",")
    sizes = dict(zip(left + right, x.shape + y.shape))
    x, y = (z.reshape(*z.shape[:2], -1, z.shape[-1]) for z in (x, y))
    letters = letters.replace("rTg", "q")
    if letters == "bNqH,bNSH->bNqS" and x.shape[2] < y.shape[2]:
        # A CPU reads the second operand of x·yᵀ by columns, slowly. When decoding, let that be the few queries.
        out = jnp.einsum("bNSH,bNqH->bNSq", y, x, preferred_element_type=jnp.float32).swapaxes(2, 3)
    else:
        out = jnp.einsum(letters, x, y, preferred_element_type=jnp.float32)
    return out.reshape([sizes[letter] for letter in result])


def product_over_rows(x: Float[Array, "..."], y: Float[Array, "..."], rows: int) -> Float[Array, "..."]:
    """xᵀ y, summed over their first `rows` axes, as one product of matrices: a CPU then reads xᵀ without writing it."""
    a, b = (z.reshape(np.prod(z.shape[:rows], dtype=int), -1) for z in (x, y))
    return jnp.tensordot(a, b, (0, 0)).reshape(x.shape[rows:] + y.shape[rows:])


def few_rows_at_a_time(function: Callable, rows: tuple[Float[Array, "B T M ..."], ...], segments: Any) -> tuple:
    """`function(rows, segments)`; on a CPU for so few rows at a time that their attention scores stay in its cache.

    `segments` are an `attention.Segment` each, of which row i of B reads row i // r of b = B / r. The function returns a
    tree of arrays `[B, ...]`, and for each segment a tree of arrays `[b, ...]` (or None instead of all of these). Results
    of a segment of b = 1, which every row reads, are added up."""
    B, T, M = rows[0].shape[:3]
    shared = [len(s.k) == 1 for s in segments]
    fits = lambda c: B % c == 0 and all(one or c * len(s.k) % B == 0 for s, one in zip(segments, shared))
    row_bytes = 4 * T * M * sum(s.k.shape[2] for s in segments)
    counts = [c for c in range(1, B + 1) if fits(c)]
    count = max((c for c in counts if c * row_bytes <= CACHE), default=min(counts))
    if count == B or B * row_bytes <= 8 * CACHE:  # little more than the cache holds gains nothing
        return function(rows, segments)

    cut = lambda x: x.reshape(B // count, -1, *x.shape[1:])
    joined = lambda x: x.reshape(-1, *x.shape[2:])
    added = lambda x: jnp.sum(x, 0)

    def by_parts(rows, segments):
        leaves, tree = jax.tree.flatten(segments)
        own = {i: x for i, x in enumerate(leaves) if len(x) > 1}

        def one_part(part):
            rows, own = part
            return function(rows, tree.unflatten([own.get(i, x) for i, x in enumerate(leaves)]))

        results, of_segments = jax.lax.map(one_part, jax.tree.map(cut, (rows, own)))
        if of_segments is not None:
            of_segments = [jax.tree.map(added if one else joined, r) for r, one in zip(of_segments, shared)]
        return jax.tree.map(joined, results), of_segments

    return by_platform(function, cpu=by_parts)(rows, segments)
