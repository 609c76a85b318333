"""Can an activation be found by its explanation? Its reconstruction is compared with many activations.

FVE may be high where all activations are alike. To find one among others the text must say what is its own. Candidates
are ranked by cosine, which orders them as the AR's loss does. Ties count as if chance ordered them.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

from nla_jax.fve import normalise
from nla_jax.probes.fidelity import derangement
from nla_jax.probes.probe import Context, probe

MOST = 1000  # rows that are ranked, spread evenly over the held-out rows
NAMES = {"rl": "AV after RL", "shuffled": "text of another document", "chance": "chance"}


@probe("Found first", unit="share", labels={f"hit_at_1_{who}": label for who, label in NAMES.items()})
def hits(context: Context) -> dict[str, np.ndarray]:
    """How often the own activation comes first among itself and the activations of all other documents."""
    return {f"hit_at_1_{who}": first for who, (first, _) in ranked(context).items()}


@probe("Place among others", unit="mean of 1 / rank", labels={f"mrr_{who}": label for who, label in NAMES.items()})
def reciprocal_rank(context: Context) -> dict[str, np.ndarray]:
    """One by the rank of the own activation among itself and the activations of all other documents: 1 where it comes
    first, 0.5 where it comes second."""
    return {f"mrr_{who}": reciprocal for who, (_, reciprocal) in ranked(context).items()}


@probe(
    "Which of a document’s positions",
    unit="share",
    labels={f"position_match_{who}": label for who, label in NAMES.items()},
)
def position_match(context: Context) -> dict[str, np.ndarray]:
    """How often the own activation comes first among those of the same document. Documents with one row are left out."""
    members, texts = np.unique(context.documents, return_inverse=True)[1], np.asarray(context.recon("rl"))
    gold, count = np.asarray(context.vectors), len(members)
    found = {f"position_match_{who}": np.full(count, np.nan) for who in NAMES}
    other = texts[derangement(context.documents, context.seed)]
    for document in range(members.max() + 1):
        rows = np.flatnonzero(members == document)
        if len(rows) < 2:
            continue
        everyone = np.ones((len(rows), len(rows)), bool)
        for who, recon in (("rl", texts), ("shuffled", other)):
            found[f"position_match_{who}"][rows] = first_and_reciprocal(recon[rows], gold[rows], everyone)[0]
        found["position_match_chance"][rows] = 1 / len(rows)
    return found


def ranked(context: Context) -> dict[str, tuple[Float[np.ndarray, "n"], Float[np.ndarray, "n"]]]:
    """For the texts, for those of other documents and for chance: of each row the probability that it comes first, and
    the mean of 1 / rank. NaN for rows that are not among the `MOST` ranked ones."""
    count = len(context.vectors)
    at = np.unique(np.linspace(0, count - 1, min(count, MOST)).astype(int))
    candidates = candidates_of([context.documents[i] for i in at])
    gold, texts = np.asarray(context.vectors)[at], np.asarray(context.recon("rl"))
    other = texts[derangement(context.documents, context.seed)]
    found = {
        "rl": first_and_reciprocal(texts[at], gold, candidates),
        "shuffled": first_and_reciprocal(other[at], gold, candidates),
        "chance": expected(np.zeros(len(at), int), candidates.sum(1) - 1),
    }
    whole = {who: tuple(np.full(count, np.nan) for _ in scores) for who, scores in found.items()}
    for who, scores in found.items():
        for all_rows, values in zip(whole[who], scores):
            all_rows[at] = values
    return whole


def candidates_of(documents: Sequence[str]) -> Bool[np.ndarray, "n n"]:
    """Whom each row is compared with: itself, and the rows of other documents."""
    names = np.asarray(documents)
    return (names[:, None] != names[None, :]) | np.eye(len(names), dtype=bool)


def first_and_reciprocal(
    recon: Float[np.ndarray, "n D"], gold: Float[np.ndarray, "n D"], candidates: Bool[np.ndarray, "n n"]
) -> tuple[Float[np.ndarray, "n"], Float[np.ndarray, "n"]]:
    """Of each reconstruction the probability that its own row of `gold` comes first among its candidates by cosine, and
    the mean of 1 / rank."""
    similar = normalise(np.asarray(recon, np.float64)) @ normalise(np.asarray(gold, np.float64)).T / gold.shape[1]
    own = np.diagonal(similar)[:, None]
    tied = np.isclose(similar, own, rtol=0, atol=1e-9)
    ahead = ((similar > own) & ~tied & candidates).sum(1)
    return expected(ahead, (tied & candidates).sum(1) - 1)  # a row ties with itself


def expected(
    ahead: Int[np.ndarray, "n"], tied: Int[np.ndarray, "n"]
) -> tuple[Float[np.ndarray, "n"], Float[np.ndarray, "n"]]:
    """The probability of the first rank, and the mean of 1 / rank, where `ahead` others come before a row, and its place
    among `tied` others is drawn by chance."""
    harmonic = np.concatenate([[0.0], np.cumsum(1 / np.arange(1, (ahead + tied).max(initial=0) + 2))])
    reciprocal = (harmonic[ahead + tied + 1] - harmonic[ahead]) / (tied + 1)
    return np.where(ahead == 0, 1 / (tied + 1), 0.0), reciprocal
