"""`nla quickstart` and the verbs of its stages: one stage of a run, or all of them."""

import argparse
import gc
import importlib
import json
import sys
from pathlib import Path

from nla_jax.io.files import AnyPath, path_to
from nla_jax.runtime.errors import InputError
from nla_jax.stages.table import STAGES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The working folder, and how several hosts find each other."""
    add_workdir(parser)
    hosts = parser.add_argument_group("several hosts", "Run the same command on each of them; see docs/running.md.")
    hosts.add_argument("--coordinator", help="HOST:PORT of host 0, or auto on a TPU pod or under Slurm")
    hosts.add_argument("--num_processes", type=int, help="number of processes")
    hosts.add_argument("--process_id", type=int, help="number of this process, from 0")
    hosts.add_argument("--join_seconds", type=int, default=300, help="seconds to wait for the others (default 300)")


def add_workdir(parser: argparse.ArgumentParser) -> None:
    """`--workdir`."""
    text = "where everything of this run is written, a folder or gs://BUCKET/FOLDER (default runs/NAME)"
    parser.add_argument("--workdir", help=text)


def workdir(arguments: argparse.Namespace) -> str:
    """The working folder that was asked for, else one named after the config. Raises `InputError` for an empty name, as
    `--workdir "$UNSET"` gives it, and where a file is in the way."""
    if arguments.workdir == "":
        raise InputError("--workdir is empty; name a folder, or leave it out.")
    name = arguments.workdir or str(Path("runs") / Path(arguments.config_file.partition(":")[0]).stem)
    if isinstance(place := path_to(name), Path):
        there = next(path for path in (place.absolute(), *place.absolute().parents) if path.exists())
        if not there.is_dir():
            raise InputError(f"The working folder {name} cannot be made: {there} is a file; use another --workdir.")
    return name


def run(arguments: argparse.Namespace) -> None:
    """Runs the stages that the verb names."""
    if arguments.verb == "report":
        draw(arguments)
        return
    from nla_jax.io.hub import locate
    from nla_jax.runtime import distributed
    from nla_jax.runtime.checkpoint import flat
    from nla_jax.runtime.compiler import enable_compile_cache, optimize, take_gpus_whole
    from nla_jax.runtime.run import Run, mesh_of
    from nla_jax.stages.check import check_batches, check_documents, check_functions, check_prompts
    from nla_jax.tools.precision import settled

    stages, folder = stages_of(arguments.verb, arguments.config), workdir(arguments)
    take_gpus_whole()
    distributed.join(arguments.coordinator, arguments.num_processes, arguments.process_id, arguments.join_seconds)
    arguments.config = settled(arguments.config, path_to(folder))
    check_functions(arguments.config, stages)
    check_batches(arguments.config, mesh_of(arguments.config), stages)
    check_begun(arguments.config, folder, stages[0])
    check_prompts(arguments.config, folder, stages)
    hide_library_warnings()
    enable_compile_cache()
    optimize(arguments.config.compute.optimize)
    settings = flat(json.loads(json.dumps(arguments.config.to_dict())))
    source = {"the source of nla_jax": distributed.source_hash()}
    distributed.agree({"the verb": arguments.verb} | source | settings, arguments.join_seconds)
    run = Run(arguments.config, folder, STAGES, arguments.command)
    with run.alone():
        if reads_corpus(run, stages):
            if run.config.subject.path:
                locate(run.subject_folder)  # a mistyped one is refused before minutes of preparing a corpus
            check_documents(run.config, run.documents())
        for stage in stages:
            arguments.stage = stage  # for the sentence that says where the run was stopped
            before = run.result(stage)
            module, _, function = STAGES[stage].run.partition(":")
            getattr(importlib.import_module(module), function)(run)
            result = run.result(stage)  # every host asks: they count such questions alike
            if result != before:
                gc.collect()  # what the stage held, on devices too, and nobody holds any more
            if distributed.is_writer():
                done = "already done" if result == before else "done"
                print(f"{stage}: {done} ({result['seconds']:.0f} s)", file=sys.stderr)
    if stages[-1] == "report" and distributed.is_writer():
        print_headline(run.workdir, result.get("warnings", []))
    distributed.leave()


def draw(arguments: argparse.Namespace) -> None:
    """`nla report`: draws the page of a run as it is now. Another process may be at work on it: so the verb takes neither
    the folder for itself nor the devices. Of several hosts the first one draws."""
    import jax

    from nla_jax.runtime.run import Run
    from nla_jax.stages.report import redraw
    from nla_jax.tools.precision import settled

    folder = workdir(arguments)
    check_begun(arguments.config, folder, "report")
    if arguments.process_id:
        return
    jax.config.update("jax_platforms", "cpu")
    run = Run(settled(arguments.config, path_to(folder)), folder, STAGES, arguments.command)
    arguments.stage = "report"
    warnings = redraw(run)
    if run.result("report"):
        print_headline(run.workdir, warnings)
    else:
        print_warnings(warnings)
        print(f"The run is not evaluated yet. Report: {run.workdir / 'report.html'}")


def hide_library_warnings() -> None:
    """TFDS warns of routine steps; Orbax prints errors that reach us as exceptions."""
    from absl import logging

    logging.set_verbosity(logging.FATAL)


def stages_of(verb: str, config) -> list[str]:
    """The stages that a verb runs. A subject from elsewhere needs no `pretrain`."""
    if verb != "quickstart":
        return [verb]
    return [name for name in STAGES if name != "pretrain" or not config.subject.path]


def check_begun(config, folder: str, stage: str) -> None:
    """Raises `InputError` where the stage starts from another one, and the folder is not there: its name is mistyped.

    On a bucket, which may not be reachable, the stage itself finds that out."""
    needs, place = STAGES[stage].needs, path_to(folder)
    begins = not needs or (needs == "pretrain" and config.subject.path)
    if not begins and isinstance(place, Path) and not place.exists():
        raise InputError(f"There is no working folder {folder}; run `nla {needs}` with the same flags first.")


def reads_corpus(run, stages: list[str]) -> bool:
    """Whether a stage that has not finished reads the documents of the corpus."""
    sources = any(run.config.extract.source.to_dict().values())
    reading = {"pretrain"} if sources else {"pretrain", "extract"}
    return any(run.result(stage) is None for stage in stages if stage in reading)


def print_headline(folder: AnyPath, warnings: list[str]) -> None:
    """The figures that everybody looks for first, below what makes them worth little."""
    from nla_jax.runtime.run import read_json
    from nla_jax.tools.report.pieces import interval

    s = read_json(folder / "summary.json", {}, "delete it, and the same command writes it again")
    print_warnings(warnings)
    controls = {"shuffled": "fve_shuffled", "no injection": "fve_no_injection", "empty": "fve_empty"}
    measured = ", ".join(f"{name} {s[key]:.3f}" for name, key in controls.items() if key in s)
    if "fve_rl" in s:
        before = f", {s['fve_warm']:.3f} before" if "fve_warm" in s else ""
        ends = interval(s["fve_rl_ci95"])
        beside = f"; {measured}" if measured else ""
        print(f"Held-out FVE {s['fve_rl']:.3f} (95 % interval {ends}) after RL{before}{beside}.")
    print(f"Report: {folder / 'report.html'}   Pair: {folder / 'pair'}")


def print_warnings(warnings: list[str]) -> None:
    """What makes the figures of a run worth little, a sentence a line."""
    for sentence in warnings:
        print(f"WARNING: {sentence}")
