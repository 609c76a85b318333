"""Documents from any source: the embedded corpus, TFDS, text, JSON-lines and Parquet files, or a function."""

import contextlib
import hashlib
import io
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from nla_jax.data.chats import checked
from nla_jax.runtime.errors import InputError
from nla_jax.runtime.user_code import resolve

DOCUMENT_SEPARATOR = "<|endoftext|>"
SUFFIXES = (".txt", ".jsonl", ".parquet")
IMPORT_PATH = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
PART_SUFFIX = re.compile(r"#\d+$")


class Document(NamedTuple):
    """A text or a chat, and its unique id; ids that differ only in a final `#number` name parts of one document.

    `messages`: of a chat, each with role and content; its `text` is what is said there, one message after another."""

    id: str
    text: str
    messages: tuple[dict[str, str], ...] = ()


class Row(NamedTuple):
    """What a source holds, unchecked: any id (or None), any text, and the place to name in a message."""

    id: Any
    text: Any
    place: str
    messages: tuple[dict[str, str], ...] = ()


def load_corpus(
    source: str,
    *,
    data_dir: str | os.PathLike,
    text_field: str = "text",
    id_field: str = "id",
    split: str = "train",
    min_chars: int = 0,
    max_documents: int | None = None,
) -> Sequence[Document]:
    """The documents of `source`, in its order, without repeated texts, with unique ids.

    Args:
      source: `python_docs` (the embedded corpus, built on first use); `tfds:NAME`; a `.txt`, `.jsonl` or `.parquet`
        file or a folder of such files; or `package.module:function`, called without arguments for Documents. A `.txt`
        file is one document, or several separated by `<|endoftext|>`.
      data_dir: where TFDS keeps its datasets.
      text_field: the name of the text in JSON-lines, Parquet and TFDS rows. A JSON line, or a mapping that the function
        gives, may have `messages` instead, each with a role and a content: a chat.
      id_field: the name of the id in them; a row without one gets `{file name}:{row}`, counted from 1. A row that
        repeats an id becomes a part of that document, `{id}#2`.
      split: which split of a TFDS dataset.
      min_chars: shorter texts are left out.
      max_documents: stop after so many documents.

    Raises:
      InputError: an unknown source, a missing field, a corrupt file, a text that is no string, or no documents.
    """
    if max_documents is not None and max_documents < 1:
        raise InputError(f"max_documents is {max_documents}: give a positive number, or None for all documents.")
    documents, ids, texts, read = [], {}, set(), 0
    for row in rows(source, data_dir, text_field, id_field, split):
        read += 1
        if not isinstance(row.text, str):
            raise InputError(f"The text of {row.place} is {type(row.text).__name__}, not a string: convert it first.")
        try:
            digest = hashlib.blake2b(row.text.encode(), digest_size=16).digest()
        except UnicodeEncodeError:
            raise InputError(
                f"The text of {row.place} holds half of a character, as cut JSON does: correct it."
            ) from None
        if not row.text.strip() or len(row.text) < min_chars or digest in texts:
            continue
        texts.add(digest)
        id = unique(row.place if row.id is None else str(row.id), ids)
        documents.append(Document(id, row.text, row.messages))
        if len(documents) == max_documents:
            break
    if not read:
        raise InputError(f"The corpus {source!r} holds no documents: choose a source that has some.")
    if not documents:
        raise InputError(
            f"All {read} documents of {source!r} are empty or under {min_chars} characters: lower min_chars."
        )
    return documents


def document_of(id: str) -> str:
    """The document of an id, which may name a part of it (`guide#2`)."""
    return PART_SUFFIX.sub("", id)


def split_of(document: Document, fractions: Mapping[str, float], seed: int = 0) -> str:
    """Which of the splits named in `fractions` the document belongs to.

    A pure function of the document's id without its part suffix (`guide#2` → `guide`), of `fractions` and of `seed`:
    neither other documents nor any order matter, and the parts of one document stay together.

    Raises:
      InputError: the fractions are negative or do not sum to 1.
    """
    names = sorted(fractions)
    edges = list(accumulate(fractions[name] for name in names))
    if not edges or min(fractions.values()) < 0 or abs(edges[-1] - 1) > 1e-6:
        raise InputError(f"The split fractions {dict(fractions)} must be non-negative and sum to 1: correct them.")
    digest = hashlib.blake2b(f"{seed}:{document_of(document.id)}".encode(), digest_size=6).digest()
    point = int.from_bytes(digest, "big") / 2**48 * edges[-1]  # in [0, last edge)
    return next(name for name, edge in zip(names, edges) if point < edge)


def rows(source: str, data_dir: str | os.PathLike, text_field: str, id_field: str, split: str) -> Iterator[Row]:
    """All rows of `source`; see `load_corpus`."""
    path = Path(source).expanduser()
    if source == "python_docs" or source.startswith("tfds:"):
        yield from tfds_rows(source, data_dir, text_field, id_field, split)
    elif IMPORT_PATH.fullmatch(source):
        yield from callable_rows(source)
    elif path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES and file.is_file())
        if not files:
            raise InputError(f"The folder {source!r} holds no {', '.join(SUFFIXES)} files: put the corpus there.")
        for file in files:
            yield from file_rows(file, file.relative_to(path).as_posix(), text_field, id_field)
    elif path.is_file():
        yield from file_rows(path, path.name, text_field, id_field)
    else:
        raise InputError(
            f"There is no corpus {source!r}: give python_docs, tfds:NAME, an existing file or folder, or "
            "package.module:function."
        )


def file_rows(file: Path, name: str, text_field: str, id_field: str) -> Iterator[Row]:
    """The rows of one file, called `name` in ids and messages."""
    if file.suffix == ".parquet":
        yield from parquet_rows(file, name, text_field, id_field)
    elif file.suffix == ".jsonl":
        yield from jsonl_rows(file, name, text_field, id_field)
    elif file.suffix == ".txt":
        try:
            texts = file.read_text(encoding="utf-8").split(DOCUMENT_SEPARATOR)
        except UnicodeDecodeError as error:
            raise InputError(f"{name} is not UTF-8 at byte {error.start}: convert the file to UTF-8.") from error
        yield from (Row(None, text.strip("\n"), f"{name}:{number}") for number, text in enumerate(texts, 1))
    else:
        raise InputError(f"{name} is no corpus file: use one that ends in {', '.join(SUFFIXES)}.")


def jsonl_rows(file: Path, name: str, text_field: str, id_field: str) -> Iterator[Row]:
    """One row per line that is not blank."""
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            place = f"{name}:{number}"
            try:
                row = json.loads(line)
            except ValueError as error:
                raise InputError(f"Line {number} of {name} is not valid JSON ({error}): correct it.") from error
            if isinstance(row, dict) and "messages" in row:
                yield chat_row(row, place)
                continue
            if not isinstance(row, dict) or text_field not in row:
                found = sorted(row) if isinstance(row, dict) else type(row).__name__
                raise InputError(f"Line {number} of {name} has no {text_field!r} (found {found}): set text_field.")
            yield Row(row.get(id_field), row[text_field], place)


def chat_row(entry: Mapping, place: str) -> Row:
    """The row of a chat, a mapping with `messages`."""
    messages = checked(entry["messages"], f"The chat {place}")
    return Row(entry.get("id"), "\n\n".join(m["content"] for m in messages), place, tuple(messages))


def parquet_rows(file: Path, name: str, text_field: str, id_field: str) -> Iterator[Row]:
    """The rows of a Parquet file, read in batches of the two columns."""
    try:
        with pq.ParquetFile(file, page_checksum_verification=True) as table:
            found = table.schema_arrow.names
            if text_field not in found:
                raise InputError(f"{name} has no column {text_field!r} (found {sorted(found)}): set text_field.")
            number = 0
            columns = [column for column in (text_field, id_field) if column in found]
            for batch in table.iter_batches(batch_size=1024, columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    yield Row(row.get(id_field), row[text_field], f"{name}:{number}")
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = str(error).strip().split("\n")[0].rstrip(".")
        raise InputError(f"{name} cannot be read as Parquet ({reason}): write the file again.") from error


def tfds_rows(source: str, data_dir: str | os.PathLike, text_field: str, id_field: str, split: str) -> Iterator[Row]:
    """The rows of a TFDS dataset, prepared if need be, as ArrayRecord and without TensorFlow."""
    name = source.removeprefix("tfds:")
    try:
        builder = tfds_builder(name, data_dir)
        silent = contextlib.redirect_stdout(io.StringIO())  # what ships with the package is not downloaded
        with silent if name == "python_docs" else contextlib.nullcontext():
            builder.download_and_prepare(file_format="array_record")
    except OSError:
        builder = tfds_builder(name, data_dir)
        if not builder.data_path.exists():  # it does when another process has prepared the same dataset meanwhile
            raise
    if split not in builder.info.splits:
        raise InputError(f"The dataset {name!r} has no split {split!r}, only {sorted(builder.info.splits)}: set split.")
    if text_field not in builder.info.features:
        found = sorted(builder.info.features)
        raise InputError(f"The dataset {name!r} has no feature {text_field!r} (found {found}): set text_field.")
    try:
        examples = builder.as_data_source(split)
    except NotImplementedError as error:
        raise InputError(
            f"The dataset {name!r} in {data_dir} was not written as ArrayRecord; prepare it again in another data_dir."
        ) from error
    for number, example in enumerate(examples, 1):
        yield Row(decoded(example.get(id_field)), decoded(example[text_field]), f"{name}:{number}")


def tfds_builder(name: str, data_dir: str | os.PathLike):
    """The TFDS builder of that name, ours or anybody's."""
    import tensorflow_datasets as tfds  # here, since the other sources do without it

    from nla_jax.quickstart.python_docs import PythonDocs

    if name == "python_docs":
        return PythonDocs(data_dir=data_dir)
    try:
        return tfds.builder(name, data_dir=data_dir)
    except (tfds.core.DatasetNotFoundError, ValueError) as error:
        raise InputError(f"TFDS knows no dataset {name!r} and {data_dir} holds none: check its name.") from error


def callable_rows(source: str) -> Iterator[Row]:
    """The documents that the function at `package.module:function` returns: texts, (id, text) or mappings."""
    produce = resolve(source, "corpus.source")
    with produce.blamed():
        produced = produce.function()
        if not isinstance(produced, Iterable):
            raise InputError(f"{produce} returns {type(produced).__name__}, expected documents.")
        for number, document in enumerate(produced, 1):
            place = f"{source}:{number}"
            if isinstance(document, str):
                yield Row(None, document, place)
            elif isinstance(document, Mapping) and "messages" in document:
                yield chat_row(document, place)
            elif isinstance(document, Mapping) and "text" in document:
                yield Row(document.get("id"), document["text"], place)
            elif isinstance(document, Document):
                yield Row(document.id, document.text, place, document.messages)
            elif isinstance(document, tuple) and len(document) == 2:
                yield Row(*document, place)
            else:
                raise InputError(
                    f"Item {number} of {produce} is {type(document).__name__}; give a text, (id, text), or a mapping with "
                    f"text (or messages) and id."
                )


def unique(id: str, used: dict[str, int]) -> str:
    """`id`, or `id#2`, `id#3`, … when it is taken; remembers it in `used`."""
    result = id
    while result in used:
        used[id] += 1
        result = f"{id}#{used[id]}"
    used[result] = 1
    return result


def decoded(value: Any) -> Any:
    """TFDS gives strings as UTF-8 bytes."""
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value
