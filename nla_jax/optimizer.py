"""Optimizers: functions `(steps, **settings) -> optax.GradientTransformation`, named in a config by import path."""

import optax


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
