"""One self-contained HTML page about a run: headline, curves, controls, health, examples, all numbers.

`render(data)` needs nothing but its argument and asks nothing of the network. Every value may be missing, None or not
finite: it is shown as "–", and a chart without data gives way to a sentence that says so.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape

from .charts import (
    Bar,
    Series,
    bar_chart,
    histogram,
    items,
    line_chart,
    number,
    numbers,
    responsive,
    short,
)
from .style import CSS

MISSING = "–"
CONTEXT_CHARACTERS = 300
AFTER_CHARACTERS = 120
OPEN_EXAMPLES = 3

FVE_IN_A_SENTENCE = (
    "FVE, the fraction of variance explained, says how much of what distinguishes one activation from another can be "
    "rebuilt from its written explanation alone: 1 is a perfect reconstruction, 0 is what guessing the mean activation "
    "every time would score, and a negative value is worse than that guess.")

# key, name, how it is written. A key of the summary that is not listed here still gets its row.
FIGURES = (
    ("fve_rl", "FVE after RL", "score"), ("fve_rl_ci95", "FVE after RL, 95 % interval", "interval"),
    ("fve_rl_median", "FVE after RL, median row", "score"), ("fve_warm", "FVE after the warm start", "score"),
    ("fve_rl_meannorm", "FVE after RL, mean re-normalised (reads higher)", "score"),
    ("cos_rl", "Cosine after RL", "score"), ("fve_gold_text", "FVE of the gold label text", "score"),
    ("fve_no_injection", "FVE without injection", "score"), ("fve_empty", "FVE of the empty text", "score"),
    ("fve_shuffled", "FVE of shuffled pairs", "score"), ("extraction_rate", "Explanations extracted", "percent"),
    ("extraction_rate_warm", "Explanations extracted before RL", "percent"),
    ("fve_warm_ci95", "FVE after the warm start, 95 % interval", "interval"),
    ("fve_rl_temperature_1", "FVE after RL, sampled at temperature 1", "score"),
    ("fve_gold_text_warm", "FVE of the gold label text, warm AR", "score"),
    ("mean_length", "Mean explanation length, tokens", "number"),
    ("injection_scale", "Length at which activations are injected", "number"),
    ("skipped_steps", "RL steps skipped for NaN", "count"),
    ("logprob_gap_max", "Largest sampler–trainer log-prob gap", "number"),
    ("subject_loss", "Subject loss, nats per token", "number"), ("bigram_loss", "Bigram loss, same tokens", "number"),
    ("unigram_loss", "Unigram loss, same tokens", "number"), ("heldout_documents", "Held-out documents", "count"),
    ("heldout_rows", "Held-out rows", "count"))


# --- numbers and pieces of text ---------------------------------------------------------------------------------------

def decimals(value: float, places: int = 3) -> str:
    return f"{value:.{places}f}".replace("-", "−")


def score(value: object) -> str:
    """An FVE or a cosine, to three decimals."""
    value = number(value)
    return MISSING if value is None else decimals(value)


def interval(value: object) -> str:
    """Two ends, rounded outwards: rounding must not make the interval look narrower than it is."""
    ends = interval_ends(value)
    if ends is None:
        return MISSING
    low, high = (round(1000 * end, 6) for end in ends)
    return f"{decimals(math.floor(low) / 1000)} to {decimals(math.ceil(high) / 1000)}"


def interval_ends(value: object) -> tuple[float, float] | None:
    ends = numbers(value)
    return (ends[0], ends[1]) if len(ends) == 2 else None


def percent(value: object) -> str:
    """A rate cut, not rounded, to a tenth of a percent: only all of them are 100 %."""
    value = number(value)
    return MISSING if value is None else f"{decimals(math.floor(round(1000 * value, 6)) / 10, 1)} %"


def plain(value: object) -> str:
    value = number(value)
    return MISSING if value is None else short(value)


def count(value: object) -> str:
    value = number(value)
    return MISSING if value is None else f"{value:,.0f}".replace(",", "\u202f")


def anything(value: object) -> str:
    """A value of a kind this page does not know."""
    return plain(value) if value is None or isinstance(value, float) else str(value)


WRITTEN = {"score": score, "interval": interval, "percent": percent, "number": plain, "count": count}


def words(value: object) -> str:
    """Any value as escaped text."""
    return MISSING if value is None or value == "" else escape(str(value))


def mapping(data: Mapping, key: str) -> Mapping:
    value = data.get(key)
    return value if isinstance(value, Mapping) else {}


def rows_of(data: Mapping, key: str) -> list[Mapping]:
    return [row for row in items(data.get(key)) if isinstance(row, Mapping)]


def missing(sentence: str) -> str:
    return f'<p class="missing">{escape(sentence)}</p>'


def figure(chart: str, caption: str = "", legend: Sequence[tuple[str, str]] = (), title: str = "") -> str:
    """A chart with its title, a legend of (name, css) and a caption; all but the chart are plain text."""
    keys = "".join(f'<span class="{css}">{escape(name)}</span>' for name, css in legend)
    return ("<figure>" + (f"<h3>{escape(title)}</h3>" if title else "")
            + (f'<div class="legend">{keys}</div>' if keys else "") + chart
            + (f"<figcaption>{escape(caption)}</figcaption>" if caption else "") + "</figure>")


def table(head: Sequence[str], rows: Sequence[tuple[str, str]]) -> str:
    """Two columns; cells are plain text."""
    top = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    body = "".join(f'<tr><th scope="row">{escape(name)}</th><td>{escape(value)}</td></tr>' for name, value in rows)
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def folded_table(head: Sequence[str], rows: Sequence[tuple[str, str]]) -> str:
    """The numbers behind a chart, for those who cannot or would rather not read them off it."""
    return f"<details><summary>The numbers</summary>{table(head, rows)}</details>"


# --- the sections, in the page's order --------------------------------------------------------------------------------

def header(data: Mapping) -> str:
    summary = mapping(data, "summary")
    beside = [("Gold label text", "fve_gold_text"), ("Shuffled pairs", "fve_shuffled")]
    if number(summary.get("fve_rl")) is None:
        title, headline, under = "Held-out FVE after the warm start", "fve_warm", "RL has not been evaluated"
    else:
        title, headline = "Held-out FVE after RL", "fve_rl"
        under = f"95 % interval {interval(summary.get('fve_rl_ci95'))}"
        beside.insert(0, ("Warm start", "fve_warm"))
    meta = (f"Subject {words(data.get('subject'))} · residual stream after block {words(data.get('layer'))} · "
            f"{words(data.get('created'))}")
    small = "".join(f"<div><dt>{name}</dt><dd>{score(summary.get(key))}</dd></div>" for name, key in beside)
    return (f'<header><h1>{words(data.get("title"))}</h1><p class="meta">{meta}</p>'
            f'<dl class="headline"><div class="main"><dt>{title}</dt><dd>{score(summary.get(headline))}'
            f'<div class="interval">{under}</div></dd></div>{small}</dl><p>{FVE_IN_A_SENTENCE}</p>'
            f'<p class="meta">Measured on {count(summary.get("heldout_rows"))} activations from '
            f'{count(summary.get("heldout_documents"))} held-out documents.</p></header>')


def steps_of(data: Mapping) -> list[Mapping]:
    """The history's rows that have a step, in order."""
    return sorted((row for row in rows_of(data, "history") if (number(row.get("step")) or 0) > 0),
                  key=lambda row: float(row["step"]))


def column(history: Sequence[Mapping], key: str) -> list[tuple[float, float | None]]:
    return [(float(row["step"]), number(row.get(key))) for row in history]


def learning_curve(data: Mapping) -> str:
    history, summary = steps_of(data), mapping(data, "summary")
    batch = column(history, "fve")
    heldout = [point for point in column(history, "heldout_fve") if point[1] is not None]
    if not heldout and not numbers(y for _, y in batch):
        return missing("No RL steps are recorded, so there is no curve to draw.")
    warm, ends, gold = (number(summary.get("fve_warm")), interval_ends(summary.get("fve_rl_ci95")),
                        number(summary.get("fve_gold_text")))
    start = [(0.0, warm)] if warm is not None else []
    series = [Series("Training batch", "control faint", [(0.0, None), *batch]),
              Series("Held-out", "rl", start + heldout, dots=True),
              Series("Warm start, held-out", "warm", start, dots=True)]
    last = batch[-1][0]

    def draw(width: int) -> str:
        return line_chart(
            [s for s in series if s.points], width, 360 if width > 500 else 300, "FVE against RL steps", "RL step",
            "FVE", include=(0.0,), log_x=True,
            rules=[(f"gold label text {score(gold)}", gold)] if gold is not None else (),
            interval=(f"Final evaluation, 95 % interval {interval(ends)}", last, *ends) if ends else None)

    caption = ("Each point of the line is one training batch, unsmoothed. The step axis is logarithmic, log(1 + step), "
               "so that equal distances are equal ratios of training; the warm start stands at step 0. Training texts are "
               "drawn at the training temperature, held-out texts as in the evaluation, but of fewer activations.")
    if ends:
        caption += (" The vertical bar at the last step is the 95 % interval of the final evaluation, which has more of them: "
                    "the last dot may lie outside.")
    rows = [(short(at), score(value)) for at, value in start + heldout]
    legend = [("training batch", "control"), ("held-out", "rl"), ("warm start", "warm")]
    return (figure(responsive(draw), caption, legend)
            + folded_table(("RL step", "Held-out FVE"), rows))


def controls(data: Mapping) -> str:
    summary = mapping(data, "summary")
    ends = interval_ends(summary.get("fve_rl_ci95"))
    listed = (("Gold label text", "gold", "fve_gold_text"), ("AV after RL", "rl", "fve_rl"),
              ("AV warm start", "warm", "fve_warm"), ("No injection", "control", "fve_no_injection"),
              ("Empty text", "control", "fve_empty"), ("Shuffled pairs", "control", "fve_shuffled"))
    bars = [Bar(name, css, number(summary.get(key)), score(summary.get(key)), ends if key == "fve_rl" else None)
            for name, css, key in listed]
    if all(bar.value is None for bar in bars):
        return missing("None of the controls has been measured.")
    return figure(
        responsive(lambda width: bar_chart(bars, width, "Held-out FVE of the controls", "held-out FVE", (1.0,))),
        "What the reconstructor reads: the label the warm start learned from; the verbalizer’s text after RL (with its "
        "95 % interval) and before; its text when no activation is injected; nothing at all; the text of another "
        "activation. The last three should not be far above zero, else the score comes from something other than the "
        f"activation. “{MISSING}” is a control that was not measured.")


def distributions(data: Mapping) -> str:
    row_fve = mapping(data, "row_fve")
    groups = [(name, css, values) for name, css, values in (
        ("shuffled pairs", "control", numbers(row_fve.get("shuffled"))),
        ("warm start", "warm", numbers(row_fve.get("warm"))), ("after RL", "rl", numbers(row_fve.get("rl")))) if values]
    lengths = numbers(data.get("lengths"))
    parts = []
    if groups:
        values = sorted(x for _, _, group in groups for x in group)
        low = values[len(values) // 200]  # half a percent of far outliers may not squeeze the rest into one bin
        limits = (low, values[-1] if values[-1] > low else low + 1)
        outside = sum(x < low for x in values)
        caption = "Dashed lines are medians." + (
            f" {count(outside)} of {count(len(values))} values lie below {short(low)} and are counted in the first bin."
            if outside else "")
        parts.append(figure(histogram(groups, "Score of single rows", "1 − mse of the row / variance", "share of rows",
                                      limits), caption, [(name, css) for name, css, _ in groups],
                            "Score per activation"))
    else:
        parts.append(missing("No scores of single rows are recorded."))
    if lengths:
        low, span = min(lengths), max(lengths) + 1 - min(lengths)
        width = math.ceil(span / 36)  # whole tokens: else some bins would hold more lengths than their neighbours
        bins = math.ceil(span / width)
        parts.append(figure(histogram([("after RL", "rl", lengths)], "Explanation length", "tokens",
                                      "share of explanations", (low, low + bins * width), bins),
                            f"{count(len(lengths))} explanations, {width} token{'s' if width > 1 else ''} per bin. "
                            "The dashed line is the median.", [("after RL", "rl")], "Explanation length"))
    else:
        parts.append(missing("No explanation lengths are recorded."))
    return f'<div class="pair">{"".join(parts)}</div>'


def prefix_curve(data: Mapping) -> str:
    curve = mapping(data, "prefix_curve")
    pairs = zip(map(number, items(curve.get("tokens"))), map(number, items(curve.get("fve"))))
    points = sorted((at, value) for at, value in pairs if at is not None and value is not None)
    if not points:
        return missing("The score by prefix length has not been measured.")
    series = [Series("Prefix", "rl", points, dots=True)]
    chart = responsive(lambda width: line_chart(series, width, 280, "FVE by explanation prefix length",
                                                "tokens of the explanation", "FVE", include=(0.0,)))
    return (figure(chart, "The reconstructor reads only the first tokens of each explanation after RL. A curve that "
                          "still rises at its end says that the last words carry information too.")
            + folded_table(("Tokens", "FVE"), [(short(at), score(value)) for at, value in points]))


# title, unit, (key, name, css) of its lines, values that the axis must reach
HEALTH = (
    ("Reward", "", (("reward", "reward", "rl"),), ()),
    ("KL to the warm start", "nats", (("kl", "KL", "rl"),), (0.0,)),
    ("Entropy", "nats per token", (("entropy", "entropy", "rl"),), (0.0,)),
    ("Explanation length", "tokens", (("length", "length", "rl"),), (0.0,)),
    ("Extraction rate", "share", (("extraction_rate", "extraction rate", "rl"),), (0.0, 1.0)),
    ("Sampler–trainer log-prob gap", "nats", (("logprob_gap_max", "max", "warm"), ("logprob_gap_mean", "mean", "rl")),
     (0.0,)),
    ("Gradient norms", "", (("av_grad_norm", "AV", "rl"), ("ar_grad_norm", "AR", "warm")), (0.0,)),
    ("Seconds per phase", "seconds", (("seconds_rollout", "rollout", "rl"), ("seconds_host", "host", "warm"),
                                      ("seconds_train", "train", "third")), (0.0,)),
    ("Throughput", "samples per second", (("samples_per_second", "samples per second", "rl"),), (0.0,)))


def health(data: Mapping) -> str:
    history = steps_of(data)
    if not history:
        return missing("No RL steps are recorded, so there is nothing to check.")
    panels = []
    for title, unit, lines, include in HEALTH:
        series = [Series(name, css, column(history, key)) for key, name, css in lines]
        series = [s for s in series if numbers(y for _, y in s.points)]
        if not series:
            panels.append(f"<figure><h3>{escape(title)}</h3>{missing('Not recorded.')}</figure>")
            continue
        gaps = sum(y is None for s in series for _, y in s.points)
        chart = line_chart(series, 280, 170, f"{title} against RL steps", "step", unit, include)
        panels.append(figure(chart, f"{count(gaps)} values missing or not finite." if gaps else "",
                             [(s.name, s.css) for s in series] if len(lines) > 1 else (), title))
    skipped = sum(numbers(row.get("skipped") for row in history))
    return (f"<p>{count(len(history))} steps, {count(skipped)} updates skipped. All axes but the reward’s include "
            f'zero.</p><div class="panels">{"".join(panels)}</div>')


def visible(token: str) -> str:
    """The token with its white space made visible, for a place where it stands alone."""
    return token.replace("\n", "↵").replace("\t", "⇥").replace(" ", "␣")


def example(index: int, row: Mapping, is_open: bool) -> str:
    context, token, after = (str(row.get(key) or "") for key in ("context", "token", "after"))
    if len(context) > CONTEXT_CHARACTERS:
        context = "…" + context[-CONTEXT_CHARACTERS:]
    if len(after) > AFTER_CHARACTERS:
        after = after[:AFTER_CHARACTERS] + "…"
    marked = token if token.strip() else visible(token) + "\n" * token.count("\n")
    tags = (f'<span class="warm">warm start <b>{score(row.get("fve_warm"))}</b></span>'
            f'<span class="rl">after RL <b>{score(row.get("fve_rl"))}</b></span>'
            f'<span>cosine {score(row.get("cos_rl"))}</span>')
    texts = "".join(f'<div class="{css}"><h3>{name}</h3><p>{words(row.get(key))}</p></div>' for name, css, key in (
        ("Label", "label", "label"), ("AV before RL", "warm", "warm"), ("AV after RL", "rl", "rl")))
    return (f'<details class="example"{" open" if is_open else ""}><summary><span class="number">{index}</span>'
            f'{words(row.get("document"))} <mark>{words(visible(token))}</mark>'
            f'<span class="tags">{tags}</span></summary>'
            f'<div><div class="context">{escape(context)}<mark>{escape(marked)}</mark>'
            f'<span class="after">{escape(after)}</span></div><div class="texts">{texts}</div></div></details>')


def examples(data: Mapping) -> str:
    rows = rows_of(data, "examples")
    if not rows:
        return missing("No examples are recorded.")
    return (f"<p>{count(len(rows))} held-out activations in the order the evaluation gave them. The marked token is "
            "where the activation was read; the grey text after it was not yet visible to the subject. Scores are "
            "those of the single row.</p>"
            + "".join(example(i, row, i <= OPEN_EXAMPLES) for i, row in enumerate(rows, 1)))


def all_figures(data: Mapping) -> str:
    summary, seconds = mapping(data, "summary"), mapping(mapping(data, "summary"), "seconds_by_stage")
    rows = [(name, WRITTEN[kind](summary.get(key))) for key, name, kind in FIGURES]
    known = {key for key, _, _ in FIGURES} | {"seconds_by_stage"}
    rows += [(str(key), anything(value)) for key, value in summary.items() if key not in known]
    parts = [table(("Figure", "Value"), rows)]
    if seconds:
        parts.append(table(("Stage", "Seconds"), [(str(stage), plain(value)) for stage, value in seconds.items()]
                           + [("total", plain(sum(numbers(seconds.values()))))]))
    else:
        parts.append(missing("No stage was timed."))
    return f'<div class="figures">{"".join(parts)}</div>'


def the_run(data: Mapping) -> str:
    """What made the figures: the command, versions and devices, and every setting."""
    facts = [(str(name), anything(value)) for name, value in mapping(data, "run").items()]
    made = table(("Made with", ""), facts) if facts else missing("Versions and devices were not recorded.")
    config = f'<details><summary>Every setting</summary><pre>{words(data["config"])}</pre></details>' if data.get("config") else ""
    return f'<pre>{words(data.get("command"))}</pre>{made}{config}'


SECTIONS: tuple[tuple[str, Callable[[Mapping], str]], ...] = (
    ("FVE against RL steps", learning_curve), ("Controls", controls), ("Distributions", distributions),
    ("FVE by length of the explanation’s prefix", prefix_curve), ("Training health", health), ("Examples", examples),
    ("All figures", all_figures), ("The run", the_run))


def render(data: Mapping) -> str:
    """The whole page as a string. Every key is optional:

    title, subject, layer, created, command: shown as they are.
    run: names and values of versions, devices, seed; config: every setting, as text.
    summary: the figures named in FIGURES, and `seconds_by_stage`, stage → seconds.
    history: one mapping per RL step with `step` (from 1), `fve`, at some steps `heldout_fve`, and the keys in HEALTH.
    prefix_curve: lists `tokens` and `fve` of equal length.
    row_fve: lists `warm`, `rl` and `shuffled` of per-row scores, 1 - mse of the row / variance.
    lengths: tokens of each explanation after RL.
    examples: mappings with document, context, token, after, label, warm, rl (texts), fve_warm, fve_rl, cos_rl.
    """
    body = "".join(f"<section><h2>{title}</h2>{section(data)}</section>" for title, section in SECTIONS)
    return ('<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{words(data.get('title'))}</title><style>{CSS}</style></head>"
            f"<body><main>{header(data)}{body}</main></body></html>\n")
