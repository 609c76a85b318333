"""The section of training: the learning curve, and a panel for every other metric."""

import itertools
import re
from collections.abc import Mapping, Sequence

from .charts import Line, Number, axis, known, line_chart, short, with_running_mean
from .measurements import PALETTE
from .pieces import figure
from .report import Report, steps_of

PANELS = (  # title, unit and lines of metrics; any other metric has a panel of its own
    ("Reward", "", {"reward": "reward"}),
    ("KL to the warm start", "nats per token", {"kl": "KL"}),
    ("Entropy", "nats per token", {"entropy": "entropy"}),
    ("Length of the whole response, with tags and end", "tokens", {"length": "length"}),
    ("Responses", "share", {"extraction_rate": "hold an explanation", "truncated": "are cut at the limit"}),
    ("Alike in their group", "share", {"identical_texts": "texts", "groups_without_advantage": "all rewards"}),
    ("Sampler–trainer log-prob gap", "nats", {f"logprob_gap_{name}": name for name in ("max", "p99", "mean")}),
    ("Gradient norms", "", {"av_grad_norm": "AV", "ar_grad_norm": "AR"}),
    ("Update norms", "", {"av_update_norm": "AV", "ar_update_norm": "AR"}),
    ("Learning rates", "", {"av_lr": "AV", "ar_lr": "AR"}),
    ("Seconds per phase", "seconds", {f"seconds_{name}": name for name in ("rollout", "host", "train")}),
    ("Throughput", "samples per second", {"samples_per_second": "throughput"}),
)
HELDOUT = {  # panels of what is measured beside held-out FVE, every few steps: title, unit, name of the line
    "heldout_true": ("Held-out texts: claims that hold", "share", "true"),
    "heldout_length": ("Held-out texts: length of an explanation", "tokens", "length"),
}
PROBED = (  # figures of probes in training that share a panel: a pattern of names, which also names the line; title, unit
    (r"(fve_.+|gap_frozen_critic)", "Probes: FVE", "FVE"),
    (r"gap_(?P<of>.+)_(live|warm|difference)", "Probes: lost by {of}", "FVE"),
    (r"(.*)_?true_after_rl", "Probes: claims that are true", "share"),
    (r"hit_at_1_(.+)", "Probes: activations found first", "share"),
)
ELSEWHERE = {*"step fve heldout_fve mse skipped av_skipped ar_skipped seconds_probes".split()}  # without a panel
ELSEWHERE |= {"seconds_so_far", "cpu_seconds_so_far", *HELDOUT}


def training(report: Report) -> str:
    """The learning curve, a panel for every other metric of RL, and the losses of the training before it."""
    losses = "".join(panel(rows, 1, name, "", {"loss": "loss"}) for name, rows in report.losses.items() if rows)
    losses = f'<h3 class="apart">Before RL: the loss</h3><div class="panels">{losses}</div>' if losses else ""
    return reinforcement(report) + losses


def reinforcement(report: Report) -> str:
    """The learning curve, and a panel for every other metric of RL."""
    history = steps_of(report)
    window = len(history) // 15 | 1
    if not history:
        return '<p class="missing">No RL steps are recorded.</p>'
    placed = ELSEWHERE.union(*(lines for _, _, lines in PANELS))
    others = dict.fromkeys(key for row in history for key in row if key not in placed and not key.startswith("probe/"))
    drawn = [(history, window, *facts) for facts in (*PANELS, *((key, "", {key: key}) for key in others))]
    panels = "".join(panel(*facts) for facts in drawn + of_heldout(history) + probed(report.history))
    said = f"<p>Faint lines are single steps, strong ones running means over {window} steps.</p>" if window > 1 else ""
    return f'{said}{learning_curve(report, window)}<div class="panels">{panels}</div>'


def of_heldout(history: Sequence[Mapping]) -> list[tuple]:
    """What `panel` draws of the steps that measure held-out texts."""
    rows = {key: [row for row in history if key in row] for key in HELDOUT}
    return [(rows[key], 1, *facts, {key: line}) for key, (*facts, line) in HELDOUT.items() if rows[key]]


def probed(history: Sequence[Mapping]) -> list[tuple]:
    """What `panel` draws of probes in training."""
    rows = [row for row in history if any(key.startswith("probe/") for key in row)]
    panels: dict[tuple[str, str], dict[str, str]] = {}
    for key in dict.fromkeys(key for row in rows for key in row if key.startswith("probe/")):
        name = key.removeprefix("probe/")
        matches = ((re.fullmatch(pattern, name), *facts) for pattern, *facts in PROBED)
        found, title, unit = next((match for match in matches if match[0]), (None, f"Probes: {name}", ""))
        title, line = (title.format(**found.groupdict()), found[found.lastindex]) if found else (title, name)
        line = line.rstrip("_") or "all"
        panels.setdefault((title.replace("_", " "), unit), {})[key] = line.replace("_", " ")
    return [(rows, 1, *facts, lines) for facts, lines in panels.items()]


def column(history: Sequence[Mapping], key: str) -> list[tuple[int, Number | None]]:
    """A metric with its steps."""
    return [(row["step"], row.get(key)) for row in history]


def learning_curve(report: Report, window: int) -> str:
    """FVE against steps. The axis is linear, as time is: a logarithmic one gives half its width to the first steps."""
    start, gold, last = [(0, report.mean("fve_warm"))], report.mean("fve_gold_text"), report.history[-1]["step"]
    ends = report.scores["fve_rl"]["ci95"] if "fve_rl" in report.scores else ()
    heldout = start + [point for point in column(report.history, "heldout_fve") if known(point[1])]
    lines = [
        *with_running_mean(Line("training batch", "control", column(report.history, "fve")), window),
        Line("gold label text", "gold dashed", [(0, gold), (last, gold)]),
        Line("held-out", "rl", heldout, True),
        Line("warm start, held-out", "warm", start, True),
        Line("final evaluation, 95 % interval", "third", [(1.05 * last, report.mean("fve_rl"))], True, [ends]),
    ]
    reach = [0, *filter(known, (*(value for line in lines for _, value in line.points), *ends))]
    title, x, y = "FVE against RL steps", axis("RL step", [0, 1.05 * last], last=last), axis("FVE", reach, upright=True)
    caption = "Training texts are sampled at the training temperature. The final evaluation, at the right, has more "
    caption += "activations than the held-out points before it."
    return figure(title, line_chart(title, lines, x, y), caption)


def panel(history: Sequence[Mapping], window: int, title: str, unit: str, names: Mapping[str, str]) -> str:
    """A small chart of metrics against steps. Durations far above the others, of steps that compile, are left out."""
    columns, last = [column(history, key) for key in names], history[-1]["step"]
    values = sorted(value for points in columns for _, value in points if known(value))
    if not values:
        return figure(title, '<p class="missing">Not recorded.</p>')
    highest = 2 * values[len(values) * 9 // 10] if unit == "seconds" else values[-1]
    lines, kept = [], [value for value in values if value <= highest]
    for css, name, points in zip(itertools.cycle(PALETTE), names.values(), columns):
        points = [(step, value if known(value) and value <= highest else None) for step, value in points]
        lines += with_running_mean(Line(name, css, points), window)
    gaps, longer = len(names) * len(history) - len(values), len(values) - len(kept)
    caption = f"{gaps} values are missing or not finite. " if gaps else ""
    caption += f"Not drawn: {longer} values of up to {short(values[-1])}. First steps compile." if longer else ""
    x = axis("step", [0, last], last=last)
    y = axis(unit, kept if kept[0] < 0 else [0, *kept], 3, upright=True)
    return figure(title, line_chart(f"{title} against RL steps", lines, x, y), caption)
