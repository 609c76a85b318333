"""The `nla` command: finds the verb, reads the config, and answers every failure with one sentence."""

import argparse
import ast
import contextlib
import errno
import functools
import gc
import importlib
import json
import os
import re
import runpy
import shlex
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path

from nla_jax.config import Config, read, settings
from nla_jax.runtime.errors import InputError, Stopped, Terminated, first_line, handle_unraisable

DEFAULT_CONFIG = "configs/quickstart.py"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # why a file cannot become larger
PACKAGE = Path(__file__).parent
NEW_OBJECTS = 10_000  # between two searches for garbage: imports and tracing make millions of objects that stay
# Every verb with the module that runs it: `add_arguments(parser)`, `run(arguments)`. Only the verb's module is
# imported.
VERBS = {
    "quickstart": ("nla_jax.verbs.stages", "a whole study: the stages from pretrain to report, in order"),
    "pretrain": ("nla_jax.verbs.stages", "train (or measure) the subject"),
    "extract": ("nla_jax.verbs.stages", "activations of the corpus, or of files given"),
    "label": ("nla_jax.verbs.label", "explanations for the warm start"),
    "sft": ("nla_jax.verbs.stages", "supervised warm start of AV and AR"),
    "rl": ("nla_jax.verbs.stages", "joint training"),
    "evaluate": ("nla_jax.verbs.stages", "held-out FVE and its controls"),
    "report": ("nla_jax.verbs.stages", "summary.json and report.html"),
    "explain": ("nla_jax.verbs.explain", "what activations of a text say"),
    "serve": ("nla_jax.verbs.serve", "the page that shows what a token's activation says, at a click"),
    "probe": ("nla_jax.verbs.probe", "probes of a finished run's pair, or of anybody's pair on texts"),
    "diff": (
        "nla_jax.verbs.diff",
        "whose tokens' activations moved most between two subjects, and what a pair says of both",
    ),
    "steer": (
        "nla_jax.verbs.steer",
        "what a subject says when the explanation of an activation is edited, beside controls",
    ),
    "export": (
        "nla_jax.verbs.export",
        "a pair as plain Hugging Face folders, and a run's datasets in the reference's form",
    ),
    "accept": ("nla_jax.verbs.accept", "compares a pair with the reference's golden dump of it"),
    "import": ("nla_jax.verbs.import_pair", "checks anybody's AV and AR, and writes them as a pair of this package"),
    "check": (
        "nla_jax.verbs.check",
        "checks a config before it runs: functions, splits, memory, disk, labels",
    ),
    "settings": ("nla_jax.verbs.settings", "every setting of a config: meaning, default, limits"),
    "plan": ("nla_jax.verbs.plan", "what a config needs on a TPU slice, from its programs compiled without one"),
    "benchmark": ("nla_jax.verbs.benchmark", "how fast a config's programs run, with random weights"),
}
CONFIGURED = {
    "quickstart",
    "pretrain",
    "extract",
    "label",
    "sft",
    "rl",
    "evaluate",
    "report",
    "check",
    "plan",
    "benchmark",
}


def main(argv: list[str] | None = None) -> int:
    """Runs one verb and returns the exit status.

    0; 1 after one sentence on standard error where an input is wrong or training has broken down; 128 + the signal's
    number where one ended it and the same command continues. One of several hosts ends its process with that status
    instead. `--debug` shows the Python trace of an error."""
    argv = sys.argv[1:] if argv is None else argv
    arguments = argparse.Namespace(stage=None, debug="--debug" in argv)
    try:
        # Every command would say that PyTorch, which it does not use, is not there.
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
        parse(argv, arguments)
        if (here := os.getcwd()) not in sys.path:
            sys.path.append(here)  # a config may name functions of the user's, by import path
        handle_unraisable()
        with sigterm_raises():
            importlib.import_module(VERBS[arguments.verb][0]).run(arguments)
        return 0
    except BrokenPipeError:  # as in `nla explain … | head`: who read has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except (InputError, OSError) as error:
        return failed(sentence(error), 1, arguments.debug)
    except Stopped as stopped:
        return failed(str(stopped), stopped.status, arguments.debug)
    except Terminated:
        kept = f" amid {arguments.stage}; its finished shards, texts and steps are kept, and the same command continues"
        return failed(f"stopped by SIGTERM{kept if arguments.stage else ''}.", 128 + signal.SIGTERM, arguments.debug)
    except KeyboardInterrupt:
        continues = "; the same command continues from what is finished" if arguments.stage else ""
        return failed(f"stopped{continues}.", 130, arguments.debug)
    except Exception as error:
        return unexpected(error, arguments)


def unexpected(error: Exception, arguments: argparse.Namespace) -> int:
    """What a lack of memory, or a failure of the devices or of another host, says. Any other error is a bug, and its trace
    is shown."""
    from nla_jax.runtime import distributed

    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        return failed(out_of_memory(error, arguments.stage), 1, arguments.debug)
    if distributed.host_count() == 1:
        raise error
    traceback.print_exc()
    if isinstance(error, RuntimeError):  # as `JaxRuntimeError` is
        return failed(distributed.lost(f"stopped in what all hosts do together ({first_line(error)})"), 1)
    return failed(repr(error), 1)


def failed(reason: str, status: int, debug: bool = False) -> int:
    """Says why a verb ended; returns the exit status, or where several hosts run ends the process with it."""
    from nla_jax.runtime import distributed

    if debug:
        traceback.print_exc()
    distributed.end(reason, status)
    return status


@contextlib.contextmanager
def sigterm_raises() -> Iterator[None]:
    """Within this block SIGTERM raises `Terminated`.

    Two exceptions: training loops install their own handler and save first; with several hosts JAX's preemption service
    owns the signal."""

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


def sentence(error: Exception) -> str:
    """An error as the user reads it; one of the operating system (full disk, no permission) names file and reason."""
    if isinstance(error, OSError) and error.strerror:
        cure = "; make room, and run the same command again" if error.errno in FULL else ""
        return f"{error.filename or 'a file'}: {error.strerror}{cure}."
    return " ".join(str(error).split())


def out_of_memory(error: Exception, stage: str | None) -> str:
    """What a user reads where the memory of the devices, or of the host, did not suffice."""
    host = isinstance(error, MemoryError)
    whose, reason = ("host's", str(error)) if host else ("devices'", sentence(error).split(". ")[0])
    smaller = {
        "sft": "a smaller sft.av.batch and sft.ar.batch",
        "rl": "more rl.micro_batches (8, say) and rl.rollout_chunks",
    }
    use = f"{smaller[stage]}, compute.remat=nothing_saveable, LoRA" if stage in smaller else "a smaller batch"
    return (
        f"The {whose} memory does not hold {stage or 'this'} ({reason}); use {use}, or more devices; "
        "`nla plan` says what a config needs. What is finished is kept."
    )


# The command line


def parse(argv: list[str], arguments: argparse.Namespace) -> None:
    """Reads the command line into `arguments`; for verbs with a config, `arguments.config` becomes a `Config`.

    Raises `InputError` for an argument that the verb does not know."""
    verb = next((word for word in argv if not word.startswith("-")), None)
    parser = argparse.ArgumentParser(prog="nla", description="Natural language autoencoders in JAX.")
    parser.add_argument(
        "--version", action=Version, nargs=0, help="versions of this package and of what it computes with"
    )
    parser.add_argument("--debug", action="store_true", help="show the Python trace of an error")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, (module, text) in VERBS.items():
        more = {"epilog": "--config.field=value overrides any field of the config."} if name in CONFIGURED else {}
        sub = verbs.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.", **more)
        sub.add_argument(
            "--debug", action="store_true", default=argparse.SUPPRESS, help="show the Python trace of an error"
        )
        if name == verb:
            if name in CONFIGURED:
                default, more = (None, " (default: that of the run)") if name == "report" else (DEFAULT_CONFIG, "")
                sub.add_argument("--config", default=default, help=f"config file, optionally file.py:variant{more}")
            importlib.import_module(module).add_arguments(sub)
    _, overrides = parser.parse_known_args(argv, arguments)
    allowed = "--config." if arguments.verb in CONFIGURED else ()
    if unknown := [flag for flag in overrides if not flag.startswith(allowed)]:
        raise InputError(f"Unknown argument {unknown[0]!r}{hint(unknown[0], overrides)}; see `nla {verb} --help`.")
    if without := [flag for flag in overrides if "=" not in flag]:
        raise InputError(f"{without[0]} has no value; write {without[0]}=VALUE.")
    arguments.command = shlex.join(["nla", *argv])
    if arguments.verb in CONFIGURED:
        arguments.config_file = arguments.config or DEFAULT_CONFIG
        recorded = None if arguments.config else config_of_run(arguments.workdir)
        arguments.config = load_config(recorded or arguments.config_file, overrides)


def hint(unknown: str, overrides: list[str]) -> str:
    """What may have been meant by an unknown argument."""
    bare = [flag for flag in overrides if flag.startswith("--config.") and "=" not in flag]
    return f" (write {bare[0]}={unknown})" if bare else ""


class Version(argparse.Action):
    """`nla --version`: one line for this package, and one for each that it computes with."""

    def __call__(self, parser, *_) -> None:
        from nla_jax.runtime.environment import environment

        for name, value in environment().items():
            print(f"{name} {value or 'unknown'}")
        parser.exit()


def config_of_run(workdir: str | None) -> str | None:
    """The config that a run has recorded in its working folder; None where there is none, or the folder is on a
    bucket."""
    file = Path(workdir or "runs/quickstart") / "config.json"
    return str(file) if file.is_file() else None


def load_config(file: str, overrides: list[str]) -> Config:
    """The config that `file.py[:variant]`, or `file.json`, gives, changed by `--config.field=value` overrides.

    Raises `InputError` where there is no such file, it fails, or a value is wrong."""
    from absl import flags
    from ml_collections import ConfigDict, config_flags

    given = given_by(file)
    whole = ConfigDict(open_ended(read(given, f"The config {file}").to_dict(), overrides), type_safe=False)
    values, command = flags.FlagValues(), ["nla", *overrides]
    with contextlib.redirect_stderr(None):
        try:
            config_flags.DEFINE_config_dict("config", whole, flag_values=values, sys_argv=command)
            values(command)
        except Exception as error:
            raise InputError(f"The config {file} with {' '.join(overrides)} is not valid: {invalid(error)}.") from None
    return read(whole.to_dict(), f"The config {file}" + (f" with {' '.join(overrides)}" if overrides else ""))


def given_by(file: str) -> dict:
    """What `file.py[:variant]`, or `file.json`, says. Raises `InputError` where there is no such file, or it fails."""
    from ml_collections import ConfigDict

    path, colon, variant = (file, "", "") if file.endswith(".json") else file.partition(":")
    if not Path(path).is_file():  # configs lie beside the package in a checkout, and inside it where it is installed
        shipped = [found for found in (PACKAGE.parent / path, PACKAGE / path) if found.is_file()]
        if not shipped:
            raise InputError(f"There is no config file {path}.")
        path = str(shipped[0])
    try:
        if path.endswith(".json"):
            return json.loads(Path(path).read_bytes())
        if (get_config := runpy.run_path(path).get("get_config")) is None:
            raise ValueError("it has no function get_config, which returns a ConfigDict")
        given = get_config(variant) if colon else get_config()
        return given.to_dict() if isinstance(given, ConfigDict) else dict(given)
    except Exception as error:  # of the user's file
        raise InputError(f"The config {file} cannot be read: {type(error).__name__}: {first_line(error)}.") from error


def open_ended(values: dict, overrides: list[str]) -> dict:
    """`values` with the names that overrides add to open mappings (settings of an optimizer or a labeller, shares,
    …)."""
    mappings = [f"--config.{name}." for name, field in settings() if field.type is dict]
    for name, _, value in (flag.partition("=") for flag in overrides):
        if name.startswith(tuple(mappings)):
            *path, last = name.removeprefix("--config.").split(".")
            target = functools.reduce(lambda tree, key: tree.setdefault(key, {}), path, values)
            with contextlib.suppress(ValueError, SyntaxError):
                value = ast.literal_eval(value)
            target.setdefault(last, value)
    return values


def invalid(error: Exception) -> str:
    """Why an override cannot be read."""
    if isinstance(error, (AttributeError, KeyError)):  # of a ConfigDict: a name in quotes, and what is near it
        name, near = (re.search(pattern, str(error)) for pattern in (r"\w{2,}", r"Did you mean .*?\?"))
        return f"there is no setting {name[0] if name else '?'}{f' ({near[0]})' if near else ''}"
    said = (str(error).strip() or type(error).__name__).splitlines()[-1].rstrip(".")
    for words, kind in (
        ("invalid literal for int", "a whole number"),
        ("could not convert string to float", "a number"),
    ):
        if words in said:
            return re.sub(f"^flag (--[^:]*): {words}.*", rf"\1 is not {kind}", said)
    return said


def command() -> None:
    """What `nla` runs: `main`, and the end of the process, in which a late Ctrl-C changes nothing any more."""
    gc.set_threshold(NEW_OBJECTS)
    status = main()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    gc.freeze()  # the process ends: nothing is worth looking for
    sys.exit(status)


if __name__ == "__main__":
    command()
