"""The claims of explanations with a confidence each, for `nla explain --confidence` and the page of `nla serve`."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from nla_jax.data.activations import Activations
from nla_jax.io.files import AnyName, AnyPath
from nla_jax.io.pairs import pair_folders, place_of
from nla_jax.pair import Explanation, Pair
from nla_jax.probes.evidence import FILE, Confidence, Sentences, evidence, explained_before, mark_of, sampled
from nla_jax.runtime.errors import InputError
from nla_jax.runtime.notes import note
from nla_jax.runtime.user_code import resolve
from nla_jax.subject import Subject

# Labellers of this package whose labels can be read back. The file beside a pair may name another: that is somebody's
# code, and only who explains can ask for it (--labeller).
GRAMMARS = (
    "nla_jax.labels.extractive:Extractive",
    "nla_jax.labels.extractive:WordsFirst",
    "nla_jax.labels.behaviour:Behaviour",
)


@dataclasses.dataclass(frozen=True)
class ClaimReader:
    """Reads the claims of explanations by a `grammar`, and says how sure one may be of each: as `learned`, or else the
    share of `samples` sampled explanations that make the same claim."""

    grammar: Any
    samples: int
    learned: Confidence | None = None
    subject: Subject | None = None  # whose tokens before are looked at; None: vectors without a text

    @property
    def about(self) -> str:
        """What the confidence is, in a sentence or two."""
        if self.learned:
            facts = self.learned.facts
            return (
                f"Confidence: fitted to {facts.get('claims')} claims of {facts.get('documents')} documents with "
                f"{facts.get('samples')} samples each; on others its AUROC was {facts.get('auroc', np.nan):.2f}."
            )
        kind = "sentence" if isinstance(self.grammar, Sentences) else "claim"
        return (
            f"Confidence: the share of {self.samples} sampled explanations that make the same {kind}. It says how sure the "
            f"pair is, not how often it is right: nothing was fitted to this pair ({FILE})."
        )

    def read(
        self, pair: Pair, activations: Activations, said: Sequence[Explanation], first: int = 0, **options
    ) -> list[list[dict]]:
        """For each explanation its claims: `text, kind, confidence`. `first`: the number of the first row; `options`:
        more of `Pair.explain`."""
        vectors, texts = np.asarray(activations.vectors), [explanation.text for explanation in said]
        samples = sampled(pair, vectors, self.samples, first=first * self.samples, **options)
        before = [[] for _ in texts]
        if self.learned and self.subject and all(activations.token_ids):
            before = explained_before(pair, self.subject, activations.token_ids, **options)
        found = evidence(pair, self.grammar, vectors, texts, samples, before)
        sure = self.learned.of(found) if self.learned and found else [one.agreement for one in found]
        claims: list[list[dict]] = [[] for _ in texts]
        for one, p in zip(found, sure):
            claims[one.row].append({"text": one.claim.value, "kind": one.claim.kind, "confidence": round(float(p), 4)})
        return claims


def claim_reader(
    pair: Pair, name: AnyName, samples: int, labeller: str | None = None, subject: Subject | None = None
) -> ClaimReader:
    """What reads the claims of the pair called `name`. A note says why a file beside the pair is not used.

    `labeller`: the import path of one whose grammar the explanations follow. Without it the file beside the pair names
    it; where there is none, each sentence is a claim. Raises `InputError` for a labeller that reads no claims."""
    learned = learned_of(pair, name)
    grammar = Sentences()
    if labeller is not None:
        settings = dict(learned.settings) if learned and learned.labeller == labeller else {}
        grammar = resolve(labeller, "--labeller")(**settings)
        if not hasattr(grammar, "claims"):
            raise InputError(f"--labeller {labeller} cannot read claims: it has no method `claims(text)`.")
        learned = learned if learned and learned.labeller == labeller else None
    elif learned and learned.labeller in GRAMMARS:
        grammar = resolve(learned.labeller, f"labeller in {FILE}")(**learned.settings)
    elif learned:
        note(f"The claims of this pair are read by {learned.labeller}; name it with --labeller to use its confidence.")
        learned = None
    return ClaimReader(grammar, samples, learned, subject)


def learned_of(pair: Pair, name: AnyName) -> Confidence | None:
    """The confidence beside a pair; None where there is none, or it was fitted before the pair's last training."""
    if (file := file_beside(name)) is None:
        return None
    learned = Confidence.read(file)
    if learned.facts.get("pair") == mark_of(pair):
        return learned
    note(f"{file} belongs to another training of this pair, and is not used.")
    return None


def file_beside(name: AnyName) -> AnyPath | None:
    """The file of the confidence beside a pair, by the pair's name; None where there is none."""
    places = [place_of(name), place_of(name) / "pair", pair_folders(name, None)[0].parent]
    return next((place / FILE for place in places if (place / FILE).exists()), None)
