"""The whole loop on a tiny config, as a user runs it: results, resuming, and what wrong input is answered with."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest
from safetensors.numpy import load_file

import nla_jax as nla
import nla_jax.train
from nla_jax.cli import LOOP, main
from nla_jax.data.dataset import load_rows
from nla_jax.metrics import read_metrics

CONFIG = str(Path(__file__).parent.parent / "configs/quickstart.py") + ":tiny"
TIMES = ("seconds_rollout", "seconds_host", "seconds_train", "samples_per_second")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """Forty real documents: Python's help topics."""
    path = tmp_path_factory.mktemp("corpus") / "topics.jsonl"
    chosen = [(name, text[:1500]) for name, text in sorted(topics.items()) if len(text) > 800][:40]
    path.write_text("".join(json.dumps({"id": name, "text": text}) + "\n" for name, text in chosen))
    return path


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory) -> Path:
    """The working folder of an undisturbed run."""
    workdir = tmp_path_factory.mktemp("run") / "tiny"
    assert nla_main("quickstart", workdir, corpus) == 0
    return workdir


def nla_main(verb: str, workdir: Path, corpus: Path, *overrides: str) -> int:
    return main([verb, "--config", CONFIG, "--workdir", str(workdir), f"--config.corpus.source={corpus}", *overrides])


def copy_before(finished: Path, tmp_path: Path, stage: str) -> Path:
    """A copy of a finished run in which `stage` and all after it never happened."""
    workdir = tmp_path / "copy"
    shutil.copytree(finished, workdir)
    for later in LOOP[LOOP.index(stage) :]:
        (workdir / "stages" / f"{later}.json").unlink()
    made = {"rl": ["train/rl", "pair"], "sft": ["train/sft_av", "train/sft_ar", "train/rl", "pair", "pair_warm"]}
    for folder in made.get(stage, []) + ["activations"] * (stage == "extract"):
        shutil.rmtree(workdir / folder)
    shutil.rmtree(workdir / "evaluation", ignore_errors=True)
    return workdir


def weights(workdir: Path) -> dict:
    """All tensors of a run's trained pair."""
    files = [workdir / "pair" / file for file in ("av/model.safetensors", "ar/model.safetensors", "ar/value_head.safetensors")]
    return {f"{file.parent.name}/{name}": value for file in files for name, value in load_file(file).items()}


def history(workdir: Path) -> list[dict]:
    """The RL metrics without what depends on the clock."""
    return [{k: v for k, v in r.items() if k not in TIMES} for r in read_metrics(workdir / "train/rl/metrics.jsonl")]


def same_run(a: Path, b: Path) -> None:
    assert history(a) == history(b)
    left, right = weights(a), weights(b)
    assert left.keys() == right.keys() and all(np.array_equal(left[name], right[name]) for name in left)


def test_summary_report_and_pair(finished):
    summary = json.loads((finished / "summary.json").read_text())
    for name in (
        "fve_warm fve_rl fve_gold_text fve_shuffled fve_empty fve_no_injection cos_rl extraction_rate mean_length "
        "logprob_gap_max subject_loss bigram_loss heldout_documents heldout_rows"
    ).split():
        assert np.isfinite(summary[name]), name
    assert summary["fve_rl_ci95"][0] <= summary["fve_rl"] <= summary["fve_rl_ci95"][1] <= 1
    assert summary["logprob_gap_max"] < 1e-4
    assert set(summary["seconds_by_stage"]) == set(LOOP) - {"report"}
    page = (finished / "report.html").read_text()
    rows = load_rows(finished, "heldout")
    assert any(f"{id}" in page for id in rows.doc_ids)
    assert "http://" not in page.replace("http://www.w3.org", "") and "src=" not in page
    assert [r["step"] for r in history(finished)] == [1, 2, 3, 4]
    assert not list(finished.rglob("*.incomplete"))


def test_bfloat16_with_rematerialisation(corpus, tmp_path):
    """The precision of accelerators: bfloat16 compute over float32 parameters, activations recomputed."""
    flags = ["--config.compute.dtype=bfloat16", "--config.compute.remat=nothing_saveable"]
    assert nla_main("quickstart", tmp_path / "run", corpus, *flags) == 0
    steps = history(tmp_path / "run")
    assert all(np.isfinite(r["fve"]) and not r["skipped"] and r["logprob_gap_max"] < 0.1 for r in steps)
    assert all(value.dtype == np.float32 for value in weights(tmp_path / "run").values())


def test_splits_share_no_document(finished):
    documents = [set(load_rows(finished, split, labelled=False).doc_ids) for split in ("av_sft", "ar_sft", "rl", "heldout")]
    assert sum(map(len, documents)) == len(set.union(*documents)) > 20


def test_python_interface(finished):
    subject = nla.load_subject(finished / "subject", layer=1)
    acts = nla.extract(subject, ["The import statement finds a module.", "A list is ordered."], positions="last")
    pair = nla.load_pair(finished / "pair/av", finished / "pair/ar")
    texts = pair.verbalize(acts.vectors, max_new_tokens=16, seed=0)
    recon = pair.reconstruct(texts)
    assert acts.vectors.shape == recon.shape == (2, 32) and len(texts) == 2
    assert pair.score(texts, acts.vectors)["mse"].shape == (2,)
    assert nla.fve(acts.vectors, acts.vectors) == pytest.approx(1)


def test_explain(finished, capsys):
    flags = ["explain", "--pair", str(finished / "pair"), "--text", "The import statement finds", "--max-new-tokens", "8"]
    assert main([*flags, "--tokens", "all", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert "".join(row["token"] for row in rows) == "The import statement finds"
    assert all(-1 <= row["cosine"] <= 1 and row["fve"] <= 1 for row in rows)
    assert main(flags) == 0
    assert "FVE" in capsys.readouterr().out


def test_a_second_run_changes_nothing(finished, corpus, capsys):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*.*") if path.name != "config.json"}
    assert nla_main("quickstart", finished, corpus) == 0
    assert capsys.readouterr().err.count("already done") == len(LOOP)
    assert before == {path: path.stat().st_mtime_ns for path in finished.rglob("*.*") if path.name != "config.json"}


@pytest.mark.parametrize("moment", ["rollout", "place_batch"])
def test_rl_stopped_and_resumed_is_the_undisturbed_run(finished, corpus, tmp_path, monkeypatch, moment):
    workdir, calls = copy_before(finished, tmp_path, "rl"), 0
    original = getattr(nla_jax.train, moment)

    def stop(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(nla_jax.train, moment, stop)
    while (status := nla_main("rl", workdir, corpus)) == 130:
        assert not (workdir / "pair").exists()
    assert status == 0 and calls > 3
    same_run(finished, workdir)


def test_other_settings_in_the_same_folder_are_refused(finished, corpus, capsys):
    assert nla_main("rl", finished, corpus, "--config.rl.kl_coefficient=0.5") == 1
    assert "rl.kl_coefficient = " in capsys.readouterr().err


def test_a_damaged_shard_and_a_damaged_checkpoint(finished, corpus, tmp_path, capsys):
    workdir = copy_before(finished, tmp_path, "sft")
    shard = sorted((workdir / "activations").glob("av_sft*.parquet"))[0]
    shard.write_bytes(shard.read_bytes()[:200])
    assert nla_main("sft", workdir, corpus) == 1
    assert shard.name in one_line(capsys)

    workdir = tmp_path / "second"
    shutil.copytree(finished, workdir)
    (workdir / "stages/rl.json").unlink()
    for file in (workdir / "train/rl/checkpoints/4").rglob("*"):
        if file.is_file() and file.stat().st_size > 100:
            file.write_bytes(b"x" * 50)
    assert nla_main("rl", workdir, corpus) == 1
    assert "checkpoints/4" in one_line(capsys)


@pytest.mark.parametrize(("stage", "room"), [("sft", 20_000), ("rl", 20_000), ("extract", 4_000), ("evaluate", 1_000)])
def test_a_full_disk_gets_one_sentence_and_costs_nothing(finished, corpus, tmp_path, capsys, stage, room):
    """A limit on the size of files stands in for a full disk; with room again, the run goes on and ends as it would have."""
    workdir = copy_before(finished, tmp_path, stage)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        status = nla_main(stage, workdir, corpus)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert status == 1 and len(one_line(capsys)) < 500
    assert nla_main(stage, workdir, corpus) == 0
    if stage == "rl":
        same_run(finished, workdir)


def test_the_subject_must_be_the_pairs(finished, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(finished / "pair_warm/av", other)
    assert main(["explain", "--pair", str(finished / "pair"), "--text", "x", "--subject", str(other)]) == 1
    assert "not the subject" in one_line(capsys)


def one_line(capsys) -> str:
    """What was printed on standard error by `nla` itself: one line."""
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("nla: ")]
    assert len(lines) == 1
    return lines[0]


WRONG = {
    "no such config": (["extract", "--config", "nowhere.py"], "no config file nowhere.py"),
    "unknown variant": (["extract", "--config", CONFIG.replace("tiny", "huge")], "no variant 'huge'"),
    "unknown field": (["extract", "--config.rl.stepz=3"], "stepz"),
    "wrong type": (["extract", "--config.rl.steps=many"], "steps"),
    "unknown flag": (["extract", "--stepz=3"], "--stepz=3"),
    "verb too early": (["rl"], "nla sft"),
    "no such corpus": (["pretrain", "--config.corpus.source=nowhere.jsonl"], "nowhere.jsonl"),
    "documents too short": (["pretrain", "--config.corpus.min_chars=100000"], "min_chars|short"),
    "no such subject": (["extract", "--config.subject.path=nowhere"], "no model folder nowhere"),
    "wrong layer": (["extract", "--config.subject.path={subject}", "--config.subject.layer=3"], "Layer 3 does not exist"),
    "positions beyond every document": (
        ["extract", "--config.subject.path={subject}", "--config.extract.min_position=5000"], "min_position = 5000",
    ),
    "no such label function": (
        ["label", "--config.label.function=nowhere:f", "--workdir={labelled}"], "'nowhere:f' names no function",
    ),
    "marker of several tokens": (["sft", "--config.prompts.marker=marker", "--workdir={warm}"], "'marker'"),
    "mesh too large": (["sft", "--config.mesh.data=64", "--workdir={warm}"], "64 devices"),
    "no pair": (["explain", "--pair", "nowhere", "--text", "x"], "nowhere"),
    "no text": (["explain", "--pair", "{run}/pair", "--text", " "], "no text"),
    "no such token": (["explain", "--pair", "{run}/pair", "--text", "one", "--tokens", "999"], "Position 999"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_gets_one_sentence(case, finished, corpus, tmp_path, capsys):
    arguments, message = WRONG[case]
    text = " ".join(arguments)
    places = {"subject": finished / "subject", "run": finished}
    if "{labelled}" in text:
        places["labelled"] = copy_before(finished, tmp_path, "label")
        shutil.rmtree(places["labelled"] / "labels")
    if "{warm}" in text:
        places["warm"] = copy_before(finished, tmp_path, "sft")
    arguments = [argument.format(**places) for argument in arguments]
    if arguments[0] != "explain":
        for flag, value in (("--config", CONFIG), ("--workdir", str(tmp_path / "work")), ("--config.corpus.source", str(corpus))):
            if not any(argument.partition("=")[0] == flag for argument in arguments):
                arguments.append(f"{flag}={value}")
    assert main(arguments) == 1
    found = one_line(capsys)
    assert any(part in found for part in message.split("|")), found


@pytest.mark.slow
def test_killed_at_any_moment(finished, corpus, tmp_path):
    """`kill -9` eight times over sft, rl and evaluate; the run that comes out is bit for bit the undisturbed one."""
    workdir = copy_before(finished, tmp_path, "sft")
    command = [sys.executable, "-m", "nla_jax.cli", "quickstart", "--config", CONFIG, "--workdir", str(workdir)]
    command.append(f"--config.corpus.source={corpus}")
    rng = np.random.default_rng(0)
    for _ in range(8):
        process = subprocess.Popen(command, env=os.environ, stderr=subprocess.DEVNULL)
        time.sleep(rng.uniform(6, 30))
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert subprocess.run(command, env=os.environ).returncode == 0
    same_run(finished, workdir)
