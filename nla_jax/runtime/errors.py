"""The exceptions that reach a user as a sentence."""


class InputError(ValueError):
    """A user's input is wrong; the message is one clear sentence: what is wrong, where, what to do."""


def first_line(error: BaseException) -> str:
    """The first line of what another library's exception says, or its name where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


class Stopped(RuntimeError):
    """A training loop ended before its last step, in good order: the message says why, at which step, and what to do.

    `status` is the exit status: 143 (128 + SIGTERM) where the same command continues, 1 where it would not help."""

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


class Terminated(BaseException):
    """SIGTERM came where no training loop takes it as a request; no `Exception`, which libraries would catch."""
