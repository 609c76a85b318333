"""The `nla` command."""

import argparse
import contextlib
import functools
import json
import operator
import os
import shlex
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

from absl import flags, logging
from ml_collections import ConfigDict, config_flags

from nla_jax.io.files import path_to, stand_in
from nla_jax.runtime import distributed
from nla_jax.runtime.errors import InputError, Stopped, Terminated, first_line, silence_unfinished_work

LOOP = ("pretrain", "extract", "label", "sft", "rl", "evaluate", "report")
STAGES = {
    "quickstart": "all of the following, in order",
    "pretrain": "train (or measure) the subject",
    "extract": "activations of the corpus, or of files given",
    "label": "explanations for the warm start",
    "sft": "supervised warm start of AV and AR",
    "rl": "joint training",
    "evaluate": "held-out FVE and its controls",
    "report": "summary.json and report.html",
}
DEFAULT_CONFIG = "configs/quickstart.py"
LEAST = {  # the lowest values that settings may have, where not every number means something
    "checkpoints.keep": 1, "watchdog.window": 1, "extract.positions": 1, "extract.max_tokens": 1, "extract.shard_documents": 1,
    "pretrain.batch": 1, "pretrain.length": 1, "pretrain.checkpoint_every": 1, "prompts.max_new_tokens": 1,
    "sft.checkpoint_every": 1, "sft.av.batch": 1, "sft.ar.batch": 1, "rl.activations": 1, "rl.group": 1, "rl.steps": 0,
    "sft.av.steps": 0, "sft.ar.steps": 0, "pretrain.steps": 0, "evaluate.temperature": 0.0,
    "rl.checkpoint_every": 1, "rl.heldout_every": 1, "rl.heldout_rows": 2, "evaluate.rows": 2, "evaluate.batch": 1,
    "rl.temperature": 1e-3, "watchdog.stall_minutes": 1e-3,
}  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Runs one verb; returns the exit status: 0; 1 after one sentence on standard error where an input is wrong or
    training has broken down; 143 where SIGTERM ended it and the same command continues. One of several hosts ends its process
    with that status instead."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        arguments, overrides = parser().parse_known_args(argv)
        allowed = "--config." if hasattr(arguments, "config") else ()
        if unknown := [flag for flag in overrides if not flag.startswith(allowed)]:
            raise InputError(f"Unknown argument {unknown[0]!r}; see `nla {arguments.verb} --help`.")
        arguments.overrides, arguments.command, arguments.stage = overrides, shlex.join(["nla", *argv]), None
        take_gpus_whole()
        if (here := os.getcwd()) not in sys.path:
            sys.path.append(here)  # a config may name functions of the user's, by import path
        with sigterm_raises():
            arguments.function(arguments)
        return 0
    except (InputError, OSError) as error:
        return failed(sentence(error), 1)
    except Stopped as stopped:
        return failed(str(stopped), stopped.status)
    except Terminated:
        kept = f" amid {arguments.stage}; its finished shards, texts and steps are kept, and the same command continues"
        return failed(f"stopped by SIGTERM{kept if arguments.stage else ''}.", 128 + signal.SIGTERM)
    except KeyboardInterrupt:
        continues = "; the same command continues from what is finished" if arguments.stage else ""
        return failed(f"stopped{continues}.", 130)
    except Exception as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            return failed(out_of_memory(error, arguments.stage), 1)
        if distributed.host_count() == 1:
            raise
        traceback.print_exc()
        if isinstance(error, RuntimeError):  # as `JaxRuntimeError` is
            return failed(distributed.lost(f"stopped in what all hosts do together ({first_line(error)})"), 1)
        return failed(repr(error), 1)


@contextlib.contextmanager
def sigterm_raises() -> Iterator[None]:
    """Inside, SIGTERM raises `Terminated`, but in training loops, which save their step first (`Checkpoints`), and where several
    hosts run: joining them hands the signal to JAX's preemption service, by which their loops agree on a step."""

    def raise_it(*_):
        raise Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, raise_it)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def failed(reason: str, status: int) -> int:
    """Says why a verb ended; returns the exit status, or where several hosts run ends the process with it."""
    distributed.end(reason, status)
    return status


def sentence(error: Exception) -> str:
    """What a user reads of an error: an operating system's (full disk, no permission) names the file and the reason."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'a file'}: {error.strerror}."
    return " ".join(str(error).split())


def out_of_memory(error: Exception, stage: str | None) -> str:
    """What a user reads where the devices' memory did not suffice."""
    smaller = {"sft": "a smaller sft.av.batch and sft.ar.batch", "rl": "more rl.micro_batches (8, say) and rl.rollout_chunks"}
    use = f"{smaller[stage]}, compute.remat=nothing_saveable, LoRA" if stage in smaller else "a smaller batch"
    return (
        f"The devices' memory does not hold {stage or 'this'} ({sentence(error).split('. ')[0]}); use {use}, or more devices; "
        "`nla plan` says what a config needs. What is finished is kept."
    )


def take_gpus_whole() -> None:
    """JAX would take three quarters of a GPU's memory; training may want nearly all. What the user has set stays."""
    names = "XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"  # the second is the older name
    if not any(name in os.environ for name in names):
        os.environ[names[0]] = "0.95"


def parser() -> argparse.ArgumentParser:
    """All verbs; each leads to the function that runs it."""
    parser = argparse.ArgumentParser(prog="nla", description="Natural language autoencoders in JAX.")
    parser.add_argument("--version", action=Version, nargs=0, help="versions of this package and of what it computes with")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name: str, function: Callable, text: str, **more) -> argparse.ArgumentParser:
        sub = verbs.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.", **more)
        sub.set_defaults(function=function)
        return sub

    def configured(name: str, function: Callable, text: str) -> argparse.ArgumentParser:
        sub = verb(name, function, text, epilog="--config.field=value overrides any field of the config.")
        sub.add_argument("--config", default=DEFAULT_CONFIG, help="config file, optionally file.py:variant")
        sub.add_argument(
            "--workdir",
            help="where everything of this run is written, a folder or gs://BUCKET/FOLDER (default runs/NAME)",
        )
        return sub

    for name, text in STAGES.items():
        hosts = configured(name, run_stages, text).add_argument_group(
            "several hosts", "The same command on each of them; docs/running.md."
        )
        hosts.add_argument("--coordinator", help="HOST:PORT of host 0, or auto: what a TPU pod or Slurm says")
        hosts.add_argument("--num_processes", type=int, help="how many there are")
        hosts.add_argument("--process_id", type=int, help="which of them this one is, from 0")
        hosts.add_argument(
            "--join_seconds", type=int, default=300, help="how long to wait for the others (default 300)"
        )

    sub = verb("explain", explain, "what activations of a text say")
    sub.add_argument("--pair", required=True, help="folder with av/ and ar/")
    source = sub.add_mutually_exclusive_group()
    source.add_argument("--text", help="the text (default: standard input)")
    source.add_argument("--file", help="a file with the text")
    sub.add_argument("--subject", help="the subject's folder or hub id (default: what the pair's sidecar names)")
    sub.add_argument("--tokens", default="last", help="which tokens: last, all, or indices such as 3,-1")
    sub.add_argument("--temperature", type=float, default=0.0)
    sub.add_argument("--max-new-tokens", type=int, default=150)
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--json", action="store_true", help="one JSON object a line")
    add_injection(sub)

    sub = verb("export", export, "a pair as plain Hugging Face folders, and a run's datasets in the reference's form")
    source = sub.add_mutually_exclusive_group(required=True)
    source.add_argument("--pair", help="folder with av/ and ar/: writes OUT/av and OUT/ar")
    source.add_argument("--workdir", help="a run: writes its pair, and its datasets to OUT/datasets")
    sub.add_argument("--out", required=True, help="a new or empty folder")
    sub.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the weights")
    sub.add_argument("--adapters", action="store_true", help="write LoRA adapters as they are (default: merged)")
    add_injection(sub)

    sub = verb("import", import_pair, "anybody's AV and AR as a checked pair of this package")
    sub.add_argument("--av", required=True, help="folder or hub id of the AV, a model or a PEFT adapter")
    sub.add_argument("--ar", required=True, help="folder or hub id of the AR, a model or a PEFT adapter")
    sub.add_argument("--base", help="the adapters' base model (default: what they name)")
    sub.add_argument("--out", required=True, help="a new or empty folder")
    add_injection(sub)

    from nla_jax.tools.benchmark import settings
    from nla_jax.tools.plan import add_arguments

    settings.add_arguments(verb("benchmark", benchmark, "how fast the programs run at any shape, with random weights"))
    add_arguments(
        configured("plan", plan, "what a config needs on a TPU slice, from its programs compiled without one")
    )
    return parser


class Version(argparse.Action):
    """`nla --version`: one line for this package, and one for each that it computes with."""

    def __call__(self, parser, *_) -> None:
        from nla_jax.runtime.environment import environment

        for name, value in environment().items():
            print(f"{name} {value or 'unknown'}")
        parser.exit()


def add_injection(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--injection",
        help="replace, norm_matched_addition or package.module:function (default: what the AV's sidecar names)",
    )
    sub.add_argument("--injection-block", type=int, help="behind which block, from 0 (default -1: input embeddings)")


def given_injection(arguments: argparse.Namespace):
    """The injection that the command line names; None where it leaves that to the sidecar."""
    from nla_jax.autoencoder import Injection
    from nla_jax.runtime.run import resolve
    from nla_jax.sidecar import INJECTIONS

    name, block = arguments.injection, arguments.injection_block
    if not name:
        if block is not None:
            raise InputError("--injection-block says where, but not how; give --injection too.")
        return None
    if name not in INJECTIONS and ":" not in name:
        raise InputError(
            f"--injection must be {', '.join(INJECTIONS)} or a function's package.module:function; found {name!r}."
        )
    return Injection(INJECTIONS.get(name) or resolve(name), -1 if block is None else block)


def load_config(file: str, overrides: list[str]) -> ConfigDict:
    """The config that `file.py[:variant]` gives, changed by `--config.field=value` overrides."""
    path, colon, variant = file.partition(":")
    if not Path(path).is_file():
        package = Path(__file__).parent  # of a checkout, whose configs lie beside it, or installed, with configs inside
        shipped = [file for file in (package.parent / path, package / path) if file.is_file()]
        if not shipped:
            raise InputError(f"There is no config file {path}.")
        path = str(shipped[0])
    values, command = flags.FlagValues(), ["nla", f"--config={path}{colon}{variant}", *overrides]
    with contextlib.redirect_stderr(None):
        config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=command)
        try:
            values(command, known_only=False)
            config = values.config
        except Exception as error:  # of the flags, or of the user's file
            raise InputError(
                f"The config {file} with {' '.join(overrides) or 'no overrides'} is not valid: {invalid(error)}"
            ) from None
    values = config.to_dict()
    for name, least in LEAST.items():
        try:
            value = functools.reduce(operator.getitem, name.split("."), values)
        except KeyError:
            raise InputError(f"The config {file} has no field {name}; configs/quickstart.py shows all.") from None
        if value < least:
            raise InputError(f"{name} is {value}; it must be at least {least}.")
    for name in ("micro_batches", "rollout_chunks"):
        parts, whole = config.rl[name], config.rl.activations
        if parts < 1 or whole % parts:
            raise InputError(f"rl.{name} is {parts}, which does not divide the rl.activations of a step ({whole}).")
    return config


def invalid(error: Exception) -> str:
    """Why a config cannot be read."""
    if key := next((e for e in (error, *error.args) if isinstance(e, KeyError)), None):
        return f"there is no field {' '.join(str(part) for part in key.args)}"
    if isinstance(error, (flags.Error, AttributeError, TypeError, ValueError)) and str(error).strip():
        return str(error).strip().splitlines()[-1]  # a file's own error comes with its trace, whose last line says what it is
    return f"{type(error).__name__}: {first_line(error)}"


def run_stages(arguments: argparse.Namespace) -> None:
    """One stage of a run, or all of them."""
    config = load_config(arguments.config, arguments.overrides)
    distributed.join(arguments.coordinator, arguments.num_processes, arguments.process_id, arguments.join_seconds)
    logging.set_verbosity(logging.FATAL)  # TFDS warns of routine steps, Orbax prints what reaches us as exceptions
    silence_unfinished_work()
    from nla_jax.data.dataset import extract, label
    from nla_jax.runtime.checkpoint import flat
    from nla_jax.runtime.run import Run
    from nla_jax.stages.evaluate import evaluate, report
    from nla_jax.stages.pretrain import pretrain
    from nla_jax.stages.train import rl, sft

    functions = dict(zip(LOOP, (pretrain, extract, label, sft, rl, evaluate, report), strict=True))
    enable_compile_cache()
    distributed.agree(
        {"the verb": arguments.verb} | flat(json.loads(config.to_json_best_effort())), arguments.join_seconds
    )
    run = Run(config, workdir(arguments), arguments.command)
    stages = LOOP if arguments.verb == "quickstart" else (arguments.verb,)
    if arguments.verb == "quickstart" and config.subject.path:
        stages = LOOP[1:]
    with run.alone():
        for stage in stages:
            arguments.stage = stage  # for who has to say where the run was stopped
            known = run.result(stage) is not None
            functions[stage](run)
            result = run.result(stage)
            if distributed.is_writer():
                print(f"{stage}: {'already done' if known else 'done'} ({result['seconds']:.0f} s)", file=sys.stderr)
    if stages[-1] == "report" and distributed.is_writer():
        print_headline(run)
    distributed.leave()


def workdir(arguments: argparse.Namespace) -> str:
    """The working folder that was asked for, else one named after the config."""
    return arguments.workdir or str(Path("runs") / Path(arguments.config.partition(":")[0]).stem)


def print_headline(run) -> None:
    """The figures that everybody looks for first."""
    from nla_jax.tools.report.page import interval

    s = json.loads((run.workdir / "summary.json").read_text())
    print(
        f"Held-out FVE {s['fve_rl']:.3f} (95 % interval {interval(s['fve_rl_ci95'])}) after RL, {s['fve_warm']:.3f} before; "
        f"shuffled {s['fve_shuffled']:.3f}, no injection {s['fve_no_injection']:.3f}, empty {s['fve_empty']:.3f}.\n"
        f"Report: {run.workdir / 'report.html'}   Pair: {run.workdir / 'pair'}"
    )


def enable_compile_cache() -> None:
    """Compiled programs are kept between runs, so that a resumed run does not compile again."""
    import jax

    if not jax.config.jax_compilation_cache_dir:
        cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "nla_jax" / "xla"
        jax.config.update("jax_compilation_cache_dir", str(cache))


def explain(arguments: argparse.Namespace) -> None:
    """Prints, for each token asked for, the explanation and how much of the activation it carries."""
    from nla_jax.verbs.explain import explain_text

    if arguments.file:
        try:
            text = Path(arguments.file).read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{arguments.file} cannot be read as text ({error}).") from None
    else:
        text = arguments.text if arguments.text is not None else sys.stdin.read()
    enable_compile_cache()
    rows = explain_text(
        text, arguments.pair, subject=arguments.subject, tokens=arguments.tokens, temperature=arguments.temperature,
        max_new_tokens=arguments.max_new_tokens, seed=arguments.seed, injection=given_injection(arguments),
    )  # fmt: skip
    for row in rows:
        if arguments.json:
            print(json.dumps(row, ensure_ascii=False))
        else:
            fve = "FVE unknown" if row["fve"] is None else f"FVE {row['fve']:.2f}"
            print(f"[{row['position']}] {row['token']!r}   {fve}, cosine {row['cosine']:.2f}")
            print(f"    {row['explanation'] or '(no explanation within the length limit)'}\n")


def export(arguments: argparse.Namespace) -> None:
    """Writes a trained pair, and where a run is given its datasets."""
    from nla_jax.data.interchange import export_datasets
    from nla_jax.pair import load_pair

    out, folder = empty_folder(arguments.out), path_to(arguments.pair or path_to(arguments.workdir) / "pair")
    if arguments.workdir and not folder.is_dir():
        raise InputError(f"{arguments.workdir} holds no trained pair; run `nla rl` with its config first.")
    pair = load_pair(folder, injection=given_injection(arguments))
    if arguments.adapters and not (pair.verbalizer.lora or pair.reconstructor.lora):
        raise InputError(f"{folder} holds no LoRA adapters, only whole models; leave out --adapters.")
    if arguments.workdir:
        export_datasets(path_to(arguments.workdir), out / "datasets", pair.sidecar)
    (pair if arguments.adapters else pair.merged()).save(out, arguments.dtype)
    print_written(out)


def import_pair(arguments: argparse.Namespace) -> None:
    """Reads an AV and an AR with all checks, and writes them as whole models with complete sidecars."""
    from nla_jax.pair import load_pair

    out, injection = empty_folder(arguments.out), given_injection(arguments)
    pair = load_pair(arguments.av, arguments.ar, base=arguments.base, injection=injection)
    if arguments.base and pair.base is None:
        raise InputError("--base names the base model of adapters, but AV and AR are whole models; leave it out.")
    pair.merged().save(out)
    print_written(out)


def benchmark(arguments: argparse.Namespace) -> None:
    """Times a program of the package: JSON on standard output, an account of it on standard error."""
    from nla_jax.tools.benchmark.measure import run

    run(arguments)


def plan(arguments: argparse.Namespace) -> None:
    """Prints what a config's programs would need of memory and time."""
    from nla_jax.models.sharding import AXES, make_mesh
    from nla_jax.tools.plan import plan, table
    from nla_jax.tools.search import ranking, search
    from nla_jax.tools.topology import mesh_over, present, slice_named

    config = load_config(arguments.config, arguments.overrides)
    place = slice_named(arguments.topology) if arguments.topology else present(config.compute.dtype)
    if arguments.search:
        result, words = search(config, place, stand_in(workdir(arguments)) / "plan.jsonl"), ranking
    else:
        sizes = arguments.mesh or tuple(config.mesh[axis] for axis in AXES)
        mesh = mesh_over(place.devices, sizes) if arguments.topology else make_mesh(*sizes)
        result, words = plan(config, place, mesh, arguments.programs), table
    print(json.dumps(result, indent=1) if arguments.json else words(result))


def empty_folder(name: str) -> Path:
    """A folder to write to. Raises `InputError` where something is there already, and for one on a bucket."""
    if not isinstance(out := path_to(name), Path):
        raise InputError(f"--out {name} is on a bucket; name a local folder, and copy it there (gcloud storage cp -r).")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} exists and is not an empty folder; give --out another name, or remove it first.")
    return out


def print_written(out: Path) -> None:
    """The folders below `out`, each with its number of files and their size."""
    for folder in sorted(out.iterdir()):
        sizes = [file.stat().st_size for file in folder.iterdir()]
        print(f"{folder}: {len(sizes)} files, {sum(sizes) / 1e6:,.1f} MB")


if __name__ == "__main__":
    sys.exit(main())
