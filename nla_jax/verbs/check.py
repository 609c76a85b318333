"""`nla check`: what can be known of a study before it runs, in a minute: settings, functions, batches, splits, memory,
disk, labels and prompts."""

import argparse
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nla_jax.verbs.stages import add_workdir, hide_library_warnings, stages_of, workdir

if TYPE_CHECKING:
    from nla_jax.config import Config
    from nla_jax.data.corpus import Document
    from nla_jax.study import Study

GiB = 2**30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where the run would write, for which devices, and how many texts are labelled."""
    add_workdir(parser)
    parser.add_argument("--topology", help="a TPU slice such as v5p:4x4x4 (default: the devices present)")
    parser.add_argument(
        "--labels", type=int, default=16, help="how many texts the labeller is given (default 16; 0: none)"
    )


def run(arguments: argparse.Namespace) -> None:
    """Prints a line for everything that was looked at. Raises `InputError` with the first thing that is wrong."""
    from nla_jax.io.files import path_to
    from nla_jax.models.sharding import AXES
    from nla_jax.runtime.run import mesh_of
    from nla_jax.runtime.user_input import whole_number
    from nla_jax.stages.check import check_batches, check_documents, check_functions, check_prompts
    from nla_jax.study import Study
    from nla_jax.subject import subject_config
    from nla_jax.tools.precision import in_dtype, settled
    from nla_jax.tools.topology import mesh_over, slice_named

    hide_library_warnings()
    whole_number("--labels", arguments.labels, 0)
    stages, folder = stages_of("quickstart", arguments.config), workdir(arguments)
    config = arguments.config
    config = in_dtype(config, "bfloat16") if arguments.topology else settled(config, path_to(folder))
    check_functions(config, stages)
    check_prompts(config, folder, stages)
    say("functions", f"those of {', '.join(stages)} were found and called once")
    place = slice_named(arguments.topology) if arguments.topology else None
    sizes = [getattr(config.mesh, axis) for axis in AXES]
    mesh = mesh_over(place.devices, sizes) if place else mesh_of(config)
    check_batches(config, mesh, stages)
    shape = " x ".join(f"{axis}={n}" for axis, n in mesh.shape.items())
    say("mesh", f"{shape} divides every batch")
    study = Study.of_shapes(config, mesh, subject_config(config, mesh))
    say("memory", memory(study, place.chip.memory if place else device_memory()))
    documents = [] if any(config.extract.source.to_dict().values()) else corpus(config, folder)
    if documents:
        found = check_documents(config, documents)
        counts = ", ".join(f"{split} {count}" for split, count in found.items())
        say("documents", f"{len(documents)}: {counts}; at most {config.extract.positions} activations of each")
    say("disk", disk(study, len(documents), "pretrain" in stages, folder))
    weights(config, folder)
    texts(config, documents, arguments.labels, folder)


def say(what: str, found: str) -> None:
    """One line of the result."""
    print(f"{what:<10} {found}")


def corpus(config: "Config", folder: str) -> "Sequence[Document]":
    """The documents that a run in `folder` would read."""
    from nla_jax.data.corpus import load_corpus
    from nla_jax.io.files import stand_in

    return load_corpus(data_dir=stand_in(folder) / "corpus", **config.corpus.to_dict())


def device_memory() -> float:
    """Bytes of one device here; CPU devices share the machine's."""
    import jax

    stats = jax.devices()[0].memory_stats() or {}
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return float(stats.get("bytes_limit", whole / len(jax.devices())))


def memory(study: "Study", there: float) -> str:
    """What the largest program holds before it computes anything. Raises `InputError` where a device has less.

    From shapes alone, in a second; `nla plan` compiles the programs and adds what they compute."""
    from nla_jax.runtime.errors import InputError

    least = {name: program.least_memory for name, program in study.programs().items()}
    name = max(least, key=least.get)
    if least[name] > there:
        raise InputError(
            f"{name} needs {least[name] / GiB:.1f} GiB a device for parameters, optimizers and batch alone, and a device has "
            f"{there / GiB:.1f}; take more devices in mesh.fsdp, or adapters (sft.av.lora.rank, sft.ar.lora.rank)."
        )
    return (
        f"{least[name] / GiB:.2f} of {there / GiB:.1f} GiB a device in {name}: parameters, optimizers and batch, from shapes; "
        f"what programs compute comes on top (nla plan compiles them)"
    )


def disk(study: "Study", documents: int, pretrains: bool, folder: str) -> str:
    """What the run writes, and whether the disk has room for it. Raises `InputError` where it has not."""
    from nla_jax.io.files import path_to
    from nla_jax.runtime.errors import InputError

    if not isinstance(path := path_to(folder), Path):
        return f"{folder} is on a bucket: not looked at"
    needed = sum(bytes_written(study, documents, pretrains).values())
    there = next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())
    free = shutil.disk_usage(there).free
    if needed > free:
        raise InputError(
            f"The run writes about {needed / GiB:.1f} GiB, and {there} has {free / GiB:.1f} free; make room, keep fewer "
            f"checkpoints (checkpoints.keep), or use another --workdir."
        )
    return f"about {needed / GiB:.2f} GiB of {free / GiB:.1f} free in {there}"


def bytes_written(study: "Study", documents: int, pretrains: bool) -> dict[str, float]:
    """About how much a run writes of what, in bytes: activations (twice: as Parquet, and decoded), checkpoints, models."""
    import flax.linen as nn
    import jax

    from nla_jax.models.transformer import abstract_params

    c, size = study.config, lambda tree: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
    model = study.verbalizer.model.config
    av, ar = nn.unbox(study.boxed)
    # Of a row: the vector; text and ids of half a document on average.
    row = 2 * 4 * study.reconstructor.width + 4 * c.extract.max_tokens
    copies = c.checkpoints.keep + 1
    kept = lambda steps: copies + (steps // c.checkpoints.keep_every if c.checkpoints.keep_every else 0)
    loops = {
        "sft_av": (jax.eval_shape(study.sft_av.init, av), c.sft.av.steps),
        "sft_ar": (jax.eval_shape(study.sft_ar.init, ar), c.sft.ar.steps),
        "rl": (jax.eval_shape(study.joint.init, av, ar), c.rl.steps),
    }
    found = {f"checkpoints of {name}": float(size(state) * kept(steps)) for name, (state, steps) in loops.items()}
    found["activations"] = float(documents * c.extract.positions * row)
    found["pairs"] = 3.0 * (size(av) + size(ar))  # two, and a third while it is written
    if pretrains:
        found["subject"] = float(size(nn.unbox(abstract_params(model)))) * (3 * kept(c.pretrain.steps) + 1)
    return found


def weights(config: "Config", folder: str) -> None:
    """The bytes of the subject's and the pairs' weights, where they are here already. Raises `InputError` for damage."""
    from nla_jax.io.files import path_to
    from nla_jax.io.safetensors import check_bytes

    if isinstance(place := path_to(folder), Path):
        pairs = [place / pair / role for pair in ("pair_warm", "pair") for role in ("av", "ar")]
        known, _ = check_bytes(Path(config.subject.path) if config.subject.path else place / "subject", *pairs)
        if known:
            say("weights", f"{known} files that are here already are whole")


def texts(config: "Config", documents: "Sequence[Document]", count: int, folder: str) -> None:
    """Labels of some texts against `prompts.max_new_tokens`, and three prompts as the models read them.

    Raises `InputError` where most labels are too long, and where the prompt has no usable marker."""
    from nla_jax.io.folders import load_tokenizer
    from nla_jax.io.hub import locate
    from nla_jax.prompts import Prompts, chat_text, find_marker
    from nla_jax.runtime.errors import InputError
    from nla_jax.stages.check import tokenizer_folder

    where = tokenizer_folder(config, folder)
    try:
        where = where or (config.subject.path and locate(config.subject.path, weights=False))
    except InputError as error:  # no network, say; the run itself may have one
        say("prompts", f"not looked at: {error}")
        return
    if not where:
        say("prompts", "not looked at: the subject's tokenizer is not here yet")
        return
    c, tokenizer = config.prompts, load_tokenizer(where)
    prompts = Prompts(
        tokenizer,
        find_marker(tokenizer, c.verbalizer_template, c.marker),
        c.verbalizer_template,
        c.reconstructor_template,
    )
    labels = sampled_labels(config, documents, count, tokenizer)
    if labels:
        say("labels", lengths_of(prompts.response_ids(labels), c.max_new_tokens))
    label = labels[0] if labels else "A text."
    content = c.verbalizer_template.replace("{injection_char}", prompts.marker.char)
    say("AV reads", repr(chat_text(tokenizer, content)))
    say("AV writes", repr(tokenizer.decode(prompts.response_ids([label])[0])))
    say("AR reads", repr(tokenizer.decode(prompts.reconstructor_ids([label])[0])))


def sampled_labels(config: "Config", documents: "Sequence[Document]", count: int, tokenizer) -> list[str]:
    """What the labeller says of `count` documents, evenly spaced, each read up to half of `extract.max_tokens`."""
    from nla_jax.labels.labeller import LabelRow, configured_labeller

    if not documents or count < 1:
        return []
    rows = []
    for document in documents[:: -(-len(documents) // count)]:
        ids = tokenizer(document.text, verbose=False).input_ids[: config.extract.max_tokens]
        ids = ids[: max(config.extract.min_position + 1, len(ids) // 2)]
        text = tokenizer.decode(ids, skip_special_tokens=True)
        if text:
            rows.append(LabelRow(text, tokenizer.decode(ids[-1:]), len(ids) - 1, "", document.id, tuple(ids)))
    labeller = configured_labeller(config.label)
    return [label for label in labeller.label(rows) if isinstance(label, str)]


def lengths_of(responses: list[list[int]], limit: int) -> str:
    """The lengths of responses. Raises `InputError` where most are longer than the AV may write."""
    from nla_jax.runtime.errors import InputError

    lengths = sorted(map(len, responses))
    longer = sum(length > limit for length in lengths)
    if 2 * longer > len(lengths):
        raise InputError(
            f"{longer} of {len(lengths)} labels need more than prompts.max_new_tokens = {limit} tokens (the longest {lengths[-1]}); "
            f"raise it, or write shorter labels."
        )
    dropped = f"; {longer} of {len(lengths)} are longer, and are not trained on" if longer else ""
    return f"{lengths[0]} to {lengths[-1]} tokens in {len(lengths)} samples, {limit} allowed{dropped}"
