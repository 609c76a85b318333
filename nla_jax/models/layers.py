"""The layers that a block is made of: norms and linear maps, with their own rules for gradients."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Shaped

from nla_jax.models.cpu_forms import by_platform, for_halves, on_halves, product_of_halves, product_over_rows, turned
from nla_jax.models.sharding import gathered


def normal(*axes: str):
    """The initial distribution of matrices, for an array with these logical axis names."""
    return nn.with_logical_partitioning(nn.initializers.normal(0.02), axes)


class RMSNorm(nn.Module):
    """Root-mean-square norm in float32, eps inside the square root: x / rms(x) · (offset + scale)."""

    eps: float
    axis: str
    offset: float = 0.0

    @nn.compact
    def __call__(self, parts: Sequence[Float[Array, "..."]]) -> list[Float[Array, "..."]]:
        """The norm of each of several arrays over its last axis."""
        start = nn.initializers.constant(1 - self.offset)
        scale = self.param("scale", nn.with_logical_partitioning(start, (self.axis,)), parts[0].shape[-1:])
        results = []
        for x in parts:
            y = x.astype(jnp.float32)
            y = y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + self.eps)
            results.append((y * (self.offset + scale)).astype(x.dtype))
        return results


class Projection(NamedTuple):
    """The shape of a linear map: a kernel `[*inputs, *outputs]`, whose axes have the logical names `axes`."""

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    axes: tuple[str, ...]
    bias: bool = False


class Dense(nn.Module):
    """A linear map of the last axes. If the parameters hold a low-rank pair (models/lora.py), x · a · b is added."""

    projection: Projection
    dtype: Any
    decoding: bool = False

    @nn.compact
    def __call__(self, parts: Sequence[Float[Array, "..."]]) -> list[Float[Array, "..."]]:
        """`[..., *inputs] -> [..., *outputs]` for several arrays. Weights are cast and gathered once for all."""
        p, n = self.projection, len(self.projection.inputs)
        kernel = self.param("kernel", normal(*p.axes), p.inputs + p.outputs)
        use = (lambda weight, axes: weight) if self.decoding else gathered
        kernel = use(kernel.astype(self.dtype), p.axes)
        parts = [x.astype(self.dtype) for x in parts]
        results = [frozen_linear(x, kernel, n) if self.decoding else linear(x, kernel, n) for x in parts]
        if p.bias:
            zeros = nn.with_logical_partitioning(nn.initializers.zeros, p.axes[n:])
            bias = self.param("bias", zeros, p.outputs).astype(self.dtype)
            results = [y + bias for y in results]
        if self.has_variable("params", "lora_a"):
            a, b = (self.get_variable("params", name).astype(self.dtype) for name in ("lora_a", "lora_b"))
            a, b = use(a, (*p.axes[:n], "lora_rank")), use(b, ("lora_rank", *p.axes[n:]))
            results = [y + jnp.tensordot(jnp.tensordot(x, a, n), b, 1) for x, y in zip(parts, results)]
        return results


def frozen_linear(x: Float[Array, "..."], kernel: Float[Array, "..."], axes: int) -> Float[Array, "..."]:
    """`linear` where nothing is trained."""
    if kernel.dtype.itemsize != 2:
        return linear(x, kernel, axes)
    cpu = lambda x, kernel: product_of_halves(x, kernel, axes).astype(x.dtype)
    return by_platform(lambda x, kernel: jnp.tensordot(x, kernel, axes), cpu)(x, kernel)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def linear(x: Float[Array, "..."], kernel: Float[Array, "..."], axes: int) -> Float[Array, "..."]:
    """`x [*rows, *inputs]` · `kernel [*inputs, *outputs]`, summed over the `axes` inputs. For the kernel's gradient its
    own rule transposes the smaller operand (on a CPU in 16 bits: x). JAX transposes the gradient of the result, in an
    MLP the larger one."""
    return jnp.tensordot(x, kernel, axes)


def _linear_forward(x, kernel, axes):
    return jnp.tensordot(x, kernel, axes), (x, kernel)  # not `linear`: a remat policy would see no product inside it


def _linear_backward(axes, saved, d_y):
    """The gradients of x and of the kernel, from that of the result `[*rows, *outputs]`."""
    x, kernel = saved
    outputs, rows = kernel.ndim - axes, x.ndim - axes
    d_x = jnp.tensordot(d_y, kernel, [list(range(-outputs, 0))] * 2)
    plain = lambda x, y: jnp.tensordot(x, y, [list(range(rows))] * 2)
    over_rows = cpu = functools.partial(product_over_rows, rows=rows)
    if x.size > d_y.size:
        turned = lambda product: lambda x, y: jnp.moveaxis(product(y, x), range(outputs), range(-outputs, 0))
        # A product of 16 bits whose result is transposed would be computed from other operands, in a slow loop.
        plain, cpu = turned(plain), over_rows if x.dtype.itemsize == 2 else turned(over_rows)
    return d_x, by_platform(plain, cpu, on_mesh=True)(x, d_y)


linear.defvjp(_linear_forward, _linear_backward)


@jax.custom_vjp
def vocabulary_scores(x: Float[Array, "*B D"], head: Float[Array, "D V"]) -> Float[Array, "*B V"]:
    """x · head in float32, from operands in the compute dtype. The gradient is cast to that dtype before the products
    of the backward pass. (JAX would cast the head to float32 for them, and multiply at half the speed.)"""
    return jnp.dot(x, head, preferred_element_type=jnp.float32)


vocabulary_scores.defvjp(
    lambda x, head: (vocabulary_scores(x, head), (x, head)),
    lambda saved, d_scores: _linear_backward(1, saved, d_scores.astype(saved[0].dtype)),
)


@jax.custom_vjp
def tied_scores(x: Float[Array, "*B D"], embedding: Float[Array, "V D"]) -> Float[Array, "*B V"]:
    """`vocabulary_scores` where the head is the transposed embedding. A CPU multiplies 16 bits by the embedding as it
    lies: transposed, it would be cast to float32."""
    plain = lambda x, embedding: vocabulary_scores(x, embedding.T)
    over_width = [[x.ndim - 1], [1]]
    cpu = lambda x, embedding: jnp.tensordot(x, embedding, over_width, preferred_element_type=jnp.float32)
    return for_halves(plain, cpu)(x, embedding)


def _tied_backward(saved, d_scores):
    """The gradients of x and of the embedding. A CPU in 16 bits transposes the gradient of the scores, though it is the
    larger operand: the product of the other one would be read by columns."""
    x, embedding = saved

    def plain(x, embedding, d_y):
        d_x, d_head = _linear_backward(1, (x, embedding.T), d_y)
        return d_x, d_head.T

    cpu = lambda x, embedding, d_y: (jnp.dot(d_y, embedding), product_over_rows(d_y, x, x.ndim - 1))
    return for_halves(plain, cpu)(x, embedding, d_scores.astype(x.dtype))


tied_scores.defvjp(lambda x, embedding: (tied_scores(x, embedding), (x, embedding)), _tied_backward)


def gated(activation: Callable, gate: Float[Array, "*B F"], up: Float[Array, "*B F"]) -> Float[Array, "*B F"]:
    """activation(gate) · up. A CPU computes it of 16 bits in float32: it would round and cast after every operation."""
    plain = lambda gate, up: activation(gate) * up
    cpu = lambda gate, up: plain(gate.astype(jnp.float32), up.astype(jnp.float32)).astype(gate.dtype)
    return for_halves(plain, cpu, on_mesh=True)(gate, up)


def frozen_scores(x: Float[Array, "*B D"], head: Float[Array, "D V"]) -> Float[Array, "*B V"]:
    """`vocabulary_scores` where nothing is trained."""
    if head.dtype.itemsize != 2:
        return vocabulary_scores(x, head)
    return by_platform(vocabulary_scores, lambda x, head: product_of_halves(x, head, 1))(x, head)


def transposed(x: Float[Array, "n m"]) -> Float[Array, "m n"]:
    """xᵀ, where nothing is trained. A CPU lays it out row by row, since it multiplies by a matrix of 16 bits that lies
    so; else it would write that in float32 for the product."""
    return for_halves(jnp.transpose, functools.partial(on_halves, turned))(x)


def of_integers(bits: Shaped[Array, "..."], dtype: DTypeLike) -> Shaped[Array, "..."]:
    """Numbers of 16 bits from their bits (`views.with_layers`); an array of another dtype as it is."""
    return jax.lax.bitcast_convert_type(bits, dtype) if bits.dtype == jnp.uint16 else bits


def moved(function: Callable, *arrays: Float[Array, "..."]) -> Float[Array, "..."]:
    """`function(*arrays)`, which moves their numbers and does nothing else, where nothing is trained."""
    if arrays[0].dtype.itemsize != 2:
        return function(*arrays)
    return by_platform(function, functools.partial(on_halves, function))(*arrays)
