"""The exceptions that a user reads as one sentence."""

import logging
import sys
from typing import Any


class InputError(ValueError):
    """A user's input is wrong; the message is one clear sentence: what is wrong, where, what to do."""


def first_line(error: BaseException) -> str:
    """The first line of what another library's exception says, or its name where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def silence_unfinished_work() -> None:
    """For a process that ends with a sentence: drops the traces that Python would print around it because, after the
    first error, Orbax and TensorBoard fail in what they still have under way."""
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    sys.unraisablehook = _unless_unfinished_work


def _unless_unfinished_work(event: Any) -> None:
    source = event.exc_traceback.tb_frame.f_code.co_filename if event.exc_traceback else ""
    if not any(f"/{package}/" in source for package in ("asyncio", "orbax", "tensorboardX")):
        sys.__unraisablehook__(event)


class Stopped(RuntimeError):
    """A training loop ended in good order before its last step. The message says why, at which step, and what to do.

    `status` is the exit status: 128 + the signal (SIGTERM: 143, Ctrl-C: 130) if the same command continues, 1 if it
    would not help."""

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


class Terminated(BaseException):
    """Raised on SIGTERM outside a training loop. A BaseException, so that a library's `except Exception` cannot swallow
    it."""
