"""The `extract` and `label` stages, and the labelled rows that training and evaluation read."""

import dataclasses
from pathlib import Path

import numpy as np
import pyarrow as pa

from nla_jax.data.extraction import (
    activation_table,
    extract_documents,
    read_column_vectors,
    read_table,
    shards_of,
    write_table,
)  # fmt: skip
from nla_jax.errors import InputError
from nla_jax.metrics import Progress
from nla_jax.run import Run, resolve
from nla_jax.subject import load_subject


def extract(run: Run) -> None:
    """Writes `{workdir}/activations/{split}-XXXXX-of-XXXXX.parquet`; shards that are there already are kept."""
    c = run.config.extract
    with run.stage("extract") as result:
        if result is None:
            return
        subject = load_subject(run.subject_folder, run.config.subject.layer, run.config.compute.dtype)
        by_split: dict[str, list] = {name: [] for name in run.config.split}
        for document in run.documents():
            by_split[run.split(document)].append(document)
        shards = [
            (split, i, -(-len(documents) // c.shard_documents), documents[i * c.shard_documents : (i + 1) * c.shard_documents])
            for split, documents in by_split.items()
            for i in range(-(-len(documents) // c.shard_documents))
        ]  # fmt: skip
        progress = Progress("extract", sum(len(documents) for *_, documents in shards))
        counts = dict.fromkeys(by_split, 0)
        for split, i, total, documents in shards:
            path = run.workdir / "activations" / f"{split}-{i:05d}-of-{total:05d}.parquet"
            if not path.exists():
                activations = extract_documents(
                    subject, documents, positions=c.positions, min_position=c.min_position, max_tokens=c.max_tokens,
                    seed=run.config.seed,
                )  # fmt: skip
                sidecar = {
                    "kind": "nla_dataset", "schema_version": 1, "base_checkpoint": subject.name,
                    "base_hash": subject.fingerprint, "split": split,
                    "extraction": {"d_model": subject.model.config.width, "layer_index": subject.layer, "norm": "none"},
                }  # fmt: skip
                write_table(activation_table(activations, subject.layer), path, sidecar)
            counts[split] += read_table(path, ["n_raw_tokens"]).num_rows
            progress.update(len(documents))
        progress.close()
        for split, count in counts.items():
            if count == 0:
                raise InputError(
                    f"The documents of split {split!r} give no activations: none is longer than extract.min_position = "
                    f"{c.min_position} tokens; take longer documents or lower extract.min_position."
                )
        result["rows"] = counts
        result["documents"] = {split: len(documents) for split, documents in by_split.items()}
        result["base_hash"] = subject.fingerprint


def label(run: Run) -> None:
    """Writes `{workdir}/labels/{shard}.parquet` with one `api_explanation` for each row of a shard of activations."""
    c = run.config.label
    with run.stage("label") as result:
        if result is None:
            return
        run.require("extract")
        function = resolve(c.function)
        files = [file for split in c.splits for file in shards_of(run.workdir / "activations", split)]
        progress = Progress("label", len(files))
        for file in files:
            target = run.workdir / "labels" / file.name
            if not target.exists():
                texts = read_table(file, ["detokenized_text_truncated"]).column(0).to_pylist()
                labels = list(function(texts))
                if len(labels) != len(texts) or not all(isinstance(x, str) and x.strip() for x in labels):
                    raise InputError(
                        f"label.function {c.function} must return one non-empty text for each of its texts."
                    )
                write_table(pa.table({"api_explanation": pa.array(labels, pa.string())}), target)
            progress.update()
        progress.close()
        result["shards"] = len(files)


@dataclasses.dataclass(frozen=True)
class Rows:
    """The rows of one split: `vectors [n, d]` float32 (raw), and a list entry for each row in the rest."""

    vectors: np.ndarray
    doc_ids: list[str]
    texts: list[str]
    tokens: list[str]
    following: list[str]
    labels: list[str] | None

    def __len__(self) -> int:
        return len(self.vectors)


def load_rows(workdir: Path, split: str, labelled: bool = True) -> Rows:
    """All rows of a split, with their labels where `labelled`."""
    files = shards_of(workdir / "activations", split)
    tables = [read_table(file) for file in files]
    labels = None
    if labelled:
        labels = []
        for file, table in zip(files, tables):
            part = read_table(workdir / "labels" / file.name).column("api_explanation").to_pylist()
            if len(part) != table.num_rows:
                raise InputError(
                    f"{workdir / 'labels' / file.name} holds {len(part)} labels for {table.num_rows} rows; label anew."
                )
            labels += part
    table = pa.concat_tables(tables)
    column = lambda name: table.column(name).to_pylist()
    return Rows(
        read_column_vectors(table), column("doc_id"), column("detokenized_text_truncated"), column("token"),
        column("following"), labels,
    )  # fmt: skip


def spread(rows: Rows, count: int) -> Rows:
    """`count` of the rows, spread evenly over all documents (all of them where there are fewer)."""
    if len(rows) <= count:
        return rows
    at = np.linspace(0, len(rows) - 1, count).astype(int)
    pick = lambda values: values and [values[i] for i in at]
    return Rows(
        rows.vectors[at],
        pick(rows.doc_ids),
        pick(rows.texts),
        pick(rows.tokens),
        pick(rows.following),
        pick(rows.labels),
    )
