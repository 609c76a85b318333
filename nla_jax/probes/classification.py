"""What can be told from the words of an explanation alone, beside what can be told from the activation.

A linear classifier reads the words of the explanations (which occur), another one the activations. Both are fitted to
every other held-out document, and tested on the rest: a reader without a language model, and the most that a reader of
the activation tells as simply.
"""

import re
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

from nla_jax.fve import normalise
from nla_jax.probes.linear import ridge, set_aside
from nla_jax.probes.probe import Context, probe

WORDS = 1000  # the commonest words of the explanations that fit, at most
FEW = 5  # a class of which fewer rows fit is not among those that are told apart
PENALTIES = (3e-3, 3e-2, 3e-1, 3.0)  # of both, as shares of the mean variance of their inputs, times rows
READ_AS = {
    "text": "from the words of the explanation",
    "activation": "from the activation",
    "commonest": "always the commonest",
}


@probe("The kind of the next token, told", unit="share told", labels={f"next_from_{k}": v for k, v in READ_AS.items()})
def next_kind(context: Context) -> dict[str, np.ndarray]:
    """How often a linear classifier tells what comes next (a word, more of a word, a number, a mark, a line break, the
    end): from the words of the explanation, from the activation, and from neither. Tested on half of the documents, which
    it was not fitted to."""
    kinds = [kind_of(text) for text in context.column("following")]
    fits = np.unique(context.documents, return_inverse=True)[1] % 2 == 0
    common = [kind for kind in sorted(set(kinds)) if sum(np.array(kinds)[fits] == kind) >= FEW]
    if len(common) < 2 or fits.all():
        return {}
    y = np.array([[kind == name for name in common] for kind in kinds], np.float64)
    inputs = {
        "text": words_of(context.texts("rl"), fits),
        "activation": normalise(np.asarray(context.vectors, np.float64)),
    }
    found = {name: classified(x, y, fits, context.documents) for name, x in inputs.items()}
    found["commonest"] = np.full(len(y), y[fits].sum(0).argmax())
    right = {name: y[np.arange(len(y)), guess] for name, guess in found.items()}
    return {f"next_from_{name}": np.where(fits, np.nan, values) for name, values in right.items()}


def kind_of(following: str) -> str:
    """What stands at the beginning of a text."""
    if not following.strip():
        return "a line break" if "\n" in following else "the end"
    first = following.lstrip(" \t")
    if first[0] in "\r\n":
        return "a line break"
    if first[0].isdigit():
        return "a number"
    if not first[0].isalpha():
        return "a mark"
    return "a word" if following[0].isspace() else "more of a word"


def words_of(texts: Sequence[str], fits: Bool[np.ndarray, "n"]) -> Float[np.ndarray, "n W"]:
    """Which of the commonest words and marks of the fitting texts occur in each text."""
    parts = [set(re.findall(r"\w+|[^\w\s]", text.lower())) for text in texts]
    words, counts = np.unique([word for i in np.flatnonzero(fits) for word in parts[i]] or [""], return_counts=True)
    kept = {word: i for i, word in enumerate(words[np.argsort(-counts, kind="stable")[:WORDS]])}
    found = np.zeros((len(texts), len(kept)))
    for row, of in zip(found, parts):
        row[[kept[word] for word in of if word in kept]] = 1
    return found


def classified(
    x: Float[np.ndarray, "n D"], y: Float[np.ndarray, "n C"], fits: Bool[np.ndarray, "n"], documents: Sequence[str]
) -> Int[np.ndarray, "n"]:
    """The likeliest class of each row by ridge regression, fitted where `fits`; its strength is chosen on a fifth of the
    documents there."""
    own, classes, held = x[fits], y[fits], set_aside([documents[i] for i in np.flatnonzero(fits)])
    guess = lambda rows, at, penalty: ridge(own[rows], classes[rows], at, penalty).argmax(1)
    hits = lambda penalty: classes[held][np.arange(held.sum()), guess(~held, own[held], penalty)].mean()
    penalty = PENALTIES[0] if held.all() else max(PENALTIES, key=hits)  # of one document nothing can be set aside
    return guess(np.ones(len(own), bool), x, penalty)
