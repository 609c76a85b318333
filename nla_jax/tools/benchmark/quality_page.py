"""The chart of `nla benchmark quality`: the report's charts, a line for each run, in one page without a script."""

from collections.abc import Mapping, Sequence

from nla_jax.tools.report.charts import Line, axis, known, line_chart
from nla_jax.tools.report.measurements import PALETTE
from nla_jax.tools.report.pieces import MISSING, figure, table, written
from nla_jax.tools.report.style import CSS

CHARTS = {  # measure: title, unit
    "fve": ("Held-out FVE, read by the AR as it is", "FVE"),
    "fve_frozen": ("Held-out FVE, read by the AR before RL", "FVE"),
    "true": ("Claims that hold", "share"),
    "length": ("Length of an explanation", "tokens"),
}
CLOCK_NAMES = {"seconds": "seconds of training", "cpu_seconds": "seconds of computing"}


def render(report: Mapping) -> str:
    """The page of a comparison (`quality.compare`)."""
    names = shown_names([run["workdir"] for run in report["runs"]])
    charts = "".join(
        chart(report, names, measure, clock)
        for clock in CLOCK_NAMES
        for measure in CHARTS
        if measure == "fve" or clock == "seconds"
    )
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
        'content="width=device-width, initial-scale=1"><meta http-equiv="Content-Security-Policy" '
        f"content=\"default-src 'none'; style-src 'unsafe-inline'\"><title>Quality per minute</title><style>{CSS}</style>"
        "</head><body><main><h1>Quality per minute</h1><p>Time counts from the start of the warm start to the end of RL; "
        "corpus, activations and labels are apart. The first point of a run is its warm start, as its evaluation measured "
        f'it.</p>{numbers(report, names)}<div class="cards">{charts}</div></main></body></html>\n'
    )


def shown_names(folders: Sequence[str]) -> list[str]:
    """What runs are called: the names of their folders, with as many of the folders above as tell them apart."""
    parts = [folder.rstrip("/").split("/") for folder in folders]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(of[-count:]) for of in parts]
        if len(set(names)) == len(names):
            break
    return names


def chart(report: Mapping, names: Sequence[str], measure: str, clock: str) -> str:
    """One measure of all runs against time; nothing where no run has it."""
    title, unit = CHARTS[measure]
    lines = []
    for i, (name, run) in enumerate(zip(names, report["runs"])):
        points = [(point[clock], point[measure]) for point in run["points"] if known(point[clock])]
        lines.append(Line(name, PALETTE[i % len(PALETTE)], points, True))
    reach = [(at, value) for line in lines for at, value in line.points if known(value)]
    if not reach:
        return ""
    last, values = max(at for at, _ in reach), [value for _, value in reach]
    if unit == "FVE":
        goal = report["fve"]
        lines.append(Line(f"FVE {written(goal)}", "control dashed", [(0, goal), (last, goal)]))
        values.append(goal)
    x, y = axis(CLOCK_NAMES[clock], [0, last], last=last), axis(unit, [0, *values], upright=True)
    title += " against computing" if clock == "cpu_seconds" else ""
    return figure(title, line_chart(title, lines, x, y))


def numbers(report: Mapping, names: Sequence[str]) -> str:
    """A row for each run: when it reached the quality asked for, and what its texts were worth then."""
    rows = []
    for name, run in zip(names, report["runs"]):
        at = run["reached"] or {}
        facts = (at.get("seconds"), run["ratio"]["seconds"], at.get("cpu_seconds"), run["ratio"]["cpu_seconds"])
        shares = (at.get("true"), run["true_at_start"])
        step = str(at["step"]) if at else MISSING
        rows.append(
            (name, *map(written, facts), step, *(written(x, "share") for x in shares), written(run["best_fve"]))
        )
    head = (
        f"FVE {written(report['fve'])}",
        "seconds",
        "times the first’s",
        "of computing",
        "times the first’s",
        "RL step",
        "claims that hold",
        "after the warm start",
        "best FVE",
    )
    return table(head, rows)
