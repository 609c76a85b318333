"""Labels are kept as they are made, and hold no tags."""

import shutil
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import copy_before, nla_main, one_line

from nla_jax.cli import main
from nla_jax.data.rows import load_rows
from nla_jax.labels.labeller import LabelRow, make_labeller
from nla_jax.runtime.errors import InputError

PAID = '''
from nla_jax.labels.labeller import NoLabel

FAILS_AT, ASKED = None, []


class Paid:
    """Counts the texts that it is paid for; fails at one of them."""

    def label(self, rows):
        made = []
        for row in rows:
            if len(ASKED) == FAILS_AT:
                raise ConnectionError("the account is empty")
            ASKED.append(row.text)
            made.append(f"Text {len(ASKED)} about something.")
        return made


class Tagged:
    def label(self, rows):
        return ["</explanation> <explanation>more"] * len(rows)


class Odd:
    batch, concurrency, reads, version = 2, 3, ("text",), "7"

    def label(self, rows):
        assert len(rows) <= 2
        return [NoLabel("too short") if len(row.text) % 2 else f"About {row.text[:9]}" for row in rows]
'''


@pytest.fixture
def paid(tmp_path, monkeypatch):
    (tmp_path / "paid_labels.py").write_text(PAID)
    monkeypatch.syspath_prepend(tmp_path)
    yield __import__("paid_labels")
    del sys.modules["paid_labels"]


def test_no_text_is_paid_for_twice(finished, corpus, paid, tmp_path, capsys):
    """The labeller fails at the 11th text; the same command asks for the others alone, whatever the batch."""
    workdir = copy_before(finished, tmp_path, "label")
    for file in (workdir / "labels").glob("*.parquet"):
        file.unlink()
    flags = ["--config.label.labeller=paid_labels:Paid", "--config.label.splits=av_sft", "--config.label.batch=3"]
    paid.FAILS_AT = 10
    assert nla_main("label", workdir, corpus, *flags) == 1
    assert "ConnectionError: the account is empty" in one_line(capsys)
    _, kept = sorted((workdir / "labels/cache").glob("*.jsonl"))  # the first one is the finished run's
    assert kept.read_text().count("\n") == 9  # the tenth is lost with the batch that failed
    assert nla_main("label", workdir, corpus, *flags, "--config.label.splits=('av_sft','rl')") == 1
    assert "label.splits" in capsys.readouterr().err

    paid.FAILS_AT = None
    assert nla_main("label", workdir, corpus, *flags, "--config.label.batch=1") == 0
    rows = load_rows(workdir, "av_sft")
    assert len(paid.ASKED) == len(rows) + 1 and len(set(paid.ASKED[:9] + paid.ASKED[10:])) == len(set(paid.ASKED))
    labels = rows.column("api_explanation")
    assert labels[:9] == [f"Text {i} about something." for i in range(1, 10)]
    assert labels[9:] == [f"Text {i} about something." for i in range(11, len(rows) + 2)]
    kept = [file.read_text().count("\n") for file in sorted((workdir / "labels/cache").glob("*.jsonl"))]
    assert sum(kept[1:]) == len(rows)


def test_a_label_with_tags_of_its_own_is_named(paid):
    rows = [LabelRow("A text", "text", 1, "", "doc")]
    with pytest.raises(InputError, match="a label with '</explanation>' for token 1 of 'doc'.*leave them out"):
        make_labeller("paid_labels:Tagged", {}).label(rows)


@pytest.mark.parametrize(
    "name, value, words",
    [("batch", 0, "batch of .* of 1 or more"), ("concurrency", "many", "concurrency of"), ("reads", ("txt",), "'txt'")],
)
def test_what_a_labeller_says_of_itself_is_checked(paid, monkeypatch, name, value, words):
    monkeypatch.setattr(paid.Odd, name, value)
    with pytest.raises(InputError, match=words):
        getattr(make_labeller("paid_labels:Odd", {}), name)


def test_rows_without_a_label_are_left_out_everywhere(finished, corpus, paid, tmp_path):
    """Warm start, evaluation and export do without them; the other rows keep their own labels."""
    workdir = copy_before(finished, tmp_path, "label")
    shutil.rmtree(workdir / "labels")
    for folder in ("train", "pair", "pair_warm"):
        shutil.rmtree(workdir / folder)
    flags = ["--config.label.labeller=paid_labels:Odd", "--config.label.max_dropped=0.8", "--config.rl.steps=1"]
    flags += ["--config.evaluate.probes=nla_jax.probes.fidelity:gold"]
    for stage in ("label", "sft", "rl", "evaluate"):
        assert nla_main(stage, workdir, corpus, *flags) == 0
    for split in ("av_sft", "ar_sft"):
        rows = load_rows(workdir, split)
        texts, labels = rows.column("detokenized_text_truncated"), rows.column("api_explanation")
        assert labels == [None if len(text) % 2 else f"About {text[:9]}" for text in texts]
        there = [i for i, label in enumerate(labels) if label]
        assert rows.labelled().tolist() == there and 0 < len(there) < len(rows)
        assert main(["export", "--workdir", str(workdir), "--out", str(tmp_path / split)]) == 0
        exported = pq.read_table(tmp_path / f"{split}/datasets/{split}.parquet")
        name = "response" if split == "av_sft" else "prompt"
        assert all(labels[i] in text for i, text in zip(there, exported.column(name).to_pylist(), strict=True))
        vectors = np.array(exported.column("activation_vector").to_pylist(), np.float32)
        assert np.array_equal(vectors, rows.vectors[there])
    gold = pq.read_table(workdir / "evaluation/probes/gold.parquet").column("fve_gold_text").to_pylist()
    assert len(gold) == 16 and np.isfinite(gold).all()
