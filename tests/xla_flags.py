"""Flags of XLA that not every release knows."""

import os
import subprocess
import sys


def known_flags(flags: tuple[str, ...]) -> tuple[str, ...]:
    """Those flags that the installed XLA knows. XLA ends the whole process over a flag that it does not know, so
    another process is asked: once for all of them, and flag by flag where that fails."""

    def accepted(*flags: str) -> bool:
        command = [sys.executable, "-c", "import jax; jax.devices()"]
        return not subprocess.run(
            command, env=os.environ | {"XLA_FLAGS": " ".join(flags)}, capture_output=True
        ).returncode

    return flags if accepted(*flags) else tuple(flag for flag in flags if accepted(flag))
