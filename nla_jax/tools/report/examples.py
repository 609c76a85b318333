"""Examples: three of the best beside three of the worst, and all of them, which the script sorts and filters."""

from collections.abc import Mapping
from html import escape

from .charts import Number, known
from .pieces import MISSING, breakable, written
from .report import Report

TEXTS = {"labels": ("Label", "gold"), "warm": ("AV before RL", "warm"), "rl": ("AV after RL", "rl")}
TAGS = {"fve_warm": ("FVE before RL", "warm"), "fve_rl": ("FVE after RL", "rl"), "cos_rl": ("cosine", "")}
ORDERS = {"": "as evaluated", "best": "best first", "worst": "worst first", "gain": "gained most by RL first"}
BANDS = {"": "any", "-9e8 0": "below 0", "0 0.5": "0 to 0.5", "0.5 9e9": "above 0.5"}


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
    context, token, after = row["context"], row["token"], row["after"]
    visible = in_a_line(token)
    marked = token if token.strip() else visible + "\n" * token.count("\n")
    context = "…" + context[-300:] if len(context) > 300 else context
    after = after[:120] + "…" if len(after) > 120 else after
    kinds = escape("\n".join(row.get("kinds", ())))
    gain = f' data-gain="{row["fve_rl"] - row["fve_warm"]}"' if both_known(row) else ""
    return (
        f'<details class="example" data-score="{score_of(row)}"{gain} data-kinds="{kinds}" {state}>'
        f'<summary title="{escape(row["document"])}"><span>{i}</span><span>{breakable(row["document"])} '
        f'<mark>{escape(visible)}</mark></span>{tags(row)}</summary><div class="context">{escape(context)}'
        f'<mark>{escape(marked)}</mark><span class="after">{escape(after)}</span></div>{texts(row)}</details>'
    )


def in_a_line(token: str) -> str:
    """A token with its blanks made visible."""
    return token.replace("\n", "↵").replace("\t", "⇥").replace(" ", "␣")


def both_known(row: Mapping) -> bool:
    """Whether it is known what RL has changed."""
    return known(row.get("fve_rl")) and known(row.get("fve_warm"))


def tags(row: Mapping) -> str:
    """The figures of a row, and its kinds."""
    found = ""
    for key, (name, css) in TAGS.items():
        found += f'<span class="{css}">{name} <b>{written(row[key])}</b></span>' if key in row else ""
    return (
        f'<span class="tags">{found}{"".join(f"<span>{escape(kind)}</span>" for kind in row.get("kinds", ()))}</span>'
    )


def texts(row: Mapping) -> str:
    """What is said of a row, side by side."""
    found = ""
    for key, (name, css) in TEXTS.items():
        found += f'<div class="{css}"><h4>{name}</h4><p>{escape(row[key]) or MISSING}</p></div>' if key in row else ""
    return f'<div class="texts">{found}</div>'


def examples(report: Report) -> str:
    """All examples. The script sorts and filters them; without it they stand in the order of the evaluation."""
    kinds = dict.fromkeys(kind for row in report.examples for kind in row.get("kinds", ()))
    any_kind = {"": "any"} | {kind: kind for kind in sorted(kinds)}
    orders = {key: ORDERS[key] for key in ORDERS if key != "gain" or any(map(both_known, report.examples))}
    return (
        "<p>One held-out activation from each of some documents, chosen without a look at any score. The marked token "
        "is where the activation was read; the grey text after it was not yet visible to the subject.</p>"
        f'<form class="controls" hidden>{choice("Order", orders)}{choice("FVE", BANDS)}'
        f"{choice('Kind of token', any_kind) if kinds else ''}"
        '<label>Search <input type="search" name="search" placeholder="text, token, document"></label><output></output>'
        f'</form><div class="examples">{"".join(example(i, row) for i, row in enumerate(report.examples, 1))}</div>'
    )


def choice(name: str, options: Mapping[str, str], field: str = "") -> str:
    """A labelled choice; `options`: what is shown of each value."""
    shown = "".join(f'<option value="{escape(value)}">{escape(text)}</option>' for value, text in options.items())
    return f'<label>{name} <select name="{field or name.split()[0].lower()}">{shown}</select></label>'
