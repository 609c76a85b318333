"""`nla accept`: compares a pair with the reference's golden dump of it."""

import argparse
from pathlib import Path

from nla_jax.runtime.environment import import_transformers_alone
from nla_jax.runtime.errors import InputError
from nla_jax.verbs.conventions import add_conventions, given_conventions


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The pair, its subject, and the dump."""
    parser.add_argument("--av", required=True, help="folder or hub id of the AV")
    parser.add_argument("--ar", required=True, help="folder or hub id of the AR")
    parser.add_argument("--subject", required=True, help="folder or hub id of the subject")
    parser.add_argument("--dump", required=True, help="a golden dump, as in the reference's examples/")
    parser.add_argument("--rows", type=int, default=8, help="how many texts the AV writes (default 8)")
    parser.add_argument("--dtype", help="dtype of weights and computation (default: that of the files)")
    add_conventions(parser)


def run(arguments: argparse.Namespace) -> None:
    """Prints a table and a verdict. Raises `InputError` where the pair does not do what the dump says."""
    if not arguments.injection:  # which may be a function of the user's
        import_transformers_alone()
    from nla_jax.io.files import path_to
    from nla_jax.pair import load_pair
    from nla_jax.runtime.compiler import enable_compile_cache
    from nla_jax.runtime.user_input import whole_number
    from nla_jax.tools.explain import subject_of
    from nla_jax.tools.golden import accept, read_dump

    dump, rows = read_dump(Path(arguments.dump)), whole_number("--rows", arguments.rows, 1)
    enable_compile_cache()
    conventions = given_conventions(arguments)
    pair = load_pair(arguments.av, arguments.ar, dtype=arguments.dtype, base=arguments.subject, conventions=conventions)
    subject = subject_of(pair, path_to(arguments.av), arguments.subject, arguments.dtype)
    checks = accept(pair, subject, dump, rows)
    for check in checks:
        print(f"{'ok' if check.passed else 'NOT ok':<7} {check.name}: {check.found} (expected {check.expected})")
    if failed := [check.name for check in checks if not check.passed]:
        raise InputError(f"The pair does not do what {arguments.dump} says: {'; '.join(failed)}.")
    print(f"The pair does what {arguments.dump} says.")
