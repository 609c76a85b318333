"""The training loops: the supervised warm start, then reinforcement learning. Read top to bottom."""

import dataclasses
import math
import sys
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from nla_jax.data.batches import LengthBatches, pad_tokens, rows_of_step
from nla_jax.data.dataset import load_rows, spread
from nla_jax.fve import fve, normalised
from nla_jax.io.pretrained import fingerprint, load_tokenizer, locate, read_config
from nla_jax.joint_step import (
    Frozen,
    JointBatch,
    JointStep,
    SupervisedStep,
    TextBatch,
    jit_step,
    reconstructor_loss,
    verbalizer_loss,
)
from nla_jax.models.lora import Lora
from nla_jax.models.sharding import (
    TRAIN,
    RowsOf,
    batch_sharding,
    cut_batch,
    local_rows,
    place_batch,
    place_local,
    relayout,
    shardings,
)
from nla_jax.pair import Pair, load_pair, new_pair
from nla_jax.prompts import Prompts, find_marker
from nla_jax.runtime.distributed import is_writer
from nla_jax.runtime.errors import InputError
from nla_jax.runtime.metrics import MetricLog, Progress
from nla_jax.runtime.run import Run, injection, resolve
from nla_jax.runtime.watchdog import Phases, Watchdog
from nla_jax.sampling import Rollout, decoding_layout, rollout, start_all
from nla_jax.sidecar import Sidecar
from nla_jax.stages.supervised import fit, make_optimizer


def sft(run: Run) -> None:
    """The warm start: the AV learns to write the labels from the activations, the AR to rebuild the activations from the
    labels. Writes the pair to `{workdir}/pair_warm`."""
    c = run.config.sft
    with run.stage("sft") as result:
        if result is None:
            return
        run.require("label")
        av_rows, ar_rows = (load_rows(run.workdir, split) for split in ("av_sft", "ar_sft"))
        sidecar = describe_pair(run, av_rows.vectors)
        subject = sidecar.provenance["base_hash"]
        check_source(run, subject)
        pair = new_pair(
            sidecar, locate(run.subject_folder), **run.config.compute,
            av_lora=lora(c.av.lora), ar_lora=lora(c.ar.lora), seed=run.config.seed, mesh=run.mesh,
        )  # fmt: skip
        result["injection_scale"] = sidecar.injection_scale
        av_place, ar_place = run.workdir / "train/sft_av", run.workdir / "train/sft_ar"

        responses = map(pair.prompts.response_ids, av_rows.pieces("api_explanation"))
        tokens, lengths, kept = fixed_width(responses, run.config.prompts.max_new_tokens)
        result["labels_too_long"] = 1 - len(kept) / len(av_rows)
        step = SupervisedStep(verbalizer_loss(pair.verbalizer), make_optimizer(c.av.optimizer, c.av.steps))
        av = fit(
            av_place, "sft av", step, pair.verbalizer_params, pair.verbalizer.abstract_params(), run.mesh,
            text_batches(tokens, lengths, av_rows.vectors, kept, c.av.batch, run.config.seed),
            c.av.steps, run.checkpoints("sft", av_place, subject=subject), run.config.watchdog, base=pair.base,
        )  # fmt: skip

        width = reconstructor_width(pair.prompts, run.config.prompts.max_new_tokens)
        batches = [pair.prompts.reconstructor_batch(labels, width) for labels in ar_rows.pieces("api_explanation")]
        ar_tokens, ar_lengths = map(np.concatenate, zip(*batches))
        every = np.arange(len(ar_rows))
        step = SupervisedStep(reconstructor_loss(pair.reconstructor), make_optimizer(c.ar.optimizer, c.ar.steps))
        ar = fit(
            ar_place, "sft ar", step, pair.reconstructor_params, pair.reconstructor.abstract_params(),
            run.mesh, text_batches(ar_tokens, ar_lengths, ar_rows.vectors, every, c.ar.batch, run.config.seed),
            c.ar.steps, run.checkpoints("sft", ar_place, subject=subject), run.config.watchdog, base=pair.base,
        )  # fmt: skip

        dataclasses.replace(pair, verbalizer_params=av, reconstructor_params=ar).save(run.workdir / "pair_warm")


def lora(settings: ConfigDict) -> Lora | None:
    """The adapter that a config asks for; None (the whole model is trained) where its rank is 0."""
    return Lora(settings.rank, settings.alpha, settings.rslora, tuple(settings.targets)) if settings.rank else None


def describe_pair(run: Run, vectors: np.ndarray) -> Sidecar:
    """The sidecar of the pair that a run is about to train; `vectors` are its training activations, whose mean norm is the
    injection scale where the config sets none, and whose variance makes an FVE of a single activation meaningful."""
    c, folder = run.config.prompts, locate(run.subject_folder)
    if (slots := c.verbalizer_template.count("{injection_char}")) != 1:
        raise InputError(
            f"prompts.verbalizer_template holds {{injection_char}} {slots} times; training shows one activation, at one place."
        )
    norm, variance = norm_and_variance(vectors)
    tokenizer = load_tokenizer(folder)
    marker = find_marker(tokenizer, c.verbalizer_template, c.marker)
    prompts = Prompts(tokenizer, marker, c.verbalizer_template, c.reconstructor_template)
    return Sidecar(
        base_checkpoint=str(run.subject_folder),
        d_model=read_config(folder).width,
        layer=run.config.subject.layer,
        injection_scale=c.injection_scale or norm,
        marker=marker,
        verbalizer_template=c.verbalizer_template,
        reconstructor_template=c.reconstructor_template,
        suffix_ids=tuple(prompts.suffix_ids()),
        injection=injection(run.config),
        provenance={
            "base_hash": fingerprint(folder),
            "activation_variance": variance,
        },
    )


def check_source(run: Run, subject: str) -> None:
    """Says where the data were made for another prompt than this pair is trained with. Raises `InputError` where they come from
    another subject than the one with the hash `subject`."""
    made = run.require("extract")
    if subject != made["base_hash"]:
        raise InputError(
            f"The subject {run.subject_folder} has changed since its activations were extracted (hash {made['base_hash']} then, "
            f"{subject} now); put the old one back, or use another --workdir."
        )
    for role, field in (("av", "verbalizer_template"), ("ar", "reconstructor_template")):
        template = made.get("templates", {}).get(role)
        if template not in (None, run.config.prompts[field]) and is_writer():
            print(
                f"sft: extract.source.{role}_sft was made for the prompt {template!r}; this pair is trained with "
                f"prompts.{field} = {run.config.prompts[field]!r}.",
                file=sys.stderr,
            )


def norm_and_variance(vectors: np.ndarray, chunk: int = 1024) -> tuple[float, float]:
    """The mean norm of `vectors [n, d]`, and the mean variance of their normalised entries, without a second copy of them."""
    norms, total, squares = [], 0.0, 0.0
    for start in range(0, len(vectors), chunk):
        part = vectors[start : start + chunk]
        norms.append(np.linalg.norm(part, axis=1))
        unit = normalised(part)
        total, squares = total + unit.sum(0), squares + (unit**2).sum(0)
    return float(np.concatenate(norms).mean()), float((squares / len(vectors) - (total / len(vectors)) ** 2).mean())


def fixed_width(pieces: Iterable[list[list[int]]], width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows of at most `width` ids, padded to one shape, with their lengths and which rows they are; longer ones, which the
    AV could never finish, are left out. Raises `InputError` where that is most of them."""
    padded, lengths = [], []
    for rows in pieces:
        lengths.append(np.array([len(row) for row in rows], np.int32))
        padded.append(pad_tokens([row[:width] for row in rows], width)[0])
    lengths = np.concatenate(lengths)
    kept = np.flatnonzero(lengths <= width)
    if 2 * len(kept) < len(lengths):
        raise InputError(
            f"{len(lengths) - len(kept)} of {len(lengths)} labels need more than prompts.max_new_tokens = {width} tokens; raise "
            f"it, or write shorter labels."
        )
    lengths = lengths[kept]
    return np.concatenate(padded)[kept, : -(-lengths.max() // 8) * 8], lengths, kept


def text_batches(tokens, lengths, vectors, kept, batch: int, seed: int) -> Callable[[int], TextBatch]:
    """The batch of each step, of rows of similar length; `kept` says which of the `vectors` the rows of `tokens` belong to."""
    batches = LengthBatches(lengths, batch, seed)

    def of_step(step: int) -> TextBatch:
        rows = batches.rows(step)
        return TextBatch(tokens[rows, : batches.width(rows)], lengths[rows], RowsOf(vectors, kept[rows]))

    return of_step


def reconstructor_width(prompts: Prompts, max_new_tokens: int) -> int:
    """The length of AR inputs: the template around a text of as many tokens as the AV may write, a multiple of 8."""
    return -(-(len(prompts.reconstructor_ids([""])[0]) + max_new_tokens) // 8) * 8


def rl(run: Run) -> None:
    """Joint training of the warm-started pair: each step samples explanations, reads them on the host, and makes one
    optimiser step on both models. Writes the pair to `{workdir}/pair`."""
    c, limit = run.config.rl, run.config.prompts.max_new_tokens
    with run.stage("rl") as result:
        if result is None:
            return
        run.require("sft")
        data = load_rows(run.workdir, "rl")
        heldout = spread(load_rows(run.workdir, "heldout"), c.heldout_rows).vectors
        mesh = run.mesh
        pair = load_pair(run.workdir / "pair_warm", **run.config.compute, injection=injection(run.config), mesh=mesh)
        width = reconstructor_width(pair.prompts, limit)

        # The step, and where its state lives: shardings come from shapes, before any array exists.
        joint = JointStep(
            pair.verbalizer,
            pair.reconstructor,
            make_optimizer(c.av_optimizer, c.steps),
            make_optimizer(c.ar_optimizer, c.steps),
            reward=resolve(c.reward),
            advantage=resolve(c.advantage),
            kl_coefficient=c.kl_coefficient,
            temperature=c.temperature,
            micro_batches=c.micro_batches,
        )
        boxed = pair.verbalizer.abstract_params(), pair.reconstructor.abstract_params()
        layout = shardings(mesh, jax.eval_shape(joint.init, jax.random.key(0), *boxed))
        place = run.workdir / "train/rl"
        base = {"warm_av": fingerprint(run.workdir / "pair_warm/av")}
        if pair.base:
            base["subject"] = fingerprint(locate(run.subject_folder))
        checkpoints = run.checkpoints("rl", place, **base)
        phases = Phases("rl", run.config.watchdog.stall_minutes)
        with jax.set_mesh(mesh), checkpoints, phases:
            to_training = relayout(mesh, boxed[0], run.config.compute.dtype, TRAIN)
            to_decoding = decoding_layout(mesh, pair.verbalizer, pair.base)
            frozen = Frozen(to_training(pair.verbalizer_params), pair.base)
            init = jax.jit(joint.init, out_shardings=layout, donate_argnums=(1, 2))
            train = jit_step(joint, mesh)

            # Resume where the newest checkpoint stands; build a new state only if there is none.
            rng, warm = jax.random.key(run.config.seed), (pair.verbalizer_params, pair.reconstructor_params)
            if (found := checkpoints.restore(init.eval_shape(rng, *warm), c.steps, discard=warm)) is None:
                found = 0, init(rng, *jax.device_put(warm, (layout.verbalizer, layout.reconstructor)))
            start, state = found
            log, progress = MetricLog(place, start), Progress("rl", c.steps, start)
            watchdog = Watchdog(checkpoints, run.config.watchdog.window, limits(run), log.records)

            for i in range(start, c.steps):
                phases.enter("waiting for data", i + 1)
                rows = rows_of_step(len(data), c.activations, i, run.config.seed)
                vectors = [place_batch(mesh, RowsOf(data.vectors, part)) for part in np.split(rows, c.rollout_chunks)]

                phases.enter("rollout")
                sampler = to_decoding(state.verbalizer)
                key = jax.random.fold_in(state.rng, i)
                sample = lambda j: along_batch(mesh, rollout(
                    pair.verbalizer, sampler, vectors[j], key, j * len(vectors[j]) * c.group,
                    group=c.group, max_new_tokens=limit, temperature=c.temperature, top_k=c.top_k, top_p=c.top_p,
                ))  # fmt: skip
                batches = []
                # The host reads one chunk while the devices sample the next.
                for part, piece in zip(vectors, start_all(mesh, sample, len(vectors))):
                    phases.enter("rollout")
                    jax.block_until_ready(piece)
                    phases.enter("reading texts")
                    batches.append(read(pair, part, piece, width))
                del sampler  # a whole copy of the AV, which the step below has no room for
                batch = joined(batches)

                phases.enter("train step")
                state, metrics = train(state, frozen, batch)
                metrics = jax.device_get(metrics)

                phases.enter("evaluation")
                seconds = [phases.seconds[name] for name in ("rollout", "reading texts", "train step")]
                metrics |= dict(zip(("seconds_rollout", "seconds_host", "seconds_train"), seconds))
                metrics["samples_per_second"] = c.activations * c.group / sum(seconds)
                if (i + 1) % c.heldout_every == 0 or i + 1 == c.steps:
                    metrics["heldout_fve"] = heldout_fve(
                        trained(pair, state), heldout, limit, run.config.evaluate.temperature, to_decoding
                    )
                watchdog.observe(log.write(i + 1, metrics))
                progress.update(fve=float(metrics["fve"]), reward=float(metrics["reward"]))
                phases.enter("checkpoint")
                checkpoints.save(i + 1, state, force=i + 1 == c.steps, before=log.flush)
            progress.close()
            log.close()
        trained(pair, state).save(run.workdir / "pair")
        gaps = [record["logprob_gap_max"] for record in log.records if record["logprob_gap_max"] is not None]
        result["steps"] = c.steps
        result["skipped"] = sum(bool(record["skipped"]) for record in log.records)
        result["logprob_gap_max"] = max(gaps, default=None)


def limits(run: Run) -> dict[str, tuple[float, float]]:
    """The lowest and highest healthy values of RL metrics, from the config."""
    c = run.config.watchdog
    return {
        "extraction_rate": (c.min_extraction_rate, math.inf),
        "entropy": (c.min_entropy, math.inf),
        "length": (c.min_length, c.max_length_share * run.config.prompts.max_new_tokens),
        "identical_texts": (-math.inf, c.max_identical_texts),
    }


def along_batch(mesh: Mesh, sampled: Rollout) -> Rollout:
    """A rollout cut over the devices as training cuts a batch."""
    return jax.device_put(sampled, jax.tree.map(lambda x: batch_sharding(mesh, x.shape), sampled))


def read(pair: Pair, vectors: jax.Array, sampled: Rollout, width: int) -> JointBatch:
    """The batch that a rollout becomes once its text is read: the explanation extracted from each response and tokenised anew
    in the AR's template. Each host reads the rows that its own devices hold."""
    (rows, tokens), (_, mask), (_, finished) = map(local_rows, (sampled.tokens, sampled.mask, sampled.finished))
    texts = pair.prompts.read_responses(tokens, mask, finished)
    ids, lengths = pair.prompts.reconstructor_batch([text or "" for text in texts], width)
    place = lambda x: place_local(sampled.finished.sharding, rows, x, len(sampled.finished))
    return JointBatch(
        vectors=vectors, responses=sampled.tokens, response_mask=sampled.mask, sampler_logprobs=sampled.logprobs,
        texts=place(ids), text_lengths=place(lengths), valid=place(np.array([text is not None for text in texts])),
    )  # fmt: skip


@jax.jit
def joined(batches: list[JointBatch]) -> JointBatch:
    """The pieces of a batch as one."""
    return jax.tree.map(lambda *x: cut_batch(jnp.concatenate(x)), *batches)


def trained(pair: Pair, state) -> Pair:
    """The pair with the parameters of a training state."""
    return dataclasses.replace(pair, verbalizer_params=state.verbalizer, reconstructor_params=state.reconstructor)


def heldout_fve(
    pair: Pair, vectors: np.ndarray, max_new_tokens: int, temperature: float, to_decoding: Callable[[dict], dict]
) -> float:
    """FVE of the AV's explanations of held-out activations."""
    texts = pair.verbalize(vectors, max_new_tokens, temperature, sampler=pair.sampler(to_decoding))
    return fve(pair.reconstruct(texts), vectors)
