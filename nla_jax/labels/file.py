"""Labels that were made elsewhere, found in a file by document and position."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar

from nla_jax.data.rows import LABEL
from nla_jax.io.files import AnyPath, local, path_to
from nla_jax.io.parquet import columns_of, read_table
from nla_jax.labels.asking import TAGS
from nla_jax.labels.labeller import Label, LabelRow, NoLabel
from nla_jax.runtime.errors import InputError


@dataclasses.dataclass
class File:
    """A Parquet or JSON-lines file with a row for each label: `doc_id`, `position` (of the token in its document, from
    0) and `label`. The reference's names do as well: `n_raw_tokens` (position + 1) and `api_explanation`.

    Raises `InputError` where a place has two labels."""

    path: str

    reads: ClassVar[tuple[str, ...]] = ("doc_id", "position")

    def ready(self) -> None:
        """Reads the file."""
        _ = self.labels

    @functools.cached_property
    def version(self) -> str:
        """A hash of the file."""
        return hashlib.blake2b(self._file.read_bytes(), digest_size=8).hexdigest()

    @property
    def _file(self) -> Path:
        if not isinstance(self.path, str) or not self.path.endswith((".parquet", ".jsonl")):
            raise InputError(f"label.settings.path is {self.path!r}; name a .parquet or .jsonl file.")
        file = local(path_to(self.path))
        if not file.is_file():
            raise InputError(f"There is no file {self.path} (label.settings.path).")
        return file

    @functools.cached_property
    def labels(self) -> dict[tuple[str, int], Label]:
        """Every label by document and position."""
        found: dict[tuple[str, int], Label] = {}
        for number, row in enumerate(_rows(self._file), 1):
            at = (row["doc_id"], row["position"])
            label = row["label"]
            if not isinstance(at[0], str) or type(at[1]) is not int or not isinstance(label, str | None):
                raise InputError(
                    f"Row {number} of {self.path} has doc_id {at[0]!r:.40}, position {at[1]!r:.40} and a label that is "
                    f"{type(label).__name__}; a text, a whole number and a text are needed."
                )
            if at in found:
                raise InputError(
                    f"{self.path} has two labels for token {at[1]} of {at[0]!r} (the second in row {number}); keep one."
                )
            found[at] = TAGS.sub(" ", label or "").strip() or NoLabel("empty in the file", paid=False)
        return found

    def label(self, rows: Sequence[LabelRow]) -> list[Label]:
        """The label of each row, or that the file has none."""
        absent = lambda row: NoLabel("not in the file", f"token {row.position} of {row.doc_id!r}", paid=False)
        return [self.labels.get((row.doc_id, row.position)) or absent(row) for row in rows]


def _rows(file: AnyPath) -> Iterator[dict]:
    """The rows of a file under this package's names. Raises `InputError` where a name is missing."""
    if file.suffix == ".parquet":
        there = [name for name in ("doc_id", "position", "n_raw_tokens", "label", LABEL) if name in columns_of(file)]
        rows = (row for batch in read_table(file, there).to_batches() for row in batch.to_pylist())
    else:
        rows = _json_lines(file)
    for number, row in enumerate(rows, 1):
        position = row.get("position")
        if position is None and isinstance(row.get("n_raw_tokens"), int):
            position = row["n_raw_tokens"] - 1
        found = {"doc_id": row.get("doc_id"), "position": position, "label": row.get("label", row.get(LABEL))}
        named = {"doc_id": "doc_id" in row, "position": position is not None, "label": {"label", LABEL} & row.keys()}
        if absent := [name for name, there in named.items() if not there]:
            raise InputError(f"Row {number} of {file} has no {absent[0]}; each needs doc_id, position and label.")
        yield found


def _json_lines(file: AnyPath) -> Iterator[dict]:
    with open(file, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if not isinstance(row, dict):
                raise InputError(f"Line {number} of {file} is no JSON object.")
            yield row
