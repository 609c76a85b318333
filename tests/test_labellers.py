"""Labels from servers, through the real SDKs against a server on loopback; labels from files; what outlives a kill."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import CONFIG, one_sentence
from fake_llm import FakeLLM, wanted

from nla_jax.cli import load_config, main
from nla_jax.data.activations import Activations
from nla_jax.data.rows import load_rows
from nla_jax.io.parquet import write_table
from nla_jax.labels.asking import INSTRUCTION
from nla_jax.labels.cache import Cache
from nla_jax.labels.calls import as_done
from nla_jax.labels.labeller import LabelRow, NoLabel, make_labeller
from nla_jax.runtime.errors import InputError
from nla_jax.runtime.run import Run
from nla_jax.runtime.user_code import resolve
from nla_jax.stages.label import label
from nla_jax.stages.table import STAGES

KEY = "sk-secret-0123456789"
TEXTS = [f"The river turns {word} at the old mill" for word in "north south east west up down in out".split()]
LABELLERS = {
    "openai": "nla_jax.labels.openai:OpenAI",
    "anthropic": "nla_jax.labels.anthropic:Anthropic",
    "batch": "nla_jax.labels.anthropic:AnthropicBatch",
    "file": "nla_jax.labels.file:File",
}
API = ["openai", "anthropic"]


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("ANTHROPIC_API_KEY", KEY)
    server = FakeLLM()
    yield server
    server.close()


@pytest.fixture
def workdir(tmp_path):
    """A working folder with extracted activations of `TEXTS`: three of them in a first shard."""
    run = Run(load_config(CONFIG, []), tmp_path / "run", STAGES)
    with run.stage("extract") as result:
        for i, texts in enumerate((TEXTS[:3], TEXTS[3:])):
            write_table(table(texts, 3 * i), run.workdir / f"activations/av_sft-0000{i}-of-00002.parquet")
        result["rows"] = {"av_sft": len(TEXTS)}
    return run.workdir


def table(texts, first):
    n = len(texts)
    return Activations(
        vectors=np.ones((n, 4), np.float32),
        tokens=[text.rpartition(" ")[2] for text in texts],
        texts=list(texts),
        following=[""] * n,
        positions=np.arange(n) + 7,
        doc_ids=[f"doc{first + i}" for i in range(n)],
        token_ids=[[1]] * n,
        roles=[""] * n,
        layer=1,
    ).table()


def flags(kind, server=None, **more):
    base = "/v1" if kind == "openai" else ""
    given = {"label.labeller": LABELLERS[kind], "label.splits": "av_sft", "label.max_dropped": 0.6} | (
        {} if kind == "file" else {"label.settings.model": "m", "label.connection.base_url": f"{server.url}{base}"}
    )
    given |= {"label.connection.poll": 0.01} if kind == "batch" else {}
    given |= {name.replace("__", "."): value for name, value in more.items()}
    return [f"--config.{name}={value}" for name, value in given.items()]


def nla_label(workdir, *arguments):
    return main(["label", "--config", CONFIG, "--workdir", str(workdir), *arguments])


def labels(workdir):
    return load_rows(workdir, "av_sft").column("api_explanation")


def holds(folder, words):
    return [file for file in folder.rglob("*") if file.is_file() and words.encode() in file.read_bytes()]


@pytest.mark.parametrize("kind", API)
def test_refusals_cut_answers_faults_and_limits(kind, server, workdir, capsys):
    """Faults are retried by the SDK; what is refused, cut or rejected is counted, and has no label."""
    server.replies |= {
        TEXTS[0]: [429, "ok"],
        TEXTS[1]: [500, "ok"],
        TEXTS[2]: ["broken", "ok"],
        TEXTS[3]: ["refused"],
        TEXTS[4]: ["cut"],
        TEXTS[5]: [400],
        TEXTS[6]: ["tagged"],
        TEXTS[7]: ["filtered"],
    }
    assert nla_label(workdir, *flags(kind, server)) == 0
    expected = [wanted(text) for text in TEXTS]
    assert labels(workdir) == [*expected[:3], None, None, None, expected[6], None]
    assert [server.asked[text] for text in TEXTS] == [2, 2, 2, 1, 1, 1, 1, 1]
    assert "4 of 8 texts have no label (1 cut, 2 refused, 1 rejected); the warm start leaves them out" in (
        capsys.readouterr().err
    )
    record = json.loads((workdir / "stages/label.json").read_text())
    assert record["result"]["no_label"] == {"cut": 1, "refused": 2, "rejected": 1}
    assert load_rows(workdir, "av_sft").labelled().tolist() == [0, 1, 2, 6]
    assert not holds(workdir, KEY)  # which the server put into its message


@pytest.mark.parametrize("kind", API)
def test_what_is_sent_and_recorded(kind, server, workdir):
    """The instruction with the text and its token, under the key of the environment; the file says what made it."""
    more = {"label__settings__request__temperature": 0.5, "label__settings__max_tokens": 77}
    assert nla_label(workdir, *flags(kind, server, **more)) == 0
    body = next(body for body in server.bodies if TEXTS[0] in body["messages"][0]["content"])
    asked = INSTRUCTION.replace("{token}", "'mill'").replace("{text}", TEXTS[0])
    assert body["messages"] == [{"role": "user", "content": asked}] and body["model"] == "m"
    limit = {"openai": "max_completion_tokens", "anthropic": "max_tokens"}[kind]
    assert body[limit] == 77 and body["temperature"] == 0.5
    assert {key.removeprefix("Bearer ") for key in server.keys} == {KEY}
    metadata = pq.read_schema(next((workdir / "labels").glob("*.parquet"))).metadata
    facts = json.loads(metadata[b"nla_jax.labels"])
    assert facts["labeller"] == LABELLERS[kind] and facts["nla_jax"]
    assert facts["settings"]["model"] == "m" and facts["settings"]["instruction"] == INSTRUCTION
    assert "base_url" not in facts["settings"]
    assert not holds(workdir, KEY)


def test_as_many_requests_at_a_time_as_asked_for(server, workdir):
    server.replies |= {text: ["slow"] for text in TEXTS}
    assert nla_label(workdir, *flags("openai", server, label__concurrency=3)) == 0
    assert server.busiest == 3


@pytest.mark.parametrize("kind", API)
def test_an_answer_that_comes_too_late_is_asked_for_again(kind, server, workdir):
    server.replies[TEXTS[4]] = ["slow"]
    assert nla_label(workdir, *flags(kind, server, label__connection__timeout=0.15)) == 0
    assert labels(workdir) == [wanted(text) for text in TEXTS] and server.asked[TEXTS[4]] == 2


@pytest.mark.parametrize("kind", API)
def test_an_error_at_one_text_loses_none_of_the_others(kind, server, workdir, capsys):
    """The error names the text and hides the key; the same command asks for that text alone."""
    server.replies[TEXTS[6]] = [403]
    server.replies[TEXTS[7]] = ["slow"]  # under way when the error comes
    assert nla_label(workdir, *flags(kind, server)) == 1
    said = capsys.readouterr().err
    assert "gives no answer for token 10 of 'doc6'" in said and KEY not in said and "_API_KEY" in said
    before = dict(server.asked)
    assert before == dict.fromkeys(TEXTS, 1)
    assert nla_label(workdir, *flags(kind, server)) == 0
    assert {text: n - before[text] for text, n in server.asked.items() if n > before[text]} == {TEXTS[6]: 1}
    assert labels(workdir) == [wanted(text) for text in TEXTS]
    assert not holds(workdir, KEY)


@pytest.mark.parametrize("kind", ["openai", "batch"])
def test_killed_and_resumed(kind, server, workdir, tmp_path):
    """After SIGKILL the same command asks for no text that was answered; the labels are those of an undisturbed run."""
    if kind == "openai":
        server.replies |= {text: ["slow"] for text in TEXTS}
        more = {"label__concurrency": 2}
        amid = lambda: len([file for file in (workdir / "labels/cache").glob("*") if file.read_text().count("\n") > 3])
    else:
        server.looks = 10**6
        more = {"label__concurrency": 1}
        amid = lambda: len(list((workdir / "labels/work").glob("*.json")))
    given = flags(kind, server, **more)
    command = [sys.executable, "-m", "nla_jax.cli", "label", "--config", CONFIG, "--workdir", str(workdir), *given]
    process = subprocess.Popen(command, env=os.environ | {"JAX_PLATFORMS": "cpu"}, stderr=subprocess.PIPE)
    try:
        while not amid():
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    asked = dict(server.asked)
    server.looks = 0
    kept = Cache(workdir / "labels/cache").answers
    assert nla_label(workdir, *given) == 0
    assert labels(workdir) == [wanted(text) for text in TEXTS]
    if kind == "openai":
        assert 4 <= len(kept) < len(TEXTS) and len(set(kept.values())) == len(kept)
        again = {text for text in TEXTS if server.asked[text] > 1}
        assert len(again) <= 2  # those that were under way
        assert again.isdisjoint(text for text in TEXTS if wanted(text) in kept.values())
    else:
        assert asked == dict.fromkeys(TEXTS[:3], 1) and not kept
        assert server.asked == dict.fromkeys(TEXTS, 1) and list(server.batches) == ["msgbatch_0", "msgbatch_1"]


def test_results_of_a_batch(server, workdir, capsys):
    """Expired and faulty requests are handed in again, refused, cut and invalid ones are not."""
    server.results |= {
        TEXTS[0]: ["expired", "ok"],
        TEXTS[1]: ["faulty", "faulty", "ok"],
        TEXTS[3]: ["refused"],
        TEXTS[4]: ["cut"],
        TEXTS[5]: ["invalid"],
    }
    assert nla_label(workdir, *flags("batch", server)) == 0
    expected = [wanted(text) for text in TEXTS]
    assert labels(workdir) == [*expected[:3], None, None, None, *expected[6:]]
    assert [server.asked[text] for text in TEXTS] == [2, 3, 1, 1, 1, 1, 1, 1]
    assert max(server.answered.values()) == 1


def test_a_text_is_handed_in_as_often_as_allowed(server, workdir, capsys):
    server.results[TEXTS[4]] = ["faulty", "expired"]
    once = {"label__connection__retries": 0, "label__concurrency": 1}
    assert nla_label(workdir, *flags("batch", server, **once)) == 1
    assert "1 texts have no answer after 1 batches; the same command" in capsys.readouterr().err
    assert nla_label(workdir, *flags("batch", server, **once)) == 1
    assert nla_label(workdir, *flags("batch", server, **once)) == 0
    assert labels(workdir) == [wanted(text) for text in TEXTS]
    assert server.asked == dict.fromkeys(TEXTS, 1) | {TEXTS[4]: 3} and max(server.answered.values()) == 1


def test_a_batch_that_was_canceled_stops_the_run(server, workdir, capsys):
    """What it answered before is not asked again by the next run."""
    server.results[TEXTS[1]] = ["canceled"]
    assert nla_label(workdir, *flags("batch", server, label__concurrency=1)) == 1
    assert "The batch msgbatch_0 was canceled; the same command hands in" in capsys.readouterr().err
    assert nla_label(workdir, *flags("batch", server, label__concurrency=1)) == 0
    assert labels(workdir) == [wanted(text) for text in TEXTS]
    assert [server.asked[text] for text in TEXTS] == [1, 2, 1, 1, 1, 1, 1, 1]


def test_a_batch_that_is_gone_is_handed_in_again(server, workdir):
    (workdir / "labels/work").mkdir(parents=True)
    labeller = make_labeller(LABELLERS["batch"], {"model": "m"}, {"base_url": server.url, "poll": 0.01})
    labeller.work_in(workdir / "labels/work")
    rows = [LabelRow(TEXTS[0], "north", 7, "", "doc")]
    assert labeller.label(rows) == [wanted(TEXTS[0])]
    server.batches.clear()
    assert labeller.label(rows) == [wanted(TEXTS[0])] and server.asked[TEXTS[0]] == 2


def test_a_wrong_model_is_noticed_after_twenty_texts(server, tmp_path):
    run = Run(load_config(CONFIG, flags("openai", server, label__max_dropped=0.9)), tmp_path / "run", STAGES)
    texts = [f"Text {i}" for i in range(200)]
    with run.stage("extract"):
        write_table(table(texts, 0), run.workdir / "activations/av_sft-00000-of-00001.parquet")
    server.replies |= {text: [400] for text in texts}
    with pytest.raises(InputError, match=r"of 200 texts have no label \(the last one: rejected: .*max_dropped = 0.9"):
        label(run)
    assert 20 <= sum(server.asked.values()) <= 40


def test_too_many_without_a_label(server, workdir, capsys):
    """The answers are kept: a larger `label.max_dropped` needs no request."""
    server.replies |= {text: ["refused"] for text in TEXTS[:3]}
    assert nla_label(workdir, *flags("openai", server, label__max_dropped=0.25)) == 1
    said = capsys.readouterr().err
    assert "3 of 8 texts have no label (the last one: refused: I cannot help with that.)" in said
    assert nla_label(workdir, *flags("openai", server, label__max_dropped=0.5)) == 0
    assert server.asked == dict.fromkeys(TEXTS, 1)


def test_a_text_that_two_documents_begin_with_is_asked_for_once(server, tmp_path):
    run = Run(load_config(CONFIG, []), tmp_path / "run", STAGES)
    with run.stage("extract"):
        for i in range(2):
            write_table(
                table([TEXTS[0], TEXTS[i], TEXTS[0]], 3 * i),
                run.workdir / f"activations/av_sft-0000{i}-of-00002.parquet",
            )
    assert nla_label(run.workdir, *flags("openai", server)) == 0
    assert server.asked == {TEXTS[0]: 1, TEXTS[1]: 1}
    assert labels(run.workdir) == [wanted(TEXTS[i]) for i in (0, 0, 0, 0, 1, 0)]


def test_a_dry_run_asks_nobody(server, workdir, monkeypatch, capsys):
    """It needs no key; without the subject's tokenizer it counts characters."""
    monkeypatch.delenv("OPENAI_API_KEY")
    prices = {"label__price_in": 2.0, "label__price_out": 10.0, "label__settings__max_tokens": 100}
    before = sorted(workdir.rglob("*"))
    assert nla_label(workdir, "--dry-run", *flags("openai", server, **prices)) == 0
    lines = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines())
    sent = sum(
        len(INSTRUCTION.replace("{token}", repr(text.rpartition(" ")[2])).replace("{text}", text)) for text in TEXTS
    )
    assert lines["texts"].startswith("8 to ask for, of 8 rows")
    assert lines["tokens"] == f"about {round(sent / 4):,} sent, and at most 800 in the answers (4 characters a token)"
    assert lines["price"].startswith(f"at most {(round(sent / 4) * 2 + 800 * 10) / 1e6:,.2f}")
    assert not server.asked and [file for file in sorted(workdir.rglob("*")) if file.name != "lock"] == before
    assert nla_label(workdir, "--dry-run", "--config.label.splits=av_sft") == 0
    assert "price      not known: this labeller" in capsys.readouterr().out


WRONG = {
    "no key": ("openai", {}, "OPENAI_API_KEY", "set OPENAI_API_KEY in the environment"),
    "no key of Anthropic": ("anthropic", {}, "ANTHROPIC_API_KEY", "set ANTHROPIC_API_KEY in the environment"),
    "a key in the config": ("openai", {"api_key": "sk-x"}, "", "unexpected keyword argument 'api_key'"),
    "a password": ("openai", {"base_url": "http://me:secret@host/v1"}, "", "without user or password"),
    "no model": ("openai", {"model": " "}, "", "name the model that writes the labels"),
    "an instruction without text": ("anthropic", {"instruction": "Explain."}, "", "must hold {text} once"),
    "no tokens": ("anthropic", {"max_tokens": 0}, "", "label.settings.max_tokens of 1 or more"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_settings_are_one_sentence(case, monkeypatch):
    kind, settings, variable, words = WRONG[case]
    for name in ("OPENAI_API_KEY", "ANTHROPIC_API_KEY"):
        monkeypatch.setenv(name, KEY)
    if variable:
        monkeypatch.delenv(variable)
    with pytest.raises(InputError) as error:
        make_labeller(LABELLERS[kind], {"model": "m"} | settings).ready()
    one_sentence(error)
    assert words in str(error.value) and "secret" not in str(error.value)


def test_a_server_of_ones_own_needs_no_key(server, monkeypatch):
    for name in ("OPENAI_API_KEY", "ANTHROPIC_API_KEY"):
        monkeypatch.delenv(name)
    bases = {"openai": f"{server.url}/v1", "anthropic": server.url, "batch": server.url}
    for kind, base in bases.items():  # without a folder, as in `nla check`, no batch is handed in
        labeller = make_labeller(LABELLERS[kind], {"model": "m"}, {"base_url": base})
        assert labeller.label([LabelRow(TEXTS[0], "north", 7, "", "doc")]) == [wanted(TEXTS[0])]
    assert not server.batches


# Labels made elsewhere


def entries(names=("doc_id", "position", "label")):
    return [dict(zip(names, (f"doc{i}", 7 + i % 3 if i < 3 else 4 + i, f"Label {i}"))) for i in range(len(TEXTS))]


@pytest.mark.parametrize("form", ["jsonl", "parquet", "reference"])
def test_labels_of_a_file(form, workdir, tmp_path):
    rows = entries()
    if form == "jsonl":
        path = tmp_path / "labels.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in reversed(rows)))
    else:
        path = tmp_path / "labels.parquet"
        if form == "reference":
            rows = [
                {"doc_id": r["doc_id"], "n_raw_tokens": r["position"] + 1, "api_explanation": r["label"]} for r in rows
            ]
        pq.write_table(pa.Table.from_pylist(rows), path)
    assert nla_label(workdir, *flags("file", label__settings__path=path)) == 0
    assert labels(workdir) == [f"Label {i}" for i in range(len(TEXTS))]


WRONG_FILES = {
    "duplicates": (lambda rows: [*rows, rows[4] | {"label": "other"}], "has two labels for token 8 of 'doc4' .*row 9"),
    "no position": (lambda rows: [{"doc_id": "doc0", "label": "x"}], "Row 1 of .* has no position"),
    "no label": (lambda rows: [{"doc_id": "doc0", "position": 3}], "Row 1 of .* has no label"),
    "position is text": (lambda rows: [rows[0] | {"position": "7"}], "position '7'.*a whole number"),
    "rows that have none": (lambda rows: rows[:4], "of 8 texts have no label .*not in the file: token 8 of 'doc4'"),
    "no JSON": (lambda rows: ["{"], "Line 1 of .* is no JSON object"),
}


@pytest.mark.parametrize("case", WRONG_FILES)
def test_a_file_that_does_not_do(case, workdir, tmp_path, capsys):
    make, words = WRONG_FILES[case]
    path = tmp_path / "labels.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in make(entries())))
    assert nla_label(workdir, *flags("file", label__settings__path=path, label__max_dropped=0.1, label__batch=1)) == 1
    assert re.search(words, capsys.readouterr().err)


def test_a_changed_file_is_read_again(workdir, tmp_path):
    """The cache knows the file by its content."""
    path = tmp_path / "labels.jsonl"
    rows = [LabelRow("", "", 7, "", "doc0")]
    keys = []
    for text in ("One", "Two"):
        path.write_text(json.dumps({"doc_id": "doc0", "position": 7, "label": text}) + "\n")
        labeller = make_labeller(LABELLERS["file"], {"path": str(path)})
        keys.append(labeller.key(rows[0]))
        assert labeller.label(rows) == [text]
    assert keys[0] != keys[1]


# The parts


@pytest.mark.parametrize("path", [*LABELLERS.values(), "nla_jax.labels.local:Local"])
def test_the_docs_name_every_setting(path):
    docs = (Path(__file__).parent.parent / "docs/labels.md").read_text()
    fields = [field.name for field in dataclasses.fields(resolve(path, "label.labeller").function)]
    assert f"`{path}`" in docs and not [name for name in fields if f"`{name}`" not in docs]


def test_keys_depend_on_what_a_labeller_reads_and_is():
    row = LabelRow("A text", "text", 1, "", "doc")
    make = lambda settings, connection=None: make_labeller(LABELLERS["openai"], settings, connection)
    key = make({"model": "m"}).key(row)
    assert key == make({"model": "m", "max_tokens": 400}, {"base_url": "http://other/v1", "retries": 1}).key(row)
    assert key == make({"model": "m"}).key(LabelRow("A text", "text", 9, "user", "another"))
    others = [make({"model": "n"}).key(row), make({"model": "m", "chars": 3}).key(row)]
    others += [make({"model": "m"}).key(LabelRow("A text ", "text", 1, "", "doc"))]
    assert len({key, *others}) == 4


def test_a_cache_survives_a_line_that_a_kill_cut(tmp_path):
    cache = Cache(tmp_path)
    cache.add({"a": "One", "b": NoLabel("cut"), "c": NoLabel("rejected", "bad", paid=False)})
    cache.close()
    [file] = tmp_path.glob("*.jsonl")
    file.write_text(file.read_text() + '{"key": "d", "lab')
    second = Cache(tmp_path)
    assert second.answers == {"a": "One", "b": NoLabel("cut")}
    second.add({"d": "Four"})
    assert Cache(tmp_path).answers == {"a": "One", "b": NoLabel("cut"), "d": "Four"}


@pytest.mark.parametrize("at_once", [1, 3])
def test_calls_begin_when_the_results_before_are_used(at_once):
    begun, used = [], []

    def tasks():
        for i in range(9):
            assert len(begun) - len(used) <= at_once
            begun.append(i)
            yield i

    for task, result in as_done(lambda i: i * i, tasks(), at_once):
        assert result == task * task
        used.append(task)
    assert sorted(used) == list(range(9))


def test_calls_under_way_are_used_when_another_fails():
    def call(i):
        if i == 0:
            raise ValueError("zero")
        time.sleep(0.05)
        return i

    used = []
    with pytest.raises(ValueError, match="zero"):
        used.extend(task for task, _ in as_done(call, iter(range(9)), 3))
    assert sorted(used) == [1, 2]
