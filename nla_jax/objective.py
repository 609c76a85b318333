"""The objective's parts, as values: what a config names by import path. Write your own in any file.

| part | signature | config |
|---|---|---|
| reward | `(Scored) -> [B]` | `rl.reward` |
| advantage | `([A, G]) -> [A, G]` | `rl.advantage` |
| reader | `(texts, rng) -> texts` | `rl.reader` |
| features | `(texts, rows) -> {name: [B]}` | `rl.features` |
| optimizer | `(**settings) -> optax.GradientTransformation` | `*.optimizer.function` |

Rewards and advantages run inside the compiled step, on the samples of one micro-batch. Readers and features run on the
host, between the rollout and the step.
"""

import math
import re
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jaxtyping import Array, Float, Int

from nla_jax.runtime.errors import InputError

UNCORRELATED = 2.0  # the mse of a cosine of 0: what a failed response counts as


@struct.dataclass
class Scored:
    """What a reward may read. B responses, the G samples of an activation in a row.

    A response is `valid` if it ended in time and holds an explanation. One that failed is trained on too, so a reward
    decides what it is worth; its `mse` and `cosine` are those of an uncorrelated reconstruction (2 and 0), whatever the
    AR made of it."""

    mse: Array  # [B], of the reconstruction, 2(1 - cos), in [0, 4]
    cosine: Array  # [B]
    valid: Array  # [B], bool
    mask: Array  # [B, R], which tokens of a response are real, the end token included
    logprobs: Array  # [B, R], of the sampled tokens, as the sampler drew them
    features: dict[str, Array]  # [B] each: what `rl.features` computed on the host, by name

    @property
    def length(self) -> Int[Array, "B"]:
        """Tokens of each response: tags, explanation and end."""
        return self.mask.sum(1)

    @property
    def entropy(self) -> Float[Array, "B"]:
        """Nats per token of each response, estimated from the tokens that were drawn: minus their mean
        log-probability."""
        return -jnp.sum(self.logprobs * self.mask, 1) / jnp.maximum(self.length, 1)


# Rewards


def negative_mse(s: Scored) -> Float[Array, "B"]:
    """-mse = -2(1 - cos), the paper's reward; a failed response gets -2."""
    return jnp.where(s.valid, -s.mse, -UNCORRELATED)


def negative_log_mse(s: Scored) -> Float[Array, "B"]:
    """-log mse: converges faster, writes worse, may collapse at small batches. A failed response gets -log 2."""
    return jnp.where(s.valid, -jnp.log(s.mse + 1e-6), -np.log(UNCORRELATED))


TRUTH = 0.2  # what an explanation whose claims are all true earns: as much as an mse that is lower by so much


def truthful(s: Scored) -> Float[Array, "B"]:
    """-mse + `TRUTH` · truth: pays for claims that hold, which the reconstruction alone does not.

    `truth` is a feature: of extractive labels `nla_jax.labels.extractive:true_share`. It needs the text, which an
    activation of training has. A failed response gets -2."""
    return jnp.where(s.valid, -s.mse + TRUTH * s.features["truth"], -UNCORRELATED)


# Advantages


def group_normalised(rewards: Float[Array, "A G"]) -> Float[Array, "A G"]:
    """GRPO: (r - mean_G r) / (std_G r + eps)."""
    centred = rewards - rewards.mean(1, keepdims=True)
    return centred / (rewards.std(1, keepdims=True) + 1e-4)


# Readers: what the AR reads of the explanations of one activation. `rng` depends on seed, step and activation only.


def whole(texts: list[str], rng: np.random.Generator) -> list[str]:
    """The explanations as they are."""
    return texts


def random_prefix(texts: list[str], rng: np.random.Generator) -> list[str]:
    """Each text cut after the same random share of its words: what matters has to come first."""
    share = rng.uniform()
    return [" ".join(words[: max(1, round(share * len(words)))]) for words in map(str.split, texts)]


def without_quotes(texts: list[str], rng: np.random.Generator) -> list[str]:
    """The texts without what stands in double quotes: copying the context earns nothing."""
    return [re.sub(r'"[^"]*"', '""', text) for text in texts]


# Optimizers


def adamw(
    steps: int,
    lr: float,
    final_lr: float | None = None,
    warmup: int = 0,
    clip: float = 1.0,
    **settings: float,
) -> optax.GradientTransformation:
    """AdamW after clipping to global norm `clip`: linear warm-up over `warmup` steps, then a cosine from `lr` to
    `final_lr` at step `steps` (constant where `final_lr` is None).

    `settings`: b1 (0.9), b2 (0.99), eps (1e-8) and weight_decay (0) of `optax.adamw`. The learning rate of each step is
    part of the state, so that training can log it. Raises `InputError` for a number that no AdamW can use."""
    settings = {"b1": 0.9, "b2": 0.99, "eps": 1e-8, "weight_decay": 0.0} | settings
    numbers = {"lr": lr, "final_lr": final_lr or 0.0, "warmup": warmup, "clip": clip} | settings
    for name, value in numbers.items():
        highest = 1.0 if name in ("b1", "b2") else math.inf
        if isinstance(value, (int, float)) and not 0 <= value < highest:
            raise InputError(f"AdamW's {name} is {value}; it must be at least 0{' and below 1' * (highest == 1)}.")
    if final_lr is None:
        schedule = optax.linear_schedule(lr / (warmup + 1), lr, warmup)
    else:
        schedule = optax.warmup_cosine_decay_schedule(lr / (warmup + 1), lr, warmup, max(steps, warmup + 1), final_lr)
    return optax.chain(optax.clip_by_global_norm(clip), optax.adamw(schedule, **settings), shown(schedule))


class LearningRate(NamedTuple):
    """The state of `shown`: steps made, and the learning rate of the last one."""

    count: Int[Array, ""]
    learning_rate: Float[Array, ""]


def shown(schedule: optax.Schedule) -> optax.GradientTransformation:
    """Changes no update; keeps the learning rate of each step in its state, where the metrics find it."""
    at = lambda count: jnp.asarray(schedule(count), jnp.float32)
    return optax.GradientTransformation(
        lambda params: LearningRate(jnp.int32(0), at(0)),
        lambda updates, state, params=None: (updates, LearningRate(state.count + 1, at(state.count))),
    )
