"""`--injection`: how activations enter the prompt of a pair whose sidecar does not say it in known words."""

import argparse


def add_injection(parser: argparse.ArgumentParser) -> None:
    """The flags."""
    parser.add_argument(
        "--injection",
        help="replace, norm_matched_addition or package.module:function (default: what the AV's sidecar names)",
    )
    parser.add_argument("--injection-block", type=int, help="behind which block, from 0 (default -1: input embeddings)")


def given_injection(arguments: argparse.Namespace):
    """The injection that the command line names; None where it leaves that to the sidecar."""
    from nla_jax.autoencoder import Injection
    from nla_jax.runtime.errors import InputError
    from nla_jax.runtime.user_code import resolve
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
    return Injection(INJECTIONS.get(name) or resolve(name, "--injection"), -1 if block is None else block)
