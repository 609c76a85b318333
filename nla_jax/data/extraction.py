"""Activations of a corpus as Parquet shards: fixed-size float32 lists, one file per split and shard, each with a sidecar."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from nla_jax.data.corpus import Document
from nla_jax.errors import InputError
from nla_jax.subject import Activations, Subject, activations_at


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
    d = activations.vectors.shape[1]
    flat = pa.array(activations.vectors.astype(np.float32).reshape(-1))
    return pa.table(
        {
            "activation_vector": pa.FixedSizeListArray.from_arrays(flat, d),
            "doc_id": pa.array(activations.doc_ids, pa.string()),
            "n_raw_tokens": pa.array(activations.positions + 1, pa.int32()),
            "activation_layer": pa.array(np.full(len(activations), layer, np.int32)),
            "detokenized_text_truncated": pa.array(activations.texts, pa.string()),
            "token": pa.array(activations.tokens, pa.string()),
            "following": pa.array(activations.following, pa.string()),
        }
    )


def write_table(table: pa.Table, path: Path, sidecar: dict | None = None) -> None:
    """Writes a Parquet file (its sidecar first), which appears under its name only once it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if sidecar is not None:
        path.with_name(path.name + ".nla_meta.yaml").write_text(
            yaml.safe_dump(sidecar, sort_keys=False, allow_unicode=True), encoding="utf-8"
        )
    scratch = path.with_name(path.name + ".incomplete")
    pq.write_table(table, scratch)
    os.replace(scratch, path)


def read_column_vectors(table: pa.Table, column: str = "activation_vector") -> np.ndarray:
    """A fixed-size list column as `[n, d]` float32, without passing through Python lists."""
    array = table.column(column).combine_chunks()
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks)
    return array.flatten().to_numpy(zero_copy_only=False).reshape(len(array), -1).astype(np.float32, copy=False)


def shards_of(folder: Path, split: str) -> list[Path]:
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


def read_table(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """A Parquet file; `InputError` where it is missing, damaged or lacks a column."""
    try:
        return pq.read_table(path, columns=columns)
    except (OSError, pa.ArrowInvalid, pa.ArrowKeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"{path} cannot be read as a Parquet file with the columns expected ({reason}).") from None
