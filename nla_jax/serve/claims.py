"""The claims of an explanation, and the explanation without each of them."""

from nla_jax.labels.behaviour import Behaviour
from nla_jax.labels.extractive import LAST, TAGS, WINDOW, Extractive, WordsFirst, last_words
from nla_jax.labels.labeller import Claim, LabelRow
from nla_jax.probes.claims import without

# Reads claims. Whether the subject expects a token is not checked here: that would need its head.
EXPECTING = Behaviour("")


def read(explanation: str) -> tuple[Behaviour | Extractive, list[Claim]]:
    """The formulaic labeller that can read most of an explanation, and the claims that it reads there."""
    claims = EXPECTING.claims(explanation)
    if any(claim.kind in ("certainty", "next") for claim in claims):
        return EXPECTING, claims
    readings = [(labeller, labeller.claims(explanation)) for labeller in (Extractive(), WordsFirst())]
    return max(readings, key=lambda reading: len(reading[1]))


def claims_of(explanation: str, context: str, token: str = "") -> list[dict]:
    """The claims of an explanation of the last token of a text: `kind, value, true`.

    `true` is None where it is not checked: what only the whole subject can say (what it expects next), and what stands
    beside that in such an explanation, but for its last words and last token."""
    labeller, claims = read(explanation)
    if labeller is EXPECTING:
        ends = last_words(TAGS.sub(" ", context[-WINDOW:]), EXPECTING.words, EXPECTING.characters)
        told = lambda claim: claim.value == token if claim.kind == "last token" and token else None
        holds = lambda claim: f" {ends}".endswith(f" {claim.value}") if claim.kind in LAST else told(claim)
    else:
        row = LabelRow(context, token, 0, "", "")
        holds = lambda claim: bool(labeller.true(claim, row))
    return [{"kind": claim.kind, "value": claim.value, "true": holds(claim)} for claim in claims]


def without_each(explanation: str) -> list[str]:
    """For each claim of `claims_of` the explanation without it."""
    labeller, claims = read(explanation)
    return [without(labeller, explanation, claim) for claim in claims]
