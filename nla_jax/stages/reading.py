"""The host's part of an RL step: from sampled ids to the text that the AR reads, and what is computed from it."""

import jax
import numpy as np

from nla_jax.config import Config
from nla_jax.data.activations import TEXT
from nla_jax.data.batches import pad_tokens
from nla_jax.data.rows import Rows
from nla_jax.joint_step import JointBatch
from nla_jax.labels.labeller import CheckedLabeller, configured_labeller, label_rows
from nla_jax.models.sharding import local_rows, place_local
from nla_jax.objective import TRUTH
from nla_jax.pair import Pair
from nla_jax.probes.claims import has_grammar, truth_of
from nla_jax.runtime.errors import InputError
from nla_jax.runtime.user_code import UserFunction, resolve
from nla_jax.runtime.user_input import is_whole
from nla_jax.sampling import Rollout
from nla_jax.study import Study, compute_features


class Reading:
    """The host's part of a step: from sampled ids to what the AR reads. Each host reads the rows of its own devices.

    Raises `InputError` where `rl.truth` is asked of a labeller without a grammar, or of data without what it reads."""

    def __init__(self, study: Study, pair: Pair, data: Rows):
        self.study, self.prompts, self.data, self.c = study, pair.prompts, data, study.config.rl
        self.reader = resolve(self.c.reader, "rl.reader")
        self.grammar = grammar_of(study.config) if self.c.truth else None
        if self.grammar:
            if not all(data.columns_at(np.arange(1))(TEXT)):
                raise InputError(
                    "rl.truth checks claims against the texts of activations; these activations have none."
                )
            self._truth([""], np.arange(1))  # what a labeller lacks for it is missed before the first step
        self.shown: dict[int, dict] = {}  # texts of the step under way, by their row of the batch
        self.read_rows = 0  # rows of the batch that have been read, on all hosts
        self.cut: list[bool] = []  # of those that this host has read: whether the AR misses their end

    def read(self, vectors: jax.Array, sampled: Rollout, rows: np.ndarray, step: int) -> JointBatch:
        """The batch that a rollout becomes: each explanation extracted, and tokenised again in the AR's template.

        `rows`: which activations of the data `vectors` [A, D] are."""
        (own, tokens), (_, mask), (_, finished) = map(local_rows, (sampled.tokens, sampled.mask, sampled.finished))
        responses = self.prompts.responses(tokens, mask)
        texts = self.prompts.explanations(responses, finished)
        activations = rows[own // self.c.group]
        read = self._as_read([text or "" for text in texts], activations, step)
        ids, lengths = self._inputs(read)
        features = self._features([text or "" for text in texts], activations)
        count, start = len(sampled.finished), self.read_rows
        for i, row, text, response in zip(own, activations, texts, responses):
            self.shown[start + i] = {"row": int(row), "valid": text is not None, "text": text or response}
        self.read_rows += count
        place = lambda x: place_local(sampled.finished.sharding, own, x, count)
        return JointBatch(
            vectors=vectors,
            responses=sampled.tokens,
            response_mask=sampled.mask,
            sampler_logprobs=sampled.logprobs,
            finished=sampled.finished,
            texts=place(ids),
            text_lengths=place(lengths),
            valid=place(np.array([text is not None for text in texts])),
            features={name: place(values) for name, values in features.items()},
        )

    def _features(self, texts: list[str], activations: np.ndarray) -> dict[str, np.ndarray]:
        """What `rl.features` and `rl.truth` say of the texts, `[B]` each."""
        found = {}
        if self.c.features:
            found = compute_features(self.c.features, texts, self.data.records(activations))
        return found | ({TRUTH: self._truth(texts, activations)} if self.grammar else {})

    def _truth(self, texts: list[str], activations: np.ndarray) -> np.ndarray:
        """Of each text the share of its claims that hold for its activation, `[B]`."""
        at, own = np.unique(activations, return_inverse=True)
        rows = label_rows(self.data.columns_at(at))
        with self.grammar.function.blamed():
            return truth_of(self.grammar.labeller, texts, [rows[i] for i in own])

    def _inputs(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """The AR's input. A text whose tokens outnumber the AR's loses its end, which rarely happens: as when the AV
        writes a word in fewer tokens than the tokenizer does."""
        width = self.study.text_width
        rows = self.prompts.reconstructor_ids(texts)
        cut = [len(row) > width for row in rows]
        self.cut += cut
        return self.prompts.reconstructor_batch(texts, width) if any(cut) else pad_tokens(rows, width)

    def cut_share(self) -> float:
        """The share of this host's texts of the step whose end the AR does not read."""
        share, self.cut = sum(self.cut) / max(1, len(self.cut)), []
        return share

    def _as_read(self, texts: list[str], activations: np.ndarray, step: int) -> list[str]:
        """The texts as `rl.reader` lets the AR read them, activation by activation."""
        found, start = [], 0
        for end in [*np.flatnonzero(np.diff(activations)) + 1, len(texts)]:
            rng = np.random.default_rng([self.study.config.seed, step, int(activations[start])])
            found += read_by(self.reader, texts[start:end], rng)
            start = end
        return found

    def examples(self, samples: dict, count: int) -> list[dict]:
        """`count` texts of the step with their scores: the first of each activation, then the second, …"""
        (rows, mse), (_, reward) = (local_rows(samples[name]) for name in ("mse", "reward"))
        scores = {int(row): {"mse": float(m), "reward": float(r)} for row, m, r in zip(rows, mse, reward)}
        known = sorted(self.shown.keys() & scores.keys(), key=lambda row: (row % self.c.group, row))[:count]
        found = [self.shown[row] | scores[row] for row in sorted(known)]
        self.shown, self.read_rows = {}, 0
        return found


def grammar_of(config: Config) -> CheckedLabeller:
    """The run's labeller. Raises `InputError` where it cannot read and check claims, which `rl.truth` asks of it."""
    found = configured_labeller(config.label)
    if not has_grammar(found.labeller):
        raise InputError(
            f"rl.truth checks claims, which {found.function} cannot: it has no methods claims and true. Set rl.truth=False, "
            f"and a rl.reward that does not read it."
        )
    return found


def read_by(reader: UserFunction, texts: list[str], rng: np.random.Generator) -> list[str]:
    """What a reader makes of the texts of one activation. Raises `InputError` where that is not as many texts."""
    read = reader(list(texts), rng)
    if (
        not isinstance(read, list)
        or len(read) != len(texts)
        or not all(isinstance(text, str) and is_whole(text) for text in read)
    ):
        raise InputError(f"{reader} returns {ascii(read):.100}, expected a list of {len(texts)} texts.")
    return read
