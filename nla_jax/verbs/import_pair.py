"""`nla import`: anybody's AV and AR as a checked pair of this package."""

import argparse

from nla_jax.verbs.conventions import add_conventions, given_conventions
from nla_jax.verbs.explain import read_files
from nla_jax.verbs.export import empty_folder, print_written


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What is imported, and where to."""
    parser.add_argument("--av", required=True, help="folder or hub id of the AV, a model or a PEFT adapter")
    parser.add_argument("--ar", required=True, help="folder or hub id of the AR, a model or a PEFT adapter")
    parser.add_argument("--base", help="the adapters' base model (default: what they name)")
    parser.add_argument("--out", required=True, help="a new or empty folder")
    parser.add_argument(
        "--calibrate",
        nargs="+",
        metavar="FILE",
        help="texts of which the FVE's variance is taken (default: the pair's)",
    )
    parser.add_argument("--subject", help="the subject for --calibrate (default: what the pair's sidecar names)")
    add_conventions(parser)


def run(arguments: argparse.Namespace) -> None:
    """Reads an AV and an AR with all checks, and writes them as whole models with complete sidecars."""
    from nla_jax.io.files import new_folder, path_to
    from nla_jax.pair import load_pair, open_pair
    from nla_jax.runtime.errors import InputError
    from nla_jax.tools.explain import calibrated, subject_of

    out, conventions = empty_folder(arguments.out), given_conventions(arguments)
    texts = read_files(arguments.calibrate or [])
    read = load_pair if texts else open_pair  # whose weights stay in their files
    pair = read(arguments.av, arguments.ar, base=arguments.base, conventions=conventions)
    if arguments.base and pair.base is None:
        raise InputError("--base names the base model of adapters, but AV and AR are whole models; leave it out.")
    if texts:
        pair = calibrated(pair, subject_of(pair, path_to(arguments.av), arguments.subject), texts)
    with new_folder(out) as scratch:  # both models or none: weights are checked while they are written
        pair.merged().save(scratch)
    print_written(out)
