"""`nla label`: explanations for the warm start, or what they would cost."""

import argparse

from nla_jax.verbs import stages


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of every stage, and `--dry-run`."""
    stages.add_arguments(parser)
    parser.add_argument(
        "--dry-run", action="store_true", help="print how many texts, tokens and what price it would take; ask nobody"
    )


def run(arguments: argparse.Namespace) -> None:
    """Runs the stage, or prints what it would ask for."""
    if not arguments.dry_run:
        stages.run(arguments)
        return
    from nla_jax.io.files import path_to
    from nla_jax.runtime.run import Run
    from nla_jax.stages.label_cost import cost
    from nla_jax.stages.table import STAGES
    from nla_jax.tools.precision import settled

    folder = stages.workdir(arguments)
    stages.check_begun(arguments.config, folder, "label")
    print(cost(Run(settled(arguments.config, path_to(folder)), folder, STAGES, arguments.command)))
