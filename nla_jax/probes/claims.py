"""Are the explanations true? Every claim that can be read from them by the grammar of the run's labeller, checked.

No judge is asked: a labeller that writes by a formula can read what is written so (`claims`) and check it against the
text and the subject (`true`). Other labellers have no such grammar; there is then nothing to show.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from nla_jax.data.rows import LABEL
from nla_jax.fve import mse, normalise
from nla_jax.labels.labeller import Claim, LabelRow, label_rows
from nla_jax.probes.linear import ridge, set_aside
from nla_jax.probes.probe import Context, probe

EXACT = 1e-9  # an mse up to this is that of a perfect reconstruction, which has no share
SEEN = 5  # a value that fewer training labels claim is none that the linear probe can name
PENALTIES = (3e-3, 3e-2, 3e-1, 3.0)  # of the linear probe, as shares of the mean variance of its inputs, times rows


@probe("Truth of the claims", needs=("pair", "warm", "labels", "training"), unit="share of claims that are true")
def truth(context: Context) -> dict[str, np.ndarray]:
    """The share of an explanation's claims that hold for its text, by kind of claim: before and after RL, and what a
    linear probe of the activation reaches that must make a claim of each kind that the row's label makes. Explanations
    without a claim of a kind are left out there; the chart below shows how many these are."""
    labeller = context.labeller
    if not has_grammar(labeller):
        return {}
    rows = rows_for(context)
    rl, warm = (true_shares(labeller, context.texts(who), rows) for who in ("rl", "warm"))
    scores = {}
    for kind in sorted(rl.keys() | warm.keys()):
        found = {"after_rl": rl.get(kind), "warm": warm.get(kind), "linear_probe": linear(context, kind, rows)}
        scores |= {_name(kind, "true", who): values for who, values in found.items() if values is not None}
    return scores


@probe("Truth of the claims after RL", needs=("pair", "labels"), unit="share of claims that are true")
def true_after_rl(context: Context) -> dict[str, np.ndarray]:
    """The share of an explanation's claims that hold for its text, after RL: of all of them, and by kind. It costs a
    reading of the texts alone, so that training can look at it."""
    if not has_grammar(labeller := context.labeller):
        return {}
    told = told_by(labeller, context.texts("rl"), rows_for(context))
    all_of = _of_all_kinds(told, len(context.vectors))
    by_kind = {_name(kind, "true", "after_rl"): _means(shares) for kind, shares in told.items()}
    return {"true_after_rl": _means(all_of)} | by_kind if told else {}


@probe("Claims after RL", needs=("pair", "labels"), unit="claims of an explanation")
def made_after_rl(context: Context) -> dict[str, np.ndarray]:
    """How many claims an explanation makes after RL."""
    if not has_grammar(labeller := context.labeller):
        return {}
    return {"claims_after_rl": np.array([len(labeller.claims(text)) for text in context.texts("rl")], float)}


@probe("Explanations with a claim of each kind", needs=("pair", "warm", "labels"), unit="share of rows")
def claimed(context: Context) -> dict[str, np.ndarray]:
    """How many explanations make a claim of each kind. Truth is cheap for one that claims little."""
    labeller, made = context.labeller, {}
    if not has_grammar(labeller):
        return {}
    for who, texts in (("after_rl", context.texts("rl")), ("warm", context.texts("warm"))):
        made[who] = [{claim.kind for claim in labeller.claims(text)} for text in texts]
    kinds = sorted(set().union(*made["after_rl"], *made["warm"]))
    share = lambda kind, of: np.array([kind in kinds for kinds in of], float)
    return {_name(kind, "claimed", who): share(kind, of) for kind in kinds for who, of in made.items()}


@probe(
    "What a claim is worth to the reconstructor",
    needs=("pair", "labels"),
    unit="% by which mse grows where the claim is taken out",
)
def ablation(context: Context) -> dict[str, np.ndarray]:
    """Each claim is taken out of its text, and the text read again: by how much the mean squared error of the row grows,
    in % of what it was, by kind of claim, for true claims and for false ones. 0: the reconstructor does not read it; below
    0: it reads better without it. Where false claims are worth as much as true ones, the score does not need truth."""
    if not has_grammar(context.labeller):
        return {}
    rows, vectors = rows_for(context), np.asarray(context.vectors)
    taken = deletions(context.labeller, context.texts("rl"), rows)
    if not taken:
        return {}
    owner = np.array([deletion.row for deletion in taken])
    before = mse(np.asarray(context.recon("rl")), vectors)
    after = mse(context.pair.reconstruct([deletion.text for deletion in taken]), vectors[owner])
    percent = growth(before[owner], after)
    told: dict[tuple[str, bool], list[list[float]]] = {}
    for deletion, value in zip(taken, percent.tolist()):
        told.setdefault((deletion.kind, deletion.true), [[] for _ in rows])[deletion.row].append(value)
    named = lambda kind, true: _name(kind, "effect", "true" if true else "false")
    return {named(*key): _means(told[key]) for key in sorted(told, key=lambda key: (key[0], not key[1]))}


def growth(before: Float[np.ndarray, "n"], after: Float[np.ndarray, "n"]) -> Float[np.ndarray, "n"]:
    """By how much the mean squared errors of texts grow where a claim is taken out, in % of what they were; NaN where
    nothing was wrong before."""
    return 100 * (after / np.where(before > EXACT, before, np.nan) - 1)


class Deletion(NamedTuple):
    """A text from which one claim has been taken out."""

    row: int
    kind: str
    true: bool  # whether the claim held
    text: str


def deletions(labeller, texts: Sequence[str], rows: Sequence[LabelRow]) -> list[Deletion]:
    """Every text without one of its claims, for each of them."""
    return [
        Deletion(i, claim.kind, bool(labeller.true(claim, row)), without(labeller, text, claim))
        for i, (text, row) in enumerate(zip(texts, rows))
        for claim in labeller.claims(text)
    ]


def without(labeller, text: str, claim: Claim) -> str:
    """The text without a claim: as its labeller takes it out, else without the first place where its value stands."""
    if hasattr(labeller, "without"):
        return labeller.without(text, claim)
    return " ".join(text.replace(claim.value, " ", 1).split())


def rows_for(context: Context) -> list[LabelRow]:
    """The held-out rows as the labeller sees them; it has computed together what its claims about them need."""
    rows = label_rows(context.column)
    _prepare(context.labeller, rows)
    return rows


def _prepare(labeller, rows: Sequence[LabelRow]) -> None:
    """The labeller computes together what its claims about the rows need, if it says how."""
    getattr(labeller, "ready_for", lambda rows: None)(rows)


def has_grammar(labeller) -> bool:
    """Whether a labeller can read and check what is written as its labels are."""
    return hasattr(labeller, "claims") and hasattr(labeller, "true")


def _name(kind: str, what: str, who: str) -> str:
    return f"{kind.replace(' ', '_')}_{what}_{who}"


def true_shares(labeller, texts: Sequence[str], rows: Sequence[LabelRow]) -> dict[str, Float[np.ndarray, "n"]]:
    """Of each text the share of its claims of one kind that hold for its row; NaN where it makes none."""
    return {kind: _means(shares) for kind, shares in told_by(labeller, texts, rows).items()}


def truth_of(labeller, texts: Sequence[str], rows: Sequence[LabelRow]) -> Float[np.ndarray, "n"]:
    """Of each text the share of all its claims that hold for its row; 0 where it makes none."""
    _prepare(labeller, rows)
    held = _of_all_kinds(told_by(labeller, texts, rows), len(texts))
    return np.nan_to_num(_means(held)).astype(np.float32)


def told_by(labeller, texts: Sequence[str], rows: Sequence[LabelRow]) -> dict[str, list[list[bool]]]:
    """By kind, for each text: which of its claims hold for its row."""
    told: dict[str, list[list[bool]]] = {}
    for i, (text, row) in enumerate(zip(texts, rows)):
        for claim in labeller.claims(text):
            told.setdefault(claim.kind, [[] for _ in rows])[i].append(labeller.true(claim, row))
    return dict(sorted(told.items()))


def _of_all_kinds(told: dict[str, list[list[bool]]], count: int) -> list[list[bool]]:
    """For each of `count` texts: which of its claims hold, of whatever kind."""
    return [[held for of in told.values() for held in of[i]] for i in range(count)]


def _means(told: Sequence[Sequence[float]]) -> Float[np.ndarray, "n"]:
    """The mean of each row's values; NaN where it has none."""
    return np.array([np.mean(values) if len(values) else np.nan for values in told])


def linear(context: Context, kind: str, rows: Sequence[LabelRow]) -> Float[np.ndarray, "n"] | None:
    """Whether the claim of a kind is true that a linear probe finds likeliest from each activation: ridge regression to
    the values that the training labels claim. NaN where the row's own label makes no such claim; None where no value is
    claimed `SEEN` times."""
    vectors, told, held = _training(context)
    claims = [[claim.value for claim in of if claim.kind == kind] for of in told]
    values, counts = np.unique([value for of in claims for value in of], return_counts=True)
    number = {value: i for i, value in enumerate(values[counts >= SEEN])}
    if not number:
        return None
    targets = np.zeros((len(claims), len(number)), np.float32)
    for row, of in zip(targets, claims):
        for value in of:
            if value in number:
                row[number[value]] = 1
    hits = lambda scores: targets[held][np.arange(held.sum()), scores.argmax(1)].mean()
    tried = lambda penalty: hits(ridge(vectors[~held], targets[~held], vectors[held], penalty))
    penalty = PENALTIES[0] if held.all() else max(PENALTIES, key=tried)  # of one document nothing can be set aside
    scores = ridge(vectors, targets, normalise(np.asarray(context.vectors, np.float64)).astype(np.float32), penalty)
    names = list(number)
    guesses = [Claim(kind, names[i]) for i in scores.argmax(1)]
    asked = [any(claim.kind == kind for claim in context.labeller.claims(label)) for label in context.texts("labels")]
    true = [context.labeller.true(claim, row) for claim, row in zip(guesses, rows)]
    return np.where(asked, np.array(true, float), np.nan)


@functools.lru_cache(maxsize=1)  # each kind of claim reads it
def _training(context: Context) -> tuple[Float[np.ndarray, "n D"], list[list[Claim]], Bool[np.ndarray, "n"]]:
    """The training activations at one length, what their labels claim, and the rows that choose a probe's strength."""
    rows = context.training
    vectors = normalise(np.asarray(rows.vectors, np.float64)).astype(np.float32)
    return (
        vectors,
        [context.labeller.claims(label or "") for label in rows.column(LABEL)],
        set_aside(rows.column("doc_id")),
    )
