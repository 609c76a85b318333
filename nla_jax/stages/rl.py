"""The `rl` stage: joint training of the warm-started pair. Read top to bottom."""

import dataclasses
import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from nla_jax.data.batches import rows_of_step
from nla_jax.data.rows import load_rows
from nla_jax.io.hub import fingerprint, locate
from nla_jax.joint_step import JointBatch, TrainState
from nla_jax.models.sharding import RowsOf, cut_batch, place_batch
from nla_jax.pair import Pair
from nla_jax.runtime.distributed import is_writer
from nla_jax.runtime.errors import Stopped
from nla_jax.runtime.run import Run
from nla_jax.stages.deciding import SCORE, best_step, tripwires
from nla_jax.stages.downstream import Downstream
from nla_jax.stages.heldout import Heldout
from nla_jax.stages.loop import Loop, healthy
from nla_jax.stages.probing import Probing
from nla_jax.stages.reading import Reading
from nla_jax.stages.sft import load, save
from nla_jax.study import Study


def rl(run: Run) -> None:
    """Each step samples explanations, reads them on the host, and makes one optimiser step on both models.

    Writes the pair to `{workdir}/pair`: the last one, or the one that is best by `rl.keep_best`; then the last one is in
    `{workdir}/pair_last`, and a tripwire of the watchdog ends training in good order."""
    c, mesh = run.config.rl, run.mesh
    with run.stage("rl") as result:
        if result is None:
            return
        run.require("sft")
        data = load_rows(run.workdir, "rl")
        heldout = Heldout(run)
        pair = load(run, "pair_warm")
        width = pair.prompts.text_width(run.config.prompts.max_new_tokens)
        study = Study(run.config, mesh, pair.verbalizer, pair.reconstructor, width)
        base = {"warm_av": fingerprint(run.workdir / "pair_warm/av")}
        if pair.base:
            base["subject"] = fingerprint(locate(run.subject_folder))

        with Loop(run, "rl", "rl", c.steps, base, healthy(run), tripwires(run.config)) as loop:
            loop.phases.enter("evaluation")
            probing = Probing(run, pair, data)
            frozen, to_decoding = study.frozen(pair.verbalizer_params, pair.base), study.decoding(pair.base)
            warm = pair.verbalizer_params, pair.reconstructor_params
            state = loop.resume(study.abstract_state(), lambda: study.init(*warm), warm)
            if not loop.log.records and (metrics := probing.measure(0, trained(pair, state))):
                loop.record(0, metrics)
            keep_best(loop)
            if tripped(loop):
                loop.total = loop.start
            reading = Reading(study, pair, data)
            downstream = Downstream(study, heldout.context.subject, data, pair.trunk) if c.subject_kl else None
            for i in loop.steps():
                rows = probing.trained_on[rows_of_step(len(probing.trained_on), c.activations, i, run.config.seed)]
                batch = sampled(loop, reading, to_decoding, state, rows, i)
                if downstream:
                    batch = downstream(batch, rows, state.models["reconstructor"].params)

                loop.phases.enter("train step")
                state, metrics, samples = study.joint_program(state, frozen, batch)
                metrics = jax.device_get(metrics)

                loop.phases.enter("evaluation")
                metrics |= seconds_of(loop, c.activations * c.group) | {"texts_cut": reading.cut_share()}
                if (i + 1) % c.heldout_every == 0 or i + 1 == c.steps:
                    metrics |= heldout.measure(trained(pair, state))
                metrics |= probing.measure(i + 1, trained(pair, state))
                loop.log.write_texts(i + 1, reading.examples(samples, run.config.log.texts))
                record(loop, i + 1, metrics)
                best = SCORE in metrics and keep_best(loop, i + 1) == i + 1
                loop.end_step(i + 1, state, best, fve=float(metrics["fve"]), reward=float(metrics["reward"]))
            records = [record for record in loop.log.records if record["step"]]
            result |= finish(loop, study, pair, state)
        gaps = [record["logprob_gap_max"] for record in records if record["logprob_gap_max"] is not None]
        result["skipped"] = sum(bool(record["skipped"]) for record in records)
        result["logprob_gap_max"] = max(gaps, default=None)


def sampled(
    loop: Loop, reading: Reading, to_decoding: Callable[[dict], dict], state: TrainState, rows: np.ndarray, step: int
) -> JointBatch:
    """The batch of a step: explanations of the `rows` of the data, sampled and read.

    The sampler's parameters, a whole copy of the AV, end with it: the optimiser step has no room for them."""
    study, data = reading.study, reading.data
    loop.phases.enter("rollout")
    chunks = np.split(rows, study.config.rl.rollout_chunks)
    vectors = [place_batch(study.mesh, RowsOf(data.vectors, chunk)) for chunk in chunks]
    key = jax.random.fold_in(jax.random.key(study.config.seed), step)
    pieces = study.sample(to_decoding(state.models["verbalizer"].params), vectors, key)
    batches = []
    for chunk, part, piece in zip(chunks, vectors, pieces):  # one is read while the next is sampled
        loop.phases.enter("rollout")
        jax.block_until_ready(piece)
        loop.phases.enter("reading texts")
        batches.append(reading.read(part, piece, chunk, step))
    return joined(batches)


def keep_best(loop: Loop, now: int = 0) -> int | None:
    """The step that is best by `rl.keep_best` so far, whose checkpoint is kept from now on; None where none is asked
    for. Its pair is there: that of the warm start, of the step under way (`now`), or of a checkpoint. With tripwires none
    is best after the last step at which they held."""
    held = loop.watchdog.held if loop.watchdog.tripwires.names else loop.total
    there = lambda step: step <= held and (step in (0, now) or loop.checkpoints.has(step))
    if (best := best_step(loop.log.records, there)) is not None:
        loop.checkpoints.mark_best(best)
    return best


def record(loop: Loop, step: int, metrics: dict) -> None:
    """Logs the metrics of a step. Raises `Stopped` where they show trouble, but for a tripwire that ends training in good
    order."""
    try:
        loop.record(step, metrics)
    except Stopped:
        if not tripped(loop):
            raise
        loop.total = step


def tripped(loop: Loop) -> bool:
    """Whether a tripwire has tripped and `rl.keep_best` says which pair is kept then."""
    return bool(loop.watchdog.tripped and loop.run.config.rl.keep_best)


def finish(loop: Loop, study: Study, pair: Pair, state: TrainState) -> dict:
    """Writes the pair of the run; returns what the stage reports of how it went. The state is not needed any more."""
    run, last, best = loop.run, trained(pair, state), keep_best(loop)
    seconds = [record["seconds_probes"] for record in loop.log.records if "seconds_probes" in record]
    found = {"steps": loop.total} | ({"seconds_probes": round(sum(seconds), 2)} if seconds else {})
    if loop.watchdog.tripped:
        found["ended"] = f"RL ended after step {loop.total} of {run.config.rl.steps}: {loop.watchdog.tripped}"
    if best is not None:
        save(run, last, "pair_last")
        kept = last if best == loop.total else earlier(loop, study, pair, state, best)
        facts = kept.sidecar.provenance | {"rl_step": best}
        last = dataclasses.replace(kept, sidecar=dataclasses.replace(kept.sidecar, provenance=facts))
        found["kept_step"] = best
    save(run, last, "pair")
    if is_writer() and "ended" in found:
        print(f"rl: {found['ended']}", file=sys.stderr)
    if is_writer() and seconds:
        said = f"rl: {len(seconds)} rounds of probes took {sum(seconds):.1f} seconds"
        which = f"; pair is that of step {best}, the best by rl.keep_best, and pair_last that of the last step"
        print(f"{said}{'' if best is None else which}.", file=sys.stderr)
    return found


def earlier(loop: Loop, study: Study, pair: Pair, state: TrainState, step: int) -> Pair:
    """The pair after an earlier step. The state, which is not needed any more, makes room for it."""
    jax.tree.map(lambda x: x.delete(), state)
    if step == 0:
        return load(loop.run, "pair_warm")
    return trained(pair, loop.checkpoints.read(step, study.abstract_state()))


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
