"""One self-contained HTML page about a run: headline, examples, a chart of every probe, training, settings.

`render(report)` does not use the network. It draws whatever probes and metrics it is given; it knows by name only
those of the headline and of the warnings, and the panels that several metrics share.
"""

import base64
import hashlib
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from .charts import Interval, Line, Number, axis, bar_chart, histogram, known, line_chart, short, with_running_mean
from .style import CSS, SCRIPT

MISSING = "–"
HEADLINES = {"fve_rl": "Held-out FVE after RL", "fve_warm": "Held-out FVE after the warm start"}
CONTROLS = ("fve_shuffled", "fve_empty", "fve_no_injection")  # these should score far below the headline
TOKENS = ("fve_token_mean", "fve_token_means", "fve_token_ridge")  # baselines that read no text
COLLAPSED = 0.9  # a share of identical texts in a group from which nothing can be learned
HIGHEST = {"FVE": 1.0, "cosine": 1.0, "share": 1.0}  # bars of these units show how far they are from the best
COLOURS = {"gold": "gold", "warm": "warm", "rl": "rl", "shuffled": "control", "empty": "control", "no": "control"}
PALETTE = ("rl", "warm", "third", "gold", "control")
TEXTS = {"labels": ("Label", "gold"), "warm": ("AV before RL", "warm"), "rl": ("AV after RL", "rl")}
TAGS = {"fve_warm": ("FVE before RL", "warm"), "fve_rl": ("FVE after RL", "rl"), "cos_rl": ("cosine", "")}
FVE_IN_WORDS = (
    "FVE, the fraction of variance explained, says how much of what distinguishes one activation from another can be "
    "rebuilt from its written explanation alone. 1 is a perfect reconstruction, 0 the error of the mean activation. No "
    "text scores 0 by saying nothing: a reconstruction is normalised to the length of an activation, and the mean is "
    "shorter. The best constant reconstruction scores below 0, the text of another activation far below."
)
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
PROBED = (  # figures of probes in training that share a panel: a pattern of names, which also names the line; title, unit
    (r"(fve_.+|gap_frozen_critic)", "Probes: FVE", "FVE"),
    (r"gap_(?P<of>.+)_(live|warm|difference)", "Probes: lost by {of}", "FVE"),
    (r"(.*)_?true_after_rl", "Probes: claims that are true", "share"),
    (r"hit_at_1_(.+)", "Probes: activations found first", "share"),
)
ELSEWHERE = {*"step fve heldout_fve mse skipped av_skipped ar_skipped seconds_probes".split()}  # without a panel


@dataclass(frozen=True)
class Report:
    """All that the page shows. A number that is None or not finite is written as "–" and not drawn."""

    title: str
    subject: str
    layer: int
    created: str
    command: str
    run: Mapping[str, Any]  # seed, versions, devices
    config: str  # every setting
    figures: Mapping[str, Any]  # those that are no scores; of them heldout_rows and heldout_documents
    seconds: Mapping[str, Number]  # of each stage
    probes: Sequence[Mapping]  # what `probes.probe.figures` gives
    examples: Sequence[Mapping]  # document, context, token, after; the TEXTS; of the TAGS those that were measured
    history: Sequence[Mapping]  # of each RL step: `step`, from 1, and its metrics; figures of probes begin at step 0

    @property
    def scores(self) -> dict[str, Mapping]:
        """Scores by name, with their unit; not those of curves, which are named by their place."""
        drawn = [probe for probe in self.probes if probe["chart"] != "curve"]
        return {score["name"]: {**score, "unit": probe["unit"]} for probe in drawn for score in probe["scores"]}

    def mean(self, name: str) -> Number:
        """The mean of a score; NaN where it was not measured."""
        value = self.scores[name]["mean"] if name in self.scores else None
        return value if known(value) else math.nan


def written(value: Any, unit: str = "") -> str:
    """A figure or a fact. A share is cut, not rounded, to a tenth of a percent: only all of them are 100 %."""
    if isinstance(value, str | int) and not unit:
        return str(value)
    if not known(value):
        return MISSING
    text = f"{math.floor(round(1000 * value, 6)) / 10:.1f} %" if unit == "share" else f"{value:.{_places(value)}f}"
    return text.replace("-", "−")


def interval(ends: Interval, unit: str = "") -> str:
    """Two ends, rounded outwards: rounding must not make the interval look narrower than it is."""
    if not all(map(known, ends)):
        return MISSING
    scale, places, sign = (100, 1, " %") if unit == "share" else (1, _places(*ends), "")
    low, high = (round(end * scale * 10**places, 6) for end in ends)
    low, high = math.floor(low) / 10**places, math.ceil(high) / 10**places
    return f"{low:.{places}f} to {high:.{places}f}{sign}".replace("-", "−")


def _places(*values: Number) -> int:
    """Three decimals from 0.01 to 10; else those, seven at most, that give the largest three significant digits."""
    size = max(map(abs, values))
    return 3 if size == 0 or 0.01 <= size < 10 else min(7, max(0, 2 - math.floor(math.log10(size))))


def breakable(name: str) -> str:
    """A long id, escaped, that may be broken after each separator."""
    return escape(name).replace("/", "/<wbr>").replace(".", ".<wbr>").replace("_", "_<wbr>")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of plain text; the first cell of a row is its heading."""
    top = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    cells = [(name, "".join(f"<td>{escape(cell)}</td>" for cell in rest)) for name, *rest in rows]
    body = "".join(f'<tr><th scope="row">{escape(name)}</th>{rest}</tr>' for name, rest in cells)
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def figure(title: str, chart: str, caption: str = "") -> str:
    """A chart with its title; chart and caption are HTML."""
    return f"<figure><h3>{escape(title)}</h3>{chart}<figcaption>{caption}</figcaption></figure>"


def warnings(report: Report) -> list[str]:
    """What makes the figures of a run worth little, in sentences: said above them on the page and in the terminal."""
    rate, lead, steps = report.mean("extraction_rate"), report.mean("fve_rl"), len(steps_of(report))
    controls = [report.mean(name) for name in CONTROLS if name in report.scores]
    tokens = report.mean(best_of_tokens(report))
    skipped = sum(bool(row.get("skipped")) for row in report.history)
    tail = [row.get("identical_texts") for row in steps_of(report)[-20:]]
    alike = sum(filter(known, tail)) / len(tail) if tail and all(map(known, tail)) else 0.0
    dropped = report.figures.get("labels_too_long") or 0.0
    sentences = {
        f"Only {written(rate, 'share')} of the responses hold an explanation; others are scored as empty.": rate < 0.5,
        f"The AV has collapsed: at the end of RL {written(alike, 'share')} of its texts equal another sample of the same "
        f"activation.": alike > COLLAPSED,
        f"A table of the last tokens scores {written(tokens)}, without any text: the explanations say no more than that.": (
            tokens >= lead
        ),
        "No control scores lower than the headline: the score does not come from the explanations.": controls
        and all(value > lead - 0.005 for value in controls),
        f"{skipped} of {steps} training steps were skipped: they were not finite.": skipped > 0.1 * steps,
        f"{written(dropped, 'share')} of the labels are longer than prompts.max_new_tokens: the AV was not trained on "
        f"them.": dropped > 0.1,
    }
    return [sentence for sentence, true in sentences.items() if true]


def alert(report: Report) -> str:
    """The warnings as they stand at the top of the page."""
    said = "".join(f"<p>{sentence}</p>" for sentence in warnings(report))
    return f'<div class="warning" role="alert">{said}</div>' if said else ""


def best_of_tokens(report: Report) -> str:
    """The name of the best baseline of the last tokens; "" where none was measured."""
    return max((name for name in TOKENS if name in report.scores), key=report.mean, default="")


def header(report: Report) -> str:
    """Title, warnings, the leading score with three that give it a scale, and what FVE means."""
    scores, numbers = report.scores, ""
    lead = next((name for name in (*HEADLINES, *scores) if name in scores), "")
    for name in dict.fromkeys((lead, "fve_warm", "fve_gold_text", best_of_tokens(report))):
        if name in scores:
            label, unit = scores[name]["label"], scores[name]["unit"]
            title = HEADLINES.get(name, label) if name == lead else label
            title = f"No text: {label}" if name in TOKENS else title
            numbers += f"<div><dt>{escape(title)}</dt><dd>{written(scores[name]['mean'], unit)}</dd>"
            numbers += f"<dd>95 % interval {interval(scores[name]['ci95'], unit)}</dd></div>"
    rows, documents = (written(report.figures[name]) for name in ("heldout_rows", "heldout_documents"))
    return (
        f'<header><h1>{escape(report.title)}</h1><p class="meta">Subject {breakable(report.subject)} · residual stream '
        f"after block {report.layer} · {escape(report.created)}</p>{alert(report)}"
        f'<div class="columns"><div><dl>{numbers}</dl><p class="meta">Measured on {rows} activations from {documents} '
        f"held-out documents.</p></div><p>{FVE_IN_WORDS if lead in HEADLINES else ''}</p></div></header>"
    )


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


def training(report: Report) -> str:
    """The learning curve, and a panel for every other metric."""
    history = steps_of(report)
    window = len(history) // 15 | 1
    if not history:
        return '<p class="missing">No RL steps are recorded.</p>'
    placed = ELSEWHERE.union(*(lines for _, _, lines in PANELS))
    others = dict.fromkeys(key for row in history for key in row if key not in placed and not key.startswith("probe/"))
    drawn = [(history, window, *facts) for facts in (*PANELS, *((key, "", {key: key}) for key in others))]
    panels = "".join(panel(*facts) for facts in drawn + probed(report.history))
    said = f"<p>Faint lines are single steps, strong ones running means over {window} steps.</p>" if window > 1 else ""
    return f'{said}{learning_curve(report, window)}<div class="panels">{panels}</div>'


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


def steps_of(report: Report) -> Sequence[Mapping]:
    """The history without what was measured before the first step."""
    return [row for row in report.history if row["step"] > 0]


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


def score_of(row: Mapping) -> Number:
    """What an example is ranked by: its FVE after RL, else before; far below all others where it has none."""
    value = row.get("fve_rl", row.get("fve_warm"))
    return value if known(value) else -1e9


def picks(report: Report) -> str:
    """The three best examples beside the three worst."""
    ranked = sorted(enumerate(report.examples, 1), key=lambda numbered: -score_of(numbered[1]))
    if not ranked or score_of(ranked[0][1]) == -1e9:
        return '<p class="missing">No example has a score.</p>'
    columns = ""
    for title, rows in (("Highest FVE", ranked[:3]), ("Lowest FVE", ranked[3:][:-4:-1])):
        columns += f"<div><h3>{title}</h3>{''.join(example(i, row, 'open') for i, row in rows)}</div>"
    return f'<p>Chosen by their score among the {len(ranked)} below.</p><div class="columns picks">{columns}</div>'


def example(i: int, row: Mapping, state: str = "") -> str:
    """One example: a line that opens to the passage around its token, and its texts."""
    tags, texts, context, token, after = "", "", row["context"], row["token"], row["after"]
    for key, (name, css) in TAGS.items():
        tags += f'<span class="{css}">{name} <b>{written(row[key])}</b></span>' if key in row else ""
    for key, (name, css) in TEXTS.items():
        texts += f'<div class="{css}"><h4>{name}</h4><p>{escape(row[key]) or MISSING}</p></div>'
    visible = token.replace("\n", "↵").replace("\t", "⇥").replace(" ", "␣")
    marked = token if token.strip() else visible + "\n" * token.count("\n")
    context = "…" + context[-300:] if len(context) > 300 else context
    after = after[:120] + "…" if len(after) > 120 else after
    return (
        f'<details class="example" data-score="{score_of(row)}" {state}><summary title="{escape(row["document"])}">'
        f"<span>{i}</span><span>{breakable(row['document'])} <mark>{escape(visible)}</mark></span><span "
        f'class="tags">{tags}</span></summary><div class="context">{escape(context)}<mark>{escape(marked)}</mark><span '
        f'class="after">{escape(after)}</span></div><div class="texts">{texts}</div></details>'
    )


def examples(report: Report) -> str:
    """All examples. The script sorts and filters them; without it they stand in the order of the evaluation."""
    return (
        "<p>One held-out activation from each of some documents, chosen without a look at any score. The marked token "
        "is where the activation was read; the grey text after it was not yet visible to the subject.</p>"
        '<form class="controls" hidden><label>Order <select><option value="0">as evaluated</option><option value="-1">'
        'best first</option><option value="1">worst first</option></select></label><label>Filter <input type="search" '
        'placeholder="text, token, document"></label><output></output></form><div class="examples">'
        f"{''.join(example(i, row) for i, row in enumerate(report.examples, 1))}</div>"
    )


def the_run(report: Report) -> str:
    """What made the figures: the command, versions and devices, time, and every setting."""
    figures = {name.replace("_", " "): value for name, value in report.figures.items()}
    seconds = {**report.seconds, "total": sum(report.seconds.values())}
    facts = {"Made with": report.run, "Figures": figures, "Seconds": seconds}
    tables = "".join(table((title, ""), [(k, written(v)) for k, v in rows.items()]) for title, rows in facts.items())
    return (
        f'<pre>{escape(report.command)}</pre><div class="tables">{tables}</div>'
        f"<details><summary>Every setting</summary><pre>{escape(report.config)}</pre></details>"
    )


def render(report: Report) -> str:
    """The whole page. Its security policy forbids every script but ours, and every request."""
    sections = (
        ("Good and bad examples", picks(report)),
        ("Measurements", measurements(report)),
        ("Training", training(report)),
        ("All examples", examples(report)),
        ("The run", the_run(report)),
    )
    links, body = "", ""
    for i, (title, content) in enumerate(sections, 1):
        links += f'<li><a href="#section-{i}">{title}</a></li>'
        body += f'<section id="section-{i}"><h2>{title}</h2>{content}</section>'
    ours = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{ours}'"
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
        f'content="width=device-width, initial-scale=1"><meta http-equiv="Content-Security-Policy" content="{policy}">'
        f"<title>{escape(report.title)}</title><style>{CSS}</style></head><body>"
        f'<nav aria-label="Contents"><ol>{links}</ol></nav>'
        f"<main>{header(report)}{body}</main><script>{SCRIPT}</script></body></html>\n"
    )
