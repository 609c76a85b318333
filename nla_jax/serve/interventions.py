"""What the subject itself says when its activation at one token is replaced: patching and steering.

Both read the text up to the token, and need the subject's upper blocks and its head, which are loaded when they are first
asked for."""

import re
from collections.abc import Callable

import jax
import numpy as np
from jaxtyping import Float

from nla_jax.patching import resized
from nla_jax.runtime.errors import InputError, first_line
from nla_jax.serve.models import Document, Served, explanation_of
from nla_jax.steering import EDIT, UNRELATED, directions, first_tokens, normalised, said_with, steer_tokens
from nla_jax.subject import Subject

NEW_TOKENS = 20  # of a continuation
LIKELIEST = 5  # next tokens that are named
WORDS = 3  # words that an edit adds, and as many that it takes away, of which the probability is shown
MOST = 2048  # tokens that the subject reads: the memory for it grows with the square
ORIGINAL, RECONSTRUCTION, OTHERS, RANDOM = (
    "the activation itself",
    "reconstruction of the explanation",
    "reconstruction of an unrelated explanation",
    "random direction",
)


def is_whole(subject: Subject) -> bool:
    """Whether the subject's upper blocks and its head are loaded."""
    return "rest" in vars(subject)


def load_whole(subject: Subject) -> None:
    """Loads the subject's upper blocks and its head. Raises `InputError` where that is not possible."""
    try:
        subject.rest  # noqa: B018 (which reads them once)
    except (InputError, OSError, MemoryError, jax.errors.JaxRuntimeError) as error:
        raise InputError(
            f"Patching and steering need the whole subject, which cannot be loaded here: {first_line(error)}."
        ) from None


def ids_upto(document: Document, row: int) -> list[int]:
    """The tokens that the subject reads. Raises `InputError` where they are too many."""
    ids = document.upto(row)
    if len(ids) > MOST:
        raise InputError(
            f"The subject would read {len(ids):,} tokens up to this one, more than the {MOST:,} that this panel takes; read a "
            f"shorter text."
        )
    return ids


def state(served: Served, number: int, document: Document, row: int) -> Float[np.ndarray, "D"]:
    """The activation of a token after block K, the last of those that a pair reads."""
    return document.vectors[number][row, -served.pair.sidecar.d_model :]


def patched(served: Served, number: int, document: Document, row: int) -> dict:
    """What the subject says after a token with its activation h, and with the reconstruction in its place, beside an
    unrelated explanation's reconstruction and a random direction, all as long as h.

    `patched`: for each `state, kl` (nats, from what follows h), `next` (likeliest tokens with their probabilities) and
    `continuation`."""
    ids, explanation = ids_upto(document, row), explanation_of(served, number, document, row)
    load_whole(served.subject)
    h, others = state(served, number, document, row), served.pair.reconstruct([explanation, served.unrelated])
    others = others[:, -len(h) :]
    others = np.concatenate([others, np.random.default_rng(0).normal(size=(1, len(h))).astype(np.float32)])
    states = np.concatenate([h[None], resized(others, np.broadcast_to(h, others.shape))])
    said = said_with(served.subject, ids, len(ids) - 1, states, NEW_TOKENS)
    rows = [
        {
            "state": state,
            "kl": one.kl,
            "next": likeliest(served.subject, one.logprobs),
            "continuation": one.continuation,
        }
        for state, one in zip((ORIGINAL, RECONSTRUCTION, OTHERS, RANDOM), said)
    ]
    return {"pair": number, "row": row, "patched": rows}


def likeliest(subject: Subject, logprobs: Float[np.ndarray, "V"]) -> list[list]:
    """The likeliest next tokens, each as text and probability."""
    best = np.argsort(-logprobs, kind="stable")[:LIKELIEST]
    return [[subject.tokenizer.decode([int(i)]), float(np.exp(logprobs[i]))] for i in best]


def steering(served: Served, number: int, document: Document, row: int, edited: str) -> Callable[[float], dict]:
    """Steers a token along an edit of its explanation: a function of the strength, the length of the step in lengths of
    the activation.

    It gives `edit` (the texts; `size`: the length of Δ and that of the unrelated edit's, as shares of the reconstruction's;
    `cosine` of the two reconstructions; `words` that the edit adds or takes away), `strength`, and `steered`: for each
    direction `direction, kl, continuation` and the probability `p` of each word.

    Raises `InputError` where the edit changes nothing, or the subject cannot be loaded whole."""
    ids, explanation = ids_upto(document, row), explanation_of(served, number, document, row)
    if edited.strip() == explanation.strip():
        raise InputError("The explanation is not changed; write something else into it.")
    load_whole(served.subject)
    subject, h = served.subject, state(served, number, document, row)
    along = directions(served.pair, explanation, edited, normalised(explanation), served.unrelated)
    original = served.pair.reconstruct([explanation])[0, -len(h) :].astype(np.float64)
    new, length = original + along[EDIT], np.linalg.norm
    words = {word: first_tokens(subject.tokenizer, word) for word in changed_words(explanation, edited)}
    edit = {
        "explanation": explanation,
        "edited": edited,
        "unrelated": served.unrelated,
        "size": {name: float(length(along[name]) / length(original)) for name in (EDIT, UNRELATED)},
        "cosine": float(original @ new / (length(original) * length(new))),
        "words": list(words),
    }

    def at(strength: float) -> dict:
        found = steer_tokens(subject, ids, len(ids) - 1, h, along, [strength], NEW_TOKENS)
        p = lambda one: [float(np.exp(one.logprobs[tokens]).sum()) for tokens in words.values()]
        rows = [{"direction": of.direction, "kl": of.kl, "continuation": of.continuation, "p": p(of)} for of in found]
        return {"pair": number, "row": row, "edit": edit, "strength": strength, "steered": rows}

    return at


def changed_words(old: str, new: str) -> list[str]:
    """Words that an edit adds, then words that it takes away, the first few of each."""
    before, after = (dict.fromkeys(re.findall(r"[^\W_]+", text)) for text in (old, new))
    lost = lambda words, others: [word for word in words if word not in others][:WORDS]
    return lost(after, before) + lost(before, after)
