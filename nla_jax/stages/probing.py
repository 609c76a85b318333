"""Probes in the RL loop: the figures of `rl.probes` every `rl.probe_every` steps, on documents set aside for them."""

import dataclasses
import hashlib
import math
import time
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from nla_jax.data.corpus import document_of
from nla_jax.data.rows import LABEL, Rows
from nla_jax.models.sharding import parked
from nla_jax.pair import Pair
from nla_jax.probes.probe import Context, Probe, load_probes, run_probe
from nla_jax.runtime.errors import InputError
from nla_jax.runtime.run import Run
from nla_jax.runtime.user_code import UserFunction
from nla_jax.stages.deciding import PREFIX, scorer, tripwires
from nla_jax.stages.evaluate import RunContext

SHARE = 10  # of so many documents of RL one is set aside


class TrainingContext(RunContext):
    """What the probes read in training: the pair as it is, on rows that are set aside.

    `warm` has the AR before RL, beside the AV as it is; `texts("warm")` are those of the AV before RL. Nothing that
    belongs to a step is kept after it."""

    batch = Context.batch  # the state of RL lies on the devices too

    def __post_init__(self):
        super().__post_init__()
        self.said: dict[str, list[str]] = {}

    def enter(self, pair: Pair, warm: Pair, texts: list[str]) -> None:
        """The pair of a step, the warm AR, and what the AV says now."""
        self.pair, self.warm, self.said["rl"] = pair, warm, texts

    def leave(self) -> None:
        """The step is over: its weights are needed no longer."""
        self.pair = self.warm = None
        for kept in ("_reading", "_scores"):
            vars(self).pop(kept, None)

    def texts(self, name: str) -> list[str]:
        """The AV's texts now ("rl") and before RL ("warm"), and the labels, where the rows of RL have some."""
        if name == "labels":
            return [label or "" for label in self.column(LABEL)]
        if name not in self.said:
            raise InputError(f"There are no texts {name!r} in training; there are rl, warm and labels.")
        return self.said[name]


class Probing:
    """The probes of an RL run, which begins with the `pair` of the warm start; `data`: the rows of its split.

    `trained_on`: the numbers of the rows that are left for RL; all of them where `rl.probe_every` is 0. A round costs
    no second copy of the trained weights; the warm AR waits in the memory of the hosts, and lies on the devices during
    a round alone."""

    def __init__(self, run: Run, pair: Pair, data: Rows):
        c = run.config.rl
        self.every, self.steps, self.temperature = c.probe_every, c.steps, c.heldout_temperature
        self.trained_on = np.arange(len(data))
        self.score_of, self.watched = scorer(c.keep_best), tripwires(run.config).names
        if not self.every:
            return
        self.probes = load_probes(c.probes, "rl.probes")
        self.trained_on, aside = set_aside(data.column("doc_id"), c.probe_rows, run.config.seed)
        self.context = TrainingContext(run, Rows(data.vectors[aside], data.shards, aside))
        self.warm = parked(pair.reconstructor_params)
        self.context.said["warm"] = self._explained(dataclasses.replace(pair))  # what it caches ends with it

    def due(self, step: int) -> bool:
        """Whether the pair is probed after so many steps: at the beginning, at the end, and every `rl.probe_every`."""
        return bool(self.every) and (step % self.every == 0 or step == self.steps)

    def measure(self, step: int, pair: Pair) -> dict[str, float]:
        """The figures of the pair after `step` steps, as metrics; {} where no round is due.

        Raises `InputError` where a probe fails, where `rl.keep_best` cannot be computed, and where a tripwire watches what
        is not measured."""
        if not self.due(step):
            return {}
        start = time.monotonic()
        warm = dataclasses.replace(pair, reconstructor_params=self.warm())
        vars(warm)["trunk"] = pair.trunk  # which costs memory: one for both
        self.context.enter(pair, warm, self._explained(pair) if step else self.context.said["warm"])
        found = figures_of(self.probes, self.context)
        if self.score_of and not math.isnan(score := self.score_of(found, step)):
            found["keep_best"] = score
        self.context.leave()
        metrics = {f"{PREFIX}{name}": value for name, value in found.items()}
        if step == 0 and (absent := sorted(self.watched - metrics.keys())):
            name, there = absent[0].removeprefix(PREFIX), ", ".join(sorted(found))
            raise InputError(f"A tripwire of the watchdog is {name!r}, which rl.probes do not give; they give {there}.")
        return metrics | {"seconds_probes": time.monotonic() - start}

    def _explained(self, pair: Pair) -> list[str]:
        context = self.context
        found = pair.explain(context.vectors, context.max_new_tokens, self.temperature, context.seed)
        vars(pair).pop("sampler", None)  # may be a copy of the AV, which nobody needs any more
        return [explanation.accepted or "" for explanation in found]


def figures_of(probes: Sequence[tuple[UserFunction, Probe]], context: Context) -> dict[str, float]:
    """The mean of each score of some probes. One that says nothing of any row is left out."""
    if not np.isfinite(context.recon("rl")).all():  # the AR has broken down
        return {"fve_rl": math.nan}
    found = {}
    for function, probe in probes:
        for name, values in run_probe(function, probe, context).items():
            if not np.isnan(values).all():
                found[f"{probe.name}_{name}" if probe.chart == "curve" else name] = float(np.nanmean(values))
    return found


def set_aside(doc_ids: Sequence[str], count: int, seed: int) -> tuple[Int[np.ndarray, "n"], Int[np.ndarray, "m"]]:
    """The rows of RL that it is trained on, and `count` rows (or all there are) of documents that it never sees.

    Set aside is a tenth of RL's documents, by a hash of their ids, at least two and no more than rows: neither AV nor AR
    is ever trained on them, and `evaluate` does not report them. Raises `InputError` where there are too few."""
    documents = [document_of(id) for id in doc_ids]
    place = lambda id: hashlib.blake2b(f"probes:{seed}:{id}".encode(), digest_size=8).digest()
    known = sorted(set(documents), key=place)
    chosen = set(known[: min(count, max(2, len(known) // SHARE))])
    if len(known) < 3:
        raise InputError(
            f"Split 'rl' has {len(known)} documents with {len(documents)} activations, too few to set some aside for "
            f"rl.probes; take more documents, raise split.rl, or set rl.probe_every to 0."
        )
    held = np.array([document in chosen for document in documents])
    aside = np.flatnonzero(held)
    return np.flatnonzero(~held), aside[np.linspace(0, len(aside) - 1, min(count, len(aside))).astype(int)]
