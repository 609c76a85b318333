"""Faster forms of some computations for CPUs. Other platforms compute the plain forms, in attention.py and layers.py.

XLA's CPU backend is slow if the rows of a matrix product are spread over several axes (it writes a transposed copy), if
it reads the larger operand by columns, and if scores outgrow the cache. Arrays of 16 bits it multiplies as they are only
if both operands lie row by row and the first is summed over its columns; all others it first casts to float32, which
costs twice the time. Each operation chooses once, by `by_platform`.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

CACHE = 4 * 2**20  # bytes of attention scores that a CPU computes at a time, if there are many times more


def by_platform(plain: Callable, cpu: Callable, on_mesh: bool = False) -> Callable:
    """A function that computes `cpu` on a CPU and `plain` elsewhere; both take and return the same arrays. On a mesh it
    does so only with `on_mesh`: most CPU forms merge axes that the mesh may cut."""
    if jax.sharding.get_abstract_mesh().size > 1 and not on_mesh:
        return plain
    return lambda *operands: jax.lax.platform_dependent(*operands, cpu=cpu, default=plain)


def for_halves(plain: Callable, cpu: Callable, on_mesh: bool = False) -> Callable:
    """`by_platform` of arrays of 16 bits; others are computed by `plain` everywhere."""
    chosen = by_platform(plain, cpu, on_mesh)
    return lambda first, *others: (chosen if first.dtype.itemsize == 2 else plain)(first, *others)


def product_of_matrices(letters: str, x: Array, y: Array) -> Float[Array, "b N ..."]:
    """`attention.product` with all queries of a row and head (axes r, T, g) in one axis q."""
    left, right, result = letters.replace("->", ",").split(",")
    sizes = dict(zip(left + right, x.shape + y.shape))
    x, y = (z.reshape(*z.shape[:2], -1, z.shape[-1]) for z in (x, y))
    out = jnp.einsum(letters.replace("rTg", "q"), x, y, preferred_element_type=jnp.float32)
    return out.reshape([sizes[letter] for letter in result])


def scores_of_matrices(letters: str, queries: Float[Array, "b N r T g H"], keys: Float[Array, "b N S H"]) -> Array:
    """`product_of_matrices` with the smaller operand (in decoding the queries) second: a CPU reads it by columns."""
    if np.prod(queries.shape[2:5]) >= keys.shape[2]:
        return product_of_matrices(letters, queries, keys)
    return jnp.moveaxis(product_of_matrices("bNSH,bNrTgH->bNSrTg", keys, queries), 2, -1)


def product_over_rows(x: Float[Array, "..."], y: Float[Array, "..."], rows: int) -> Float[Array, "..."]:
    """xᵀ y, summed over their first `rows` axes, as one product of matrices. A CPU then reads xᵀ of 32 bits without
    writing it; of 16 bits it is written."""
    a, b = (z.reshape(np.prod(z.shape[:rows], dtype=int), -1) for z in (x, y))
    out = jnp.dot(turned(a), b) if x.dtype.itemsize == 2 else jnp.tensordot(a, b, (0, 0))
    return out.reshape(x.shape[rows:] + y.shape[rows:])


def turned(x: Shaped[Array, "n m"]) -> Shaped[Array, "m n"]:
    """xᵀ as an array of its own, row by row.

    The barriers keep what computes x out of the loop that turns it, and the turning out of the product. Without the
    third axis the compiler would take the result for x itself, read by columns."""
    alone = jax.lax.optimization_barrier
    return alone(jnp.moveaxis(alone(x)[None], 2, 0).reshape(x.shape[::-1]))


def product_of_halves(x: Float[Array, "..."], y: Float[Array, "..."], axes: int) -> Float[Array, "..."]:
    """`jnp.tensordot(x, y, axes)` of arrays of 16 bits, in float32.

    XLA's CPU backend multiplies them as they are where the result is float32 and there are two rows at least. Otherwise
    it first writes a copy of the weights in float32."""
    rows = x.reshape(-1, np.prod(y.shape[:axes], dtype=int))
    padded = jax.lax.optimization_barrier(jnp.pad(rows, ((0, 1), (0, 0)))) if len(rows) == 1 else rows
    out = jnp.dot(padded, y.reshape(rows.shape[1], -1), preferred_element_type=jnp.float32)[: len(rows)]
    return out.reshape(*x.shape[: x.ndim - axes], *y.shape[axes:])


def on_halves(function: Callable, *arrays: Float[Array, "..."]) -> Float[Array, "..."]:
    """`function(*arrays)`, which only moves numbers of 16 bits, computed on them as integers: as floating point numbers
    XLA's CPU backend would write copies of the arrays in float32 to move these."""
    dtype = arrays[0].dtype
    moved = function(*(jax.lax.bitcast_convert_type(x, jnp.uint16) for x in arrays))
    return jax.lax.bitcast_convert_type(moved, dtype)


def few_rows_at_a_time(function: Callable, rows: tuple[Float[Array, "B T M ..."], ...], segments: Sequence) -> tuple:
    """`function(rows, segments)`; on a CPU for so few of the B rows at a time that their scores stay in its cache.

    Row i reads row i // r of each `attention.Segment` (b = B / r). The function returns a tree of arrays `[B, ...]`,
    and for each segment a tree of arrays `[b, ...]`, added up if b = 1 (or None for all segments)."""
    B, T, M = rows[0].shape[:3]
    fits = lambda c: B % c == 0 and all(c * len(s.k) % B == 0 for s in segments if len(s.k) > 1)
    row_bytes = 4 * T * M * sum(s.k.shape[2] for s in segments)
    counts = [c for c in range(1, B + 1) if fits(c)]
    count = max((c for c in counts if c * row_bytes <= CACHE), default=min(counts))
    if count == B or B * row_bytes <= 8 * CACHE:  # little more than the cache holds gains nothing
        return function(rows, segments)
    cut = lambda x: x.reshape(B // count, -1, *x.shape[1:])
    joined = lambda x: x.reshape(-1, *x.shape[2:])

    def by_parts(rows, segments):
        leaves, tree = jax.tree.flatten(segments)
        own = {i: x for i, x in enumerate(leaves) if len(x) > 1}

        def one_part(part):
            rows, own = part
            return function(rows, tree.unflatten([own.get(i, x) for i, x in enumerate(leaves)]))

        results, of_segments = jax.lax.map(one_part, jax.tree.map(cut, (rows, own)))
        if of_segments is not None:
            added = lambda x: jnp.sum(x, 0)
            joins = [added if len(s.k) == 1 else joined for s in segments]
            of_segments = [jax.tree.map(join, result) for join, result in zip(joins, of_segments)]
        return jax.tree.map(joined, results), of_segments

    return by_platform(function, by_parts)(rows, segments)
