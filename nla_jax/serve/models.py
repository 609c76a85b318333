"""The pairs that are served: texts and chats in, tokens out; tokens in, explanations out."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from nla_jax.data.chats import Messages, chat_tokens, checked
from nla_jax.io.pairs import place_of
from nla_jax.labels.behaviour import Behaviour
from nla_jax.labels.extractive import LAST, TAGS, WINDOW, Extractive, last_words
from nla_jax.labels.labeller import LabelRow
from nla_jax.pair import Pair, load_pair
from nla_jax.runtime.errors import InputError
from nla_jax.runtime.user_input import text_list
from nla_jax.subject import SINK, Subject, check_ids, residual_rows, text_rows
from nla_jax.tools.explain import subject_of, training_variance

LONGEST = 200  # tokens of an explanation, where the pair's sidecar does not say how long it may be
READ = (
    64,
    256,
    1024,
)  # a text is padded to one of these lengths, or to a multiple of the last, so that programs are few
EXPECTING = Behaviour(
    ""
)  # reads claims; whether the subject expects a token is not checked here, which would need its head


@dataclasses.dataclass(frozen=True, eq=False)
class Served:
    """A pair, the subject that it reads, and how its explanations are made."""

    name: str
    pair: Pair
    subject: Subject
    max_new_tokens: int

    @property
    def about(self) -> dict[str, Any]:
        """What the page says of the pair."""
        sidecar = self.pair.sidecar
        subject = "/".join(sidecar.base_checkpoint.rstrip("/").split("/")[-2:])  # a hub id, or the end of a path
        facts = {"name": self.name, "subject": subject, "layer": sidecar.layer}
        chat = self.subject.tokenizer.chat_template is not None
        return facts | {"fve": training_variance(self.pair) is not None, "chat": chat, "limit": self.max_new_tokens}


@dataclasses.dataclass(frozen=True, eq=False)
class Document:
    """A text or chat as the subjects of all pairs read it. `rows` index its `tokens`; special tokens are none of them."""

    id: str  # a hash of what was read
    tokens: list[str]
    roles: list[str]  # who speaks there, in a chat; "" elsewhere
    vectors: list[Float[np.ndarray, "n D"]]  # of each pair
    norms: list[list[float]]  # of each pair, as multiples of the usual norm
    ids: list[int]  # of the whole text, with special tokens
    places: list[int]  # of each row in `ids`
    decode: Callable[..., str]
    answers: dict[tuple[int, int], dict]  # greedy answers that were given, by pair and row

    def context(self, row: int) -> str:
        """The end of the text up to and with a token: as much as claims are checked against."""
        place = self.places[row]
        return self.decode(self.ids[max(0, place - WINDOW) : place + 1], skip_special_tokens=True)[-WINDOW - 1 :]

    @property
    def shown(self) -> dict[str, Any]:
        """What the page shows of it."""
        sinks = [[norm > SINK for norm in norms] for norms in self.norms]
        return {"id": self.id, "tokens": self.tokens, "roles": self.roles, "norms": self.norms, "sinks": sinks}


def load(names: Sequence[str], subject: str | None, dtype: str | None, conventions: Any) -> list[Served]:
    """The pairs of these names, each with its subject; pairs of the same subject and layer share it in memory.

    Raises `InputError` where a pair or its subject cannot be read."""
    served: list[Served] = []
    for name, short in zip(names, short_names(names)):
        pair = load_pair(name, dtype=dtype, base=subject, conventions=conventions)
        found = subject_of(pair, place_of(name), subject, dtype)
        same = [s.subject for s in served if (s.subject.folder, s.subject.layer) == (found.folder, found.layer)]
        limit = pair.sidecar.provenance.get("max_new_tokens")
        limit = limit if isinstance(limit, int) and not isinstance(limit, bool) and limit > 0 else LONGEST
        served.append(Served(short, pair, same[0] if same else found, limit))
    return served


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
        lengths = np.linalg.norm(vectors[-1].astype(np.float64), axis=1)
        usual = one.pair.sidecar.provenance.get("activation_norm")
        usual = usual if isinstance(usual, (int, float)) and usual > 0 else float(np.median(lengths))
        norms.append((lengths / usual).tolist())
    spoken = [roles[i] for i in rows]
    return Document(identity(content), tokens, spoken, vectors, norms, ids, rows, decode, {})


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
        claims = claims_of(one.text, document.context(row))
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


def claims_of(explanation: str, context: str) -> list[dict]:
    """The claims of an explanation that one of the formulaic labellers can read: `kind, value, true`.

    `true` is None where it is not checked: what the subject expects next."""
    expecting = EXPECTING.claims(explanation)
    if any(claim.kind in ("certainty", "next") for claim in expecting):
        ends = last_words(TAGS.sub(" ", context[-WINDOW:]), EXPECTING.words, EXPECTING.characters)
        holds = lambda claim: f" {ends}".endswith(f" {claim.value}") if claim.kind in LAST else None
        return [{"kind": c.kind, "value": c.value, "true": holds(c)} for c in expecting]
    labeller, row = Extractive(), LabelRow(context, "", 0, "", "")
    claims = labeller.claims(explanation)
    return [{"kind": c.kind, "value": c.value, "true": bool(labeller.true(c, row))} for c in claims]
