"""Batches, positions, activations on disk, and the scores made from them."""

import itertools
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import transformers
from conftest import SENTENCES, TINY, close, flip, one_sentence

import nla_jax.subject
from nla_jax.config import Extract
from nla_jax.data.activations import Activations, median_norm_and_variance
from nla_jax.data.batches import LengthBatches, pad_tokens, rows_of_step, text_windows
from nla_jax.data.chats import chat_tokens
from nla_jax.data.corpus import Document
from nla_jax.data.rows import load_rows, shards_of, spread
from nla_jax.fve import fve, row_fve
from nla_jax.io.files import sealed
from nla_jax.io.parquet import VECTORS, list_column, list_vectors, read_table, row_count, write_table
from nla_jax.models.sharding import host_mesh, make_mesh
from nla_jax.probes.fidelity import derangement
from nla_jax.probes.probe import clustered_interval
from nla_jax.runtime.errors import InputError
from nla_jax.stages.extract import sample_activations, sample_positions
from nla_jax.stages.sft import fixed_width, say_dropped, text_batches
from nla_jax.subject import activations_at, extract, load_subject

LAYER = 1

# Batches


@pytest.mark.parametrize(("n", "batch"), [(10, 4), (7, 7), (5, 12), (9, 3)])
def test_every_epoch_covers_every_row_once(n, batch):
    steps = 3 * n  # whole epochs, whatever the batch
    rows = np.concatenate([rows_of_step(n, batch, step, seed=1) for step in range(steps)])
    assert rows.size == steps * batch
    for epoch in rows.reshape(-1, n):
        assert sorted(epoch) == list(range(n))
    assert any((rows.reshape(-1, n)[0] != epoch).any() for epoch in rows.reshape(-1, n))


def test_batches_are_a_function_of_seed_and_step():
    later = rows_of_step(100, 8, 5, 0)
    rows_of_step(100, 8, 0, 3)
    assert np.array_equal(rows_of_step(100, 8, 5, 0), later)
    assert not np.array_equal(rows_of_step(100, 8, 5, 1), later)
    stream = np.arange(1000)
    window = text_windows(stream, 3, 4, 10, seed=0)
    assert np.array_equal(text_windows(stream, 3, 4, 10, seed=0).tokens, window.tokens)
    assert not np.array_equal(text_windows(stream, 4, 4, 10, seed=0).tokens, window.tokens)
    assert (np.diff(window.tokens, axis=1) == 1).all() and window.tokens.shape == (4, 10)
    # A stream of one window has one place.
    assert text_windows(stream[:10], 0, 2, 10, seed=0).tokens.tolist() == [list(range(10))] * 2


@pytest.mark.parametrize("n", [1000, 1003])
def test_batches_of_similar_length(n):
    """Every epoch reads every row once; a batch depends on (seed, step) alone; little padding, few shapes."""
    lengths = np.clip(np.random.default_rng(0).normal(100, 25, n), 10, 150).astype(int)
    batches, batch = LengthBatches(lengths, 16, seed=1), 16
    rows = np.concatenate([batches.rows(step) for step in range(2 * n // batch)])
    for epoch in (rows[:n], rows[n : 2 * n]):
        assert len(np.unique(epoch)) == len(epoch)
    assert not np.array_equal(rows[:500], rows[n : n + 500])
    np.testing.assert_array_equal(LengthBatches(lengths, 16, seed=1).rows(70), batches.rows(70))
    assert not np.array_equal(LengthBatches(lengths, 16, seed=2).rows(70), batches.rows(70))
    cut = [batches.rows(step) for step in range(n // batch)]
    widths = [batches.width(rows) for rows in cut]
    assert all(lengths[rows].max() <= width <= 152 + 16 for rows, width in zip(cut, widths))
    real, padded = sum(lengths[rows].sum() for rows in cut), sum(widths) * batch
    assert 1 - real / padded < 0.15 and len(set(widths)) <= 8
    for few in (1, 3):  # fewer programs, the same rows
        others = LengthBatches(lengths, 16, seed=1, widths=few)
        assert all(np.array_equal(rows, others.rows(step)) for step, rows in enumerate(cut))
        assert len({others.width(rows) for rows in cut}) <= few and lengths.max() <= others.width(cut[0]) + 152 * (
            few > 1
        )
    # Lengths do not come in order: the batches of a window are shuffled.
    assert np.abs(np.diff([lengths[rows].mean() for rows in cut])).mean() > 10


@pytest.mark.parametrize("n, batch", [(20_000 + 7, 64), (1000, 48), (33, 16), (5, 16)])
def test_later_epochs_have_batches_of_similar_length_too(n, batch):
    """A batch of the second epoch that began amid a group would join its longest rows with another's shortest."""
    lengths = np.clip(np.random.default_rng(0).normal(100, 25, n), 10, 150).astype(int)
    batches = LengthBatches(lengths, batch, seed=1)
    steps = 4 * n // batch
    rows = np.concatenate([batches.rows(step) for step in range(steps + 1)])
    for epoch in range(4):
        assert len(np.unique(rows[epoch * n : (epoch + 1) * n])) == n
    spread = [np.ptp(lengths[batches.rows(step)]) for step in range(steps)]
    widths = [batches.width(batches.rows(step)) for step in range(steps)]
    if n > 10 * batch:
        first, second = slice(0, n // batch), slice(n // batch + 1, 2 * n // batch)
        assert np.mean(spread[second]) < 1.1 * np.mean(spread[first])
        assert np.mean(widths[second]) < 1.03 * np.mean(widths[first])


def test_pad_tokens():
    tokens, lengths = pad_tokens([[1, 2, 3], [], [4]])
    assert tokens.tolist() == [[1, 2, 3, 0, 0, 0, 0, 0], [0] * 8, [4] + [0] * 7] and lengths.tolist() == [3, 0, 1]
    assert pad_tokens([[1, 2, 3]], 3)[0].tolist() == [[1, 2, 3]]
    assert pad_tokens([[1] * 9])[0].shape == (1, 16)


# Positions and extraction


@pytest.fixture(scope="module")
def subject(subject_folder):
    return load_subject(subject_folder, LAYER)


@pytest.fixture(scope="module")
def documents():
    return [Document(f"d{i}", " ".join(SENTENCES[: i + 1])) for i in range(3)] + [Document("short", "One.")]


OPTIONS = Extract(positions=4, min_position=5, max_tokens=60)


@pytest.fixture(scope="module")
def activations(subject, documents):
    return sample_activations(subject, documents, OPTIONS, 0)


def test_sampled_positions_depend_on_seed_and_document_alone():
    candidates = list(range(5, 50))
    first = sample_positions("a", candidates, 6, 0)
    assert first == sorted(set(first)) and len(first) == 6 and set(first) <= set(candidates)
    assert sample_positions("a", candidates, 6, 0) == first
    assert sample_positions("b", candidates, 6, 0) != first and sample_positions("a", candidates, 6, 1) != first
    assert sample_positions("a", candidates[:3], 6, 0) == candidates[:3] and sample_positions("a", [], 6, 0) == []


def test_extraction_does_not_depend_on_order_or_sharding(subject, documents, activations):
    for part in (documents[::-1], documents[1:2]):
        again = sample_activations(subject, part, OPTIONS, 0)
        for i, (id, position) in enumerate(zip(again.doc_ids, again.positions)):
            places = zip(activations.doc_ids, activations.positions)
            (j,) = [j for j, place in enumerate(places) if place == (id, position)]
            close(again.vectors[i], activations.vectors[j], 1e-5)
            assert (again.texts[i], again.tokens[i]) == (activations.texts[j], activations.tokens[j])
    assert again.doc_ids == ["d1"] * 4


@pytest.mark.torch
def test_vectors_are_the_hidden_states_of_transformers(subject_folder, documents, activations):
    """Block K's output is `hidden_states[K + 1]`; text and token stand at the same place."""
    import torch

    model = transformers.AutoModelForCausalLM.from_pretrained(subject_folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(subject_folder)
    assert activations.vectors.dtype == np.float32
    assert activations.doc_ids == [f"d{i}" for i in range(3) for _ in range(4)]
    text_of = {document.id: document.text for document in documents}
    for id in ("d0", "d2"):
        ids = tokenizer(text_of[id]).input_ids
        with torch.no_grad():
            states = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[LAYER + 1][0].numpy()
        for i in (i for i, other in enumerate(activations.doc_ids) if other == id):
            at = activations.positions[i]
            close(activations.vectors[i], states[at], 1e-4)
            assert activations.texts[i] == tokenizer.decode(ids[1 : at + 1])
            assert activations.tokens[i] == tokenizer.decode([ids[at]])
            assert text_of[id].startswith(activations.texts[i] + activations.following[i])


def test_positions_respect_their_bounds_and_skip_special_tokens(subject):
    text = "<|user|>".join(["word"] * 12)
    found = sample_activations(subject, [Document("s", text)], Extract(positions=99, min_position=3, max_tokens=20), 0)
    assert found.positions.min() >= 3 and found.positions.max() < 20 and len(found) > 3
    ids = subject.tokenizer(text).input_ids
    assert not {ids[i] for i in found.positions} & set(subject.tokenizer.all_special_ids)
    assert set(found.positions) == {i for i in range(3, 20) if ids[i] not in subject.tokenizer.all_special_ids}


def test_positions_of_a_chat_are_where_somebody_speaks(subject):
    chat = ({"role": "user", "content": SENTENCES[0]}, {"role": "assistant", "content": SENTENCES[1]})
    documents = [Document("chat", "", chat), Document("text", SENTENCES[0])]
    options = Extract(positions=999, min_position=3, max_tokens=200)
    found = sample_activations(subject, documents, options, 0)
    ids, roles = chat_tokens(subject.tokenizer, list(chat))
    at = [i for i, role in enumerate(roles) if role and i >= 3]
    first = found[: len(at)]
    assert first.positions.tolist() == at and first.roles == [roles[i] for i in at]
    assert first.token_ids == [ids[: i + 1] for i in at] and set(found[len(at) :].roles) == {""}
    assert {"user", "assistant"} == set(first.roles)
    close(first.vectors[-1], activations_at(subject, [ids], [[at[-1]]], ["chat"]).vectors[0], 1e-5)


def test_few_texts_are_read_as_few_rows(subject, monkeypatch):
    shapes, run = [], nla_jax.subject._residual
    monkeypatch.setattr(nla_jax.subject, "_residual", lambda *a: shapes.append(a[2].shape) or run(*a))
    one = extract(subject, SENTENCES[0])
    many = extract(subject, [SENTENCES[0]] * 17)
    assert [shape[0] for shape in shapes] == [1, 16, 16]
    close(many.vectors, np.repeat(one.vectors, 17, 0), 1e-5)


def test_extract_by_position(subject):
    everything, last = extract(subject, SENTENCES[:2], "all"), extract(subject, SENTENCES[:2])
    assert everything.positions.min() == 1  # BOS is left out
    for i, id in enumerate(("0", "1")):
        j = max(j for j, other in enumerate(everything.doc_ids) if other == id)
        close(last.vectors[i], everything.vectors[j], 1e-5)
        assert last.texts[i] == SENTENCES[i] and last.following[i] == ""
    close(extract(subject, SENTENCES[0], [2, -1]).vectors[1], last.vectors[0], 1e-5)
    close(
        extract(subject, SENTENCES[0], np.array([-1])).vectors, extract(subject, SENTENCES[0], np.int64(-1)).vectors, 0
    )
    assert extract(subject, SENTENCES[:2], doc_ids=np.array(["a", "b"])).doc_ids == ["a", "b"]


WRONG_EXTRACTIONS = {
    "index beyond the text": (dict(positions=500), "Position 500 does not exist"),
    "index before the text": (dict(positions=[0, -900]), "Position -900 does not exist"),
    "word": (dict(positions="frist"), "positions must be 'last', 'all', an index or indices; found 'frist'"),
    "fraction": (dict(positions=2.5), "positions must be"),
    "lists of lists": (dict(positions=[[1], [2]]), "positions must be"),
    "no texts": (dict(texts=[]), "no text"),
    "empty text": (dict(texts=["one", ""]), "it is empty"),
    "long text": (dict(max_tokens=4), r"has \d+ tokens, more than max_tokens = 4"),
    "too few ids": (dict(doc_ids=["a"]), "1 doc_ids for 4 texts"),
}


@pytest.mark.parametrize("case", WRONG_EXTRACTIONS)
def test_wrong_extractions(subject, case):
    wrong, message = WRONG_EXTRACTIONS[case]
    with pytest.raises(InputError, match=message) as error:
        extract(subject, **dict(texts=SENTENCES) | wrong)
    one_sentence(error)


@pytest.mark.parametrize("layer", [-1, TINY.layers])
def test_a_layer_that_does_not_exist(subject_folder, layer):
    with pytest.raises(InputError, match=f"Layer {layer} does not exist: .* blocks 0 to 2") as error:
        load_subject(subject_folder, layer)
    one_sentence(error)


# Activations


def test_activations_are_indexed_as_numpy_does(activations):
    n = len(activations)
    for index in (3, -1, slice(1, 4), [2, 0], np.arange(n) % 3 == 0, np.int64(1)):
        at = np.atleast_1d(np.arange(n)[index])
        some = activations[index]
        assert np.array_equal(some.vectors, activations.vectors[at])
        assert np.array_equal(some.positions, activations.positions[at]) and some.layer == LAYER
        for name in ("tokens", "texts", "following", "doc_ids", "token_ids", "roles"):
            assert getattr(some, name) == [getattr(activations, name)[i] for i in at]
    assert len(list(activations)) == n
    with pytest.raises(IndexError):
        activations[n]
    assert np.array_equal(np.asarray(activations), activations.vectors)
    assert repr(activations[:2]) == f"Activations(2 of width 32 after block {LAYER})"


def test_activations_are_saved_and_loaded(activations, tmp_path):
    file = tmp_path / "acts.parquet"
    activations.save(file)
    again = Activations.load(file)
    assert np.array_equal(again.vectors, activations.vectors) and again.layer == LAYER
    assert again.token_ids == activations.token_ids and again.texts == activations.texts
    with pytest.raises(InputError, match=r"acts.parquet exists; .* overwrite=True") as error:
        activations[:1].save(file)
    one_sentence(error)
    activations[:1].save(file, overwrite=True)
    assert len(Activations.load(file)) == 1
    (tmp_path / "text.parquet").write_text("no Parquet")
    with pytest.raises(InputError, match=r"text.parquet cannot be read as a Parquet file") as error:
        Activations.load(tmp_path / "text.parquet")
    one_sentence(error)


# Parquet


def test_vectors_are_fixed_size_float32_lists(activations, tmp_path):
    file = tmp_path / "rl-00000-of-00001.parquet"
    write_table(activations.table(), file, {"kind": "nla_dataset"})
    read = read_table(file)
    assert pq.read_schema(file).field("activation_vector").type == pa.list_(pa.float32(), 32)
    (column,) = read.column("activation_vector").chunks
    assert np.array_equal(list_vectors(column, 32, file), activations.vectors)
    assert np.array_equal(list_vectors(column[2:5], 32, file), activations.vectors[2:5])
    assert read.column("n_raw_tokens").to_pylist() == (activations.positions + 1).tolist()
    assert read.column("doc_id").to_pylist() == activations.doc_ids
    assert file.with_name(file.name + ".nla_meta.yaml").read_text() == sealed("kind: nla_dataset\n")


def test_an_interrupted_write_leaves_no_file(tmp_path, monkeypatch):
    def interrupt(writer, table):
        raise KeyboardInterrupt

    path = tmp_path / "av_sft-00000-of-00001.parquet"
    monkeypatch.setattr(pq.ParquetWriter, "write_table", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_table(pa.table({"a": [1]}), path)
    assert not path.exists()
    with pytest.raises(InputError, match="holds no av_sft data"):
        shards_of(tmp_path, "av_sft")


def test_no_flipped_bit_of_a_parquet_file_changes_what_is_read(tmp_path):
    """In every byte of the footer, and in every 50th of the pages."""
    rng, file = np.random.default_rng(0), tmp_path / "a.parquet"
    table = pa.table(
        {
            VECTORS: list_column(rng.normal(size=(40, 8)).astype(np.float32)),
            "doc_id": [f"doc{i // 4}" for i in range(40)],
            "token_ids": pa.array([list(range(i)) for i in range(40)], pa.list_(pa.int32())),
        }
    )
    write_table(table, file)
    whole = file.read_bytes()
    footer = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    refused = 0
    for at in [*range(4, footer, 50), *range(footer, len(whole))]:
        flip(file, at, at % 8)
        try:
            read = read_table(file)
            vectors = list_vectors(read.column(VECTORS).combine_chunks(), 8, file)
            others = [
                read.column(name).to_pylist() == table.column(name).to_pylist() for name in ("doc_id", "token_ids")
            ]
            assert vectors.tobytes() == table.column(VECTORS).combine_chunks().flatten().to_numpy().tobytes(), at
            assert all(others) and row_count(file) == 40, at
        except InputError as error:
            refused += 1
            assert "a.parquet cannot be read" in str(error)
        file.write_bytes(whole)
    assert refused > (len(whole) - footer) / 2


def test_parquet_files_without_checksums_are_read(tmp_path):
    table = pa.table({"text": ["one", "two"]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=1)
    assert read_table(tmp_path / "a.parquet").to_pydict() == table.to_pydict()
    assert row_count(tmp_path / "a.parquet") == 2
    write_table(read_table(tmp_path / "a.parquet"), tmp_path / "b.parquet")
    write_table(read_table(tmp_path / "b.parquet").slice(1), tmp_path / "c.parquet")
    assert read_table(tmp_path / "c.parquet").to_pydict() == {"text": ["two"]}


def test_vectors_of_lists_without_a_size_are_refused(tmp_path):
    (tmp_path / "activations").mkdir()
    table = pa.table({VECTORS: pa.array([[1.0, 2.0]], pa.list_(pa.float32()))})
    write_table(table, tmp_path / "activations/rl-00000-of-00001.parquet")
    with pytest.raises(InputError, match="not lists of one size"):
        load_rows(tmp_path, "rl")


def test_missing_and_damaged_shards_are_named(tmp_path):
    for i in (0, 2):
        write_table(pa.table({"a": [i]}), tmp_path / f"rl-0000{i}-of-00003.parquet")
    with pytest.raises(InputError, match="2 of 3 rl shards") as error:
        shards_of(tmp_path, "rl")
    one_sentence(error)
    file = tmp_path / "rl-00000-of-00003.parquet"
    with pytest.raises(InputError, match="rl-00000-of-00003"):
        read_table(file, ["other"])
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(InputError, match="rl-00000-of-00003.*cannot be read"):
        read_table(file)


# Rows


@pytest.fixture
def workdir(tmp_path) -> Path:
    """Three shards of 4, 5 and 6 rows whose entries are their number, with labels."""
    start = 0
    for i, size in enumerate((4, 5, 6)):
        numbers = np.arange(start, start + size)
        flat = pa.array(np.repeat(numbers, 3).astype(np.float32))
        table = {"activation_vector": pa.FixedSizeListArray.from_arrays(flat, 3), "doc_id": [f"d{n}" for n in numbers]}
        write_table(pa.table(table), tmp_path / f"activations/rl-0000{i}-of-00003.parquet")
        write_table(
            pa.table({"api_explanation": [f"l{n}" for n in numbers]}), tmp_path / f"labels/rl-0000{i}-of-00003.parquet"
        )
        start += size
    return tmp_path


def maps(workdir: Path) -> list[Path]:
    return sorted((workdir / "activations").glob("rl-*.npy*"))


def test_rows_of_all_shards(workdir):
    rows = load_rows(workdir, "rl")
    assert len(rows) == 15 and rows.vectors.dtype == np.float32 and isinstance(rows.vectors, np.memmap)
    assert rows.vectors.tolist() == [[n] * 3 for n in range(15)]
    assert rows.column("doc_id") == [f"d{n}" for n in range(15)]
    assert rows.column("api_explanation") == [f"l{n}" for n in range(15)]
    assert rows.column("token") == [""] * 15  # the shards do not have it
    assert list(map(len, rows.pieces("doc_id"))) == [4, 5, 6]


@pytest.mark.parametrize("count", [1, 2, 7, 14, 15, 99])
def test_spread_rows_keep_together(workdir, count):
    rows = spread(load_rows(workdir, "rl"), count)
    numbers = rows.vectors[:, 0].astype(int).tolist()
    assert len(rows) == min(count, 15) and numbers[0] == 0 and numbers == sorted(set(numbers))
    assert rows.column("doc_id") == [f"d{n}" for n in numbers]
    assert rows.column("api_explanation") == [f"l{n}" for n in numbers]
    assert rows.column("following") == [""] * len(rows)


def test_vectors_are_decoded_once_and_again_when_a_shard_changes(workdir):
    load_rows(workdir, "rl")
    (first,) = maps(workdir)
    time = first.stat().st_mtime_ns
    load_rows(workdir, "rl")
    assert maps(workdir) == [first] and first.stat().st_mtime_ns == time
    file = workdir / "activations/rl-00001-of-00003.parquet"
    size = file.stat().st_size
    table = read_table(file)
    write_table(table.set_column(0, "activation_vector", table.column("activation_vector").take([4, 3, 2, 1, 0])), file)
    assert file.stat().st_size == size
    rows = load_rows(workdir, "rl")
    assert len(maps(workdir)) == 1 and maps(workdir) != [first]
    assert rows.vectors[:, 0].tolist() == [0, 1, 2, 3, 8, 7, 6, 5, 4, *range(9, 15)]


def test_an_interrupted_decoding_leaves_no_vectors(workdir):
    file = workdir / "activations/rl-00002-of-00003.parquet"
    whole = file.read_bytes()
    damaged = bytearray(whole)
    damaged[4:40] = bytes(36)  # the first page; the footer is whole
    file.write_bytes(damaged)
    with pytest.raises(InputError, match="rl-00002-of-00003.parquet cannot be read") as error:
        load_rows(workdir, "rl")
    one_sentence(error)
    assert all(path.suffix == ".incomplete" for path in maps(workdir))
    file.write_bytes(whole)
    assert load_rows(workdir, "rl").vectors[:, 0].tolist() == list(range(15))


def test_labels_must_be_there_and_as_many(workdir):
    file = workdir / "labels/rl-00001-of-00003.parquet"
    write_table(read_table(file).slice(1), file)
    with pytest.raises(InputError, match="holds 4 labels for 5 rows") as error:
        load_rows(workdir, "rl").column("api_explanation")
    one_sentence(error)
    file.unlink()
    with pytest.raises(InputError, match="rl-00001-of-00003.parquet has no labels; run `nla label`") as error:
        load_rows(workdir, "rl").column("api_explanation")
    one_sentence(error)


def test_batches_come_from_the_mapped_vectors(workdir):
    """Rows whose label is too long are left out without copying the vectors of the others."""
    rows = load_rows(workdir, "rl")
    ids = [[int(label[1:])] * (9 if label == "l5" else 2) for label in rows.column("api_explanation")]
    tokens, lengths, kept = fixed_width(iter([ids[:4], ids[4:]]), 8)
    assert kept.tolist() == [n for n in range(15) if n != 5] and tokens.shape == (14, 8)
    for step in range(4):
        batch = text_batches(tokens, lengths, rows.vectors, kept, 6, seed=0, widths=8)(step)
        assert np.array_equal(batch.tokens[:, 0], batch.vectors[:, 0]) and 5 not in batch.tokens
    with pytest.raises(InputError, match="14 of 15 labels need more than prompts.max_new_tokens = 1 tokens") as error:
        fixed_width([[[1]], [[1, 2]] * 14], 1)
    one_sentence(error)


def test_median_norm_and_variance_in_pieces():
    vectors = np.random.default_rng(0).normal(1, 3, (50, 16)).astype(np.float32)
    norm, variance = median_norm_and_variance(vectors, chunk=7)
    assert norm == float(np.median(np.linalg.norm(vectors, axis=1)))
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True).astype(np.float64) * 4
    assert variance == pytest.approx(unit.var(0).mean(), rel=1e-6)


# Scores


@pytest.fixture(scope="module")
def golds():
    return np.random.default_rng(0).normal(1, 1, (60, 32)).astype(np.float32)


def test_fve_closed_forms(golds):
    unit = golds / np.linalg.norm(golds, axis=1, keepdims=True)
    mean = unit.mean(0)
    assert fve(7 * golds, golds) == pytest.approx(1)  # lengths do not count
    # The mean of the golds, read at length sqrt(d) as every prediction is, against the mean that is not.
    spread = ((unit - mean) ** 2).sum(1).mean()
    assert spread == pytest.approx(1 - (mean**2).sum(), rel=1e-5)
    constant = np.broadcast_to(mean, golds.shape)
    norm = np.linalg.norm(mean)
    assert fve(constant, golds) == pytest.approx(1 - (2 - 2 * norm) / (1 - norm**2), rel=1e-5)
    assert fve(constant, golds, "meannorm") == pytest.approx(0, abs=1e-6)
    noisy = golds + np.random.default_rng(1).normal(0, 1, golds.shape)
    cosine = (noisy * golds).sum(1) / np.linalg.norm(noisy, axis=1) / np.linalg.norm(golds, axis=1)
    assert fve(noisy, golds) == pytest.approx(1 - (2 - 2 * cosine).mean() / (1 - norm**2), rel=1e-5)
    assert fve(noisy, golds, "meannorm") == pytest.approx(1 - (2 - 2 * cosine).mean() / (2 - 2 * norm), rel=1e-5)
    assert fve(noisy, golds, "meannorm") > fve(noisy, golds)
    assert row_fve(noisy, golds).mean() == pytest.approx(fve(noisy, golds))
    for bad in ((golds[:1], golds[:1]), (golds[:5], golds[:6]), (golds[0], golds[0])):
        with pytest.raises(InputError, match="FVE needs") as error:
            fve(*bad)
        one_sentence(error)
    with pytest.raises(InputError, match="baseline"):
        fve(golds, golds, "median")


def test_intervals_respect_clusters():
    rng = np.random.default_rng(0)
    documents = np.repeat([f"d{i}" for i in range(40)], 25)
    clustered = np.repeat(rng.normal(size=40), 25) + 0.1 * rng.normal(size=1000)
    low, high = clustered_interval(clustered, documents)
    iid_low, iid_high = clustered_interval(clustered, [str(i) for i in range(1000)])
    assert low < clustered.mean() < high
    assert 3 < (high - low) / (iid_high - iid_low) < 8  # sqrt(25) = 5 with fully dependent rows
    assert high - low == pytest.approx(2 * 1.96 * clustered.reshape(40, 25).mean(1).std() / np.sqrt(40), rel=0.15)
    assert clustered_interval(clustered, documents) == (low, high)
    narrow = clustered_interval(clustered, documents, level=0.5)
    assert low < narrow[0] < narrow[1] < high


@pytest.mark.parametrize("sizes", [(3, 3, 3), (1, 1), (5, 2, 2, 1), (4, 4), (1, 2, 3, 4, 5), (7, 1), (6,)])
def test_shuffled_rows_come_from_other_documents(sizes):
    ids = list(itertools.chain.from_iterable([f"d{i}"] * size for i, size in enumerate(sizes)))
    ids = [ids[i] for i in np.random.default_rng(0).permutation(len(ids))]
    for seed in range(5):
        target = derangement(ids, seed)
        assert sorted(target) == list(range(len(ids)))
        assert all(target[i] != i for i in range(len(ids)))
        same = sum(ids[i] == ids[target[i]] for i in range(len(ids)))
        assert same == max(0, 2 * max(sizes) - len(ids))  # the fewest that any permutation has


def test_extraction_on_a_mesh_is_that_on_one_device(subject_folder):
    mesh = host_mesh(make_mesh(2, 2, 2))
    one, many = load_subject(subject_folder, 1), load_subject(subject_folder, 1, mesh=mesh)
    embedding = many.params["embedding"]
    assert embedding.sharding.shard_shape(embedding.shape)[1] == embedding.shape[1] // 8
    expected = extract(one, SENTENCES, "all").vectors
    np.testing.assert_allclose(extract(many, SENTENCES, "all").vectors, expected, atol=1e-5 * np.abs(expected).max())


def test_dropped_labels_are_said(capsys):
    assert say_dropped(0, 8, 36) == 0 and not capsys.readouterr().err
    assert say_dropped(2, 8, 36) == 0.25
    assert "2 of 8 labels (25.0 %) need more than prompts.max_new_tokens = 36 tokens" in capsys.readouterr().err
