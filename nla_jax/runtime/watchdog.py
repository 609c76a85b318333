"""Watchdogs of the training loops: one stops a loop whose metrics say that training has broken down, or has gone where
it should not, one reports a hang."""

import dataclasses
import math
import sys
import threading
import time
from collections.abc import Iterable, Mapping

from nla_jax.runtime.checkpoint import Checkpoints
from nla_jax.runtime.errors import Stopped


@dataclasses.dataclass(frozen=True)
class Tripwires:
    """How far metrics that are measured now and then may move from their first value: `fall` and `rise` by metric. One
    that is farther away in `rounds` measurements in a row trips."""

    fall: Mapping[str, float] = dataclasses.field(default_factory=dict)
    rise: Mapping[str, float] = dataclasses.field(default_factory=dict)
    rounds: int = 1

    @property
    def names(self) -> set[str]:
        """The metrics that are watched."""
        return {*self.fall, *self.rise}

    def beyond(self, name: str, start: float, value: float) -> bool:
        """Whether a metric has moved too far."""
        return start - value > self.fall.get(name, math.inf) or value - start > self.rise.get(name, math.inf)


class Watchdog:
    """Stops a loop whose metrics stay outside their limits, or are not finite, for `window` steps in a row, and one that
    trips a wire.

    `limits` maps a metric to its lowest and highest healthy value. `records` are the earlier ones of a resumed run, so
    that an interruption forgets nothing. The metrics of step s are measured with the parameters after step s - 1, so a
    healthy step s tells `checkpoints` that step s - 1 was good; but with tripwires no step is good after the last one
    at which they held."""

    def __init__(
        self,
        checkpoints: Checkpoints,
        window: int,
        limits: Mapping[str, tuple[float, float]] | None = None,
        records: Iterable[dict] = (),
        tripwires: Tripwires = Tripwires(),
    ):
        self.checkpoints, self.window, self.limits, self.tripwires = checkpoints, window, limits or {}, tripwires
        self.streaks: dict[str, list[tuple[int, float | str]]] = {}  # by metric: (step, value) since it left its limits
        self.starts: dict[str, float] = {}  # the first value of each metric with a tripwire
        self.moved: dict[str, list[tuple[int, float]]] = {}  # by metric: (step, value) since it is beyond its tripwire
        self.held = 0  # the last step at which all tripwires held
        for record in records:
            self._note(record)

    def observe(self, record: Mapping) -> None:
        """Judges one record of a metric log: `step`, and values that are None if not finite.

        Raises `Stopped`, naming the metric, its limit, the steps, the values, and the newest checkpoint before them."""
        self._note(record)
        if self.tripped:
            raise Stopped(f"{self.tripped} {self._advice()}", status=1)
        for name, streak in self.streaks.items():
            first, last = streak[0][0], streak[-1][0]
            if last - first + 1 >= self.window:
                raise Stopped(
                    f"training has broken down: {name} {self._limit(name)} at every recorded step from {first} to "
                    f"{last} ({_shown([value for _, value in streak])}). {self._advice()}",
                    status=1,
                )

    @property
    def tripped(self) -> str:
        """A sentence about the tripwire that has tripped; "" while none has."""
        over = [name for name, measured in self.moved.items() if len(measured) >= self.tripwires.rounds]
        return self._moved(over[0]) if over else ""

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
        self._note_moves(record)
        if not found:
            self.checkpoints.mark_good(min(step - 1, self.held) if self.tripwires.names else step - 1)

    def _note_moves(self, record: Mapping) -> None:
        """What a record says of the tripwires; one without any of their metrics says nothing."""
        there = {name: record[name] for name in sorted(self.tripwires.names) if record.get(name) is not None}
        for name, value in there.items():
            start = self.starts.setdefault(name, value)
            beyond = self.tripwires.beyond(name, start, value)
            self.moved[name] = self.moved.get(name, []) + [(record["step"], value)] if beyond else []
        if there and not any(self.moved.values()):
            self.held = record["step"]

    def _moved(self, name: str) -> str:
        """What has tripped."""
        start, measured = self.starts[name], self.moved[name]
        fell = measured[-1][1] < start
        limit = (self.tripwires.fall if fell else self.tripwires.rise)[name]
        steps = ", ".join(str(step) for step, _ in measured)
        return (
            f"a tripwire of the watchdog: {name} was {start:.3g} at first and has {'fallen' if fell else 'risen'} by more than "
            f"{limit:g} ({_shown([value for _, value in measured])} after step{'s' * (len(measured) > 1)} {steps})."
        )

    def _limit(self, name: str) -> str:
        if name not in self.limits:
            return "were not finite"
        low, high = self.limits[name]
        sides = [f"below {low:g}"] * (low > -math.inf) + [f"above {high:g}"] * (high < math.inf)
        return "was " + " or ".join(sides)

    def _advice(self) -> str:
        folder, step = self.checkpoints.folder, self.checkpoints.newest_good()
        if step is None:
            start = f"No checkpoint under {folder} is from before; start again in another --workdir"
        else:
            start = f"Checkpoint {folder}/{step} is from before and is kept; move the later ones away to go on there"
        change = "with other settings (a lower learning rate, say) or wider limits under `watchdog` in the config."
        return f"{start}, {change}"


def _shown(values: list) -> str:
    if isinstance(values[0], str):  # names of metrics
        return "; ".join(dict.fromkeys(values))
    texts = [f"{value:.3g}" for value in values]
    return ", ".join(texts if len(texts) <= 6 else [*texts[:3], "…", *texts[-3:]])


class Phases:
    """Where a loop is: it calls `enter` as each phase of a step begins. `seconds` holds how long each phase of the
    current step took. As a context, it reports on standard error (from a thread) if nothing moves for `stall_minutes`;
    the loop goes on."""

    def __init__(self, name: str, stall_minutes: float):
        self.name, self.patience, self.seconds = name, 60 * stall_minutes, {}
        self._at = ("start", 0, time.monotonic())  # phase, step, since when: one tuple, because two threads use it
        self._over = threading.Event()

    def enter(self, phase: str, step: int | None = None) -> None:
        """Ends the phase before and begins `phase`; with `step`, that step begins too."""
        before, number, since = self._at
        now = time.monotonic()
        self.seconds[before] = self.seconds.get(before, 0.0) + now - since
        if step is not None:
            self.seconds = {}
        self._at = (phase, number if step is None else step, now)

    def __enter__(self) -> "Phases":
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
                    f"nla: {self.name} has not moved for {waited / 60:.3g} minutes: step {step}, phase {phase!r}; "
                    f"it goes on waiting.",
                    file=sys.stderr,
                    flush=True,
                )
