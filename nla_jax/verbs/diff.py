"""`nla diff`: whose tokens' activations moved most between two subjects, and what a pair says of both."""

import argparse

from nla_jax.runtime.environment import import_transformers_alone
from nla_jax.runtime.errors import InputError
from nla_jax.verbs.conventions import add_conventions, given_conventions
from nla_jax.verbs.explain import add_material, add_output, check_numbers, new_file, read_material, write


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The pair, the two subjects, and what is read."""
    add_material(parser)
    parser.add_argument("--other", required=True, help="the other subject: a fine-tuned model's folder or hub id")
    parser.add_argument("--top", type=int, default=10, help="how many tokens are shown (default 10)")
    add_output(parser)
    add_conventions(parser)


def run(arguments: argparse.Namespace) -> None:
    """Prints or writes, for each of the tokens that moved most, what the pair says of both activations."""
    out = new_file(arguments.out)
    check_numbers(arguments)
    if not arguments.injection:  # which may be a function of the user's
        import_transformers_alone()
    material = read_material(arguments)
    from nla_jax.io.pairs import place_of
    from nla_jax.pair import load_pair
    from nla_jax.runtime.compiler import enable_compile_cache
    from nla_jax.subject import load_subject
    from nla_jax.tools.diff import diff_rows, most_moved
    from nla_jax.tools.explain import Sampling, subject_of

    enable_compile_cache()
    conventions = given_conventions(arguments)
    pair = load_pair(arguments.pair, dtype=arguments.dtype, base=arguments.subject, conventions=conventions)
    one = subject_of(pair, place_of(arguments.pair), arguments.subject, arguments.dtype)
    other = load_subject(arguments.other, pair.sidecar.layer, arguments.dtype, earlier=pair.sidecar.earlier_layers)
    if (width := other.model.config.width) != pair.sidecar.d_model:
        raise InputError(f"The other subject {other.name} has width {width}, the pair {pair.sidecar.d_model}.")
    moved = most_moved((one, other), material, arguments.top, arguments.max_tokens)
    write(diff_rows(pair, moved, Sampling(arguments.max_new_tokens, batch=arguments.batch)), out, arguments.json, spelt)


def spelt(row: dict) -> str:
    """A row as people read it."""
    role = f" ({row['role']})" if row["role"] else ""
    said, other = (row[name] or "(no explanation)" for name in ("explanation", "other"))
    return (
        f"{row['document']} [{row['position']}] {row['token']!r}{role}   cosine {row['cosine']:.2f}, "
        f"length x {row['norm_ratio']:.2f}\n    subject: {said}\n    other:   {other}\n"
    )
