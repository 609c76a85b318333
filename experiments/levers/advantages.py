"""Other ways to turn the rewards of a step into advantages, as functions that a config names.

    PYTHONPATH=experiments/levers nla rl --workdir runs/arm --config.rl.advantage=advantages:leave_one_out

What each was worth on the quickstart stands in README.md. All take the rewards of A activations with G samples each.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from nla_jax.objective import group_normalised

TYPICAL_STD = 0.2  # of the rewards of a group of the quickstart: with it the weight of the KL means the same


def leave_one_out(rewards: Float[Array, "A G"]) -> Float[Array, "A G"]:
    """RLOO (Ahmadian et al. 2024): less the mean of the other samples of the group, in the same unit for all groups."""
    group = rewards.shape[1]
    return group / (group - 1) * (rewards - rewards.mean(1, keepdims=True)) / TYPICAL_STD


def of_the_batch(rewards: Float[Array, "A G"]) -> Float[Array, "A G"]:
    """Less the mean of the whole step, over its standard deviation: an activation that is hard to explain lowers all
    of its samples."""
    return (rewards - rewards.mean()) / (rewards.std() + 1e-4)


def positive_only(rewards: Float[Array, "A G"]) -> Float[Array, "A G"]:
    """Only samples better than their group's mean are learned from."""
    return jnp.maximum(group_normalised(rewards), 0)


def best_only(rewards: Float[Array, "A G"]) -> Float[Array, "A G"]:
    """Only the best sample of each group is learned from: best-of-G distillation (RAFT, Dong et al. 2023) in RL's loop."""
    best, worst = rewards.max(1, keepdims=True), rewards.min(1, keepdims=True)
    return jnp.where((rewards == best) & (best > worst), 1.0, 0.0)
