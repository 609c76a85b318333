"""The supervised training loop, shared by pretraining and both warm starts."""

import time
from collections.abc import Callable

import jax
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from nla_jax.io.files import AnyPath
from nla_jax.joint_step import SupervisedStep, jit_step
from nla_jax.models.sharding import place_batch, shardings
from nla_jax.runtime.checkpoint import Checkpoints
from nla_jax.runtime.metrics import MetricLog, Progress
from nla_jax.runtime.run import resolve
from nla_jax.runtime.watchdog import Phases, Watchdog


def make_optimizer(config: ConfigDict, steps: int) -> optax.GradientTransformation:
    """`config.function` names an optimizer function; the other fields are its settings."""
    settings = dict(config)
    return resolve(settings.pop("function"))(steps, **settings)


def fit(
    folder: AnyPath,
    name: str,
    step_fn: SupervisedStep,
    params: dict,
    abstract: dict,
    mesh: Mesh,
    batch_of_step: Callable,
    steps: int,
    checkpoints: Checkpoints,
    watchdog: ConfigDict,
    log_every: int = 20,
    base: dict | None = None,
) -> dict:
    """Trains `params` (which are consumed) for `steps` steps and returns them, sharded; continues from the newest of the
    `checkpoints`. Metrics go to `folder`. `watchdog` is that part of the config.

    `abstract`: the shapes of `params` with their logical axis names. `base`: the frozen model beneath an adapter.
    `batch_of_step(step)` is a pure function, so that a
    resumed run sees the batches it would have seen. Raises `Stopped` on SIGTERM, and where the loss stays NaN."""
    layout = shardings(mesh, jax.eval_shape(step_fn.init, abstract))
    with jax.set_mesh(mesh), checkpoints, Phases(name, watchdog.stall_minutes) as phases:
        init = jax.jit(step_fn.init, out_shardings=layout, donate_argnums=0)
        found = checkpoints.restore(init.eval_shape(params), steps, discard=params)
        start, state = found or (0, init(jax.device_put(params, layout.params)))
        train = jit_step(step_fn, mesh)
        log, progress = MetricLog(folder, start), Progress(name, steps, start)
        guard = Watchdog(checkpoints, watchdog.window, records=log.records)
        clock = time.monotonic()
        for i in range(start, steps):
            phases.enter("waiting for data", i + 1)
            batch = place_batch(mesh, batch_of_step(i))
            phases.enter("train step")
            state, metrics = train(state, batch, base)
            shown = {}
            if (i + 1) % log_every == 0 or i + 1 == steps:
                values = jax.device_get(metrics)
                now = time.monotonic()
                guard.observe(log.write(i + 1, values | {"seconds": now - clock}))
                clock, shown = now, {"loss": float(values["loss"])}
            progress.update(**shown)
            phases.enter("checkpoint")
            checkpoints.save(i + 1, state, force=i + 1 == steps, before=log.flush)
        progress.close()
        log.close()
    return state.params
