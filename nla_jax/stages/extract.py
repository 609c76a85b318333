"""The `extract` stage: activations of a corpus at sampled positions, or of datasets that exist, as Parquet shards."""

import collections
import dataclasses
import hashlib
import sys
from collections.abc import Sequence

import numpy as np

from nla_jax.data.activations import after_blocks
from nla_jax.data.chats import chat_tokens
from nla_jax.data.corpus import Document
from nla_jax.data.dataset_sidecar import Origin, sidecar_content
from nla_jax.data.interchange import import_datasets
from nla_jax.data.rows import Rows, load_rows
from nla_jax.io.folders import load_tokenizer, read_config
from nla_jax.io.hub import fingerprint, locate
from nla_jax.io.parquet import row_count, write_table
from nla_jax.io.safetensors import check_bytes
from nla_jax.models.sharding import host_mesh
from nla_jax.runtime.distributed import barrier, from_writer, is_writer, share
from nla_jax.runtime.errors import InputError
from nla_jax.runtime.metrics import Progress
from nla_jax.runtime.run import Run
from nla_jax.stages.check import documents_of_splits
from nla_jax.subject import ROWS, SINK, Activations, Subject, activations_at, attention_sinks, load_subject


def extract(run: Run) -> None:
    """Writes `{workdir}/activations/{split}-XXXXX-of-XXXXX.parquet`; shards that are there already are kept.

    The rows come from the subject, or from the files under `extract.source`."""
    with run.stage("extract") as result:
        if result is None:
            return
        c, folder = run.config, locate(run.subject_folder)
        from_writer(lambda: check_bytes(folder))
        width = read_config(folder).width
        where = c.subject.layer, c.subject.earlier_layers
        origin = Origin(str(run.subject_folder), fingerprint(folder), width, *where)
        sources = c.extract.source.to_dict()
        if any(sources.values()):
            result |= import_datasets(
                sources,
                run.workdir / "activations",
                origin,
                load_tokenizer(folder),
                is_heldout=lambda id: run.split(Document(id, "")) == "heldout",
                shard_rows=c.extract.shard_documents * c.extract.positions,
            )
        else:
            result |= extract_corpus(run, origin)
        result["base_hash"] = origin.base_hash
        result["sinks"] = say_sinks([load_rows(run.workdir, split) for split in result["rows"]], c.subject.layers)


def extract_corpus(run: Run, origin: Origin) -> dict[str, dict[str, int]]:
    """Writes the shards of the config's corpus, each host its share. Returns `rows` and `documents` of each split."""
    c, compute, mesh = run.config.extract, run.config.compute, host_mesh(run.mesh)
    by_split: dict[str, list[Document]] = {name: [] for name in run.config.split}
    corpus = run.documents()
    documents = documents_of_splits(run.config, corpus)
    for document in corpus:
        by_split[run.split(document)].append(document)
    place = mesh if mesh.size > 1 else None
    subject = load_subject(
        run.subject_folder,
        run.config.subject.layer,
        compute.dtype,
        place,
        compute.attention,
        earlier=run.config.subject.earlier_layers,
    )
    facts = origin.extraction(run.config.corpus.source, sum(documents.values()), c.positions)
    shards = []  # (file, split, documents)
    for split, found in by_split.items():
        total = -(-len(found) // c.shard_documents)
        for i in range(total):
            file = run.workdir / "activations" / f"{split}-{i:05d}-of-{total:05d}.parquet"
            shards.append((file, split, found[i * c.shard_documents : (i + 1) * c.shard_documents]))

    progress = Progress("extract", sum(len(found) for *_, found in share(shards)))
    for file, split, found in share(shards):
        if not file.exists():
            activations = sample_activations(subject, found, c, run.config.seed)
            sidecar = sidecar_content(split, "base", len(activations), facts, base_hash=origin.base_hash)
            write_table(activations.table(), file, sidecar)
        progress.update(len(found))
    progress.close()
    barrier("the activations")

    rows = dict.fromkeys(by_split, 0)
    for file, split, _ in shards:
        rows[split] += row_count(file)
    for split, count in rows.items():
        if count == 0:
            raise InputError(
                f"The documents of split {split!r} give no activations: none is longer than extract.min_position = "
                f"{c.min_position} tokens; take longer documents or lower extract.min_position."
            )
    return {"rows": rows, "documents": documents}


def say_sinks(splits: Sequence[Rows], layers: Sequence[int]) -> int:
    """Says on standard error how many of all activations are attention sinks, at one of the layers at least, and at which
    positions; returns how many."""
    sinks = attention_sinks(np.concatenate([rows.lengths(len(layers)) for rows in splits]))
    if sinks.any() and is_writer():
        positions = np.concatenate([np.asarray(rows.column("n_raw_tokens")) - 1 for rows in splits])[sinks]
        places = [f"{place} ({count})" for place, count in collections.Counter(positions.tolist()).most_common(5)]
        print(
            f"extract: {sinks.sum()} of {len(sinks)} activations {after_blocks(layers)} are attention sinks, longer than {SINK:g} "
            f"times the median, most often at the positions {', '.join(places)}; a higher extract.min_position leaves out "
            f"first tokens.",
            file=sys.stderr,
        )
    return int(sinks.sum())


def sample_activations(subject: Subject, documents: Sequence[Document], settings, seed: int) -> Activations:
    """Activations at sampled positions of each document, never at a special token, nor at a token of a chat's template.

    `settings`: the section `extract`. Of a document only the first `max_tokens` tokens are read."""
    tokenizer, rows, spoken = subject.tokenizer, [], []
    special = set(tokenizer.all_special_ids)
    for document in documents:
        if document.messages:
            ids, roles = chat_tokens(tokenizer, list(document.messages))
        else:
            ids, roles = tokenizer(document.text, verbose=False).input_ids, None
        rows.append(ids[: settings.max_tokens])
        spoken.append(roles)
    chosen = []
    for document, row, roles in zip(documents, rows, spoken):
        ordinary = lambda i: row[i] not in special and (roles is None or roles[i])
        candidates = [i for i in range(settings.min_position, len(row)) if ordinary(i)]
        chosen.append(sample_positions(document.id, candidates, settings.positions, seed))
    found = activations_at(subject, rows, chosen, [document.id for document in documents], batch=ROWS)
    said = [roles[i] if roles else "" for roles, positions in zip(spoken, chosen) for i in positions]
    return dataclasses.replace(found, roles=said)


def sample_positions(document_id: str, candidates: Sequence[int], count: int, seed: int) -> list[int]:
    """`count` of the candidate positions, in order.

    A function of seed and document alone: neither the order of a corpus nor its shards change which positions are
    read."""
    key = int.from_bytes(hashlib.blake2b(document_id.encode(), digest_size=8).digest(), "big")
    rng = np.random.Generator(np.random.Philox(key=[seed, key]))
    return sorted(rng.permutation(np.asarray(candidates, np.int64))[:count].tolist())
