"""What a run says about itself: `metrics.jsonl`, TensorBoard, and a progress line with an ETA."""

import json
import math
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter
from tqdm import tqdm

from nla_jax.io.files import AnyPath, replacing, upload
from nla_jax.runtime.distributed import barrier, is_writer

UPLOAD_SECONDS = 60


class MetricLog:
    """The metrics of one stage, one JSON object a step in `{folder}/metrics.jsonl`, mirrored to TensorBoard. Of several hosts
    the first one writes; on all of them `records` holds what was logged.

    Opening it at `step` drops records after that step: a resumed run continues where its checkpoint stands, and the file
    reads as if it had never stopped.

    A bucket knows no appending: there both are written in a scratch folder, and uploaded every `UPLOAD_SECONDS`, at the end and
    by `flush`."""

    def __init__(self, folder: AnyPath, step: int = 0):
        self.folder, self.path = folder, folder / "metrics.jsonl"
        self.records = [r for r in read_metrics(self.path) if r["step"] <= step]
        barrier("the metrics")  # all hosts have read what the first one now writes anew
        if not is_writer():
            return
        self.scratch, self.uploaded = None if isinstance(folder, Path) else tempfile.TemporaryDirectory(), 0.0
        written = Path(self.scratch.name) if self.scratch else folder
        written.mkdir(parents=True, exist_ok=True)
        write_atomically(written / "metrics.jsonl", "".join(json.dumps(r) + "\n" for r in self.records))
        self.stream = open(written / "metrics.jsonl", "a")
        self.board = SummaryWriter(str(written / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, values: dict[str, Any]) -> dict:
        """Adds a record and returns it as it stands in the file: NaN and infinities are None."""
        record = {"step": step} | {name: _number(value) for name, value in values.items()}
        self.records.append(record)
        if not is_writer():
            return record
        self.stream.write(json.dumps(record) + "\n")
        self.stream.flush()
        for name, value in record.items():
            if name != "step" and value is not None:
                self.board.add_scalar(name, value, step)
        if time.monotonic() - self.uploaded > UPLOAD_SECONDS:
            self.flush()
        return record

    def write_texts(self, step: int, rows: list[dict]) -> None:
        pass

    def flush(self) -> None:
        """Whatever was logged stands in the folder afterwards (where that is no bucket, it always does)."""
        if is_writer() and self.scratch:
            self.board.flush()
            upload(Path(self.scratch.name), self.folder)
            self.uploaded = time.monotonic()

    def close(self) -> None:
        if is_writer():
            self.stream.close()
            self.board.close()
            self.flush()


def _number(value: Any) -> float | int | None:
    """A JSON number; None for NaN and infinities, which JSON has not."""
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_metrics(path: AnyPath) -> list[dict]:
    """The records of a `metrics.jsonl`; a last line that a kill cut short is left out."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def write_atomically(path: AnyPath, text: str) -> None:
    """Writes a small text file so that `path` holds the old content or the new, never a part; of several hosts the first one
    writes it, the others do nothing."""
    if not is_writer():
        return
    with replacing(path) as scratch:
        scratch.write_text(text, encoding="utf-8")


class Progress:
    """A progress line with ETA on a terminal; where the output is a file, one line every 20 seconds. Of several hosts the
    first one shows it."""

    def __init__(self, name: str, total: int, done: int = 0):
        self.name, self.start, self.first, self.last = name, time.monotonic(), done, 0.0
        self.bar = tqdm(
            total=total, initial=done, desc=f"{name:>9}", disable=not (sys.stderr.isatty() and is_writer()),
            dynamic_ncols=True, leave=True, smoothing=0.05,
        )  # fmt: skip
        self.total, self.count = total, done

    def update(self, n: int = 1, **shown: float) -> None:
        self.count += n
        text = "  ".join(f"{k} {v:.3g}" for k, v in shown.items() if v is not None)
        if not is_writer():
            return
        if not self.bar.disable:
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update(n)
            return
        now = time.monotonic()
        if now - self.last > 20 or self.count >= self.total:
            self.last = now
            left = (now - self.start) / max(self.count - self.first, 1) * (self.total - self.count)
            print(f"{self.name:>9} {self.count}/{self.total}  ETA {_clock(left)}  {text}", file=sys.stderr, flush=True)

    def close(self) -> None:
        self.bar.close()

    def over(self, items: Iterable) -> Iterator:
        """Iterates, counting one an item."""
        for item in items:
            yield item
            self.update()
        self.close()


def _clock(seconds: float) -> str:
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"
