"""The processes of `tests.campaign`: how a command is run, how it ended, and whether that breaks the rule."""

import atexit
import concurrent.futures
import contextlib
import dataclasses
import math
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

IDLE = 60  # seconds in which a command that computes nothing is taken to hang


class Child:
    """A forked process, which needs no seconds for imports.

    No program has run in the parent: JAX and its threads begin in the child."""

    def __init__(self, run: Callable[[], int]):
        sys.stdout.flush()
        pipes = [os.pipe() for _ in range(2)]  # no files, whose size a draw may limit
        self.pid, self.status = os.fork(), None
        if not self.pid:
            _become(run, [os.open(os.devnull, os.O_RDONLY), *[write for _, write in pipes]])
        self.used, self.busy, self.looked = 0, time.monotonic(), -math.inf
        for _, write in pipes:
            os.close(write)
        self.readers = [concurrent.futures.ThreadPoolExecutor(1).submit(_drained, read) for read, _ in pipes]

    def said(self) -> tuple[str, str]:
        """What the process has written to standard output and standard error."""
        return tuple(reader.result().decode(errors="replace") for reader in self.readers)

    def wait(self, seconds: float) -> int | None:
        """The exit status (minus the signal that ended it); None where it is still running after so long."""
        end = time.monotonic() + seconds
        while self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.status = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > end or self._idle():
                break
            time.sleep(0.02)
        return self.status

    def kill(self) -> int:
        """Ends the process at once."""
        os.kill(self.pid, signal.SIGKILL)
        self.status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.status

    def _idle(self) -> bool:
        """Whether the process has computed next to nothing (a thread that looks at a clock) for `IDLE` seconds."""
        now = time.monotonic()
        if now - self.looked < 1:
            return False
        with contextlib.suppress(OSError):  # where there is no /proc, all are busy
            used = sum(map(int, Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[11:13]))
            if used > self.used + os.sysconf("SC_CLK_TCK") // 2:
                self.used, self.busy = used, now
        self.looked = now
        return now - self.busy > IDLE


def _become(run: Callable[[], int], descriptors: list[int]) -> None:
    """In a forked process: runs `run` with these as standard input, output and error, and ends as Python ends."""
    status = 1
    try:
        for number, descriptor in enumerate(descriptors):
            os.dup2(descriptor, number)
        status = run()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            threading._shutdown()
            atexit._run_exitfuncs()
            sys.stdout.flush()
        os._exit(status)


def _drained(descriptor: int) -> bytes:
    """All that comes out of a pipe."""
    with open(descriptor, "rb") as stream:
        return stream.read()


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    arguments: tuple[str, ...]
    status: int
    out: str
    err: str
    seconds: float
    hangs: bool

    def wrong(self, allowed: tuple[int, ...] = (0, 1)) -> str:
        """What breaks the rule; "" where nothing does."""
        said = [line for line in self.err.splitlines() if line.startswith("nla: ")]
        if self.hangs:
            return f"hangs: no end after {self.seconds:.0f} s"
        if "Traceback" in self.err:
            return f"a trace: {self.err[self.err.index('Traceback') :][-600:]}"
        if self.status not in allowed:
            return f"status {self.status}: {self.err[-300:]}"
        if self.status == 1 and (len(said) != 1 or not said[0].endswith((".", "?"))):
            return f"no single sentence: {self.err[-300:]!r}"
        return ""
