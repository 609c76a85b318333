"""`nla report` at any time: of a finished run, with another title; amid training; before anything."""

import html
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from conftest import copy_before, nla_main, one_line

from nla_jax.cli import main
from nla_jax.runtime.metrics import read_metrics
from nla_jax.verbs.stages import print_headline

HOLDER = (
    "import fcntl, sys; file = open(sys.argv[1], 'a'); fcntl.flock(file, fcntl.LOCK_EX); print(1, flush=True); input()"
)


@pytest.fixture
def workdir(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "a run")


def draw(workdir, *flags) -> str:
    """The page that `nla report --workdir` draws, and no other flag: it knows the settings of the run."""
    assert main(["report", "--workdir", str(workdir), *flags]) == 0
    return html.unescape((workdir / "report.html").read_text(encoding="utf-8"))


def test_the_last_line_names_the_controls_that_were_measured(tmp_path, capsys):
    figures = {"fve_rl": 0.5, "fve_rl_ci95": [0.45, 0.55], "fve_warm": 0.3}
    for controls, end in (({}, "0.300 before.\n"), ({"fve_shuffled": -0.9}, "0.300 before; shuffled -0.900.\n")):
        (tmp_path / "summary.json").write_text(json.dumps(figures | controls))
        print_headline(tmp_path, [])
        assert capsys.readouterr().out.partition("Report:")[0].endswith(end)


def test_a_finished_run_is_drawn_again(workdir, corpus, capsys):
    kept = json.loads((workdir / "summary.json").read_text())
    page = draw(workdir, "--config.report.title=Under another name")
    assert "<h1>Under another name</h1>" in page
    assert "Held-out FVE" in capsys.readouterr().out
    assert json.loads((workdir / "summary.json").read_text()) == kept
    documents = json.loads((workdir / "evaluation.json").read_text())["documents"]
    assert page.count('role="option"') == sum(len(document["rows"]) for document in documents) > 0
    assert f"nla serve --pair '{workdir}/pair' --open" in page
    assert f"nla serve --pair '{workdir}/pair_warm' --pair '{workdir}/pair' --open" in page
    assert draw(workdir).count("Under another name") == 2 + 1  # title, headline, settings: recorded as the run's
    (workdir / "report.html").write_text("damaged")
    assert "<h1>" in draw(workdir)  # which `nla quickstart` would refuse
    (workdir / "report.html").unlink()
    assert nla_main("quickstart", workdir, corpus, "--config.report.title=Under another name") == 0
    assert capsys.readouterr().err.count("report: done") == 1


def test_every_document_that_is_shown_was_evaluated(finished):
    evaluated = json.loads((finished / "evaluation.json").read_text())
    assert 0 < len(evaluated["documents"]) <= len(evaluated["examples"])
    scores = {(row["rl"], row["fve_rl"]) for document in evaluated["documents"] for row in document["rows"]}
    for row in evaluated["examples"]:
        shown = next((d for d in evaluated["documents"] if d["document"] == row["document"]), None)
        assert shown is None or (
            (row["rl"], row["fve_rl"]) in scores and row["context"] + row["token"] in shown["text"]
        )


def test_the_first_document_is_whole(finished):
    evaluated = json.loads((finished / "evaluation.json").read_text())
    whole, *others = evaluated["documents"]
    table = pq.read_table(finished / "evaluation/whole_document.parquet").to_pydict()
    place = {row["place"]: row for row in whole["rows"]}
    assert len(place) > 4 >= max(len(document["rows"]) for document in others)  # of which four at most were evaluated
    assert set(table["doc_id"]) == {whole["document"]} and place.keys() <= set(table["n_raw_tokens"])
    for n, text, fve in zip(table["n_raw_tokens"], table["rl"], table["fve_rl"]):
        assert n not in place or (place[n]["rl"], place[n]["fve_rl"]) == (text, pytest.approx(fve, abs=1e-4))
    page = html.unescape((finished / "report.html").read_text(encoding="utf-8"))
    assert evaluated["whole"] in page and whole["note"] in page


def test_amid_training_another_process_holds_the_folder(finished, tmp_path, capsys):
    workdir = copy_before(finished, tmp_path, "evaluate")
    record = json.loads((workdir / "stages/rl.json").read_text())
    del record["result"], record["checksum"]  # as it stands while RL runs
    (workdir / "stages/rl.json").write_text(json.dumps(record))
    for name, half in (("metrics.jsonl", '{"step": 3, "rew'), ("metrics.jsonl.crc32", "")):  # a line is being written
        file = workdir / "train/rl" / name
        file.write_text("".join(file.read_text().splitlines(keepends=True)[:2]) + half)
    for made in ("summary.json", "report.html", "evaluation.json"):
        (workdir / made).unlink(missing_ok=True)
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, workdir / "lock"], stdin=-1, stdout=-1)
    holder.stdout.readline()
    try:
        page = draw(workdir)
    finally:
        holder.communicate(b"\n")
    assert "the stage rl has begun, of which 2 of 4 steps are recorded" in page
    assert "Nothing was measured yet" in page and "<h3>Reward</h3>" in page and "<h3>AV, warm start</h3>" in page
    assert f"nla serve --pair {workdir}/pair_warm --open" in page and f"{workdir}/pair " not in page
    assert "The run is not evaluated yet. Report: " in capsys.readouterr().out
    assert not (workdir / "summary.json").exists() and not (workdir / "stages/report.json").exists()
    assert re.search(r'<th scope="row">rl</th>.*?<td>\d{4}-', page)


def test_metrics_are_read_while_they_are_written(finished, tmp_path, monkeypatch):
    """Before each look into a file another step is complete."""
    names = ("metrics.jsonl", "metrics.jsonl.crc32")
    lines = {name: (finished / "train/rl" / name).read_bytes().splitlines(keepends=True) for name in names}
    read, seen = Path.read_bytes, []

    def read_after_a_step(file):
        seen.append(file)
        for name in names:
            (tmp_path / name).write_bytes(b"".join(lines[name][: 1 + len(seen)]))
        return read(file)

    for name in names:
        (tmp_path / name).write_bytes(lines[name][0])
    monkeypatch.setattr(Path, "read_bytes", read_after_a_step)
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    assert len(seen) == 2


def test_before_training_and_with_other_settings(finished, corpus, tmp_path, capsys):
    workdir = copy_before(finished, tmp_path, "sft")
    page = draw(workdir)
    assert "the stage sft comes next" in page and "There is no pair yet" in page
    assert nla_main("report", workdir, corpus, "--config.label.batch=7", "--config.seed=5") == 1
    assert "made with other settings" in one_line(capsys)
    (empty := tmp_path / "empty").mkdir()
    assert main(["report", "--workdir", str(empty)]) == 1
    assert "holds no run" in one_line(capsys) and list(empty.iterdir()) == []
