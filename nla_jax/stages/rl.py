"""The `rl` stage: joint training of the warm-started pair. Read top to bottom."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from nla_jax.config import Config
from nla_jax.data.batches import rows_of_step
from nla_jax.data.rows import load_rows, spread
from nla_jax.fve import fve
from nla_jax.io.hub import fingerprint, locate
from nla_jax.joint_step import JointBatch, TrainState
from nla_jax.models.sharding import RowsOf, cut_batch, place_batch
from nla_jax.pair import Pair
from nla_jax.runtime.run import Run
from nla_jax.stages.loop import Loop, healthy
from nla_jax.stages.reading import Reading
from nla_jax.stages.sft import load, save
from nla_jax.study import Study


def rl(run: Run) -> None:
    """Each step samples explanations, reads them on the host, and makes one optimiser step on both models.

    Writes the pair to `{workdir}/pair`."""
    c, mesh = run.config.rl, run.mesh
    with run.stage("rl") as result:
        if result is None:
            return
        run.require("sft")
        data = load_rows(run.workdir, "rl")
        heldout = spread(load_rows(run.workdir, "heldout"), c.heldout_rows).vectors
        pair = load(run, "pair_warm")
        width = pair.prompts.text_width(run.config.prompts.max_new_tokens)
        study = Study(run.config, mesh, pair.verbalizer, pair.reconstructor, width)
        base = {"warm_av": fingerprint(run.workdir / "pair_warm/av")}
        if pair.base:
            base["subject"] = fingerprint(locate(run.subject_folder))

        with Loop(run, "rl", "rl", c.steps, base, healthy(run)) as loop:
            frozen, to_decoding = study.frozen(pair.verbalizer_params, pair.base), study.decoding(pair.base)
            warm = pair.verbalizer_params, pair.reconstructor_params
            state = loop.resume(study.abstract_state(), lambda: study.init(*warm), warm)
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
                metrics |= seconds_of(loop, c.activations * c.group) | {"texts_cut": reading.cut_share()}
                if (i + 1) % c.heldout_every == 0 or i + 1 == c.steps:
                    metrics["heldout_fve"] = heldout_fve(run.config, trained(pair, state), heldout)
                loop.log.write_texts(i + 1, reading.examples(samples, run.config.log.texts))
                loop.record(i + 1, metrics)
                loop.end_step(i + 1, state, fve=float(metrics["fve"]), reward=float(metrics["reward"]))
        save(run, trained(pair, state), "pair")
        gaps = [record["logprob_gap_max"] for record in loop.log.records if record["logprob_gap_max"] is not None]
        result["steps"] = c.steps
        result["skipped"] = sum(bool(record["skipped"]) for record in loop.log.records)
        result["logprob_gap_max"] = max(gaps, default=None)


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


def heldout_fve(config: Config, pair: Pair, vectors: np.ndarray) -> float:
    """FVE of the AV's explanations of held-out activations; NaN where the AR has broken down."""
    limit, temperature = config.prompts.max_new_tokens, config.rl.heldout_temperature
    texts = [found.accepted or "" for found in pair.explain(vectors, limit, temperature)]
    recon = pair.reconstruct(texts)
    return fve(recon, vectors) if np.isfinite(recon).all() else math.nan
