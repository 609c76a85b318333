"""Checkpoints of a training state: asynchronous, sharded, atomic, restorable onto another mesh (Orbax)."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from nla_jax.errors import InputError


class Checkpoints:
    """The checkpoints of one training loop: one every `every` steps and one at the end, the newest `keep` of them kept.

    A step appears under its name only when it is complete; an interrupted save leaves the previous one in place."""

    def __init__(self, folder: Path, every: int, keep: int = 2):
        options = ocp.CheckpointManagerOptions(
            save_interval_steps=every, max_to_keep=keep, cleanup_tmp_directories=True
        )
        self.folder = folder
        self.manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def save(self, step: int, state: Any, force: bool = False) -> None:
        """Saves the state after `step` steps where the interval (or `force`) says so; returns before it is written.

        Raises `InputError` where this save or the one before it cannot be written (a full disk, no permission)."""
        if step != self.manager.latest_step():
            with self._writing():
                self.manager.save(step, args=ocp.args.StandardSave(state), force=force)

    def restore(self, state: Any) -> tuple[int, Any]:
        """The newest checkpoint as `(steps done, state)`, in the shapes, dtypes and shardings of `state`; `(0, state)` where
        there is none. Raises `InputError` where the newest one cannot be read into that structure."""
        step = self.manager.latest_step()
        if step is None:
            return 0, state
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        try:
            return step, self.manager.restore(step, args=ocp.args.StandardRestore(abstract))
        except Exception as error:  # tensorstore, JSON and structure errors have no common class
            reason = str(error).strip().splitlines()[0]
            raise InputError(
                f"Checkpoint {self.folder / str(step)} cannot be restored ({reason}); "
                f"remove that folder to continue from the one before it."
            ) from None

    def close(self) -> None:
        """Waits for saves under way; raises `InputError` where one cannot be written."""
        with self._writing():
            self.manager.wait_until_finished()
        self.manager.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # tensorstore, asynchronous tasks and the file system have no common class
            reason = str(error).partition(" [")[0].strip().splitlines()[0].rpartition(": ")[2]
            raise InputError(
                f"A checkpoint cannot be written to {self.folder} ({reason}); the one before it is intact. Make room (or the "
                f"folder writable) and run the same command again."
            ) from None
