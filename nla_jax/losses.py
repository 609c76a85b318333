"""Rewards, advantages and the per-token quantities of the policy: everything the joint step differentiates or scores.

A reward is a function `reward(mse [B], length [B]) -> [B]`, an advantage `advantage(rewards [A, G]) -> [A, G]`; configs
name one by value or import path, so that a new one edits no file of this package.
"""

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from nla_jax.models.transformer import Transformer, whole_head
from nla_jax.sharding import batch_ways, cut_batch

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
    chunk: int = 1024,
) -> TokenStatistics:
    """Statistics of `targets` under softmax(logits(hidden) / temperature); `reference` is another model's parameters and
    its states at the same tokens. Works through `chunk` tokens a device at a time and recomputes logits in the backward pass:
    never `[B·R, V]` at once. Chunks are cut along the responses: cut along the batch, which lies across the devices, a chunk
    would stand on few of them. The KL is exact (a sum over the vocabulary), so its gradient has no sampling noise and nothing
    in it can overflow as the k3 estimator does."""

    params = whole_head(params, model.config)
    if reference is not None:
        reference = whole_head(reference[0], model.config), reference[1]

    def log_softmax(params, hidden):
        return jax.nn.log_softmax(model.apply({"params": params}, hidden, method="logits") / temperature)

    @jax.checkpoint
    def of_chunk(hidden, target, reference_hidden):
        logp = log_softmax(params, hidden)
        p = jnp.exp(logp)
        kl = jnp.zeros(logp.shape[:-1])
        if reference is not None:
            kl = jnp.sum(p * (logp - log_softmax(reference[0], reference_hidden)), -1)
        chosen = jnp.take_along_axis(logp, target[:, None], -1)[:, 0]
        return TokenStatistics(chosen, -jnp.sum(p * logp, -1), kl)

    B, R = targets.shape
    c = min(R, max(1, chunk * batch_ways(B) // B))

    def chunks(x):  # [B, R, ...] -> [R/c, B·c, ...]
        x = jnp.pad(x, ((0, 0), (0, -R % c), *[(0, 0)] * (x.ndim - 2)))
        x = x.reshape(B, -1, c, *x.shape[2:]).swapaxes(0, 1)
        return cut_batch(x.reshape(len(x), B * c, *x.shape[3:]), axis=1)

    inputs = chunks(hidden), chunks(targets), chunks(hidden if reference is None else reference[1])
    statistics = jax.lax.map(lambda x: of_chunk(*x), inputs)
    whole = lambda x: x.reshape(-1, B, c).swapaxes(0, 1).reshape(B, -1)[:, :R]
    return jax.tree.map(whole, statistics)


def masked_mean(x: Float[Array, "*B"], mask: Bool[Array, "*B"]) -> Float[Array, ""]:
    return jnp.sum(jnp.where(mask, x, 0)) / jnp.maximum(mask.sum(), 1)
