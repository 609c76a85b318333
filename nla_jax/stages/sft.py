"""The `sft` stage: the supervised warm start of AV and AR, and the loop that it shares with pretraining."""

import dataclasses
import functools
import sys
import time
from collections.abc import Callable, Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Int

from nla_jax.autoencoder import PromptIds
from nla_jax.data.activations import median_norm_and_variance
from nla_jax.data.batches import TextBatch, pad_tokens, text_batches
from nla_jax.data.rows import LABEL, Rows, load_rows
from nla_jax.io.conventions import Conventions
from nla_jax.io.files import fits_seal, local, replacing
from nla_jax.io.folders import load_tokenizer, read_config
from nla_jax.io.hub import fingerprint, locate
from nla_jax.io.safetensors import check_bytes
from nla_jax.joint_step import SupervisedStep
from nla_jax.models.sharding import place_batch, placed, state_shapes
from nla_jax.pair import Pair, Training, load_pair, new_pair
from nla_jax.prompts import Prompts, find_marker
from nla_jax.runtime.compiler import first_state, jit_step
from nla_jax.runtime.distributed import barrier, from_writer, is_writer
from nla_jax.runtime.errors import InputError
from nla_jax.runtime.run import Run
from nla_jax.runtime.user_code import UserFunction, resolve
from nla_jax.sidecar import FILE, Sidecar
from nla_jax.stages.check import check_templates
from nla_jax.stages.loop import Loop
from nla_jax.stages.reading import read_by
from nla_jax.study import Study, injections, lora

LOG_EVERY = 20  # steps between records of a supervised loop


def sft(run: Run) -> None:
    """The AV learns to write the labels from the activations, the AR to rebuild the activations from the labels.

    Writes the pair to `{workdir}/pair_warm`."""
    c, limit, dtype = run.config.sft, run.config.prompts.max_new_tokens, run.config.compute.dtype
    with run.stage("sft") as result:
        if result is None:
            return
        run.require("label")
        av_rows, ar_rows = (load_rows(run.workdir, split) for split in ("av_sft", "ar_sft"))
        sidecar = describe_pair(run, av_rows)
        subject = {"subject": sidecar.provenance["base_hash"]}
        check_source(run, subject["subject"])
        compute = run.config.compute
        pair = new_pair(
            sidecar,
            locate(run.subject_folder),
            compute.dtype,
            compute.remat,
            compute.attention,
            adapters=(lora(c.av.lora), lora(c.ar.lora)),
            seed=run.config.seed,
            mesh=run.mesh,
        )
        study = Study(run.config, run.mesh, pair.verbalizer, pair.reconstructor, pair.prompts.text_width(limit))
        result["injection_scale"] = sidecar.injection_scale

        there = labelled(av_rows, "av_sft")
        tokens, lengths, kept = fixed_width(map(pair.prompts.response_ids, labels_of(av_rows)), limit)
        result["labels_too_long"] = say_dropped(len(there) - len(kept), len(there), limit)
        kept = there[kept]
        batches = text_batches(tokens, lengths, av_rows.vectors, kept, c.av.batch, run.config.seed, c.widths)
        with Loop(run, "sft", "sft_av", c.av.steps, subject) as loop:
            av = fit(loop, study.sft_av, pair.verbalizer_params, study.boxed[0], batches, pair.base, dtype)

        there = labelled(ar_rows, "ar_sft")
        read = functools.partial(read_labels, resolve(c.reader, "sft.reader"), run.config.seed)
        inputs = [pair.prompts.reconstructor_batch(read(labels), study.text_width) for labels in labels_of(ar_rows)]
        tokens, lengths = map(np.concatenate, zip(*inputs))
        batches = text_batches(tokens, lengths, ar_rows.vectors, there, c.ar.batch, run.config.seed, c.widths)
        with Loop(run, "sft", "sft_ar", c.ar.steps, subject) as loop:
            ar = fit(loop, study.sft_ar, pair.reconstructor_params, study.boxed[1], batches, pair.base, dtype)

        save(run, dataclasses.replace(pair, verbalizer_params=av, reconstructor_params=ar), "pair_warm")


def labelled(rows: Rows, split: str) -> Int[np.ndarray, "n"]:
    """The numbers of the rows that have a label. Raises `InputError` where none has."""
    if not len(there := rows.labelled()):
        raise InputError(f"None of the {len(rows)} rows of {split} has a label; label them by another labeller.")
    return there


def labels_of(rows: Rows) -> Iterator[list[str]]:
    """The labels of the rows that have one, a shard at a time."""
    return ([label for label in labels if label is not None] for labels in rows.pieces(LABEL))


def read_labels(reader: UserFunction, seed: int, labels: list[str]) -> list[str]:
    """The labels of a shard as `sft.reader` lets the AR read them: each is the only text of its activation."""
    rngs = map(np.random.default_rng, ([seed, i] for i in range(len(labels))))
    return [text for label, rng in zip(labels, rngs) for text in read_by(reader, [label], rng)]


def say_dropped(dropped: int, count: int, limit: int) -> float:
    """Says on standard error how many of `count` labels the AV is not trained on; returns their share."""
    if dropped and is_writer():
        print(
            f"sft: {dropped} of {count} labels ({100 * dropped / count:.1f} %) need more than prompts.max_new_tokens = {limit} "
            f"tokens; the AV is not trained on them.",
            file=sys.stderr,
        )
    return dropped / count


def fit(
    loop: Loop,
    step: SupervisedStep,
    params: dict,
    abstract: dict,
    batch_of_step: Callable[[int], TextBatch],
    base: dict | None = None,
    dtype: DTypeLike = jnp.float32,
) -> dict:
    """Trains `params` (which are consumed) and returns them, sharded; continues from the newest checkpoint.

    `abstract`: the shapes of `params` with logical axis names. `batch_of_step(i)` is a pure function, so that a resumed
    run sees the batches it would have seen. `base`: the frozen model beneath an adapter. `dtype`: what the step computes
    in. Raises `Stopped` on SIGTERM, and where the loss stays NaN."""
    mesh, boxed = loop.run.mesh, state_shapes(step.init, abstract)
    state = loop.resume(placed(mesh, boxed), lambda: first_state(step, mesh, abstract, params), params)
    train, clock = jit_step(step, mesh, loop.run.config.compute.optimize, loop.total, dtype), time.monotonic()
    for i in loop.steps():
        batch = place_batch(mesh, batch_of_step(i))
        loop.phases.enter("train step")
        state, metrics = train(state, batch, base)
        shown = {}
        if (i + 1) % LOG_EVERY == 0 or i + 1 == loop.total:
            values = jax.device_get(metrics)
            clock, before = time.monotonic(), clock
            loop.record(i + 1, values | {"seconds": clock - before})
            shown = {"loss": float(values["loss"])}
        loop.end_step(i + 1, state, **shown)
    return state.models[step.name].params


def save(run: Run, pair: Pair, name: str) -> None:
    """Writes a pair to `{workdir}/{name}`."""
    with jax.set_mesh(run.mesh):
        pair.save(run.workdir / name, overwrite=True)


def load(run: Run, name: str) -> Pair:
    """Reads the pair in `{workdir}/{name}` with the run's injections, onto its mesh. Raises `InputError` where its
    weights are damaged."""
    c = run.config.compute
    from_writer(lambda: check_bytes(*(local(run.workdir / name / role) for role in ("av", "ar"))))
    how = {"dtype": c.dtype, "attention": c.attention, "training": Training(c.remat)}
    return load_pair(
        run.workdir / name, conventions=Conventions(injections=injections(run.config)), mesh=run.mesh, **how
    )


def describe_pair(run: Run, rows: Rows) -> Sidecar:
    """The sidecar of the pair that a run is about to train on the activations of `rows`.

    Their median norm (of several layers the mean of these) is the injection scale where the config sets none; their
    variance makes the FVE of a single activation meaningful."""
    c, folder, earlier = run.config.prompts, locate(run.subject_folder), run.config.subject.earlier_layers
    check_templates(run.config)
    norm, variance = median_norm_and_variance(rows.vectors)
    norms = np.median(rows.lengths(len(run.config.subject.layers)), axis=0).tolist() if earlier else [norm]
    tokenizer = load_tokenizer(folder)
    marker = find_marker(tokenizer, c.verbalizer_template, c.marker)
    prompts = Prompts(tokenizer, marker, c.verbalizer_template, c.reconstructor_template)
    sidecar = Sidecar(
        base_checkpoint=str(run.subject_folder),
        d_model=read_config(folder).width,
        layer=run.config.subject.layer,
        injection_scale=c.injection_scale or sum(norms) / len(norms),
        marker=marker,
        verbalizer_template=c.verbalizer_template,
        reconstructor_template=c.reconstructor_template,
        suffix_ids=tuple(prompts.suffix_ids()),
        injections=injections(run.config),
        earlier_layers=earlier,
        provenance={
            "base_hash": fingerprint(folder),
            "activation_variance": variance,
            "activation_norm": norms if earlier else norm,
            "max_new_tokens": c.max_new_tokens,
        },
    )
    return dataclasses.replace(sidecar, ids=fixed_prompts(run, sidecar, prompts))


def fixed_prompts(run: Run, sidecar: Sidecar, prompts: Prompts) -> PromptIds:
    """The ids of the prompts as they were when this stage began, kept in `{workdir}/train`: a chat template may write
    the date, and a run that is resumed on another day is to go on with the same prompts."""
    folder = run.workdir / "train" / "prompts"
    if from_writer((folder / FILE).exists):
        kept, facts = Sidecar.read(local(folder), "av"), ("marker", "verbalizer_template", "reconstructor_template")
        if fits_seal((folder / FILE).read_bytes()) is False:
            raise InputError(f"{folder / FILE} is damaged; delete it, and `nla sft` makes it again from the tokenizer.")
        if all(getattr(kept, name) == getattr(sidecar, name) for name in facts):
            return kept.ids
    if is_writer():
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / FILE) as file:
            dataclasses.replace(sidecar, ids=prompts.ids()).write(file, "av")
    barrier("the prompts")
    return prompts.ids()


def check_source(run: Run, subject: str) -> None:
    """Says where the data were made for another prompt than this pair is trained with.

    Raises `InputError` where they come from another subject than the one with the hash `subject`."""
    made = run.require("extract")
    if subject != made["base_hash"]:
        raise InputError(
            f"The subject {run.subject_folder} has changed since its activations were extracted (hash "
            f"{made['base_hash']} then, {subject} now); put the old one back, or use another --workdir."
        )
    for role, field in (("av", "verbalizer_template"), ("ar", "reconstructor_template")):
        made_for, ours = made.get("templates", {}).get(role), getattr(run.config.prompts, field)
        if made_for not in (None, ours) and is_writer():
            print(
                f"sft: extract.source.{role}_sft was made for the prompt {made_for!r}; this pair is trained with "
                f"prompts.{field} = {ours!r}.",
                file=sys.stderr,
            )


def fixed_width(
    pieces: Iterable[list[list[int]]], width: int
) -> tuple[Int[np.ndarray, "n T"], Int[np.ndarray, "n"], Int[np.ndarray, "n"]]:
    """Rows of at most `width` ids, padded to one shape, with their lengths and which rows they are.

    Longer ones, which the AV could never finish, are left out. Raises `InputError` where that is most of them."""
    padded, lengths = [], []
    for rows in pieces:
        lengths.append(np.array([len(row) for row in rows], np.int32))
        padded.append(pad_tokens([row[:width] for row in rows], width)[0])
    lengths = np.concatenate(lengths)
    kept = np.flatnonzero(lengths <= width)
    if 2 * len(kept) < len(lengths):
        raise InputError(
            f"{len(lengths) - len(kept)} of {len(lengths)} labels need more than prompts.max_new_tokens = {width} tokens; "
            f"raise it, or write shorter labels."
        )
    lengths = lengths[kept]
    return np.concatenate(padded)[kept, : -(-lengths.max() // 8) * 8], lengths, kept
