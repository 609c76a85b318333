"""Datasets of the reference (kitft/natural_language_autoencoders): Parquet files with sidecars, read into a run's
shards and written from them.

`av_sft` holds chat prompts and responses, `ar_sft` finished prompts, `rl` chat prompts alone; all of them vectors and
where these come from. Both directions stream, and vectors never become Python lists."""

import collections
import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from transformers import PreTrainedTokenizerBase

from nla_jax.data.activations import TEXT
from nla_jax.data.corpus import document_of
from nla_jax.data.dataset_sidecar import Origin, check_marker, check_sidecar, read_facts, sidecar_content, templates_of
from nla_jax.data.rows import LABEL, read_labels, shards_of
from nla_jax.io.files import AnyPath, local
from nla_jax.io.parquet import (
    SIDECAR,
    VECTORS,
    columns_of,
    list_column,
    list_vectors,
    read_batches,
    row_count,
    schema_of,
    write_table,
    write_tables,
)
from nla_jax.prompts import RESPONSE
from nla_jax.runtime.distributed import barrier, share
from nla_jax.runtime.errors import InputError
from nla_jax.runtime.metrics import Progress
from nla_jax.sidecar import Sidecar

REQUIRED = (VECTORS, "doc_id", "n_raw_tokens", "activation_layer")
TRAINING = ("av_sft", "ar_sft", "rl")
TAGGED = re.compile("<explanation>(.*?)</explanation>", re.DOTALL)
PLACEHOLDER = "<INJECT>"  # stands for the marker in the prompts of a dataset
CHAT = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))


# Reading


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A Parquet file that fits the subject: its columns, what its sidecar says of the extraction (an empty mapping
    without one) and of the prompts (`templates`, by `av` and `ar`), and the AR's template around the explanation in its
    prompts, `(before, after)`."""

    path: Path
    columns: frozenset[str]
    width: int
    layer: int
    extraction: Mapping
    templates: Mapping[str, str]
    template: tuple[str, str] | None

    def rows_by_document(self) -> collections.Counter[str]:
        """How many rows each document has. Raises `InputError` for a row without a document or of another layer."""
        found, start = collections.Counter(), 0
        for batch in read_batches(self.path, ["doc_id", "activation_layer"]):
            layers = set(batch["activation_layer"].to_pylist()) - {self.layer}
            if layers:
                raise InputError(
                    f"{self.path}: activation_layer is {layers.pop()} in a row, but the subject's layer is {self.layer}; set "
                    f"subject.layer, or use data of that layer."
                )
            if batch["doc_id"].null_count:
                row = start + 1 + batch["doc_id"].is_null().to_pylist().index(True)
                raise InputError(
                    f"{self.path}: row {row} has no doc_id, so that documents cannot be kept apart; add it."
                )
            found.update(map(document_of, batch["doc_id"].cast(pa.string()).to_pylist()))
            start += len(batch)
        return found

    def tables(self, documents: Mapping | set) -> Iterator[pa.Table]:
        """The rows of some documents, in order, in the columns of a run's shards."""
        texts = [name for name in (TEXT, "token", "following") if name in self.columns]
        source = next((name for name in (LABEL, "response") if name in self.columns), None)
        source = source or ("prompt" if self.template else None)
        start = 0
        for batch in read_batches(self.path, [*REQUIRED, *texts, *([source] if source else [])]):
            ids = batch["doc_id"].cast(pa.string())
            columns = {
                VECTORS: list_column(list_vectors(batch[VECTORS], self.width, self.path)),
                "doc_id": ids,
                "n_raw_tokens": batch["n_raw_tokens"].cast(pa.int32()),
                "activation_layer": batch["activation_layer"].cast(pa.int32()),
            } | {name: pc.fill_null(batch[name].cast(pa.string()), "") for name in texts}
            if source:
                values = enumerate(batch[source].to_pylist(), start + 1)
                columns[LABEL] = pa.array([self.explanation(source, i, value) for i, value in values], pa.string())
            kept = pa.array([document_of(id) in documents for id in ids.to_pylist()], pa.bool_())
            yield pa.table(columns).filter(kept)
            start += len(batch)

    def explanation(self, column: str, row: int, value: str | None) -> str:
        """The explanation in a row's `column`. Raises `InputError` where there is none."""
        value = value or ""
        if column == "response":
            match = TAGGED.search(value)
            value, form = match[1] if match else "", "an explanation between <explanation> and </explanation>"
        elif column == "prompt":
            before, after = self.template
            whole = value.startswith(before) and value.endswith(after) and len(value) >= len(before) + len(after)
            value = value[len(before) : len(value) - len(after)] if whole else ""
            form = f"an explanation between {before!r} and {after!r}, the critic's template in its sidecar"
        else:
            form = "a text"
        if not value.strip():
            raise InputError(f"{self.path}: {column} of row {row} is not {form}; correct the row or leave it out.")
        return value.strip()


def open_dataset(path: Path, subject: Origin, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """A dataset of the reference's form (`av_sft`, `ar_sft`, `rl`, or with `api_explanation`), its type and sidecar
    checked against the subject and its tokenizer.

    Raises `InputError` for another subject, layer, width or normalisation, a marker that is not the tokenizer's,
    missing columns, or a prompt whose template is not known."""
    schema = schema_of(path)
    if missing := [name for name in REQUIRED if name not in schema.names]:
        raise InputError(
            f"{path} has no column {missing[0]!r} (found {', '.join(schema.names)}); it is no dataset of activations."
        )
    kind = schema.field(VECTORS).type
    if pa.types.is_fixed_size_list(kind) and kind.list_size != subject.d_model:
        raise InputError(
            f"{path}: its vectors have {kind.list_size} numbers, but the subject {subject.base_model} has width "
            f"{subject.d_model}; set subject.path to the model that they come from."
        )
    file, extraction, templates = path.with_name(path.name + SIDECAR), {}, {}
    if file.exists():
        meta = read_facts(file)
        extraction, templates = check_sidecar(file, meta, subject), templates_of(meta)
        check_marker(file, meta.get("tokens"), templates.get("av"), tokenizer)
    template = None
    finished = "prompt" in schema.names and schema.field("prompt").type in (pa.string(), pa.large_string())
    if finished and not {LABEL, "response"} & set(schema.names):
        critic = templates.get("ar", "")
        if critic.count("{explanation}") != 1:
            raise InputError(
                f"{path} holds explanations inside prompts, and no {file.name} beside it names the template around them "
                f"(prompt_templates.critic with one {{explanation}}); put the dataset's sidecar there."
            )
        template = tuple(critic.split("{explanation}"))
    return Dataset(path, frozenset(schema.names), subject.d_model, subject.layer_index, extraction, templates, template)


def check_sources(sources: Mapping[str, str | Path]) -> None:
    """Raises `InputError` where only some of a run's datasets are named, and for one that is not there."""
    for split in TRAINING:
        if not sources[split]:
            raise InputError(f"extract.source.{split} is empty, but other files are given; name its Parquet file too.")
    for split, path in sources.items():
        if path and not Path(path).expanduser().is_file():
            raise InputError(f"extract.source.{split} names {path}, which is no file; name a Parquet file there.")


def import_datasets(
    sources: Mapping[str, str | Path],
    folder: Path,
    subject: Origin,
    tokenizer: PreTrainedTokenizerBase,
    is_heldout: Callable[[str], bool],
    shard_rows: int,
) -> dict[str, dict]:
    """Writes the rows of the files `sources` (`av_sft`, `ar_sft`, `rl` and perhaps `heldout`) as shards into `folder`,
    each host its share of them; shards that are there already are kept. Returns `rows` and `documents` of each split,
    and the `templates` that the warm start's data were made for, where their sidecars say so.

    Without a `heldout` file those documents of `rl` that `is_heldout` and that neither `av_sft` nor `ar_sft` holds
    become it.

    Raises `InputError` for a missing file, one that `open_dataset` or its rows' checks refuse, and a document that is
    both held out and trained on."""
    check_sources(sources)
    datasets = {
        split: open_dataset(Path(path).expanduser(), subject, tokenizer) for split, path in sources.items() if path
    }
    templates = {role: datasets[f"{role}_sft"].templates.get(role) for role in ("av", "ar")}
    rows = {split: dataset.rows_by_document() for split, dataset in datasets.items()}
    if "heldout" not in datasets:
        datasets["heldout"] = datasets["rl"]
        warm = rows["av_sft"].keys() | rows["ar_sft"].keys()
        rows["heldout"] = {id: n for id, n in rows["rl"].items() if id not in warm and is_heldout(id)}
        rows["rl"] = {id: n for id, n in rows["rl"].items() if id not in rows["heldout"]}
    for split in TRAINING:
        if shared := sorted(rows["heldout"].keys() & rows[split].keys()):
            raise InputError(
                f"The document {shared[0]!r} is in {datasets['heldout'].path} and in {datasets[split].path} ({len(shared)} "
                f"such documents): held-out documents must not be trained on; remove them from one of the files."
            )
    counts = {split: sum(rows[split].values()) for split in datasets}
    for split, count in counts.items():
        if not count:
            raise InputError(
                f"{datasets[split].path} gives no rows for {split!r}; give extract.source.{split} a file with some, or change "
                f"the shares in split."
            )
    progress = Progress("extract", sum(-(-count // shard_rows) for count in counts.values()))
    for split, dataset in datasets.items():
        total = -(-counts[split] // shard_rows)
        known = {name: value for name, value in dataset.extraction.items() if name.startswith(("corpus", "positions"))}
        facts = subject.extraction(dataset.path.name, len(rows[split]), max(rows[split].values())) | known
        mine = share(range(total))
        for i, table in enumerate(recut(dataset.tables(rows[split]), shard_rows)):
            path = folder / f"{split}-{i:05d}-of-{total:05d}.parquet"
            if i in mine and not path.exists():
                write_table(table, path, sidecar_content(split, "base", len(table), facts, base_hash=subject.base_hash))
            progress.update()
    progress.close()
    barrier("the activations")
    return {"rows": counts, "documents": {split: len(rows[split]) for split in datasets}, "templates": templates}


def recut(tables: Iterable[pa.Table], rows: int) -> Iterator[pa.Table]:
    """The same rows in tables of `rows` rows each, the last one shorter."""
    held = []
    for table in tables:
        held.append(table)
        while (count := sum(map(len, held))) >= rows:
            whole = pa.concat_tables(held)
            yield whole.slice(0, rows)
            held = [whole.slice(rows)] if count > rows else []
    if any(map(len, held)):
        yield pa.concat_tables(held)


# Writing


def export_datasets(workdir: AnyPath, out: Path, pair: Sidecar) -> None:
    """Writes a run's rows as `av_sft.parquet`, `ar_sft.parquet`, `rl.parquet` and `heldout.parquet` (of the form of
    `av_sft`) with their sidecars; `pair` is the sidecar of the run's models, whose templates and tokens they get.

    Raises `InputError` where the run has no activations or labels."""
    for split in (*TRAINING, "heldout"):
        form = "av_sft" if split == "heldout" else split
        files = shards_of(workdir / "activations", split)
        keep_text = all(TEXT in columns_of(file) for file in files)
        facts = files[0].with_name(files[0].name + SIDECAR)
        made = read_facts(local(facts), f"{facts} is missing; run `nla extract` again in another folder.")
        if not isinstance(made.get("extraction"), dict) or "corpus" not in made["extraction"]:
            raise InputError(
                f"{facts} names no corpus; it is of an older version: run `nla extract` in another folder."
            )
        schema = export_schema(form, pair.d_model, keep_text)
        content = sidecar_content(
            split,
            form,
            sum(map(row_count, files)),
            made["extraction"],
            base_hash=made.get("base_hash"),
            keep_debug_metadata=keep_text,
            tokens={
                "injection_char": pair.marker.char,
                "injection_token_id": pair.marker.id,
                "injection_left_neighbor_id": pair.marker.left,
                "injection_right_neighbor_id": pair.marker.right,
                "critic_suffix_ids": list(pair.suffix_ids) if form == "ar_sft" else None,
            },
            prompt_templates={"actor": pair.verbalizer_template, "critic": pair.reconstructor_template},
        )
        write_tables(schema, export_tables(files, form, schema, pair), out / f"{split}.parquet", content)


def export_schema(form: str, width: int, keep_text: bool) -> pa.Schema:
    """The columns of a dataset in the reference's order."""
    prompt = [("prompt", pa.string() if form == "ar_sft" else CHAT)]
    response = [("response", pa.string())] if form == "av_sft" else []
    facts = [("n_raw_tokens", pa.int64()), ("activation_layer", pa.int64()), ("doc_id", pa.string())]
    text = [(TEXT, pa.string())] if keep_text else []
    return pa.schema([*prompt, *response, (VECTORS, pa.list_(pa.float32(), width)), *facts, *text])


def export_tables(files: list[Path], form: str, schema: pa.Schema, pair: Sidecar) -> Iterator[pa.Table]:
    """The rows of a split's shards as tables of a dataset, in pieces."""
    content = pair.verbalizer_template.replace("{injection_char}", PLACEHOLDER)
    chat = pa.array([[{"role": "user", "content": content}]], CHAT)
    copied = [name for name in schema.names if name not in ("prompt", "response")]
    for file in files:
        labels, start = read_labels(file) if form != "rl" else None, 0
        for batch in read_batches(file, copied):
            size = len(batch)
            if labels is not None:
                texts = labels.slice(start, size)
                batch, texts = batch.filter(texts.is_valid().combine_chunks()), texts.drop_null().to_pylist()
            columns = {name: batch[name] for name in copied}
            columns["prompt"] = chat.take(np.zeros(len(batch), np.int64))
            if labels is not None:
                name = "prompt" if form == "ar_sft" else "response"
                template = pair.reconstructor_template if form == "ar_sft" else RESPONSE
                columns[name] = pa.array([template.replace("{explanation}", text) for text in texts], pa.string())
            yield pa.table({name: columns[name] for name in schema.names}).cast(schema)
            start += size
