"""Labels of what an activation can hold and a computation can check.

    Prose. Next perhaps "work", "book" or "idea". It ends: … in his groundbreaking

Kind of passage (in a chat: who speaks), what the subject itself expects next, and the last words. A topic is left out: a
linear probe hardly reads one from an activation, and a verbalizer that is asked for it makes one up (docs/labels.md).

With `name_last` the last word, and within one the token that the text ends with, stand before the last words, as
`Extractive` names them; so do the signs behind them:

    Prose. Next perhaps "work", "book" or "idea". It ends with -breaking of groundbreaking: … in his groundbreaking

The last words end the label, with no quotation mark behind them. A reconstructor whose template ends with the explanation
then reads at the very token at which the subject stood, and is good before it is trained (docs/labels.md has figures).
"""

import dataclasses
import functools
import re
from collections.abc import Sequence
from typing import ClassVar

import jax
import numpy as np

from nla_jax.io.folders import read_config
from nla_jax.io.hub import fingerprint, locate
from nla_jax.labels.extractive import (
    BLANKS,
    BREAK,
    LAST,
    PASSAGES,
    TAGS,
    WINDOW,
    breaks,
    ending_within,
    kind,
    last_words,
    one_of,
    with_last_word,
    without,
)
from nla_jax.labels.extractive import CLAIMS as EXTRACTIVE
from nla_jax.labels.labeller import Claim, LabelRow
from nla_jax.models.sharding import device_mesh
from nla_jax.models.transformer import Transformer
from nla_jax.runtime.errors import InputError
from nla_jax.runtime.user_input import whole_number, yes_or_no
from nla_jax.subject import Subject, load_whole, residual_rows

SPEAKERS = {"user": "A user speaks", "assistant": "The assistant answers", "system": "An instruction to the assistant"}
SURE = 0.6  # a likeliest continuation from this probability on is the only one named
KEPT = 10_000  # rows whose expectations are remembered, so that the claims about a row cost one pass
AMONG = 5  # a token counts as expected that is among so many likeliest ones
OPEN = "Anything may come next"
UNSEEN = ("a line break", "a blank", "the end")  # tokens without visible characters
CLAIMS = {  # what a label says, by the words around it
    "passage": re.compile(rf"^\s*({one_of(PASSAGES | set(SPEAKERS.values()))})(?=\.|$)"),
    "certainty": re.compile(rf"\b(Next (?:surely|perhaps)|{OPEN})\b"),
    "last token": EXTRACTIVE["last token"],
    "last words": re.compile(rf"It ends(?: with (?:-\S+ of )?\S+)?: … (.*[^\s{BREAK}{BLANKS}])", re.DOTALL),
}
NEXT = re.compile(r"\bNext (?:surely|perhaps) (.*?)(?:\. It ends|$)", re.DOTALL)
NAMED = re.compile(rf'"[^"]+"|{"|".join(UNSEEN)}')


@dataclasses.dataclass
class Behaviour:
    """`subject`: the folder or hub id of the model whose activations are explained; it computes in `dtype`.

    Up to `continuations` of its likeliest next tokens are named, those of probability `least` or more. The last `words`
    are written, as far as they have `characters` together. `name_last`: the last word is named before them."""

    subject: str
    continuations: int = 3
    least: float = 0.05
    words: int = 6
    characters: int = 48
    dtype: str = "float32"
    name_last: bool = False

    batch: ClassVar[int] = 256
    reads: ClassVar[tuple[str, ...]] = ("text", "token", "role", "token_ids")

    def __post_init__(self):
        self.continuations = whole_number("label.settings.continuations", self.continuations, 1, AMONG)
        self.words = whole_number("label.settings.words", self.words, 1)
        self.characters = whole_number("label.settings.characters", self.characters, 1)
        self.name_last = yes_or_no("label.settings.name_last", self.name_last)
        self._known: dict[tuple[int, ...], tuple[list[str], list[float]]] = {}

    def ready(self) -> None:
        """Raises `InputError` where there is no such model."""
        read_config(locate(self.subject))

    @functools.cached_property
    def version(self) -> str:
        """A hash of the subject."""
        return fingerprint(locate(self.subject))

    @functools.cached_property
    def _whole(self) -> Subject:
        """The subject with all its blocks: what it expects needs its head."""
        return load_whole(self.subject, self.dtype)

    def label(self, rows: Sequence[LabelRow]) -> list[str]:
        """One label for each row. Rows of one document cost one pass over its longest."""
        found = [self._described(row, *next) for row, next in zip(rows, self.expected(rows))]
        ends = [self._end(row, of["last words"]) for row, of in zip(rows, found)]
        return [f"{of['passage']}. {of['next']}.{end}" for of, end in zip(found, ends)]

    def _end(self, row: LabelRow, words: str) -> str:
        """The statement about the last words."""
        if not words:
            return ""
        if not self.name_last:
            return f" It ends: … {words}"
        last = words.split()[-1]
        return f" It ends with {ending_within(last, row.token)}{last}: … {words}{breaks(TAGS.sub('', row.text))}"

    def claims(self, text: str) -> list[Claim]:
        """What a text says that is written as labels are; what cannot be read is left out. Kinds: passage, certainty,
        next (one for each token that is named), last token, last words, last word."""
        said = {name: pattern.search(text) for name, pattern in CLAIMS.items()}
        named = NAMED.findall(found[1]) if (found := NEXT.search(text)) else []
        claims = with_last_word([Claim(name, found[1]) for name, found in said.items() if found])
        return claims + [Claim("next", word.strip('"')) for word in named]

    def true(self, claim: Claim, row: LabelRow) -> bool:
        """Whether a claim holds for a row. A next token: it is among the `AMONG` that the subject finds likeliest.

        Last word or words: the text ends with these whole words. The others: the labeller says the same."""
        ((texts, p),) = self.expected([row])
        if claim.kind == "next":
            return claim.value in {word.strip('"') for word in in_words(texts)}
        of = self._described(row, texts, p)
        if claim.kind == "certainty":
            return of["next"].startswith(claim.value)
        if claim.kind == "last token":
            return claim.value == row.token
        if claim.kind in LAST:
            return f" {of['last words']}".endswith(f" {claim.value}")
        return of[claim.kind] == claim.value

    def without(self, text: str, claim: Claim) -> str:
        """The text without what makes it claim so. Of several next tokens the others stay."""
        if claim.kind != "next":
            return without(text, claim, CLAIMS)
        if (found := NEXT.search(text)) is None:
            return text
        start, end = found.span(1)
        others = [word for word in NAMED.findall(found[1]) if word.strip('"') != claim.value]
        return f"{text[:start]}{either(others)}".rstrip() + text[end:]

    def ready_for(self, rows: Sequence[LabelRow]) -> None:
        """Computes together what `true` needs of many rows: rows of one document then cost one pass."""
        self.expected(rows)

    def expected(self, rows: Sequence[LabelRow]) -> list[tuple[list[str], list[float]]]:
        """The likeliest next tokens of each row as text, with their probabilities; those of the last rows are kept."""
        ids = [row.token_ids for row in rows]
        if not all(ids):
            raise InputError(
                "The labeller Behaviour needs the column token_ids of the activations; `nla extract` writes it."
            )
        new = {one for one in ids if one not in self._known}
        if new and len(self._known) > KEPT:
            self._known, new = {}, set(ids)
        new = sorted(new, reverse=True)
        self._known |= zip(new, self._computed(new))
        return [self._known[one] for one in ids]

    def _computed(self, ids: list[tuple[int, ...]]) -> list[tuple[list[str], list[float]]]:
        """The same of token rows in descending order: a row comes right behind those that begin with it."""
        holders: list[list[tuple[int, ...]]] = []  # the first row of each begins with all the others
        for row in ids:
            if holders and holders[-1][0][: len(row)] == row:
                holders[-1].append(row)
            else:
                holders.append([row])
        found, places = [], [[len(row) - 1 for row in group] for group in holders]
        alone = device_mesh((1, 1, 1), jax.local_devices()[:1])  # hosts that train together ask of other rows
        with jax.set_mesh(alone):
            whole = self._whole
            for hidden in residual_rows(whole, [group[0] for group in holders], places):
                padded = np.pad(hidden, [(0, -len(hidden) % 16), (0, 0)])
                p, tokens = (np.asarray(x)[: len(hidden)] for x in _likeliest(whole.model, whole.params, padded, AMONG))
                texts = [[whole.tokenizer.decode([token]) for token in row] for row in tokens.tolist()]
                found += zip(texts, p.tolist())
        return found

    def _described(self, row: LabelRow, texts: list[str], p: list[float]) -> dict[str, str]:
        """What a label says, by the kinds of claims."""
        named = 1 if p[0] >= SURE else sum(value >= self.least for value in p[: self.continuations])
        words = in_words(texts[:named])
        text = TAGS.sub(" ", row.text[-WINDOW:])
        return {
            "passage": SPEAKERS.get(row.role) or _passage(row.text, text),
            "next": f"Next {'surely' if p[0] >= SURE else 'perhaps'} {either(words)}" if named else OPEN,
            "last words": last_words(text, self.words, self.characters),
        }


@functools.partial(jax.jit, static_argnums=(0, 3))
def _likeliest(model: Transformer, params: dict, hidden, count: int):
    logits = model.apply({"params": params}, hidden, method="logits")
    return jax.lax.top_k(jax.nn.softmax(logits), count)


def _passage(text: str, end: str) -> str:
    return "A code block" if text.count("```") % 2 == 1 else kind(end, len(text) <= WINDOW)


def either(words: Sequence[str]) -> str:
    """The words as alternatives: `a, b or c`."""
    return f"{', '.join(words[:-1])} or {words[-1]}" if len(words) > 1 else "".join(words)


def in_words(tokens: Sequence[str]) -> list[str]:
    """Next tokens as a label names them, none twice, in quotes; one that goes on with the word that stands there has a
    hyphen before it, and one of `UNSEEN` no quotes."""
    words = []
    for token in tokens:
        text = "".join(c if c.isprintable() and c != "\ufffd" else " " for c in TAGS.sub(" ", token))
        text = " ".join(text.split()).replace('"', "'")
        if text:
            word = f'"{"-" if token[:1].isalnum() else ""}{text}"'
        else:
            word = UNSEEN[0] if "\n" in token else UNSEEN[1] if token else UNSEEN[2]
        words += [word] * (word not in words)
    return words
