"""Watchdogs of the training loops: stop where the metrics say that training has broken down, say where a step hangs."""

import math
import sys
import threading
import time
from collections.abc import Iterable, Mapping
from typing import Self

from nla_jax.runtime.checkpoint import Checkpoints
from nla_jax.runtime.errors import Stopped


class Watchdog:
    """Stops a loop whose metrics stay outside their limits, or are not finite, over `window` steps without a break.

    `limits` maps metrics to the lowest and the highest healthy value. The metrics of step s are measured under the parameters
    after step s - 1: a checkpoint is known to be good once the step behind it was. The newest good one is kept, whatever is
    saved later. `records` are those of the steps before (of a resumed run), so that an interruption forgets nothing."""

    def __init__(
        self,
        checkpoints: Checkpoints,
        window: int,
        limits: Mapping[str, tuple[float, float]] | None = None,
        records: Iterable[dict] = (),
    ):
        self.checkpoints, self.window, self.limits = checkpoints, window, limits or {}
        self.streaks: dict[str, list[tuple[int, float | str]]] = {}  # by metric: (step, value) since it left its limits
        for record in records:
            self._note(record)

    def observe(self, record: Mapping) -> None:
        """Judges one record of a metric log (`step` and values, None where one is not finite).

        Raises `Stopped`, naming the metric, its limit, the steps, the values, and the newest checkpoint from before."""
        self._note(record)
        for name, streak in self.streaks.items():
            first, last = streak[0][0], streak[-1][0]
            if last - first + 1 >= self.window:
                raise Stopped(
                    f"training has broken down: {name} {self._limit(name)} at every recorded step from {first} to {last} "
                    f"({_shown([value for _, value in streak])}). {self._advice()}",
                    status=1,
                )

    def _note(self, record: Mapping) -> None:
        found = {}
        broken = [name for name, value in record.items() if value is None]
        if broken or record.get("skipped"):
            found["metrics or gradients"] = ", ".join(broken) or "gradients"
        for name, (low, high) in self.limits.items():
            value = record.get(name)
            if value is not None and not low <= value <= high:
                found[name] = value
        step = record["step"]
        self.streaks = {name: self.streaks.get(name, []) + [(step, value)] for name, value in found.items()}
        if not found:
            self.checkpoints.good = step - 1

    def _limit(self, name: str) -> str:
        if name not in self.limits:
            return "were not finite"
        low, high = self.limits[name]
        sides = [f"below {low:g}"] * (low > -math.inf) + [f"above {high:g}"] * (high < math.inf)
        return "was " + " or ".join(sides)

    def _advice(self) -> str:
        folder, step = self.checkpoints.folder, self.checkpoints.newest_good()
        if step is None:
            return (
                f"No checkpoint under {folder} is from before; start again in another --workdir with other settings (a lower "
                f"learning rate, say), or widen the limits under `watchdog` in the config."
            )
        return (
            f"Checkpoint {folder / str(step)} is from before and is kept; remove the later ones beside it to continue from "
            f"there, with other settings (a lower learning rate, say) or wider limits under `watchdog` in the config."
        )


def _shown(values: list) -> str:
    if isinstance(values[0], str):  # names of metrics
        return "; ".join(dict.fromkeys(values))
    texts = [f"{value:.3g}" for value in values]
    return ", ".join(texts if len(texts) <= 6 else [*texts[:3], "…", *texts[-3:]])


class Phases:
    """Where a loop stands: `enter` is called as each phase of a step begins. `seconds` holds how long each took in the
    current step. As a context, a thread reports on standard error where nothing moves for `stall_minutes`; the loop goes on."""

    def __init__(self, name: str, stall_minutes: float):
        self.name, self.patience, self.seconds = name, 60 * stall_minutes, {}
        self._at = ("start", 0, time.monotonic())  # phase, step, since when: one tuple, since two threads use it
        self._over = threading.Event()

    def enter(self, phase: str, step: int | None = None) -> None:
        """The phase before ends and `phase` begins; with a `step`, that step begins."""
        before, number, since = self._at
        now = time.monotonic()
        self.seconds[before] = self.seconds.get(before, 0.0) + now - since
        if step is not None:
            self.seconds = {}
        self._at = (phase, number if step is None else step, now)

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._watch, name="stall report", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        reported, times = None, 0  # the stall that was reported last, and how often
        while not self._over.wait(min(self.patience / 10, 10)):
            phase, step, since = at = self._at
            if at is not reported:
                times = 0
            waited = time.monotonic() - since
            if waited > self.patience * (times + 1):
                reported, times = at, times + 1
                print(
                    f"nla: {self.name} has not moved for {waited / 60:.3g} minutes: step {step}, phase {phase!r}; it goes on "
                    f"waiting.",
                    file=sys.stderr,
                    flush=True,
                )
