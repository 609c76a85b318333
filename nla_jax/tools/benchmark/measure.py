"""Runs a benchmark, and accounts for its time.

The compile cache is left off, so that `compile_seconds` are those of a first run.
"""

import dataclasses
import datetime
import json
import resource
import statistics
import sys
import time

import jax
from jax.sharding import Mesh

from nla_jax.runtime.compiler import compilations
from nla_jax.runtime.errors import InputError
from nla_jax.study import Study
from nla_jax.tools.benchmark.programs import BENCHMARKS, Benchmark, Clock
from nla_jax.tools.flops import Work
from nla_jax.tools.topology import measured_bandwidth, measured_peak


@dataclasses.dataclass(frozen=True)
class Timing:
    """How a benchmark is timed: `steps` after `warmup` others, and the peaks of one device (0: measured)."""

    steps: int = 5
    warmup: int = 1
    peak_tflops: float = 0.0
    bandwidth_gbs: float = 0.0

    def __post_init__(self):
        for name, least in (("steps", 1), ("warmup", 1), ("peak_tflops", 0), ("bandwidth_gbs", 0)):
            value = getattr(self, name)
            if not least <= value < float("inf"):
                raise InputError(f"--{name.replace('_', '-')} must be at least {least}, found {value}.")


def peak_memory(mesh: Mesh) -> tuple[int, str]:
    """The most memory that was ever in use, in bytes, and whose: the fullest device's, else the process's.

    Of a process it is the largest resident set."""
    stats = [device.memory_stats() for device in mesh.devices.flat]
    if all(stats):
        return max(x["peak_bytes_in_use"] for x in stats), "device"
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, "process"  # Linux counts in KiB


def timed_step(benchmark: Benchmark, mesh: Mesh) -> dict:
    """Runs one step and describes it."""
    clock, start = Clock(), time.perf_counter()
    metrics = benchmark.step(clock)
    seconds = time.perf_counter() - start
    return {
        "seconds": seconds,
        "phases": dict(clock),
        "samples_per_second": benchmark.samples / seconds,
        "peak_memory_bytes": peak_memory(mesh)[0],
        "metrics": {name: float(value) for name, value in metrics.items()},
    }


def run(name: str, study: Study, timing: Timing, interactive: bool = False, command: str | None = None) -> None:
    """Measures one of `BENCHMARKS`: a JSON object on standard output, an account of it on standard error.

    `interactive`: see `serve`. Raises `InputError` for a benchmark that there is not, a study that it cannot run, and
    where memory does not suffice."""
    if name not in BENCHMARKS:
        raise InputError(f"What to measure must be one of {', '.join(BENCHMARKS)} and quality; found {name!r}.")
    if name in ("rl", "rollout") and study.config.prompts.max_new_tokens < 2:
        raise InputError("prompts.max_new_tokens is 1; decoding is measured on at least 2 tokens.")
    try:
        with jax.set_mesh(study.mesh), compilations() as compiled:
            if interactive:
                serve(name, study, timing, compiled)
                return
            report = {"command": command, **measure(name, study, timing, compiled)}
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error) or "ut of memory" in str(error):
            raise InputError(
                "The benchmark ran out of memory; lower rl.activations or the batch of sft.av or sft.ar, raise "
                "rl.micro_batches or rl.rollout_chunks, or set compute.remat=nothing_saveable, sft.av.lora.rank, "
                "sft.ar.lora.rank or a larger mesh."
            ) from None
        raise
    print(account(report), file=sys.stderr)
    print(json.dumps(report))


def warm_up(name: str, study: Study, timing: Timing, compiled: list[float]) -> tuple[Benchmark, dict]:
    """The benchmark after its steps of warm-up, and what compiling and warming up took."""
    start = time.perf_counter()
    benchmark = BENCHMARKS[name](study)
    steps = [timed_step(benchmark, study.mesh)["seconds"] for _ in range(timing.warmup)]
    return benchmark, {
        "programs": len(compiled),
        "compile_seconds": sum(compiled),
        "first_step_seconds": steps[0],
        "start_seconds": time.perf_counter() - start,
    }


def serve(name: str, study: Study, timing: Timing, compiled: list[float]) -> None:
    """Warms up, prints a line with the shapes, then runs one step for each line on standard input.

    Another program can so alternate between this side and another one."""
    benchmark, start = warm_up(name, study, timing, compiled)
    print(json.dumps({"ready": True, "shapes": shapes(study, timing)} | start), flush=True)
    for _ in sys.stdin:
        print(json.dumps(timed_step(benchmark, study.mesh)), flush=True)


def measure(name: str, study: Study, timing: Timing, compiled: list[float]) -> dict:
    """The report of one benchmark."""
    mesh = study.mesh
    benchmark, start = warm_up(name, study, timing, compiled)
    steps = [timed_step(benchmark, mesh) for _ in range(timing.steps)]
    late = len(compiled) - start["programs"]
    memory, whose = peak_memory(mesh)

    spread = lambda x: {"median": statistics.median(x), "min": min(x)}
    phases = {phase: spread([step["phases"][phase] for step in steps]) for phase in benchmark.work}
    seconds = spread([step["seconds"] for step in steps])
    more = benchmark.more({phase: x["median"] for phase, x in phases.items()})
    work, samples, tokens = benchmark.work, benchmark.samples, benchmark.tokens
    del benchmark  # and its arrays: the machine is measured next
    peak = (timing.peak_tflops * 1e12 or measured_peak(study.verbalizer.model.config.dtype)) * mesh.size
    bandwidth = (timing.bandwidth_gbs * 1e9 or measured_bandwidth()) * mesh.size
    device = mesh.devices.flat[0]
    return {
        "program": name,
        "shapes": shapes(study, timing),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": {"platform": device.platform, "kind": device.device_kind, "count": mesh.size},
        "jax": jax.__version__,
        "seconds": {"step": seconds, "phases": phases},
        "unaccounted": statistics.median(1 - sum(step["phases"].values()) / step["seconds"] for step in steps),
        "samples_per_second": samples / seconds["median"],
        "tokens_per_second": tokens / seconds["median"],
        **utilisation(work, samples, seconds["median"], phases, peak),
        "peak_flops": {"value": peak, "source": "given" if timing.peak_tflops else "measured"},
        "bandwidth": {"value": bandwidth, "source": "given" if timing.bandwidth_gbs else "measured"},
        "bound": {phase: bound(part, phases[phase]["median"], peak, bandwidth) for phase, part in work.items()},
        "peak_memory_bytes": memory,
        "peak_memory_of": whose,
        **start,
        "programs_compiled_while_timed": late,
        **with_bandwidth(more, bandwidth),
    }


def shapes(study: Study, timing: Timing) -> dict:
    """The sizes that a benchmark's figures depend on, by name."""
    c, av, ar, p = study.config, study.verbalizer, study.reconstructor, study.config.plan
    model, rank = av.model.config, lambda lora: lora.rank if lora else 0
    return {
        "family": model.family,
        "vocab": model.vocab_size,
        "width": model.width,
        "layers": model.layers,
        "heads": model.heads,
        "kv_heads": model.kv_heads,
        "head_dim": model.head_dim,
        "mlp_width": model.mlp_width,
        "untied_head": not model.tied_head,
        "ar_blocks": ar.model.config.layers,
        "prefix": p.prefix,
        "suffix": p.suffix,
        "response": c.prompts.max_new_tokens,
        "ar_prefix": p.text_prefix,
        "ar_suffix": p.text - p.text_prefix,
        "ar_length": study.text_width,
        "activations": c.rl.activations,
        "group": c.rl.group,
        "kl": c.rl.kl_coefficient,
        "av_batch": c.sft.av.batch,
        "ar_batch": c.sft.ar.batch,
        "document": c.extract.max_tokens,
        "positions": c.extract.positions,
        "av_lora": rank(av.lora),
        "ar_lora": rank(ar.lora),
        "dtype": c.compute.dtype,
        "remat": c.compute.remat,
        "attention": c.compute.attention,
        "micro_batches": c.rl.micro_batches,
        "rollout_chunks": c.rl.rollout_chunks,
        **study.mesh.shape,
        "seed": c.seed,
        **dataclasses.asdict(timing),
    }


def utilisation(work: dict[str, Work], samples: int, step: float, phases: dict, peak: float) -> dict:
    """FLOPs per sample and the share of the peak that they reach, of each phase and of the step (`step` seconds)."""
    flops = {phase: part.flops for phase, part in work.items() if part.flops}
    total = sum(flops.values())
    of_phases = {phase: x / phases[phase]["median"] / peak for phase, x in flops.items()}
    return {
        "flops_per_sample": {phase: x / samples for phase, x in flops.items()} | {"step": total / samples},
        "mfu": of_phases | {"step": total / step / peak},
    }


def with_bandwidth(more: dict, bandwidth: float) -> dict:
    """The further figures; those of decoding with the share of the bandwidth that it reaches."""
    if "decode" not in more:
        return more
    decode = more["decode"]
    needed, taken = sum(decode["bytes_per_step"].values()) / bandwidth, decode["seconds_per_step"]
    return more | {"decode": decode | {"bandwidth_fraction": needed / taken if taken else None}}


def bound(work: Work, seconds: float, peak: float, bandwidth: float) -> dict:
    """What limits a phase.

    "host" where nothing runs on the device. "compute" or "bandwidth": whichever of arithmetic and memory needs longer
    for the work that cannot be avoided. "overhead" where that is less than a tenth of the time. `reached`: its share of
    the time."""
    if not work.flops and not work.bytes:
        return {"by": "host", "arithmetic_seconds": 0.0, "memory_seconds": 0.0, "reached": 0.0}
    arithmetic, memory = work.flops / peak, work.bytes / bandwidth
    reached = max(arithmetic, memory) / seconds
    by = "overhead" if reached < 0.1 else "compute" if arithmetic > memory else "bandwidth"
    return {"by": by, "arithmetic_seconds": arithmetic, "memory_seconds": memory, "reached": reached}


def account(r: dict) -> str:
    """The report in words."""
    device, step = r["device"], r["seconds"]["step"]
    lines = [
        f"{r['program']} on {device['count']} × {device['kind']} ({device['platform']}), {r['shapes']['dtype']}, "
        f"jax {r['jax']}",
        f"step {step['median']:.4g} s (best {step['min']:.4g}): {r['samples_per_second']:.4g} samples/s, "
        f"{r['tokens_per_second']:.5g} tokens/s",
    ]
    for name, phase in r["seconds"]["phases"].items():
        text = f"  {name:<9} {phase['median']:8.4g} s  {phase['median'] / step['median']:6.1%}  "
        lines.append(text + _reason(r["bound"][name]))
    lines.append(f"  not accounted for  {r['unaccounted']:.1%}")
    if r["flops_per_sample"]["step"]:
        parts = ", ".join(f"{name} {x / 1e9:.4g}" for name, x in r["flops_per_sample"].items())
        fractions = ", ".join(f"{name} {x:.1%}" for name, x in r["mfu"].items())
        lines += [f"GFLOP a sample: {parts}", f"MFU: {fractions}"]
    for name, unit, scale in (("peak_flops", "TFLOP/s", 1e12), ("bandwidth", "GB/s", 1e9)):
        lines.append(f"{name.replace('_flops', '')} {r[name]['value'] / scale:.4g} {unit} ({r[name]['source']})")
    if decode := r.get("decode"):
        parts = " + ".join(f"{name} {x / 1e6:.4g}" for name, x in decode["bytes_per_step"].items())
        taken = "too short to measure"
        if decode["seconds_per_step"]:
            taken = (
                f"{decode['seconds_per_step'] * 1e3:.4g} ms each, {decode['bandwidth_fraction']:.1%} of the bandwidth"
            )
        lines.append(
            f"decoding: {decode['steps']} steps of {decode['rows']} rows after the first token's "
            f"{decode['first_token_seconds']:.4g} s; {taken}; a step reads {parts} MB"
        )
    if "file_bytes" in r:
        lines.append(f"{r['file_bytes'] / 1e6:.4g} MB at {r['file_bytes_per_second'] / 1e9:.3g} GB/s")
    lines.append(
        f"peak memory {r['peak_memory_bytes'] / 2**20:,.0f} MiB (of the {r['peak_memory_of']}); first step "
        f"{r['first_step_seconds']:.3g} s; {r['programs']} programs compiled in {r['compile_seconds']:.3g} s"
    )
    if late := r["programs_compiled_while_timed"]:
        lines.append(f"{late} programs were compiled while timed: raise --warmup.")
    return "\n".join(lines)


def _reason(b: dict) -> str:
    if b["by"] == "host":
        return "bound by the host: nothing runs on the device"
    least = (
        f"arithmetic needs {b['arithmetic_seconds']:.3g} s at the peak, weights and cache {b['memory_seconds']:.3g} s"
    )
    rest = "the rest is intermediate results, small operations and dispatch"
    return f"bound by {b['by']}: {least}, which is {b['reached']:.0%} of the time; {rest}"
