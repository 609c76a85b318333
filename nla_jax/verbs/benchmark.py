"""`nla benchmark`: how fast a config's programs run, with random weights and no data."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to measure, and how it is timed; all shapes are the config's."""
    parser.set_defaults(config="configs/benchmark.py")
    parser.add_argument("program", help="what to measure: rl, rollout, sft_av, sft_ar, extract or load")
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


def run(arguments: argparse.Namespace) -> None:
    """Prints a JSON object on standard output and an account of it on standard error."""
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
