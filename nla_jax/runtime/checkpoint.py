"""Checkpoints of a training state: asynchronous, sharded, atomic, restorable onto another mesh (Orbax)."""

import contextlib
import itertools
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from nla_jax.io.files import AnyPath
from nla_jax.runtime.errors import InputError, Stopped, first_line


def differences(made: dict, now: dict, free: Callable[[str], bool] = lambda name: False) -> list[str]:
    """`name = old -> new` for each setting of two nested dictionaries that differs and is not `free(name)`."""
    made, now = flat(made), flat(now)
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


# JAX's preemption service stops all processes at the call behind the last one that any has made. Calls are counted through all
# loops of a process: numbered by steps, a notice before a loop's first step would name a call that never comes.
_calls = itertools.count(1)


def _newest(steps: Sequence[int], limit: int) -> int | None:
    return max((step for step in steps if step <= limit), default=None)


class Checkpoints:
    """The checkpoints of one training loop: one every `every` steps, one at the end, and one when SIGTERM asks to stop. The
    newest `keep` of them are kept, those of steps that `keep_every` divides (where it is not 0), and the newest up to step
    `good`, behind which a watchdog saw no trouble.

    A step appears under its name only when it is complete; an interrupted save leaves the previous one in place. With the
    state, `settings` are saved: what it was made from (JSON).

    As a context it takes SIGTERM as a request (in the main thread of a single process; several processes agree on a step
    through JAX's preemption service), and waits for saves under way when it ends without an error."""

    def __init__(
        self,
        folder: AnyPath,
        every: int,
        keep: int = 2,
        keep_every: int = 0,
        settings: dict | None = None,
        free: Callable[[str], bool] = lambda name: False,
    ):
        options = ocp.CheckpointManagerOptions(preservation_policy=self, cleanup_tmp_directories=True)
        self.folder, self.every, self.keep, self.keep_every = folder, every, keep, keep_every
        self.settings, self.free = settings or {}, free
        self.good, self._asked, self._handler = 0, False, None
        with self._writing():
            whole = folder.absolute() if isinstance(folder, Path) else folder  # Orbax takes no relative ones
            self.manager = ocp.CheckpointManager(whole, options=options)

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Orbax's question which of the checkpoints (ascending) are kept."""
        steps = [checkpoint.step for checkpoint in checkpoints]
        kept = {*steps[-self.keep :], _newest(steps, self.good)}
        return [step in kept or bool(self.keep_every) and step % self.keep_every == 0 for step in steps]

    def newest_good(self) -> int | None:
        """The newest checkpoint that is known to be good; None where there is none."""
        return _newest(self.manager.all_steps(), self.good)

    def save(self, step: int, state: Any, force: bool = False, before: Callable[[], None] = lambda: None) -> None:
        """Saves the state after `step` steps where the interval (or `force`) says so; returns before it is written. `before` is
        called first: what it writes is there whenever that checkpoint is.

        Raises `InputError` where this save or the one before it cannot be written (a full disk, no permission), and `Stopped`
        where SIGTERM has asked to stop: the state is then saved and written."""
        stop = self._asked or multihost_utils.reached_preemption_sync_point(next(_calls))
        with self._writing():
            if (stop or force or step % self.every == 0) and step != self.manager.latest_step():
                before()
                if jax.process_index() == 0:  # Orbax's threads wait minutes for a folder that they cannot make
                    probe = self.manager.directory / "probe"
                    probe.touch()
                    probe.unlink()
                items = ocp.args.Composite(
                    state=ocp.args.StandardSave(state), settings=ocp.args.JsonSave(self.settings)
                )
                self.manager.save(step, args=items, force=True)
            if stop:
                self.manager.wait_until_finished()
        if stop:
            raise Stopped(
                f"stopped by SIGTERM; step {step} is saved under {self.folder}, and the same command continues from there.",
                status=128 + signal.SIGTERM,
            )

    def restore(self, state: Any, steps: int) -> tuple[int, Any]:
        """The newest checkpoint as `(steps done, state)`, in the shapes, dtypes and shardings of `state`; `(0, state)` where
        there is none.

        Raises `InputError` where the newest one cannot be read into that structure, was made from other settings, or stands
        beyond the `steps` that are to be made."""
        step = self.manager.latest_step()
        if step is None:
            return 0, state
        path = self.folder / str(step)
        try:
            # A user who has removed the settings takes the state over into a run with others.
            if (self.manager.directory / str(step) / "settings").exists():
                made = self.manager.restore(step, args=ocp.args.Composite(settings=ocp.args.JsonRestore())).settings
                if changed := differences(made, self.settings, self.free):
                    raise InputError(
                        f"Checkpoint {path} was made with other settings (old -> new): {'; '.join(changed)}. Go back to the "
                        f"old ones, use another --workdir, or remove {path / 'settings'} to continue from it all the same."
                    )
            abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
            restored = self.manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract)))
        except InputError:
            raise
        except Exception as error:  # tensorstore, JSON and structure errors have no common class
            raise InputError(
                f"Checkpoint {path} cannot be restored ({first_line(error)}); remove that folder to continue from the one "
                f"before it."
            ) from None
        if step > steps:
            raise InputError(
                f"Checkpoint {path} is beyond the {steps} steps that the config asks for; ask for {step} or more."
            )
        return step, restored.state

    def close(self) -> None:
        """Waits for saves under way; raises `InputError` where one cannot be written."""
        with self._writing():
            self.manager.wait_until_finished()
        self.manager.close()

    def __enter__(self) -> Self:
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            self._handler = signal.signal(signal.SIGTERM, lambda *_: setattr(self, "_asked", True))
        return self

    def __exit__(self, kind, *_) -> None:
        try:
            if kind is None or issubclass(kind, Stopped):
                self.close()
            elif jax.process_count() == 1:  # several would wait for each other: behind an error they may disagree
                with contextlib.suppress(InputError):  # the first error is the one to tell
                    self.close()
        finally:
            if self._handler is not None:
                signal.signal(signal.SIGTERM, self._handler)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # tensorstore, asynchronous tasks and the file system have no common class
            why = isinstance(error, OSError) and error.strerror
            why = why or first_line(error).partition(" [")[0].rpartition(": ")[2]
            raise InputError(
                f"A checkpoint cannot be written to {self.folder} ({why}); the one before it is intact. Make room (or the "
                f"folder writable) and run the same command again."
            ) from None
