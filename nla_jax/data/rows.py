"""The rows of a run: activations in Parquet shards, their labels, and where they come from."""

import dataclasses
import functools
import hashlib
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
from jaxtyping import Float

from nla_jax.data.activations import EARLIER, IDS, TEXT
from nla_jax.fve import joined, lengths
from nla_jax.io.files import AnyPath, checksum, local
from nla_jax.io.parquet import (
    VECTORS,
    columns_of,
    list_vectors,
    opened,
    read_batches,
    read_table,
    row_count,
)
from nla_jax.runtime.distributed import from_writer, host_index
from nla_jax.runtime.errors import InputError

LABEL = "api_explanation"
NO_LABEL = "no_label"  # in a file of labels: why a row has none


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows of one split: `vectors` [n, d] float32 (raw; those of several layers `fve.joined`), mapped from disk, and
    their other columns, read when asked for.

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

    def lengths(self, layers: int) -> Float[np.ndarray, "n {layers}"]:
        """The lengths of the activations of each layer as the subject has made them; of several layers, which `vectors`
        holds at one length, read from the shards."""
        if layers == 1:
            parts = [lengths(self.vectors[i : i + 4096], 1) for i in range(0, len(self), 4096)]
            return np.concatenate(parts) if parts else np.zeros((0, 1))
        width = self.vectors.shape[1]
        found = [
            lengths(list_vectors(batch.column(0), width, file), layers)
            for file in map(local, self.shards)
            for batch in read_batches(file, [VECTORS])
        ]
        found = np.concatenate(found) if found else np.zeros((0, layers))
        return found if self.at is None else found[self.at]

    def labelled(self) -> np.ndarray:
        """The numbers of the rows that have a label, ascending."""
        return np.flatnonzero([label is not None for labels in self.pieces(LABEL) for label in labels])

    def records(self, at: np.ndarray) -> list[dict]:
        """The rows `at`, each as `{doc_id, text, token, role, position}`: what features and labellers are given."""
        column = self.columns_at(at)
        found = {name: column(TEXT if name == "text" else name) for name in ("doc_id", "text", "token", "role")}
        found["position"] = [n - 1 for n in column("n_raw_tokens")]
        return [dict(zip(found, row)) for row in zip(*found.values())]

    def columns_at(self, at: np.ndarray) -> Callable[[str], list]:
        """`column` of the rows `at` alone, without their labels: made for a few rows at every step."""
        mapped, index = self._mapped, at if self.at is None else self.at[at]
        there = set(mapped.column_names)
        return lambda name: mapped.column(name).take(index).to_pylist() if name in there else [""] * len(at)

    def token_ids(self, at: np.ndarray) -> list[list[int]]:
        """The tokens that the subject has read at the rows `at`. Raises `InputError` where they are not known, as of
        activations from files."""
        if IDS not in self._mapped.column_names:
            raise InputError(f"{self.shards[0]} has no column {IDS}, without which the subject cannot read on.")
        return self.columns_at(at)(IDS)

    @functools.cached_property
    def _mapped(self) -> pa.Table:
        """All columns of the shards but the vectors. They are checked when they are first needed, not at every step."""
        return mapped_columns(self.shards)


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
    return np.load(_decoded(files, ".npy", _write_vectors), mmap_mode="r")


def mapped_columns(files: Sequence[AnyPath]) -> pa.Table:
    """The other columns of all shards, mapped from an `.arrow` file that the first use writes."""
    return pa.ipc.open_file(pa.memory_map(str(_decoded(files, ".arrow", _write_columns)))).read_all()


def _decoded(files: Sequence[AnyPath], suffix: str, write: Callable) -> Path:
    """The copy of some shards: beside them, or beside the local copies of shards on a bucket, which are each host's
    own.

    Its name ends with a hash of the sizes and times of the shards, and one of its own bytes: the shards are decoded
    again where they have changed, and where the copy is damaged."""
    copies = [local(file) for file in files]

    def make() -> str:
        state = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in copies]
        split = copies[0].name.rsplit("-", 3)[0]
        name = f"{split}-{hashlib.blake2b(repr(state).encode(), digest_size=8).hexdigest()}"
        folder = copies[0].parent
        for found in folder.glob(f"{split}-*{suffix}"):
            if found.name == f"{name}-{checksum(found)}{suffix}":
                return found.name
            found.unlink()
        scratch = folder / f"{name}{suffix}.{host_index()}.incomplete"  # hosts may decode at once
        with open(scratch, "wb") as out:  # written, not mapped: a full disk is then an error, not a crash
            write(copies, out)
        path = folder / f"{name}-{checksum(scratch)}{suffix}"
        os.replace(scratch, path)
        return path.name

    return copies[0].with_name(from_writer(make) if isinstance(files[0], Path) else make())


def _write_vectors(files: Sequence[Path], out: BinaryIO) -> None:
    with opened(files[0], [VECTORS]) as file:
        kind = file.schema_arrow.field(VECTORS).type
        if not pa.types.is_fixed_size_list(kind):
            raise pa.ArrowInvalid(f"{VECTORS} is {kind}, not lists of one size")
    shape = (sum(map(row_count, files)), width := kind.list_size)
    np.lib.format.write_array_header_1_0(out, {"descr": "<f4", "fortran_order": False, "shape": shape})
    for file in files:
        several = [EARLIER] if EARLIER in columns_of(file) else []
        for batch in read_batches(file, [VECTORS, *several]):
            vectors = list_vectors(batch.column(0), width, file)
            layers = len(batch.column(1)[0]) + 1 if several and len(batch) else 1
            out.write(np.ascontiguousarray(joined(vectors, layers), "<f4"))


def _write_columns(files: Sequence[Path], out: BinaryIO) -> None:
    names = [name for name in columns_of(files[0]) if name != VECTORS]
    with pa.ipc.new_file(out, read_table(files[0], names).schema) as writer:
        for file in files:
            writer.write_table(read_table(file, names))
