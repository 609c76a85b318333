"""What every training loop needs: resuming, metrics, progress, watchdog, checkpoints."""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from nla_jax.joint_step import TrainState
from nla_jax.runtime.metrics import MetricLog, Progress
from nla_jax.runtime.run import Run
from nla_jax.runtime.watchdog import Phases, Tripwires, Watchdog

SO_FAR = "_so_far"  # ends the names of the metrics that say what the stage has taken up to a step


class Loop(contextlib.AbstractContextManager):
    """One training loop of `steps` steps, as a context: on the run's mesh, under `{workdir}/train/{name}`.

    `stage` is the stage that it belongs to. `base`: hashes of the frozen weights that it reads. `limits`: the lowest
    and highest healthy values of metrics. `tripwires`: how far others may move."""

    def __init__(
        self,
        run: Run,
        stage: str,
        name: str,
        steps: int,
        base: dict[str, str],
        limits: Mapping | None = None,
        tripwires: Tripwires = Tripwires(),  # noqa: B008 (frozen)
    ):
        self.run, self.name, self.total, self.limits, self.tripwires = run, name, steps, limits, tripwires
        self.folder = run.workdir / "train" / name
        self.checkpoints = run.checkpoints(stage, self.folder, **base)
        self.phases = Phases(name.replace("_", " "), run.config.watchdog.stall_minutes)
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "Loop":
        for context in (jax.set_mesh(self.run.mesh), self.checkpoints, self.phases):
            self._stack.enter_context(context)
        return self

    def __exit__(self, *error) -> bool | None:
        return self._stack.__exit__(*error)

    def resume(self, abstract: TrainState, make: Callable[[], TrainState], discard: Any) -> TrainState:
        """The state of the newest checkpoint, else the one that `make` makes.

        `abstract`: its shapes and shardings. `discard`: arrays that only `make` needs, deleted before a checkpoint is
        read, so that one state is in memory at a time."""
        found = self.checkpoints.restore(abstract, self.total, discard)
        self.start, state = found or (0, make())
        project = self.run.config.log.wandb
        wandb = {"project": project, "name": f"{self.run.workdir.name} {self.name}"} if project else None
        self.log = MetricLog(self.folder, self.start, wandb, self.run.config.to_dict())
        last = self.log.records[-1] if self.log.records else {}
        self.run.spent_at_least({name.removesuffix(SO_FAR): last[name] for name in last if name.endswith(SO_FAR)})
        self.progress = Progress(self.phases.name, self.total, self.start)
        window, records = self.run.config.watchdog.window, self.log.records
        self.watchdog = Watchdog(self.checkpoints, window, self.limits, records, self.tripwires)
        return state

    def steps(self) -> Iterator[int]:
        """The steps that are left, from 0; what the loop wrote is complete when they end. A lower `total` ends them
        sooner."""
        i = self.start
        while i < self.total:
            self.phases.enter("waiting for data", i + 1)
            yield i
            i += 1
        self.progress.close()
        self.log.close()

    def record(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Logs the metrics of a step, and what the stage has taken so far. Raises `Stopped` where they show that training
        has broken down."""
        spent = {f"{name}{SO_FAR}": seconds for name, seconds in self.run.spent().items()}
        self.watchdog.observe(self.log.write(step, dict(metrics) | spent))

    def end_step(self, step: int, state: TrainState, keep: bool = False, **shown: float) -> None:
        """Shows progress, and saves the state where the interval says so (always after the last step, and with
        `keep`)."""
        self.progress.update(**shown)
        self.phases.enter("checkpoint")
        self.checkpoints.save(step, state, force=keep or step == self.total, before=self.log.flush)


def healthy(run: Run) -> dict[str, tuple[float, float]]:
    """The lowest and highest healthy values of RL metrics, from the config."""
    c = run.config.watchdog
    return {
        "extraction_rate": (c.min_extraction_rate, math.inf),
        "entropy": (c.min_entropy, math.inf),
        "length": (c.min_length, c.max_length_share * run.config.prompts.max_new_tokens),
        "identical_texts": (-math.inf, c.max_identical_texts),
    }
