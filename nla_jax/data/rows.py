"""The rows of a run: activations in Parquet shards, their labels, and where they come from."""

import dataclasses
import hashlib
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nla_jax.io.files import AnyPath, local
from nla_jax.io.parquet import (
    VECTORS,
    columns_of,
    list_column,
    list_vectors,
    read_batches,
    read_table,
    readable,
    row_count,
)
from nla_jax.runtime.distributed import from_writer, host_index
from nla_jax.runtime.errors import InputError
from nla_jax.subject import Activations

LABEL, TEXT, IDS = "api_explanation", "detokenized_text_truncated", "token_ids"
NO_LABEL = "no_label"  # in a file of labels: why a row has none


def activation_table(activations: Activations, layer: int) -> pa.Table:
    """A shard's rows: the reference's columns, and what it takes to look at a row and to run it again.

    `token_ids` are those of the document up to the row's token; `role` is who speaks there, in a chat."""
    strings = lambda x: pa.array(x, pa.string())
    return pa.table(
        {
            VECTORS: list_column(activations.vectors.astype(np.float32, copy=False)),
            "doc_id": strings(activations.doc_ids),
            "n_raw_tokens": pa.array(activations.positions + 1, pa.int32()),
            "activation_layer": pa.array(np.full(len(activations), layer, np.int32)),
            TEXT: strings(activations.texts),
            "token": strings(activations.tokens),
            "following": strings(activations.following),
            "role": strings(activations.roles),
            IDS: pa.array(activations.token_ids, pa.list_(pa.int32())),
        }
    )


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows of one split: `vectors` [n, d] float32 (raw), mapped from disk, and their other columns, read when asked
    for.

    `at` says which rows of the shards they are, ascending; None: all of them."""

    vectors: np.ndarray
    shards: tuple[AnyPath, ...]
    at: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.vectors)

    def column(self, name: str) -> list:
        """A column of all rows: `doc_id`, `token`, `following`, `role`, `token_ids`, …, or `api_explanation`, the
        label.

        Where the shards do not have it, each row gets "". A row of which the labeller had no label gets None. Raises
        `InputError` where labels are missing."""
        return list(itertools.chain.from_iterable(self.pieces(name)))

    def pieces(self, name: str) -> Iterator[list]:
        """`column`, one shard after another."""
        start = 0
        for shard in self.shards:
            size = row_count(shard)
            at = np.arange(size) if self.at is None else self.at[(start <= self.at) & (self.at < start + size)] - start
            start += size
            if name == LABEL:
                yield read_labels(shard).take(at).to_pylist()
            elif name in columns_of(shard):
                yield read_table(shard, [name]).column(0).take(at).to_pylist()
            else:
                yield [""] * len(at)

    def labelled(self) -> np.ndarray:
        """The numbers of the rows that have a label, ascending."""
        return np.flatnonzero([label is not None for labels in self.pieces(LABEL) for label in labels])

    def records(self, at: np.ndarray) -> list[dict]:
        """The rows `at`, each as `{doc_id, text, token, role, position}`: what features and labellers are given."""
        names = {"doc_id": "doc_id", "text": TEXT, "token": "token", "role": "role", "position": "n_raw_tokens"}
        columns = mapped_columns(self.shards).take(at if self.at is None else self.at[at]).to_pydict()
        columns["n_raw_tokens"] = [n - 1 for n in columns["n_raw_tokens"]]
        found = {name: columns.get(column, [""] * len(at)) for name, column in names.items()}
        return [dict(zip(found, row)) for row in zip(*found.values())]


def load_rows(workdir: AnyPath, split: str) -> Rows:
    """All rows of a split."""
    files = shards_of(workdir / "activations", split)
    return Rows(mapped_vectors(files), tuple(files))


def spread(rows: Rows, count: int) -> Rows:
    """`count` of all rows of a split, spread evenly over its documents (all of them where there are fewer)."""
    if len(rows) <= count:
        return rows
    at = np.linspace(0, len(rows) - 1, count).astype(int)
    return Rows(rows.vectors[at], rows.shards, at)


def read_labels(shard: AnyPath) -> pa.ChunkedArray:
    """The labels of a shard of activations. Raises `InputError` where there are none, or not one for each row."""
    file = shard.parent.parent / "labels" / shard.name
    if not file.exists():
        raise InputError(f"{shard} has no labels; run `nla label` with its split in label.splits.")
    labels = read_table(file, [LABEL]).column(0)
    if len(labels) != row_count(shard):
        raise InputError(
            f"{file} holds {len(labels)} labels for {row_count(shard)} rows; delete it and run `nla label`."
        )
    return labels


def shards_of(folder: AnyPath, split: str) -> list[AnyPath]:
    """The files of a split in order. Raises `InputError` where one is missing."""
    files = sorted(folder.glob(f"{split}-*-of-*.parquet"))
    if not files:
        raise InputError(f"{folder} holds no {split} data; run `nla extract` first.")
    total = int(files[0].stem.rsplit("-", 1)[1])
    if len(files) != total:
        raise InputError(
            f"{folder} holds {len(files)} of {total} {split} shards; delete stages/extract.json and run `nla extract`."
        )
    return files


# Copies that can be mapped: Parquet has to be decoded, training reads rows at random.


def mapped_vectors(files: Sequence[AnyPath]) -> np.memmap:
    """The vectors of all shards of a split, [n, d] float32, mapped from a `.npy` file that the first use writes."""
    return np.load(_decoded(files, ".npy", _write_vectors, _is_array), mmap_mode="r")


def mapped_columns(files: Sequence[AnyPath]) -> pa.Table:
    """The other columns of all shards, mapped from an `.arrow` file that the first use writes."""
    path = _decoded(files, ".arrow", _write_columns, _is_table)
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()


def _decoded(files: Sequence[AnyPath], suffix: str, write: Callable, whole: Callable[[Path], bool]) -> Path:
    """The copy of some shards: beside them, or beside the local copies of shards on a bucket, which are each host's
    own.

    Its name depends on the sizes and times of the shards, so that changed shards are decoded again."""
    copies = [local(file) for file in files]

    def make() -> str:
        state = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in copies]
        split = copies[0].name.rsplit("-", 3)[0]
        path = copies[0].with_name(
            f"{split}-{hashlib.blake2b(repr(state).encode(), digest_size=8).hexdigest()}{suffix}"
        )
        if not whole(path):
            for stale in path.parent.glob(f"{split}-*{suffix}"):
                stale.unlink()
            scratch = path.with_name(f"{path.name}.{host_index()}.incomplete")  # hosts may decode at once
            with open(scratch, "wb") as out:  # written, not mapped: a full disk is then an error, not a crash
                write(copies, out)
            os.replace(scratch, path)
        return path.name

    return copies[0].with_name(from_writer(make) if isinstance(files[0], Path) else make())


def _write_vectors(files: Sequence[Path], out: BinaryIO) -> None:
    with readable(files[0]):
        width = pq.read_schema(files[0]).field(VECTORS).type.list_size
    shape = (sum(map(row_count, files)), width)
    np.lib.format.write_array_header_1_0(out, {"descr": "<f4", "fortran_order": False, "shape": shape})
    for file in files:
        for batch in read_batches(file, [VECTORS]):
            out.write(np.ascontiguousarray(list_vectors(batch.column(0), width, file)))


def _write_columns(files: Sequence[Path], out: BinaryIO) -> None:
    names = [name for name in columns_of(files[0]) if name != VECTORS]
    with pa.ipc.new_file(out, read_table(files[0], names).schema) as writer:
        for file in files:
            writer.write_table(read_table(file, names))


def _is_array(file: Path) -> bool:
    """Whether an array file is there, and whole; reads its header alone."""
    try:
        np.load(file, mmap_mode="r")
    except (OSError, EOFError, ValueError):
        return False
    return True


def _is_table(file: Path) -> bool:
    """Whether an Arrow file is there, and whole: its end is written last."""
    try:
        pa.ipc.open_file(pa.memory_map(str(file)))
    except (OSError, pa.ArrowException):
        return False
    return True
