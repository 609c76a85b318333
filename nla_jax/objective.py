"""The values that a study names by import path: rewards, advantages, optimizers."""

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

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


def adamw(
    steps: int,
    lr: float,
    final_lr: float | None = None,
    warmup: int = 0,
    clip: float = 1.0,
    b1: float = 0.9,
    b2: float = 0.99,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> optax.GradientTransformation:
    """AdamW after clipping to global norm `clip`: linear warm-up over `warmup` steps, then a cosine from `lr` to `final_lr` at
    step `steps` (constant where `final_lr` is None)."""
    if final_lr is None:
        schedule = optax.linear_schedule(lr / (warmup + 1), lr, warmup)
    else:
        schedule = optax.warmup_cosine_decay_schedule(lr / (warmup + 1), lr, warmup, max(steps, warmup + 1), final_lr)
    return optax.chain(
        optax.clip_by_global_norm(clip), optax.adamw(schedule, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay)
    )
