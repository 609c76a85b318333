"""Rewards, advantages and the per-token quantities of the policy: everything the joint step differentiates or scores.

A reward is a function `reward(mse [B], length [B]) -> [B]`, an advantage `advantage(rewards [A, G]) -> [A, G]`; configs
name one by value or import path, so that a new one edits no file of this package. Both see the samples of one micro-batch: what
an advantage does across groups changes with their number.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Shaped

from nla_jax.models.sharding import on_each_device
from nla_jax.models.transformer import Transformer, output_head

FEW_CHUNKS = 32  # whose gradients of the head may be added up in bfloat16: that rounds by 0.5 %, of 600 chunks by 8 to 15 %


@struct.dataclass
class TokenStatistics:
    """Per token: log π(token), the entropy of π, and KL(π ‖ reference) over the whole vocabulary (0 without one)."""

    logprob: Float[Array, "*B"]
    entropy: Float[Array, "*B"]
    kl: Float[Array, "*B"]


def token_loss(
    model: Transformer,
    params: dict,
    hidden: Float[Array, "B R D"],
    targets: Int[Array, "B R"],
    loss: Callable[..., Float[Array, "n"]],
    *data: Shaped[Array, "B R"],
    temperature: float = 1.0,
    reference: tuple[dict, Float[Array, "B R D"]] | None = None,
    chunk: int = 512,
) -> tuple[Float[Array, ""], TokenStatistics]:
    """The sum over all tokens of `loss(statistics [n], *data [n])`, and the statistics of `targets` under
    softmax(logits(hidden) / temperature), of which only `loss` may make a gradient. `data` are constants of each token;
    `reference` is another model's parameters and its states at the same tokens, constants too.

    Each device works through the tokens of its rows, `chunk` at a time: never `[B·R, V]` logits at once. Where a gradient is
    wanted, each chunk makes its part of it while its logits are there, so that none is computed twice. (A mean's divisor
    belongs into `data`: what multiplies the result afterwards multiplies a gradient of the head's size.) The KL is exact (a
    sum over the vocabulary), so its gradient has no sampling noise and nothing in it can overflow as the k3 estimator does."""

    def log_softmax(head, hidden):
        return jax.nn.log_softmax(model.apply({"params": head}, hidden, method="logits") / temperature)

    def of_chunk(head, hidden, other_head, constants):
        targets, data, other_hidden, real = constants
        logp = log_softmax(head, hidden)
        p = jnp.exp(logp)
        chosen = jnp.take_along_axis(logp, targets[:, None], -1)[:, 0]
        kl = jnp.zeros_like(chosen)
        if other_head is not None:
            kl = jnp.sum(p * (logp - log_softmax(other_head, other_hidden)), -1)
        tokens = TokenStatistics(chosen, -jnp.sum(p * logp, -1), kl)
        return jnp.sum(jnp.where(real, loss(tokens, *data), 0)), tokens

    def scan(of_chunk, carry, hidden, constants):
        """`of_chunk(carry, hidden, constants) -> (carry, (sum, statistics, ...))` from chunk to chunk of the tokens.
        Returns the last carry, the total `[1]`, and the rest in rows again."""
        shape = constants[0].shape
        n = shape[0] * shape[1]
        c = -(-n // (-(-n // chunk) * 8)) * 8  # as many chunks, of equal size; a multiple of 8, to which a GPU would pad

        def chunks(x):  # [b, R, ...] -> [bR/c, c, ...]
            x = x.reshape(n, *x.shape[2:])
            return jnp.pad(x, ((0, -n % c), *[(0, 0)] * (x.ndim - 1))).reshape(-1, c, *x.shape[1:])

        xs = jax.tree.map(chunks, (hidden, (*constants, jnp.ones(shape, bool))))
        carry, (sums, *rest) = jax.lax.scan(lambda carry, x: of_chunk(carry, *x), carry, xs)
        rows = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:n].reshape(*shape, *x.shape[2:]), rest)
        return carry, sums.sum()[None], *rows

    @jax.custom_vjp
    def of_rows(trained, other_head, constants):
        head, hidden = trained
        plain = lambda _, hidden, constants: (None, of_chunk(head, hidden, other_head, constants))
        return scan(plain, None, hidden, constants)[1:]

    def forward(trained, other_head, constants):
        head, hidden = trained

        def with_gradient(d_head, hidden, constants):
            value = jax.value_and_grad(of_chunk, (0, 1), has_aux=True)
            (part, tokens), (more, d_hidden) = value(head, hidden, other_head, constants)
            return jax.tree.map(jnp.add, d_head, more), (part, tokens, d_hidden)

        few = constants[0].size <= FEW_CHUNKS * chunk
        zeros = jax.tree.map(lambda x: jnp.zeros_like(x, None if few else jnp.float32), head)
        d_head, total, tokens, d_hidden = scan(with_gradient, zeros, hidden, constants)
        return (total, tokens), (jax.tree.map(lambda g, x: g.astype(x.dtype), d_head, head), d_hidden)

    def backward(gradient, d_result):
        (d_total,), _ = d_result
        return jax.tree.map(lambda g: (d_total * g).astype(g.dtype), gradient), None, None

    of_rows.defvjp(forward, backward)

    def on_device(heads, hidden, *constants):
        return of_rows((heads[0], hidden), heads[1], constants)

    other_params, other_hidden = reference or (None, None)
    heads = tuple(params and output_head(params, model.config) for params in (params, other_params))
    totals, tokens = on_each_device(on_device, heads, hidden, targets, data, other_hidden)
    return totals.sum(), tokens


def masked_mean(x: Float[Array, "*B"], mask: Bool[Array, "*B"]) -> Float[Array, ""]:
    return jnp.sum(jnp.where(mask, x, 0)) / jnp.maximum(mask.sum(), 1)
