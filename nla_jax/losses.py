"""Rewards, advantages and the per-token quantities of the policy: everything the joint step differentiates or scores.

A reward is a function `reward(mse [B], length [B]) -> [B]`, an advantage `advantage(rewards [A, G]) -> [A, G]`; configs
name one by value or import path, so that a new one edits no file of this package.
"""

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from nla_jax.models.transformer import Transformer, output_head
from nla_jax.sharding import on_each_device

FAILED_REWARD = -2.0  # truncated or unparsable responses: below every good reconstruction, and trained on


def negative_mse(mse: Float[Array, "B"], length: Int[Array, "B"]) -> Float[Array, "B"]:
    """-mse = -2(1 - cos): the paper's reward."""
    return -mse


def negative_log_mse(mse: Float[Array, "B"], length: Int[Array, "B"]) -> Float[Array, "B"]:
    """-log mse: converges faster, writes worse, may collapse at small batches."""
    return -jnp.log(mse + 1e-6)


def group_normalised(rewards: Float[Array, "A G"]) -> Float[Array, "A G"]:
    """GRPO: (r - mean_G r) / (std_G r + eps)."""
    centred = rewards - rewards.mean(1, keepdims=True)
    return centred / (rewards.std(1, keepdims=True) + 1e-4)


@struct.dataclass
class TokenStatistics:
    """Per token: log π(token), the entropy of π, and KL(π ‖ reference) over the whole vocabulary (0 without one)."""

    logprob: Float[Array, "*B"]
    entropy: Float[Array, "*B"]
    kl: Float[Array, "*B"]


def token_statistics(
    model: Transformer,
    params: dict,
    hidden: Float[Array, "B R D"],
    targets: Int[Array, "B R"],
    *,
    temperature: float = 1.0,
    reference: tuple[dict, Float[Array, "B R D"]] | None = None,
    chunk: int = 512,
) -> TokenStatistics:
    """Statistics of `targets` under softmax(logits(hidden) / temperature); `reference` is another model's parameters and
    its states at the same tokens. Each device works through the tokens of its rows, `chunk` at a time, and recomputes logits in
    the backward pass: never `[B·R, V]` at once. The KL is exact (a sum over the vocabulary), so its gradient has no sampling
    noise and nothing in it can overflow as the k3 estimator does."""
    heads, states = [output_head(params, model.config)], [hidden]
    if reference is not None:
        heads, states = [*heads, output_head(reference[0], model.config)], [*states, reference[1]]

    def log_softmax(head, hidden):
        return jax.nn.log_softmax(model.apply({"params": head}, hidden, method="logits") / temperature)

    @jax.checkpoint
    def of_chunk(heads, states, targets):
        logp, *others = map(log_softmax, heads, states)
        p = jnp.exp(logp)
        kl = jnp.sum(p * (logp - others[0]), -1) if others else jnp.zeros_like(logp[:, 0])
        chosen = jnp.take_along_axis(logp, targets[:, None], -1)[:, 0]
        return TokenStatistics(chosen, -jnp.sum(p * logp, -1), kl)

    def of_rows(heads, states, targets):
        n = targets.size
        c = -(-n // -(-n // chunk))  # as many chunks, of equal size

        def chunks(x):  # [b, R, ...] -> [bR/c, c, ...]
            x = x.reshape(n, *x.shape[2:])
            return jnp.pad(x, ((0, -n % c), *[(0, 0)] * (x.ndim - 1))).reshape(-1, c, *x.shape[1:])

        statistics = jax.lax.map(lambda x: of_chunk(heads, *x), (jax.tree.map(chunks, states), chunks(targets)))
        return jax.tree.map(lambda x: x.reshape(-1)[:n].reshape(targets.shape), statistics)

    return on_each_device(of_rows, heads, states, targets)


def masked_mean(x: Float[Array, "*B"], mask: Bool[Array, "*B"]) -> Float[Array, ""]:
    return jnp.sum(jnp.where(mask, x, 0)) / jnp.maximum(mask.sum(), 1)
