"""What a study would need of a TPU slice, before a chip is booked: the real programs, compiled ahead of time.

The TPU compiler comes with the `libtpu` wheel and needs no TPU. Nothing is allocated: programs are lowered from shapes,
laid out as training lays them out. Memory is the compiler's own account; FLOPs, bytes and collectives are counted from
the compiled program (nla_jax/hlo.py); times are *projections* from those counts and the chip's published peaks, not
measurements: every instruction at full rate, one after the other, a collective hidden only behind what the schedule
puts between its two halves.
"""

import argparse
import dataclasses
import functools
import importlib.util
import json
import math
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from nla_jax.autoencoder import Reconstructor, Verbalizer, residual
from nla_jax.errors import InputError
from nla_jax.hlo import Machine, Program
from nla_jax.models.lora import Lora
from nla_jax.models.pretrained import read_config
from nla_jax.models.transformer import Transformer, TransformerConfig, abstract_params
from nla_jax.optimizer import adamw
from nla_jax.sampling import rollout
from nla_jax.sharding import AXES, DECODE, TRAIN, batch_sharding, relayout, shardings
from nla_jax.train_step import (
    Frozen,
    JointBatch,
    JointStep,
    SupervisedStep,
    TextBatch,
    reconstructor_loss,
    verbalizer_loss,
)

GiB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """Published figures: bfloat16 FLOP/s, HBM that a program may use (what the compiler refuses to exceed), HBM
    bytes/s, and bytes/s of one interconnect link in one direction; `wrap`: an axis of a slice closes to a ring at
    multiples of this."""

    flops: float
    memory: float
    bandwidth: float
    link: float
    wrap: int


# FLOP/s, HBM size and bandwidth: docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}; of the HBM the runtime keeps a part
# back. Links: the same pages give 300, 200, 600, 400 GB/s a chip and direction over 6, 4, 6, 4 links; here a tenth
# less, what jax-ml.github.io/scaling-book/tpus uses for what is attainable.
CHIPS = {
    "v4": Chip(275e12, 31.75 * GiB, 1228e9, 45e9, 4),
    "v5e": Chip(197e12, 15.75 * GiB, 819e9, 45e9, 16),
    "v5p": Chip(459e12, 95.0 * GiB, 2765e9, 90e9, 4),
    "v6e": Chip(918e12, 31.25 * GiB, 1640e9, 90e9, 16),
}


@dataclasses.dataclass(frozen=True)
class Slice:
    """A named topology, such as `v5p:4x4x4`: what a device has of its chip, the sizes, and the (abstract) devices."""

    name: str
    chip: Chip
    sizes: tuple[int, ...]
    devices: tuple[Any, ...]

    def links(self, n: int) -> int:
        """Links that a chip at the edge has in a collective among `n` chips, which are taken to fill the slice's
        longest axes first; two along an axis that closes to a ring (in a slice of whole cubes all do), else one."""
        closes = [size % self.chip.wrap == 0 for size in self.sizes]
        if len(self.sizes) == 3:
            closes = [all(closes)] * 3
        links, filled = 0, 1
        for size, closed in sorted(zip(self.sizes, closes), reverse=True):
            if filled < n and size > 1:
                links, filled = links + 1 + closed, filled * size
        return max(links, 1)

    @property
    def machine(self) -> Machine:
        return Machine(self.chip.flops, self.chip.bandwidth, self.chip.link, self.links)


def slice_named(name: str) -> Slice:
    """Raises `InputError` for a topology that the compiler does not know, and where there is no compiler."""
    kind, _, sizes = name.partition(":")
    if kind not in CHIPS or not re.fullmatch(r"\d+(x\d+)*", sizes):
        raise InputError(f"{name!r} is no topology; write for example v5p:4x4x4 (chips: {', '.join(CHIPS)}).")
    if importlib.util.find_spec("libtpu") is None:
        raise InputError('Planning needs the TPU compiler: pip install "jax[tpu]" (no TPU is needed).')
    # Nothing here uses a chip: no metadata server to ask, no host to find, no lock to hold against other processes.
    os.environ |= {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": f"{kind}-1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    from jax.experimental import topologies

    try:
        devices = topologies.get_topology_desc(name, "tpu").devices
    except Exception as error:
        raise InputError(f"The TPU compiler has no topology {name!r} ({str(error).splitlines()[0]}).") from None
    sizes = tuple(int(n) for n in sizes.split("x"))
    cores = len(devices) // math.prod(sizes)  # devices a chip: two on v4
    shares = {field: getattr(CHIPS[kind], field) / cores for field in ("flops", "memory", "bandwidth")}
    return Slice(name, dataclasses.replace(CHIPS[kind], **shares), sizes, tuple(devices))


def mesh_over(devices: tuple, sizes: tuple[int, int, int]) -> Mesh:
    """A mesh of all devices. Raises `InputError` where the sizes (one may be -1) do not fit them."""
    sizes = list(sizes)
    if sizes.count(-1) == 1:
        sizes[sizes.index(-1)] = len(devices) // -math.prod(sizes)
    if math.prod(sizes) != len(devices) or min(sizes) < 1:
        raise InputError(f"mesh {dict(zip(AXES, sizes))} does not fit the {len(devices)} devices of the topology.")
    return Mesh(np.array(devices).reshape(sizes), AXES)


@dataclasses.dataclass(frozen=True)
class Study:
    """The sizes of one study. The defaults are those of the released Qwen2.5-7B pair."""

    model: TransformerConfig
    layer: int
    activations: int = 128
    group: int = 8
    prefix: int = 111  # tokens of the AV's prompt before the marker
    suffix: int = 14  # from the marker to the response
    response: int = 150
    text: int = 168  # tokens that the AR reads: its template and the explanation
    text_prefix: int = 8  # of them the same in every text
    kl_coefficient: float = 0.01
    micro_batches: int = 1
    rollout_chunks: int = 1
    sft_batch: int = 256
    extract_batch: int = 64
    extract_tokens: int = 1024
    av_lora: Lora | None = None
    ar_lora: Lora | None = None
    rl_steps: int = 1000

    @property
    def rows(self) -> int:
        return self.activations * self.group

    @functools.cached_property
    def verbalizer(self) -> Verbalizer:
        prompt = tuple(range(self.prefix)), tuple(range(self.suffix))
        return Verbalizer(Transformer(self.model), *prompt, end=0, injection_scale=1.0, lora=self.av_lora)

    @functools.cached_property
    def reconstructor(self) -> Reconstructor:
        prefix = tuple(range(self.text_prefix))
        return Reconstructor(Transformer(self.model.truncated(self.layer + 1)), prefix, self.ar_lora)


# Model FLOPs: what the method needs, however it is computed. Recomputation in the backward pass does not count.


def forward_flops(config: TransformerConfig, tokens: int, pairs: int, logits: int) -> float:
    """FLOPs of one forward pass: `tokens` through all blocks, `pairs` of a query and a key that it may read, `logits`
    rows of the head. 2 FLOPs a multiply-add; norms, rope and softmax not counted."""
    attention = config.width * config.head_dim * (2 * config.heads + 2 * config.kv_heads)
    block = attention + 3 * config.width * config.mlp_width
    scores = 4 * config.heads * config.head_dim * pairs
    return float(config.layers * (2 * tokens * block + scores) + 2 * logits * config.width * config.vocab_size)


def verbalizer_flops(study: Study, activations: int, group: int, response: int) -> float:
    """One forward pass of the AV, prefix and prompt shared."""
    P, S, R, B = study.prefix, study.suffix, response - 1, activations * group
    own = lambda n: n * (n + 1) // 2
    pairs = own(P) + activations * (S * P + own(S)) + B * (R * (P + S) + own(R))
    return forward_flops(study.model, P + activations * S + B * R, pairs, B * response)


def truncated_flops(study: Study, rows: int, tokens: int, prefix: int = 0) -> float:
    """One forward pass of blocks 0..K over rows of which the first `prefix` tokens are shared: the AR and the subject."""
    config, own = study.model.truncated(study.layer + 1), lambda n: n * (n + 1) // 2
    pairs = own(prefix) + rows * (own(tokens) - own(prefix))
    return forward_flops(config, prefix + rows * (tokens - prefix), pairs, 0)


# The programs, from shapes


@dataclasses.dataclass(frozen=True)
class Task:
    """One program. `lower()` lowers it; `model_flops`: over all devices; `samples` that it works on; `runs` in one RL
    step (0: no part of it); `beside`: bytes a device holds beside its arguments; `loop`: the name of the decode loop,
    where it has one."""

    lower: Callable
    model_flops: float
    samples: int
    runs: int = 0
    beside: float = 0.0
    loop: str | None = None


def placed(mesh: Mesh, boxed: Any, rules=TRAIN, dtype: Any = None) -> Any:
    """Shapes with their shardings, of (boxed) shapes with axis names; in `dtype` where one is given."""
    shape = lambda s, sharding: jax.ShapeDtypeStruct(s.shape, dtype or s.dtype, sharding=sharding)
    return jax.tree.map(shape, nn.unbox(boxed), shardings(mesh, boxed, rules))


def placed_batch(mesh: Mesh, tree: Any) -> Any:
    """Shapes with the shardings that `place_batch` gives to arrays."""
    place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=batch_sharding(mesh, x.shape))
    return jax.tree.map(place, tree)


def device_bytes(tree: Any) -> float:
    """Bytes of a tree of placed shapes on one device."""
    return float(sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)))


def tasks(study: Study, mesh: Mesh) -> dict[str, Task]:
    """The programs of a study, in the order in which it runs them."""
    av, ar, dtype = study.verbalizer, study.reconstructor, study.model.dtype
    A, B, D, R, T = study.activations, study.rows, study.model.width, study.response, study.text
    i32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
    f32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    bits = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bool_)
    on = functools.partial(placed, mesh)
    tx = adamw(study.rl_steps, 1e-5)
    key = jax.eval_shape(lambda: jax.random.key(0))

    whole = abstract_params(study.model)
    lora = study.av_lora or study.ar_lora
    base = on(whole, dtype=dtype) if lora else None
    decoding = on(av.abstract_params(), DECODE, dtype)
    assembled = av.assemble(decoding, on(whole, DECODE, dtype)) if study.av_lora else decoding

    joint = JointStep(av, ar, tx, tx, kl_coefficient=study.kl_coefficient, micro_batches=study.micro_batches)
    state = on(jax.eval_shape(joint.init, key, av.abstract_params(), ar.abstract_params()))
    frozen = Frozen(on(av.abstract_params(), dtype=dtype), base)
    rollout_batch = placed_batch(mesh, f32(A // study.rollout_chunks, D))
    joint_batch = placed_batch(
        mesh, JointBatch(f32(A, D), i32(B, R), bits(B, R), f32(B, R), i32(B, T), i32(B), bits(B))
    )
    rng = jax.ShapeDtypeStruct((), key.dtype, sharding=NamedSharding(mesh, PartitionSpec()))

    def supervised(loss, model, width: int):
        step, n = SupervisedStep(loss, tx), study.sft_batch
        batch = placed_batch(mesh, TextBatch(i32(n, width), i32(n), f32(n, D)))
        start = on(jax.eval_shape(step.init, model.abstract_params()))
        return lambda: jax.jit(step, donate_argnums=0).lower(start, batch, base)

    subject = study.model.truncated(study.layer + 1)
    texts = placed_batch(mesh, i32(study.extract_batch, study.extract_tokens))
    extracted = lambda: jax.jit(residual, static_argnums=0).lower(
        Transformer(subject), on(abstract_params(subject, truncated=True), dtype=dtype), texts
    )
    sampled = lambda: rollout.lower(av, assembled, rollout_batch, rng, 0, group=study.group, max_new_tokens=R)
    laid_out = lambda: relayout(mesh, av.abstract_params(), dtype, DECODE).lower(state.verbalizer)
    trained = lambda: jax.jit(joint, donate_argnums=0).lower(state, frozen, joint_batch)

    # A LoRA model's backward pass needs no gradient of the frozen weights: two forward passes' worth, not three.
    av_passes, ar_passes = (2 if part else 3 for part in (study.av_lora, study.ar_lora))
    read = verbalizer_flops(study, A, study.group, R)
    warm = verbalizer_flops(study, study.sft_batch, 1, R)
    rebuild = truncated_flops(study, B, T, study.text_prefix)
    kept = device_bytes((state, frozen))
    return {
        "extract": Task(
            extracted, truncated_flops(study, study.extract_batch, study.extract_tokens), study.extract_batch
        ),
        "sft_av": Task(supervised(verbalizer_loss(av), av, R), av_passes * warm, study.sft_batch),
        "sft_ar": Task(
            supervised(reconstructor_loss(ar), ar, T),
            ar_passes * truncated_flops(study, study.sft_batch, T, study.text_prefix),
            study.sft_batch,
        ),
        "relayout": Task(laid_out, 0.0, B, 1, kept - device_bytes(state.verbalizer)),
        "rollout": Task(
            sampled, read / study.rollout_chunks, B // study.rollout_chunks, study.rollout_chunks, kept,
            loop="jit(rollout)/while",
        ),
        "train_step": Task(
            trained, (av_passes + (study.kl_coefficient > 0)) * read + ar_passes * rebuild, B, 1, device_bytes(assembled)
        ),
    }  # fmt: skip


# The plan


def plan_program(task: Task, place: Slice) -> dict:
    """One program compiled for a slice: what it needs, and what it would take."""
    clock = time.monotonic()
    try:
        compiled = task.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return {"fits": False, "reason": " ".join(str(error).split("\n\n")[0].split())}
    seconds = time.monotonic() - clock
    memory = compiled.memory_analysis()
    program = Program(compiled.as_text(), place.machine)
    counts, chips = program.counts, len(place.devices)
    kinds = {
        "arguments": memory.argument_size_in_bytes,
        "outputs": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "code": memory.generated_code_size_in_bytes,
        "beside": task.beside,
    }
    collectives: dict[str, float] = {}
    for (kind, _), size in counts.collectives.items():
        collectives[kind] = collectives.get(kind, 0.0) + size
    bounds = {
        "compute": counts.flops / place.chip.flops,
        "HBM": counts.bytes / place.chip.bandwidth,
        "interconnect": counts.waiting,
    }
    result = {
        "fits": sum(kinds.values()) <= place.chip.memory,
        "memory": kinds,
        "memory_total": sum(kinds.values()),
        "flops": counts.flops,
        "bytes": counts.bytes,
        "collectives": collectives,
        "projected_seconds": counts.seconds,
        "seconds_by_bound": bounds,
        "bound_by": max(bounds, key=bounds.get),
        "projected_samples_per_second": task.samples / counts.seconds,
        "projected_mfu": task.model_flops / (chips * place.chip.flops * counts.seconds),
        "compile_seconds": seconds,
    }
    if task.loop:
        decode = next(loop for loop in program.loops if loop.name == task.loop)
        result["decode_loop"] = {
            "trips": decode.trips,
            "projected_seconds_per_token": decode.body.seconds,
            "bytes_per_token": decode.body.bytes,
            "all_gather": any(kind == "all-gather" for kind, _ in decode.body.collectives),
            "collectives": {kind: size for (kind, _), size in decode.body.collectives.items()},
        }
    return result


def plan(study: Study, topology: str, mesh: tuple[int, int, int], only: tuple[str, ...] = ()) -> dict:
    """Plans the programs of a study (all, or those named) for a topology and a mesh `(data, fsdp, tensor)`."""
    place = slice_named(topology)
    over = mesh_over(place.devices, mesh)
    with jax.set_mesh(over):
        all_tasks = tasks(study, over)
        if unknown := set(only) - all_tasks.keys():
            raise InputError(f"There is no program {min(unknown)!r}; there are {', '.join(all_tasks)}.")
        chosen = {name: task for name, task in all_tasks.items() if not only or name in only}
        programs = {name: plan_program(task, place) for name, task in chosen.items()}
    result = {
        "topology": topology,
        "mesh": dict(over.shape),
        "jax": jax.__version__,
        "micro_batches": study.micro_batches,
        "remat": study.model.remat,
        "memory_of_chip": place.chip.memory,
        "programs": programs,
    }
    steps = {name: task.runs for name, task in all_tasks.items() if task.runs}
    if all(name in programs and "memory" in programs[name] for name in steps):
        seconds = sum(programs[name]["projected_seconds"] * runs for name, runs in steps.items())
        result["rl"] = {
            "projected_seconds_per_step": seconds,
            "projected_samples_per_second": study.rows / seconds,
            "projected_hours": study.rl_steps * seconds / 3600,
        }
    return result


def table(result: dict) -> str:
    """A plan for people, in Markdown."""
    lines = [
        f"{result['topology']}, mesh {','.join(str(n) for n in result['mesh'].values())}, remat {result['remat']}, "
        f"{result['micro_batches']} micro-batches, jax {result['jax']}; {result['memory_of_chip'] / GiB:.2f} GiB a chip. "
        "Times are projections.",
        "",
        "| program | fits | GiB a device: arguments + outputs + temporaries + code + beside | TFLOP | HBM GB "
        "| collectives GB | projected s | bound by (s) | samples/s | MFU |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, p in result["programs"].items():
        if "memory" not in p:
            lines.append(f"| {name} | no: {p['reason']} |" + " |" * 8)
            continue
        memory = " + ".join(f"{size / GiB:.1f}" for size in p["memory"].values())
        sent = ", ".join(f"{kind} {size / 1e9:.3g}" for kind, size in sorted(p["collectives"].items()))
        bounds = ", ".join(f"{kind} {seconds:.3g}" for kind, seconds in p["seconds_by_bound"].items())
        lines.append(
            f"| {name} | {'yes' if p['fits'] else 'no'} | {p['memory_total'] / GiB:.1f} = {memory} "
            f"| {p['flops'] / 1e12:.4g} | {p['bytes'] / 1e9:.4g} | {sent or 'none'} | {p['projected_seconds']:.3g} | {p['bound_by']} ({bounds}) "
            f"| {p['projected_samples_per_second']:.3g} | {100 * p['projected_mfu']:.0f} % |"
        )
    for name, p in result["programs"].items():
        if loop := p.get("decode_loop"):
            inside = ", ".join(loop["collectives"]) or "none"
            lines += [
                "",
                f"{name}: all-gather inside decode loop: {'yes' if loop['all_gather'] else 'no'} (collectives there: {inside}); "
                f"{1e3 * loop['projected_seconds_per_token']:.3g} ms a token (projected).",
            ]
    if rl := result.get("rl"):
        lines += [
            "",
            f"One RL step: {rl['projected_seconds_per_step']:.3g} s without host work, "
            f"{rl['projected_samples_per_second']:.3g} samples/s, {rl['projected_hours']:.3g} hours for the run (projected).",
        ]
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `nla plan`."""
    sizes = lambda text: tuple(int(n) for n in text.split(","))
    parser.add_argument(
        "--subject", required=True, help="folder or hub id of the subject; only its config.json is read"
    )
    parser.add_argument("--layer", type=int, required=True, help="block K whose output is explained")
    parser.add_argument("--topology", required=True, help="for example v5p:4x4x4, v6e:4x4")
    parser.add_argument(
        "--mesh", type=sizes, default=(1, -1, 1), help="data,fsdp,tensor; one may be -1 (default 1,-1,1)"
    )
    parser.add_argument("--programs", type=lambda text: tuple(text.split(",")), default=(), help="only these")
    parser.add_argument("--remat", default="nothing_saveable", help="a jax.checkpoint_policies name, or '' for none")
    for field in dataclasses.fields(Study):
        if isinstance(field.default, int | float):
            flag = "--" + field.name.replace("_", "-")
            parser.add_argument(flag, type=field.type, default=field.default, help=f"default {field.default}")
    parser.add_argument("--json", action="store_true", help="everything as one JSON object")


def config_folder(name: str) -> Path:
    """The folder of a model's config.json: a local one, or that of a hub id, of which nothing else is fetched."""
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, "config.json")).parent
    except Exception as error:  # network, authorisation, unknown repository
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"{name} is neither a folder nor a model that the hub gives ({reason}).") from None


def main(arguments: argparse.Namespace) -> None:
    """`nla plan`: prints what a study would need and take."""
    config = read_config(config_folder(arguments.subject), jnp.bfloat16)
    config = dataclasses.replace(config, remat=arguments.remat or None)
    if not 0 <= arguments.layer < config.layers:
        raise InputError(
            f"Layer {arguments.layer} does not exist: {arguments.subject} has blocks 0 to {config.layers - 1}."
        )
    names = {field.name for field in dataclasses.fields(Study)} & vars(arguments).keys()
    study = Study(config, **{name: getattr(arguments, name) for name in names})
    result = plan(study, arguments.topology, arguments.mesh, arguments.programs)
    print(json.dumps(result, indent=1) if arguments.json else table(result))
