"""What a result was computed with: versions, source, devices."""

import importlib.metadata
import importlib.util
import logging
import platform
import subprocess
import sys
from pathlib import Path

VERSION = "0.2.0"
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "tokenizers", "numpy")


def versions() -> dict[str, str]:
    """The versions of this package, of Python, and of the packages that compute."""
    found = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"nla_jax": VERSION, "python": platform.python_version()} | found


def import_transformers_alone() -> None:
    """Imports transformers as it is where torch is not installed: this package uses its tokenizers and configs alone,
    and torch takes seconds to import. Nothing happens where one of the two is imported already.

    Only for a command of which nobody else's code, which may need torch's models, is a part."""
    if {"torch", "transformers"} & sys.modules.keys():
        return
    find = importlib.util.find_spec
    importlib.util.find_spec = lambda name, package=None: None if name == "torch" else find(name, package)
    logging.disable(logging.WARNING)  # it would advise to install torch
    try:
        import transformers

        transformers.utils.is_torch_available()  # which remembers its answer
    finally:
        importlib.util.find_spec = find
        logging.disable(logging.NOTSET)


def commit() -> str | None:
    """The git commit of this package's source, with a `+` if files have changed since; None outside a checkout."""
    folder = Path(__file__).parent

    def git(*command: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(folder), *command], capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if git("ls-files", "--error-unmatch", "environment.py") is None:  # installed inside another project's checkout
        return None
    return f"{git('rev-parse', '--short=12', 'HEAD')}{'+' if git('status', '--porcelain', '..') else ''}"


def devices() -> str:
    """The devices that JAX sees, such as `4 × TPU v5e`."""
    import jax

    found = jax.devices()
    return f"{len(found)} × {found[0].device_kind}"


def environment() -> dict[str, str | None]:
    """All of it, as runs and reports record it."""
    return versions() | {"commit": commit(), "devices": devices()}
