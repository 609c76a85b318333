"""Activations of a corpus as Parquet shards: fixed-size float32 lists, one file per split and shard, each with a sidecar."""

import contextlib
import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml

from nla_jax.data.corpus import Document
from nla_jax.io.files import AnyPath, local, replacing
from nla_jax.runtime.distributed import from_writer, host_index
from nla_jax.runtime.errors import InputError, first_line
from nla_jax.subject import Activations, Subject, activations_at

VECTORS = "activation_vector"
SIDECAR = ".nla_meta.yaml"  # behind the name of a Parquet file
BATCH = 1024  # rows that are read at a time


def sample_positions(document_id: str, candidates: Sequence[int], count: int, seed: int) -> list[int]:
    """`count` of the candidate positions, in order: a function of (seed, document) alone, so that neither the order of a
    corpus nor the way it is sharded changes which positions are read."""
    key = int.from_bytes(hashlib.blake2b(document_id.encode(), digest_size=8).digest(), "big")
    rng = np.random.Generator(np.random.Philox(key=[seed, key]))
    return sorted(rng.permutation(np.asarray(candidates, np.int64))[:count].tolist())


def extract_documents(
    subject: Subject, documents: Sequence[Document], *, positions: int, min_position: int, max_tokens: int, seed: int
) -> Activations:
    """Activations at up to `positions` sampled positions of each document, from `min_position` on, never a special token;
    of a document only the first `max_tokens` tokens are read."""
    rows = [ids[:max_tokens] for ids in subject.tokenizer([d.text for d in documents], verbose=False).input_ids]
    special = set(subject.tokenizer.all_special_ids)
    chosen = []
    for document, row in zip(documents, rows):
        candidates = [i for i in range(min_position, len(row)) if row[i] not in special]
        chosen.append(sample_positions(document.id, candidates, positions, seed))
    return activations_at(subject, rows, chosen, [d.id for d in documents])


def activation_table(activations: Activations, layer: int) -> pa.Table:
    """The reference's columns, and `token` and `following` for people who look at rows."""
    return pa.table(
        {
            VECTORS: list_column(activations.vectors.astype(np.float32, copy=False)),
            "doc_id": pa.array(activations.doc_ids, pa.string()),
            "n_raw_tokens": pa.array(activations.positions + 1, pa.int32()),
            "activation_layer": pa.array(np.full(len(activations), layer, np.int32)),
            "detokenized_text_truncated": pa.array(activations.texts, pa.string()),
            "token": pa.array(activations.tokens, pa.string()),
            "following": pa.array(activations.following, pa.string()),
        }
    )


# Vectors: NumPy and Arrow, never Python lists


def list_column(vectors: np.ndarray) -> pa.FixedSizeListArray:
    """`[n, d]` as a column of fixed-size lists."""
    return pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1])


def list_vectors(column: pa.Array, width: int, place: Path) -> np.ndarray:
    """A column of lists, of fixed size or not, as `[n, width]` float32.

    Raises `InputError`, naming `place`, for another type or width, missing rows or numbers, NaN and infinite values."""
    kind, wrong = column.type, None
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)):
        wrong = f"is {kind}"
    elif not pa.types.is_floating(kind.value_type):
        wrong = f"holds lists of {kind.value_type}"
    elif column.null_count or column.flatten().null_count:
        wrong = "has missing values"
    elif found := set(pc.unique(pc.list_value_length(column)).to_pylist()) - {width}:
        wrong = f"holds vectors of {min(found)} numbers"
    else:
        with np.errstate(over="ignore"):  # becomes infinite
            vectors = column.flatten().to_numpy(zero_copy_only=False).astype(np.float32, copy=False).reshape(-1, width)
        if np.isfinite(vectors).all():
            return vectors
        wrong = "holds NaN or infinite values"
    raise InputError(f"{place}: {VECTORS} {wrong}, expected {width} finite floating point numbers a row.")


def mapped_vectors(files: Sequence[AnyPath]) -> np.memmap:
    """The vectors of all shards of a split, `[n, d]` float32, mapped from a `.npy` file beside them (beside their local copies,
    which are each host's own) that the first use writes. Its name depends on the sizes and times of the shards: changed shards
    are decoded anew."""
    copies = [local(file) for file in files]
    decode = lambda: _decoded_vectors(copies)
    name = from_writer(decode) if isinstance(files[0], Path) else decode()
    return np.load(copies[0].with_name(name), mmap_mode="r")


def _decoded_vectors(files: Sequence[Path]) -> str:
    state = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    split = files[0].name.rsplit("-", 3)[0]
    path = files[0].with_name(f"{split}-{hashlib.blake2b(repr(state).encode(), digest_size=8).hexdigest()}.npy")
    if not _can_be_mapped(path):
        for stale in path.parent.glob(f"{split}-*.npy"):
            stale.unlink()
        with readable(files[0]):
            width = pq.read_schema(files[0]).field(VECTORS).type.list_size
        shape = (sum(map(row_count, files)), width)
        scratch = path.with_name(f"{path.name}.{host_index()}.incomplete")  # hosts may decode at once
        with open(scratch, "wb") as out:  # written, not mapped: a full disk is an error then, and no crash
            np.lib.format.write_array_header_1_0(out, {"descr": "<f4", "fortran_order": False, "shape": shape})
            for file in files:
                for batch in read_batches(file, [VECTORS]):
                    out.write(np.ascontiguousarray(list_vectors(batch.column(0), width, file)))
        os.replace(scratch, path)
    return path.name


def _can_be_mapped(file: Path) -> bool:
    """Whether an array file is there, and whole; reads its header alone."""
    try:
        np.load(file, mmap_mode="r")
    except (OSError, EOFError, ValueError):
        return False
    return True


# Files


def write_table(table: pa.Table, path: AnyPath, sidecar: dict | None = None) -> None:
    """Writes a Parquet file, see `write_tables`."""
    write_tables(table.schema, [table], path, sidecar)


def write_tables(schema: pa.Schema, tables: Iterable[pa.Table], path: AnyPath, sidecar: dict | None = None) -> None:
    """Writes a Parquet file (its sidecar first), one row group or more a table; it appears under its name only once it is
    complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if sidecar is not None:
        with replacing(path.with_name(path.name + SIDECAR)) as scratch:
            scratch.write_text(yaml.safe_dump(sidecar, sort_keys=False, allow_unicode=True), encoding="utf-8")
    with replacing(path) as scratch, pq.ParquetWriter(scratch, schema) as writer:
        for table in tables:
            writer.write_table(table)


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


@contextlib.contextmanager
def readable(path: AnyPath) -> Iterator[None]:
    """Raises `InputError` where the Parquet file is missing, damaged or lacks a column."""
    try:
        yield
    except (OSError, KeyError, pa.ArrowException) as error:
        raise InputError(f"{path} cannot be read as a Parquet file with the columns expected ({first_line(error)}).") from None


def read_table(path: AnyPath, columns: Sequence[str] | None = None) -> pa.Table:
    """A Parquet file, or some of its columns; see `readable`."""
    with readable(path):
        return pq.read_table(local(path), columns=columns)


def read_batches(path: AnyPath, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """Columns of a Parquet file, `BATCH` rows at a time; see `readable`."""
    with readable(path), pq.ParquetFile(local(path), memory_map=True) as file:
        yield from file.iter_batches(BATCH, columns=columns)


def columns_of(path: AnyPath) -> list[str]:
    """The names of a Parquet file's columns; see `readable`."""
    with readable(path):
        return pq.read_schema(local(path)).names


def row_count(path: AnyPath) -> int:
    """The number of rows of a Parquet file; see `readable`."""
    with readable(path):
        return pq.read_metadata(local(path)).num_rows
