"""Which mesh to take: plans of RL on every mesh of a slice, those that fit first, the fastest first."""

import hashlib
import json
from pathlib import Path

import jax

from nla_jax.models.sharding import AXES, TRAIN, ways
from nla_jax.runtime.distributed import source_hash
from nla_jax.runtime.errors import InputError
from nla_jax.runtime.metrics import Progress
from nla_jax.tools.plan import RL, Task, describe, plan_program, tasks
from nla_jax.tools.topology import GiB, Slice, factorisations, mesh_over


def least_memory(all_tasks: dict[str, Task]) -> float:
    """Bytes that RL needs of a device whatever the compiler does."""
    return max(all_tasks[name].least_memory for name in RL)


def search(config, place: Slice, file: Path) -> list[dict]:
    """Plans of RL on every mesh of all devices on which it could fit, those that fit first, the fastest first. Each with the
    fewest micro-batches that fit, which gather the weights least often.

    A mesh that does not divide the model, or whose arguments alone outweigh a device, is passed over uncompiled. Every
    program that is compiled goes to `file`, one JSON object a line, and is not compiled again: an interrupted search continues
    there."""
    basis = _basis(config, place)
    known = _read(file, basis)

    def at(sizes: tuple[int, int, int], micro: int) -> dict:
        """The plan for a mesh and a number of micro-batches; it ends with the first program that does not fit."""
        changed, mesh = config.copy_and_resolve_references(), mesh_over(place.devices, sizes)
        changed.mesh.update(dict(zip(AXES, sizes)))
        changed.rl.micro_batches = micro
        programs, all_tasks = {}, None
        for name in RL:
            key = name, *sizes, micro if name == "train_step" else 0
            if key not in known:
                all_tasks = all_tasks or tasks(changed, mesh)
                known[key] = plan_program(all_tasks[name], place)
                with open(file, "a") as stream:
                    stream.write(json.dumps({"basis": basis, "key": key, "result": known[key]}) + "\n")
            programs[name] = known[key]
            if not programs[name]["fits"]:
                break
        return describe(changed, place, mesh, programs)

    fits = lambda result: result.get("rl", {}).get("fits", False)
    speed = lambda result: result.get("rl", {}).get("projected_samples_per_second", 0.0)
    meshes = candidates(config, place)
    progress, plans, start = Progress("search", len(meshes)), [], 1
    for sizes, micro in meshes:
        # One micro-batch has one set of gradients, others two: it may fit where they do not. Of those, what fitted the mesh before
        # is the first guess; from there downwards while it fits, upwards until it does.
        best, i = at(sizes, micro[0]), 0
        if not fits(best) and len(micro) > 1 and "train_step" in best["programs"]:
            i = max(j for j, n in enumerate(micro) if n <= start or j == 1)
            best = at(sizes, micro[i])
            while fits(best) and i > 1 and fits(smaller := at(sizes, micro[i - 1])):
                best, i = smaller, i - 1
            while not fits(best) and i + 1 < len(micro):
                i += 1
                best = at(sizes, micro[i])
        start = micro[i] if fits(best) else start
        plans.append(best)
        progress.update(micro_batches=micro[i], samples_per_second=speed(best))
    progress.close()
    return sorted(plans, key=lambda result: (fits(result), speed(result)), reverse=True)


def candidates(config, place: Slice) -> list[tuple[tuple[int, int, int], list[int]]]:
    """The meshes worth compiling for, smallest tensor axis first, each with the numbers of micro-batches that leave every
    device rows of its own."""
    A, B, found = config.rl.activations, config.rl.activations * config.rl.group, []
    for sizes in sorted(factorisations(len(place.devices)), key=lambda sizes: (sizes[2], sizes[0])):
        mesh = mesh_over(place.devices, sizes)
        micro = [n for n in range(1, A + 1) if A % n == 0 and B // n % ways(mesh, dict(TRAIN)["batch"]) == 0]
        try:
            if micro and least_memory(tasks(config, mesh)) <= place.chip.memory:
                found.append((sizes, micro))
        except InputError:  # the mesh does not divide the model
            continue
    return found


def _basis(config, place: Slice) -> str:
    """A hash of all that a compiled program depends on, but for mesh and micro-batches."""
    settings = json.loads(config.to_json_best_effort()) | {"mesh": None, "devices": place.name}
    settings |= {"jax": jax.__version__, "source": source_hash()}
    settings["rl"]["micro_batches"] = None
    return hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=8).hexdigest()


def _read(file: Path, basis: str) -> dict[tuple, dict]:
    """The results of a file that have this basis, by key; a last line that a kill cut short is removed."""
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
        "| data,fsdp,tensor | micro-batches | fits | GiB a device: relayout, rollout, train_step | samples/s | train_step MFU "
        "| bound by |",
        "|---|---|---|---|---|---|---|",
    ]
    for p in plans:
        programs, rl = p["programs"], p.get("rl", {})
        memory = ", ".join(f"{x['memory_total'] / GiB:.1f}" if "memory" in x else "too much" for x in programs.values())
        shown = "| | | |"
        if rl:
            step = programs["train_step"]
            speed = rl["projected_samples_per_second"]
            shown = f"| {speed:.3g} | {100 * step['projected_mfu']:.0f} % | {step['bound_by']} |"
        mesh = ",".join(str(n) for n in p["mesh"].values())
        lines.append(f"| {mesh} | {p['micro_batches']} | {'yes' if rl.get('fits') else 'no'} | {memory} {shown}")
    return "\n".join(lines)
