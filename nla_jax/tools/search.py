"""Which mesh to take: plans of RL on every mesh of a slice, those that fit first, the fastest first."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import jax

from nla_jax.config import Config
from nla_jax.config import Mesh as MeshSettings
from nla_jax.models.sharding import TRAIN, ways
from nla_jax.runtime.distributed import source_hash
from nla_jax.runtime.errors import InputError
from nla_jax.runtime.metrics import Progress
from nla_jax.study import Program
from nla_jax.tools.plan import RL, describe, plan_program, programs_of
from nla_jax.tools.topology import GiB, Slice, factorisations, mesh_over


def least_memory(programs: dict[str, tuple[Program, Any]]) -> float:
    """Bytes that RL needs of a device whatever the compiler does."""
    return max(programs[name][0].least_memory for name in RL)


class Plans:
    """Plans of RL for one config on the meshes of a slice.

    Every program that is compiled goes to `file`, one JSON object a line, and is not compiled again: an interrupted
    search continues there."""

    def __init__(self, config: Config, place: Slice, file: Path):
        self.config, self.place, self.file = config, place, file
        self.basis = _basis(config, place)
        self.known = _read(file, self.basis)

    def at(self, sizes: tuple[int, int, int], micro: int) -> dict:
        """The plan for a mesh and a number of micro-batches; it ends with the first program that does not fit."""
        rl = dataclasses.replace(self.config.rl, micro_batches=micro)
        changed = dataclasses.replace(self.config, mesh=MeshSettings(*sizes), rl=rl)
        mesh, plans, programs = mesh_over(self.place.devices, sizes), {}, None
        for name in RL:
            key = name, *sizes, micro if name == "joint_step" else 0
            if key not in self.known:
                programs = programs or programs_of(changed, mesh)
                self._learn(key, plan_program(*programs[name], self.place))
            plans[name] = self.known[key]
            if not plans[name]["fits"]:
                break
        return describe(changed, self.place, mesh, plans)

    def _learn(self, key: tuple, result: dict) -> None:
        self.known[key] = result
        with open(self.file, "a") as stream:
            stream.write(json.dumps({"basis": self.basis, "key": key, "result": result}) + "\n")

    def fewest_micro_batches(self, sizes: tuple[int, int, int], micro: list[int], start: int) -> dict:
        """The plan for a mesh with the fewest of the numbers `micro` that fit; one that does not fit where none does.

        A single micro-batch has one set of gradients, several have two: one may fit where two do not. Among several,
        `start` is the first guess; from there downwards while it fits, upwards until it does."""
        best = self.at(sizes, micro[0])
        if fits(best) or len(micro) == 1 or "joint_step" not in best["programs"]:
            return best
        i = max(j for j, n in enumerate(micro) if n <= start or j == 1)
        best = self.at(sizes, micro[i])
        while fits(best) and i > 1 and fits(smaller := self.at(sizes, micro[i - 1])):
            best, i = smaller, i - 1
        while not fits(best) and i + 1 < len(micro):
            i += 1
            best = self.at(sizes, micro[i])
        return best


def fits(plan: dict) -> bool:
    """Whether all programs of an RL step fit."""
    return plan.get("rl", {}).get("fits", False)


def speed(plan: dict) -> float:
    """Projected samples per second of an RL step; 0 where it is not known."""
    return plan.get("rl", {}).get("projected_samples_per_second", 0.0)


def search(config: Config, place: Slice, file: Path) -> list[dict]:
    """Plans of RL on every mesh of all devices on which it could fit, those that fit first, the fastest first.

    Each has the fewest micro-batches that fit, which gather the weights least often. A mesh that does not divide the
    model, or whose arguments alone exceed a device's memory, is skipped without compiling. `file`: see `Plans`."""
    plans, found, start = Plans(config, place, file), [], 1
    meshes = candidates(config, place)
    progress = Progress("search", len(meshes))
    for sizes, micro in meshes:
        best = plans.fewest_micro_batches(sizes, micro, start)
        start = best["micro_batches"] if fits(best) else start
        found.append(best)
        progress.update(micro_batches=best["micro_batches"], samples_per_second=speed(best))
    progress.close()
    return sorted(found, key=lambda plan: (fits(plan), speed(plan)), reverse=True)


def candidates(config: Config, place: Slice) -> list[tuple[tuple[int, int, int], list[int]]]:
    """The meshes worth compiling for, smallest tensor axis first.

    Each comes with the numbers of micro-batches that give every device rows of its own."""
    A, B, found = config.rl.activations, config.rl.activations * config.rl.group, []
    for sizes in sorted(factorisations(len(place.devices)), key=lambda sizes: (sizes[2], sizes[0])):
        mesh = mesh_over(place.devices, sizes)
        micro = [n for n in range(1, A + 1) if A % n == 0 and B // n % ways(mesh, dict(TRAIN)["batch"]) == 0]
        try:
            if micro and least_memory(programs_of(config, mesh)) <= place.chip.memory:
                found.append((sizes, micro))
        except InputError:  # the mesh does not divide the model
            continue
    return found


def _basis(config: Config, place: Slice) -> str:
    """A hash of everything that a compiled program depends on, except mesh and micro-batches."""
    settings = config.to_dict() | {"mesh": None, "devices": place.name}
    settings |= {"jax": jax.__version__, "source": source_hash()}
    settings["rl"]["micro_batches"] = None
    return hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=8).hexdigest()


def _read(file: Path, basis: str) -> dict[tuple, dict]:
    """The results of a file that have this basis, by key. A last line that was cut short by a kill is removed."""
    file.parent.mkdir(parents=True, exist_ok=True)
    text = file.read_text() if file.exists() else ""
    if not text.endswith("\n"):
        text = text[: text.rfind("\n") + 1]
        file.write_text(text)
    lines = map(json.loads, text.splitlines())
    return {tuple(line["key"]): line["result"] for line in lines if line["basis"] == basis}


def ranking(plans: list[dict]) -> str:
    """The plans of a search in Markdown."""
    lines = [
        "| data,fsdp,tensor | micro-batches | fits | GiB a device: relayout, rollout, joint_step | samples/s "
        "| joint_step MFU | bound by |",
        "|---|---|---|---|---|---|---|",
    ]
    for p in plans:
        programs, rl = p["programs"], p.get("rl", {})
        memory = ", ".join(f"{x['memory_total'] / GiB:.1f}" if "memory" in x else "too much" for x in programs.values())
        shown = "| | | |"
        if rl:
            step = programs["joint_step"]
            speed = rl["projected_samples_per_second"]
            shown = f"| {speed:.3g} | {100 * step['projected_mfu']:.0f} % | {step['bound_by']} |"
        mesh = ",".join(str(n) for n in p["mesh"].values())
        lines.append(f"| {mesh} | {p['micro_batches']} | {'yes' if rl.get('fits') else 'no'} | {memory} {shown}")
    return "\n".join(lines)
