"""The reference's datasets: read from files written by hand in its form, and written so that it reads them."""

import dataclasses
import itertools
import re
import tracemalloc

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from conftest import SENTENCES, TINY, flip, one_sentence

from nla_jax.data.activations import Activations
from nla_jax.data.interchange import (
    Origin,
    export_datasets,
    import_datasets,
    sidecar_content,
)
from nla_jax.data.rows import load_rows
from nla_jax.io import parquet
from nla_jax.io.parquet import write_table
from nla_jax.prompts import find_marker
from nla_jax.quickstart.tokenizer import train_tokenizer
from nla_jax.runtime.errors import InputError

D, LAYER = 8, 1
SUBJECT = Origin("models/tiny", "c0ffee", D, LAYER)
TOKENIZER = train_tokenizer(SENTENCES * 3, TINY.vocab_size)
ACTOR = "Explain: <concept>{injection_char}</concept>"
MARKER = find_marker(TOKENIZER, ACTOR)
CRITIC = "Summary of the following text: <text>{explanation}</text> <summary>"
CHAT = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
DOCUMENTS = {  # split -> documents, three rows each
    "av_sft": [f"web:train:{i}" for i in range(6)],
    "ar_sft": [f"web:train:{i}" for i in range(6, 10)],
    "rl": [f"web:train:{i}" for i in range(8, 18)],  # two of them are in ar_sft too
    "heldout": ["book#1", "book#2", "web:train:99"],
}


def explanation(split: str, row: int) -> str:
    return f"A passage of {split}.\n\nIt ends in {row} dots: <b>…</b>"


def by_hand(split: str, documents=None, vectors: pa.DataType | None = None, d: int = D) -> pa.Table:
    """A file as the reference's stage 3 builds it (`heldout` as av_sft): its columns, in its order and types."""
    documents = DOCUMENTS[split] if documents is None else documents
    ids = [id for id in documents for _ in range(3)]
    n = len(ids)
    values = np.random.default_rng(sum(map(ord, split))).normal(0, 9, (n, d)).astype(np.float32)
    columns = {}
    if split == "ar_sft":
        texts = [CRITIC.format(explanation=explanation(split, i)) for i in range(n)]
        columns["prompt"] = pa.array(texts, pa.string())
    else:
        columns["prompt"] = pa.array([[{"role": "user", "content": "Explain: <concept><INJECT></concept>"}]] * n, CHAT)
    if split in ("av_sft", "heldout"):
        texts = [f"<explanation>\n{explanation(split, i)}\n</explanation>" for i in range(n)]
        columns["response"] = pa.array(texts, pa.string())
    columns["activation_vector"] = pa.array(values.tolist(), vectors or pa.list_(pa.float32(), d))
    columns["n_raw_tokens"] = pa.array(range(50, 50 + n), pa.int64())
    columns["activation_layer"] = pa.array([LAYER] * n, pa.int64())
    columns["doc_id"] = pa.array(ids, pa.string())
    columns["detokenized_text_truncated"] = pa.array(
        [f"{id}, up to token {i}" for i, id in enumerate(ids)], pa.string()
    )
    return pa.table(columns)


def sidecar(split: str) -> dict:
    stage = "av_sft" if split == "heldout" else split
    return {
        "dataset_id": f"{stage}_0123",
        "stage": stage,
        "row_count": 3,
        "extraction": {
            "base_model": "org/tiny",
            "d_model": D,
            "layer_index": LAYER,
            "norm": "none",
            "corpus": "org/web",
            "corpus_slice": {"start": 7, "length": 100},
            "positions_per_doc": 3,
        },
        "kind": "nla_dataset",
        "schema_version": 1,
        "keep_debug_metadata": True,
        "tokens": {
            "injection_char": MARKER.char,
            "injection_token_id": MARKER.id,
            "injection_left_neighbor_id": MARKER.left,
            "injection_right_neighbor_id": MARKER.right,
            "critic_suffix_ids": [7, 8] if split == "ar_sft" else None,
        },
        "prompt_templates": {"actor": ACTOR, "critic": CRITIC},
        "parent_datasets": ["base_0123"],
        "created_at": "2026-01-01T00:00:00+00:00",
        "created_by": "nla.datagen.stage3_build",
        "git_commit": "abc",
    }


@pytest.fixture
def small_batches(monkeypatch):
    """Files are read in several pieces."""
    monkeypatch.setattr(parquet, "BATCH", 2)


@pytest.fixture
def sources(tmp_path, small_batches):
    """The four files with their sidecars, as the config names them."""
    for split in DOCUMENTS:
        pq.write_table(by_hand(split), tmp_path / f"{split}.parquet", row_group_size=5)
        (tmp_path / f"{split}.parquet.nla_meta.yaml").write_text(yaml.safe_dump(sidecar(split)))
    return {split: str(tmp_path / f"{split}.parquet") for split in DOCUMENTS}


def read(sources, folder, is_heldout=lambda id: False, shard_rows: int = 7):
    return import_datasets(sources, folder / "activations", SUBJECT, TOKENIZER, is_heldout, shard_rows)


def shards(folder, split: str) -> pa.Table:
    files = sorted((folder / "activations").glob(f"{split}-*.parquet"))
    return pa.concat_tables([pq.read_table(file) for file in files])


def values(table: pa.Table) -> np.ndarray:
    return np.array(table["activation_vector"].to_pylist(), np.float32)


# Reading


@pytest.mark.parametrize(
    "kind",
    [pa.list_(pa.float32(), D), pa.list_(pa.float32()), pa.list_(pa.float64()), pa.large_list(pa.float32())],
    ids=str,
)
def test_all_rows_come_back_as_they_are(sources, tmp_path, kind):
    for split, path in sources.items():
        pq.write_table(by_hand(split, vectors=kind), path, row_group_size=4)
    found = read(sources, tmp_path)
    assert found["rows"] == {split: 3 * len(documents) for split, documents in DOCUMENTS.items()}
    assert found["documents"] == {"av_sft": 6, "ar_sft": 4, "rl": 10, "heldout": 2}
    for split in DOCUMENTS:
        expected, table = by_hand(split), shards(tmp_path, split)
        assert table.schema.field("activation_vector").type == pa.list_(pa.float32(), D)
        assert np.array_equal(values(table), values(expected))
        for name in ("doc_id", "n_raw_tokens", "activation_layer", "detokenized_text_truncated"):
            assert table[name].to_pylist() == expected[name].to_pylist()
        if split == "rl":
            assert "api_explanation" not in table.column_names
        else:
            assert table["api_explanation"].to_pylist() == [explanation(split, i) for i in range(len(table))]


def test_shards_are_small_and_named_and_remember_their_origin(sources, tmp_path):
    read(sources, tmp_path, shard_rows=7)
    files = sorted((tmp_path / "activations").glob("rl-*.parquet"))
    assert [file.name for file in files] == [f"rl-{i:05d}-of-00005.parquet" for i in range(5)]
    assert [pq.read_metadata(file).num_rows for file in files] == [7, 7, 7, 7, 2]
    meta = yaml.safe_load(files[0].with_name(files[0].name + ".nla_meta.yaml").read_text())
    assert meta["extraction"] == sidecar("rl")["extraction"] | {"base_model": "models/tiny"}
    assert (meta["stage"], meta["row_count"], meta["base_hash"]) == ("base", 7, "c0ffee")


def test_an_interrupted_import_goes_on(sources, tmp_path):
    read(sources, tmp_path)
    expected = shards(tmp_path, "av_sft")
    kept, lost = sorted((tmp_path / "activations").glob("av_sft-*.parquet"))[:2]
    time = kept.stat().st_mtime_ns
    lost.unlink()
    read(sources, tmp_path)
    assert shards(tmp_path, "av_sft").equals(expected) and kept.stat().st_mtime_ns == time


def test_explanations_of_earlier_stages_and_other_columns_of_ours(sources, tmp_path):
    """A stage-2 file: `api_explanation` and no prompts; `token` and `following` are kept where they are."""
    table = by_hand("rl").drop_columns("prompt").append_column("api_explanation", pa.array(["said"] * 30))
    pq.write_table(table.append_column("token", pa.array(["."] * 30)), sources["rl"])
    read(sources, tmp_path)
    found = shards(tmp_path, "rl")
    assert set(found["api_explanation"].to_pylist()) == {"said"} and set(found["token"].to_pylist()) == {"."}


def test_files_without_a_sidecar(sources, tmp_path):
    for split in ("av_sft", "rl", "heldout"):
        (tmp_path / f"{split}.parquet.nla_meta.yaml").unlink()
    read(sources, tmp_path)
    (meta, *_) = sorted((tmp_path / "activations").glob("rl-*.yaml"))
    extraction = yaml.safe_load(meta.read_text())["extraction"]
    assert extraction == {
        "base_model": "models/tiny",
        "d_model": D,
        "layer_index": LAYER,
        "norm": "none",
        "corpus": "rl.parquet",
        "corpus_slice": {"start": 0, "length": 10},
        "positions_per_doc": 3,
    }


def test_held_out_documents_are_split_off_rl(sources, tmp_path):
    chosen = {"web:train:8", "web:train:12", "web:train:17"}  # 8 is in ar_sft
    found = read(sources | {"heldout": ""}, tmp_path, is_heldout=chosen.__contains__)
    expected, heldout, rl = by_hand("rl"), shards(tmp_path, "heldout"), shards(tmp_path, "rl")
    at = np.array([id in chosen - {"web:train:8"} for id in expected["doc_id"].to_pylist()])
    assert np.array_equal(values(heldout), values(expected)[at]) and np.array_equal(values(rl), values(expected)[~at])
    assert found["rows"]["heldout"] == 6 and found["rows"]["rl"] == 24
    assert not set(heldout["doc_id"].to_pylist()) & set(rl["doc_id"].to_pylist())


def test_the_parts_of_a_document_are_held_out_together(sources, tmp_path):
    pq.write_table(by_hand("rl", ["guide#1", "guide#2", "other"]), sources["rl"])
    asked = []
    found = read(sources | {"heldout": ""}, tmp_path, is_heldout=lambda id: asked.append(id) or id == "guide")
    assert found["rows"]["heldout"] == 6 and found["documents"]["heldout"] == 1 and sorted(asked) == ["guide", "other"]


@pytest.mark.parametrize("split", ["av_sft", "ar_sft", "rl"])
@pytest.mark.parametrize("document", ["book#1", "book#7", "web:train:99"])
def test_a_document_held_out_and_trained_on_is_refused(sources, tmp_path, split, document):
    pq.write_table(by_hand(split, ["web:train:0", document]), sources[split])
    with pytest.raises(
        InputError, match=f"document '{document.partition('#')[0]}' is in .*heldout.parquet and in .*{split}.parquet"
    ) as error:
        read(sources, tmp_path)
    one_sentence(error)
    assert not (tmp_path / "activations").exists()


def changed(table: pa.Table, name: str, column) -> pa.Table:
    return table.set_column(table.column_names.index(name), name, column)


def vectors_with(value, at: int = 4, kind=None):
    def change(table):
        rows = table["activation_vector"].to_pylist()
        rows[at] = value if value is None else [value] * D if np.isscalar(value) else value
        return changed(table, "activation_vector", pa.array(rows, kind or pa.list_(pa.float32())))

    return change


def text_in(name: str, value):
    def change(table):
        return changed(table, name, pa.array([*table[name].to_pylist()[:-1], value], pa.string()))

    return change


BAD_ROWS = {
    "no vectors": ("rl", lambda t: t.drop_columns("activation_vector"), "no column 'activation_vector'"),
    "no documents": ("rl", lambda t: t.drop_columns("doc_id"), "no column 'doc_id'"),
    "other width": ("rl", lambda t: by_hand("rl", d=D + 1), "have 9 numbers, but the subject models/tiny has width 8"),
    "other width in lists": ("rl", vectors_with([1.0] * 5), "vectors of 5 numbers, expected 8"),
    "missing vector": ("rl", vectors_with(None), "missing values"),
    "missing number": ("rl", vectors_with([None] * D, kind=pa.list_(pa.float32(), D)), "missing values"),
    "not a number": ("av_sft", vectors_with(np.nan), "NaN or infinite"),
    "beyond float32": ("av_sft", vectors_with(1e300, kind=pa.list_(pa.float64())), "NaN or infinite"),
    "integers": ("rl", lambda t: changed(t, "activation_vector", pa.array([[1] * D] * len(t))), "lists of int64"),
    "no lists": ("rl", lambda t: changed(t, "activation_vector", pa.array(["x"] * len(t))), "is string"),
    "other layer": (
        "rl",
        lambda t: changed(t, "activation_layer", pa.array([1] * 29 + [2])),
        "activation_layer is 2 .* is 1",
    ),
    "missing document": ("rl", text_in("doc_id", None), "row 30 has no doc_id"),
    "response without tags": (
        "av_sft",
        text_in("response", "An explanation."),
        "response of row 18 is not an explanation between",
    ),
    "empty response": ("heldout", text_in("response", "<explanation> </explanation>"), "response of row 9"),
    "missing response": ("heldout", text_in("response", None), "response of row 9"),
    "prompt of another template": (
        "ar_sft",
        text_in("prompt", "Summary of <text>x</text> <summary>"),
        "prompt of row 12",
    ),
    "empty explanation": ("ar_sft", text_in("prompt", CRITIC.format(explanation="")), "prompt of row 12"),
    "null label": (
        "rl",
        lambda t: t.append_column("api_explanation", pa.array([None] * len(t), pa.string())),
        "api_explanation of row 1 ",
    ),
    "no rows": ("rl", lambda t: t.slice(0, 0), "no rows for 'rl'"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_rows_are_refused(sources, tmp_path, case):
    split, change, message = BAD_ROWS[case]
    pq.write_table(change(by_hand(split)), sources[split])
    with pytest.raises(InputError, match=message) as error:
        read(sources, tmp_path)
    assert sources[split] in str(error.value)
    one_sentence(error)


BAD_SIDECARS = {
    "other model": ("extraction.base_model", "org/other", "base_model is 'other', expected 'tiny'; set subject.path"),
    "no model": ("extraction.base_model", None, "base_model is 'None', expected 'tiny'"),
    "other width": ("extraction.d_model", 9, "d_model is 9, expected 8; set subject.path"),
    "other layer": ("extraction.layer_index", 20, "layer_index is 20, expected 1; set subject.layer"),
    "several layers": (
        "extraction.earlier_layers",
        [0],
        "earlier_layers is (0,), expected (); set subject.earlier_layers",
    ),
    "no layers": ("extraction.earlier_layers", 3, "earlier_layers is 3, expected ()"),
    "normalised": ("extraction.norm", "l2", "norm is 'l2', expected 'none'; use raw vectors"),
    "a model's": ("kind", "nla_model", "kind is 'nla_model', expected 'nla_dataset'"),
    "no extraction": ("extraction", "x", "expected 'nla_dataset' with a field extraction"),
    "other weights": ("base_hash", "beef", "base_hash is beef, but the subject models/tiny has c0ffee"),
    "other marker": ("tokens.injection_token_id", 3, "(token 3, expected 1 times"),
    "other neighbour": ("tokens.injection_left_neighbor_id", 3, "the sidecar belongs to another tokenizer or prompt"),
    "no template": ("prompt_templates", None, "names the template around them"),
    "template of no use": ("prompt_templates.critic", "Summary:", "names the template around them"),
}


@pytest.mark.parametrize("case", BAD_SIDECARS)
def test_bad_sidecars_are_refused(sources, tmp_path, case):
    field, value, message = BAD_SIDECARS[case]
    meta, file = sidecar("ar_sft"), tmp_path / "ar_sft.parquet.nla_meta.yaml"
    *outer, name = field.split(".")
    (meta[outer[0]] if outer else meta)[name] = value
    file.write_text(yaml.safe_dump(meta))
    with pytest.raises(InputError, match=re.escape(message)) as error:
        read(sources, tmp_path)
    assert file.name in str(error.value)
    one_sentence(error)


def test_missing_and_broken_files(sources, tmp_path):
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    (tmp_path / "rl.parquet.nla_meta.yaml").rename(tmp_path / "kept")
    for change, message in [
        ({"rl": ""}, "extract.source.rl is empty"),
        ({"av_sft": "nowhere.parquet"}, "extract.source.av_sft names nowhere.parquet, which is no file"),
        ({"av_sft": str(tmp_path / "broken.parquet")}, "broken.parquet cannot be read"),
        ({"av_sft": str(tmp_path)}, "which is no file; name a Parquet file"),
        ({"heldout": ""}, "no rows for 'heldout'; give extract.source.heldout"),
    ]:
        with pytest.raises(InputError, match=message) as error:
            read(sources | change, tmp_path)
        one_sentence(error)
    (tmp_path / "ar_sft.parquet.nla_meta.yaml").unlink()
    with pytest.raises(InputError, match="names the template around them") as error:
        read(sources, tmp_path)
    one_sentence(error)


# Writing


@pytest.fixture
def workdir(tmp_path, small_batches):
    """Activations and labels of a run, two shards a split; the last split has no texts."""
    rng = np.random.default_rng(0)
    for split, i in itertools.product(DOCUMENTS, range(2)):
        ids = [f"{split}/{i}{j}" for j in range(3)]
        activations = Activations(
            rng.normal(0, 50, (3, D)).astype(np.float32),
            ["."] * 3,
            ["Text “…”"] * 3,
            [""] * 3,
            np.arange(3) + 50,
            ids,
            token_ids=[[5] * (51 + i) for i in range(3)],
            roles=["user"] * 3,
            layer=LAYER,
        )
        facts = SUBJECT.extraction("web", 24, 3)
        table, name = activations.table(), f"{split}-{i:05d}-of-00002.parquet"
        if split == "heldout":
            table = table.drop_columns(["detokenized_text_truncated", "token", "following", "token_ids", "role"])
        write_table(
            table, tmp_path / "activations" / name, sidecar_content(split, "base", 3, facts, base_hash="c0ffee")
        )
        if split != "rl":
            labels = pa.table({"api_explanation": [f"{id} – two\nlines" for id in ids]})
            write_table(labels, tmp_path / "labels" / name)
    return tmp_path


@pytest.fixture
def exported(workdir, pair):
    export_datasets(workdir, workdir / "out", dataclasses.replace(pair.sidecar, d_model=D))
    return workdir / "out"


def test_what_is_written_has_the_references_columns(exported, pair):
    common = [
        ("activation_vector", pa.list_(pa.float32(), D)),
        ("n_raw_tokens", pa.int64()),
        ("activation_layer", pa.int64()),
        ("doc_id", pa.string()),
    ]
    text = ("detokenized_text_truncated", pa.string())
    expected = {
        "av_sft": [("prompt", CHAT), ("response", pa.string()), *common, text],
        "ar_sft": [("prompt", pa.string()), *common, text],
        "rl": [("prompt", CHAT), *common, text],
        "heldout": [("prompt", CHAT), ("response", pa.string()), *common],
    }
    for split, fields in expected.items():
        table = pq.read_table(exported / f"{split}.parquet")
        assert table.schema.names == [name for name, _ in fields]
        assert all(table.schema.field(name).type.equals(kind) for name, kind in fields)
        row = table.to_pylist()[4]
        label = f"{row['doc_id']} – two\nlines"
        if split == "ar_sft":
            assert row["prompt"] == f"<text>{label}</text><summary>"
        else:
            assert row["prompt"] == [{"role": "user", "content": "Explain this: <INJECT>"}]
        if "response" in row:
            assert row["response"] == f"<explanation>\n{label}\n</explanation>"
        assert (row["n_raw_tokens"], row["activation_layer"]) == (52, LAYER)
    assert not list(exported.glob("*.incomplete"))


def test_what_is_written_has_the_references_sidecar(exported, pair):
    """Its readers build `extraction` and `tokens` with ** and check kind, version and stage."""
    marker = pair.sidecar.marker
    for split in DOCUMENTS:
        meta = yaml.safe_load((exported / f"{split}.parquet.nla_meta.yaml").read_text())
        assert meta["kind"] == "nla_dataset" and meta["schema_version"] == 1 and meta["row_count"] == 6
        assert meta["stage"] == ("av_sft" if split == "heldout" else split)
        assert meta["extraction"] == {
            "base_model": "models/tiny",
            "d_model": D,
            "layer_index": LAYER,
            "norm": "none",
            "corpus": "web",
            "corpus_slice": {"start": 0, "length": 24},
            "positions_per_doc": 3,
        }
        assert meta["tokens"] == {
            "injection_char": marker.char,
            "injection_token_id": marker.id,
            "injection_left_neighbor_id": marker.left,
            "injection_right_neighbor_id": marker.right,
            "critic_suffix_ids": list(pair.sidecar.suffix_ids) if split == "ar_sft" else None,
        }
        assert meta["prompt_templates"] == {
            "actor": "Explain this: {injection_char}",
            "critic": "<text>{explanation}</text><summary>",
        }
        assert meta["keep_debug_metadata"] is (split != "heldout")
        assert meta["parent_datasets"] == [] and meta["git_commit"] is None
        assert {type(meta[name]) for name in ("dataset_id", "created_at", "created_by")} == {str}


def test_what_is_written_is_read_back(exported, workdir, tmp_path):
    found = read({split: exported / f"{split}.parquet" for split in DOCUMENTS}, tmp_path / "second", shard_rows=5)
    assert found["rows"] == dict.fromkeys(DOCUMENTS, 6)
    for split in DOCUMENTS:
        a, b = shards(workdir, split), shards(tmp_path / "second", split)
        assert np.array_equal(values(a), values(b))
        for name in {"doc_id", "n_raw_tokens", "detokenized_text_truncated"} & set(a.column_names):
            assert a[name].to_pylist() == b[name].to_pylist()
        if split != "rl":
            assert b["api_explanation"].to_pylist() == [f"{id} – two\nlines" for id in a["doc_id"].to_pylist()]


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        ("labels/ar_sft-00001-of-00002.parquet", "ar_sft-00001-of-00002.parquet has no labels; run `nla label`"),
        ("activations/rl-00001-of-00002.parquet", "1 of 2 rl shards"),
        ("activations/rl-00000-of-00002.parquet.nla_meta.yaml", "nla_meta.yaml is missing"),
    ],
)
def test_an_unfinished_run_cannot_be_exported(workdir, pair, lost, message):
    (workdir / lost).unlink()
    with pytest.raises(InputError, match=message) as error:
        export_datasets(workdir, workdir / "out", dataclasses.replace(pair.sidecar, d_model=D))
    one_sentence(error)


def test_a_changed_sidecar_of_a_dataset_is_named(workdir, pair, tmp_path):
    """As a failing disk changes it; who changes it on purpose takes the checksum out."""
    file = workdir / "activations/rl-00000-of-00002.parquet.nla_meta.yaml"
    at = file.read_bytes().index(b"length: ") + len("length: ")
    flip(file, at)
    with pytest.raises(InputError, match=f"{file} is damaged") as error:
        export_datasets(workdir, workdir / "out", dataclasses.replace(pair.sidecar, d_model=D))
    one_sentence(error)
    flip(file, at)
    export_datasets(workdir, workdir / "out", dataclasses.replace(pair.sidecar, d_model=D))
    exported = {split: workdir / "out" / f"{split}.parquet" for split in DOCUMENTS}
    side = exported["rl"].with_name("rl.parquet.nla_meta.yaml")
    side.write_text(side.read_text().replace("stage: rl", "stage: RL"))
    with pytest.raises(InputError, match="rl.parquet.nla_meta.yaml is damaged: .* take that line out"):
        read(exported, tmp_path / "new")
    side.write_text("".join(line for line in side.open() if not line.startswith("checksum")))
    read(exported, tmp_path / "new")


# Memory


def test_rows_never_become_lists(tmp_path):
    """40 MB of vectors and 40 MB of texts go in and out; as Python objects they would be 380 MB."""
    n, d, sources = 20_000, 512, {}
    rng = np.random.default_rng(0)
    for split, count in {"av_sft": 10, "ar_sft": 10, "rl": n, "heldout": 10}.items():
        vectors = rng.normal(size=(count, d)).astype(np.float32)
        table = {
            "activation_vector": pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), d),
            "doc_id": [f"{split}{i // 10}" for i in range(count)],
            "n_raw_tokens": [60] * count,
            "activation_layer": [LAYER] * count,
            "detokenized_text_truncated": [f"{i} " * 400 for i in range(count)],
            "api_explanation": [f"Label {i}" for i in range(count)],
        }
        sources[split] = tmp_path / f"{split}.parquet"
        pq.write_table(pa.table(table), sources[split], row_group_size=4096)
        if split == "rl":
            expected = vectors[[7, n - 1]]
    del vectors, table
    arrow = pa.total_allocated_bytes()
    tracemalloc.start()
    import_datasets(sources, tmp_path / "activations", Origin("tiny", "", d, LAYER), TOKENIZER, lambda id: False, 4000)
    _, importing = tracemalloc.get_traced_memory()
    tracemalloc.reset_peak()
    rows = load_rows(tmp_path, "rl")
    found = rows.vectors[[7, n - 1]]
    _, loading = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(rows) == n and np.array_equal(found, expected) and type(found) is np.ndarray
    assert isinstance(rows.vectors, np.memmap)
    assert importing < 25e6 and loading < 10e6, (importing, loading)
    assert pa.total_allocated_bytes() - arrow < 5e6
