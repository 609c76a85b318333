"""Does an explanation say enough for a judge to find the text, or the place in it, that it explains?

Source match: the end of the row's text, 700 characters, among those of three other documents. Position match: the row's
text among up to four others that end elsewhere in the same document. The explanation of a row of another document is
judged beside it, with the same choice: it should be right as often as chance. The order of the choices is drawn, so a
judge that always names the first is right as often as chance too.

retrieval.py asks the same of the AR, without a judge.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from nla_jax.data.activations import TEXT
from nla_jax.labels.asking import Question, Tool
from nla_jax.labels.labeller import NoLabel
from nla_jax.probes.fidelity import derangement
from nla_jax.probes.probe import Context, probe

TAIL = 700  # characters of each choice
SOURCES, PLACES = 4, 5  # choices

PROMPT = """\
A language model stopped at the end of one of the {count} passages below. In <text> tags stands an explanation of what it \
had in mind there. Which passage does the explanation fit best, and above all its end? If you cannot tell, guess.

{choices}

<text>
{text}
</text>"""
NAMES = {"rl": "AV after RL", "control": "text of another document", "chance": "chance"}


@probe(
    "Which document, by a judge",
    needs=("pair", "judge"),
    unit="share",
    labels={f"source_{w}": x for w, x in NAMES.items()},
)
def judged_source(context: Context) -> dict[str, np.ndarray]:
    """How often a judge picks the text that an explanation belongs to among those of three other documents."""
    return {f"source_{who}": values for who, values in matched(context, "source").items()}


@probe(
    "Which place of a document, by a judge",
    needs=("pair", "judge"),
    unit="share",
    labels={f"place_{w}": x for w, x in NAMES.items()},
)
def judged_position(context: Context) -> dict[str, np.ndarray]:
    """How often a judge picks the place that an explanation belongs to among up to four others of its document.
    Documents with one row are left out."""
    return {f"place_{who}": values for who, values in matched(context, "place").items()}


def matched(context: Context, what: str) -> dict[str, Float[np.ndarray, "n"]]:
    """Of each row whether the judge picks its text by its explanation, and by that of another document; and chance. An
    empty explanation is right as often as chance."""
    count, texts = len(context.vectors), context.texts("rl")
    choices = {i: one for i, one in chosen(context, what).items() if len(one) > 1}
    if not choices:
        return {}
    rows = list(choices)
    other = dict(zip(rows, (rows[i] for i in derangement([context.documents[i] for i in rows], context.seed))))
    found = {who: np.full(count, np.nan) for who in NAMES}
    for i, one in choices.items():
        found["chance"][i] = 1 / len(one)
    for who, giver in (("rl", {i: i for i in rows}), ("control", other)):
        given = [i for i in rows if who == "rl" or context.documents[giver[i]] != context.documents[i]]
        asked = [i for i in given if texts[giver[i]].strip()]
        questions = [_question(context, choices[i], texts[giver[i]], i) for i in asked]
        answers = context.provider.judge(f"{what} by the text ({NAMES[who]})", questions)
        found[who][given] = found["chance"][given]
        found[who][asked] = [
            np.nan if isinstance(a, NoLabel) else choices[i][a["passage"] - 1] == i for i, a in zip(asked, answers)
        ]
    return found


def chosen(context: Context, what: str) -> dict[int, list[int]]:
    """For each row that is looked at, the rows whose texts are the choices, in a drawn order, itself among them. Their
    ends differ; those of other documents are of different ones."""
    documents, texts = np.asarray(context.documents), context.column(TEXT)
    found, most = {}, PLACES if what == "place" else SOURCES
    for i in context.provider.looked_at(len(documents)).tolist():
        if not texts[i]:
            continue
        rng, same = np.random.default_rng((context.seed, i)), documents == documents[i]
        one, ends, taken = [i], {"", texts[i][-TAIL:]}, set()
        for j in rng.permutation(np.flatnonzero(same if what == "place" else ~same)).tolist():
            of = j if what == "place" else documents[j]
            if len(one) < most and texts[j][-TAIL:] not in ends and of not in taken:
                one.append(j)
                ends.add(texts[j][-TAIL:])
                taken.add(of)
        found[i] = [one[k] for k in rng.permutation(len(one))]
    return found


def _question(context: Context, choices: Sequence[int], text: str, row: int) -> Question:
    passages = [context.column(TEXT)[i][-TAIL:] for i in choices]
    shown = "\n\n".join(f"<passage_{k}>\n{one}\n</passage_{k}>" for k, one in enumerate(passages, 1))
    before, after = PROMPT.replace("{count}", str(len(choices))).split("{choices}")
    number = {"type": "integer", "minimum": 1, "maximum": len(choices)}
    tool = Tool(
        "pick_passage",
        "Names the passage that the explanation fits best, by its number.",
        {"type": "object", "properties": {"passage": number}, "required": ["passage"]},
        {"passage": 1},
    )
    return Question(before + shown + after.replace("{text}", text), f"the choice of row {row}", tool)
