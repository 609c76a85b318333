"""Parquet files with sidecars: vectors as fixed-size float32 lists, which never become Python lists."""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml

from nla_jax.io.files import AnyPath, local, replacing
from nla_jax.runtime.errors import InputError, first_line

VECTORS = "activation_vector"
SIDECAR = ".nla_meta.yaml"  # follows the name of a Parquet file
BATCH = 1024  # rows that are read at a time


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


def write_table(table: pa.Table, path: AnyPath, sidecar: dict | None = None) -> None:
    """Writes a Parquet file, see `write_tables`."""
    write_tables(table.schema, [table], path, sidecar)


def write_tables(schema: pa.Schema, tables: Iterable[pa.Table], path: AnyPath, sidecar: dict | None = None) -> None:
    """Writes a Parquet file (its sidecar first), one row group or more a table; it appears under its name only once it
    is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if sidecar is not None:
        with replacing(path.with_name(path.name + SIDECAR)) as scratch:
            scratch.write_text(yaml.safe_dump(sidecar, sort_keys=False, allow_unicode=True), encoding="utf-8")
    with replacing(path) as scratch, pq.ParquetWriter(scratch, schema) as writer:
        for table in tables:
            writer.write_table(table)


@contextlib.contextmanager
def readable(path: AnyPath) -> Iterator[None]:
    """Raises `InputError` where the Parquet file is missing, damaged or lacks a column."""
    try:
        yield
    except (OSError, KeyError, pa.ArrowException) as error:
        raise InputError(
            f"{path} cannot be read as a Parquet file with the columns expected ({first_line(error)})."
        ) from None


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
