"""Flags for what the sidecar of a pair leaves open: how activations enter the prompt, and how texts are read."""

import argparse


def add_conventions(parser: argparse.ArgumentParser) -> None:
    """The flags."""
    parser.add_argument(
        "--injection",
        help="replace, norm_matched_addition or package.module:function (default: what the AV's sidecar names)",
    )
    parser.add_argument("--injection-block", type=int, help="after which block, from 0 (default -1: input embeddings)")
    parser.add_argument("--injection-scale", help="length of the injected activations, sqrt_d_model, or raw")
    parser.add_argument(
        "--ar-bos", action=argparse.BooleanOptionalAction, help="the AR's input begins with the tokenizer's BOS"
    )
    parser.add_argument("--thinking", help="off, on or template: what the chat template is told about thinking")
    parser.add_argument("--reading", help="tags, search or whole: which part of a response is the explanation")


def given_conventions(arguments: argparse.Namespace):
    """The `Conventions` that the command line names."""
    from nla_jax.io.conventions import Conventions

    return Conventions(
        special_tokens=arguments.ar_bos,
        thinking=arguments.thinking,
        reading=arguments.reading,
        injections=_injection(arguments),
        injection_scale=arguments.injection_scale,
    )


def _injection(arguments: argparse.Namespace):
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
