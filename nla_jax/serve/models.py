"""The pairs that are served: texts and chats in, tokens out; tokens in, explanations out."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from nla_jax.data.activations import Activations, after_blocks
from nla_jax.data.chats import Messages, chat_tokens, checked
from nla_jax.io.pairs import place_of
from nla_jax.labels.extractive import WINDOW
from nla_jax.pair import Explanation, Pair, load_pair
from nla_jax.probes.claims import growth
from nla_jax.runtime.errors import InputError
from nla_jax.runtime.user_input import text_list
from nla_jax.serve.claims import claims_of, without_each
from nla_jax.serve.nearest import Training, training_of
from nla_jax.steering import OTHER
from nla_jax.subject import SINK, Subject, check_ids, extract, residual_rows, text_rows
from nla_jax.tools.claims import ClaimReader, claim_reader
from nla_jax.tools.explain import relative_norms, subject_of, training_variance

LONGEST = 200  # tokens of an explanation, where the pair's sidecar does not say how long it may be
READ = (64, 256, 1024)  # a text is padded to one of these lengths, or to a multiple of the last: programs are then few
NEAREST = 5  # training activations that are shown


@dataclasses.dataclass(frozen=True, eq=False)
class Served:
    """A pair, the subject that it reads, and how its explanations are made."""

    name: str
    pair: Pair
    subject: Subject | None  # None: its activations are given
    max_new_tokens: int
    training: Training | None = None  # what the pair was trained on, where its run's folder is given
    claims: ClaimReader | None = None  # None: nobody asks how sure one may be of claims

    @functools.cached_property
    def unrelated(self) -> str:
        """What the pair says of a fixed sentence: the control of whatever is done with another explanation."""
        return self.pair.explain(extract(self.subject, [OTHER]), self.max_new_tokens, 0.0)[0].text or OTHER

    @property
    def about(self) -> dict[str, Any]:
        """What the page says of the pair."""
        sidecar = self.pair.sidecar
        subject = "/".join(sidecar.base_checkpoint.rstrip("/").split("/")[-2:])  # a hub id, or the end of a path
        facts = {"name": self.name, "subject": subject, "place": after_blocks(sidecar.layers)}
        chat = self.subject is not None and self.subject.tokenizer.chat_template is not None
        can = {"fve": training_variance(self.pair) is not None, "chat": chat, "nearest": self.training is not None}
        how = self.claims
        sure = how and {"samples": how.samples, "about": how.about, "fitted": how.learned is not None}
        return facts | can | {"limit": self.max_new_tokens, "confidence": sure}


@dataclasses.dataclass(frozen=True, eq=False)
class Document:
    """A text or chat as the subjects of all pairs read it. `rows` index its `tokens`; special tokens are none of them."""

    id: str  # a hash of what was read
    tokens: list[str]
    roles: list[str]  # who speaks there, in a chat; "" elsewhere
    vectors: list[Float[np.ndarray, "n D"]]  # of each pair
    norms: list[list[float]]  # of each pair, as multiples of the usual norm
    upto: Callable[[int], list[int]]  # the ids of the text's tokens up to and with that of a row, special ones too
    decode: Callable[..., str] | None  # None: nobody explains it
    answers: dict[tuple[int, int], dict] = dataclasses.field(default_factory=dict)  # greedy ones, by pair and row
    kept: dict[tuple, dict] = dataclasses.field(default_factory=dict)  # other answers, by what was asked

    def context(self, row: int) -> str:
        """The end of the text up to and with a token: as much as claims are checked against."""
        return self.decode(self.upto(row)[-WINDOW - 1 :], skip_special_tokens=True)[-WINDOW - 1 :]

    def activation(self, number: int, row: int) -> Activations:
        """The activation of a token that the pair of that `number` explains, with the tokens up to it."""
        ids, blank = self.upto(row), [""]
        place, roles = np.array([len(ids) - 1], np.int32), [self.roles[row]]
        return Activations(
            self.vectors[number][[row]], [self.tokens[row]], blank, blank, place, [self.id], [ids], roles
        )

    @property
    def shown(self) -> dict[str, Any]:
        """What the page shows of it."""
        sinks = [[norm > SINK for norm in norms] for norms in self.norms]
        return {"id": self.id, "tokens": self.tokens, "roles": self.roles, "norms": self.norms, "sinks": sinks}


def load(
    names: Sequence[str],
    subject: str | None,
    dtype: str | None,
    conventions: Any,
    workdir: str | None = None,
    samples: int | None = None,
    labeller: str | None = None,
) -> list[Served]:
    """The pairs of these names, each with its subject; pairs of the same subject and layer share it in memory.
    `workdir`: of the run that trained them. `samples`: of which the confidence of a claim is made (None: there is none),
    and `labeller`: in whose words claims are read then.

    Raises `InputError` where a pair, its subject or the run's activations cannot be read, or do not belong together."""
    served: list[Served] = []
    for name, short in zip(names, short_names(names)):
        pair = load_pair(name, dtype=dtype, base=subject, conventions=conventions)
        found = subject_of(pair, place_of(name), subject, dtype)
        same = [s.subject for s in served if (s.subject.folder, s.subject.layers) == (found.folder, found.layers)]
        training = None if workdir is None else training_of(workdir, pair, short)
        found = same[0] if same else found
        reader = None if samples is None else claim_reader(pair, name, samples, labeller, found)
        served.append(Served(short, pair, found, limit_of(pair), training, reader))
    return served


def limit_of(pair: Pair) -> int:
    """How many tokens an explanation may have: as many as in training, where the sidecar says that."""
    limit = pair.sidecar.provenance.get("max_new_tokens")
    return limit if isinstance(limit, int) and not isinstance(limit, bool) and limit > 0 else LONGEST


def short_names(names: Sequence[str]) -> list[str]:
    """As many of the last parts of paths or hub ids as tell them apart: a saved page says no more of where they lie."""
    parts = [str(name).rstrip("/").split("/") for name in names]
    for length in range(1, max(map(len, parts)) + 1):
        short = ["/".join(part[-length:]) for part in parts]
        if len(set(short)) == len(set(map(tuple, parts))):
            return short
    return list(names)


def identity(content: str | Messages) -> str:
    """The id of a text or a chat."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:24]


def read_document(served: Sequence[Served], content: str | Messages, most: int) -> Document:
    """A text, or a chat's messages, token by token, with the activations that each pair explains.

    Raises `InputError` for an empty text, for more than `most` tokens, for tokens that the pairs' subjects do not agree
    on, and for activations that nothing can be said of."""
    content = text_list("The page takes", [content])[0] if isinstance(content, str) else checked(content, "The chat")
    ids, roles, rows = tokenized(served[0].subject, content)
    if len(ids) > most:
        raise InputError(f"The text has {len(ids):,} tokens, more than the {most:,} that this page takes; shorten it.")
    if not rows:
        raise InputError("The text has no tokens to explain; write some words.")
    decode = served[0].subject.tokenizer.decode
    tokens, vectors, norms = [decode([ids[i]]) for i in rows], [], []
    for i, one in enumerate(served):
        if i and one.subject is not served[0].subject and tokenized(one.subject, content)[0] != ids:
            raise InputError(f"{one.name} cuts this text into other tokens than {served[0].name}; serve them apart.")
        shared = [j for j in range(i) if served[j].subject is one.subject]
        vectors.append(vectors[shared[0]] if shared else activations(one.subject, ids, rows))
        norms.append(relative_norms(vectors[-1], one.pair, len(one.pair.sidecar.layers)))
    spoken = [roles[i] for i in rows]
    return Document(identity(content), tokens, spoken, vectors, norms, lambda row: ids[: rows[row] + 1], decode)


def tokenized(subject: Subject, content: str | Messages) -> tuple[list[int], list[str], list[int]]:
    """Token ids, who speaks at each, and the indices of those that can be explained: no special tokens, and of a chat
    only what somebody says."""
    if not isinstance(content, str):
        ids, roles = chat_tokens(subject.tokenizer, content)
        return ids, roles, [i for i, role in enumerate(roles) if role]
    (ids,) = text_rows(subject.tokenizer, [content])
    special = set(subject.tokenizer.all_special_ids)
    return ids, [""] * len(ids), [i for i, token in enumerate(ids) if token not in special]


def activations(subject: Subject, ids: list[int], rows: list[int]) -> Float[np.ndarray, "n D"]:
    """The activations of a text at some indices; its length is rounded up, which changes none of them."""
    check_ids(subject, [ids], ["the text"])
    length = next((n for n in READ if n >= len(ids)), -(-len(ids) // READ[-1]) * READ[-1])
    (found,) = residual_rows(subject, [ids + [0] * (length - len(ids))], [rows], batch=1)
    usable = np.isfinite(found).all(1) & found.any(1)
    if not usable.all():
        token = subject.tokenizer.decode([ids[rows[int(np.argmin(usable))]]])
        raise InputError(
            f"The activation of {token!r} is zero or not finite, so nothing can be said of it; take it out."
        )
    return found


def explain(served: Served, number: int, wanted: Sequence[tuple[Document, int]], batch: int) -> list[dict]:
    """The greedy explanations of some tokens (document, row), of one document or many, by the pair of that `number`.

    Each is `pair, row, explanation, cut, cosine, fve, claims`."""
    padded = [*wanted, *[wanted[-1]] * (program_rows(len(wanted), batch) - len(wanted))]
    vectors = np.stack([document.vectors[number][row] for document, row in padded])
    said = served.pair.explain(vectors, served.max_new_tokens, 0.0, batch=len(padded))
    scored = score(served, [one.text for one in said], vectors)
    answers = []
    for (document, row), one, measured in zip(wanted, said, scored):
        claims = claims_of(one.text, document.context(row), document.tokens[row])
        about = {"pair": number, "row": row, "explanation": one.text, "cut": one.cut, "claims": claims}
        answers.append(document.answers.setdefault((number, row), about | measured))
    return answers


def alternatives(served: Served, number: int, document: Document, row: int, count: int, seed: int) -> dict:
    """`count` explanations of one token at temperature 1, best first by what the AR makes of them."""
    vectors = np.repeat(document.vectors[number][row][None], count, 0)
    said = served.pair.explain(vectors, served.max_new_tokens, 1.0, seed, batch=count)
    scored = score(served, [one.text for one in said], vectors)
    texts = [{"explanation": one.text, "cut": one.cut} | measured for one, measured in zip(said, scored)]
    best = sorted(texts, key=lambda text: -2.0 if text["cosine"] is None else text["cosine"], reverse=True)
    return {"pair": number, "row": row, "seed": seed, "alternatives": best}


def explanation_of(served: Served, number: int, document: Document, row: int) -> str:
    """The greedy explanation of a token. Raises `InputError` where the pair says nothing of it."""
    known = document.answers.get((number, row)) or explain(served, number, [(document, row)], 1)[0]
    if not known["explanation"]:
        raise InputError("The pair says nothing of this token, so there is no explanation to work with.")
    return known["explanation"]


def ablations(served: Served, number: int, document: Document, row: int) -> dict:
    """What each claim of a token's explanation is worth to the AR: how `fve` and `mse` (the latter in % of what it was)
    change where the claim is taken out, as `text` shows. None where that is not known."""
    explanation = explanation_of(served, number, document, row)
    texts = without_each(explanation)
    vectors = np.repeat(document.vectors[number][row][None], 1 + len(texts), 0)
    before, after = np.split(served.pair.score([explanation, *texts], vectors)["mse"], [1])
    before, variance = np.repeat(before, len(texts)), training_variance(served.pair)
    percent = growth(before, after)
    fve = (before - after) / variance if variance else np.full(len(texts), np.nan)
    known = lambda value: float(value) if np.isfinite(value) else None
    found = [{"text": text, "fve": known(f), "mse": known(m)} for text, f, m in zip(texts, fve, percent)]
    return {"pair": number, "row": row, "ablations": found}


def confidence(served: Served, number: int, document: Document, row: int) -> dict:
    """How sure one may be of each claim of a token's explanation (`kind, text, confidence`): what `nla explain --tokens
    all --confidence` says of it."""
    known = document.answers.get((number, row)) or explain(served, number, [(document, row)], 1)[0]
    said = [Explanation(known["explanation"], known["cut"], None)]
    limit = {"max_new_tokens": served.max_new_tokens}
    (claims,) = served.claims.read(served.pair, document.activation(number, row), said, first=row, **limit)
    return {"pair": number, "row": row, "confidence": claims}


def nearest(served: Served, number: int, wanted: Sequence[tuple[Document, int]]) -> list[dict]:
    """For some tokens the training activations nearest to what the AR makes of their explanations."""
    texts = [explanation_of(served, number, document, row) for document, row in wanted]
    found = served.training.nearest(served.pair.reconstruct(texts), NEAREST)
    among = len(served.training)
    return [{"pair": number, "row": row, "nearest": of, "among": among} for (_, row), of in zip(wanted, found)]


def score(served: Served, texts: list[str], vectors: Float[np.ndarray, "n D"]) -> list[dict]:
    """`cosine` and `fve` of each text; None where there is no text, and for `fve` where no variance is known."""
    measured, variance = served.pair.score(texts, vectors), training_variance(served.pair)
    rows = zip(texts, measured["cosine"].tolist(), measured["mse"].tolist())
    fve = lambda text, mse: 1 - mse / variance if text and variance else None
    return [{"cosine": cosine if text else None, "fve": fve(text, mse)} for text, cosine, mse in rows]


def program_rows(n: int, batch: int) -> int:
    """How many rows are computed for `n` of them: a power of four up to `batch`, so that there are few programs."""
    size = 1
    while size < n:
        size *= 4
    return min(size, batch)
