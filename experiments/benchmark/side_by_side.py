"""This package against the PyTorch version of the same work, on a CPU, in one run of alternating turns.

    python experiments/benchmark/side_by_side.py --rounds 4
    python experiments/benchmark/side_by_side.py --rounds 4 --plain-malloc
    python experiments/benchmark/side_by_side.py --config configs/benchmark.py:smollm2 --torch-dtype bfloat16 \
        --config.compute.dtype=auto --config.rl.activations=8

The shapes of both sides are those of the config; our side says them to the other one.
Every side is a process of its own on the same `--threads` CPUs; ours samples in as many chunks. The sides start and
warm up one after the other; then in each round each has its turn of `--turn` steps, while the others wait for input.
Prints Markdown tables; writes them and all figures to `OUT.md` and `OUT.json`. Seconds to be ready are from the start
of the process to the end of its warm-up, imports and compilation included.

Each turn begins with a step that does not count, because training knows no pauses: behind the turns of others the first
step pays for having memory again, most likely from the virtual machine's host (XLA's side, which frees its memory after
each step; see LOG.md).

Both sides run with MALLOC_MMAP_THRESHOLD_ and MALLOC_TRIM_THRESHOLD_ at 10000000000: otherwise glibc gives every large
array back to the system and pays for its pages again in the next operation. `--plain-malloc` leaves these out.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "10000000000", "MALLOC_TRIM_THRESHOLD_": "10000000000"}
# Our names of the shapes, and those of the PyTorch side where it has others.
TORCH_NAMES = {"mlp_width": "ffn", "ar_blocks": "ar_layers", "kl": "kl_coefficient", "av_batch": "batch"}
SHARED = (
    "family",
    "vocab",
    "width",
    "layers",
    "heads",
    "kv_heads",
    "head_dim",
    "mlp_width",
    "ar_blocks",
    "prefix",
    "ar_prefix",
    "ar_suffix",
    "activations",
    "group",
    "response",
    "kl",
    "av_batch",
    "document",
    "positions",
)
OURS, TORCH, ON_POLICY = "nla_jax", "PyTorch", "PyTorch without old log-probs"
COMPARISONS = {"rl": (OURS, TORCH, ON_POLICY), "sft_av": (OURS, TORCH), "extract": (OURS, TORCH)}
LABELS = {"sft_av": ["--config.prompts.max_new_tokens=122"]}  # labels are longer than the responses of `rl`


class Worker:
    """One side: a process that runs a step and describes it in a line of JSON whenever it is given a line."""

    def __init__(self, side: str, command: list[str], environment: dict[str, str]):
        self.side, start = side, time.perf_counter()
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.ready = self._receive()
        self.ready["seconds_to_ready"] = time.perf_counter() - start
        self.steps: list[dict] = []

    def turn(self, steps: int) -> None:
        """So many steps, behind one that does not count."""
        for i in range(steps + 1):
            self.process.stdin.write("\n")
            self.process.stdin.flush()
            step = self._receive()
            self.steps += [step] * (i > 0)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()

    def _receive(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.side} ended with status {self.process.wait()}; its last words stand above.")
        return json.loads(line)

    def summary(self) -> dict:
        """Medians of its steps, and the steps themselves."""
        seconds = [step["seconds"] for step in self.steps]
        return {
            "median_seconds": statistics.median(seconds),
            "min_seconds": min(seconds),
            "samples_per_second": statistics.median(step["samples_per_second"] for step in self.steps),
            "phases": {
                name: statistics.median(step["phases"][name] for step in self.steps) for name in self.steps[0]["phases"]
            },
            "peak_memory_bytes": max(step["peak_memory_bytes"] for step in self.steps),
            "ready": self.ready,
            "steps": self.steps,
        }


def our_command(program: str, args: argparse.Namespace) -> list[str]:
    """Our side: the config, changed by what the comparison needs and then by what the user asks for."""
    chunks = f"--config.rl.rollout_chunks={args.threads}"
    command = [sys.executable, "-m", "nla_jax.cli", "benchmark", program, "--config", args.config]
    flags = [f"--warmup={args.warmup}", "--interactive", chunks]
    return command + flags + LABELS.get(program, []) + args.overrides


def torch_command(side: str, program: str, shapes: dict, args: argparse.Namespace) -> list[str]:
    """The PyTorch side, at the shapes that our side says it has."""
    command = [sys.executable, str(HERE / "pytorch_baseline.py"), program, f"--threads={args.threads}"]
    command += [f"--warmup={args.warmup}", "--interactive", f"--dtype={args.torch_dtype}"]
    command += ["--no-old-logprobs"] * (side == ON_POLICY) + ["--untied-head"] * shapes["untied_head"]
    # There the suffix does not count the marker, and labels have a length of their own.
    wanted = {TORCH_NAMES.get(name, name): shapes[name] for name in SHARED}
    wanted |= {"suffix": shapes["suffix"] - 1, "sft_response": shapes["response"]}
    return command + [f"--{name.replace('_', '-')}={value}" for name, value in wanted.items()]


def environment(args: argparse.Namespace) -> dict[str, str]:
    """That of every side: CPU, as many threads, nothing compiled earlier."""
    inherited = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    own = {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": str(args.threads)}
    return inherited | own | ({} if args.plain_malloc else MALLOC)


def compare(program: str, args: argparse.Namespace) -> dict:
    """Summaries of all sides of one comparison, after alternating turns."""
    workers = []
    try:
        for side in [side for side in COMPARISONS[program] if side != ON_POLICY or not args.without_on_policy]:
            print(f"{program}: {side} starts", file=sys.stderr)
            if side == OURS:  # the first one
                command = our_command(program, args)
            else:
                command = torch_command(side, program, workers[0].ready["shapes"], args)
            workers.append(Worker(side, command, environment(args)))
        for i in range(args.rounds):
            first = i % len(workers)
            for worker in workers[first:] + workers[:first]:
                worker.turn(args.turn)
            seconds = lambda worker: ", ".join(f"{step['seconds']:.2f}" for step in worker.steps[-args.turn :])
            last = "; ".join(f"{worker.side} {seconds(worker)} s" for worker in workers)
            print(f"{program}: round {i + 1} of {args.rounds}: {last}", file=sys.stderr)
    finally:
        for worker in workers:
            worker.close()
    sides = {worker.side: worker.summary() for worker in workers}
    for side in sides.values():
        side["times_nla_jax"] = side["median_seconds"] / sides[OURS]["median_seconds"]
    return sides


def table(program: str, sides: dict) -> str:
    """One comparison in Markdown."""
    head = ("side", "median s", "min s", "samples/s", "time / nla_jax's", "peak memory", "ready after")
    rows = [
        (
            name,
            f"{side['median_seconds']:.3f}",
            f"{side['min_seconds']:.3f}",
            f"{side['samples_per_second']:.2f}",
            f"{side['times_nla_jax']:.2f}",
            f"{side['peak_memory_bytes'] / 2**20:,.0f} MiB",
            f"{side['ready']['seconds_to_ready']:.1f} s",
        )
        for name, side in sides.items()
    ]
    lines = [f"| {' | '.join(row)} |" for row in (head, ("---", *["---:"] * (len(head) - 1)), *rows)]
    phases = [
        f"{name}: " + ", ".join(f"{phase} {seconds:.3f} s" for phase, seconds in side["phases"].items()) + "."
        for name, side in sides.items()
    ]
    return "\n".join([f"### {program}", "", *lines, "", "Phases (medians). " + " ".join(phases), ""])


def machine() -> dict:
    """Where the figures come from."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    versions = {name: importlib.metadata.version(name) for name in ("jax", "flax", "torch", "transformers")}
    return {
        "processor": models[0] if models else platform.machine(),
        "cpus": os.cpu_count(),
        "load_average": os.getloadavg(),
        "system": platform.platform(),
        "python": platform.python_version(),
        **versions,
    }


def positive(text: str) -> int:
    """A number of turns or steps, as `argparse` reads it."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, found {text}")
    return int(text)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=positive, default=5, help="turns of each side")
    parser.add_argument("--turn", type=positive, default=3, help="timed steps of a turn")
    parser.add_argument("--warmup", type=int, default=1, help="steps of each side before them")
    parser.add_argument("--threads", type=int, default=2, help="CPUs that each side may use")
    parser.add_argument("--only", choices=COMPARISONS, help="one comparison (default: all)")
    parser.add_argument(
        "--torch-dtype", choices=("float32", "bfloat16"), default="float32", help="of PyTorch's weights and compute"
    )
    parser.add_argument("--without-on-policy", action="store_true", help=f"leaves out {ON_POLICY!r}, to save memory")
    parser.add_argument("--plain-malloc", action="store_true", help="glibc as it is, on both sides")
    parser.add_argument("--out", default=str(HERE / "results" / "cpu"), help="OUT.json and OUT.md are written")
    parser.add_argument(
        "--config", default="configs/benchmark.py", help="shapes of both sides; --config.FIELD=VALUE for single fields"
    )
    args, args.overrides = parser.parse_known_args()
    if wrong := [flag for flag in args.overrides if not flag.startswith("--config.") or "=" not in flag]:
        parser.error(f"{wrong[0]} is neither a flag of this script nor a --config.FIELD=VALUE.")
    return args


def main() -> None:
    args = parse_arguments()
    cpus = set(sorted(os.sched_getaffinity(0))[: args.threads])
    if len(cpus) < args.threads:
        raise SystemExit(f"There are {len(cpus)} CPUs, fewer than --threads {args.threads}.")
    os.sched_setaffinity(0, cpus)  # which the sides inherit; XLA takes a thread for each CPU that it may use
    command = shlex.join(["python", *sys.argv])
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    about = machine()
    programs = [args.only] if args.only else list(COMPARISONS)
    comparisons = {program: compare(program, args) for program in programs}

    malloc = "glibc's malloc as it is" if args.plain_malloc else " ".join(f"{k}={v}" for k, v in MALLOC.items())
    where = f"{about['processor']}, {args.threads} threads, jax {about['jax']}, torch {about['torch']} in {args.torch_dtype}"
    text = "\n".join(
        [f"`{command}`, {date}", "", f"{where}; {malloc}.", ""]
        + [table(program, sides) for program, sides in comparisons.items()]
    )
    print(text)
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    report = {"command": command, "date": date, "machine": about, "settings": vars(args), "comparisons": comparisons}
    out.with_name(out.name + ".json").write_text(json.dumps(report, indent=1) + "\n")
    out.with_name(out.name + ".md").write_text(text)


if __name__ == "__main__":
    main()
