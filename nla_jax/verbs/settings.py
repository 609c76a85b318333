"""`nla settings`: what can be set in a config, in a table."""

import argparse
import textwrap


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which settings."""
    parser.add_argument("name", nargs="?", default="", help="only those whose name contains this, such as rl. or lora")


def run(arguments: argparse.Namespace) -> None:
    """Prints name, default, limits and meaning of each setting, and whether it may change when a run is resumed."""
    from nla_jax.config import Config, is_free, settings
    from nla_jax.runtime.errors import InputError

    defaults = dict(_leaves(Config().to_dict()))
    found = [(name, field) for name, field in settings() if arguments.name in name]
    if not found:
        raise InputError(f"No setting has {arguments.name!r} in its name; `nla settings` lists all.")
    for name, field in found:
        facts = field.metadata
        limits = [f"at least {facts['least']}"] * (facts["least"] is not None)
        limits += [f"at most {facts['most']}"] * (facts["most"] is not None)
        limits += [f"one of {', '.join(map(repr, facts['choices']))}"] * bool(facts["choices"])
        limits += ["may change on resume"] * is_free(name)
        default = textwrap.shorten(repr(defaults.get(name, {})), 60, placeholder=" …")
        print(f"{name} = {default}" + (f"   ({'; '.join(limits)})" if limits else ""))
        print(f"    {facts['meaning']}")


def _leaves(tree: dict, path: str = ""):
    for name, value in tree.items():
        yield f"{path}{name}", value
        if isinstance(value, dict):
            yield from _leaves(value, f"{path}{name}.")
