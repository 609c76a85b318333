"""What a config would need of its devices, before a chip is booked: the real programs, compiled ahead of time.

The TPU compiler comes with the `libtpu` wheel and needs no TPU. Nothing is allocated: the programs of `Study` are
lowered from shapes, laid out as training lays them out. Memory is the compiler's own account. FLOPs, bytes and
collectives are counted from the compiled program (nla_jax/tools/hlo.py). Times are *projections* from those counts and
the chip's published peaks, not measurements: every instruction at full rate, one after the other, a collective hidden
only by what the schedule puts between its two halves.
"""

import sys
import time

import jax
from jax.sharding import Mesh

from nla_jax.config import Config
from nla_jax.runtime.errors import InputError
from nla_jax.study import Program, Study
from nla_jax.subject import subject_config
from nla_jax.tools import hlo
from nla_jax.tools.flops import Work, work_of
from nla_jax.tools.topology import GiB, Slice, libtpu_wanted

RL = ("relayout", "rollout", "joint_step")  # the programs of one RL step
DECODE_LOOP = "decode/while"  # how the name of the sampler's loop ends in a compiled program


def programs_of(config: Config, mesh: Mesh, host: Mesh | None = None) -> dict[str, tuple[Program, Work]]:
    """Every program of a config on a mesh, with the work that it cannot avoid, in the order in which a run needs them.

    `host`: the devices of one host (see `Study.programs`). Raises `InputError` where the mesh does not divide a
    parameter, and as `subject_config` does."""
    study = Study.of_shapes(config, mesh, subject_config(config, mesh))
    work = work_of(study)
    return {name: (program, work[name]) for name, program in study.programs(host).items()}


def plan_program(program: Program, work: Work, place: Slice) -> dict:
    """One program compiled for its mesh: what it needs of memory, and the time that it would take.

    Raises `InputError` where the installed TPU compiler is not the one that jax asks for, and fails."""
    clock = time.monotonic()
    try:
        with jax.set_mesh(program.mesh):
            compiled = program.function.lower(*program.arguments, **program.options).compile()
    except jax.errors.JaxRuntimeError as error:
        return {"fits": False, "reason": _too_large(error, place), "compile_seconds": time.monotonic() - clock}
    seconds = time.monotonic() - clock
    memory = compiled.memory_analysis()
    kinds = {
        "arguments": memory.argument_size_in_bytes,
        "outputs": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "code": memory.generated_code_size_in_bytes,
        "beside": program.beside,
    }
    total = sum(kinds.values())
    text = hlo.Program(compiled.as_text(), place.machine)
    return (
        {"fits": total <= place.chip.memory, "memory": kinds, "memory_total": total}
        | _projected(text.counts, program, work, place)
        | {"compile_seconds": seconds}
        | _decode_loop(text)
    )


def _too_large(error: jax.errors.JaxRuntimeError, place: Slice) -> str:
    """Why a program does not fit, in the compiler's words. Any other error of the compiler's is raised."""
    reason = " ".join(str(error).split("\n\n")[0].split())
    if "RESOURCE_EXHAUSTED" in reason:
        return reason
    if place.sizes and (wanted := libtpu_wanted()):
        raise InputError(
            f"The TPU compiler failed ({reason}). The installed libtpu is not the one that jax {jax.__version__} "
            f'asks for ({wanted}); install that one: pip install "jax[tpu]=={jax.__version__}".'
        ) from None
    raise error


def _projected(counts: hlo.Counts, program: Program, work: Work, place: Slice) -> dict:
    """What one device computes, moves and sends, and the time that this would take at the chip's peaks."""
    bounds = {
        "compute": counts.flops / place.chip.flops,
        "memory" if place.devices[0].platform == "cpu" else "HBM": counts.bytes / place.chip.bandwidth,
        "interconnect": counts.waiting,
    }
    return {
        "flops": counts.flops,
        "bytes": counts.bytes,
        "collectives": by_kind(counts.collectives),
        "projected_seconds": counts.seconds,
        "seconds_by_bound": bounds,
        "bound_by": max(bounds, key=bounds.get),
        "projected_samples_per_second": program.copies * program.samples / counts.seconds,
        "projected_mfu": work.flops / (program.mesh.size * place.chip.flops * counts.seconds),
        "runs": program.runs,
        "projected_hours": program.runs * counts.seconds / 3600,
    }


def _decode_loop(text: hlo.Program) -> dict:
    """One turn of the sampler's loop, where the program has one."""
    for loop in text.loops:
        if loop.name.endswith(DECODE_LOOP):
            sent = by_kind(loop.body.collectives)
            return {
                "decode_loop": {
                    "trips": loop.trips,
                    "projected_seconds_per_token": loop.body.seconds,
                    "bytes_per_token": loop.body.bytes,
                    "all_gather": "all-gather" in sent,
                    "collectives": sent,
                }
            }
    return {}


def by_kind(collectives: dict[tuple[str, int], float]) -> dict[str, float]:
    """Bytes sent by kind of collective, over groups of any size."""
    kinds = {kind for kind, _ in collectives}
    return {kind: sum(size for (k, _), size in collectives.items() if k == kind) for kind in sorted(kinds)}


def describe(config: Config, place: Slice, mesh: Mesh, programs: dict[str, dict]) -> dict:
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
    if config.rl.steps and all("memory" in programs.get(name, ()) for name in RL):
        seconds = sum(programs[name]["projected_hours"] for name in RL) * 3600 / config.rl.steps
        result["rl"] = {
            "projected_seconds_per_step": seconds,
            "projected_samples_per_second": config.rl.activations * config.rl.group / seconds,
            "fits": all(programs[name]["fits"] for name in RL),
        }
    if all("memory" in p for p in programs.values()):
        result["projected_hours"] = sum(p["projected_hours"] for p in programs.values())
    return result


def plan(config: Config, place: Slice, mesh: Mesh, only: tuple[str, ...] = ()) -> dict:
    """Compiles the programs of a config for a mesh: all, or those named `only`. Standard error says which one.

    Raises `InputError` for a program that there is not, and as `programs_of` does."""
    programs = programs_of(config, mesh, place.host(mesh))
    if unknown := set(only) - programs.keys():
        raise InputError(f"There is no program {min(unknown)!r}; there are {', '.join(programs)}.")
    plans = {}
    for name, (program, work) in programs.items():
        if not only or name in only:
            print(f"compiling {name} for {place.name} …", file=sys.stderr, flush=True)
            plans[name] = plan_program(program, work, place)
    return describe(config, place, mesh, plans)


# For people


def table(result: dict) -> str:
    """A plan in Markdown."""
    found = [p for p in result["programs"].values() if "memory" in p]
    sends = any(p["collectives"] for p in found)  # one device alone sends nothing: it gets a narrower table
    storage = "HBM" if any("HBM" in p["seconds_by_bound"] for p in found) else "memory"
    columns = ["program", "fits", "GiB a device", "TFLOP", f"{storage} GB", *["collectives GB"] * sends]
    columns += ["projected s", "bound by (s)", "samples/s", "MFU", "hours"]
    lines = [
        f"{result['devices']}, mesh {','.join(str(n) for n in result['mesh'].values())}, remat {result['remat']}, "
        f"attention {result['attention']},",
        f"{result['micro_batches']} micro-batches, {result['rollout_chunks']} rollout chunks, jax {result['jax']}; "
        f"{result['memory_of_device'] / GiB:.2f} GiB a device.",
        "GiB: arguments + outputs + temporaries + code + what lies beside. Times are projections.",
        "",
        f"| {' | '.join(columns)} |",
        "|---" * len(columns) + "|",
    ]
    for name, p in result["programs"].items():
        if "memory" not in p:
            lines.append(f"| {name} | no: {p['reason']} |" + " |" * (len(columns) - 2))
            continue
        memory = (" + " if sends else "+").join(f"{size / GiB:.1f}" for size in p["memory"].values())
        sent = ", ".join(f"{kind} {size / 1e9:.3g}" for kind, size in sorted(p["collectives"].items()))
        bounds = ", ".join(
            f"{kind} {seconds:.3g}" for kind, seconds in p["seconds_by_bound"].items() if sends or seconds
        )
        cells = [name, "yes" if p["fits"] else "no", f"{p['memory_total'] / GiB:.1f} = {memory}"]
        cells += [f"{p['flops'] / 1e12:.4g}", f"{p['bytes'] / 1e9:.4g}", *[sent or "none"] * sends]
        cells += [f"{p['projected_seconds']:.3g}", f"{p['bound_by']} ({bounds})"]
        cells += [f"{p['projected_samples_per_second']:.3g}", f"{100 * p['projected_mfu']:.0f} %"]
        lines.append(f"| {' | '.join(cells)} | {format(p['projected_hours'], '.2g') if p['runs'] else 'unknown'} |")
    for name, p in result["programs"].items():
        if loop := p.get("decode_loop"):
            inside = ", ".join(loop["collectives"]) or "none"
            lines += [
                "",
                f"{name}: all-gather inside decode loop: {'yes' if loop['all_gather'] else 'no'} "
                f"(collectives there: {inside}); "
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
