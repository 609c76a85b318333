"""A run: one config and one working folder, cut into stages that remember what they were made from."""

import contextlib
import dataclasses
import datetime
import fcntl
import functools
import json
import os
import socket
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from nla_jax.config import Config, completed, is_free
from nla_jax.data.corpus import Document, load_corpus, split_of
from nla_jax.io.files import AnyPath, fits_seal, path_to, reaching, stand_in
from nla_jax.models.sharding import make_mesh
from nla_jax.runtime.checkpoint import Checkpoints, differences, flat
from nla_jax.runtime.distributed import barrier, from_writer, host_count, host_index, is_writer, writer_first
from nla_jax.runtime.environment import environment
from nla_jax.runtime.errors import InputError
from nla_jax.runtime.metrics import write_atomically

CLOCKS = ("seconds", "cpu_seconds")  # what a stage records of the time that it took


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage of a study, as the table in stages/table.py lists it."""

    name: str
    help: str  # one line for the command line
    run: str  # import path of `(Run) -> None`
    needs: str | None  # the stage whose result it starts from
    reads: tuple[str, ...]  # sections of the config that determine its result, beside those of the stages before it
    makes: tuple[str, ...]  # patterns of the files that it makes: where they are gone, it runs again
    leaves: tuple[str, ...] = ()  # patterns of partial results: where one exists, settings may not change


class Run:
    """Working folder and config of one study; `command` is what the user typed.

    Several hosts share the folder: the first one writes the records, and reads them for all."""

    def __init__(self, config: Config, workdir: str | Path, stages: Mapping[str, Stage], command: str = ""):
        self.config, self.workdir, self.stages, self.command = config, path_to(workdir), stages, command
        self._before, self._start = dict.fromkeys(CLOCKS, 0.0), clocks()
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
        """Keeps other processes out of the folder; the lock ends with the process, however that ends.

        Buckets, and file systems without locks, keep nobody out. Raises `InputError` where another process works
        here."""
        if not is_writer() or not isinstance(self.workdir, Path):
            yield
            return
        with self._writing():
            file = open(self.workdir / "lock", "a+", encoding="utf-8")  # noqa: SIM115 (closed below)
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                raise InputError(
                    f"Another run works in {self.workdir} ({file.read().strip() or 'it has just begun'}); wait for its "
                    f"end, stop it, or use another --workdir."
                ) from None
            except OSError:
                pass
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
            yield

    def _check_shared(self, seconds: float = 60) -> None:
        """Raises `InputError` on a host that does not see what the first one writes, within `seconds`."""
        file, limit = self.workdir / "hosts.json", time.monotonic() + seconds
        if host_count() == 1:
            return
        started = datetime.datetime.now().isoformat
        text = from_writer(lambda: json.dumps({"hosts": host_count(), "started": started()}))
        write_atomically(file, text + "\n")
        while not (file.exists() and file.read_text() == text + "\n"):
            if time.monotonic() > limit:
                raise InputError(
                    f"Host {host_index()} does not find in {self.workdir} what host 0 wrote there; the working folder "
                    f"must be one that all hosts share."
                )
            time.sleep(0.2)

    # Stages and their records

    def basis(self, stage: str) -> dict:
        """The settings that determine a stage's result, with those of the stages before it."""
        before, settings = self.stages[stage].needs, self.config.to_dict()
        if before == "pretrain" and self.config.subject.path:
            before = None  # the subject was made elsewhere
        return (self.basis(before) if before else {}) | {name: settings[name] for name in self.stages[stage].reads}

    def made(self) -> dict:
        """What a stage is run by: the command, the date, the versions and the devices."""
        return {"command": self.command, "date": f"{datetime.datetime.now():%Y-%m-%d %H:%M}"} | environment()

    def result(self, stage: str) -> dict | None:
        """What a finished stage reported (with its `seconds`); None before it has finished."""
        record = self._record(stage)
        return record["result"] | {"seconds": record["seconds"]} if record and "result" in record else None

    def begun(self, stage: str) -> dict | None:
        """How a stage was made, finished or not: `made`, and its `seconds` so far; None before it has begun.

        Raises `InputError` where it was begun with other settings."""
        if (record := self._record(stage)) is None:
            return None
        self._check(stage, free_until_finished)
        return record.get("made", {}) | {"seconds": record["seconds"]}

    def forget(self, stage: str) -> None:
        """Removes the record of a stage, which then runs again."""
        if is_writer():
            self._file(stage).unlink(missing_ok=True)
        barrier(f"the record of {stage}")

    def require(self, stage: str) -> dict:
        """`result`. Raises `InputError` where the stage has not finished, or was made with other settings."""
        if (result := self.result(stage)) is None:
            raise InputError(
                f"{self.workdir} holds no finished {stage!r} stage; run `nla {stage}` with the same flags first."
            )
        self._check(stage, is_free)
        if changed := self._changed(stage, self._record(stage)):
            raise InputError(f"{changed} is not what `nla {stage}` wrote; delete it, and run `nla {stage}` again.")
        return result

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[dict | None]:
        """Runs a stage once: yields None where it has finished before, else a dict to fill with its result.

        A finished stage runs again where its files are gone, and goes on where more steps are asked for. Raises
        `InputError` where the folder holds this stage, or a part of it, made with other settings that are not free
        (`config.is_free`; the number of steps is free until the stage has finished)."""
        previous, self._start = self._record(name), clocks()
        if previous and "result" in previous and self._is_whole(previous) and not self._goes_on(name, previous):
            self._check(name, is_free)
            if changed := self._changed(name, previous):
                raise InputError(f"{changed} is damaged; delete it, and the same command makes it again.")
            yield None
            return
        leaves = self.stages[name].leaves
        if previous and from_writer(lambda: any(any(self.workdir.glob(pattern)) for pattern in leaves)):
            self._check(name, free_until_finished)
        with self._writing():
            write_atomically(self.workdir / "config.json", json.dumps(self.config.to_dict(), indent=1) + "\n")
        self._before = {clock: (previous or {}).get(clock, 0.0) for clock in CLOCKS}
        record = {"basis": self.basis(name), "made": self.made(), **self._before}
        self._write(name, record)
        result = {}
        try:
            yield result
            record["result"] = result
            record["files"] = {pattern: self._count(pattern) for pattern in self.stages[name].makes}
            record["checksums"] = from_writer(lambda: {file: self._sum(file) for file in self._made(name)})
        finally:
            record |= {clock: round(seconds, 2) for clock, seconds in self.spent().items()}
            self._write(name, record)
        barrier(f"the end of {name}")

    def spent(self) -> dict[str, float]:
        """What the stage under way has taken so far, with the processes that worked on it before: `seconds`, and the
        `cpu_seconds` of this host, which other work on it hardly changes."""
        return {clock: self._before[clock] + now - self._start[clock] for clock, now in clocks().items()}

    def spent_at_least(self, recorded: Mapping[str, float]) -> None:
        """A process that was killed wrote no record of its stage: what its last step had taken counts all the same."""
        for clock, seconds in self.spent().items():
            self._before[clock] += max(0.0, recorded.get(clock, 0.0) - seconds)

    def _count(self, pattern: str) -> int:
        return from_writer(lambda: len(list(self.workdir.glob(pattern))))

    def _is_whole(self, record: dict) -> bool:
        """Whether the files that a finished stage made are still there."""
        counted = all(self._count(pattern) >= count for pattern, count in record["files"].items())
        return counted and from_writer(
            lambda: all((self.workdir / file).exists() for file in record.get("checksums", ()))
        )

    def _made(self, stage: str) -> list[str]:
        """The files that a stage has made, but for those that carry checksums of their own."""
        found = [path for pattern in self.stages[stage].makes for path in sorted(self.workdir.glob(pattern))]
        files = [file for path in found for file in ([path] if path.is_file() else sorted(path.rglob("*")))]
        own = (".parquet", ".safetensors")
        return [str(file.relative_to(self.workdir)) for file in files if file.is_file() and file.suffix not in own]

    def _sum(self, file: str) -> str:
        return f"{zlib.crc32((self.workdir / file).read_bytes()):08x}"

    def _changed(self, stage: str, record: dict) -> str | None:
        """The first of a finished stage's files that is another one than it has written. A sidecar with a checksum of its
        own that fits is whole: somebody has put another pair there."""
        there = lambda file: (self.workdir / file).exists() and not fits_seal((self.workdir / file).read_bytes())
        sums = record.get("checksums", {}).items()
        found = from_writer(
            lambda: next((file for file, made in sums if there(file) and self._sum(file) != made), None)
        )
        return found and str(self.workdir / found)

    def _goes_on(self, stage: str, record: dict) -> bool:
        """Whether a finished stage has more to do: more steps of its own, or (if it keeps nothing) of the stages
        before."""
        made, now = flat(completed(record["basis"])), flat(completed(self.basis(stage)))
        changed = [name for name in made.keys() | now.keys() if made.get(name) != now.get(name) and not is_free(name)]
        if not changed or any(name.split(".")[-1] != "steps" or made[name] > now[name] for name in changed):
            return False
        own = self.stages[stage].reads
        return not self.stages[stage].leaves or all(name.split(".")[0] in own for name in changed)

    def _file(self, stage: str) -> AnyPath:
        return self.workdir / "stages" / f"{stage}.json"

    def _record(self, stage: str) -> dict | None:
        file = self._file(stage)

        def read() -> dict | None:
            if not file.exists():
                return None
            kinds = {"basis": dict, "seconds": (int, float)}
            record = read_json(file, kinds, "delete it and the files of that stage to run it again")
            whole = "result" not in record or all(isinstance(record.get(name), dict) for name in ("result", "files"))
            if not whole or record.pop("checksum", None) not in (None, _seal(record)):
                raise InputError(f"{file} is damaged; delete it and the files of that stage to run it again.")
            return record

        return from_writer(read)

    def _write(self, stage: str, record: dict) -> None:
        self._file(stage).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self._file(stage), json.dumps(record | {"checksum": _seal(record)}, indent=1) + "\n")

    def _check(self, stage: str, may_differ: Callable[[str], bool]) -> None:
        if changed := differences(self._record(stage)["basis"], self.basis(stage), may_differ):
            raise InputError(
                f"{self.workdir} holds stage {stage!r} made with other settings (old -> new): {'; '.join(changed)}. Go back "
                f"to the old ones, use another --workdir, or delete {self._file(stage)} and the files of that stage."
            )

    # What several stages use

    def checkpoints(self, stage: str, folder: AnyPath, **base: str) -> Checkpoints:
        """The checkpoints of a training loop of a stage, under `folder`.

        `base`: hashes of the frozen weights that the loop reads. A run on other settings or another base does not
        continue from them."""
        c = self.config
        every = getattr(c, stage).checkpoint_every
        settings = self.basis(stage) | {"base": base}
        return Checkpoints(
            folder / "checkpoints", every, c.checkpoints.keep, c.checkpoints.keep_every, settings, free_until_finished
        )

    def documents(self) -> list[Document]:
        """The documents of the corpus."""
        with writer_first():  # TFDS prepares a dataset there
            corpus = self.config.corpus.to_dict()
            return list(load_corpus(data_dir=stand_in(self.workdir / "corpus"), **corpus))

    def split(self, document: Document) -> str:
        """The split that a document belongs to."""
        return split_of(document, self.config.split, self.config.seed)

    @functools.cached_property
    def mesh(self) -> Mesh:
        """The device mesh of the config."""
        return mesh_of(self.config)

    @property
    def subject_folder(self) -> str | AnyPath:
        """The folder or hub id of the subject."""
        return self.config.subject.path or self.workdir / "subject"


def clocks() -> dict[str, float]:
    """What the clocks of a stage show now."""
    return {"seconds": time.monotonic(), "cpu_seconds": time.process_time()}


def _seal(record: dict) -> str:
    """A checksum of a record, of which a changed byte would be another result."""
    return f"{zlib.crc32(json.dumps(record, sort_keys=True).encode()):08x}"


def read_json(file: AnyPath, kinds: Mapping[str, Any], cure: str) -> dict:
    """The JSON object in a file that a run wrote; `kinds`: the types of entries that it must have.

    Raises `InputError` with the `cure` where the file is damaged."""
    try:
        found = json.loads(file.read_bytes())
    except ValueError:  # no JSON, or no UTF-8
        found = None
    if not isinstance(found, dict) or not all(isinstance(found.get(name), kind) for name, kind in kinds.items()):
        raise InputError(f"{file} is damaged; {cure}.")
    return found


def mesh_of(config: Config) -> Mesh:
    """The devices that a config asks for. Raises `InputError` where they are not there."""
    return make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)


def free_until_finished(name: str) -> bool:
    """Whether a setting may differ between the runs that share an unfinished stage."""
    return is_free(name) or name.split(".")[-1] == "steps"
