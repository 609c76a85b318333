"""The sections about the run itself: how to open its pair, how it was made, how large it is, and every setting."""

from html import escape

from .charts import known
from .pieces import MISSING, table, written
from .report import Report

VERSIONS = ("commit", "nla_jax", "jax", "python", "devices")  # of each stage


def the_pair(report: Report) -> str:
    """The exact commands that open the pair."""
    if not report.open_with:
        return '<p class="missing">There is no pair yet: the warm start makes the first one.</p>'
    shown = "".join(
        f"<div><h3>{escape(what)}</h3><pre>{escape(command)}</pre></div>" for what, command in report.open_with.items()
    )
    return (
        "<p>Explain any text token by token, with alternatives and neighbours, in a page that looks like this one. Run "
        "these where the run was made; <code>nla serve</code> needs <code>pip install 'nla_jax[serve]'</code>.</p>"
        f"{shown}"
    )


def the_run(report: Report) -> str:
    """What made the figures: commands, versions and devices, sizes, time, and every setting."""
    figures = {name.replace("_", " "): value for name, value in report.figures.items()}
    facts = {"Run": report.run, "Sizes": report.sizes, "Figures": figures}
    tables = "".join(table((title, ""), [(k, written(v)) for k, v in rows.items()]) for title, rows in facts.items())
    commands = "\n".join(dict.fromkeys(made["command"] for made in report.stages.values() if made.get("command")))
    return (
        f'<pre>{escape(commands)}</pre>{stages(report)}{probes(report)}<div class="tables">{tables}</div>'
        f"<details><summary>Every setting</summary><pre>{escape(report.config)}</pre></details>"
    )


def stages(report: Report) -> str:
    """A row for each stage: its time, when it began, and what it was made with."""
    rows = []
    for name in dict.fromkeys((*report.seconds, *report.stages)):
        made = report.stages.get(name, {})
        facts = [str(made.get(key) or MISSING) for key in ("date", *VERSIONS)]
        rows.append((name, written(report.seconds.get(name)), *facts))
    rows.append(("total", written(sum(report.seconds.values())), *[""] * (1 + len(VERSIONS))))
    return table(("Stage", "seconds", "begun", *VERSIONS), rows)


def probes(report: Report) -> str:
    """What each probe of the evaluation took, the longest first."""
    taken = {name: seconds for name, seconds in report.seconds_by_probe.items() if known(seconds)}
    if not taken:
        return ""
    longest = sorted(taken, key=taken.get, reverse=True)
    rows = [(name.replace("_", " "), written(taken[name])) for name in longest]
    rows.append(("total", written(sum(taken.values()))))
    about = "A text or reconstruction that several probes read counts as the time of the first of them."
    return (
        f"<details><summary>Seconds of each probe</summary><p>{about}</p>{table(('Probe', 'seconds'), rows)}</details>"
    )
