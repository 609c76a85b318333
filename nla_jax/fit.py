"""The supervised training loop, shared by pretraining and both warm starts."""

import time
from collections.abc import Callable
from pathlib import Path

import jax
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from nla_jax.checkpoint import Checkpoints
from nla_jax.metrics import MetricLog, Progress
from nla_jax.run import resolve
from nla_jax.sharding import place_batch, shardings
from nla_jax.train_step import SupervisedStep


def make_optimizer(config: ConfigDict, steps: int) -> optax.GradientTransformation:
    """`config.function` names an optimizer function; the other fields are its settings."""
    settings = dict(config)
    return resolve(settings.pop("function"))(steps, **settings)


def fit(
    folder: Path,
    name: str,
    step_fn: SupervisedStep,
    params: dict,
    abstract: dict,
    mesh: Mesh,
    batch_of_step: Callable,
    steps: int,
    checkpoint_every: int,
    log_every: int = 20,
    base: dict | None = None,
) -> dict:
    """Trains `params` (which are consumed) for `steps` steps and returns them, sharded; continues from the newest checkpoint
    under `folder`.

    `abstract`: the shapes of `params` with their logical axis names. `base`: the frozen model beneath an adapter.
    `batch_of_step(step)` is a pure function, so that a
    resumed run sees the batches it would have seen."""
    layout = shardings(mesh, jax.eval_shape(step_fn.init, abstract))
    with jax.set_mesh(mesh):
        init = jax.jit(step_fn.init, out_shardings=layout, donate_argnums=0)
        checkpoints = Checkpoints(folder / "checkpoints", checkpoint_every)
        start, state = checkpoints.restore(init(jax.device_put(params, layout.params)))
        train = jax.jit(step_fn, donate_argnums=0)
        log, progress = MetricLog(folder, start), Progress(name, steps, start)
        clock = time.monotonic()
        for i in range(start, steps):
            state, metrics = train(state, place_batch(mesh, batch_of_step(i)), base)
            shown = {}
            if (i + 1) % log_every == 0 or i + 1 == steps:
                values = jax.device_get(metrics)
                now = time.monotonic()
                log.write(i + 1, values | {"seconds": now - clock})
                clock, shown = now, {"loss": float(values["loss"])}
            progress.update(**shown)
            checkpoints.save(i + 1, state, force=i + 1 == steps)
        progress.close()
        log.close()
        checkpoints.close()
    return state.params
