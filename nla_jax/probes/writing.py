"""How well are the explanations written, as a judge finds?

RL can teach an AV to write for the AR alone: lists of words, broken sentences, repetitions. FVE does not see that. A judge
rates each text twice, with the criteria in the other order; how far the two ratings of the same text are apart is the
noise, and differences below it mean nothing. The same texts with their words shuffled are rated too: a judge that likes
everything is seen by it.
"""

import numpy as np
from jaxtyping import Float

from nla_jax.labels.asking import Question, Tool
from nla_jax.labels.labeller import NoLabel
from nla_jax.probes.hidden_codes import shuffled
from nla_jax.probes.probe import Context, probe

BEST = 10
CRITERIA = [
    "Can somebody understand it who knows nothing else?",
    "Are its sentences whole and grammatical?",
    "Does each part say something that the others do not?",
    "Does it say specific things, rather than ones that would fit any text?",
]
PROMPT = """\
Below, in <text> tags, stands an explanation of what a language model has in mind at one place of a text, which you do not \
see. Rate how well it is written, from 1 (cannot be read) to 10 (could not be better). Do not rate whether it is true.

{criteria}

<text>
{text}
</text>"""
RATED = Tool(
    "rate",
    "Rates how well an explanation is written.",
    {
        "type": "object",
        "properties": {"rating": {"type": "integer", "minimum": 1, "maximum": BEST}},
        "required": ["rating"],
    },
    {"rating": 5},
)
NAMES = {
    "": "as it is",
    "_again": "rated again",
    "_noise": "how far the two are apart",
    "_shuffled": "words shuffled",
}
TITLE, UNIT = "Writing, by a judge", "rating from 1 to 10"


@probe(
    TITLE, needs=("pair", "judge"), unit=UNIT, labels={f"writing{name}": f"after RL, {x}" for name, x in NAMES.items()}
)
def writing(context: Context) -> dict[str, np.ndarray]:
    """How well a judge finds an explanation written; again with the criteria in the other order; how far the two ratings of
    one text are apart, the noise; and the rating of the same words shuffled, which should be far lower. An empty text has
    the lowest rating."""
    return ratings(context, "rl")


@probe(
    TITLE,
    needs=("pair", "warm", "judge"),
    unit=UNIT,
    labels={f"writing{name}_warm": f"warm start, {x}" for name, x in NAMES.items()},
)
def warm_writing(context: Context) -> dict[str, np.ndarray]:
    """The same of the warm start's explanations."""
    return {f"{name}_warm": values for name, values in ratings(context, "warm").items()}


def ratings(context: Context, who: str) -> dict[str, Float[np.ndarray, "n"]]:
    """The ratings of the texts `who`, and their noise."""
    texts = context.texts(who)
    mixed = [shuffled(text.split(), np.random.default_rng((context.seed, i))) for i, text in enumerate(texts)]
    first = rated(context, texts, CRITERIA, f"writing ({who})")
    again = rated(context, texts, CRITERIA[::-1], f"writing, rated again ({who})")
    control = rated(context, mixed, CRITERIA, f"writing, words shuffled ({who})")
    return {
        "writing": first,
        "writing_again": again,
        "writing_noise": np.abs(first - again),
        "writing_shuffled": control,
    }


def rated(context: Context, texts: list[str], criteria: list[str], what: str) -> Float[np.ndarray, "n"]:
    """The rating of each text that is looked at; NaN without an answer."""
    found = np.full(len(texts), np.nan)
    at = context.provider.looked_at(len(texts))
    found[at] = 1
    asked = [i for i in at.tolist() if texts[i].strip()]
    prompt = PROMPT.replace("{criteria}", "\n".join(f"- {one}" for one in criteria))
    questions = [Question(prompt.replace("{text}", texts[i]), f"the writing of row {i}", RATED) for i in asked]
    answers = context.provider.judge(what, questions)
    found[asked] = [np.nan if isinstance(answer, NoLabel) else answer["rating"] for answer in answers]
    return found
