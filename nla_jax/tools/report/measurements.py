"""The section of measurements: a chart for every probe."""

from collections.abc import Mapping, Sequence
from html import escape

from .charts import Line, axis, bar_chart, histogram, known, line_chart
from .pieces import figure, interval, table, written
from .report import Report

HIGHEST = {"FVE": 1.0, "cosine": 1.0, "share": 1.0}  # bars of these units show how far they are from the best
COLOURS = {"gold": "gold", "warm": "warm", "rl": "rl", "shuffled": "control", "empty": "control", "no": "control"}
PALETTE = ("rl", "warm", "third", "gold", "control")


def measurements(report: Report) -> str:
    """A figure for each probe; probes of one title, kind and unit share it."""
    groups: dict[tuple, list[Mapping]] = {}
    for probe in report.probes:
        groups.setdefault(tuple(probe[key] for key in ("title", "chart", "unit", "axis")), []).append(probe)
    return f'<div class="cards">{"".join(map(measurement, groups.values()))}</div>'


def measurement(probes: Sequence[Mapping]) -> str:
    """The chart of some probes, what the probes say of themselves, and the numbers."""
    unit, about, rows = probes[0]["unit"], "", []
    for probe in probes:
        names = ", ".join(score["label"] for score in probe["scores"]) if len(probes) > 1 else ""
        about += f"<p><b>{escape(names)}</b> {escape(probe['about'])}</p>"
        for s in probe["scores"]:
            rows.append((s["label"], written(s["mean"], unit), interval(s["ci95"], unit), written(s["median"], unit)))
    numbers = table((probes[0]["axis"] or "score", "mean", "95 % interval", "median"), rows)
    about += f"<details><summary>The numbers</summary>{numbers}</details>"
    return figure(probes[0]["title"], drawing(probes), about)


def drawing(probes: Sequence[Mapping]) -> str:
    """The chart of some probes that share their kind and unit. A curve has a line for each probe."""
    chart, unit = probes[0]["chart"], probes[0]["unit"]
    label, scores = f"{probes[0]['title']}, {unit}", [s for p in probes for s in p["scores"] if known(s["mean"])]
    reach = [end for s in scores for end in (s["mean"], *s["ci95"]) if known(end)]
    if not scores:
        return '<p class="missing">Nothing was measured.</p>'
    if chart == "bars":
        texts = [f"{written(s['mean'], unit)} ({interval(s['ci95'], unit)})" for s in scores]
        bars = [(s["label"], colour(s["name"], 0), s["mean"], s["ci95"], text) for s, text in zip(scores, texts)]
        return bar_chart(label, bars, axis(unit, [0.0, HIGHEST.get(unit, 0.0), *reach]))
    if chart == "histogram":
        return histogram(label, [(s["label"], colour(s["name"], i), s["rows"]) for i, s in enumerate(scores)], unit)
    lines = []
    for i, probe in enumerate(probes):
        ordered = sorted(probe["scores"], key=lambda s: float(s["name"]))
        points, band = [(float(s["name"]), s["mean"]) for s in ordered], [s["ci95"] for s in ordered]
        lines.append(Line(probe["name"].replace("_", " "), PALETTE[i % len(PALETTE)], points, True, band))
    places = [float(s["name"]) for s in scores]
    x = axis(probes[0]["axis"], places, last=max(places))
    return line_chart(label, lines, x, axis(unit, reach, upright=True))


def colour(name: str, position: int) -> str:
    """The CSS class of a score: by the condition that its name holds, else by its position."""
    parts = name.split("_")
    return next((css for part, css in COLOURS.items() if part in parts), PALETTE[position % len(PALETTE)])
