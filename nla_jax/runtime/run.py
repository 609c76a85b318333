"""A run: one config and one working folder, cut into stages that remember what they were made from."""

import contextlib
import datetime
import fcntl
import functools
import importlib
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from jax.sharding import Mesh
from ml_collections import ConfigDict

from nla_jax.autoencoder import Injection
from nla_jax.data.corpus import Document, load_corpus, split_of
from nla_jax.io.files import AnyPath, path_to, reaching, stand_in
from nla_jax.models.sharding import make_mesh
from nla_jax.runtime.checkpoint import FREE, UNTIL_FINISHED, Checkpoints, differences
from nla_jax.runtime.distributed import (
    barrier,
    from_writer,
    host_count,
    host_index,
    is_writer,
    writer_first,
)
from nla_jax.runtime.environment import environment
from nla_jax.runtime.errors import InputError
from nla_jax.runtime.metrics import write_atomically

# What each stage reads of the config, and the stage whose result it starts from.
STAGES = {
    "pretrain": (None, ("seed", "corpus", "split", "pretrain")),
    "extract": ("pretrain", ("seed", "compute", "corpus", "split", "subject", "extract")),
    "label": ("extract", ("label",)),
    "sft": ("label", ("mesh", "prompts", "sft")),
    "rl": ("sft", ("mesh", "rl")),
    "evaluate": ("rl", ("evaluate",)),
    "report": ("evaluate", ("report",)),
}


# What each stage leaves as it goes on, made from its settings. (A text of `evaluate` says itself what it was made from.)
LEAVES = {
    "pretrain": ("train/pretrain/checkpoints/*",),
    "extract": ("activations/*.parquet",),
    "label": ("labels/*.parquet",),
    "sft": ("train/sft_av/checkpoints/*", "train/sft_ar/checkpoints/*"),
    "rl": ("train/rl/checkpoints/*",),
    "evaluate": (),
    "report": (),
}


class Run:
    """Working folder and config of one experiment; `command` is what the user typed. Several hosts share the folder: the first
    one writes the records, and reads them for all."""

    def __init__(self, config: ConfigDict, workdir: str | Path, command: str = ""):
        self.config, self.workdir, self.command = config, path_to(workdir), command
        with self._writing():
            self.workdir.mkdir(parents=True, exist_ok=True)
        self._check_shared()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            with reaching(self.workdir):
                yield
        except OSError as error:
            raise InputError(f"The working folder {self.workdir} cannot be written ({error.strerror}).") from None

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Keeps other processes out of the folder; a lock ends with its process, however that ends. Raises `InputError` where
        another one works in it. (Buckets, and file systems without locks, keep nobody out.)"""
        if not is_writer() or not isinstance(self.workdir, Path):
            yield
            return
        with self._writing():
            file = open(self.workdir / "lock", "a+", encoding="utf-8")
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                raise InputError(
                    f"Another run works in {self.workdir} ({file.read().strip() or 'it has just begun'}); wait for its end, stop "
                    f"it, or use another --workdir."
                ) from None
            except OSError:
                pass
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
            yield

    def _check_shared(self, seconds: float = 60) -> None:
        """Raises `InputError` on a host that does not see what the first one writes (network file systems may take a while)."""
        file, limit = self.workdir / "hosts.json", time.monotonic() + seconds
        if host_count() == 1:
            return
        text = from_writer(lambda: json.dumps({"hosts": host_count(), "started": datetime.datetime.now().isoformat()}))
        write_atomically(file, text + "\n")
        while not (file.exists() and file.read_text() == text + "\n"):
            if time.monotonic() > limit:
                raise InputError(
                    f"Host {host_index()} does not find in {self.workdir} what host 0 wrote there; the working folder must be "
                    f"one that all hosts share."
                )
            time.sleep(0.2)

    def basis(self, stage: str) -> dict:
        """The part of the config that determines a stage's result, with that of the stages before it."""
        before, fields = STAGES[stage]
        own = {field: json.loads(self.config[field].to_json_best_effort()) if isinstance(self.config[field], ConfigDict)
               else self.config[field] for field in fields}  # fmt: skip
        if before == "pretrain" and self.config.subject.path:
            before = None  # the subject was made elsewhere
        return (self.basis(before) if before else {}) | own

    def made(self) -> dict:
        """What a stage is run by: the command, the date, the versions and the devices."""
        return {"command": self.command, "date": f"{datetime.datetime.now():%Y-%m-%d %H:%M}"} | environment()

    def result(self, stage: str) -> dict | None:
        """What a finished stage reported (with its `seconds`); None before it has finished."""
        record = self._record(stage)
        return record["result"] | {"seconds": record["seconds"]} if record and "result" in record else None

    def require(self, stage: str) -> dict:
        """`result`, or an `InputError` that says which verb to run first."""
        if (result := self.result(stage)) is None:
            raise InputError(
                f"{self.workdir} holds no finished {stage!r} stage; run `nla {stage}` with the same flags first."
            )
        self._check(stage)
        return result

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[dict | None]:
        """Runs a stage once: yields None where it has finished before, else a dict to fill with its result.

        Raises `InputError` where the folder holds this stage, or a part of it, made from other settings, naming all that differ
        and are not free (`nla_jax.runtime.checkpoint.FREE`; the number of steps is until the stage has finished)."""
        if self.result(name) is not None:
            self._check(name)
            yield None
            return
        previous, start = self._record(name), time.monotonic()
        if previous and from_writer(lambda: any(any(self.workdir.glob(pattern)) for pattern in LEAVES[name])):
            self._check(name)
        with self._writing():
            write_atomically(self.workdir / "config.json", self.config.to_json_best_effort(indent=1) + "\n")
        spent = previous["seconds"] if previous else 0.0
        record = {"basis": self.basis(name), "made": self.made(), "seconds": spent}
        self._write(name, record)
        result = {}
        try:
            yield result
            record["result"] = result
        finally:
            record["seconds"] = round(spent + time.monotonic() - start, 2)
            self._write(name, record)
        barrier(f"the end of {name}")

    def _file(self, stage: str) -> AnyPath:
        return self.workdir / "stages" / f"{stage}.json"

    def _record(self, stage: str) -> dict | None:
        file = self._file(stage)

        def read() -> dict | None:
            try:
                return json.loads(file.read_text()) if file.exists() else None
            except ValueError:
                raise InputError(f"{file} is damaged; delete it and what the stage wrote, to make it anew.") from None

        return from_writer(read)

    def _write(self, stage: str, record: dict) -> None:
        self._file(stage).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self._file(stage), json.dumps(record, indent=1) + "\n")

    def _check(self, stage: str) -> None:
        record = self._record(stage)
        free = FREE if "result" in record else FREE | UNTIL_FINISHED
        if changed := differences(record["basis"], self.basis(stage), free):
            raise InputError(
                f"{self.workdir} holds stage {stage!r} made with other settings (old -> new): {'; '.join(changed)}. Go back to the "
                f"old ones, use another --workdir, or delete {self._file(stage)} and what the stage wrote."
            )

    def checkpoints(self, stage: str, folder: AnyPath, **base: str) -> Checkpoints:
        """The checkpoints of a training loop of a stage, under `folder`; `base`: what the loop reads of frozen weights, with
        their hashes. A run on other settings or another base does not continue from them."""
        c = self.config
        return Checkpoints(
            folder / "checkpoints", c[stage].checkpoint_every, c.checkpoints.keep, c.checkpoints.keep_every,
            self.basis(stage) | {"base": base},
        )  # fmt: skip

    # What several stages read.

    def documents(self) -> list[Document]:
        """The corpus of the config."""
        with writer_first():  # TFDS prepares a dataset there
            return list(load_corpus(data_dir=stand_in(self.workdir / "corpus"), **self.config.corpus))

    def split(self, document: Document) -> str:
        return split_of(document, self.config.split, self.config.seed)

    @functools.cached_property
    def mesh(self) -> Mesh:
        """The device mesh of the config."""
        return make_mesh(**self.config.mesh)

    @property
    def subject_folder(self) -> str | AnyPath:
        return self.config.subject.path or self.workdir / "subject"


def injection(config: ConfigDict) -> Injection:
    """How a config says that activations enter the prompt."""
    return Injection(resolve(config.prompts.injection), config.prompts.injection_block)


def resolve(name: str) -> Callable:
    """The function that a config names as `package.module:function`."""
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(
            f"{name!r} names no function that can be imported as `package.module:function` ({error})."
        ) from None
