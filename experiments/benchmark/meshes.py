"""What cutting one RL step over more devices costs and saves: eight CPU devices that share the same cores.

    python experiments/benchmark/meshes.py --rounds 2

The global batch is fixed. One process a mesh, all bound to the same CPUs; after their warm-up each has its turns of a
few steps, while the others wait. With the cores shared, a step takes as long on any mesh but for the overhead of
cutting it. A part of that is no fault of the mesh: eight small batches are more work than a large one (each reads all
weights, and its matrix products are smaller). So one device also works through the batch in eight parts of an eighth,
one after the other.

Memory is `nla plan`'s for one device: all that the step needs, from its compiled program. Prints Markdown tables,
writes them to `--out`.
"""

import argparse
import datetime
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

from side_by_side import HERE, MALLOC, ROOT, Worker, machine, positive

MESHES = ((1, 1, 1), (1, 2, 1), (8, 1, 1), (1, 8, 1), (2, 2, 2))
NLA = (sys.executable, "-m", "nla_jax.cli")
GROUP = 8  # samples of an activation, as `nla benchmark rl` has them


def environment(devices: int) -> dict[str, str]:
    """As many CPU devices.

    XLA's pool gets two threads more than devices, because threads wait for one another in collectives. One device keeps
    the default, a thread per core, which is fastest."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    flags = f"--xla_force_host_platform_device_count={devices}"
    threads = {"NPROC": str(devices + 2)} if devices > 1 else {}
    return os.environ | MALLOC | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags} | threads


def worker(mesh: tuple[int, ...], activations: int) -> Worker:
    sizes = [f"--config.mesh.{axis}={n}" for axis, n in zip(("data", "fsdp", "tensor"), mesh)]
    print(f"mesh {mesh} with {activations} activations starts", file=sys.stderr)
    command = [*NLA, "benchmark", "rl", *sizes, f"--config.rl.activations={activations}", "--interactive"]
    return Worker(str(mesh), command, environment(mesh[0] * mesh[1] * mesh[2]))


def measure(activations: int, rounds: int, turn: int) -> dict[tuple[int, ...] | None, float]:
    """Seconds of a step on each mesh; of None on one device in eight parts of an eighth of the batch."""
    workers = {}
    try:
        for mesh in MESHES:
            workers[mesh] = worker(mesh, activations)
        workers[None] = worker(MESHES[0], activations // 8)
        order = list(workers)
        for i in range(rounds):
            for mesh in order[i % len(order) :] + order[: i % len(order)]:
                workers[mesh].turn(turn)
            print(f"round {i + 1} of {rounds}", file=sys.stderr)
    finally:
        for w in workers.values():
            w.close()
    return {mesh: w.summary()["median_seconds"] * (1 if mesh else 8) for mesh, w in workers.items()}


def planned(mesh: tuple[int, ...]) -> dict[str, float]:
    """Bytes that a device needs for each program of the quickstart's RL step."""
    sizes = ",".join(map(str, mesh))
    command = [*NLA, "plan", "--json", "--mesh", sizes, "--programs", "rollout,joint_step"]
    done = subprocess.run(
        command, env=environment(mesh[0] * mesh[1] * mesh[2]), check=True, stdout=subprocess.PIPE, text=True
    )
    return {name: program["memory_total"] for name, program in json.loads(done.stdout)["programs"].items()}


def table(activations: int, seconds: dict, memory: dict) -> list[str]:
    """One batch in Markdown."""
    lines = [
        f"**{activations} activations, {activations * GROUP} samples a step**",
        "",
        "| mesh (data, fsdp, tensor) | devices | median s | time / one device's "
        "| planned MiB a device: joint step | rollout |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for mesh, s in seconds.items():
        name = ", ".join(map(str, mesh)) if mesh else "one device, eight parts in turn"
        devices = mesh[0] * mesh[1] * mesh[2] if mesh else 1
        planned = [f"{memory[mesh][program] / 2**20:,.0f}" if mesh else "" for program in ("joint_step", "rollout")]
        lines.append(f"| {name} | {devices} | {s:.2f} | {s / seconds[MESHES[0]]:.2f} | {' | '.join(planned)} |")
    return [*lines, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=positive, default=3, help="turns of each mesh")
    parser.add_argument("--turn", type=positive, default=3, help="timed steps of a turn")
    parser.add_argument(
        "--activations", type=int, nargs="+", default=[8, 32], help=f"of a step, {GROUP} samples each; multiples of 8"
    )
    parser.add_argument("--out", default=str(HERE / "results" / "meshes.md"), help="the tables are written there")
    args = parser.parse_args()
    if wrong := [n for n in args.activations if n < 8 or n % 8]:
        parser.error(f"--activations {wrong[0]} is no multiple of 8, so that eight devices cannot share them.")
    memory = {mesh: planned(mesh) for mesh in MESHES}
    about = machine()
    lines = [
        f"`{shlex.join(['python', *sys.argv])}`, {datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds')}",
        "",
        f"{about['processor']}, {about['cpus']} CPUs shared by all devices, jax {about['jax']}; the default shape of "
        "`nla benchmark rl` except for the batch; memory is that of the quickstart's RL step.",
        "",
    ]
    for activations in args.activations:
        lines += table(activations, measure(activations, args.rounds, args.turn), memory)
    Path(args.out).write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
