"""What a config would need of its devices, before a chip is booked: the real programs, compiled ahead of time.

The TPU compiler comes with the `libtpu` wheel and needs no TPU. Nothing is allocated: programs are lowered from shapes,
laid out as training lays them out. Memory is the compiler's own account; FLOPs, bytes and collectives are counted from
the compiled program (nla_jax/tools/hlo.py); times are *projections* from those counts and the chip's published peaks, not
measurements: every instruction at full rate, one after the other, a collective hidden only behind what the schedule
puts between its two halves.
"""

import argparse
import dataclasses
import functools
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from nla_jax.autoencoder import Reconstructor, Verbalizer, residual
from nla_jax.io.folders import model_config, read_config
from nla_jax.io.hub import locate
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
from nla_jax.models.kernels import with_kernel
from nla_jax.models.sharding import (
    DECODE,
    TRAIN,
    batch_sharding,
    host_mesh,
    padded_vocabulary,
    relayout,
    shardings,
    working_dtypes,
)
from nla_jax.models.transformer import Transformer, TransformerConfig, abstract_params
from nla_jax.runtime.errors import InputError, first_line
from nla_jax.runtime.run import injection, resolve
from nla_jax.sampling import rollout
from nla_jax.stages.pretrain import SHIPPED
from nla_jax.stages.supervised import make_optimizer
from nla_jax.stages.train import lora
from nla_jax.subject import ROWS
from nla_jax.tools.flops import Flops, blocks, reconstructor_flops, verbalizer_flops
from nla_jax.tools.hlo import Program
from nla_jax.tools.topology import GiB, Slice, libtpu_wanted

RL = ("relayout", "rollout", "train_step")  # the programs of one RL step


def subject_config(config) -> TransformerConfig:
    """The subject's shapes: those of the folder that the config names, else `subject.architecture`, else the hub's
    `config.json`, of which nothing else is fetched; without a path those of the model that `pretrain` would make.

    Raises `InputError` where the hub does not give it, and for a layer that the model does not have."""
    c, dtype = config.subject, jnp.dtype(config.compute.dtype)
    if not c.path and config.pretrain.init_from:
        init = config.pretrain.init_from
        model = read_config(SHIPPED if init == "shipped" else locate(init), dtype)
    elif not c.path:
        model = TransformerConfig(vocab_size=config.pretrain.vocab_size, dtype=dtype, **config.pretrain.model)
    elif Path(c.path).is_dir():
        model = read_config(c.path, dtype)
    elif c.architecture:
        model = model_config(c.architecture.to_dict(), "subject.architecture", dtype)
    else:
        model = read_config(hub_folder(c.path), dtype)
    if not 0 <= c.layer < model.layers:
        raise InputError(f"subject.layer {c.layer} does not exist: the subject has blocks 0 to {model.layers - 1}.")
    return dataclasses.replace(model, remat=config.compute.remat or None)


def hub_folder(name: str) -> Path:
    """The folder with a hub model's config.json."""
    from huggingface_hub import hf_hub_download

    repo, _, revision = name.partition("@")
    try:
        return Path(hf_hub_download(repo, "config.json", revision=revision or None)).parent
    except Exception as error:  # network, authorisation, unknown repository
        raise InputError(
            f"{name} is neither a folder nor a model that the hub gives ({first_line(error)}); set subject.architecture."
        ) from None


# The programs, from shapes


@dataclasses.dataclass(frozen=True)
class Task:
    """One program: a jitted function and the shapes that it is called with. `flops` that the method needs on all devices,
    `samples` that it works on, how often it `runs` in the configured run; `beside`: bytes a device holds beside the
    arguments; `loop`: the name of the decode loop, where it has one; `copies` of it that run at a time, each on its own
    `mesh`."""

    mesh: Mesh
    function: Any
    arguments: tuple
    flops: float
    samples: int
    runs: int
    beside: float = 0.0
    options: dict = dataclasses.field(default_factory=dict)
    loop: str | None = None
    copies: int = 1

    @property
    def least_memory(self) -> float:
        """Bytes that a device holds before the program allocates anything."""
        return device_bytes(self.arguments) + self.beside


def placed(mesh: Mesh, boxed: Any, rules=TRAIN, dtype: Any = None) -> Any:
    """Shapes with their shardings, of (boxed) shapes with axis names; of a working copy in `dtype` where one is given."""
    boxed = padded_vocabulary(mesh, boxed, rules)
    shapes = nn.unbox(boxed)
    dtypes = working_dtypes(shapes, dtype) if dtype else jax.tree.map(lambda s: s.dtype, shapes)
    shape = lambda s, dtype, sharding: jax.ShapeDtypeStruct(s.shape, dtype, sharding=sharding)
    return jax.tree.map(shape, shapes, dtypes, shardings(mesh, boxed, rules))


def placed_batch(mesh: Mesh, tree: Any) -> Any:
    """Shapes with the shardings that `place_batch` gives to arrays."""
    place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=batch_sharding(mesh, x.shape))
    return jax.tree.map(place, tree)


def device_bytes(tree: Any) -> float:
    """Bytes of the placed shapes of a tree on one device."""
    shapes = [x for x in jax.tree.leaves(tree) if isinstance(x, jax.ShapeDtypeStruct)]
    return float(sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in shapes))


def attached(base: dict, adapter: dict) -> dict:
    """What `Lora.attach` makes, of shapes."""
    return base | {"blocks": {name: part | adapter["blocks"].get(name, {}) for name, part in base["blocks"].items()}}


def tasks(config, mesh: Mesh, host: Mesh | None = None) -> dict[str, Task]:
    """The programs of a config, in the order in which a run needs them, at their largest shapes. `host`: the devices of one
    host, which extracts from documents of its own (default: those of the mesh's first).

    Raises `InputError` where the mesh does not divide a parameter."""
    model, c, p = with_kernel(subject_config(config), config.compute.attention, mesh), config.rl, config.plan
    subject = model.truncated(config.subject.layer + 1)
    prompt = tuple(range(p.prefix)), tuple(range(p.suffix))
    av = Verbalizer(
        Transformer(model), *prompt, end=0, injection_scale=config.prompts.injection_scale or 1.0,
        injection=injection(config), lora=lora(config.sft.av.lora),
    )  # fmt: skip
    ar = Reconstructor(Transformer(subject), tuple(range(p.text_prefix)), lora(config.sft.ar.lora))
    A, G, D, R = c.activations, c.group, model.width, config.prompts.max_new_tokens
    B, T, dtype = A * G, -(-(p.text + R) // 8) * 8, model.dtype
    i32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
    f32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    bits = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bool_)
    on, batch = functools.partial(placed, mesh), functools.partial(placed_batch, mesh)
    boxed = av.abstract_params(), ar.abstract_params()

    base = on(abstract_params(model), dtype=dtype) if av.lora or ar.lora else None
    decoding, second, shared = on(boxed[0], DECODE, dtype), 0.0, 0.0
    if av.lora:
        decoding_base = on(abstract_params(model), DECODE, dtype)
        decoding, again = attached(decoding_base, decoding), device_bytes(decoding_base)
        # One device decodes with the frozen base itself, several with a copy.
        second, shared = (again, 0.0) if mesh.size > 1 else (0.0, again)
    joint = JointStep(
        av, ar, make_optimizer(c.av_optimizer, c.steps), make_optimizer(c.ar_optimizer, c.steps),
        reward=resolve(c.reward), advantage=resolve(c.advantage), kl_coefficient=c.kl_coefficient,
        temperature=c.temperature, micro_batches=c.micro_batches,
    )  # fmt: skip
    key = jax.eval_shape(lambda: jax.random.key(0))
    state = on(jax.eval_shape(joint.init, key, *boxed))
    frozen = Frozen(on(boxed[0], dtype=dtype), base)
    kept = device_bytes((state, frozen))  # through the whole of RL
    rng = jax.ShapeDtypeStruct((), key.dtype, sharding=NamedSharding(mesh, PartitionSpec()))
    rollout_batch = batch(f32(A // c.rollout_chunks, D))
    joint_batch = batch(JointBatch(f32(A, D), i32(B, R), bits(B, R), f32(B, R), i32(B, T), i32(B), bits(B)))

    def supervised(which: int, loss: Callable, settings, width: int, flops: Flops) -> Task:
        """A warm start; the other model's parameters stand beside it."""
        n, step = settings.batch, SupervisedStep(loss, make_optimizer(settings.optimizer, settings.steps))
        start = on(jax.eval_shape(step.init, boxed[which]))
        arguments = start, batch(TextBatch(i32(n, width), i32(n), f32(n, D))), base
        beside = device_bytes(on(boxed[1 - which]))
        return Task(mesh, jit_step(step, mesh), arguments, flops.training, n, settings.steps, beside)

    hosts = {device.process_index for device in mesh.devices.flat}
    host, hosts = host or host_mesh(mesh, min(hosts)), len(hosts)
    documents = config.corpus.max_documents or math.inf  # 10**9 and more: as many as there are
    read, tokens = verbalizer_flops(av, A, G, R), config.extract.max_tokens
    return {
        "extract": Task(
            host, jax.jit(residual, static_argnums=0),
            (
                Transformer(subject), placed(host, abstract_params(subject, truncated=True), dtype=dtype),
                placed_batch(host, i32(ROWS, tokens)),
            ),
            blocks(subject, [(ROWS, tokens, 0)]).forward, ROWS,
            -(-documents // (ROWS * hosts)) if documents < 10**9 else 0, copies=hosts,
        ),
        "sft_av": supervised(
            0, verbalizer_loss(av), config.sft.av, R, verbalizer_flops(av, config.sft.av.batch, 1, R)
        ),
        "sft_ar": supervised(
            1, reconstructor_loss(ar), config.sft.ar, T, reconstructor_flops(ar, config.sft.ar.batch, T)
        ),
        "relayout": Task(
            mesh, relayout(mesh, boxed[0], dtype, DECODE), (state.verbalizer,), 0.0, B, c.steps,
            kept - device_bytes(state.verbalizer) + second,
        ),
        "rollout": Task(
            mesh, rollout, (av, decoding, rollout_batch, rng, 0), read.forward / c.rollout_chunks, B // c.rollout_chunks,
            c.steps * c.rollout_chunks, kept - shared,
            dict(group=G, max_new_tokens=R, temperature=c.temperature, top_k=c.top_k, top_p=c.top_p),
            loop="decode/while",
        ),
        "train_step": Task(
            mesh, jit_step(joint, mesh), (state, frozen, joint_batch),
            read.training + bool(c.kl_coefficient) * read.forward + reconstructor_flops(ar, B, T).training, B, c.steps,
            second,
        ),
    }  # fmt: skip


# The plan


def plan_program(task: Task, place: Slice) -> dict:
    """One program compiled for its mesh: what it needs, and what it would take."""
    clock = time.monotonic()
    try:
        with jax.set_mesh(task.mesh):
            compiled = task.function.lower(*task.arguments, **task.options).compile()
    except jax.errors.JaxRuntimeError as error:
        reason = " ".join(str(error).split("\n\n")[0].split())
        if "RESOURCE_EXHAUSTED" not in reason:
            if place.sizes and (wanted := libtpu_wanted()):
                raise InputError(
                    f"The TPU compiler failed ({reason}). The installed libtpu is not the one that jax {jax.__version__} "
                    f'asks for ({wanted}); install that one: pip install "jax[tpu]=={jax.__version__}".'
                ) from None
            raise
        return {"fits": False, "reason": reason, "compile_seconds": time.monotonic() - clock}
    seconds = time.monotonic() - clock
    memory = compiled.memory_analysis()
    program = Program(compiled.as_text(), place.machine)
    counts = program.counts
    kinds = {
        "arguments": memory.argument_size_in_bytes,
        "outputs": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "code": memory.generated_code_size_in_bytes,
        "beside": task.beside,
    }
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
        "collectives": by_kind(counts.collectives),
        "projected_seconds": counts.seconds,
        "seconds_by_bound": bounds,
        "bound_by": max(bounds, key=bounds.get),
        "projected_samples_per_second": task.copies * task.samples / counts.seconds,
        "projected_mfu": task.flops / (task.mesh.size * place.chip.flops * counts.seconds),
        "runs": task.runs,
        "projected_hours": task.runs * counts.seconds / 3600,
        "compile_seconds": seconds,
    }
    if task.loop:
        decode = next(loop for loop in program.loops if loop.name.endswith(task.loop))
        result["decode_loop"] = {
            "trips": decode.trips,
            "projected_seconds_per_token": decode.body.seconds,
            "bytes_per_token": decode.body.bytes,
            "all_gather": "all-gather" in by_kind(decode.body.collectives),
            "collectives": by_kind(decode.body.collectives),
        }
    return result


def by_kind(collectives: dict[tuple[str, int], float]) -> dict[str, float]:
    """Bytes sent by kind of collective, over groups of any size."""
    kinds = {kind for kind, _ in collectives}
    return {kind: sum(size for (k, _), size in collectives.items() if k == kind) for kind in sorted(kinds)}


def describe(config, place: Slice, mesh: Mesh, programs: dict[str, dict]) -> dict:
    """The plan of a config from its compiled programs, with one RL step and the whole run where all parts are there."""
    result = {
        "devices": place.name,
        "mesh": dict(mesh.shape),
        "jax": jax.__version__,
        "micro_batches": config.rl.micro_batches,
        "rollout_chunks": config.rl.rollout_chunks,
        "remat": config.compute.remat,
        "attention": config.compute.attention,
        "memory_of_device": place.chip.memory,
        "programs": programs,
    }
    if all("memory" in programs.get(name, ()) for name in RL):
        seconds = sum(programs[name]["projected_hours"] for name in RL) * 3600 / config.rl.steps
        result["rl"] = {
            "projected_seconds_per_step": seconds,
            "projected_samples_per_second": config.rl.activations * config.rl.group / seconds,
            "fits": all(programs[name]["fits"] for name in RL),
        }
    if all("memory" in p for p in programs.values()):
        result["projected_hours"] = sum(p["projected_hours"] for p in programs.values())
    return result


def plan(config, place: Slice, mesh: Mesh, only: tuple[str, ...] = ()) -> dict:
    """Compiles the programs of a config (all, or those named) for a mesh; says on standard error which one is under way."""
    all_tasks = tasks(config, mesh, place.host(mesh))
    if unknown := set(only) - all_tasks.keys():
        raise InputError(f"There is no program {min(unknown)!r}; there are {', '.join(all_tasks)}.")
    programs = {}
    for name, task in all_tasks.items():
        if not only or name in only:
            print(f"compiling {name} for {place.name} …", file=sys.stderr, flush=True)
            programs[name] = plan_program(task, place)
    return describe(config, place, mesh, programs)


# For people


def table(result: dict) -> str:
    """A plan in Markdown."""
    lines = [
        f"{result['devices']}, mesh {','.join(str(n) for n in result['mesh'].values())}, remat {result['remat']}, "
        f"attention {result['attention']}, "
        f"{result['micro_batches']} micro-batches, {result['rollout_chunks']} rollout chunks, jax {result['jax']}; "
        f"{result['memory_of_device'] / GiB:.2f} GiB a device. Times are projections.",
        "",
        "| program | fits | GiB a device: arguments + outputs + temporaries + code + beside | TFLOP | HBM GB "
        "| collectives GB | projected s | bound by (s) | samples/s | MFU | hours |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, p in result["programs"].items():
        if "memory" not in p:
            lines.append(f"| {name} | no: {p['reason']} |" + " |" * 9)
            continue
        memory = " + ".join(f"{size / GiB:.1f}" for size in p["memory"].values())
        sent = ", ".join(f"{kind} {size / 1e9:.3g}" for kind, size in sorted(p["collectives"].items()))
        bounds = ", ".join(f"{kind} {seconds:.3g}" for kind, seconds in p["seconds_by_bound"].items())
        lines.append(
            f"| {name} | {'yes' if p['fits'] else 'no'} | {p['memory_total'] / GiB:.1f} = {memory} "
            f"| {p['flops'] / 1e12:.4g} | {p['bytes'] / 1e9:.4g} | {sent or 'none'} | {p['projected_seconds']:.3g} "
            f"| {p['bound_by']} ({bounds}) | {p['projected_samples_per_second']:.3g} | {100 * p['projected_mfu']:.0f} % "
            f"| {format(p['projected_hours'], '.2g') if p['runs'] else 'unknown'} |"
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
            f"{rl['projected_samples_per_second']:.3g} samples/s (projected).",
        ]
    if "projected_hours" in result:
        lines += ["", f"The run of these programs: {result['projected_hours']:.3g} hours (projected)."]
    return "\n".join(lines)


def mesh_sizes(text: str) -> tuple[int, ...]:
    """`data,fsdp,tensor` of the command line."""
    sizes = tuple(int(n) for n in text.split(","))
    if len(sizes) != 3:
        raise argparse.ArgumentTypeError("must be three numbers: data,fsdp,tensor")
    return sizes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `nla plan`, beside `--config` and `--workdir`."""
    parser.add_argument("--topology", help="a TPU slice such as v5p:4x4x4 or v6e:4x4 (default: the devices present)")
    parser.add_argument("--mesh", type=mesh_sizes, help="data,fsdp,tensor; one may be -1 (default: the config's)")
    parser.add_argument("--programs", type=lambda text: tuple(text.split(",")), default=(), help="only these")
    parser.add_argument("--search", action="store_true", help="try meshes and micro-batches, rank those that fit")
    parser.add_argument("--json", action="store_true", help="everything as JSON")
