"""The `rl` stage: joint training of the warm-started pair. Read top to bottom."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from nla_jax.data.batches import rows_of_step
from nla_jax.data.rows import Rows, load_rows, spread
from nla_jax.fve import fve
from nla_jax.io.pretrained import fingerprint, locate
from nla_jax.joint_step import JointBatch, TrainState
from nla_jax.models.sharding import RowsOf, cut_batch, local_rows, place_batch, place_local
from nla_jax.pair import Pair, load_pair
from nla_jax.runtime.errors import InputError
from nla_jax.runtime.run import Run
from nla_jax.runtime.user_code import resolve
from nla_jax.sampling import Rollout
from nla_jax.stages.loop import Loop, healthy
from nla_jax.stages.sft import save
from nla_jax.study import Study, compute_features, injections


def rl(run: Run) -> None:
    """Each step samples explanations, reads them on the host, and makes one optimiser step on both models.

    Writes the pair to `{workdir}/pair`."""
    c, mesh, compute = run.config.rl, run.mesh, run.config.compute
    with run.stage("rl") as result:
        if result is None:
            return
        run.require("sft")
        data = load_rows(run.workdir, "rl")
        heldout = spread(load_rows(run.workdir, "heldout"), c.heldout_rows).vectors
        pair = load_pair(
            run.workdir / "pair_warm", None, compute.dtype, compute.remat, compute.attention,
            injections=injections(run.config), mesh=mesh,
        )  # fmt: skip
        width = pair.prompts.text_width(run.config.prompts.max_new_tokens)
        study = Study(run.config, mesh, pair.verbalizer, pair.reconstructor, width)
        base = {"warm_av": fingerprint(run.workdir / "pair_warm/av")}
        if pair.base:
            base["subject"] = fingerprint(locate(run.subject_folder))

        with Loop(run, "rl", "rl", c.steps, base, healthy(run)) as loop:
            frozen, to_decoding = study.frozen(pair.verbalizer_params, pair.base), study.decoding(pair.base)
            state = loop.resume(lambda: study.init(pair.verbalizer_params, pair.reconstructor_params))
            reading = Reading(study, pair, data)
            for i in loop.steps():
                rows = rows_of_step(len(data), c.activations, i, run.config.seed)
                chunks = np.split(rows, c.rollout_chunks)
                vectors = [place_batch(mesh, RowsOf(data.vectors, chunk)) for chunk in chunks]

                loop.phases.enter("rollout")
                sampler = to_decoding(state.models["verbalizer"].params)
                pieces = study.sample(sampler, vectors, jax.random.fold_in(jax.random.key(run.config.seed), i))
                batches = []
                for chunk, part, piece in zip(chunks, vectors, pieces):  # one is read while the next is sampled
                    loop.phases.enter("rollout")
                    jax.block_until_ready(piece)
                    loop.phases.enter("reading texts")
                    batches.append(reading.read(part, piece, chunk, i))
                del sampler  # a whole copy of the AV, for which the step below has no room
                batch = joined(batches)

                loop.phases.enter("train step")
                state, metrics, samples = study.joint_program(state, frozen, batch)
                metrics = jax.device_get(metrics)

                loop.phases.enter("evaluation")
                metrics |= seconds_of(loop, c.activations * c.group)
                if (i + 1) % c.heldout_every == 0 or i + 1 == c.steps:
                    metrics["heldout_fve"] = heldout_fve(run, trained(pair, state), heldout)
                loop.log.write_texts(i + 1, reading.examples(samples, run.config.log.texts))
                loop.record(i + 1, metrics)
                loop.end_step(i + 1, state, fve=float(metrics["fve"]), reward=float(metrics["reward"]))
        save(run, trained(pair, state), "pair")
        gaps = [record["logprob_gap_max"] for record in loop.log.records if record["logprob_gap_max"] is not None]
        result["steps"] = c.steps
        result["skipped"] = sum(bool(record["skipped"]) for record in loop.log.records)
        result["logprob_gap_max"] = max(gaps, default=None)


class Reading:
    """The host's part of a step: from sampled ids to what the AR reads. Each host reads the rows of its own devices."""

    def __init__(self, study: Study, pair: Pair, data: Rows):
        self.study, self.prompts, self.data, self.c = study, pair.prompts, data, study.config.rl
        self.reader = resolve(self.c.reader, "rl.reader")
        self.shown: dict[int, dict] = {}  # texts of the step under way, by their row of the batch
        self.read_rows = 0  # rows of the batch that have been read, on all hosts

    def read(self, vectors: jax.Array, sampled: Rollout, rows: np.ndarray, step: int) -> JointBatch:
        """The batch that a rollout becomes: each explanation extracted, and tokenised anew in the AR's template.

        `rows`: which activations of the data `vectors` [A, D] are."""
        (own, tokens), (_, mask), (_, finished) = map(local_rows, (sampled.tokens, sampled.mask, sampled.finished))
        texts = self.prompts.read_responses(tokens, mask, finished)
        activations = rows[own // self.c.group]
        read = self._as_read([text or "" for text in texts], activations, step)
        ids, lengths = self.prompts.reconstructor_batch(read, self.study.text_width)
        features = {}
        if self.c.features:
            records = self.data.records(activations)
            features = compute_features(self.c.features, [text or "" for text in texts], records)
        count, start = len(sampled.finished), self.read_rows
        self.shown |= {start + i: {"row": int(row), "text": text} for i, row, text in zip(own, activations, texts)}
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

    def _as_read(self, texts: list[str], activations: np.ndarray, step: int) -> list[str]:
        """The texts as `rl.reader` lets the AR read them, activation by activation."""
        found, start = [], 0
        for end in [*np.flatnonzero(np.diff(activations)) + 1, len(texts)]:
            rng = np.random.default_rng([self.study.config.seed, step, int(activations[start])])
            group = texts[start:end]
            read = self.reader(group, rng)
            if not isinstance(read, list) or len(read) != len(group) or not all(isinstance(x, str) for x in read):
                raise InputError(f"{self.reader} must return a list of {len(group)} texts for as many; found {read!r}.")
            found += read
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


@jax.jit
def joined(batches: list[JointBatch]) -> JointBatch:
    """The pieces of a batch as one."""
    return jax.tree.map(lambda *x: cut_batch(jnp.concatenate(x)), *batches)


def trained(pair: Pair, state: TrainState) -> Pair:
    """The pair with the parameters of a training state."""
    av, ar = (state.models[name].params for name in ("verbalizer", "reconstructor"))
    return dataclasses.replace(pair, verbalizer_params=av, reconstructor_params=ar)


def seconds_of(loop: Loop, samples: int) -> dict[str, float]:
    """What the phases of the step took, and its throughput."""
    phases = {"rollout": "rollout", "host": "reading texts", "train": "train step"}
    seconds = {f"seconds_{name}": loop.phases.seconds[phase] for name, phase in phases.items()}
    return seconds | {"samples_per_second": samples / sum(seconds.values())}


def heldout_fve(run: Run, pair: Pair, vectors: np.ndarray) -> float:
    """FVE of the AV's explanations of held-out activations."""
    limit, temperature = run.config.prompts.max_new_tokens, run.config.rl.heldout_temperature
    return fve(pair.reconstruct(pair.verbalize(vectors, limit, temperature)), vectors)
