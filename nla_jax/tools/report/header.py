"""The top of the page: title, warnings, the leading score, and bars that give it a scale."""

from html import escape

from .charts import Number, axis, bar_chart, known
from .pieces import breakable, interval, written
from .report import CONTROLS, TOKENS, Report, warnings

HEADLINES = {"fve_rl": "Held-out FVE after RL", "fve_warm": "Held-out FVE after the warm start"}
CONSTANT, SHUFFLED = "fve_constant", "fve_shuffled"
SCALE = {  # the bars beside the headline, by name of their score: what stands before its label, and its colour
    "fve_rl": ("", "rl"),
    "fve_warm": ("", "warm"),
    "fve_gold_text": ("", "gold"),
    **dict.fromkeys((*reversed(TOKENS), CONSTANT), ("No text: ", "third")),
    **dict.fromkeys(reversed(CONTROLS), ("Control: ", "control")),
}


def header(report: Report) -> str:
    """Title, where the run stands, warnings, the leading score beside its bars, and what FVE means."""
    scores = report.scores
    lead = next((name for name in (*HEADLINES, *scores) if name in scores), "")
    state = f'<p class="state">{escape(report.state)}</p>' if report.state else ""
    words = fve_in_words(report) if lead in HEADLINES else ""
    return (
        f'<header><h1>{escape(report.title)}</h1><p class="meta">Subject {breakable(report.subject)} · residual stream '
        f"{escape(report.place)} · {escape(report.created)}</p>{state}{alert(report)}"
        f'<div class="columns lead"><div>{headline(report, lead)}{words}</div>{scale(report)}</div></header>'
    )


def alert(report: Report) -> str:
    """The warnings as they stand at the top of the page."""
    said = "".join(f"<p>{sentence}</p>" for sentence in warnings(report))
    return f'<div class="warning" role="alert">{said}</div>' if said else ""


def headline(report: Report, lead: str) -> str:
    """The leading score with its interval, and on what it was measured; nothing before the evaluation."""
    if not lead:
        return '<p class="missing">Nothing was measured yet.</p>'
    score = report.scores[lead]
    rows, documents = (written(report.figures.get(name)) for name in ("heldout_rows", "heldout_documents"))
    return (
        f"<dl><div><dt>{escape(HEADLINES.get(lead, score['label']))}</dt><dd>{written(score['mean'], score['unit'])}"
        f"</dd><dd>95 % interval {interval(score['ci95'], score['unit'])}</dd></div></dl>"
        f'<p class="meta">Measured on {rows} activations from {documents} held-out documents.</p>'
    )


def scale(report: Report) -> str:
    """The headline as a bar among the others of its kind: explanations, what needs no text, controls."""
    scores = {name: report.scores[name] for name in SCALE if known(report.mean(name))}
    bars = []
    for name, score in scores.items():
        before, css = SCALE[name]
        label = score["label"][:1].lower() + score["label"][1:] if before else score["label"]
        said = f"{written(score['mean'])} ({interval(score['ci95'])})"
        bars.append((before + label, css, score["mean"], score["ci95"], said))
    reach = [end for score in scores.values() for end in (score["mean"], *score["ci95"]) if known(end)]
    if not bars:
        return ""
    chart = bar_chart("FVE of the headline and its baselines", bars, axis("FVE", [0.0, 1.0, *reach]))
    return f"<figure><h3>Beside baselines and controls (higher is better)</h3>{chart}</figure>"


def fve_in_words(report: Report) -> str:
    """What FVE is, and what its 0 means for a reconstruction that is normalised."""
    here = lambda value: f" (here {written(value)})" if known(value) else ""
    constant: Number = report.mean(CONSTANT)
    return (
        "<p>FVE, the fraction of variance explained, says how much of what distinguishes one activation from another "
        "can be rebuilt from its written explanation alone. 1 is a perfect reconstruction, 0 the error of always "
        "guessing the mean activation.</p><p>A reconstruction cannot be that guess: it is normalised to the length of "
        "an activation, and the mean is shorter. So a text that says nothing does not score 0. The best constant "
        f"reconstruction scores below 0{here(constant)}, the text of another activation far below"
        f"{here(report.mean(SHUFFLED))}.</p>"
    )
