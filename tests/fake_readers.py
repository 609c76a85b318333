"""ARs built by hand that read one thing of a text and nothing else, and what a probe may read of rows they explain.

A text says a colour and a shape in two statements of either order, a way of four directions, and words in a quote:

    The colour is red. The shape is round. It goes north east west south. It ends: … w4 w11
"""

import itertools
import re
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np

from nla_jax.fve import row_fve
from nla_jax.labels.labeller import Claim
from nla_jax.pair import Pair
from nla_jax.probes.probe import Context

COLOURS, SHAPES = ("red", "green", "blue", "black"), ("round", "square", "long", "flat")
WAYS = [" ".join(way) for way in itertools.permutations(("north", "east", "south", "west"))]
WORDS = tuple(f"w{i}" for i in range(20))


class Held(Context):
    """What a probe may read, of given facts."""

    def __init__(self, **facts):
        self.__dict__.update(facts)


class Reader(Pair):
    """An AR that gives each thing that it reads an entry of its own, and always sets the first entry."""

    def __init__(self, things: tuple[str, ...], read: Callable[[str], list[str]]):
        vars(self).update(things=things, read=read, sidecar=SimpleNamespace(layers=(1,)))

    def __repr__(self):
        return f"Reader of {self.things}"

    def reconstruct(self, texts, *, batch=64):
        out = np.zeros((len(texts), len(self.things) + 1), np.float32)
        out[:, 0] = 1
        for row, text in zip(out, texts):
            for thing in self.read(text):
                row[self.things.index(thing) + 1] = 2
        return out


def way(text: str) -> list[str]:
    """The directions in the order of the text, as one thing."""
    found = " ".join(re.findall("north|east|south|west", text.lower()))
    return [found] if found in WAYS else []


def words_of(*known: str) -> Callable[[str], list[str]]:
    """Reads these words wherever they stand."""
    return lambda text: sorted(set(re.findall(r"\w+", text.lower())) & set(known))


def leading(text: str) -> list[str]:
    """Whether colour or shape is said first, with its word."""
    found = re.search("|".join(COLOURS + SHAPES), text.lower())
    return [found[0]] if found else []


READERS = {
    "the quote": Reader(WORDS, words_of(*WORDS)),
    "the order of words": Reader(tuple(WAYS), way),
    "the first claim": Reader(COLOURS, words_of(*COLOURS)),
    "the order of statements": Reader(COLOURS + SHAPES, leading),
}


class Grammar:
    """Reads colours and shapes back; they are true where the row's text has them."""

    words = staticmethod(words_of(*COLOURS, *SHAPES))

    def claims(self, text):
        found = self.words(text)
        return [Claim("colour" if word in COLOURS else "shape", word) for word in found]

    def true(self, claim, row):
        return claim.value in row.text


def explanations(count: int = 240, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        said = [f"The colour is {rng.choice(COLOURS)}.", f"The shape is {rng.choice(SHAPES)}."]
        quoted = " ".join(rng.choice(WORDS, 2, replace=False))
        made.append(f"{' '.join(said[:: rng.choice((1, -1))])} It goes {rng.choice(WAYS)}. It ends: … {quoted}")
    return made


def context_of(reader: Reader, texts: list[str], warm: Reader | None = None, **facts) -> Held:
    """Rows that the reader reconstructs exactly from their texts; three of each document."""
    vectors = reader.reconstruct(texts)

    def score(given, pair=None):
        return row_fve((pair or reader).reconstruct(given), vectors)

    return Held(
        **{
            "vectors": vectors,
            "documents": [f"d{i // 3}" for i in range(len(texts))],
            "pair": reader,
            "warm": warm,
            "texts": {"rl": texts}.__getitem__,
            "recon": lambda name: reader.reconstruct({"rl": texts}[name]),
            "row_fve": score,
            "seed": 5,
        }
        | facts
    )
