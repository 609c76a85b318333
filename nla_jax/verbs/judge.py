"""The flags that name the model which rewrites texts and judges them, and what it would be asked."""

import argparse
import dataclasses

from nla_jax.config import Provider
from nla_jax.runtime.errors import InputError

BESIDE = ("judge_model", "judge_url", "judge_rows")  # flags that say more of --judge


def add_judge(parser: argparse.ArgumentParser) -> None:
    """Who judges, and `--dry-run`."""
    judge = parser.add_argument_group(
        "a model that writes and judges", "Keys come from the environment. Of a run its config may name the model."
    )
    judge.add_argument("--judge", help="openai, anthropic, anthropic_batch, local, or an import path")
    judge.add_argument("--judge-model", help="its name, or its folder")
    judge.add_argument("--judge-url", help="address of a server that answers as the kind does (default: its own)")
    judge.add_argument("--judge-rows", type=int, help="rows it is asked about (default: the config's, or 200)")
    judge.add_argument("--dry-run", action="store_true", help="print what it would be asked, and what that costs")


def given_judge(arguments: argparse.Namespace, settings: Provider) -> Provider:
    """The section `evaluate.provider` with what the flags say. Raises `InputError` where they do not go together."""
    from nla_jax.runtime.user_input import whole_number

    if not arguments.judge:
        if given := [name for name in BESIDE if getattr(arguments, name) is not None]:
            raise InputError(f"--{given[0].replace('_', '-')} belongs to --judge, which says who judges; give it too.")
        if arguments.dry_run and not settings.kind:
            raise InputError("--dry-run says what a model would be asked; name one with --judge, or evaluate.provider.")
        return settings
    if not arguments.judge_model:
        raise InputError("--judge needs --judge-model: the name or the folder of the model that writes and judges.")
    if settings.kind != arguments.judge:  # the settings of another kind mean nothing to this one
        settings = dataclasses.replace(settings, settings={}, connection={})
    reached = {"base_url": arguments.judge_url} if arguments.judge_url else {}
    return dataclasses.replace(
        settings,
        kind=arguments.judge,
        model=arguments.judge_model,
        connection=settings.connection | reached,
        rows=settings.rows if arguments.judge_rows is None else whole_number("--judge-rows", arguments.judge_rows, 2),
    )


def show_cost(context, probes, settings: Provider, answers, load_tokenizer) -> None:
    """Prints what the model would be asked by those of the probes that ask it, and what that costs. Nobody is asked, and
    nothing is written."""
    from nla_jax.labels.cost import counter
    from nla_jax.probes.probe import asks
    from nla_jax.probes.provider import DryRun
    from nla_jax.tools.probe import measured

    context.provider = DryRun(settings, answers, *counter(load_tokenizer))
    for _ in measured(context, [(function, probe) for function, probe in probes if asks(probe)]):
        pass
    print(context.provider.cost())
