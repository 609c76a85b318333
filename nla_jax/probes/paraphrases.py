"""Does the AR read what the text says, when a language model says it in other words? The rewrites that need a writer.

A rewrite that keeps the meaning should cost little, and no more after RL than before (the paper). A light and a heavy
paraphrase reword quotations like everything else; one that keeps them letter for letter shows whether quotations are
all that the AR reads (syvb: .637 of the FVE with them, .051 without). A summary leaves things out and costs more. The
rewrites of hidden_codes.py need no writer.
"""

import functools

import numpy as np
from jaxtyping import Float

from nla_jax.fve import row_fve
from nla_jax.labels.asking import Question
from nla_jax.labels.labeller import Label, NoLabel
from nla_jax.pair import Pair
from nla_jax.probes.hidden_codes import LEAST, QUOTE, SHARE
from nla_jax.probes.probe import Context, probe

INSTRUCTION = """\
Below, in <text> tags, stands a short text. {task}

Answer with the new text alone, without tags, headings, or a sentence before or after it. Do not add anything, and do \
not comment on the text.

<text>
{text}
</text>"""
REWORD = "Reword quotations, and words behind an ellipsis, like everything else."
TASKS = {
    "light": f"Rewrite it with the same meaning: put about a third of its words into other words, and leave the order of "
    f"its sentences as it is. {REWORD}",
    "heavy": f"Rewrite it with the same meaning, but with about nine of ten words different and every sentence built in "
    f"another way. {REWORD}",
    "quotes_kept": "Rewrite it with the same meaning, but with about nine of ten words different and every sentence built "
    "in another way. Quotations, and the words behind an ellipsis at the end of the text, stay as they are, letter for "
    "letter and with their marks; what stands at the end of the text stays there.",
    "french": "Translate it into French, quotations too.",
    "summary": "Summarise it in two sentences at most, in your own words.",
}
READ_AS = {  # what the rewrites are called in charts
    "light": "light paraphrase",
    "heavy": "heavy paraphrase",
    "quotes_kept": "heavy paraphrase, quotes kept",
    "french": "in French",
    "summary": "summary",
}
TRIPWIRE = ("light", "heavy")
named = lambda figure, who, label: {f"{figure}_{name}{who}": f"{text}, {label}" for name, text in READ_AS.items()}
GAPS = {
    f"gap_{name}_{who}": f"{READ_AS[name]}: {label}"
    for name in TRIPWIRE
    for who, label in {"live": "AR after RL", "warm": "warm AR", "difference": "difference"}.items()
}
TITLE, KEPT = "Paraphrased texts", "Retention of paraphrased texts"


@probe(TITLE, needs=("pair", "writer"), labels=named("fve", "", "AR after RL"))
def paraphrases(context: Context) -> dict[str, np.ndarray]:
    """The reconstructor after RL reads the texts after RL in other words. The first four say the same as the text and
    should cost little."""
    return {f"fve_{name}": values for name, values in scores(context, context.pair).items()}


@probe(TITLE, needs=("pair", "warm", "writer"), labels=named("fve", "_warm", "warm AR"))
def warm_paraphrases(context: Context) -> dict[str, np.ndarray]:
    """The warm start's reconstructor reads the same paraphrases."""
    return {f"fve_{name}_warm": values for name, values in scores(context, context.warm).items()}


@probe(KEPT, needs=("pair", "writer"), unit=SHARE, labels=named("retention", "", "AR after RL"))
def paraphrase_retention(context: Context) -> dict[str, np.ndarray]:
    """FVE of the paraphrases by that of the same rows' texts as they are, a ratio of means. Where only the paraphrase that
    keeps quotes has a high one, the reconstructor reads quotes. Not shown where the texts explain nothing."""
    return {f"retention_{name}": values for name, values in kept(context, context.pair).items()}


@probe(KEPT, needs=("pair", "warm", "writer"), unit=SHARE, labels=named("retention", "_warm", "warm AR"))
def warm_paraphrase_retention(context: Context) -> dict[str, np.ndarray]:
    """The same for the warm start's reconstructor."""
    return {f"retention_{name}_warm": values for name, values in kept(context, context.warm).items()}


@probe("Does RL teach wording?", needs=("pair", "warm", "writer"), unit="FVE lost by the paraphrase", labels=GAPS)
def paraphrase_gap(context: Context) -> dict[str, np.ndarray]:
    """FVE lost by a paraphrase: by the reconstructor after RL, by the warm start's, and the difference. A difference far
    above 0 says that RL made the reconstructor depend on wording more than before."""
    found = {}
    for name in TRIPWIRE:
        lost = {}
        for who, pair in (("live", context.pair), ("warm", context.warm)):
            lost[who] = original(context, pair) - score(context, name, pair)
        for who, values in (lost | {"difference": lost["live"] - lost["warm"]}).items():
            found[f"gap_{name}_{who}"] = values
    return found


def scores(context: Context, pair: Pair) -> dict[str, Float[np.ndarray, "n"]]:
    """Of each paraphrase the score of each row, read by one AR; NaN for rows that have none."""
    return {name: score(context, name, pair) for name in TASKS}


def kept(context: Context, pair: Pair) -> dict[str, Float[np.ndarray, "n"]]:
    """Of each paraphrase a value for each row whose mean is FVE(paraphrase) / FVE(original) of the rows that have one; none
    where the latter is about 0."""
    found = {}
    for name, values in scores(context, pair).items():
        whole = original(context, pair)[~np.isnan(values)]
        if whole.size and whole.mean() > LEAST:
            found[name] = values / whole.mean()
    return found


def score(context: Context, name: str, pair: Pair) -> Float[np.ndarray, "n"]:
    """The score of each row when an AR reads its text in a paraphrase; NaN for rows that have none."""
    texts = {i: text for i, text in paraphrased(context, name).items() if isinstance(text, str)}
    return _read(context, tuple(texts), tuple(texts.values()), pair)


def original(context: Context, pair: Pair) -> Float[np.ndarray, "n"]:
    """The same of the texts as they are."""
    at = context.provider.looked_at(len(context.vectors)).tolist()
    return _read(context, tuple(at), tuple(context.texts("rl")[i] for i in at), pair)


@functools.lru_cache(maxsize=4 * len(TASKS))  # several probes read the same
def _read(context: Context, at: tuple[int, ...], texts: tuple[str, ...], pair: Pair) -> Float[np.ndarray, "n"]:
    """1 - mse / variance of the rows `at`, the variance that of all rows; NaN elsewhere."""
    found, rows = np.full(len(context.vectors), np.nan), list(at)
    if rows:
        recon = np.array(context.vectors, np.float32)
        recon[rows] = pair.reconstruct(texts)
        found[rows] = row_fve(recon, context.vectors)[rows]
    return found


def paraphrased(context: Context, name: str) -> dict[int, Label]:
    """The paraphrases of the texts after RL by their rows. An empty text stays empty, and nobody is asked."""
    at = context.provider.looked_at(len(context.vectors)).tolist()
    texts = {i: context.texts("rl")[i] for i in at}
    asked = [i for i in at if texts[i].strip()]
    prompts = [INSTRUCTION.replace("{task}", TASKS[name]).replace("{text}", texts[i]) for i in asked]
    questions = [Question(prompt, f"the {READ_AS[name]} of row {i}") for i, prompt in zip(asked, prompts)]
    accept = functools.partial(_with_quotes, [texts[i] for i in asked]) if name == "quotes_kept" else None
    return texts | dict(zip(asked, context.provider.write(READ_AS[name], questions, accept)))


def _with_quotes(originals: list[str], i: int, text: str) -> Label:
    """A text if it has every quotation of the original one, letter for letter."""
    quotes = QUOTE.findall(originals[i])
    return text if all(quote in text for quote in quotes) else NoLabel("with other quotes")
