"""What a run records about itself: metrics and texts of every step, and a progress line with an ETA."""

import contextlib
import json
import math
import secrets
import shutil
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar, text

from nla_jax.io.files import AnyPath, replacing, upload
from nla_jax.runtime.distributed import barrier, is_writer
from nla_jax.runtime.errors import InputError, first_line

UPLOAD_SECONDS = 60
METRICS, TEXTS = "metrics.jsonl", "texts.jsonl"
SUMS = ".crc32"  # ends the name of the file that holds a checksum of each line of another


class MetricLog:
    """The metrics of each step in `{folder}/metrics.jsonl` and a few of its texts in `{folder}/texts.jsonl`, one JSON
    object a line; a file beside each holds a checksum of every line. TensorBoard's files show both. So does Weights &
    Biases if `wandb` gives its settings (project, name, mode), with `config` as a snapshot of the run's. Of several hosts
    the first one writes; on all of them `records` holds the metrics.

    Opening it at `step` drops what was logged after that step: a resumed run continues at its checkpoint, and the files
    read as if it had never stopped. On Weights & Biases it continues the same run.

    Nothing can be appended to a file on a bucket. There the files are written in a scratch folder, and uploaded every
    `UPLOAD_SECONDS`, by `flush`, and at the end.

    Raises `InputError` if Weights & Biases is asked for but cannot start, and where the disk takes no more."""

    def __init__(self, folder: AnyPath, step: int = 0, wandb: dict | None = None, config: dict | None = None):
        self.folder, self.path = folder, folder / METRICS
        kept = {name: [r for r in read_metrics(folder / name) if r["step"] <= step] for name in (METRICS, TEXTS)}
        self.records = kept[METRICS]
        barrier("the metrics")  # all hosts have read the file that the first one now writes again
        if not is_writer():
            return
        self.scratch = None if isinstance(folder, Path) else tempfile.TemporaryDirectory()
        self.written, self.uploaded = Path(self.scratch.name) if self.scratch else folder, 0.0
        self.written.mkdir(parents=True, exist_ok=True)
        for name, records in kept.items():
            if (folder / name).exists():
                for path, lines in _files(self.written / name, records).items():
                    write_atomically(path, "".join(lines))
        self.board = Board(self.written / "tensorboard", step)
        self.wandb = _start_wandb(folder, self.written, wandb, config) if wandb else None

    def write(self, step: int, values: dict[str, Any]) -> dict:
        """Adds a record of scalars and returns it as it stands in the file: NaN and infinities are None."""
        record = {"step": step} | {name: _number(value) for name, value in values.items()}
        self.records.append(record)
        if is_writer():
            numbers = {name: value for name, value in record.items() if name != "step" and value is not None}
            with self._writing():
                self._append(METRICS, [record])
                self.board.write(step, *(scalar(name, value) for name, value in numbers.items()))
            if self.wandb:
                self.wandb.log(numbers, step=step)
            if time.monotonic() - self.uploaded > UPLOAD_SECONDS:
                self.flush()
        return record

    def write_texts(self, step: int, rows: list[dict]) -> None:
        """Adds a few texts of a step, each a row with its scores: `{"text": "…", "reward": 0.5}`."""
        if not is_writer():
            return
        rows = [{name: _number(value) for name, value in row.items()} for row in rows]
        # Markdown shows what is indented as it is, markup and all.
        shown = "\n".join(f"    {json.dumps(row, ensure_ascii=False)}" for row in rows)
        with self._writing():
            self._append(TEXTS, [{"step": step} | row for row in rows])
            self.board.write(step, text("texts", shown))
        if self.wandb:
            from wandb import Table

            columns = list(dict.fromkeys(name for row in rows for name in row))
            table = Table(columns=columns, data=[[row.get(name) for name in columns] for row in rows])
            self.wandb.log({"texts": table}, step=step)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Says in one sentence that the disk takes no more."""
        try:
            yield
        except OSError as error:
            raise InputError(
                f"The metrics of a step cannot be written to {self.written} ({error.strerror or first_line(error)}); "
                f"the checkpoint and the records of the steps before it are intact. Make room (or the folder writable) "
                f"and run the same command again."
            ) from None

    def _append(self, name: str, records: list[dict]) -> None:
        for path, lines in _files(self.written / name, records).items():
            with open(path, "a", encoding="utf-8") as stream:
                stream.writelines(lines)

    def flush(self) -> None:
        """Returns when everything logged so far is in the folder (which matters on a bucket only)."""
        if is_writer() and self.scratch:
            upload(self.written, self.folder)
            self.uploaded = time.monotonic()

    def close(self) -> None:
        """Ends the log; it cannot be written to afterwards."""
        if is_writer():
            self.board.file.close()
            if self.wandb:
                self.wandb.finish()
            self.flush()


class Board:
    """A file of TensorBoard's events. It is complete after every write: tensorboardX's own writer keeps a queue that
    stands still when its thread has met a full disk, and the training loop would wait for it forever."""

    def __init__(self, folder: Path, step: int):
        """What older files in `folder` say of the steps after `step` counts no more."""
        folder.mkdir(parents=True, exist_ok=True)
        self.file = EventsWriter(str(folder / "events"), filename_suffix=f".{step}")
        self._add(Event(step=step + 1, session_log=SessionLog(status=SessionLog.START)))

    def write(self, step: int, *summaries: Any) -> None:
        """Adds summaries (tensorboardX.summary) of a step. Raises `OSError` where the disk takes no more."""
        for summary in summaries:
            self._add(Event(step=step, summary=summary))
        self.file.flush()

    def _add(self, event: Event) -> None:
        event.wall_time = time.time()
        self.file.write_event(event)


def _start_wandb(folder: AnyPath, scratch: Path, settings: dict, config: dict | None) -> Any:
    """A run of Weights & Biases. `folder` remembers its id, so that a resumed stage continues the same one."""
    try:
        import wandb
    except ImportError:
        raise InputError("Logging to Weights & Biases needs its package: pip install 'nla_jax[wandb]'.") from None
    id_file = folder / "wandb_id.txt"
    if not id_file.exists():
        write_atomically(id_file, secrets.token_hex(4))
    try:
        return wandb.init(
            **settings,
            config=config,
            id=id_file.read_text(),
            resume="allow",
            reinit="finish_previous",
            dir=str(scratch),
            settings=wandb.Settings(silent=True, console="off"),
        )
    except (wandb.Error, TypeError, ValueError) as error:
        raise InputError(
            f"Weights & Biases cannot start with {settings} ({first_line(error)}); log in with `wandb login`, or set "
            f"its mode to offline."
        ) from None


def _number(value: Any) -> float | int | str | None:
    """A value that JSON has; None for NaN and infinities, which it has not."""
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _files(path: AnyPath, records: list[dict]) -> dict[AnyPath, list[str]]:
    """The lines that records are in a file, and those of its checksums: written after them, so that a kill in between
    leaves a line without a checksum, never a checksum without its line."""
    lines = [json.dumps(record) + "\n" for record in records]
    return {path: lines, path.with_name(path.name + SUMS): [f"{zlib.crc32(line.encode()):08x}\n" for line in lines]}


def read_metrics(path: AnyPath) -> list[dict]:
    """The records of a `metrics.jsonl` or `texts.jsonl`, up to the first line that a kill has cut short or that is
    damaged.

    Raises `InputError` where the checksums beside the file are not those of its lines."""
    sums = path.with_name(path.name + SUMS)
    # The checksums first: a run that is at work adds a line before its checksum, so there is a line for each of them.
    stated, lines = (file.read_bytes().splitlines(keepends=True) if file.exists() else [] for file in (sums, path))
    made = [b"%08x\n" % zlib.crc32(line) for line in lines]
    whole = [line for line in stated if line.endswith(b"\n")]  # the last one may have been cut by a kill or a full disk
    if whole != made[: len(whole)]:
        raise InputError(
            f"{path} and {sums.name} beside it do not fit each other: one of them is damaged. Delete both (with them go "
            f"the records of the steps so far), and run the same command again."
        )
    records = []
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:  # no JSON, or no UTF-8
            break
        if not isinstance(record, dict) or "step" not in record:
            break
        records.append(record)
    return records


def write_atomically(path: AnyPath, text: str) -> None:
    """Writes a small text file so that `path` holds the old content or the new, never a part. Of several hosts the
    first one writes it, and the others do nothing."""
    if not is_writer():
        return
    with replacing(path) as scratch:
        scratch.write_text(text, encoding="utf-8")


class Progress:
    """A progress line with an ETA on standard error. On a terminal one line changes in place; in a file a new one is
    added every 20 seconds. Of several hosts the first one shows it. The ETA does not count the first step, which also
    compiles."""

    def __init__(self, name: str, total: int, done: int = 0):
        self.name, self.total, self.count = name, total, done
        self.terminal, self.shown = sys.stderr.isatty(), -math.inf
        self.first: tuple[int, float] | None = None  # the count and the time after the first step

    def update(self, n: int = 1, **shown: float | None) -> None:
        """Counts `n` more, and shows these values."""
        now, self.count = time.monotonic(), self.count + n
        self.first = self.first or (self.count, now)
        ended = self.count >= self.total
        if not is_writer() or now - self.shown < (0.2 if self.terminal else 20) and not ended:
            return
        self.shown = now
        count, start = self.first
        seconds = (now - start) / (self.count - count) * (self.total - self.count) if self.count > count else None
        left = "-:--" if seconds is None else _clock(seconds)
        values = [f"{name} {value:.3g}" for name, value in shown.items() if value is not None]
        line = "  ".join([f"{self.name:>9} {self.count}/{self.total}", f"ETA {left}", *values])
        if self.terminal:
            line = f"\r\x1b[K{line[: shutil.get_terminal_size().columns - 1]}"
        print(line, end="" if self.terminal and not ended else "\n", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Ends the line where it stands, if it is not complete."""
        if self.terminal and is_writer() and self.count < self.total:
            print(file=sys.stderr)


def _clock(seconds: float) -> str:
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"
