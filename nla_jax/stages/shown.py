"""What the report shows of an evaluation row by row: examples, and whole documents with what was said at their tokens."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from nla_jax.data.activations import TEXT
from nla_jax.probes.baselines import kind_of

DOCUMENTS = 12  # shown as heat maps, at most
SCORES = ("fve_warm", "fve_rl", "cos_rl")  # those of a row that are shown
TEXTS = ("labels", "warm", "rl")


class Shown:
    """The rows of an evaluation as the page shows them. `context`: what the probes read; `scores` [n] by name; `texts`:
    which of its texts are shown."""

    def __init__(self, context: Any, scores: Mapping[str, np.ndarray], texts: Sequence[str] = TEXTS):
        self.context, self.scores = context, {name: scores[name] for name in SCORES if name in scores}
        self.ids, self.prefixes, self.tokens = map(context.column, ("doc_id", TEXT, "token"))
        self.following, self.role, self.place = map(context.column, ("following", "role", "n_raw_tokens"))
        self.said = {name: context.texts(name) for name in texts}

    def examples(self, count: int) -> list[dict]:
        """One row of each document, documents evenly spaced, chosen without a look at any score."""
        return [
            {
                "document": self.ids[i],
                "context": self.prefixes[i].removesuffix(self.tokens[i]),
                "token": self.tokens[i],
                "after": self.following[i],
            }
            | self._row(i)
            for i in self._picked(count)
        ]

    def documents(self, count: int) -> list[dict]:
        """Documents of the examples, evenly spaced, `count` at most; those of which no token can be shown are left
        out."""
        found = [self.document(self.ids[i]) for i in self._picked(count)]
        return [document for document in found if document["rows"]]

    def document(self, id: str) -> dict:
        """A document: its text as far as it is known, how many tokens it has up to the last row (0 where that is not
        known), and its rows with their `start` and `end` in the text, in order."""
        rows = sorted(self._rows[id], key=lambda i: len(self.prefixes[i]))
        text, shown, done = self.prefixes[rows[-1]] + self.following[rows[-1]], [], 0
        for i in rows:
            start, end = place_in(text, self.prefixes[i], self.tokens[i])
            if done <= start < end:  # a token without a text of its own, or one that is cut into bytes, may not be seen
                shown.append({"start": start, "end": end, "place": self.place[i] or None} | self._row(i))
                done = end
        return {"document": id, "text": text, "tokens": self.place[rows[-1]] or 0, "rows": shown}

    @functools.cached_property
    def _rows(self) -> dict[str, list[int]]:
        """The rows of each document."""
        found: dict[str, list[int]] = {}
        for i, id in enumerate(self.ids):
            found.setdefault(id, []).append(i)
        return found

    def _picked(self, count: int) -> list[int]:
        first = sorted({id: i for i, id in reversed(list(enumerate(self.context.documents)))}.values())
        return [first[i] for i in np.linspace(0, len(first) - 1, min(count, len(first))).astype(int)]

    def _row(self, i: int) -> dict:
        token = self.tokens[i]  # "" where the rows came without texts
        kinds = [kind_of(token) if token else "", f"spoken by the {self.role[i]}" if self.role[i] else ""]
        scores = {name: float(values[i]) for name, values in self.scores.items()}
        return {name: texts[i] for name, texts in self.said.items()} | scores | {"kinds": [k for k in kinds if k]}


def place_in(text: str, prefix: str, token: str) -> tuple[int, int]:
    """Where a token stands in its document's text, which begins with `prefix`, and `prefix` ends with the token; (0, 0)
    where it is not found. Of a character that is cut into several tokens each of these gets the whole."""
    whole = prefix.rstrip("\ufffd")  # which stands for bytes that are not a character yet
    if not text.startswith(whole):
        return 0, 0
    if len(whole) < len(prefix):
        return len(whole), len(whole) + 1
    return (len(prefix) - len(token), len(prefix)) if prefix.endswith(token) else (0, 0)
