"""The exceptions that a user reads as one sentence."""

import logging
import signal
import sys
import threading
from typing import Any


class InputError(ValueError):
    """A user's input is wrong; the message is one clear sentence: what is wrong, where, what to do."""


def first_line(error: BaseException) -> str:
    """The first line of what another library's exception says, or its name where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def handle_unraisable() -> None:
    """Handles errors that Python only prints, because they arise where none can be raised (in destructors, say).

    A signal that arrives there is sent again: the exception that should end the process would be lost. Of a process that
    ends with a sentence, this drops the traces of what Orbax and TensorBoard still have under way."""
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    sys.unraisablehook = _handled


def _handled(event: Any) -> None:
    if number := SIGNALS.get(event.exc_type):
        main, handler = threading.main_thread().ident, signal.getsignal(number)
        again = lambda: signal.getsignal(number) is handler and signal.pthread_kill(main, number)
        timer = threading.Timer(0.05, again)  # the destructor has ended by then
        timer.daemon = True
        timer.start()
        return
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


SIGNALS = {Terminated: signal.SIGTERM, KeyboardInterrupt: signal.SIGINT}  # what their handlers raise
