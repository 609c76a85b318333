"""Corpora from every kind of source, their error messages, and the splits."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nla_jax.data.corpus import Document, load_corpus, split_of
from nla_jax.quickstart import python_docs
from nla_jax.runtime.errors import InputError

TEXTS = ["The first text.", "The second text.", "The third text."]


def load(source, tmp_path, **options):
    return load_corpus(str(source), data_dir=tmp_path / "tfds", **options)


def by_id(documents) -> dict[str, str]:
    return {document.id: document.text for document in documents}


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def example_corpus():
    return (Document(f"doc/{number}", text) for number, text in enumerate(TEXTS))


def plain_corpus():
    return [TEXTS[0], ("second", TEXTS[1]), {"id": "third", "text": TEXTS[2]}]


def broken_corpus():
    return [7]


# Sources


def test_jsonl_keeps_ids_and_names_rows_without_one(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"id": 7, "text": TEXTS[0]}, {"text": TEXTS[1]}])
    assert load(path, tmp_path) == [Document("7", TEXTS[0]), Document("a.jsonl:2", TEXTS[1])]


CHAT = ({"role": "user", "content": "What is bread?"}, {"role": "assistant", "content": "It is in the market."})


def chat_corpus():
    return [{"id": "one", "messages": CHAT}, Document("two", "said", CHAT[:1]), TEXTS[0]]


def test_chats_are_documents_with_messages(tmp_path):
    said = "What is bread?\n\nIt is in the market."
    path = write_jsonl(tmp_path / "a.jsonl", [{"id": "one", "messages": CHAT}, {"text": TEXTS[0]}])
    assert load(path, tmp_path) == [Document("one", said, CHAT), Document("a.jsonl:2", TEXTS[0])]
    found = load(f"{__name__}:chat_corpus", tmp_path)
    assert found == [Document("one", said, CHAT), Document("two", "said", CHAT[:1]), Document(found[2].id, TEXTS[0])]
    write_jsonl(path, [{"messages": [{"role": "user"}]}])
    with pytest.raises(InputError, match=r"The chat a.jsonl:1 is \[.*\], expected messages with a role and a content"):
        load(path, tmp_path)


def test_parquet_across_batches(tmp_path):
    texts = [f"Text {number}." for number in range(3000)]
    pq.write_table(pa.table({"content": texts, "name": [f"n{i}" for i in range(3000)]}), tmp_path / "a.parquet")
    documents = load(tmp_path / "a.parquet", tmp_path, text_field="content", id_field="name")
    assert [document.text for document in documents] == texts
    assert documents[2999].id == "n2999"
    assert load(tmp_path / "a.parquet", tmp_path, text_field="content")[1500].id == "a.parquet:1501"


def test_text_file_is_one_document_unless_separated(tmp_path):
    (tmp_path / "one.txt").write_text("A line.\n\n\nAnother.\n")
    (tmp_path / "two.txt").write_text("First.\n<|endoftext|>\nSecond.<|endoftext|>\n")
    assert load(tmp_path / "one.txt", tmp_path) == [Document("one.txt:1", "A line.\n\n\nAnother.")]
    assert [document.text for document in load(tmp_path / "two.txt", tmp_path)] == ["First.", "Second."]


def test_folder_mixes_files_in_the_order_of_their_names(tmp_path):
    folder = tmp_path / "corpus"
    (folder / "sub").mkdir(parents=True)
    (folder / "b.txt").write_text(TEXTS[0])
    write_jsonl(folder / "a.jsonl", [{"text": TEXTS[1]}])
    pq.write_table(pa.table({"text": [TEXTS[2]]}), folder / "sub" / "c.parquet")
    (folder / "notes.md").write_text("Not a corpus file.")
    assert [document.id for document in load(folder, tmp_path)] == ["a.jsonl:1", "b.txt:1", "sub/c.parquet:1"]


def test_function(tmp_path):
    assert load(f"{__name__}:example_corpus", tmp_path) == list(example_corpus())


def test_repeated_texts_are_dropped_and_ids_are_unique(tmp_path):
    rows = [{"id": "a", "text": text} for text in (TEXTS[0], TEXTS[1], TEXTS[0], TEXTS[2])]
    documents = load(write_jsonl(tmp_path / "a.jsonl", rows), tmp_path)
    assert documents == [Document("a", TEXTS[0]), Document("a#2", TEXTS[1]), Document("a#3", TEXTS[2])]


def test_min_chars_and_max_documents(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in ("short", *TEXTS)])
    assert [document.text for document in load(path, tmp_path, min_chars=10, max_documents=2)] == TEXTS[:2]


# Messages


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        ("absent.jsonl", None, {}, r"There is no corpus '.*absent\.jsonl': give python_docs, tfds:NAME"),
        ("a.jsonl", b'{"text": "half \\ud83d of it"}', {}, r"The text of a\.jsonl:1 holds half of a character"),
        ("a.csv", b"x", {}, r"a\.csv is no corpus file: use one that ends in \.txt, \.jsonl, \.parquet"),
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', {}, r"Line 2 of a\.jsonl is not valid JSON"),
        ("a.jsonl", b'{"text": "\xff"}\n', {}, r"Line 1 of a\.jsonl is not valid JSON"),
        ("a.jsonl", b'{"body": "x"}\n', {}, r"Line 1 of a\.jsonl has no 'text' \(found \['body'\]\): set text_field"),
        ("a.jsonl", b'["x"]\n', {}, r"Line 1 of a\.jsonl has no 'text' \(found list\)"),
        ("a.jsonl", b'{"text": "x"}\n{"text": 3}\n', {}, r"The text of a\.jsonl:2 is int, not a string"),
        ("a.jsonl", b"\n", {}, r"The corpus '.*a\.jsonl' holds no documents"),
        ("a.jsonl", b'{"text": "x"}\n', {"min_chars": 9}, r"All 1 documents of '.*' are empty or under 9 characters"),
        ("a.jsonl", b'{"text": "x"}\n', {"max_documents": 0}, r"max_documents is 0: give a positive number"),
        ("a.txt", b" \n", {}, r"All 1 documents of '.*a\.txt' are empty"),
        ("a.txt", b"ab\xff", {}, r"a\.txt is not UTF-8 at byte 2"),
        ("a.parquet", b"PAR1 but not really", {}, r"a\.parquet cannot be read as Parquet \(.*\): write the file again"),
    ],
)
def test_bad_files(tmp_path, name, content, options, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        load(tmp_path / name, tmp_path, **options)
    assert "\n" not in str(caught.value)


def test_parquet_without_the_column_or_with_nulls(tmp_path):
    pq.write_table(pa.table({"body": ["x"], "text": pa.array([None], pa.string())}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"a\.parquet has no column 'content' \(found \['body', 'text'\]\)"):
        load(tmp_path / "a.parquet", tmp_path, text_field="content")
    with pytest.raises(InputError, match=r"The text of a\.parquet:1 is NoneType"):
        load(tmp_path / "a.parquet", tmp_path)


def test_truncated_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": TEXTS * 100}), path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError, match="cannot be read as Parquet"):
        load(path, tmp_path)


def test_empty_folder(tmp_path):
    with pytest.raises(InputError, match=r"The folder '.*' holds no \.txt, \.jsonl, \.parquet files"):
        load(tmp_path, tmp_path)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nla_jax.absent:corpus", r"corpus\.source names the module 'nla_jax\.absent', which cannot be found"),
        (f"{__name__}:absent", "corpus.source names 'absent', but .*test_corpus.py has no such name"),
        (f"{__name__}:broken_corpus", r"Item 1 of corpus.source = .*test_corpus.py, line \d+\) is int"),
        (f"{__name__}:TEXTS", "corpus.source names 'TEXTS' of .*test_corpus.py, which is list, no function"),
        ("builtins:int", "builtins:int .* returns int, expected documents"),
        ("tfds:no_such_dataset", "TFDS knows no dataset 'no_such_dataset'"),
        ("tfds:not a name", "TFDS knows no dataset 'not a name'"),
    ],
)
def test_bad_names(tmp_path, source, message):
    with pytest.raises(InputError, match=message) as caught:
        load(source, tmp_path)
    assert "\n" not in str(caught.value)


def test_a_function_may_give_texts_pairs_or_mappings(tmp_path):
    found = load(f"{__name__}:plain_corpus", tmp_path)
    assert [document.text for document in found] == TEXTS[:3]
    assert [document.id for document in found] == [f"{__name__}:plain_corpus:1", "second", "third"]


# Splits


def test_splits_follow_the_document_alone():
    fractions = {"av_sft": 0.25, "ar_sft": 0.25, "rl": 0.4, "heldout": 0.1}
    documents = [Document(f"guide/{number}", "") for number in range(4000)]
    splits = [split_of(document, fractions) for document in documents]
    for name, fraction in fractions.items():
        assert splits.count(name) / len(splits) == pytest.approx(fraction, abs=0.03)
    assert splits == [split_of(document, dict(reversed(fractions.items()))) for document in documents]
    assert splits != [split_of(document, fractions, seed=1) for document in documents]
    for document, split in zip(documents, splits):
        assert {split_of(Document(f"{document.id}#{part}", "other"), fractions) for part in (1, 2, 13)} == {split}


def test_a_split_of_fraction_zero_stays_empty():
    splits = {split_of(Document(str(number), ""), {"a": 0.0, "rl": 1.0, "z": 0.0}) for number in range(500)}
    assert splits == {"rl"}


@pytest.mark.parametrize("fractions", [{}, {"a": 0.5, "b": 0.4}, {"a": 1.5, "b": -0.5}])
def test_bad_fractions(fractions):
    with pytest.raises(InputError, match="must be non-negative and sum to 1"):
        split_of(Document("a", ""), fractions)


# The embedded corpus


@pytest.fixture
def sources(tmp_path):
    """A small package: a long module docstring, a shared one, a near-duplicate, a short one, a broken file, topics."""
    prose = "\n".join(f"Sentence {number} tells something about the {number}th matter." for number in range(12))
    changed = prose.replace("Sentence 3", "Phrase 3")
    long = "\n\n".join(f"Paragraph {number} of this module's guide is {'very ' * 60}long." for number in range(30))
    other = "\n".join(f"Line {number} explains the many options of the method." for number in range(12))
    files = {
        "__init__.py": f'"""{long}"""\n',
        "alpha.py": f'import absent_package\n\n\ndef f():\n    """{prose}"""\n',
        "beta.py": f'def same():\n    """{prose.upper()}"""\n\n\ndef near():\n    """{changed}"""\n',
        "gamma.py": f'class C:\n    """Too short."""\n\n    async def m(self):\n        """{other}"""\n',
        "broken.py": "def (:\n",
        "METADATA": "Name: fake\n\n<p>A badge</p>\n" + "\n".join(f"The readme's line {n} is here." for n in range(30)),
    }
    folder = tmp_path / "fake"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_text(content)
    topics = tmp_path / "topics.py"
    topics.write_text(f"topics = {{'assert': {'The assert statement checks. ' * 20!r}}}\n")
    return {
        "fake": {f"fake/{name}": folder / name for name in files},
        "python": {python_docs.TOPICS: topics},
    }


def test_python_docs_documents(sources):
    found = dict(python_docs.documents(sources))
    parts = [f"fake/fake#{number}" for number in range(1, 4)]
    assert sorted(found) == ["fake/README", *parts, "fake/fake.alpha.f", "fake/fake.gamma.C.m", "python/topics.assert"]
    assert all(python_docs.MIN_CHARS <= len(text) <= python_docs.MAX_CHARS for text in found.values())
    assert all(found[part].startswith("Paragraph") and found[part].endswith("long.") for part in parts)
    assert "badge" not in found["fake/README"]
    assert list(found.items()) == list(python_docs.documents(sources))


def test_python_docs_budget_per_distribution(sources, monkeypatch):
    monkeypatch.setattr(python_docs, "MAX_BYTES_PER_DISTRIBUTION", 2000)
    kept = [text for id, text in python_docs.documents(sources) if id.startswith("fake/")]
    assert 0 < sum(map(len, kept)) <= 2000


def test_python_docs_through_tfds(sources, tmp_path, monkeypatch):
    monkeypatch.setattr(python_docs, "installed_sources", lambda: sources)
    documents = load("python_docs", tmp_path)
    assert by_id(documents) == dict(python_docs.documents(sources))
    assert load("python_docs", tmp_path) == documents
    assert load("python_docs", tmp_path / "elsewhere") == documents
    with pytest.raises(InputError, match=r"has no split 'test', only \['train'\]"):
        load("python_docs", tmp_path, split="test")
    with pytest.raises(InputError, match=r"has no feature 'body' \(found \['id', 'text'\]\)"):
        load("python_docs", tmp_path, text_field="body")
    name = f"tfds:python_docs/{python_docs.fingerprint(sources)}"
    assert load(name, tmp_path) == documents


def test_python_docs_of_a_changed_environment_is_built_anew(sources, tmp_path, monkeypatch):
    monkeypatch.setattr(python_docs, "installed_sources", lambda: sources)
    before = load("python_docs", tmp_path)
    del sources["fake"]["fake/alpha.py"]
    after = load("python_docs", tmp_path)
    assert "fake/fake.alpha.f" in by_id(before) and "fake/fake.alpha.f" not in by_id(after)


def test_python_docs_build_that_was_interrupted_starts_over(sources, tmp_path, monkeypatch):
    monkeypatch.setattr(python_docs, "installed_sources", lambda: sources)

    def interrupted(sources):
        yield from [("a", "text")]
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(python_docs, "documents", interrupted)
        with pytest.raises(KeyboardInterrupt):
            load("python_docs", tmp_path)
    assert by_id(load("python_docs", tmp_path)) == dict(python_docs.documents(sources))


def test_python_docs_prepared_by_another_process_meanwhile(sources, tmp_path, monkeypatch):
    monkeypatch.setattr(python_docs, "installed_sources", lambda: sources)
    original = python_docs.documents

    def overtaken(sources):
        monkeypatch.setattr(python_docs, "documents", original)
        load("python_docs", tmp_path)
        yield from original(sources)

    monkeypatch.setattr(python_docs, "documents", overtaken)
    assert by_id(load("python_docs", tmp_path)) == dict(original(sources))


def test_installed_sources_hold_the_running_python_and_the_dependencies():
    found = python_docs.installed_sources()
    assert "json/decoder.py" in found["python"] and python_docs.TOPICS in found["python"]
    assert "numpy/linalg/_linalg.py" in found["numpy"]
    assert not any("tests" in path.split("/") for files in found.values() for path in files)
    assert len(python_docs.fingerprint(found)) == 12
