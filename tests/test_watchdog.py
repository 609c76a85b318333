"""When a loop is stopped, what is said of it, and what is said of a loop that hangs."""

import functools
import math
import time
from pathlib import Path
from unittest.mock import Mock

import optax
import pytest
from test_checkpoint import batch_of_step, train

from nla_jax.runtime.checkpoint import Checkpoints
from nla_jax.runtime.errors import Stopped
from nla_jax.runtime.watchdog import Phases, Tripwires, Watchdog
from nla_jax.stages import sft

NONE = Tripwires()
LIMITS = {"rate": (0.5, math.inf), "length": (2, 20)}
GOOD = {"rate": 1.0, "length": 10.0, "loss": 0.1, "skipped": False}


def stopped_at(records, newest_good=None, window=3, wires=NONE) -> tuple[int | None, str, int]:
    """The step at which the rule stops, its words, and the step that is known to be good. The same must come out if an
    interruption lies between any two records."""
    for cut in range(len(records)):
        checkpoints = Mock(Checkpoints, good=0, folder=Path("f"), newest_good=lambda: newest_good)
        checkpoints.mark_good = functools.partial(setattr, checkpoints, "good")
        watchdog, step, words = Watchdog(checkpoints, window, LIMITS, records[:cut], wires), None, ""
        try:
            for record in records[cut:]:
                step = record["step"]
                watchdog.observe(record)
            step = None
        except Stopped as stopped:
            words = str(stopped)
            assert stopped.status == 1
        if cut == 0:
            first = step, words, checkpoints.good
        assert (step, words, checkpoints.good) == first
        if cut + 1 == step:  # a loop gets no further
            break
    return first


def series(**changed) -> list[dict]:
    """Records of as many steps as the metric given has values."""
    ((name, values),) = changed.items()
    return [{"step": i, **GOOD, name: value} for i, value in enumerate(values, 1)]


def test_healthy_runs_go_on():
    assert stopped_at(series(rate=[1.0] * 9)) == (None, "", 8)
    assert stopped_at(series(rate=[1, 0.4, 0.4, 0.6, 0.4, 0.4, 0.5])) == (None, "", 6)
    assert stopped_at(series(loss=[0.1, None, None, 0.1])) == (None, "", 3)


def test_a_metric_outside_its_limits_over_the_window_stops():
    step, words, good = stopped_at(series(rate=[1, 0.4, 1, 1, 0.4, 0.3, 0.2, 0.1]), newest_good=3)
    assert (step, good) == (7, 3)
    assert "rate was below 0.5 at every recorded step from 5 to 7 (0.4, 0.3, 0.2)" in words
    assert "Checkpoint f/3 is from before and is kept" in words
    for values in ([25.0] * 3, [1.0] * 3):
        step, words, good = stopped_at(series(length=values))
        assert (step, good) == (3, 0)
        assert "length was below 2 or above 20 at every recorded step from 1 to 3" in words
        assert "No checkpoint under f is from before" in words


def test_values_that_are_not_finite_stop():
    step, words, good = stopped_at(series(loss=[1, None, None, None]))
    assert (step, good) == (4, 0) and "not finite at every recorded step from 2 to 4 (loss)" in words
    step, words, good = stopped_at(series(skipped=[False, False, True, True, True]))
    assert (step, good) == (5, 1) and "from 3 to 5 (gradients)" in words


def test_two_troubles_in_turn_are_not_one_but_spoil_what_is_saved_between():
    records = [{"step": i, **GOOD} for i in range(1, 9)]
    for i in (2, 3, 6):
        records[i]["rate"] = 0.0
    for i in (4, 5):
        records[i]["length"] = 50.0
    assert stopped_at(records) == (None, "", 7)
    assert stopped_at(records[:7]) == (None, "", 1)


def test_records_that_are_far_apart_count_by_their_steps():
    records = [{"step": step, **GOOD, "loss": None if step > 20 else 1.0} for step in (20, 40, 60)]
    step, words, good = stopped_at(records, window=20)
    assert (step, good) == (60, 19) and "from 40 to 60" in words


WIRES = Tripwires(fall={"truth": 0.1}, rise={"code": 0.2}, rounds=2)


def probed(every=2, **figures) -> list[dict]:
    """Records of healthy steps; after every `every`-th, and before the first, the figures are measured."""
    rounds = [dict(zip(figures, values)) for values in zip(*figures.values())]
    records = [{"step": 0} | rounds[0]]
    for step in range(1, every * (len(rounds) - 1) + 1):
        records.append({"step": step, **GOOD} | (rounds[step // every] if step % every == 0 else {}))
    return records


def test_figures_that_stay_within_their_tripwires_go_on():
    assert stopped_at(probed(truth=[0.6, 0.5, 0.51, 0.9, 0.5], code=[0, 0.2, 0.1, -9, 0.2]), wires=WIRES)[0] is None
    assert stopped_at(probed(truth=[0.6, 0.4, 0.6, 0.4, 0.55]), wires=WIRES) == (None, "", 7)
    assert stopped_at(probed(fve=[0.6, 0.1, 0.1]), wires=WIRES) == (None, "", 0)  # no round has said that all is well


def test_a_tripwire_stops_after_its_rounds_and_keeps_what_was_before_the_first_of_them():
    step, words, good = stopped_at(probed(truth=[0.6, 0.55, 0.49, 0.3, 0.6]), newest_good=2, wires=WIRES)
    assert (step, good) == (6, 2)
    assert (
        "truth was 0.6 at first and has fallen by more than 0.1 (0.49, 0.3 after steps 4, 6). Checkpoint f/2" in words
    )
    step, words, good = stopped_at(probed(3, truth=[0.6] * 4, code=[0.1, 0.2, 0.31, 0.4]), newest_good=3, wires=WIRES)
    assert (step, good) == (9, 3) and "code was 0.1 at first and has risen by more than 0.2" in words
    once = Tripwires(fall={"truth": 0.1})
    step, words, good = stopped_at(probed(truth=[0.6, 0.1]), wires=once)
    assert (step, good) == (2, 0) and "(0.1 after step 2). No checkpoint under f is from before" in words


def test_a_figure_that_is_missing_in_a_round_neither_trips_nor_clears():
    records = probed(truth=[0.6, 0.4, None, 0.4], code=[0.1] * 4)
    del records[4]["truth"]  # nobody made such a claim
    assert stopped_at(records, wires=WIRES)[0] == 6


def test_supervised_training_that_diverges_stops(tmp_path, monkeypatch):
    """Gradient descent far beyond the stable step size: the loss overflows after some steps."""
    monkeypatch.setattr(sft, "LOG_EVERY", 1)
    with pytest.raises(Stopped, match="not finite at every recorded step from") as stopped:
        train(tmp_path, 100, optax.sgd(1e4), every=1, window=4)
    good, *_, newest = sorted(int(path.name) for path in (tmp_path / "train/test/checkpoints").iterdir())
    words = str(stopped.value)
    assert f"from {good + 2} to {newest + 1} " in words and f"checkpoints/{good} is from before" in words
    assert newest == good + 4


def test_a_step_that_hangs_is_reported_and_goes_on(tmp_path, capsys):
    def slow(step):
        if step == 2:
            time.sleep(1.2)
        return batch_of_step(step)

    train(tmp_path, 4, optax.sgd(0.1), slow, stall_minutes=0.5 / 60)
    lines = [line for line in capsys.readouterr().err.splitlines() if "step 3, phase 'waiting for data'" in line]
    assert len(lines) == 2 and all(line.startswith("nla: test has not moved for 0.0") for line in lines)


def test_phases_tell_their_seconds():
    with Phases("rl", 1.0) as phases:
        for step in (1, 2):
            phases.enter("rollout", step)
            time.sleep(0.05)
            phases.enter("train step")
            time.sleep(0.02)
            phases.enter("rollout")
            time.sleep(0.01)
            phases.enter("checkpoint")
    assert 0.06 <= phases.seconds["rollout"] < 0.5 and 0.02 <= phases.seconds["train step"] < 0.5
    assert set(phases.seconds) == {"rollout", "train step"}
