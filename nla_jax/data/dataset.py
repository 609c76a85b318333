"""The `extract` and `label` stages, and the labelled rows that training and evaluation read."""

import dataclasses
import itertools
from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from nla_jax.data.corpus import Document
from nla_jax.data.extraction import (
    activation_table,
    columns_of,
    extract_documents,
    mapped_vectors,
    read_table,
    row_count,
    shards_of,
    write_table,
)  # fmt: skip
from nla_jax.data.interchange import (
    LABEL,
    TEXT,
    Origin,
    import_datasets,
    read_labels,
    sidecar_content,
)
from nla_jax.io.files import AnyPath
from nla_jax.io.folders import load_tokenizer, read_config
from nla_jax.io.hub import fingerprint, locate
from nla_jax.models.sharding import host_mesh
from nla_jax.runtime.distributed import barrier, share
from nla_jax.runtime.errors import InputError
from nla_jax.runtime.metrics import Progress
from nla_jax.runtime.run import Run, resolve
from nla_jax.subject import load_subject


def extract(run: Run) -> None:
    """Writes `{workdir}/activations/{split}-XXXXX-of-XXXXX.parquet`, from the subject or from the files that `extract.source`
    names; shards that are there already are kept."""
    with run.stage("extract") as result:
        if result is None:
            return
        c, folder = run.config, locate(run.subject_folder)
        width = read_config(folder).width
        origin = Origin(str(run.subject_folder), fingerprint(folder), width, c.subject.layer)
        if any(c.extract.source.values()):
            result |= import_datasets(
                c.extract.source, run.workdir / "activations", origin, load_tokenizer(folder),
                is_heldout=lambda id: run.split(Document(id, "")) == "heldout",
                shard_rows=c.extract.shard_documents * c.extract.positions,
            )  # fmt: skip
        else:
            result |= extract_corpus(run, origin)
        result["base_hash"] = origin.base_hash


def extract_corpus(run: Run, origin: Origin) -> dict[str, dict[str, int]]:
    """Writes the shards of the config's corpus, each host its share of them. Returns `rows` and `documents` of each split."""
    c = run.config.extract
    compute, mesh = run.config.compute, host_mesh(run.mesh)
    subject = load_subject(
        run.subject_folder, run.config.subject.layer, compute.dtype, mesh if mesh.size > 1 else None, compute.attention
    )
    by_split: dict[str, list] = {name: [] for name in run.config.split}
    for document in run.documents():
        by_split[run.split(document)].append(document)
    documents = {split: len(found) for split, found in by_split.items()}
    facts = origin.extraction(run.config.corpus.source, sum(documents.values()), c.positions)
    shards = [
        (split, i, -(-len(found) // c.shard_documents), found[i * c.shard_documents : (i + 1) * c.shard_documents])
        for split, found in by_split.items()
        for i in range(-(-len(found) // c.shard_documents))
    ]
    name = lambda split, i, total: run.workdir / "activations" / f"{split}-{i:05d}-of-{total:05d}.parquet"
    progress = Progress("extract", sum(len(found) for *_, found in share(shards)))
    for split, i, total, found in share(shards):
        path = name(split, i, total)
        if not path.exists():
            activations = extract_documents(
                subject, found, positions=c.positions, min_position=c.min_position, max_tokens=c.max_tokens,
                seed=run.config.seed,
            )  # fmt: skip
            sidecar = sidecar_content(split, "base", len(activations), facts, base_hash=origin.base_hash)
            write_table(activation_table(activations, subject.layer), path, sidecar)
        progress.update(len(found))
    progress.close()
    barrier("the activations")
    counts = dict.fromkeys(by_split, 0)
    for split, i, total, _ in shards:
        counts[split] += row_count(name(split, i, total))
    for split, count in counts.items():
        if not documents[split]:
            raise InputError(
                f"None of the {sum(documents.values())} documents falls into split {split!r}; take more documents, or raise "
                f"split.{split}."
            )
        if count == 0:
            raise InputError(
                f"The documents of split {split!r} give no activations: none is longer than extract.min_position = "
                f"{c.min_position} tokens; take longer documents or lower extract.min_position."
            )
    return {"rows": counts, "documents": documents}


def label(run: Run) -> None:
    """Writes `{workdir}/labels/{shard}.parquet` with one `api_explanation` for each row of a shard of activations: the shard's
    own where it has them, else what `label.function` makes of its texts. Each host labels its share of the shards."""
    c = run.config.label
    with run.stage("label") as result:
        if result is None:
            return
        run.require("extract")
        function = resolve(c.function)
        files = [file for split in c.splits for file in shards_of(run.workdir / "activations", split)]
        progress = Progress("label", len(share(files)))
        for file in share(files):
            target = run.workdir / "labels" / file.name
            if not target.exists():
                if LABEL in (columns := columns_of(file)):
                    labels = read_table(file, [LABEL]).column(0)
                elif TEXT in columns:
                    texts = read_table(file, [TEXT]).column(0).to_pylist()
                    labels = list(function(texts))
                    if len(labels) != len(texts) or not all(isinstance(x, str) and x.strip() for x in labels):
                        raise InputError(
                            f"label.function {c.function} must return one non-empty text for each of its texts."
                        )
                else:
                    raise InputError(
                        f"{file} has neither {LABEL} nor {TEXT}, from which to make it; give extract.source files that have "
                        f"one of them, or take its split out of label.splits."
                    )
                write_table(pa.table({LABEL: pa.array(labels, pa.string())}), target)
            progress.update()
        progress.close()
        barrier("the labels")
        result["shards"] = len(files)


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows of one split: `vectors [n, d]` float32 (raw), mapped from disk, and their texts, which are read when asked for. `at`
    says which rows of the shards they are, ascending; None: all of them."""

    vectors: np.ndarray
    shards: tuple[AnyPath, ...]
    at: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.vectors)

    def column(self, name: str) -> list[str]:
        """`doc_id`, `api_explanation` (the label), `detokenized_text_truncated`, `token` or `following` of all rows; "" where the
        shards do not have it. Raises `InputError` where labels are missing."""
        return list(itertools.chain.from_iterable(self.pieces(name)))

    def pieces(self, name: str) -> Iterator[list[str]]:
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
