"""The exceptions that a user reads as one sentence."""


class InputError(ValueError):
    """A user's input is wrong; the message is one clear sentence: what is wrong, where, what to do."""


def first_line(error: BaseException) -> str:
    """The first line of what another library's exception says, or its name where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


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
