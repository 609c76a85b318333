"""Quality per minute: what runs reach on held-out rows against what training takes, from their own records.

Time counts from the start of `sft` to the end of `rl`, over all processes that worked on the two stages; corpus,
subject, activations and labels are apart. `seconds` are those of a clock, `cpu_seconds` those that the process
computed: on a machine that other work shares, only the latter can be compared.

A curve begins with the warm start, as `nla evaluate` measured it, if it has; its other points are RL's measurements
every `rl.heldout_every` steps, on fewer rows. Runs of builds that did not record the time of a step have it estimated:
a step of RL takes the share of the stage that it takes of the phases of all steps.
"""

import dataclasses
from collections.abc import Mapping, Sequence

from nla_jax.io.files import AnyPath, path_to
from nla_jax.runtime.errors import InputError
from nla_jax.runtime.metrics import METRICS, read_metrics
from nla_jax.runtime.run import CLOCKS, read_json
from nla_jax.tools.report.charts import known
from nla_jax.tools.report.pieces import written

MEASURES = {  # of a point, with the name in a step's record
    "fve": "heldout_fve",
    "fve_frozen": "probe/fve_rl_frozen",
    "true": "heldout_true",
    "length": "heldout_length",
}
PHASES = ("seconds_rollout", "seconds_host", "seconds_train")


@dataclasses.dataclass(frozen=True)
class Curve:
    """What a run reached, and when. `points`: each with its `step` of RL, the clocks of `CLOCKS` from the start of sft,
    and the `MEASURES`; None where something is not known. `estimated`: the times of its steps are."""

    name: str
    points: Sequence[Mapping]
    whole: Mapping[str, float | None]  # of both stages, by clock
    made: Mapping
    estimated: bool = False


def curve_of(folder: str) -> Curve:
    """The curve of the run in a working folder.

    Raises `InputError` where it holds no finished `sft`, or no measurement on held-out rows."""
    place = path_to(folder)
    sft, rl = (stage_record(place, name) for name in ("sft", "rl"))
    if "result" not in sft:
        raise InputError(
            f"{folder} holds no finished 'sft' stage; name the working folder of a run whose RL has begun."
        )
    records = [record for record in read_metrics(place / "train/rl" / METRICS) if record["step"]]
    times, estimated = times_of_steps(records, rl)
    points = [
        {"step": record["step"]} | added(sft, of) | measured(record)
        for record, of in zip(records, times)
        if known(record.get("heldout_fve"))
    ]
    if not points:
        raise InputError(
            f"RL in {folder} has measured nothing on held-out rows yet; let it run on, or lower rl.heldout_every."
        )
    if start := warm_start(stage_record(place, "evaluate").get("result", {}).get("summary", {})):
        points.insert(0, {"step": 0} | {clock: sft.get(clock) for clock in CLOCKS} | start)
    made = {name: sft.get("made", {}).get(name) for name in ("date", "commit", "devices")}
    whole = {clock: total(sft.get(clock), rl.get(clock)) for clock in CLOCKS} if "result" in rl else {}
    return Curve(folder, points, whole, made, estimated)


def stage_record(folder: AnyPath, stage: str) -> dict:
    """What a stage recorded of itself; {} where it has not begun."""
    file = folder / "stages" / f"{stage}.json"
    kinds = {"basis": dict, "seconds": (int, float)}
    return read_json(file, kinds, "run that stage again") if file.exists() else {}


def times_of_steps(records: Sequence[Mapping], rl: Mapping) -> tuple[list[dict[str, float | None]], bool]:
    """The clocks of the stage `rl` at each of its records, and whether they had to be estimated."""
    if all("seconds_so_far" in record for record in records):
        return [{clock: record.get(f"{clock}_so_far") for clock in CLOCKS} for record in records], False
    steps = [sum(record.get(phase) or 0.0 for phase in PHASES) for record in records]
    scale = rl["seconds"] / sum(steps) if "result" in rl and sum(steps) else 1.0
    return [{"seconds": scale * sum(steps[: i + 1]), "cpu_seconds": None} for i in range(len(steps))], True


def added(sft: Mapping, times: Mapping) -> dict[str, float | None]:
    """The time from the start of sft to a step of RL, by clock."""
    return {clock: total(sft.get(clock), times[clock]) for clock in CLOCKS}


def total(*seconds: float | None) -> float | None:
    """A sum; None where a part is not known."""
    return sum(seconds) if all(map(known, seconds)) else None


def measured(record: Mapping) -> dict[str, float | None]:
    """The measures of a step."""
    return {name: record.get(key) for name, key in MEASURES.items()}


def warm_start(summary: Mapping) -> dict[str, float | None]:
    """The measures before RL, from what an evaluation reports; {} where it has no FVE of the warm start."""
    if not known(fve := summary.get("fve_warm")):
        return {}
    kinds = [value for name, value in summary.items() if name.endswith("_true_warm") and known(value)]
    return dict.fromkeys(MEASURES) | {"fve": fve, "fve_frozen": fve, "true": mean(kinds)}


def mean(values: Sequence[float]) -> float | None:
    """Their mean; None where there are none."""
    return sum(values) / len(values) if values else None


def reached(curve: Curve, fve: float) -> dict | None:
    """When a curve first reaches an FVE: the clocks and measures there, on straight lines between the measurements; and
    `step`, the first one measured at it or above. None where it never does."""
    last = next((i for i, point in enumerate(curve.points) if point["fve"] >= fve), None)
    if last is None:
        return None
    after, before = curve.points[last], curve.points[max(0, last - 1)]
    rise = after["fve"] - before["fve"]
    part = (fve - before["fve"]) / rise if rise else 1.0
    between = lambda a, b: a + part * (b - a) if known(a) and known(b) else None
    names = (*CLOCKS, *[name for name in MEASURES if name != "fve"])
    return {"step": after["step"]} | {name: between(before[name], after[name]) for name in names}


def compare(curves: Sequence[Curve], fve: float | None = None) -> dict:
    """What the runs reached, and the ratio of each one's time to that of the first to the quality `fve` (default: the
    highest that all of them reach), by clock; None where one of the two is not known."""
    goal = min(max(point["fve"] for point in curve.points) for curve in curves) if fve is None else fve
    runs = []
    for curve in curves:
        at, start = reached(curve, goal), curve.points[0]
        first = runs[0]["reached"] if runs else at
        ratio = {clock: divided(at and at[clock], first and first[clock]) for clock in CLOCKS}
        runs.append(
            {
                "workdir": curve.name,
                "made": curve.made,
                "whole": curve.whole,
                "times_estimated": curve.estimated,
                "best_fve": max(point["fve"] for point in curve.points),
                "true_at_start": start["true"] if start["step"] == 0 else None,
                "reached": at,
                "ratio": ratio,
                "points": curve.points,
            }
        )
    return {"fve": goal, "runs": runs}


def divided(a: float | None, b: float | None) -> float | None:
    """a / b, where both are known."""
    return a / b if known(a) and known(b) and b else None


def account(report: Mapping) -> str:
    """The comparison in words, a few lines for each run."""
    lines = [f"Time from the start of sft until held-out FVE is {written(report['fve'])}:"]
    for i, run in enumerate(report["runs"]):
        lines.append(f"  {run['workdir']}{' (times of steps are estimated)' * run['times_estimated']}")
        if (at := run["reached"]) is None:
            lines.append(f"    not reached; the best is {written(run['best_fve'])}")
            continue
        ratio = run["ratio"]
        versus = f", {written(ratio['seconds'])} times the first's" if i and known(ratio["seconds"]) else ""
        lines.append(f"    {at['seconds']:.0f} s{versus}, by step {at['step']} of RL")
        if known(at["cpu_seconds"]):
            versus = f", {written(ratio['cpu_seconds'])} times the first's" if i and known(ratio["cpu_seconds"]) else ""
            lines.append(f"    {at['cpu_seconds']:.0f} s of computing{versus}")
        if known(at["true"]):
            before = f" ({written(run['true_at_start'], 'share')} after the warm start)"
            lines.append(f"    {written(at['true'], 'share')} of the claims hold{before * known(run['true_at_start'])}")
    return "\n".join(lines)
