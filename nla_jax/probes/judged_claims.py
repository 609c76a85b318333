"""Are the explanations true, as a judge finds? Claims of any kind, whoever wrote the labels.

Two steps, as in the paper: a model lists what a text claims, without seeing what it is about; then it judges each of
these claims by the document up to the row's token. The same claims are judged by another document too. A judge that
finds them true there as well says yes to everything, and its precision means nothing.

claims.py checks claims by grammar, without a judge, where the labels were written by a formula.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from nla_jax.data.activations import TEXT
from nla_jax.fve import mse
from nla_jax.labels.asking import Question, Tool
from nla_jax.probes.claims import EXACT
from nla_jax.probes.fidelity import derangement
from nla_jax.probes.probe import Context, probe

SHOWN = 2000  # characters of the document's end that the judge sees
MOST = 20  # claims of a text
LEVELS = ("theme", "entity", "detail")
VERDICTS = ("true", "false_but_related", "false_and_unrelated", "cannot_tell")

LIST = """\
Below, in <text> tags, stands an explanation of what a language model has in mind at one place of a document that you do \
not see. List what it claims about the document or about what comes next there: each thing that somebody who has the \
document could check, one at a time, the smallest that make sense alone. At most 20.

Give each a level: "theme" for the kind or topic of the text, "entity" for a named person, place, thing or work, "detail" \
for anything else, such as words, grammar, numbers or what is said. `words` are the words of the explanation that make the \
claim, copied letter for letter. An explanation that claims nothing has an empty list.

<text>
{text}
</text>"""
JUDGE = """\
Below, in <document> tags, stands the end of a document up to one place. In <text> tags stand numbered claims about it. \
Judge each claim by the document alone.

"true": it holds. A claim that says less than the document, or says it in more general words, is true if what it says \
holds. A claim about what comes next is true if that is a likely continuation.
"false_but_related": it does not hold, but fits what the document is about.
"false_and_unrelated": it does not hold, and has nothing to do with the document.
"cannot_tell": the document does not say.

<document>
{document}
</document>

<text>
{text}
</text>"""
LISTED = Tool(
    "list_claims",
    "Lists what an explanation claims.",
    {
        "type": "object",
        "properties": {
            "claims": {
                "type": "array",
                "maxItems": MOST,
                "items": {
                    "type": "object",
                    "properties": {
                        "claim": {"type": "string"},
                        "words": {"type": "string"},
                        "level": {"type": "string", "enum": list(LEVELS)},
                    },
                    "required": ["claim", "words", "level"],
                },
            }
        },
        "required": ["claims"],
    },
    {"claims": [{"claim": "The text is about one thing or another.", "words": "one thing", "level": "theme"}] * 6},
)


class Judged(NamedTuple):
    """A claim and what the judge finds, by the row's own document and by another one."""

    row: int
    words: str  # of the explanation
    level: str
    verdict: str
    elsewhere: str | None  # None where the judge did not answer, or there is no other document


WHO = {"true": "judged true", "control": "judged true of another document"}
_labels = lambda who: (
    {
        f"claims_{level}_{what}{'' if who == 'rl' else '_warm'}": f"{level}: {label}{'' if who == 'rl' else ', warm start'}"
        for level in ("all", *LEVELS)
        for what, label in WHO.items()
    }
    | {f"claims_undecided{'' if who == 'rl' else '_warm'}": "all: the judge cannot tell"}
)
TITLE, UNIT = "Truth of the claims, by a judge", "share of claims"


@probe(TITLE, needs=("pair", "judge"), unit=UNIT, labels=_labels("rl"))
def judged_truth(context: Context) -> dict[str, np.ndarray]:
    """The share of an explanation's claims that a judge finds true by the document up to the token, true / (true + false),
    by level. Beside it the share of the same claims that it finds true by another document: a judge that says yes to
    everything has the same there, and only what lies above it counts."""
    return truth_of(context, "rl")


@probe(TITLE, needs=("pair", "warm", "judge"), unit=UNIT, labels=_labels("warm"))
def warm_judged_truth(context: Context) -> dict[str, np.ndarray]:
    """The same of the warm start's explanations."""
    return {f"{name}_warm": values for name, values in truth_of(context, "warm").items()}


@probe(
    "What a judged claim is worth to the reconstructor",
    needs=("pair", "judge"),
    unit="% by which mse grows where the claim is taken out",
    labels={f"judged_effect_{verdict}": verdict.replace("_", " ") for verdict in VERDICTS},
)
def judged_ablation(context: Context) -> dict[str, np.ndarray]:
    """The words of each claim are taken out of its text, and the text read again: by how much the mean squared error of
    the row grows, in % of what it was, for claims that the judge finds true or false. In the paper true claims are worth
    most, false and unrelated ones least. Claims whose words do not stand in the text are left out."""
    texts = context.texts("rl")
    taken = [one for one in judged(context, "rl") if one.words.strip() and one.words in texts[one.row]]
    if not taken:
        return {}
    vectors, owner = np.asarray(context.vectors), np.array([one.row for one in taken])
    rows = np.unique(owner)
    before = np.full(len(vectors), np.nan)
    before[rows] = mse(np.asarray(context.pair.reconstruct([texts[i] for i in rows])), vectors[rows])
    without = [" ".join(texts[one.row].replace(one.words, " ", 1).split()) for one in taken]
    after = mse(np.asarray(context.pair.reconstruct(without)), vectors[owner])
    percent = 100 * (after / np.where(before > EXACT, before, np.nan)[owner] - 1)
    return {
        f"judged_effect_{verdict}": _by_row(
            [(one.row, value) for one, value in zip(taken, percent) if one.verdict == verdict], len(vectors)
        )
        for verdict in VERDICTS
    }


def truth_of(context: Context, who: str) -> dict[str, Float[np.ndarray, "n"]]:
    """Of each row's claims the share judged true, by its own document and by another, and the share without a verdict."""
    claims, count = judged(context, who), len(context.vectors)
    found = {}
    for level in ("all", *LEVELS):
        of = [one for one in claims if level in ("all", one.level)]
        for what in WHO:
            verdicts = [(one.row, one.verdict if what == "true" else one.elsewhere) for one in of]
            known = [(row, verdict == "true") for row, verdict in verdicts if verdict not in (None, "cannot_tell")]
            found[f"claims_{level}_{what}"] = _by_row(known, count)
    found["claims_undecided"] = _by_row([(one.row, one.verdict == "cannot_tell") for one in claims], count)
    return found if claims else {}


def judged(context: Context, who: str) -> list[Judged]:
    """Every claim of the texts `who` of the rows that are looked at, of those that the judge has answered for."""
    texts, documents = context.texts(who), context.column(TEXT)
    at = [i for i in context.provider.looked_at(len(texts)).tolist() if texts[i].strip() and documents[i]]
    if not at:
        return []
    other = dict(zip(at, (at[i] for i in derangement([context.documents[i] for i in at], context.seed))))
    ask = context.provider.judge
    lists = ask(
        f"claims of the texts ({who})",
        [Question(LIST.replace("{text}", texts[i]), f"the claims of row {i}", LISTED) for i in at],
    )
    listed = {i: of["claims"] for i, of in zip(at, lists) if isinstance(of, dict) and of["claims"]}
    apart = [i for i in listed if context.documents[other[i]] != context.documents[i]]
    own = ask(f"truth of the claims ({who})", [_asked(i, documents[i], of) for i, of in listed.items()])
    control = ask(f"the same by another document ({who})", [_asked(i, documents[other[i]], listed[i]) for i in apart])
    elsewhere = {i: of["verdicts"] for i, of in zip(apart, control) if isinstance(of, dict)}
    return [
        Judged(i, claim["words"], claim["level"], verdict, elsewhere[i][k] if i in elsewhere else None)
        for (i, of), found in zip(listed.items(), own)
        if isinstance(found, dict)
        for k, (claim, verdict) in enumerate(zip(of, found["verdicts"]))
    ]


def _asked(row: int, document: str, claims: list[dict]) -> Question:
    """Which of these claims hold for a document."""
    numbered = "\n".join(f"{k}. {claim['claim']}" for k, claim in enumerate(claims, 1))
    before, after = JUDGE.split("{document}")
    count, one_of = len(claims), {"type": "string", "enum": list(VERDICTS)}
    verdicts = {"type": "array", "minItems": count, "maxItems": count, "items": one_of}
    tool = Tool(
        "judge_claims",
        "Says of each claim, in their order, whether it holds.",
        {"type": "object", "properties": {"verdicts": verdicts}, "required": ["verdicts"]},
        {"verdicts": ["true"] * count},
    )
    return Question(before + document[-SHOWN:] + after.replace("{text}", numbered), f"the truth of row {row}", tool)


def _by_row(values: list[tuple[int, float]], count: int) -> Float[np.ndarray, "n"]:
    """The mean of each row's values; NaN for a row that has none."""
    rows = np.array([row for row, _ in values], int)
    sums = np.bincount(rows, weights=np.array([value for _, value in values], float), minlength=count)
    counts = np.bincount(rows, minlength=count)
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)
