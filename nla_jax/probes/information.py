"""Does an explanation tell a reader anything about its text? The subject itself is the reader.

The explanation stands in a prompt (`PROMPT`), and what truly stands in the text comes after it. By how many bits for
each token does the subject expect that more than without an explanation, or with one of another document? No judge is
asked. A prompt is plain text, also for a subject that was trained on chats.
"""

import functools
from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from nla_jax.data.activations import TEXT
from nla_jax.models.transformer import Transformer
from nla_jax.probes.probe import Context, probe
from nla_jax.subject import Subject, on_mesh, residual_rows

LOOKED_AT = 256  # rows, spread evenly, at most
OTHERS = 3  # explanations of other documents that are tried beside the own one
TAIL = 300  # characters up to the activation's token, by which its text is known again
PROMPT = "A note about a place in a text: {explanation}\n\nThe text {where}:\n"
AFTER, BEFORE = "goes on there", "up to there"
MULTIPLE = 256  # tokens that are scored together are padded to a multiple of it, so that few programs are compiled
TIED = 1e-6  # bits a token by which two scores may differ, and count as equal


def _labels(name: str) -> dict[str, str]:
    """What the three scores of `_gains` are called."""
    return {name: "own text", f"{name}_shuffled": "text of another document", f"{name}_difference": "difference"}


@probe(
    "What the explanation says of the words that follow",
    needs=("pair", "subject"),
    unit="bits a token that the subject gains",
    labels=_labels("suffix_gain"),
)
def suffix_prediction(context: Context) -> dict[str, np.ndarray]:
    """By how many bits a token the subject expects the words that truly come next more with the explanation in its prompt
    than with an empty one; the same for the explanation of another document. 0: the explanation says nothing of them."""
    return _gains(context, "suffix_gain", _graded(context, AFTER))


@probe(
    "What the explanation says of the text before",
    needs=("pair", "subject"),
    unit="bits a token that the subject gains",
    labels=_labels("source_gain"),
)
def source_gain(context: Context) -> dict[str, np.ndarray]:
    """By how many bits a token the subject expects the end of the text, up to the activation's token, more with the
    explanation in its prompt than with an empty one; the same for the explanation of another document. Words that the
    explanation quotes count."""
    return _gains(context, "source_gain", _graded(context, BEFORE))


@probe(
    "Which explanation is the text’s own?",
    needs=("pair", "subject"),
    unit="share",
    labels={"source_match": "the own one makes the text likeliest", "source_match_chance": "chance"},
)
def source_match(context: Context) -> dict[str, np.ndarray]:
    """How often, of the row's own explanation and those of three other documents, the own one makes the end of the text
    likeliest to the subject. Texts that are tied share the hit."""
    found = _graded(context, BEFORE)
    own, others = found[1], found[2:]
    hit = np.where((others > own + TIED).any(0), 0.0, 1 / (1 + (np.abs(others - own) <= TIED).sum(0)))
    known = ~np.isnan(own)
    if not known.any():
        return {}
    chance = np.full(len(own), 1 / (1 + OTHERS))
    scores = {"source_match": hit, "source_match_chance": chance}
    return {name: _of_rows(context, np.where(known, values, np.nan)) for name, values in scores.items()}


@functools.lru_cache(maxsize=2)  # two probes read one side
def _graded(context: Context, where: str) -> Float[np.ndarray, "c m"]:
    """The mean log2-probability, a token, of the true text of each row that is looked at: with no explanation, with its
    own one, with those of other documents (`OTHERS` of them where the text before is graded). NaN where there is no such
    text."""
    at, texts = _chosen(len(context.vectors)), context.texts("rl")
    column = context.column("following" if where == AFTER else TEXT)
    ends = [column[i] if where == AFTER else column[i][-TAIL:] for i in at]
    documents = [context.documents[i] for i in at]
    said = [[""] * len(at), [texts[i] for i in at]]
    for others in of_other_documents(documents, OTHERS if where == BEFORE else 1, context.seed).T:
        said.append([texts[at[j]] for j in others])
    return np.stack([bits(context.subject, where, explanations, ends) for explanations in said])


def of_other_documents(documents: Sequence[str], count: int, seed: int) -> Int[np.ndarray, "m {count}"]:
    """For each row `count` rows of other documents, drawn by chance, different ones as far as there are so many; of one
    document alone other rows."""
    names, rng = np.asarray(documents), np.random.default_rng(seed)
    drawn = []
    for i, name in enumerate(names):
        others = np.flatnonzero(names != name)
        others = others if len(others) else np.delete(np.arange(len(names)), i)
        drawn.append(rng.choice(others, count, replace=len(others) < count))
    return np.array(drawn)


def _gains(context: Context, name: str, found: Float[np.ndarray, "c m"]) -> dict[str, np.ndarray]:
    """Bits gained over the empty explanation."""
    own, other = found[1] - found[0], found[2:].mean(0) - found[0]
    gains = {name: own, f"{name}_shuffled": other, f"{name}_difference": own - other}
    return {} if np.isnan(own).all() else {name: _of_rows(context, values) for name, values in gains.items()}


def bits(subject: Subject, where: str, explanations: Sequence[str], ends: Sequence[str]) -> Float[np.ndarray, "m"]:
    """The mean log2-probability of the tokens of each text `ends`, behind a prompt with each of some explanations; NaN
    for an empty text."""
    tokenizer = subject.tokenizer
    prompts = [PROMPT.format(explanation=text, where=where) for text in explanations]
    begin = tokenizer(prompts, verbose=False).input_ids
    end = [tokenizer(text, add_special_tokens=False, verbose=False).input_ids if text else [] for text in ends]
    scored = [i for i, ids in enumerate(end) if ids]
    out = np.full(len(ends), np.nan)
    for i, values in zip(scored, logprobs(subject, [begin[i] for i in scored], [end[i] for i in scored])):
        out[i] = values.mean() / np.log(2)
    return out


def logprobs(
    subject: Subject, begins: Sequence[Sequence[int]], ends: Sequence[Sequence[int]]
) -> list[Float[np.ndarray, "_S"]]:
    """The log-probability of each token of `ends`, which stand behind `begins`, by the whole subject."""
    whole, found = subject.whole, []
    rows = [[*begin, *end] for begin, end in zip(begins, ends)]
    places = [range(len(begin) - 1, len(row) - 1) for begin, row in zip(begins, rows)]
    hidden = np.concatenate(list(residual_rows(whole, rows, places))) if rows else np.zeros((0, 1), np.float32)
    tokens = np.array([token for end in ends for token in end], np.int32)
    for start in range(0, len(tokens), MULTIPLE):
        part, of = hidden[start : start + MULTIPLE], tokens[start : start + MULTIPLE]
        padding = MULTIPLE - len(of)
        part, padded = np.pad(part, [(0, padding), (0, 0)]), np.pad(of, (0, padding))
        with on_mesh(whole):
            given = _of_tokens(whole.model, whole.params, part, padded)
        found.append(np.asarray(given)[: len(of)])
    return np.split(np.concatenate(found), np.cumsum([len(end) for end in ends])[:-1]) if found else []


@functools.partial(jax.jit, static_argnums=0)
def _of_tokens(
    model: Transformer, params: dict, hidden: Float[Array, "n D"], tokens: Int[Array, "n"]
) -> Float[Array, "n"]:
    logits = model.apply({"params": params}, hidden, method="logits")[..., : model.config.vocab_size]
    return jax.numpy.take_along_axis(jax.nn.log_softmax(logits), tokens[:, None], -1)[:, 0]


def _chosen(count: int) -> Int[np.ndarray, "m"]:
    """Which rows are looked at."""
    return np.linspace(0, count - 1, min(count, LOOKED_AT)).astype(int)


def _of_rows(context: Context, values: Float[np.ndarray, "m"]) -> Float[np.ndarray, "n"]:
    """Figures of the rows that were looked at, among NaN for the others."""
    found = np.full(len(context.vectors), np.nan)
    found[_chosen(len(found))] = values
    return found
