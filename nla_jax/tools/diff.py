"""Two subjects of one width on the same texts: whose tokens' activations moved most, and what a pair says of both."""

import dataclasses
import heapq
from collections.abc import Iterator, Sequence

import numpy as np

from nla_jax.data.activations import Activations
from nla_jax.data.chats import Messages
from nla_jax.fve import cosine, joined, lengths
from nla_jax.pair import Pair
from nla_jax.runtime.errors import InputError
from nla_jax.runtime.metrics import Progress
from nla_jax.runtime.notes import note
from nla_jax.subject import Subject, attention_sinks
from nla_jax.tools.explain import Sampling, of_chats, of_texts


@dataclasses.dataclass(frozen=True)
class Moved:
    """A token whose activation is another in the other subject; each has one row of activations."""

    cosine: float  # of the two activations
    number: int  # of all tokens that were read
    one: Activations
    other: Activations

    def __lt__(self, another: "Moved") -> bool:
        return (-self.cosine, -self.number) < (-another.cosine, -another.number)


def most_moved(
    subjects: tuple[Subject, Subject], material: Sequence[tuple[str, str | Messages]], top: int, max_tokens: int
) -> list[Moved]:
    """The `top` tokens of texts (id, text) or chats (id, messages) whose activations differ most in direction, the
    most different first. Attention sinks are left out, and a note counts them.

    Raises `InputError` where the two subjects cut a text otherwise."""
    read = of_texts if isinstance(material[0][1], str) else of_chats
    best: list[Moved] = []
    number = sinks = 0
    progress = Progress("diff", len(material)) if len(material) > 1 else None
    for one, other in zip(*(read(subject, material, "all", max_tokens) for subject in subjects)):
        if one.token_ids != other.token_ids:
            names = " and ".join(subject.name for subject in subjects)
            raise InputError(
                f"{names} cut the text of {one.doc_ids[0]} into other tokens; they must share a tokenizer."
            )
        layers = len(subjects[0].layers)
        far = np.any([attention_sinks(lengths(found.vectors, layers)) for found in (one, other)], axis=0)
        sinks += int(far.sum())
        for i, similar in enumerate(cosine(*(joined(found.vectors, layers) for found in (one, other))).tolist()):
            number += 1
            if far[i]:
                continue
            moved = Moved(similar, number, one[i], other[i])
            heapq.heappush(best, moved) if len(best) < top else heapq.heappushpop(best, moved)
        if progress:
            progress.update(len(set(one.doc_ids)))
    if sinks:
        note(f"{sinks} of {number} tokens are attention sinks, and are left out.")
    return sorted(best, reverse=True)


def diff_rows(pair: Pair, moved: Sequence[Moved], sampling: Sampling) -> Iterator[list[dict]]:
    """For each batch of tokens its rows: `document, position, token, role, cosine, norm_ratio, explanation, other`.

    `norm_ratio`: the other activation's length by this one's, of several layers the mean. `other`: what the pair says of
    the other's activation."""
    for start in range(0, len(moved), sampling.batch):
        part = moved[start : start + sampling.batch]
        vectors = [np.concatenate([getattr(m, side).vectors for m in part]) for side in ("one", "other")]
        layers = len(pair.sidecar.layers)
        ratios = (lengths(vectors[1], layers) / lengths(vectors[0], layers)).mean(1)
        options = {"batch": sampling.batch, "first": start}
        said = [
            pair.verbalize(x, sampling.max_new_tokens, sampling.temperature, sampling.seed, **options) for x in vectors
        ]
        yield [
            {
                "document": m.one.doc_ids[0],
                "position": int(m.one.positions[0]),
                "token": m.one.tokens[0],
                "role": m.one.roles[0],
                "cosine": m.cosine,
                "norm_ratio": float(ratios[i]),
                "explanation": said[0][i],
                "other": said[1][i],
            }
            for i, m in enumerate(part)
        ]
