"""What the last tokens alone say of an activation, without any text: the scores that an explanation has to beat.

Each baseline is fitted to activations of the warm start's documents; its settings are chosen on a fifth of these. Like a
reconstruction it is scored at the length of an activation, so that the best constant scores below 0.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from nla_jax.fve import mse, normalise, row_fve
from nla_jax.probes.fidelity import after_rl
from nla_jax.probes.linear import ridge, set_aside
from nla_jax.probes.probe import Context, probe

TOKENS = 8  # so many last tokens are looked at, at most
WIDTH = 512  # principal directions of an embedding that a regression reads, at most
STRENGTHS = (0.5, 2.0, 8.0)  # of the pull of a token's mean towards that of fewer tokens, in rows
KINDS = ("a word begins", "within a word", "number", "punctuation or blank")  # of tokens
PENALTIES = (3e-3, 3e-2, 3e-1)  # of a regression, as shares of the mean variance of its inputs, times rows

Predict = Callable[..., Float[np.ndarray, "m D"]]  # (fit, ids, **setting) -> reconstructions of the rows with these ids


@dataclasses.dataclass(frozen=True)
class Fit:
    """Rows to fit a baseline to: their last tokens (the newest last; -1 where a text is shorter), and activations at
    length sqrt(D)."""

    ids: Int[np.ndarray, "n W"]
    vectors: Float[np.ndarray, "n D"]
    embedding: Float[np.ndarray, "V E"]

    def at(self, rows: Bool[np.ndarray, "n"]) -> "Fit":
        """The rows where `rows` is true."""
        return dataclasses.replace(self, ids=self.ids[rows], vectors=self.vectors[rows])


@probe(
    "What the last tokens say without any text",
    needs=("pair", "training"),
    labels={
        "fve_nearest": "nearest training activation (sees the activation)",
        "fve_token_ridge": "regression on the last tokens",
        "fve_token_means": "mean activation of the last tokens",
        "fve_token_mean": "mean activation of the last token",
        "fve_token_name": "the AR reads the last token alone",
        "fve_constant": "the best constant",
    },
)
def tokens(context: Context) -> dict[str, np.ndarray]:
    """Scores without an explanation: a table of the mean training activation of the last token (or of the last few), a
    ridge regression from their embeddings, the AR given nothing but the last token, and the same vector for every row. A score at
    or below the best of these says nothing that the tokens do not."""
    return {name: row_fve(recon, context.vectors) for name, recon in reconstructions(context).items()} | {
        "fve_token_name": context.row_fve([token.strip() for token in context.column("token")])
    }


@probe(
    "Beyond the last tokens",
    needs=("pair", "training"),
    labels={"fve_beyond_tokens": "AV after RL"},
    unit="1 − mse / mse of the best token baseline",
)
def beyond_tokens(context: Context) -> dict[str, np.ndarray]:
    """The share of what the best baseline of the last tokens misses that the explanation explains. 0: no better than the
    tokens; below 0: worse."""
    if not (of := of_tokens(context)):
        return {}
    best = min(mse(recon, context.vectors).mean() for recon in of.values())
    return {"fve_beyond_tokens": 1 - mse(np.asarray(context.recon("rl")), context.vectors) / best}


@probe("Where the explanations are good", needs=("pair", "training"))
def by_place(context: Context) -> dict[str, np.ndarray]:
    """FVE after RL by kind of token, by how often the token occurs among the training rows, by its place in the text,
    and by who speaks."""
    score = after_rl(context)["fve_rl"]
    token, role = context.column("token"), context.column("role")
    kinds = [kind_of(text) for text in token]
    seen = dict(zip(*np.unique(context.training.column("token"), return_counts=True)))
    often = np.array([seen.get(text, 0) for text in token])
    place = np.array(context.column("n_raw_tokens"))
    groups = (
        {name: [kind == name for kind in kinds] for name in KINDS}
        | {
            "token never seen in training": often == 0,
            "seen up to 10 times": (often > 0) & (often <= 10),
            "seen more often": often > 10,
            "first half of the places": place <= np.median(place),
            "second half of the places": place > np.median(place),
        }
        | {f"spoken by the {name}": [r == name for r in role] for name in sorted(set(role) - {""})}
    )
    return {name: np.where(rows, score, np.nan) for name, rows in groups.items() if np.any(rows)}


def kind_of(token: str) -> str:
    """The kind of a token, one of `KINDS`; "" for the rest, such as a fraction's sign."""
    word = token.strip()
    if word[:1].isalpha():
        return "a word begins" if token[:1].isspace() else "within a word"
    if word[:1].isdigit():
        return "number"
    return "" if word[:1].isalnum() else "punctuation or blank"


def reconstructions(context: Context) -> dict[str, Float[np.ndarray, "n D"]]:
    """What each baseline rebuilds of the held-out rows; those of tokens only where the rows have token ids."""
    fit, gold = _fit(context), normalise(np.asarray(context.vectors, np.float64))
    nearest = np.concatenate(
        [np.argmax(part @ fit.vectors.T, 1) for part in np.array_split(gold, len(gold) // 500 + 1)]
    )
    constant = np.broadcast_to(fit.vectors.mean(0), gold.shape)
    return {"fve_nearest": fit.vectors[nearest]} | of_tokens(context) | {"fve_constant": constant}


@functools.lru_cache(maxsize=1)  # two probes read it
def of_tokens(context: Context) -> dict[str, Float[np.ndarray, "n D"]]:
    """The baselines that know the last tokens."""
    fit, ids = _fit(context), last_tokens(context.column("token_ids"))
    if fit.ids[:, -1].max() < 0 or ids[:, -1].min() < 0:
        return {}  # activations made elsewhere: their tokens are not known
    documents = context.training.column("doc_id")
    grid = lambda name, values, orders: [{"order": n, name: value} for n in orders for value in values]
    tried = {
        "fve_token_ridge": (regression, grid("penalty", PENALTIES, (1, 2, 4, 8))),
        "fve_token_means": (token_means, grid("strength", STRENGTHS, (1, 2, 3))),
        "fve_token_mean": (token_means, grid("strength", STRENGTHS, (1,))),
    }
    return {name: predict(fit, ids, **choose(predict, fit, documents, grid)) for name, (predict, grid) in tried.items()}


@functools.lru_cache(maxsize=1)  # likewise
def _fit(context: Context) -> Fit:
    training = context.training
    vectors = normalise(np.asarray(training.vectors, np.float64))
    return Fit(last_tokens(training.column("token_ids")), vectors, context.embedding)


def last_tokens(ids: Iterable[Sequence[int]]) -> Int[np.ndarray, "n W"]:
    """The last `TOKENS` ids of each row, -1 where there are fewer."""
    return np.array([([-1] * TOKENS + list(row or ()))[-TOKENS:] for row in ids])


def choose(predict: Predict, fit: Fit, documents: Sequence[str], settings: Sequence[dict]) -> dict[str, Any]:
    """The setting with the least error on a fifth of the documents, fitted to the others."""
    held = set_aside(documents)
    if held.all():  # of one document nothing can be set aside
        return settings[0]
    others = fit.at(~held)
    error = lambda setting: mse(predict(others, fit.ids[held], **setting), fit.vectors[held]).mean()
    return min(settings, key=error)


def token_means(fit: Fit, ids: Int[np.ndarray, "m W"], order: int, strength: float) -> Float[np.ndarray, "m D"]:
    """The mean vector of the rows that end with the same `order` tokens, pulled towards the mean of those with one token
    less as if that were `strength` further rows; where none ends so, the latter."""
    mean = fit.vectors.mean(0)
    found, own = np.tile(mean, (len(ids), 1)), np.tile(mean, (len(fit.ids), 1))
    for n in range(1, order + 1):
        ends, member = np.unique(fit.ids[:, -n:], axis=0, return_inverse=True)
        member = member.reshape(-1)
        sums, counts = np.zeros((len(ends), len(mean))), np.bincount(member)[:, None]
        np.add.at(sums, member, fit.vectors)
        prior = np.empty_like(sums)
        prior[member] = own  # rows of one end share it
        means = (sums + strength * prior) / (counts + strength)
        row_of = {tuple(end): i for i, end in enumerate(ends.tolist())}
        for i, end in enumerate(ids[:, -n:].tolist()):
            if (at := row_of.get(tuple(end))) is not None:
                found[i] = means[at]
        own = means[member]
    return found


def regression(fit: Fit, ids: Int[np.ndarray, "m W"], order: int, penalty: float) -> Float[np.ndarray, "m D"]:
    """A ridge regression from the embeddings of the last `order` tokens, one beside the other (at most `WIDTH` principal
    directions of each)."""
    known = np.unique(fit.ids[:, -order:])
    table = np.concatenate([np.asarray(fit.embedding, np.float64), np.zeros((1, fit.embedding.shape[1]))])  # -1: zeros
    if table.shape[1] > WIDTH:
        used = table[known] - table[known].mean(0)
        table = table @ np.linalg.eigh(used.T @ used)[1][:, -WIDTH:]
    inputs = lambda ids: table[ids[:, -order:]].reshape(len(ids), -1)
    return ridge(inputs(fit.ids), fit.vectors, inputs(ids), penalty)
