"""Parquet files with sidecars: vectors as fixed-size float32 lists, which never become Python lists.

A changed byte is noticed. Each page has a checksum, as Parquet foresees; the footer, which has none there, states a
hash of the columns and the number of rows. Files of others, which may have neither, are read all the same.
"""

import contextlib
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml

from nla_jax.io.files import AnyPath, local, replacing, sealed
from nla_jax.runtime.errors import InputError, first_line

VECTORS = "activation_vector"
SIDECAR = ".nla_meta.yaml"  # follows the name of a Parquet file
BATCH = 1024  # rows that are read at a time
FORM = b"nla_jax_form"  # the name under which a footer states its hash


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
            text = yaml.safe_dump(sidecar, sort_keys=False, allow_unicode=True)
            scratch.write_text(sealed(text), encoding="utf-8")
    said = {name: value for name, value in (schema.metadata or {}).items() if name != FORM}  # that is another file's
    schema = schema.with_metadata(said) if said else schema.remove_metadata()
    with replacing(path) as scratch, pq.ParquetWriter(scratch, schema, write_page_checksum=True) as writer:
        rows = 0
        for table in tables:
            writer.write_table(table)
            rows += len(table)
        writer.add_key_value_metadata({FORM: _form(schema, rows)})


def _form(schema: pa.Schema, rows: int) -> bytes:
    """A hash of what a footer says of its file: names and types of the columns, and the number of rows."""
    kind = lambda field: str(field.type).replace("<element: ", "<item: ")  # Parquet renames the items of lists
    stated = repr(([(field.name, kind(field), field.nullable) for field in schema], rows))
    return hashlib.blake2b(stated.encode(), digest_size=8).hexdigest().encode()


@contextlib.contextmanager
def readable(path: AnyPath) -> Iterator[None]:
    """Raises `InputError` where the Parquet file is missing, damaged or lacks a column."""
    try:
        yield
    except (OSError, KeyError, UnicodeDecodeError, pa.ArrowException) as error:
        raise InputError(
            f"{path} cannot be read as a Parquet file with the columns expected ({first_line(error)})."
        ) from None


@contextlib.contextmanager
def opened(path: AnyPath, columns: Sequence[str] | None = None) -> Iterator[pq.ParquetFile]:
    """An open Parquet file that has these columns; what is read of it is checked. See `readable`."""
    with readable(path), pq.ParquetFile(local(path), memory_map=True, page_checksum_verification=True) as file:
        facts = file.metadata
        stated, rows = (
            (facts.metadata or {}).get(FORM),
            sum(facts.row_group(i).num_rows for i in range(facts.num_row_groups)),
        )
        if rows != facts.num_rows or stated not in (None, _form(file.schema_arrow, rows)):
            raise pa.ArrowInvalid("its footer is damaged")
        if absent := [name for name in columns or () if name not in file.schema_arrow.names]:
            raise KeyError(absent[0])
        yield file


def read_table(path: AnyPath, columns: Sequence[str] | None = None) -> pa.Table:
    """A Parquet file, or some of its columns; see `readable`."""
    with opened(path, columns) as file:
        return file.read(columns)


def read_batches(path: AnyPath, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """Columns of a Parquet file, `BATCH` rows at a time; see `readable`."""
    with opened(path, columns) as file:
        yield from file.iter_batches(BATCH, columns=columns)


def schema_of(path: AnyPath) -> pa.Schema:
    """The columns of a Parquet file; see `readable`."""
    with opened(path) as file:
        return file.schema_arrow


def columns_of(path: AnyPath) -> list[str]:
    """The names of a Parquet file's columns; see `readable`."""
    return schema_of(path).names


def row_count(path: AnyPath) -> int:
    """The number of rows of a Parquet file; see `readable`."""
    with opened(path) as file:
        return file.metadata.num_rows
