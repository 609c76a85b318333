"""Does anything that the pair says of itself tell a true claim from a false one? `probes.evidence` says what is looked at.

Half of the held-out documents fit a logistic regression of the evidence for a claim on its truth, which the grammar of
the run's labeller knows. The other half tests it; all figures are of that half. Documents that the pair was trained on
would not do: it is surer of them, and more often right. What is fitted and tested is kept beside the pair
(`confidence.json`), for `nla explain --confidence`.
"""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

from nla_jax.probes.claims import has_grammar, rows_for
from nla_jax.probes.evidence import FILE, Confidence, Evidence, evidence, explained_before, fit, mark_of, sampled, table
from nla_jax.probes.probe import Context, probe

LOOKED_AT = 256  # rows, spread evenly, at most
SAMPLES = 5  # explanations of an activation that may agree on a claim
BINS = 10  # of the reliability curve, of equal width
NEEDED = ("pair", "labels", "subject")
READ_AS = {
    "confidence": "confidence",
    "base_rate": "how often a claim of its kind is true",
    "agreement": "agreement of samples alone",
    "recurrence": "recurrence before alone",
    "ablation": "ablation effect alone",
}
named = lambda figure: {f"{figure}_{name}": text for name, text in READ_AS.items()}


@probe("Which claims are true?", needs=NEEDED, unit="AUROC (0.5: chance)", labels=named("auroc"))
def confidence(context: Context) -> dict[str, np.ndarray]:
    """How often a true claim has a higher confidence than a false one: of all kinds together, of each kind for itself,
    and what each feature alone, and the kind alone, tell. A row's value is its part of the AUROC: their mean is the AUROC
    of all claims, and redrawn documents give its interval."""
    if (judged := judge(context)) is None:
        return {}
    scores = {name: judged.auroc(values) for name, values in judged.scores.items()}
    for kind in sorted({one.claim.kind for one in judged.found}):
        of = np.array([one.claim.kind == kind for one in judged.found])
        scores[f"within_{kind.replace(' ', '_')}"] = judged.auroc(judged.scores["confidence"], of)
    return {f"auroc_{name}": values for name, values in scores.items() if values is not None}


@probe(
    "Is the confidence what it says?",
    needs=NEEDED,
    unit="error of a probability",
    labels={
        "error_confidence": "calibration error of the confidence",
        "error_agreement": "calibration error of the bare agreement",
        "brier_confidence": "squared error of the confidence",
        "brier_base_rate": "squared error of how often its kind is true",
        "brier_agreement": "squared error of the bare agreement",
    },
)
def calibration(context: Context) -> dict[str, np.ndarray]:
    """The expected calibration error: by how much the share of true claims differs from the confidence that they have, in
    ten bins of confidence, weighted by claims. And the mean squared error of the confidence (Brier score), beside that of
    the share of claims of the same kind that are true: a confidence that is no better than this knows only kinds."""
    if (judged := judge(context)) is None:
        return {}
    found = {}
    for name in ("confidence", "agreement"):
        found[f"error_{name}"] = judged.mean(calibration_errors(judged.scores[name], judged.true))
    for name in ("confidence", "base_rate", "agreement"):
        found[f"brier_{name}"] = judged.mean((judged.scores[name] - judged.true) ** 2)
    return found


@probe(
    "How often a claim of some confidence is true",
    needs=NEEDED,
    chart="curve",
    axis="confidence (middle of a bin)",
    unit="share of claims that are true",
)
def reliability(context: Context) -> dict[str, np.ndarray]:
    """The share of true claims in each tenth of the confidence, of the rows with such claims. Where the confidence is what
    it says, this is a straight line from 0 to 1."""
    if (judged := judge(context)) is None:
        return {}
    bins = bin_of(judged.scores["confidence"])
    found = {}
    for i in np.unique(bins):
        told: list[list[bool]] = [[] for _ in context.vectors]
        for j in np.flatnonzero(bins == i):
            told[judged.found[j].row].append(judged.true[j])
        found[f"{(i + 0.5) / BINS:.2f}"] = np.array([np.mean(of) if of else np.nan for of in told])
    return found


@dataclasses.dataclass(frozen=True)
class Judged:
    """The claims of the testing half: what speaks for them, whether they are true, and some scores of each. `tested`:
    which of all rows belong to that half."""

    found: list[Evidence]
    true: Bool[np.ndarray, "c"]
    scores: dict[str, Float[np.ndarray, "c"]]
    tested: Bool[np.ndarray, "n"]

    @property
    def rows(self) -> Int[np.ndarray, "c"]:
        """The row of each claim."""
        return np.array([one.row for one in self.found])

    def auroc(
        self, scores: Float[np.ndarray, "c"], of: Bool[np.ndarray, "c"] | None = None
    ) -> Float[np.ndarray, "n"] | None:
        """A value for each row whose mean is the AUROC of the claims `of` (default: all); None where all of these are
        true, or all false."""
        of = np.ones(len(self.true), bool) if of is None else of
        true = self.true[of]
        if true.all() or not true.any():
            return None
        right = placements(scores[of], true)
        share = np.where(true, true.mean(), 1 - true.mean())
        # Each half of the pairs is centred, so that the mean over rows is exact, and redrawing rows redraws both.
        return self.mean(right.mean(where=true) + (right - right.mean(where=true)) / share, of)

    def mean(self, values: Float[np.ndarray, "m"], of: Bool[np.ndarray, "c"] | None = None) -> Float[np.ndarray, "n"]:
        """A value for each tested row whose mean over these rows is that of `values`, of the claims `of` (default: all).
        NaN elsewhere.

        It is that mean, and the row's deviations from it: a mean of claims has an uncertain number of claims too."""
        rows, mean = self.rows if of is None else self.rows[of], values.mean()
        out = np.where(self.tested, mean, np.nan)
        np.add.at(out, rows, (values - mean) * self.tested.sum() / len(values))
        return out


@functools.lru_cache(maxsize=1)  # three probes read it
def judge(context: Context) -> Judged | None:
    """The claims of at most `LOOKED_AT` rows, judged; what was fitted to their first half is kept beside the pair. None
    where nothing can be fitted or tested: no grammar, or all claims of a half true or all false."""
    labeller = context.labeller
    if not has_grammar(labeller) or not all(context.column("token_ids")):
        return None
    rows = rows_for(context)
    at = np.unique(np.linspace(0, len(rows) - 1, min(len(rows), LOOKED_AT)).astype(int))
    found = _evidence(context, at)
    true = np.array([bool(labeller.true(one.claim, rows[one.row])) for one in found], bool)
    first = first_half(context.documents)
    fits = np.array([first[one.row] for one in found], bool)
    if any(len(set(true[half].tolist())) < 2 for half in (fits, ~fits)):
        return None
    of = [one for one, fitting in zip(found, fits) if fitting]
    facts = {"documents": len({context.documents[one.row] for one in of}), "claims": len(of)}
    facts |= {"share_true": float(true[fits].mean()), "samples": SAMPLES, "pair": mark_of(context.pair)}
    learned = fit(of, true[fits], *_made_by(labeller), **facts)
    rest = [one for one, fitting in zip(found, fits) if not fitting]
    scores = {"confidence": learned.of(rest), "base_rate": _base_rates(of, true[fits], rest)}
    scores |= dict(zip(("agreement", "recurrence", "ablation"), _known(table(rest), learned).T))
    tested = np.zeros(len(rows), bool)
    tested[at] = ~first[at]
    judged = Judged(rest, true[~fits], scores, tested)
    auroc = float(np.nanmean(judged.auroc(scores["confidence"])))
    context.keep(FILE, dataclasses.replace(learned, facts=facts | {"auroc": auroc}))
    return judged


def _evidence(context: Context, at: Int[np.ndarray, "m"]) -> list[Evidence]:
    """What speaks for the claims of the rows `at`."""
    vectors, texts = np.asarray(context.vectors)[at], context.texts("rl")
    options = {"max_new_tokens": context.max_new_tokens, "seed": context.seed}
    samples = sampled(context.pair, vectors, SAMPLES, **options)
    ids = context.column("token_ids")
    before = explained_before(context.pair, context.subject, [ids[i] for i in at], **options)
    found = evidence(context.pair, context.labeller, vectors, [texts[i] for i in at], samples, before)
    return [one._replace(row=int(at[one.row])) for one in found]


def first_half(documents: Sequence[str]) -> Bool[np.ndarray, "n"]:
    """The rows of every other document."""
    return np.unique(documents, return_inverse=True)[1] % 2 == 0


def _made_by(labeller) -> tuple[str, dict]:
    """Import path and settings of a labeller, with which its grammar can be made again."""
    path = f"{type(labeller).__module__}:{type(labeller).__qualname__}"
    return path, dataclasses.asdict(labeller) if dataclasses.is_dataclass(labeller) else {}


def _base_rates(of: Sequence[Evidence], true: Bool[np.ndarray, "f"], at: Sequence[Evidence]) -> Float[np.ndarray, "c"]:
    """The share of true claims of the same kind, drawn towards that of all as if by one claim more."""
    told: dict[str, list[bool]] = {}
    for one, holds in zip(of, true.tolist()):
        told.setdefault(one.claim.kind, []).append(holds)
    rate = lambda kind: (sum(told.get(kind, [])) + true.mean()) / (len(told.get(kind, [])) + 1)
    return np.array([rate(one.claim.kind) for one in at])


def _known(features: Float[np.ndarray, "c f"], learned: Confidence) -> Float[np.ndarray, "c f"]:
    """Features, with their mean in place of those that are not known."""
    return np.where(np.isnan(features), np.asarray(learned.center), features)


# Figures of claims


def placements(scores: Float[np.ndarray, "c"], true: Bool[np.ndarray, "c"]) -> Float[np.ndarray, "c"]:
    """For each true claim the share of false ones that have a lower score, for each false claim the share of true ones
    that have a higher one; ties count half. The mean of either kind is the AUROC."""
    share = lambda own, others: (
        (np.searchsorted(others, own, "left") + np.searchsorted(others, own, "right")) / (2 * len(others))
    )
    found = np.zeros(len(scores))
    found[true] = share(scores[true], np.sort(scores[~true]))
    found[~true] = share(-scores[~true], np.sort(-scores[true]))
    return found


def bin_of(p: Float[np.ndarray, "c"]) -> Int[np.ndarray, "c"]:
    """Which of the `BINS` a probability falls in."""
    return np.minimum((p * BINS).astype(int), BINS - 1)


def calibration_errors(p: Float[np.ndarray, "c"], true: Bool[np.ndarray, "c"]) -> Float[np.ndarray, "c"]:
    """A value for each claim whose mean is the expected calibration error Σ_bins |Σ (true - p)| / claims."""
    bins, gap = bin_of(p), true - p
    sign = np.sign(np.bincount(bins, gap, BINS))
    return sign[bins] * gap
