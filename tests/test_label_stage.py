"""Labels are kept as they are made, and hold no tags."""

import sys

import pytest
from conftest import copy_before, nla_main, one_line

from nla_jax.data.rows import load_rows
from nla_jax.labels.labeller import LabelRow, make_labeller
from nla_jax.runtime.errors import InputError

PAID = '''
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
    kept = sorted((workdir / "labels/partial").glob("*.parquet"))
    assert len(kept) == 3  # of 3 texts each: the tenth is lost with the batch that failed
    assert nla_main("label", workdir, corpus, *flags, "--config.label.splits=('av_sft','rl')") == 1
    assert "label.splits" in capsys.readouterr().err

    paid.FAILS_AT = None
    assert nla_main("label", workdir, corpus, *flags, "--config.label.batch=1") == 0
    rows = load_rows(workdir, "av_sft")
    assert len(paid.ASKED) == len(rows) + 1 and len(set(paid.ASKED[:9] + paid.ASKED[10:])) == len(set(paid.ASKED))
    labels = rows.column("api_explanation")
    assert labels[:9] == [f"Text {i} about something." for i in range(1, 10)]
    assert labels[9:] == [f"Text {i} about something." for i in range(11, len(rows) + 2)]
    assert not list((workdir / "labels/partial").glob("*.parquet"))


def test_a_label_with_tags_of_its_own_is_named(paid):
    rows = [LabelRow("A text", "text", 1, "", "doc")]
    with pytest.raises(InputError, match="a label with '</explanation>' for token 1 of 'doc'.*leave them out"):
        make_labeller("paid_labels:Tagged", {}).label(rows)
