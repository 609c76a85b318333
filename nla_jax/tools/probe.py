"""Probes of a pair outside its run: anybody's pair, on the activations of given texts."""

import dataclasses
import functools
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float

from nla_jax.config import Evaluate, Extract
from nla_jax.data.activations import Activations
from nla_jax.data.corpus import Document, document_of
from nla_jax.fve import joined
from nla_jax.io.files import AnyPath
from nla_jax.io.parquet import write_table
from nla_jax.pair import Pair
from nla_jax.probes.probe import ASKS, Context, Probe, by_needs, left_out, load_probes, measure
from nla_jax.probes.provider import Provider
from nla_jax.runtime.errors import InputError
from nla_jax.runtime.metrics import Progress, write_atomically
from nla_jax.runtime.notes import note
from nla_jax.runtime.user_code import UserFunction
from nla_jax.runtime.user_input import of_class
from nla_jax.stages.extract import sample_activations
from nla_jax.subject import Subject
from nla_jax.tools.explain import Sampling

FEW = 100  # rows below which a mean says little
HAS = ("pair", "subject")  # of `probes.probe.NEEDS`: what there is of a pair without its run


@dataclasses.dataclass(frozen=True)
class Measurement:
    """What a probe has found: `rows` holds the scores of each row, `figures` their means and intervals. `seconds`: what it
    took."""

    probe: Probe
    rows: dict[str, Float[np.ndarray, "n"]]
    figures: dict  # see `probes.probe.figures`
    seconds: float


@dataclasses.dataclass(eq=False)
class PairContext(Context):
    """What the probes of a pair alone read (`probes.probe.Context`): "rl" names the texts of its AV, as `nla explain`
    reads them. There is no warm start, no label and no training row."""

    pair: Pair
    subject: Subject
    activations: Activations
    sampling: Sampling
    provider: Provider | None = None

    def __post_init__(self):
        layers = len(self.pair.sidecar.layers)
        self.vectors = joined(np.asarray(self.activations.vectors), layers).astype(np.float32, copy=False)
        self.documents = [document_of(id) for id in self.activations.doc_ids]
        s = self.sampling
        self.seed, self.max_new_tokens, self.batch = s.seed, s.max_new_tokens, s.batch
        self.column, self.texts = map(functools.cache, (self.column, self.texts))

    @functools.cached_property
    def embedding(self) -> Float[np.ndarray, "V E"]:
        """The subject's embedding of each token."""
        return np.asarray(self.subject.params["embedding"])

    @functools.cached_property
    def _columns(self) -> pa.Table:
        return self.activations.table()

    def column(self, name: str) -> list:
        """A column of the rows; "" for each row where there is no such column."""
        there = name in self._columns.column_names
        return self._columns.column(name).to_pylist() if there else [""] * len(self.vectors)

    def texts(self, name: str) -> list[str]:
        """The AV's texts of one condition."""
        conditions = {
            "rl": (self.sampling.temperature, True),
            "rl_temperature_1": (1.0, True),
            "no_injection": (self.sampling.temperature, False),
        }
        if name not in conditions:
            raise InputError(f"A pair without its run has no texts {name!r}; there are {', '.join(conditions)}.")
        temperature, inject = conditions[name]
        s, found = self.sampling, []
        progress = Progress(f"texts {name}", len(self.vectors))
        for start in range(0, len(self.vectors), s.batch):
            part, options = self.vectors[start : start + s.batch], {"inject": inject, "batch": s.batch, "first": start}
            found += self.pair.verbalize(part, s.max_new_tokens, temperature, s.seed, **options)
            progress.update(len(part))
        progress.close()
        return found

    def keep(self, name: str, learned: Any) -> None:
        """Nothing: a pair without its run has no folder to write to, as it may be a download."""


def probe(
    pair: Pair,
    subject: Subject,
    activations: Activations,
    probes: Sequence[str | Callable] | None = None,
    provider: Provider | None = None,
    **sampling: Any,
) -> dict[str, Measurement]:
    """What probes find of a pair on activations of its subject, by the probe's name.

    `probes`: import paths (`module:name`), functions or `Probe`s; None: those of a run, as far as a pair alone has what
    they need, and with a `provider` those that ask it (docs/probes.md). `sampling` says how texts are sampled, as the
    arguments of `Pair.explain` do: max_new_tokens (200), temperature (0), seed (0), batch (64). A note names the probes
    whose needs are not met.

    Raises `InputError` where fewer than two activations are given, where they are not of the pair's layer, where no
    probe can be run, and for a probe that fails."""
    of_class("pair", pair, Pair)
    of_class("activations", activations, Activations)
    if len(activations) < 2:
        raise InputError(f"There are {len(activations)} activations to probe with; give at least 2.")
    pair.score([""], activations[:1])  # raises for another width or layer, before anything is sampled
    context, c = PairContext(pair, subject, activations, Sampling(**sampling), provider), Evaluate()
    usual = c.probes if provider is None else c.probes + c.provider.probes
    able, lacking = by_needs(load_probes(usual if probes is None else list(probes), "probes"), there(provider))
    if lacking:
        note(left_out(lacking))
    return {found.probe.name: found for found in measured(context, able)}


def there(provider: Any) -> tuple[str, ...]:
    """What probes of a pair without its run find, of `probes.probe.NEEDS`; `provider`: whether there is one."""
    return HAS + ASKS if provider else HAS


def measured(
    context: Context, probes: Sequence[tuple[UserFunction, Probe]], out: AnyPath | None = None
) -> Iterator[Measurement]:
    """What each probe finds, one after another; `out`: a folder for `NAME.parquet`, the rows, and `NAME.json`, means,
    intervals and seconds. Raises `InputError` where there is no probe."""
    if not probes:
        raise InputError("There is no probe to run: none is named, or none has what it needs here.")
    if len(context.vectors) < FEW:
        note(f"There are only {len(context.vectors)} activations; intervals from fewer than {FEW} say little.")
    for function, one in probes:
        found = Measurement(one, *measure(function, one, context))
        if out and found.rows:
            rows = {"doc_id": context.column("doc_id"), "n_raw_tokens": context.column("n_raw_tokens")} | found.rows
            write_table(pa.table(rows), out / f"{one.name}.parquet")
            facts = found.figures | {"seconds": found.seconds}
            write_atomically(out / f"{one.name}.json", json.dumps(facts, indent=1) + "\n")
        yield found


def activations_of(
    subject: Subject, documents: Sequence[Document], rows: int, max_tokens: int, seed: int
) -> Activations:
    """At most `rows` activations of the first `max_tokens` tokens of some documents, as many of each, at positions that
    are sampled as a run samples them. Raises `InputError` where there are fewer than two."""
    share = -(-rows // len(documents))
    settings = Extract(positions=share, max_tokens=max_tokens, min_position=min(Extract().min_position, max_tokens - 1))
    found = sample_activations(subject, documents, settings, seed)
    if len(found) < 2:
        raise InputError(
            f"The texts give {len(found)} activations (of tokens from position {settings.min_position} on); give longer "
            f"texts, or more of them."
        )
    return found[np.linspace(0, len(found) - 1, min(rows, len(found))).astype(int)]
