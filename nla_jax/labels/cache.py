"""What labellers have answered, by the content of what they were asked: no text is asked for, or paid for, twice."""

import json
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from nla_jax.io.files import AnyPath, upload
from nla_jax.labels.labeller import Label, NoLabel
from nla_jax.runtime.distributed import host_index

UPLOAD_SECONDS = 60


class Cache:
    """Answers by key (`CheckedLabeller.key`), one line each in the JSON-lines files of a folder.

    Every process of every host appends to a file of its own, so that a line which a kill cut short harms no other. An
    answer is on disk when `add` returns; on a bucket, which takes no appends, within `UPLOAD_SECONDS` and after
    `close`."""

    def __init__(self, folder: AnyPath):
        self.folder, self.answers = folder, {}
        files = sorted(folder.glob("*.jsonl")) if folder.exists() else []
        for file in files:
            self.answers |= _read(file)
        host = f"{host_index():05d}"
        self.name = f"{host}-{sum(file.name.startswith(host) for file in files):05d}.jsonl"
        self.scratch = None if isinstance(folder, Path) else tempfile.TemporaryDirectory()
        self.stream, self.uploaded = None, time.monotonic()

    def add(self, answers: Mapping[str, Label]) -> None:
        """Remembers answers; those that cost nothing only as long as this process runs."""
        self.answers |= answers
        lines = [_line(key, answer) for key, answer in answers.items() if isinstance(answer, str) or answer.paid]
        if not lines:
            return
        if self.stream is None:
            written = Path(self.scratch.name) if self.scratch else self.folder
            written.mkdir(parents=True, exist_ok=True)
            self.stream = open(written / self.name, "a", encoding="utf-8")  # noqa: SIM115 (closed in `close`)
        self.stream.writelines(lines)
        self.stream.flush()
        if self.scratch and time.monotonic() - self.uploaded > UPLOAD_SECONDS:
            self._upload()

    def close(self) -> None:
        """Ends the file."""
        if self.stream is not None:
            self.stream.close()
            if self.scratch:
                self._upload()

    def _upload(self) -> None:
        upload(Path(self.scratch.name), self.folder)
        self.uploaded = time.monotonic()


def _line(key: str, answer: Label) -> str:
    return json.dumps({"key": key} | as_json(answer)) + "\n"


def as_json(answer: Label) -> dict:
    """An answer as JSON can hold it, but for whether it was paid for."""
    return {"label": answer} if isinstance(answer, str) else {"why": answer.why, "detail": answer.detail}


def from_json(found: Mapping) -> Label:
    """The answer that `as_json` gave."""
    return found["label"] if "label" in found else NoLabel(found["why"], found["detail"])


def _read(file: AnyPath) -> dict[str, Label]:
    """The answers of a file, up to a line that a kill has cut short."""
    answers: dict[str, Label] = {}
    for line in file.read_bytes().splitlines():
        try:
            found = json.loads(line)
            answers[found["key"]] = from_json(found)
        except (ValueError, KeyError, TypeError):
            break
    return answers
