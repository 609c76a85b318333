"""What a user should know although nothing is wrong: one sentence on standard error, once a process."""

import functools
import sys

from nla_jax.runtime.distributed import is_writer


@functools.cache
def note(text: str) -> None:
    """Prints a sentence, the first time that it is said."""
    if is_writer():
        print(f"note: {text}", file=sys.stderr)
