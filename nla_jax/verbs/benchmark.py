"""`nla benchmark`: how fast a config's programs run, with random weights and no data; and how soon runs became good."""

import argparse
import json
import math
import sys

from nla_jax.io.files import path_to
from nla_jax.runtime.errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to measure, and how it is timed; all shapes are the config's."""
    parser.set_defaults(config="configs/benchmark.py")
    parser.add_argument(
        "program",
        help="what to measure: rl, rollout, sft_av, sft_ar, extract or load; or quality, of runs that are there",
    )
    parser.add_argument("--steps", type=int, default=5, help="timed steps (default 5)")
    parser.add_argument("--warmup", type=int, default=1, help="steps before the timed ones (default 1)")
    parser.add_argument(
        "--peak-tflops",
        type=float,
        default=0.0,
        help="peak of one device (default: measured by a large matrix product)",
    )
    parser.add_argument(
        "--bandwidth-gbs",
        type=float,
        default=0.0,
        help="memory bandwidth of one device (default: measured by adding to a large array)",
    )
    parser.add_argument(
        "--interactive",
        action="store_true",
        help="warm up, print a line, then run one step for each line on standard input",
    )
    quality = parser.add_argument_group("of quality", "Held-out FVE, truth and length against the time of training.")
    quality.add_argument(
        "--workdir", nargs="+", metavar="RUN", help="working folders of runs; the first is the baseline"
    )
    quality.add_argument("--fve", type=float, help="the quality to reach (default: the highest that all runs reach)")
    quality.add_argument("--out", help="an HTML file for the chart of all runs")


def run(arguments: argparse.Namespace) -> None:
    """Prints a JSON object on standard output and an account of it on standard error.

    Raises `InputError` for a flag of `quality` where a program is timed."""
    if arguments.program == "quality":
        compare_runs(arguments)
        return
    if given := [name for name in ("workdir", "fve", "out") if getattr(arguments, name) is not None]:
        raise InputError(f"--{given[0]} belongs to `nla benchmark quality`; leave it out.")
    from nla_jax.models.sharding import AXES, make_mesh
    from nla_jax.study import Study
    from nla_jax.subject import subject_config
    from nla_jax.tools.benchmark.measure import Timing, run
    from nla_jax.tools.precision import settled

    timing = Timing(arguments.steps, arguments.warmup, arguments.peak_tflops, arguments.bandwidth_gbs)
    config = settled(arguments.config)
    mesh = make_mesh(*(getattr(config.mesh, axis) for axis in AXES))
    study = Study.of_shapes(config, mesh, subject_config(config, mesh))
    run(arguments.program, study, timing, arguments.interactive, arguments.command)


def compare_runs(arguments: argparse.Namespace) -> None:
    """The same of runs: when each reached a quality. Raises `InputError` where none is named, or one has no records."""
    from nla_jax.runtime.metrics import write_atomically
    from nla_jax.tools.benchmark.quality import account, compare, curve_of
    from nla_jax.tools.benchmark.quality_page import render

    if not arguments.workdir or not all(arguments.workdir):
        raise InputError("`nla benchmark quality` needs --workdir RUN [RUN …]: the working folders of runs.")
    if arguments.fve is not None and not math.isfinite(arguments.fve):
        raise InputError(f"--fve is {arguments.fve}, expected a number such as 0.4.")
    report = compare([curve_of(folder) for folder in arguments.workdir], arguments.fve)
    if arguments.out:
        write_atomically(path_to(arguments.out), render(report))
    print(account(report), file=sys.stderr)
    print(json.dumps({"command": arguments.command} | report))
