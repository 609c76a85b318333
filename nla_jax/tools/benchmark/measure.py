"""Runs a program, and accounts for its time.

The compile cache is left off, so that `compile_seconds` are those of a first run.
"""

import argparse
import dataclasses
import datetime
import json
import resource
import statistics
import sys
import time

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from nla_jax.models.sharding import make_mesh
from nla_jax.runtime.compiler import compilations
from nla_jax.runtime.errors import InputError
from nla_jax.tools.benchmark.programs import BUILDERS, Clock, Program, Work
from nla_jax.tools.benchmark.settings import Settings


def peak_memory(mesh: Mesh) -> tuple[int, str]:
    """The most memory that was ever in use, and whose: the fullest device's, else the process's largest resident set."""
    stats = [device.memory_stats() for device in mesh.devices.flat]
    if all(stats):
        return max(x["peak_bytes_in_use"] for x in stats), "device"
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, "process"  # Linux counts in KiB


def measured_peak(dtype) -> float:
    """FLOPs a second of a large matrix product on the first device: the best of five."""
    n = 2048 if jax.default_backend() == "cpu" else 8192
    x = jax.random.normal(jax.random.key(0), (n, n), dtype)  # equal entries would save a GPU power, and flatter it
    return 2 * n**3 / _best(jax.jit(lambda x: x @ x), x, keep=True)


def measured_bandwidth() -> float:
    """Bytes a second of adding to a large array in place (read and write) on the first device: the best of five."""
    n = 1 << (26 if jax.default_backend() == "cpu" else 29)
    return 2 * 4 * n / _best(jax.jit(lambda x: x + 1, donate_argnums=0), jnp.ones(n, jnp.float32))


def _best(function, x, keep: bool = False) -> float:
    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        y = jax.block_until_ready(function(x))
        seconds.append(time.perf_counter() - start)
        x = x if keep else y
    return min(seconds[1:])


def timed_step(program: Program, mesh: Mesh) -> dict:
    """Runs one step and describes it."""
    clock, start = Clock(), time.perf_counter()
    metrics = program.step(clock)
    seconds = time.perf_counter() - start
    return {
        "seconds": seconds,
        "phases": dict(clock),
        "samples_per_second": program.samples / seconds,
        "peak_memory_bytes": peak_memory(mesh)[0],
        "metrics": {name: float(value) for name, value in metrics.items()},
    }


def run(arguments: argparse.Namespace) -> None:
    """`nla benchmark`: a JSON object on standard output and an account of it on standard error.

    Raises `InputError` for wrong flags, and where memory does not suffice."""
    given = vars(arguments)
    s = Settings.read(given)
    mesh = make_mesh(s.data, s.fsdp, s.tensor)
    try:
        with jax.set_mesh(mesh), compilations() as compiled:
            if s.interactive:
                serve(s, mesh, compiled)
                return
            report = {"command": given.get("command"), **measure(s, mesh, compiled)}
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error) or "ut of memory" in str(error):
            raise InputError(
                "The benchmark ran out of memory; lower --activations or --batch, raise --micro-batches or "
                "--rollout-chunks, or set --remat nothing_saveable, --av-lora, --ar-lora or a larger mesh."
            ) from None
        raise
    print(account(report), file=sys.stderr)
    print(json.dumps(report))


def warm_up(s: Settings, mesh: Mesh, compiled: list[float]) -> tuple[Program, dict]:
    """The program after its steps of warm-up, and what compiling and warming up took."""
    start = time.perf_counter()
    program = BUILDERS[s.program](s, mesh)
    steps = [timed_step(program, mesh)["seconds"] for _ in range(s.warmup)]
    return program, {
        "programs": len(compiled),
        "compile_seconds": sum(compiled),
        "first_step_seconds": steps[0],
        "start_seconds": time.perf_counter() - start,
    }


def serve(s: Settings, mesh: Mesh, compiled: list[float]) -> None:
    """One step for each line on standard input, so that another program can alternate between this side and another one."""
    program, start = warm_up(s, mesh, compiled)
    print(json.dumps({"ready": True} | start), flush=True)
    for _ in sys.stdin:
        print(json.dumps(timed_step(program, mesh)), flush=True)


def measure(s: Settings, mesh: Mesh, compiled: list[float]) -> dict:
    """The report of one benchmark."""
    program, start = warm_up(s, mesh, compiled)
    steps = [timed_step(program, mesh) for _ in range(s.steps)]
    late = len(compiled) - start["programs"]
    memory, whose = peak_memory(mesh)

    spread = lambda x: {"median": statistics.median(x), "min": min(x)}
    phases = {name: spread([step["phases"][name] for step in steps]) for name in program.work}
    seconds = spread([step["seconds"] for step in steps])
    more = program.more({name: phase["median"] for name, phase in phases.items()})
    work, samples, tokens = program.work, program.samples, program.tokens
    del program  # and its arrays: the machine is measured next
    peak = (s.peak_tflops * 1e12 or measured_peak(s.dtype)) * s.devices
    bandwidth = (s.bandwidth_gbs * 1e9 or measured_bandwidth()) * s.devices
    if "decode" in more:
        decode = more["decode"]
        needed, taken = sum(decode["bytes_per_step"].values()) / bandwidth, decode["seconds_per_step"]
        decode["bandwidth_fraction"] = needed / taken if taken else None

    flops = {name: part.flops for name, part in work.items() if part.flops}
    device = mesh.devices.flat[0]
    return {
        "program": s.program,
        "shapes": {
            name: value for name, value in dataclasses.asdict(s).items() if name not in ("program", "interactive")
        },
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": {"platform": device.platform, "kind": device.device_kind, "count": s.devices},
        "jax": jax.__version__,
        "seconds": {"step": seconds, "phases": phases},
        "unaccounted": statistics.median(1 - sum(step["phases"].values()) / step["seconds"] for step in steps),
        "samples_per_second": samples / seconds["median"],
        "tokens_per_second": tokens / seconds["median"],
        "flops_per_sample": {name: x / samples for name, x in flops.items()} | {"step": sum(flops.values()) / samples},
        "mfu": {name: x / phases[name]["median"] / peak for name, x in flops.items()}
        | {"step": sum(flops.values()) / seconds["median"] / peak},
        "peak_flops": {"value": peak, "source": "given" if s.peak_tflops else "measured"},
        "bandwidth": {"value": bandwidth, "source": "given" if s.bandwidth_gbs else "measured"},
        "bound": {name: bound(part, phases[name]["median"], peak, bandwidth) for name, part in work.items()},
        "peak_memory_bytes": memory,
        "peak_memory_of": whose,
        **start,
        "programs_compiled_while_timed": late,
        **more,
    }


def bound(work: Work, seconds: float, peak: float, bandwidth: float) -> dict:
    """What limits a phase: the host; or whichever of arithmetic ("compute") and memory ("bandwidth") needs longer for the
    work that cannot be avoided; or "overhead", where that is not a tenth of the time. `reached`: its part of the time."""
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
        f"{r['program']} on {device['count']} × {device['kind']} ({device['platform']}), {r['shapes']['dtype']}, jax {r['jax']}",
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
            f"decoding: {decode['steps']} steps of {decode['rows']} rows behind the first token's "
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
