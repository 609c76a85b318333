"""Held-out documents as heat maps: each evaluated token coloured by its FVE, with what was said of it. The first one
is whole where its text is there.

Everything stands in the page. The script shows one document and one token at a time; without it the first document and
all that was said of its tokens are there to read."""

from collections.abc import Mapping
from html import escape

from .charts import Number, known
from .examples import both_known, choice, in_a_line, score_of, tags, texts
from .pieces import MISSING, breakable, written
from .report import Report

COLOURS = {"rl": "FVE after RL", "warm": "FVE before RL", "gain": "what RL changed"}
DEEPEST = 60  # per cent of its colour that a token of FVE 1 or -1 has


def documents(report: Report) -> str:
    """The heat maps, with choices of document and colour."""
    if report.documents is None:
        again = "Delete stages/evaluate.json and run nla evaluate again; its texts are kept."
        return f'<p class="missing">This evaluation was made before documents were kept. {again}</p>'
    if not report.documents:
        return '<p class="missing">No document was evaluated.</p>'
    whole = "note" in report.documents[0]
    names = {str(i): f"{i + 1}. {document['document']}" for i, document in enumerate(report.documents)}
    names["0"] += " (whole)" if whole else ""
    rows = [row for document in report.documents for row in document["rows"]]
    able = {
        "rl": any(known(row.get("fve_rl")) for row in rows),
        "warm": any(known(row.get("fve_warm")) for row in rows),
    }
    able["gain"] = any(map(both_known, rows))
    colours = {key: name for key, name in COLOURS.items() if able[key]}
    maps = "".join(heat_map(i, document) for i, document in enumerate(report.documents))
    return (
        f"<p>{escape(report.whole)} {'The others are' if whole else 'These are'} documents of the examples, chosen without "
        "a look at any score.</p><p>Blue: the explanation rebuilds the activation of that token, the deeper the better. No "
        "colour: as far off as the mean activation. Red: further off. Point at a token, click it, or move with the arrow "
        "keys to read its explanation.</p>"
        f'<form class="maps" hidden>{choice("Document", names)}{choice("Colour", colours) if colours else ""}'
        '<span class="scale" aria-hidden="true">−1 <span class="ramp fve"></span> 1</span></form>'
        f"{maps}"
    )


def heat_map(number: int, document: Mapping) -> str:
    """One document: its text, how much of it was evaluated, and what was said of each token."""
    text, rows, strip, done = document["text"], document["rows"], "", 0
    for i, row in enumerate(rows):
        strip += unread(text[done : row["start"]]) + token(f"{number}-{i}", text[row["start"] : row["end"]], row)
        done = row["end"]
    strip += unread(text[done:])
    readings = "".join(reading(f"{number}-{i}", text[row["start"] : row["end"]], row) for i, row in enumerate(rows))
    note = document.get("note") or coverage(len(rows), document["tokens"])
    return (
        f'<div class="map" data-map="{number}"{" hidden" if number else ""}><h3>{breakable(document["document"])}</h3>'
        f'<div class="columns"><div><div class="strip" role="listbox" aria-label="Evaluated tokens" '
        f'aria-orientation="horizontal">{strip}</div><p class="note">{escape(note)}</p></div>'
        f'<div class="readings">{readings}</div></div></div>'
    )


def coverage(rows: int, tokens: Number | None) -> str:
    """How many tokens of a document were evaluated; `tokens`: 0 where that is not known."""
    some = f"the first {tokens} tokens" if tokens else "the tokens"
    return f"{rows} of {some} {'was' if rows == 1 else 'were'} evaluated; the grey ones were not."


def unread(text: str) -> str:
    """Text of tokens that were not evaluated."""
    return f'<span class="unread" role="presentation">{escape(text)}</span>' if text else ""


def token(name: str, text: str, row: Mapping) -> str:
    """An evaluated token in its colour. The script needs both of its scores, for the other colours."""
    score = score_of(row)
    fve = f", FVE {written(score)}" if score > -1e9 else ""
    scores = "".join(f' data-{key}="{row[f"fve_{key}"]}"' for key in ("rl", "warm") if known(row.get(f"fve_{key}")))
    shown = '<span class="sign" aria-hidden="true">↵</span>\n'.join(map(escape, text.split("\n")))
    return (
        f'<span class="token" role="option" aria-selected="false" tabindex="-1"{scores} style="{tint(score)}" '
        f'aria-label="{escape(in_a_line(text))}{fve}" aria-describedby="said-{name}" title="{escape(said(row))}">'
        f"{shown}</span>"
    )


def tint(score: float) -> str:
    """The style of a token of this FVE, without a colour where it has none; browser/page.js says the same."""
    depth = round(DEEPEST * min(1.0, abs(score))) if score > -1e9 else 0
    return f"--hue:var({'--alert' if score < 0 else '--rl'});--share:{depth}%"


def said(row: Mapping) -> str:
    """The explanation of a row: after RL, or before it where there is no other."""
    return row["rl"] if "rl" in row else row.get("warm", "")


def reading(name: str, text: str, row: Mapping) -> str:
    """What was said of a token, how good it is, and what else could be said."""
    place = f'<span class="note">token {written(row["place"])}</span>' if row.get("place") else ""
    others = {key: value for key, value in row.items() if key != "rl"}
    return (
        f'<div class="reading"><p><mark>{escape(in_a_line(text))}</mark> {place}</p>'
        f'<p class="said" id="said-{name}">{escape(said(row)) or MISSING}</p>{tags(row)}{texts(others)}</div>'
    )
