"""Checkpoints of a training state: asynchronous, sharded, atomic, restorable onto another mesh (Orbax)."""

import contextlib
import functools
import itertools
import json
import os
import re
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from nla_jax.config import completed
from nla_jax.io.files import AnyPath
from nla_jax.runtime.errors import InputError, Stopped, first_line

# Errors that say that files are missing, cut short or altered: exceptions, and how tensorstore's messages begin.
DAMAGE = json.JSONDecodeError, UnicodeDecodeError, FileNotFoundError
DAMAGE_STATUS = "DATA_LOSS", "FAILED_PRECONDITION", "NOT_FOUND", "OUT_OF_RANGE", "Error opening", "Error reading"


def differences(made: dict, now: dict, free: Callable[[str], bool] = lambda name: False) -> list[str]:
    """`name = old -> new` for each setting of two nested dictionaries that differs and is not `free(name)`.

    A setting that was not there yet when the old ones were recorded had its default."""
    made, now = flat(completed(made)), flat(completed(now))
    names = [name for name in sorted(made.keys() | now.keys()) if not free(name)]
    shown = lambda tree, name: repr(tree[name]) if name in tree else "(not there)"
    return [
        f"{name} = {shown(made, name)} -> {shown(now, name)}"
        for name in names
        if name not in made or name not in now or made[name] != now[name]
    ]


def flat(tree: Any, path: str = "") -> dict:
    """The leaves of nested dictionaries by their dotted paths."""
    if not isinstance(tree, dict):
        return {path: list(tree) if isinstance(tree, tuple) else tree}
    return {k: v for name, sub in tree.items() for k, v in flat(sub, f"{path}.{name}" if path else name).items()}


def checksum(state: Any) -> int:
    """A sum over the bits of all arrays, each entry weighted by its place: damage changes it, another mesh does not.

    Orbax checks its own descriptions, not the arrays. On accelerators the sums are computed there; in a process with
    CPUs alone by NumPy, so that nothing is compiled."""
    raw = lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    leaves = [raw(x) for x in jax.tree.leaves(state)]
    here = all(x.is_fully_addressable and jax.default_backend() == "cpu" for x in leaves)
    sums = (
        [_weighted(np.asarray(x), np) for x in leaves] if here else jax.device_get([_weighted_there(x) for x in leaves])
    )
    return sum(int(value) * (2 * i + 1) for i, value in enumerate(sums)) % (1 << 32)


def _weighted(x: Any, xp: Any) -> Any:
    """The bits of an array of NumPy or JAX (`xp`), summed modulo 2^32 with odd weights."""
    x = x.astype(xp.uint8) if x.dtype == bool else x
    bits = x.view(f"uint{8 * min(x.dtype.itemsize, 4)}").astype(xp.uint32)
    place = xp.zeros((), xp.uint32)
    for axis, size in enumerate(bits.shape):
        along = xp.arange(size, dtype=xp.uint32).reshape([-1 if i == axis else 1 for i in range(bits.ndim)])
        place = place * xp.uint32(size % (1 << 32)) + along
    return xp.sum(bits * (place * xp.uint32(2) + xp.uint32(1)), dtype=xp.uint32)


_weighted_there = jax.jit(functools.partial(_weighted, xp=jnp))


# On preemption JAX agrees on one sync-point number and stops every process there. The number must keep growing across
# training loops, so it belongs to the process: restarting it at each loop could name a point that never comes.
_calls = itertools.count(1)


class Checkpoints:
    """The checkpoints of one training loop: every `every` steps, at the end, and when a signal asks to stop.

    Kept are the newest `keep`, those of steps that `keep_every` divides (0: none), the newest one that is known to be
    good (`mark_good`), and the best one (`mark_best`). A step appears under its number only when it is complete; an
    interrupted save leaves the previous one in place. With the state, `settings` are saved: what it was made from
    (JSON). Those that `free` names may differ on resuming.

    As a context, in the main thread of a single process, it takes SIGTERM and Ctrl-C (SIGINT) as requests to stop after
    the step under way; a second Ctrl-C stops at once. Several processes agree on a step through JAX's preemption
    service, on SIGTERM only. The context waits for saves under way when it ends."""

    def __init__(
        self,
        folder: AnyPath,
        every: int,
        keep: int = 2,
        keep_every: int = 0,
        settings: dict | None = None,
        free: Callable[[str], bool] = lambda name: False,
    ):
        self.folder, self.every, self.keep, self.keep_every = folder, every, keep, keep_every
        self.settings, self.free = settings or {}, free
        self._good, self._best = 0, -1  # the last good step; the best one
        self._asked = None  # the signal that has asked to stop
        options = ocp.CheckpointManagerOptions(preservation_policy=self, cleanup_tmp_directories=True)
        with self._writing():
            whole = folder.absolute() if isinstance(folder, Path) else folder  # Orbax takes no relative ones
            self.manager = ocp.CheckpointManager(whole, options=options)

    def mark_good(self, step: int) -> None:
        """Keeps the newest checkpoint of at most this step, whatever is saved later."""
        self._good = step

    def mark_best(self, step: int) -> None:
        """Keeps the checkpoint of this step until another one is the best."""
        self._best = step

    def has(self, step: int) -> bool:
        """Whether the checkpoint of a step is there."""
        return step in self.manager.all_steps()

    def newest_good(self) -> int | None:
        """The step of the newest checkpoint that is known to be good; None if there is none."""
        return max((step for step in self.manager.all_steps() if step <= self._good), default=None)

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Orbax asks which of the checkpoints (in ascending order) to keep."""
        steps = [checkpoint.step for checkpoint in checkpoints]
        kept = {*steps[-self.keep :], max((step for step in steps if step <= self._good), default=None), self._best}
        return [step in kept or bool(self.keep_every) and step % self.keep_every == 0 for step in steps]

    def save(self, step: int, state: Any, force: bool = False, before: Callable[[], None] = lambda: None) -> None:
        """Saves the state after `step` steps if the interval (or `force`) says so; returns before it is written. Calls
        `before` first, so that what it writes is there whenever the checkpoint is.

        Raises `InputError` if this save or the one before it cannot be written (a full disk, no permission), and
        `Stopped` if a signal has asked to stop: the state is then saved and written. Any other error passes through
        unchanged."""
        stop = self._asked or multihost_utils.reached_preemption_sync_point(next(_calls)) and signal.SIGTERM
        if (stop or force or step % self.every == 0) and step != self.manager.latest_step():
            before()
            items = ocp.args.Composite(
                state=ocp.args.StandardSave(state),
                settings=ocp.args.JsonSave(self.settings),
                checksum=ocp.args.JsonSave({"state": checksum(state)}),
            )
            with self._writing():
                if jax.process_index() == 0:  # Orbax's threads would wait minutes for a folder that they cannot make
                    probe = self.manager.directory / "probe"
                    probe.touch()
                    probe.unlink()
                self.manager.save(step, args=items, force=True)
        if stop:
            with self._writing():
                self.manager.wait_until_finished()
            raise Stopped(
                f"stopped by {'Ctrl-C' if stop == signal.SIGINT else 'SIGTERM'}; step {step} is saved under "
                f"{self.folder}, and the same command continues from there.",
                status=128 + stop,
            )

    def restore(self, abstract: Any, steps: int, discard: Any = ()) -> tuple[int, Any] | None:
        """The newest checkpoint as `(steps done, state)`; None if there is none.

        `abstract` is the state with a `jax.ShapeDtypeStruct` (shape, dtype, sharding) for each array, so that no second
        state is in memory beside the one that is read. For the same reason the arrays of `discard` (any tree) are
        deleted before.

        Raises `InputError` if the newest checkpoint is damaged or cannot be read, has another structure, was made from
        other settings, or is beyond the `steps` to be made. Any other error, such as one of memory, passes through
        unchanged."""
        if (step := self.manager.latest_step()) is None:
            return None
        if step > steps:
            raise InputError(
                f"Checkpoint {self.folder / str(step)} is beyond the {steps} steps that the config asks for; ask for {step} or "
                f"more."
            )
        return step, self.read(step, abstract, discard)

    def read(self, step: int, abstract: Any, discard: Any = ()) -> Any:
        """The state after `step` steps, as `restore` reads that of the newest checkpoint."""
        with self._writing():
            self.manager.wait_until_finished()  # it may be on its way to the disk
        path = self.folder / str(step)
        read = lambda **item: self.manager.restore(step, args=ocp.args.Composite(**item))
        try:
            # A user who has removed the settings takes the state over into a run with others.
            if (self.manager.directory / str(step) / "settings").exists():
                made = read(settings=ocp.args.JsonRestore()).settings
                if changed := differences(made, self.settings, self.free):
                    raise InputError(
                        f"Checkpoint {path} was made with other settings (old -> new): {'; '.join(changed)}. Go back "
                        f"to the old ones, use another --workdir, or remove {path / 'settings'} to continue all the "
                        f"same."
                    )
            for leaf in jax.tree.leaves(discard):
                if isinstance(leaf, jax.Array):
                    leaf.delete()
            state = read(state=ocp.args.StandardRestore(abstract)).state
            made = lambda: read(checksum=ocp.args.JsonRestore()).checksum.get("state")
            if (self.manager.directory / str(step) / "checksum").exists() and made() != checksum(state):
                raise ValueError("DATA_LOSS: the checksum of its arrays is another one")
            return state
        except Exception as error:
            if type(error) is Exception and error.__cause__:  # Orbax wraps what went wrong with one array
                error = error.__cause__
            if isinstance(error, (KeyError, AttributeError, TypeError)) and _of_orbax(error):
                error = ValueError("DATA_LOSS: its description is not valid")
            if isinstance(error, InputError) or not isinstance(error, (ValueError, OSError)):
                raise error from None
            words = _words(error) or first_line(error)
            if isinstance(error, DAMAGE) or str(error).startswith(DAMAGE_STATUS):
                words += "); its files are damaged (move that folder aside to continue from the one before it"
            raise InputError(f"Checkpoint {path} cannot be restored ({words}).") from None

    def close(self) -> None:
        """Waits for saves under way; raises `InputError` if one cannot be written."""
        with self._writing():
            self.manager.wait_until_finished()
        self.manager.close()

    def __enter__(self) -> "Checkpoints":
        ours = jax.process_count() == 1 and threading.current_thread() is threading.main_thread()
        signals = (signal.SIGTERM, signal.SIGINT) if ours else ()
        self._handlers = {number: signal.signal(number, self._ask) for number in signals}
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        try:
            if kind is None or issubclass(kind, Stopped):
                self.close()
            elif jax.process_count() == 1:  # several would wait for each other; after an error they may disagree
                with contextlib.suppress(Exception):  # the first error is the one to tell
                    self.close()
        finally:
            for number, handler in self._handlers.items():
                signal.signal(number, handler)

    def _ask(self, number: int, _: Any) -> None:
        """The handler of signals that ask to stop."""
        self._asked = number
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)
            os.write(2, b"\nThe step under way will be finished and saved; press Ctrl-C again to stop at once.\n")

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Says in one sentence that the disk or the bucket does not take a checkpoint; other errors pass through."""
        try:
            yield
        except Exception as error:
            if (words := _words(error)) is None:
                raise
            raise InputError(
                f"A checkpoint cannot be written to {self.folder} ({words}); the one before it is intact. Make room "
                f"(or the folder writable) and run the same command again."
            ) from None


def _of_orbax(error: Exception) -> bool:
    """Whether an error comes from Orbax's own code, which trusts the descriptions that it reads."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and f"{os.sep}orbax{os.sep}" in frames[-1].filename


def _words(error: Exception) -> str | None:
    """What the operating system or tensorstore says of a failed read or write; None for an error of another kind."""
    if isinstance(error, OSError):
        return error.strerror or first_line(error)
    # Tensorstore's messages begin with a status and end with its settings. (JAX's errors are no `ValueError`.)
    tensorstore = isinstance(error, ValueError) and re.match(
        "[A-Z_]{5,}: |Error (open|read|writ|decod)ing ", str(error)
    )
    return first_line(error).partition(" [")[0].rpartition(": ")[2] if tensorstore else None
