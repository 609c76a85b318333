"""Runs that are interrupted, moved, damaged, broken, or started with other settings, as a user meets them."""

import ctypes
import dataclasses
import fcntl
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import (
    CONFIG,
    LOOP,
    close,
    copy_before,
    flip,
    history,
    nla_main,
    one_line,
    same_run,
    talkative,
    weights,
)
from safetensors.numpy import load_file, save_file

import nla_jax.pair
import nla_jax.stages.evaluate
import nla_jax.stages.rl
import nla_jax.study
from nla_jax.cli import main
from nla_jax.data.rows import load_rows, shards_of
from nla_jax.pair import load_pair
from nla_jax.runtime.metrics import read_metrics
from nla_jax.stages.probing import set_aside


@pytest.fixture(scope="module", autouse=True)
def compile_once(tmp_path_factory):
    """The runs of this file compile the same programs: here and in processes started from here they are kept."""
    values = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("xla")),
        "jax_persistent_cache_min_compile_time_secs": 0,
    }
    before = {name: getattr(jax.config, name) for name in values}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in values.items():
            patch.setenv(name.upper(), str(value))
            jax.config.update(name, value)
        yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture(scope="module")
def arguments(subject_folder, corpus):
    """What is typed behind `nla`: `arguments(verb, workdir, "field=value", …)`."""
    fixed = [f"corpus.source={corpus}", f"subject.path={subject_folder}", "prompts.max_new_tokens=96"]
    fixed += ["sft.av.steps=1", "sft.ar.steps=1"]

    def arguments(verb: str, workdir: Path, *settings: str) -> list[str]:
        flags = [f"--config.{setting}" for setting in (*fixed, *settings)]
        return [verb, "--config", CONFIG, "--workdir", str(workdir), *flags]

    return arguments


@pytest.fixture(scope="module")
def talking(arguments, tokenizer, tmp_path_factory) -> Path:
    """The working folder of an undisturbed run whose AV writes explanations from the start: RL has something to learn
    from."""
    workdir = tmp_path_factory.mktemp("talking") / "run"
    for verb in ("extract", "label", "sft"):
        assert main(arguments(verb, workdir)) == 0
    pair = load_pair(workdir / "pair_warm")
    params = talkative(pair.verbalizer_params, tokenizer)
    dataclasses.replace(pair, verbalizer_params=params).save(workdir / "pair_warm", overwrite=True)
    assert main(arguments("rl", workdir)) == 0
    assert all(record["extraction_rate"] > 0.2 for record in history(workdir))
    before, after = (load_pair(workdir / name).weights for name in ("pair_warm", "pair"))
    assert all(np.any(a != b) for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after)))
    return workdir


def stopping(monkeypatch, at: int, how, module=nla_jax.study) -> list:
    """Calls `how` as the loop samples for the `at`-th time; returns the list that grows with each time."""
    original, calls = module.rollout, []

    def counted(*args, **kwargs):
        calls.append(len(calls) + 1)
        if len(calls) == at:
            how()
        return original(*args, **kwargs)

    monkeypatch.setattr(module, "rollout", counted)
    return calls


def interrupt():
    raise KeyboardInterrupt


def test_settings_bind_when_something_was_made_from_them(talking, arguments, tmp_path, monkeypatch, capsys):
    """Not by a stage that has failed at once, nor by one that was too early."""
    workdir = copy_before(talking, tmp_path, "sft")
    assert main(arguments("rl", workdir, "rl.group=2")) == 1
    assert "holds no finished 'sft' stage" in one_line(capsys)
    assert main(arguments("sft", workdir, "prompts.marker=marker")) == 1
    one_line(capsys)
    assert main(arguments("sft", workdir)) == 0
    stopping(monkeypatch, 1, interrupt)
    assert main(arguments("rl", workdir, "rl.group=2")) == 130
    monkeypatch.undo()
    assert main(arguments("rl", workdir, "rl.steps=1")) == 0

    record = workdir / "stages/sft.json"
    record.write_text("{")
    capsys.readouterr()
    assert main(arguments("sft", workdir)) == 1
    assert f"{record} is damaged; delete it" in one_line(capsys)


def test_two_runs_do_not_share_a_folder(talking, arguments, capsys):
    with open(talking / "lock", "r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert main(arguments("rl", talking)) == 1
        assert f"Another run works in {talking} (process {os.getpid()} on " in one_line(capsys)
    assert main(arguments("rl", talking)) == 0


def test_damaged_copies_of_vectors_are_made_again(talking):
    whole = np.array(load_rows(talking, "rl").vectors)
    (file,) = (talking / "activations").glob("rl-*.npy")
    os.truncate(file, file.stat().st_size // 2)
    np.testing.assert_array_equal(load_rows(talking, "rl").vectors, whole)
    (file,) = (talking / "activations").glob("rl-*.npy")
    flip(file, 200)
    np.testing.assert_array_equal(load_rows(talking, "rl").vectors, whole)


def test_another_pair_is_evaluated_by_its_own_texts(talking, arguments, tmp_path):
    """The texts that are there already are those of another AV. And the parts of a document count as one."""
    workdir = copy_before(talking, tmp_path, "evaluate")

    def evaluated() -> dict:
        assert main(arguments("evaluate", workdir)) == 0
        record = workdir / "stages/evaluate.json"
        summary = json.loads(record.read_text())["result"]["summary"]
        record.unlink()
        return summary

    before = evaluated()
    shutil.rmtree(workdir / "pair")
    shutil.copytree(workdir / "pair_warm", workdir / "pair")
    for file in shards_of(workdir / "activations", "heldout"):
        table = pq.read_table(file)
        parts = pa.array([f"book#{i % 3 + 1}" for i in range(len(table))])
        pq.write_table(table.set_column(table.column_names.index("doc_id"), "doc_id", parts), file)
    now = evaluated()
    assert now["fve_rl"] == now["fve_warm"] == before["fve_warm"] != before["fve_rl"]
    assert now["heldout_documents"] == 1 < before["heldout_documents"]
    np.testing.assert_allclose(now["fve_rl_ci95"], now["fve_rl"])


@pytest.mark.parametrize("module, moment", [(nla_jax.study, "rollout"), (nla_jax.stages.rl, "place_batch")])
def test_rl_stopped_and_resumed_is_the_undisturbed_run(talking, arguments, tmp_path, monkeypatch, module, moment):
    workdir, calls = copy_before(talking, tmp_path, "rl"), 0
    original = getattr(module, moment)

    def stop(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(module, moment, stop)
    while (status := main(arguments("rl", workdir))) == 130:
        assert not (workdir / "pair").exists()
    assert status == 0 and calls > 3
    same_run(talking, workdir)


def test_sigterm_loses_no_step_and_nothing_else_continues_from_it(talking, arguments, tmp_path, monkeypatch, capsys):
    workdir, free = copy_before(talking, tmp_path, "rl"), "rl.checkpoint_every=100"
    calls = stopping(monkeypatch, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    assert main(arguments("rl", workdir, free)) == 143
    assert signal.getsignal(signal.SIGTERM) is before
    checkpoints = workdir / "train/rl/checkpoints"
    assert f"stopped by SIGTERM; step 3 is saved under {checkpoints}" in one_line(capsys)
    assert sorted(path.name for path in checkpoints.iterdir()) == ["3"]
    assert [record["step"] for record in history(workdir)] == [1, 2, 3]

    # Other settings: refused by the stage's record, and without it by the checkpoint; likewise another base.
    other = ["rl.kl_coefficient=0.5", "rl.av_optimizer.lr=0.1", free]
    named = "rl.av_optimizer.lr = 0.0004 -> 0.1; rl.kl_coefficient = 0.03 -> 0.5."
    assert main(arguments("rl", workdir, *other)) == 1
    assert named in one_line(capsys)
    (workdir / "stages/rl.json").unlink()
    assert main(arguments("rl", workdir, *other)) == 1
    assert f"Checkpoint {checkpoints}/3 was made with other settings (old -> new): {named}" in one_line(capsys)
    (workdir / "stages/rl.json").unlink()
    file = workdir / "pair_warm/av/model.safetensors"
    content = file.read_bytes()
    flip(file, -1)
    assert main(arguments("rl", workdir, free)) == 1
    assert f"{file} is damaged: its bytes are not those that were written" in one_line(capsys)
    flip(file, -1)
    save_file({name: value + np.float32(1e-3) for name, value in load_file(file).items()}, file)  # another, whole AV
    assert main(arguments("rl", workdir, free)) == 1
    assert "other settings (old -> new): base.warm_av = '" in one_line(capsys)
    file.write_bytes(content)
    assert main(arguments("rl", workdir, free, "rl.steps=2")) == 1
    assert "checkpoints/3 is beyond the 2 steps" in one_line(capsys)

    assert len(calls) == 3
    assert main(arguments("rl", workdir)) == 0
    assert len(calls) == 4
    same_run(talking, workdir)


def test_other_settings_of_a_finished_stage_are_refused(finished, corpus, capsys):
    assert nla_main("rl", finished, corpus, "--config.rl.kl_coefficient=0.5", "--config.rl.steps=5") == 1
    assert "rl.kl_coefficient = 0.03 -> 0.5; rl.steps = 4 -> 5. Go back" in one_line(capsys)


@pytest.mark.slow
def test_a_run_is_continued_on_another_mesh(talking, arguments, tmp_path, monkeypatch):
    workdir = copy_before(talking, tmp_path, "rl")
    calls = stopping(monkeypatch, 3, interrupt)
    assert main(arguments("rl", workdir, "mesh.fsdp=8")) == 130
    assert main(arguments("rl", workdir, "mesh.data=2", "mesh.tensor=2", "rl.micro_batches=2")) == 0
    assert len(calls) < 7  # it did go on
    close(weights(workdir), weights(talking), 1e-4)


def test_a_run_that_samples_in_chunks_is_the_same_run(talking, arguments, tmp_path, monkeypatch):
    """Stopped in the second step's second chunk, which a thread of its own samples, and continued without chunks."""
    workdir = copy_before(talking, tmp_path, "rl")
    calls = stopping(monkeypatch, 4, interrupt)
    assert main(arguments("rl", workdir, "rl.rollout_chunks=2")) == 130 and len(calls) == 4
    assert main(arguments("rl", workdir)) == 0
    close(weights(workdir), weights(talking), 1e-4)


def test_evaluation_samples_only_what_is_missing(talking, arguments, tmp_path, monkeypatch):
    (tmp_path / "whole").mkdir()
    whole, workdir = copy_before(talking, tmp_path / "whole", "evaluate"), copy_before(talking, tmp_path, "evaluate")
    assert main(arguments("evaluate", whole, "evaluate.batch=16")) == 0
    calls = stopping(monkeypatch, 6, interrupt, nla_jax.pair)
    assert main(arguments("evaluate", workdir, "evaluate.batch=4")) == 130
    assert main(arguments("evaluate", workdir, "evaluate.batch=4")) == 0
    whole_document = pq.read_table(workdir / "evaluation/whole_document.parquet").num_rows  # explained by both pairs
    assert len(calls) == 4 * 16 / 4 + 1 + 2 * math.ceil(whole_document / 4)
    one, other = (json.loads((folder / "evaluation.json").read_text()) for folder in (whole, workdir))
    texts = lambda page: [(row["warm"], row["rl"]) for row in page["examples"]]
    scores = lambda page: [score for probe in page["probes"] for score in probe["scores"] if "rows" in score]
    rows = lambda page: {score["name"]: score["rows"] for score in scores(page)}
    assert texts(one) == texts(other) and rows(one)["mean_length"] == rows(other)["mean_length"]
    assert any(rows(one)["mean_length"]) and {"warm", "rl", "shuffled"} < rows(one).keys()
    assert all(rows(one)[name] == pytest.approx(rows(other)[name], abs=1e-4) for name in rows(one))


def test_evaluation_measures_only_what_is_missing(talking, arguments, tmp_path, monkeypatch):
    """Probes too: those that were measured before it was stopped are read."""
    (tmp_path / "mine.py").write_text("def one(context):\n    return {'one': [1.0] * len(context.vectors)}\n")
    monkeypatch.syspath_prepend(tmp_path)
    fidelity = [f"nla_jax.probes.fidelity:{name}" for name in ("after_rl", "warm_start", "gold", "length", "prefixes")]
    probes = f"evaluate.probes={('mine:one', *fidelity)}"
    whole, workdir = (copy_before(talking, tmp_path / name, "evaluate") for name in ("whole", "stopped"))
    assert main(arguments("evaluate", whole, probes)) == 0
    measure, measured = nla_jax.stages.evaluate.measure, []

    def counted(function, probe, context):
        measured.append(probe.name)
        return interrupt() if len(measured) == 4 else measure(function, probe, context)

    monkeypatch.setattr(nla_jax.stages.evaluate, "measure", counted)
    assert main(arguments("evaluate", workdir, probes)) == 130
    assert main(arguments("evaluate", workdir, probes)) == 0
    assert measured == ["one", "after_rl", "warm_start", "gold", "gold", "length", "prefixes"]
    assert (workdir / "evaluation.json").read_text() == (whole / "evaluation.json").read_text()
    seconds = json.loads((workdir / "stages/evaluate.json").read_text())["result"]["seconds_by_probe"]
    assert set(seconds) == set(measured)


def test_rows_of_another_pair_or_function_or_a_damaged_file_are_measured_again(
    talking, arguments, tmp_path, monkeypatch
):
    mine = tmp_path / "mine_too.py"
    mine.write_text("def one(context):\n    return {'one': [1.0] * len(context.vectors)}\n\n\ntwo = one\n")
    monkeypatch.syspath_prepend(tmp_path)
    measure, measured, workdir = nla_jax.stages.evaluate.measure, [], copy_before(talking, tmp_path, "evaluate")
    stop = ["length"]

    def counted(function, probe, context):
        measured.append(probe.name)
        return interrupt() if probe.name in stop else measure(function, probe, context)

    def again(status: int, first: str = "one") -> list[str]:
        measured.clear()
        probes = (f"mine_too:{first}", "nla_jax.probes.fidelity:gold", "nla_jax.probes.fidelity:length")
        assert main(arguments("evaluate", workdir, f"evaluate.probes={probes}")) == status
        return list(measured)

    monkeypatch.setattr(nla_jax.stages.evaluate, "measure", counted)
    assert again(130) == ["one", "gold", "length"] and again(130) == ["length"]
    assert again(130, "two") == ["two", "length"]  # another function of the same file
    mine.write_text(mine.read_text().replace("1.0", "2.0"))
    sys.modules.pop("mine_too")
    assert again(130, "two") == ["two", "length"]
    rows = workdir / "evaluation/probes/gold.parquet"
    rows.write_bytes(rows.read_bytes()[:-100])
    assert again(130, "two") == ["gold", "length"]
    shutil.copy(workdir / "pair_warm/ar/value_head.safetensors", workdir / "pair/ar/value_head.safetensors")
    assert again(130, "two") == ["two", "gold", "length"]
    stop.clear()
    assert again(0, "two") == ["length"] and not (workdir / "evaluation/unfinished").exists()
    (workdir / "stages/evaluate.json").unlink()
    assert again(0, "two") == ["two", "gold", "length"]  # the one before was finished


def test_a_damaged_shard_is_named(finished, corpus, tmp_path, capsys):
    workdir = copy_before(finished, tmp_path, "sft")
    shard = sorted((workdir / "activations").glob("av_sft*.parquet"))[0]
    shard.write_bytes(shard.read_bytes()[:200])
    assert nla_main("sft", workdir, corpus) == 1
    assert shard.name in one_line(capsys)


SLOW_LABELS = """
import time
from pathlib import Path

class Slow:
    def label(self, rows):
        here = Path(__file__).parent
        if (here / "first").exists() and not (here / "second").exists():
            (here / "second").touch()
            time.sleep(600)
        (here / "first").touch()
        return ["a label"] * len(rows)
"""


def test_sigterm_outside_a_loop_is_one_sentence_and_finished_shards_stay(finished, corpus, tmp_path, monkeypatch):
    workdir = copy_before(finished, tmp_path, "label")
    shutil.rmtree(workdir / "labels")
    (tmp_path / "slow_labels.py").write_text(SLOW_LABELS)
    settings = [f"--config.corpus.source={corpus}", "--config.label.labeller=slow_labels:Slow"]
    command = nla(["label", "--config", CONFIG, "--workdir", str(workdir), *settings])
    path = f"{tmp_path}:{Path(__file__).parent.parent}"
    process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": path}, stderr=subprocess.PIPE, text=True)
    try:
        while not (tmp_path / "second").exists():
            assert process.poll() is None, process.communicate()
            time.sleep(0.02)
        process.terminate()
        said = process.communicate(timeout=60)[1]
    finally:
        process.kill()
    assert process.returncode == 143 and "Traceback" not in said
    assert said.splitlines()[-1].startswith("nla: stopped by SIGTERM amid label; its finished shards,")
    [shard] = (workdir / "labels").glob("*.parquet")
    before = shard.stat().st_mtime_ns
    monkeypatch.syspath_prepend(tmp_path)
    assert nla_main("label", workdir, corpus, settings[1]) == 0
    assert shard.stat().st_mtime_ns == before and len(list((workdir / "labels").glob("*.parquet"))) > 1


def unfinished(run: Path, folder: Path) -> tuple[Path, Path]:
    """A copy of a finished run that was killed before it saved its pair, and the copy's checkpoints."""
    workdir = folder / "copy"
    shutil.copytree(run, workdir)
    (workdir / "stages/rl.json").unlink()
    shutil.rmtree(workdir / "pair")
    return workdir, workdir / "train/rl/checkpoints"


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_serves(talking, arguments, tmp_path, capsys):
    workdir, checkpoints = unfinished(talking, tmp_path)
    for file in (checkpoints / "4").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    assert main(arguments("rl", workdir)) == 1
    told = one_line(capsys)
    assert f"Checkpoint {checkpoints}/4 cannot be restored" in told
    assert "its files are damaged (move that folder aside to continue from the one before it)" in told
    (checkpoints / "4").rename(checkpoints / "4.damaged")
    assert main(arguments("rl", workdir)) == 0
    same_run(talking, workdir)


@pytest.mark.parametrize(("stage", "room"), [("sft", 20_000), ("rl", 20_000), ("extract", 4_000), ("evaluate", 1_000)])
def test_a_full_disk_gets_one_sentence_and_costs_nothing(finished, corpus, tmp_path, capsys, stage, room):
    """A limit on the size of files stands in for a full disk; with room again, the run goes on and ends as it would
    have."""
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


def test_a_disk_that_fills_up_spares_the_checkpoint_before(talking, arguments, tmp_path, capsys, monkeypatch):
    workdir = copy_before(talking, tmp_path, "rl")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill():
        while not (workdir / "train/rl/checkpoints/2").exists():  # saves are asynchronous
            time.sleep(0.01)
        resource.setrlimit(resource.RLIMIT_FSIZE, (8_000, hard))

    calls = stopping(monkeypatch, 3, fill)
    try:
        assert main(arguments("rl", workdir)) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert re.search("the one before it is intact|of the steps before it are intact", one_line(capsys))
    made = len(calls)
    assert main(arguments("rl", workdir)) == 0
    assert len(calls) == made + 2
    same_run(talking, workdir)


@pytest.mark.slow
def test_a_read_only_folder_gets_one_sentence_and_costs_nothing(talking, arguments, tmp_path):
    """In a process of its own, without root's right to write everywhere."""
    workdir, checkpoints = unfinished(talking, tmp_path)
    shutil.rmtree(checkpoints / "4")
    for folder, words in ((workdir, "working folder"), (checkpoints, "checkpoint cannot be written")):
        folder.chmod(0o555)
        ended = subprocess.run(
            nla(arguments("rl", workdir)), capture_output=True, text=True, preexec_fn=obey_permissions
        )
        folder.chmod(0o755)
        lines = [line for line in ended.stderr.splitlines() if line.startswith("nla: ")]
        assert ended.returncode == 1 and len(lines) == 1 and words in lines[0], ended.stderr
        assert "Traceback" not in ended.stderr and "ermission denied" in lines[0]
    assert main(arguments("rl", workdir)) == 0
    same_run(talking, workdir)


def obey_permissions():
    """The program that is started next loses the right to pass over permissions (CAP_DAC_OVERRIDE), if it has it."""
    if os.geteuid() == 0 and ctypes.CDLL(None, use_errno=True).prctl(24, 1, 0, 0, 0):  # PR_CAPBSET_DROP
        raise OSError(ctypes.get_errno(), "prctl")


def nla(arguments: list[str]) -> list[str]:
    return [sys.executable, "-m", "nla_jax.cli", *arguments]


def wrecking(steps: int, lr: float, warmup: int) -> optax.GradientTransformation:
    """An optimizer that works for three steps and ruins the model in the fourth."""
    return optax.adamw(lambda count: jnp.where(count < 3, 1e-4, lr))


@pytest.mark.parametrize(
    ("lr", "told"),
    [
        (1.0, "extraction_rate was below 0.25 at every recorded step from 5 to 7 (0, 0, 0)"),
        pytest.param(
            1e3,
            "metrics or gradients were not finite at every recorded step from 5 to 7 (av_grad_norm, av_update_norm, entropy, ",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_broken_training_stops_and_keeps_what_was_good(talking, arguments, tmp_path, capsys, lr, told):
    workdir = copy_before(talking, tmp_path, "rl")
    settings = ["rl.steps=12", f"rl.av_optimizer.lr={lr}", "rl.av_optimizer.function=test_resume:wrecking"]
    settings += ["checkpoints.keep=1", "watchdog.window=3", "rl.heldout_every=100"]
    for _ in range(2):  # the same command again stops at the same step again
        assert main(arguments("rl", workdir, *settings)) == 1
        line = one_line(capsys)
        assert told in line and f"Checkpoint {workdir}/train/rl/checkpoints/3 is from before and is kept" in line
        assert [record["step"] for record in history(workdir)] == [1, 2, 3, 4, 5, 6, 7]
        assert sorted(path.name for path in (workdir / "train/rl/checkpoints").iterdir()) == ["3", "6"]


# Probes in training

PROBED = ["rl.probe_every=2", "rl.probe_rows=8", "rl.checkpoint_every=3", "checkpoints.keep=1"]
PROBED += [
    "rl.probes=('nla_jax.probes.fidelity:after_rl', 'nla_jax.probes.fidelity:frozen_critic', 'test_resume:moved')"
]


def moved(context) -> dict[str, np.ndarray]:
    """How far the AR is from that of the warm start."""
    now, before = (np.asarray(pair.reconstructor_params["head"]) for pair in (context.pair, context.warm))
    return {"moved": np.full(len(context.vectors), np.abs(now - before).mean())}


def nearest(figures: dict[str, float], to: float) -> float:
    return -abs(figures["moved"] - to)


def figures_of(workdir: Path, name: str) -> dict[int, float]:
    """A figure of the probes by step."""
    return {r["step"]: r[f"probe/{name}"] for r in history(workdir) if f"probe/{name}" in r}


@pytest.fixture(scope="module")
def kept(talking, arguments, tmp_path_factory) -> tuple[Path, Path, list[str]]:
    """A run of two steps; one of five whose best pair is that of its second step; and the latter's settings."""
    two, five = (copy_before(talking, tmp_path_factory.mktemp("probed"), "rl") for _ in range(2))
    assert main(arguments("rl", two, *PROBED, "rl.steps=2")) == 0
    best = [*PROBED, "rl.keep_best.function=test_resume:nearest", f"rl.keep_best.to={figures_of(two, 'moved')[2]!r}"]
    assert main(arguments("rl", five, *best, "rl.steps=5")) == 0
    return two, five, [*best, "rl.steps=5"]


def pair_of(workdir: Path, name: str) -> dict:
    """All tensors of the AV in a folder of a run."""
    return load_file(workdir / name / "av/model.safetensors")


def test_the_best_pair_is_kept_and_the_last_one_is_there(kept, talking):
    two, five, _ = kept
    moves, gaps = figures_of(five, "moved"), figures_of(five, "gap_frozen_critic")
    assert list(moves) == [0, 2, 4, 5] and moves[0] == gaps[0] == 0 < min(moves[step] for step in (2, 4, 5))
    assert (
        list(figures_of(five, "fve_rl")) == [0, 2, 4, 5] and "seconds_probes" in (five / "stages/rl.json").read_text()
    )
    assert json.loads((five / "stages/rl.json").read_text())["result"]["kept_step"] == 2
    assert "rl_step: 2" in (five / "pair/av/nla_meta.yaml").read_text()
    assert all(np.array_equal(value, weights(five)[name]) for name, value in weights(two).items())
    last = pair_of(five, "pair_last")
    assert any(not np.array_equal(value, pair_of(five, "pair")[name]) for name, value in last.items())
    assert sorted(path.name for path in (five / "train/rl/checkpoints").iterdir()) == ["2", "3", "5"]  # good: 3
    assert all(np.array_equal(a, b) for a, b in zip(*(pair_of(w, "pair_warm").values() for w in (five, talking))))


def test_probes_read_documents_that_neither_rl_nor_the_evaluation_reads(kept):
    _, five, _ = kept
    ids = load_rows(five, "rl").column("doc_id")
    left, aside = ({ids[i] for i in rows} for rows in set_aside(ids, 8, 0))
    trained_on = {ids[row["row"]] for row in read_metrics(five / "train/rl/texts.jsonl")}
    assert len(aside) == 2 and len(trained_on) > 2 and trained_on <= left
    assert not aside & left and not aside & set(load_rows(five, "heldout").column("doc_id"))


def test_a_probed_run_stopped_and_resumed_is_the_undisturbed_one(kept, talking, arguments, tmp_path, monkeypatch):
    _, five, settings = kept
    workdir = copy_before(talking, tmp_path, "rl")
    for at in (1, 5):  # before the first step, and in the fifth one: the best one is behind it, and a checkpoint too
        stopping(monkeypatch, at, interrupt)
        assert main(arguments("rl", workdir, *settings)) == 130
        monkeypatch.undo()
    assert main(arguments("rl", workdir, *settings)) == 0
    same_run(five, workdir)
    assert all(np.array_equal(pair_of(five, "pair_last")[name], x) for name, x in pair_of(workdir, "pair_last").items())


def test_where_the_best_pair_is_kept_a_tripwire_ends_rl_and_the_run_goes_on(
    kept, talking, arguments, tmp_path, monkeypatch, capsys
):
    """The kept pair is one at which the wire held, and is evaluated. A kill after the last step changes nothing: the wire
    has tripped still."""
    *_, settings = kept
    workdir = copy_before(talking, tmp_path, "rl")
    settings = [*settings, "watchdog.max_rise.moved=0", "watchdog.probe_rounds=1"]  # the AR does not stay where it was
    settings += ["evaluate.probes=('nla_jax.probes.fidelity:after_rl',)", "evaluate.examples=0"]
    with monkeypatch.context() as patched:
        patched.setattr(nla_jax.stages.rl, "finish", lambda *arguments: interrupt())
        assert main(arguments("rl", workdir, *settings)) == 130
    samples = stopping(monkeypatch, 0, interrupt)
    assert main(arguments("quickstart", workdir, *settings)) == 0
    said = capsys.readouterr().err
    (line,) = [line for line in said.splitlines() if "tripwire" in line]
    assert line.startswith(
        "rl: RL ended after step 2 of 5: a tripwire of the watchdog: probe/moved was 0 at first and has"
    )
    assert samples == [] and [record["step"] for record in history(workdir)] == [0, 1, 2]
    result = json.loads((workdir / "stages/rl.json").read_text())["result"]
    assert (result["steps"], result["kept_step"]) == (2, 0) and f"rl: {result['ended']}" == line
    warm = pair_of(workdir, "pair_warm")
    assert all(np.array_equal(value, warm[name]) for name, value in pair_of(workdir, "pair").items())
    assert f'<p class="state">{result["ended"]}</p>' in (workdir / "report.html").read_text()
    assert "fve_rl" in json.loads((workdir / "summary.json").read_text())


def letters(texts, rows) -> dict[str, np.ndarray]:
    return {"code": np.array([text.count("e") / max(1, len(text)) for text in texts], np.float32)}


def paid(s):
    return jnp.where(s.valid, s.features["code"], -1.0)


def code(context) -> dict[str, np.ndarray]:
    return letters(context.texts("rl"), [])


def test_a_reward_for_a_code_trips(talking, arguments, tmp_path, capsys):
    workdir = copy_before(talking, tmp_path, "rl")
    misnamed = [*PROBED, "watchdog.max_fall.truth=0.1"]
    assert main(arguments("rl", workdir, *misnamed)) == 1
    assert "A tripwire of the watchdog is 'truth', which rl.probes do not give; they give fve_rl," in one_line(capsys)
    settings = ["rl.steps=24", "rl.features=test_resume:letters", "rl.reward=test_resume:paid", "rl.probe_every=4"]
    settings += ["rl.probes=('nla_jax.probes.fidelity:after_rl', 'test_resume:code')", "rl.probe_rows=8"]
    settings += ["rl.av_optimizer.lr=0.003", "rl.heldout_temperature=1.0", "rl.checkpoint_every=4"]
    settings += ["watchdog.max_rise.code=0.03", "watchdog.probe_rounds=1", "watchdog.window=100"]
    assert main(arguments("rl", workdir, *settings)) == 1
    line = one_line(capsys)
    assert "a tripwire of the watchdog: probe/code was" in line and "has risen by more than 0.03" in line
    assert not (workdir / "pair").exists()


@pytest.mark.slow
def test_killed_at_twenty_moments(talking, arguments, tmp_path):
    """`kill -9` at twenty random moments of RL runs (start-up, rollout, step and save among them), four to a run:
    parameters and metrics come out bit for bit those of the undisturbed run."""
    settings = ["rl.steps=12", "rl.checkpoint_every=3"]

    def finish(workdir: Path) -> Path:
        ended = subprocess.run(nla(arguments("rl", workdir, *settings)), capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr
        return workdir

    whole = finish(copy_before(talking, tmp_path, "rl"))
    rng, kills, runs = np.random.default_rng(0), [], 0
    while len(kills) < 20:
        runs += 1
        (tmp_path / str(runs)).mkdir()
        workdir = copy_before(talking, tmp_path / str(runs), "rl")
        for _ in range(4):
            made, more = last_step(workdir), rng.integers(0, 4)
            process = subprocess.Popen(nla(arguments("rl", workdir, *settings)), stderr=subprocess.DEVNULL)
            while more and process.poll() is None and last_step(workdir) != made - made % 3 + more:
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 0.3 if more else 15))
            process.kill()
            if process.wait() == -signal.SIGKILL:
                kills.append(last_step(workdir))
        same_run(whole, finish(workdir))
    print(f"killed after steps {kills} of {runs} runs")


def last_step(workdir: Path) -> int:
    return max((record["step"] for record in history(workdir)), default=0)


def test_a_finished_stage_goes_on_with_more_steps(finished, corpus, tmp_path, capsys):
    """RL continues from its last step, and what was measured is measured again; fewer steps, or more of the warm start
    that RL began with, are refused."""
    workdir = shutil.copytree(finished, tmp_path / "copy")
    for file in (workdir / "stages").glob("*.json"):  # as a version wrote it that did not have this setting
        record = json.loads(file.read_text())
        record["basis"].get("subject", {}).pop("earlier_layers", None)
        del record["checksum"]
        file.write_text(json.dumps(record))
    before = history(workdir)
    assert nla_main("quickstart", workdir, corpus, "--config.rl.steps=6") == 0
    said = capsys.readouterr().err
    assert "sft: already done" in said and "rl: done" in said and "evaluate: done" in said
    assert history(workdir)[:4] == before and [record["step"] for record in history(workdir)] == [1, 2, 3, 4, 5, 6]
    assert json.loads((workdir / "stages/rl.json").read_text())["result"]["steps"] == 6
    assert nla_main("quickstart", workdir, corpus, "--config.rl.steps=5") == 1
    assert "rl.steps = 6 -> 5" in one_line(capsys)
    assert nla_main("rl", workdir, corpus, "--config.rl.steps=6", "--config.sft.ar.steps=8") == 1
    assert "sft.ar.steps = 6 -> 8" in one_line(capsys)


@pytest.mark.parametrize("gone, stage", [("report.html", "report"), ("pair", "rl"), ("labels", "label")])
def test_what_was_removed_is_made_again(gone, stage, finished, corpus, tmp_path, capsys):
    workdir = shutil.copytree(finished, tmp_path / "copy")
    path = workdir / gone
    kept = weights(workdir)
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert nla_main("quickstart", workdir, corpus) == 0
    said = capsys.readouterr().err
    assert path.exists() and f"{stage}: done" in said and said.count("already done") >= len(LOOP) - 2
    assert all(np.array_equal(kept[name], value) for name, value in weights(workdir).items())
