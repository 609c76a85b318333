"""What cutting one RL step over more devices costs and saves: eight CPU devices that share the same cores.

    python experiments/benchmark/meshes.py --rounds 5

The global batch is fixed. One process a mesh, all bound to the same CPUs; after their warm-up each round runs one step of each,
while the others wait. With the cores shared, a step takes as long on any mesh but for the overhead of cutting it. Memory is
`nla plan`'s for one device: all that the step needs, from its compiled program. Prints a Markdown table, writes it to `--out`.
"""

import argparse
import datetime
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

from side_by_side import HERE, MALLOC, ROOT, Worker, machine

MESHES = ((1, 1, 1), (1, 2, 1), (8, 1, 1), (1, 8, 1), (2, 2, 2))
NLA = (sys.executable, "-m", "nla_jax.cli")


def environment(devices: int) -> dict[str, str]:
    """As many CPU devices. XLA's pool gets two threads more than devices, which wait for one another in collectives; one
    device keeps its default, a thread a core, which is fastest."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    flags = f"--xla_force_host_platform_device_count={devices}"
    threads = {"NPROC": str(devices + 2)} if devices > 1 else {}
    return os.environ | MALLOC | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags} | threads


def worker(mesh: tuple[int, ...]) -> Worker:
    sizes = [f"--{axis}={n}" for axis, n in zip(("data", "fsdp", "tensor"), mesh)]
    print(f"mesh {mesh} starts", file=sys.stderr)
    command = [*NLA, "benchmark", "rl", *sizes, "--interactive"]
    return Worker(str(mesh), command, environment(mesh[0] * mesh[1] * mesh[2]))


def planned(mesh: tuple[int, ...]) -> dict[str, float]:
    """Bytes that a device needs for each program of the quickstart's RL step."""
    sizes = ",".join(map(str, mesh))
    command = [*NLA, "plan", "--json", "--mesh", sizes, "--programs", "rollout,train_step"]
    done = subprocess.run(
        command, env=environment(mesh[0] * mesh[1] * mesh[2]), check=True, stdout=subprocess.PIPE, text=True
    )
    return {name: program["memory_total"] for name, program in json.loads(done.stdout)["programs"].items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each mesh")
    parser.add_argument("--out", default=str(HERE / "results" / "meshes.md"), help="the table is written there")
    args = parser.parse_args()
    memory = {mesh: planned(mesh) for mesh in MESHES}
    workers = {}
    try:
        for mesh in MESHES:
            workers[mesh] = worker(mesh)
        for i in range(args.rounds):
            for mesh in MESHES[i % len(MESHES) :] + MESHES[: i % len(MESHES)]:
                workers[mesh].step()
    finally:
        for w in workers.values():
            w.close()
    seconds = {mesh: w.summary()["median_seconds"] for mesh, w in workers.items()}
    about = machine()
    lines = [
        f"`{shlex.join(['python', *sys.argv])}`, {datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds')}",
        "",
        f"{about['processor']}, {about['cpus']} CPUs shared by all devices, jax {about['jax']}; 64 samples a step (the default shape of `nla benchmark rl`).",
        "",
        "| mesh (data, fsdp, tensor) | devices | median s | time / one device's | planned MiB a device: train step | rollout |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for mesh in MESHES:
        size = {name: f"{n / 2**20:,.0f}" for name, n in memory[mesh].items()}
        lines.append(
            f"| {', '.join(map(str, mesh))} | {mesh[0] * mesh[1] * mesh[2]} | {seconds[mesh]:.2f} "
            f"| {seconds[mesh] / seconds[MESHES[0]]:.2f} | {size['train_step']} | {size['rollout']} |"
        )
    Path(args.out).write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
