"""`nla explain`: texts, files, chats and vectors in; rows on the screen, as JSON lines or Parquet out."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
import weakref
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from conftest import SENTENCES, TINY, close, one_line
from safetensors.numpy import load_file, save_file

from nla_jax.cli import main
from nla_jax.data.chats import chat_tokens
from nla_jax.io.folders import load_tokenizer
from nla_jax.io.hub import fingerprint
from nla_jax.io.pairs import find_base
from nla_jax.pair import Pair, load_pair
from nla_jax.sidecar import FILE
from nla_jax.subject import SHIPPED, extract, load_subject
from nla_jax.tools import explain as tools

TEXT = "The river turns north at the mill."
CHAT = [
    {"role": "user", "content": " What is bread? "},
    {"role": "assistant", "content": "It is in the market."},
    {"role": "user", "content": "And fish?"},
]


@pytest.fixture(scope="module")
def place(pair, subject_folder, tmp_path_factory):
    """A folder with a pair, and its subject beside it."""
    folder = tmp_path_factory.mktemp("explain")
    pair.save(folder / "pair")
    shutil.copytree(subject_folder, folder / "subject")
    for role in ("av", "ar"):
        file = folder / "pair" / role / FILE
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
        content["base_checkpoint"] = "no/where/subject"
        content["provenance"] = {"base_hash": fingerprint(subject_folder), "activation_variance": 0.7}
        file.write_text(yaml.safe_dump(content, allow_unicode=True), encoding="utf-8")
    return folder


@pytest.fixture
def explain(place, capsys):
    """Runs the verb, and returns the JSON rows and what was said on standard error."""

    def run(*arguments, status=0, json_rows=True):
        command = ["explain", "--pair", str(place / "pair"), "--max-new-tokens", "16", *map(str, arguments)]
        assert main([*command, *["--json"] * json_rows]) == status
        out, err = capsys.readouterr()
        return ([json.loads(line) for line in out.splitlines()] if json_rows else out), err

    return run


def test_every_token_of_a_text(explain, place):
    rows, _ = explain("--text", TEXT, "--tokens", "all")
    assert "".join(row["token"] for row in rows) == TEXT
    pair, subject = load_pair(place / "pair"), load_subject(place / "subject", 1)
    acts = extract(subject, [TEXT], "all")
    texts = pair.verbalize(acts.vectors, 16, 0.0)
    assert [row["explanation"] for row in rows] == texts and any(texts)
    scores = pair.score(texts, acts.vectors)
    for i, row in enumerate(rows):
        if row["explanation"]:
            assert row["cosine"] == pytest.approx(scores["cosine"][i], abs=1e-5)
            assert row["fve"] == pytest.approx(1 - scores["mse"][i] / 0.7, abs=1e-4)
    of_tokens = pair.score([row["token"].strip() for row in rows], acts.vectors)["mse"]
    np.testing.assert_allclose([row["fve_token"] for row in rows], 1 - of_tokens / 0.7, atol=1e-4)
    again, _ = explain("--text", TEXT, "--tokens", "all", "--batch", 3)
    assert [row["explanation"] for row in again] == texts


def test_the_best_of_several_is_the_one_that_the_reconstructor_reads_best(explain, place):
    """A greedy one among them: no row gets worse. One that says nothing is never chosen for its score."""
    greedy, best = (explain("--text", TEXT, "--tokens", "all", "--best-of", n)[0] for n in (1, 4))
    pair, subject = load_pair(place / "pair"), load_subject(place / "subject", 1)
    vectors = extract(subject, [TEXT], "all").vectors
    seeds = [int(np.random.SeedSequence([0, i]).generate_state(1)[0]) for i in (1, 2, 3)]
    tried = [[row["explanation"] for row in greedy], *(pair.verbalize(vectors, 16, 1.0, seed) for seed in seeds)]
    assert len({text for texts in tried for text in texts}) > len(greedy)
    for i, row in enumerate(best):
        scores = {texts[i]: pair.score([texts[i]], vectors[[i]])["cosine"][0] for texts in tried if texts[i]}
        assert row["explanation"] == max(scores, key=scores.get, default="")
        assert not scores or row["cosine"] == pytest.approx(max(scores.values()), abs=1e-5)
    again, _ = explain("--text", TEXT, "--tokens", "all", "--best-of", 4, "--batch", 3)
    assert [row["explanation"] for row in again] == [row["explanation"] for row in best]


def test_there_is_no_score_without_a_text(explain):
    rows, said = explain("--text", TEXT, "--tokens", "all", "--max-new-tokens", 1)
    assert rows and all(row["explanation"] == "" and row["cosine"] is None and row["fve"] is None for row in rows)
    assert f"{len(rows)} of {len(rows)} responses hold no explanation" in said
    shown, _ = explain("--text", TEXT, "--max-new-tokens", 1, json_rows=False)
    assert "(no explanation)" in shown and "FVE" not in shown


def test_a_score_is_shown_beside_that_of_the_token_alone(explain):
    (row,), _ = explain("--text", TEXT)
    shown, _ = explain("--text", TEXT, json_rows=False)
    assert f"FVE {row['fve']:.2f} (its token alone: {row['fve_token']:.2f})" in shown


def test_cut_texts_are_kept_marked_and_counted(explain):
    rows, said = explain("--text", TEXT, "--tokens", "all", "--max-new-tokens", 4)
    cut = [row for row in rows if row["cut"]]
    assert cut and any(row["explanation"] and row["cosine"] is not None for row in cut)
    assert f"{len(cut)} of {len(rows)} explanations were cut at 4 tokens (--max-new-tokens)" in said
    shown, _ = explain("--text", TEXT, "--tokens", "all", "--max-new-tokens", 4, json_rows=False)
    assert "…  (cut)" in shown


@pytest.mark.parametrize(
    "content", [TEXT + "\n", TEXT + "\r\n", TEXT, "\ufeff" + TEXT + "\n"], ids=["lf", "crlf", "none", "bom"]
)
def test_the_line_break_at_a_files_end_is_no_token(explain, tmp_path, monkeypatch, content):
    (expected,), _ = explain("--text", TEXT)
    (tmp_path / "a.txt").write_bytes(content.encode())
    (row,), _ = explain("--file", tmp_path / "a.txt")
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: False, buffer=io.BytesIO(content.encode())))
    (piped,), _ = explain()
    without_name = lambda row: {name: value for name, value in row.items() if name != "document"}
    assert without_name(row) == without_name(expected) == without_name(piped)


def test_files_and_arguments_are_read_alike(explain, tmp_path):
    text = "one\r\ntwo \n\n three"
    (tmp_path / "a.txt").write_bytes(text.encode())
    (tmp_path / "b.txt").write_bytes(b"another")
    rows, _ = explain("--file", tmp_path / "a.txt", tmp_path / "b.txt", "--tokens", "all")
    by_file = {
        name: "".join(row["token"] for row in rows if row["document"] == str(tmp_path / name))
        for name in ("a.txt", "b.txt")
    }
    assert by_file == {"a.txt": text, "b.txt": "another"}
    alone, _ = explain("--text", text, "--tokens", "all")
    assert [row["token"] for row in alone] == [row["token"] for row in rows][: len(alone)]


def test_a_terminal_is_told_that_it_is_read(explain, monkeypatch):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True, buffer=io.BytesIO(TEXT.encode())))
    assert "reading the text from the terminal" in explain()[1]


def test_standard_input_that_is_no_text_is_one_sentence(place, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: False, buffer=io.BytesIO(b"\xff\xfe")))
    assert main(["explain", "--pair", str(place / "pair")]) == 1
    assert "Standard input cannot be read as text" in one_line(capsys)


# Chats


def test_only_what_is_said_in_a_chat_is_explained(explain, tmp_path, tokenizer):
    (tmp_path / "chat.json").write_text(json.dumps({"messages": CHAT, "id": "bread"}))
    rows, _ = explain("--chat", tmp_path / "chat.json", "--tokens", "all")
    said = lambda role: "".join(row["token"] for row in rows if row["role"] == role)
    assert said("user").split() == ["What", "is", "bread?And", "fish?"] and said("assistant") == CHAT[1]["content"]
    assert {row["document"] for row in rows} == {"bread"} and not any("<|" in row["token"] for row in rows)
    (last,), _ = explain("--chat", tmp_path / "chat.json")
    assert (last["token"], last["role"]) == (rows[-1]["token"], "user")
    ids, roles = chat_tokens(tokenizer, CHAT)
    assert ids.count(tokenizer.bos_token_id) == 1 and len(ids) == len(roles)
    by_index, _ = explain("--chat", tmp_path / "chat.json", "--tokens", rows[3]["position"])
    assert by_index[0]["token"] == rows[3]["token"]


def test_many_chats(explain, tmp_path):
    (tmp_path / "chats.jsonl").write_text("\n".join(json.dumps({"messages": CHAT[: i + 1]}) for i in range(3)) + "\n")
    rows, _ = explain("--chat", tmp_path / "chats.jsonl")
    assert [row["document"] for row in rows] == ["chats.jsonl#1", "chats.jsonl#2", "chats.jsonl#3"]
    assert [row["role"] for row in rows] == ["user", "assistant", "user"]


# Vectors


@pytest.mark.parametrize("kind", ["npy", "safetensors"])
def test_vectors_of_a_file(explain, place, vectors, tmp_path, kind):
    """Directions that no text gave: SAE decoder rows, steering vectors, differences."""
    file = tmp_path / f"x.{kind}"
    if kind == "npy":
        np.save(file, vectors.astype(np.float64))
    else:
        save_file({"a": vectors[:3], "b": vectors[3]}, file)
    rows, _ = explain("--vectors", file)
    assert [row["explanation"] for row in rows] == load_pair(place / "pair").verbalize(vectors, 16, 0.0)
    assert [row["document"] for row in rows] == (["x.npy"] * 4 if kind == "npy" else ["a"] * 3 + ["b"])
    if kind == "safetensors":
        assert len(explain("--vectors", f"{file}:b")[0]) == 1


# Out


def test_rows_in_files(explain, tmp_path):
    rows, _ = explain("--text", TEXT, "--tokens", "all")
    for name in ("rows.jsonl", "rows.parquet"):
        out, _ = explain("--text", TEXT, "--tokens", "all", "--batch", 4, "--out", tmp_path / name)
        assert out == []
    lines = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    table = pq.read_table(tmp_path / "rows.parquet").to_pylist()
    assert [list(row) for row in lines] == [list(row) for row in table] == [list(row) for row in rows]
    for a, b, c in zip(rows, lines, table):
        assert a["explanation"] == b["explanation"] == c["explanation"]
        close({"c": a["cosine"] or 0.0}, {"c": c["cosine"] or 0.0}, 1e-4)
        close({"c": a["cosine"] or 0.0}, {"c": b["cosine"] or 0.0}, 1e-4)
    assert not list(tmp_path.glob("*.incomplete"))


def test_the_subject_is_gone_when_the_last_texts_are_written(explain, tmp_path, monkeypatch):
    subject_of, write, subjects, there = tools.subject_of, Pair.explain, [], []

    def reading(*arguments):
        subject = subject_of(*arguments)
        subjects.append(weakref.ref(subject))
        return subject

    def writing(*arguments, **options):
        there.append(subjects[0]() is not None)
        return write(*arguments, **options)

    monkeypatch.setattr(tools, "subject_of", reading)
    monkeypatch.setattr(Pair, "explain", writing)
    monkeypatch.setattr(tools, "ROWS", 1)
    files = [tmp_path / f"{i}.txt" for i in range(3)]
    for file, text in zip(files, SENTENCES):
        file.write_text(text)
    rows, _ = explain("--file", *files)
    assert [row["document"] for row in rows] == [str(file) for file in files] and there == [True, True, False]


def test_a_closed_pipe_is_no_error(place):
    command = [sys.executable, "-m", "nla_jax.cli", "explain", "--pair", str(place / "pair"), "--text", TEXT, "--json"]
    command += ["--tokens", "all", "--max-new-tokens", "4", "--batch", "2"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | {"XLA_FLAGS": ""}
    ) as process:
        process.stdout.readline()
        process.stdout.close()
        said = process.stderr.read().decode()
    assert process.returncode == 0 and "Broken pipe" not in said, said


def test_only_what_is_used_is_imported(place):
    """torch, which transformers imports where it finds it, takes seconds."""
    command = [sys.executable, "-X", "importtime", "-m", "nla_jax.cli", "explain", "--pair", str(place / "pair")]
    done = subprocess.run(
        [*command, "--text", TEXT, "--json", "--max-new-tokens", "4"],
        capture_output=True,
        text=True,
        env=os.environ | {"XLA_FLAGS": ""},
    )
    assert done.returncode == 0 and json.loads(done.stdout)["token"] == "."
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time")}
    assert "transformers" in imported and not imported & {"torch", "tensorboardX", "optax", "orbax", "tensorflow"}
    assert not [line for line in done.stderr.splitlines() if not line.startswith(("import time", "note:"))]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_dtype_of_all_three_models(explain, monkeypatch, dtype):
    import nla_jax.tools.explain as module

    seen, load = [], module.load_subject
    monkeypatch.setattr(module, "load_subject", lambda *a, **k: seen.append(load(*a, **k)) or seen[-1])
    rows, _ = explain("--text", TEXT, "--dtype", dtype)
    assert len(rows) == 1 and seen[0].params["embedding"].dtype == dtype


# Refused


WRONG = {
    "no such file": (["--file", "nowhere.txt"], "nowhere.txt cannot be read as text"),
    "not text": (["--file", "{bytes}"], "cannot be read as text"),
    "empty": (["--file", "{empty}"], "There is no text in"),
    "long": (["--text", "mill " * 200, "--max-tokens", "50"], "more than max_tokens = 50"),
    "long chat": (["--chat", "{chat}", "--max-tokens", "5"], "more than max_tokens = 5"),
    "template token": (
        ["--chat", "{chat}", "--tokens", "0"],
        "Position 0 of the chat .* none at which somebody speaks",
    ),
    "no chat": (["--chat", "{bytes}"], "cannot be read as text"),
    "other json": (["--chat", "{json}"], "expected messages with a role and a content"),
    "tokens": (["--text", "x", "--tokens", "most"], "--tokens must be last, all, or indices"),
    "batch": (["--text", "x", "--batch", "0"], "--batch of 1 or more"),
    "dtype": (["--text", "x", "--dtype", "int8"], "held as floating point numbers"),
    "seed": (["--text", "x", "--seed", "99999999999999999999"], "seed from 0 to"),
    "temperature": (["--text", "x", "--temperature", "nan"], "a temperature of 0 or more"),
    "empty text": (["--text", " "], "no text to explain in --text ' '; give one with words"),
    "vectors of another width": (["--vectors", "{narrow}"], r"has shape \[2, 3\], expected \[n, 32\]"),
    "pickled vectors": (["--vectors", "{pickled}"], "is missing or is no array of numbers"),
    "vectors of another kind": (["--vectors", "{bytes}"], "read from .npy and .safetensors"),
    "no such tensor": (["--vectors", "{tensors}:zz"], "holds no tensor 'zz'; it holds a"),
    "out format": (["--text", "x", "--out", "{new}.csv"], "must end in .jsonl or .parquet"),
    "out taken": (["--text", "x", "--out", "{taken}"], "exists; give --out another name"),
}


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--max-new-tokens", "0"], "--max-new-tokens of 1 or more"),
        (["--max-new-tokens", "3000000000"], "--max-new-tokens is more than 1073741824"),
        (["--max-tokens", "-1"], "--max-tokens of 1 or more"),
        (["--batch", "0"], "--batch of 1 or more"),
        (["--temperature", "-1"], "a temperature of 0 or more"),
        (["--seed", "-1"], "seed from 0 to"),
        (["--text", ""], "in --text ''; give one"),
        (["--vectors", "nowhere.npy"], "nowhere.npy is missing"),
        (["--vectors", "nowhere.safetensors"], "nowhere.safetensors is missing"),
    ],
)
def test_flags_are_checked_before_a_pair_is_read(tmp_path, capsys, flags, told):
    """There is no pair: who looks for it first would say that."""
    text = [] if {"--text", "--vectors"} & set(flags) else ["--text", "x"]
    assert main(["explain", "--pair", str(tmp_path / "nowhere"), *text, *flags]) == 1
    assert told in one_line(capsys)


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_gets_one_sentence(case, place, tmp_path, capsys):
    files = {name: tmp_path / name for name in ("bytes", "empty", "chat", "json", "new")}
    files["bytes"].write_bytes(b"\xff\xfe\x00")
    files["empty"].write_bytes(b" \n")
    files["chat"].write_text(json.dumps(CHAT))
    files["json"].write_text('{"a": 1}')
    files |= {name: tmp_path / f"{name}.npy" for name in ("narrow", "pickled")}
    np.save(files["narrow"], np.ones((2, 3)))
    np.save(files["pickled"], np.array([{"a": 1}]), allow_pickle=True)
    files["tensors"], files["taken"] = tmp_path / "t.safetensors", tmp_path / "taken.jsonl"
    save_file({"a": np.ones((2, TINY.width), np.float32)}, files["tensors"])
    files["taken"].write_text("precious")
    arguments, message = WRONG[case]
    command = ["explain", "--pair", str(place / "pair"), *[a.format(**files) for a in arguments]]
    assert main(command) == 1
    said = one_line(capsys)
    assert re.search(message, said), said
    assert files["taken"].read_text() == "precious"


@pytest.mark.parametrize("variance", [-1, "x", True, 7.0])
def test_a_variance_that_is_none_is_refused(place, tmp_path, capsys, variance):
    shutil.copytree(place, tmp_path / "copy")
    file = tmp_path / "copy/pair/av" / FILE
    content = yaml.safe_load(file.read_text(encoding="utf-8"))
    content["provenance"]["activation_variance"] = variance
    file.write_text(yaml.safe_dump(content, allow_unicode=True), encoding="utf-8")
    assert main(["explain", "--pair", str(tmp_path / "copy/pair"), "--text", "x"]) == 1
    assert "expected a number between 0 and 1" in one_line(capsys)


def test_the_subject_beside_a_pair_wins_over_another_of_the_recorded_name(place, tmp_path, monkeypatch):
    """A backup has its subject beside it; in the current folder another run has one of the recorded name."""
    shutil.copytree(place, tmp_path / "backup")
    other = tmp_path / "runs/subject"
    shutil.copytree(place / "pair/av", other)
    monkeypatch.chdir(tmp_path)
    right = fingerprint(place / "subject")
    assert find_base("runs/subject", tmp_path / "backup/pair", right) == tmp_path / "backup/subject"
    assert find_base("runs/subject", tmp_path / "backup/pair", fingerprint(other)) == "runs/subject"
    assert find_base("org/name", tmp_path / "elsewhere/pair") == "org/name"


def test_an_attention_sink_is_said(place, tmp_path, capsys, vectors):
    """An activation far longer than those of the pair's training: its explanation is worth little."""
    shutil.copytree(place / "pair", tmp_path / "pair")
    norms = np.linalg.norm(vectors, axis=1)
    for role in ("av", "ar"):
        file = tmp_path / "pair" / role / FILE
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
        content["provenance"]["activation_norm"] = float(np.median(norms))
        file.write_text(yaml.safe_dump(content, allow_unicode=True), encoding="utf-8")
    long = vectors.copy()
    long[2] *= 40 * np.median(norms) / norms[2]
    np.save(tmp_path / "long.npy", long)
    flags = ["--pair", str(tmp_path / "pair"), "--max-new-tokens", "4", "--vectors", str(tmp_path / "long.npy")]
    assert main(["explain", *flags]) == 0
    notes = [line for line in capsys.readouterr().err.splitlines() if "attention sink" in line]
    assert len(notes) == 1 and "(position 2 of long.npy) is 40 times as long" in notes[0]


# The pair that comes with the package


def test_the_shipped_pair_explains_its_subject(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    texts = ["Return the sum of the array elements over a given axis.", "The name of the file that is to be opened, or"]
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.txt").write_text(text)
    assert main(["explain", "--pair", "quickstart", "--file", "0.txt", "1.txt", "--tokens", "all", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    rows = [row for row in rows if row["position"] > 4]
    assert np.mean([row["fve"] for row in rows]) > 0.4
    pair, subject = load_pair("quickstart"), load_subject(SHIPPED, 2)
    acts = extract(subject, texts, "all")
    acts = acts[acts.positions > 4]
    said = [row["explanation"] for row in rows]
    own, others = (pair.score(texts, acts)["cosine"].mean() for texts in (said, said[::-1]))
    assert own == pytest.approx(np.mean([row["cosine"] for row in rows]), abs=1e-3) and own > others + 0.2


# The variance of a pair that records none


def test_calibrated_fve_has_the_variance_of_the_texts(explain, place, tmp_path, subject_folder, capsys):
    files = [tmp_path / f"{i}.txt" for i in range(3)]
    for file, text in zip(files, (" ".join(SENTENCES), " ".join(SENTENCES[::-1]), TEXT * 8)):
        file.write_text(text)
    (row,), _ = explain("--text", TEXT)
    (again,), _ = explain("--text", TEXT, "--calibrate", *files)
    acts = extract(load_subject(subject_folder, 1), [file.read_text() for file in files], "all")
    at = np.linspace(0, len(acts) - 1, min(len(acts), 96)).astype(int)
    norms = np.linalg.norm(acts.vectors[at], axis=1)
    unit = (acts.vectors[at] / norms[:, None])[norms <= 5 * np.median(norms)]
    variance = TINY.width * unit.var(0).mean()
    assert again["fve"] == pytest.approx(1 - 2 * (1 - row["cosine"]) / variance, abs=1e-5)
    assert again["explanation"] == row["explanation"] and again["fve"] != row["fve"]
    pair = place / "pair"
    options = ["--subject", str(place / "subject"), "--calibrate", *map(str, files)]
    command = ["import", "--av", str(pair / "av"), "--ar", str(pair / "ar"), "--out", str(tmp_path / "out"), *options]
    assert main(command) == 0
    made_from = load_pair(tmp_path / "out").sidecar.provenance
    assert made_from["activation_variance"] == pytest.approx(variance, rel=1e-5)
    assert made_from["calibrated_on"] == len(unit)
    capsys.readouterr()
    _, err = explain("--text", TEXT, "--calibrate", files[0], status=1)
    assert "give at least 64" in err


# Two subjects


@pytest.fixture
def another(place, tmp_path):
    """The subject with another vector for the word that "mill" ends with, and who knows it as that."""
    shutil.copytree(place / "subject", tmp_path / "another")
    file = tmp_path / "another/model.safetensors"
    tensors, (token,) = load_file(file), set(load_tokenizer(place / "subject")(TEXT).input_ids[-2:-1])
    tensors["model.embed_tokens.weight"][token] *= -1
    save_file(tensors, file, {"format": "pt"})
    return tmp_path / "another", token


def test_diff_shows_the_tokens_that_moved_most(place, another, capsys, tmp_path):
    folder, token = another
    command = ["diff", "--pair", str(place / "pair"), "--other", str(folder), "--max-new-tokens", "16", "--top", "2"]
    assert main([*command, "--text", TEXT, "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    subjects = [load_subject(name, 1) for name in (place / "subject", folder)]
    one, other = (extract(subject, TEXT, "all") for subject in subjects)
    cosines = (one.vectors * other.vectors).sum(1) / np.prod([np.linalg.norm(x, axis=1) for x in (one, other)], axis=0)
    expected = np.argsort(cosines)[:2]  # before them nothing differs
    assert [row["position"] for row in rows] == one.positions[expected].tolist()
    assert one.token_ids[-1][rows[0]["position"]] == token and rows[0]["cosine"] < 0.9
    np.testing.assert_allclose([row["cosine"] for row in rows], cosines[expected], atol=1e-5)
    pair = load_pair(place / "pair")
    said = [pair.verbalize(acts[expected], 16, 0.0) for acts in (one, other)]
    assert [[row[name] for row in rows] for name in ("explanation", "other")] == said
    assert main([*command, "--text", TEXT, "--out", str(tmp_path / "rows.parquet")]) == 0
    assert pq.read_table(tmp_path / "rows.parquet").to_pylist() == rows
    assert main([*command, "--text", TEXT]) == 0
    assert f"[{rows[0]['position']}] {rows[0]['token']!r}" in capsys.readouterr().out


def test_diff_refuses_subjects_that_do_not_fit(place, another, capsys, tmp_path):
    folder, _ = another
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:5]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    command = ["diff", "--pair", str(place / "pair"), "--other", str(folder), "--text", TEXT]
    assert main(command) == 1
    assert "they must share a tokenizer" in capsys.readouterr().err
    assert main([*command, "--top", "0"]) == 1
    assert "--top of 1 or more" in capsys.readouterr().err
