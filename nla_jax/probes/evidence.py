"""What speaks for a claim of an explanation, by the pair itself: no judge, and no text that was truly there.

- **agreement**: the share of several sampled explanations of the same activation that make the same claim.
- **recurrence**: the share of the explanations of the few tokens before that make it.
- **ablation**: log(mse without the claim / mse with it), by how much the AR misses it.

A `Confidence` makes one number of these: a logistic regression on whether a claim is true, with a shift for each kind of
claim. `probes.confidence` fits and tests it, and keeps it as `confidence.json` beside the pair; `nla explain
--confidence` reads it there. Claims are equal where kind and value are. A text that follows no grammar is cut into
sentences (`Sentences`).
"""

import dataclasses
import hashlib
import json
import operator
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from nla_jax.fve import joined, mse
from nla_jax.io.files import AnyPath
from nla_jax.labels.labeller import Claim
from nla_jax.pair import Pair
from nla_jax.probes.claims import EXACT, without
from nla_jax.probes.hidden_codes import statements
from nla_jax.probes.linear import logistic
from nla_jax.runtime.distributed import to_host
from nla_jax.runtime.errors import InputError
from nla_jax.runtime.metrics import write_atomically
from nla_jax.subject import Subject, activations_at

FILE = "confidence.json"
FEATURES = ("agreement", "recurrence", "ablation")
BEFORE = 5  # so many tokens before an explanation's own are asked for a claim of it
ALIKE = 0.5  # share of their words that two sentences have in common which say the same


class Evidence(NamedTuple):
    """A claim of an explanation, and what speaks for it. `recurrence` is NaN where no token stands before."""

    row: int
    claim: Claim
    agreement: float
    recurrence: float
    ablation: float


class Sentences:
    """A grammar that reads any text: each sentence is a claim. Whether it is true it cannot say."""

    def claims(self, text: str) -> list[Claim]:
        """The sentences of a text that hold a letter or digit, each once."""
        return [Claim("sentence", part) for part in dict.fromkeys(statements(text)) if _words(part)]

    def same(self, one: Claim, other: Claim) -> bool:
        """Whether two sentences share at least `ALIKE` of all their different words; case and marks do not count."""
        a, b = _words(one.value), _words(other.value)
        return len(a & b) >= ALIKE * len(a | b)


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))


def evidence(
    pair: Pair,
    grammar: Any,
    vectors: Float[np.ndarray, "n *d"],
    texts: Sequence[str],
    samples: Sequence[Sequence[str]],
    before: Sequence[Sequence[str]],
) -> list[Evidence]:
    """What speaks for each claim that `grammar.claims` finds in each of n explanations `texts`.

    `samples`: other explanations of the same activation; `before`: those of the tokens before it, for each row."""
    claims = [(i, claim) for i, text in enumerate(texts) for claim in grammar.claims(text)]
    if not claims:
        return []
    owner, gold = np.array([i for i, _ in claims]), joined(np.asarray(vectors), len(pair.sidecar.layers))
    shortened = [without(grammar, texts[i], claim) for i, claim in claims]
    with_it = mse(pair.reconstruct(texts).astype(np.float64), gold)[owner]
    without_it = mse(pair.reconstruct(shortened).astype(np.float64), gold[owner])
    ablation = np.log(np.maximum(without_it, EXACT) / np.maximum(with_it, EXACT))
    made = [[[grammar.claims(text) for text in of] for of in said] for said in (samples, before)]
    share = lambda of, claim: float(np.mean([makes(grammar, claim, one) for one in of])) if of else np.nan
    return [
        Evidence(i, claim, share(made[0][i], claim), share(made[1][i], claim), float(effect))
        for (i, claim), effect in zip(claims, ablation)
    ]


def makes(grammar: Any, claim: Claim, claims: Sequence[Claim]) -> bool:
    """Whether a claim is among others: an equal one, or one that the grammar calls the same."""
    same = getattr(grammar, "same", operator.eq)
    return any(same(claim, other) for other in claims)


def sampled(pair: Pair, vectors: Float[np.ndarray, "n *d"], count: int, seed: int = 0, **options) -> list[list[str]]:
    """`count` explanations of each activation at temperature 1; `options`: more of `Pair.verbalize`.

    They are drawn with the seed after `seed`, so that none is the explanation itself where that was sampled too."""
    seed = (seed + 1) % (1 << 32)
    said = pair.verbalize(np.repeat(np.asarray(vectors), count, axis=0), temperature=1.0, seed=seed, **options)
    return [said[start : start + count] for start in range(0, len(said), count)]


def explained_before(
    pair: Pair, subject: Subject, token_rows: Sequence[Sequence[int]], count: int = BEFORE, **options
) -> list[list[str]]:
    """The greedy explanations of up to `count` tokens before the last one of each row of token ids.

    The first token of a text, which says nothing, and special tokens are left out. Rows that begin alike are read once,
    and each token is explained once. `options`: more of `Pair.verbalize`."""
    special = set(subject.tokenizer.all_special_ids)
    order = sorted(range(len(token_rows)), key=lambda i: list(token_rows[i]), reverse=True)
    wholes: list[list[int]] = []  # rows that begin with all others: these come right behind them in this order
    places: list[set[int]] = []  # of each the positions that are explained
    wanted: list[list[tuple[int, int]]] = [[] for _ in token_rows]
    for i in order:
        row = list(token_rows[i])
        if not wholes or wholes[-1][: len(row)] != row:
            wholes.append(row)
            places.append(set())
        near = [at for at in range(max(1, len(row) - 1 - count), len(row) - 1) if row[at] not in special]
        places[-1] |= set(near)
        wanted[i] = [(len(wholes) - 1, at) for at in near]
    if not any(places):
        return [[] for _ in token_rows]
    chosen = [sorted(of) for of in places]
    found = activations_at(subject, wholes, chosen, [""] * len(wholes))
    texts = pair.verbalize(found.vectors, temperature=0.0, **options)
    said = dict(zip([(number, at) for number, of in enumerate(chosen) for at in of], texts))
    return [[said[place] for place in of] for of in wanted]


def table(found: Sequence[Evidence]) -> Float[np.ndarray, "c 3"]:
    """The features of claims as numbers, in the order of `FEATURES`."""
    return np.array([[getattr(one, name) for name in FEATURES] for one in found], np.float64).reshape(-1, len(FEATURES))


@dataclasses.dataclass(frozen=True)
class Confidence:
    """P(claim is true) = 1 / (1 + exp(-z)), with z = intercept + shift of its kind + Σ weight · (feature - center) / spread.

    A feature that is not known counts as its center, an unknown kind has no shift. `facts`: what it was fitted to."""

    labeller: str  # import path, whose grammar reads the claims
    settings: Mapping[str, Any]
    intercept: float
    kinds: Mapping[str, float]
    center: Sequence[float]
    spread: Sequence[float]
    weights: Sequence[float]
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def of(self, found: Sequence[Evidence]) -> Float[np.ndarray, "c"]:
        """The confidence of each claim, from 0 to 1."""
        shift = np.array([self.kinds.get(one.claim.kind, 0.0) for one in found])
        center, spread, weights = (np.asarray(of, np.float64) for of in (self.center, self.spread, self.weights))
        z = self.intercept + shift + standard(table(found), center, spread) @ weights
        return 1 / (1 + np.exp(-z))

    def write(self, file: AnyPath) -> None:
        """Writes it as JSON."""
        write_atomically(file, json.dumps(dataclasses.asdict(self), indent=1, default=str) + "\n")

    @classmethod
    def read(cls, file: AnyPath) -> "Confidence":
        """What `write` has written. Raises `InputError` for a file that holds something else."""
        try:
            found = cls(**json.loads(file.read_text(encoding="utf-8")))
            numbers = [*found.center, *found.spread, *found.weights, *found.kinds.values(), found.intercept]
            sizes = {len(found.center), len(found.spread), len(found.weights)}
            if sizes != {len(FEATURES)} or not np.isfinite(np.array(numbers, np.float64)).all():
                raise ValueError(f"it does not hold a number for each of {', '.join(FEATURES)}")
        except (ValueError, TypeError, AttributeError, UnicodeDecodeError) as error:
            raise InputError(f"{file} holds no confidence of claims ({error}); remove it, or fit it again.") from None
        return found


def fit(
    found: Sequence[Evidence], true: Bool[np.ndarray, "c"], labeller: str, settings: Mapping[str, Any], **facts
) -> Confidence:
    """The confidence that explains best which of some claims are true."""
    features = table(found)
    known = ~np.isnan(features)
    count = np.maximum(known.sum(0), 1)
    center = np.where(known, features, 0).sum(0) / count
    spread = np.sqrt((np.where(known, features - center, 0) ** 2).sum(0) / count)
    spread = np.where(spread > 1e-9, spread, 1.0)
    kinds = sorted({one.claim.kind for one in found})
    of_kind = np.array([[one.claim.kind == kind for kind in kinds] for one in found], np.float64)
    x = np.concatenate([standard(features, center, spread), of_kind], axis=1)
    weights, intercept = logistic(x, true.astype(np.float64))
    shifts = dict(zip(kinds, weights[len(FEATURES) :].tolist()))
    parts = (center.tolist(), spread.tolist(), weights[: len(FEATURES)].tolist())
    return Confidence(labeller, dict(settings), float(intercept), shifts, *parts, facts)


def standard(
    features: Float[np.ndarray, "c f"], center: Float[np.ndarray, "f"], spread: Float[np.ndarray, "f"]
) -> Float[np.ndarray, "c f"]:
    """Features in units of their spread around their center; 0 where one is not known."""
    return np.nan_to_num((features - center) / spread)


def mark_of(pair: Pair) -> str:
    """A hash of the AR's head: every training changes it, a merge of adapters or another dtype does not."""
    head = np.ascontiguousarray(to_host(pair.reconstructor_params["head"]), np.float32)
    return hashlib.blake2b(head.tobytes(), digest_size=8).hexdigest()
