"""Several processes over loopback as the hosts of one run: they compute what one process computes, and end together."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import TINY, close, random_params, talkative
from safetensors.numpy import load_file

from nla_jax.cli import main
from nla_jax.io.folders import save_model
from nla_jax.io.hub import fingerprint
from nla_jax.models.sharding import (
    RowsOf,
    batch_sharding,
    local_rows,
    make_mesh,
    place_batch,
    place_local,
)
from nla_jax.runtime.metrics import read_metrics

CONFIG = """
import runpy

def get_config(variant=""):
    c = runpy.run_path({study!r})["get_config"]("tiny")
    for optimizer in (c.sft.av.optimizer, c.sft.ar.optimizer, c.rl.av_optimizer, c.rl.ar_optimizer):
        optimizer.eps = 1e-3  # Adam with a small one turns the rounding of a gradient near 0 into a step of full size
    return c
"""
DEVICES = 4  # of the whole run, on however many hosts
TIMES = {"seconds", "seconds_rollout", "seconds_host", "seconds_train", "samples_per_second"}
TIMES |= {"seconds_so_far", "cpu_seconds_so_far", "seconds_probes"}


@pytest.fixture(scope="module")
def settings(tokenizer, tmp_path_factory) -> list[str]:
    """The flags of a small study whose subject writes explanations from the start, so that rewards differ."""
    folder = tmp_path_factory.mktemp("study")
    save_model(folder / "subject", talkative(random_params(TINY), tokenizer), TINY, tokenizer)
    chosen = [(name, text[:400]) for name, text in sorted(topics.items()) if len(text) > 800][:40]
    corpus = folder / "topics.jsonl"
    corpus.write_text("".join(json.dumps({"id": name, "text": text}) + "\n" for name, text in chosen))
    config = folder / "study.py"
    config.write_text(CONFIG.format(study=str(Path(__file__).parent / "study.py")))
    values = {
        "subject.path": folder / "subject",
        "corpus.source": corpus,
        "corpus.min_chars": 100,
        "mesh.data": 2,
        "mesh.fsdp": 2,
        "extract.shard_documents": 4,
        "extract.max_tokens": 64,
        "prompts.max_new_tokens": 80,
        "sft.av.steps": 1,
        "sft.av.optimizer.lr": 1e-4,
        "sft.ar.steps": 1,
        "rl.steps": 3,
        "rl.rollout_chunks": 2,
        "rl.heldout_every": 3,
        # Hosts ask the labeller, which runs the subject, of rows of their own.
        "label.labeller": "nla_jax.labels.behaviour:Behaviour",
        "label.settings.subject": folder / "subject",
        "label.settings.words": 1,
        "label.settings.continuations": 1,
        "rl.truth": True,
        "rl.reward": "nla_jax.objective:truthful",
        "rl.probe_every": 3,
        "rl.probes": "nla_jax.probes.claims:true_after_rl",
    }
    return ["--config", str(config), *(f"--config.{name}={value}" for name, value in values.items())]


@pytest.fixture(scope="module")
def alone(settings, tmp_path_factory) -> Path:
    """The working folder of the study on one host."""
    workdir = tmp_path_factory.mktemp("alone") / "run"
    assert main(["quickstart", "--workdir", str(workdir), *settings]) == 0
    return workdir


def free_address() -> str:
    """Where a run's first host may listen."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


class Hosts:
    """Processes that run one verb together, each with its share of the devices."""

    def __init__(
        self, count: int, verb: str, workdir: Path, settings: list[str], of: dict | None = None, at: dict | None = None
    ):
        """`of`: further flags of single hosts, None for a host that is not started. `at`: where single hosts are
        started."""
        flags = re.sub(r"device_count=\d+", f"device_count={DEVICES // count}", os.environ["XLA_FLAGS"])
        environment = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": str(Path(__file__).parent.parent)}
        command = [sys.executable, "-m", "nla_jax.cli", verb, "--workdir", str(workdir), *settings]
        hosts = [f"--coordinator={free_address()}", f"--num_processes={count}"]
        self.processes, self.workdir = [], workdir
        for index in range(count):
            more = (of or {}).get(index, [])
            if more is not None:
                self.processes.append(
                    subprocess.Popen(
                        [*command, *hosts, f"--process_id={index}", *more],
                        cwd=(at or {}).get(index),
                        env=environment,
                        stdout=subprocess.PIPE,
                        stderr=subprocess.STDOUT,
                        text=True,
                    )
                )

    def finish(self, seconds: float = 600) -> list[tuple[int, str]]:
        """Exit status and output of each host, in order."""
        limit = time.monotonic() + seconds
        try:
            outputs = [process.communicate(timeout=limit - time.monotonic())[0] for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()
        return [(process.returncode, output) for process, output in zip(self.processes, outputs)]

    def wait_for(self, path: str, seconds: float = 600) -> None:
        """Returns when the hosts have written a file or folder that fits the pattern below their working folder."""
        limit = time.monotonic() + seconds
        while not list(self.workdir.glob(path)):
            assert time.monotonic() < limit and all(process.poll() is None for process in self.processes), self.finish(
                9
            )
            time.sleep(0.05)


def said(output: str) -> str:
    """The one sentence that a host ends with."""
    lines = [line for line in output.splitlines() if line.startswith("nla: ")]
    assert len(lines) == 1 and output.rstrip().endswith(lines[0]), output
    return lines[0]


def same_figures(found: pa.Table, expected: pa.Table) -> None:
    """Two tables of figures agree within 1e-5 of the largest in a column; all else in them is equal."""
    assert found.schema.equals(expected.schema)
    for name, ours, theirs in zip(found.column_names, found.columns, expected.columns):
        if pa.types.is_floating(ours.type):
            close(ours.to_numpy(), theirs.to_numpy(), 1e-5)
        else:
            assert ours.equals(theirs), name


def same_run(found: Path, expected: Path) -> None:
    """Data and texts are equal, training agrees to float32 rounding: collectives between processes add in another
    order."""
    name = lambda file: re.sub(r"-[0-9a-f]{12}(?=\.parquet)", "", file)  # texts: without the hash of the weights
    ours, theirs = (
        {name(str(file.relative_to(folder))): pq.read_table(file) for file in folder.rglob("*.parquet")}
        for folder in (found, expected)
    )
    assert theirs and ours.keys() == theirs.keys() and any(file.startswith("evaluation/rl-") for file in theirs)
    for file in theirs:
        if file.startswith(("evaluation/probes/", "evaluation/whole_document")):  # figures of trained models
            same_figures(ours[file], theirs[file])
        else:
            assert ours[file].equals(theirs[file]), file
    for stage in ("sft_av", "sft_ar", "rl"):
        logs = [read_metrics(folder / "train" / stage / "metrics.jsonl") for folder in (found, expected)]
        assert [record["step"] for record in logs[0]] == [record["step"] for record in logs[1]]
        for record, other in zip(*logs):
            for name in record.keys() - TIMES:  # KL and gaps are small differences of log-probabilities of order 1
                assert record[name] == pytest.approx(other[name], rel=1e-5, abs=5e-6), (stage, record["step"], name)
    for pair in ("pair_warm", "pair"):
        for file in ("av/model.safetensors", "ar/model.safetensors", "ar/value_head.safetensors"):
            close(load_file(found / pair / file), load_file(expected / pair / file), 1e-5)
    figures = [json.loads((folder / "summary.json").read_text()) for folder in (found, expected)]
    for values in figures:
        del values["seconds_by_stage"], values["seconds_probes"], values["logprob_gap_max"]
    close(*figures, 1e-5)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num_processes=2"], "do not name a host of a run: give HOST:PORT"),
        (["--coordinator=here:80", "--num_processes=2", "--process_id=2"], "do not name a host of a run"),
        (["--coordinator=auto", "--process_id=0"], "leave them out"),
        (["--workdir=s3://bucket/run"], "s3://bucket/run is neither a local path nor"),
    ],
)
def test_flags_that_name_no_host_or_folder(flags, message, capsys):
    assert main(["extract", *flags]) == 1
    assert message in said(capsys.readouterr().err)


@pytest.mark.parametrize("sizes", [(4, 1, 1), (1, 2, 2), (2, 1, 4)])
def test_rows_of_a_batch_go_to_the_host_and_back(sizes):
    mesh, array = make_mesh(*sizes), np.arange(40.0).reshape(20, 2)
    for rows in (np.array([7, 1, 19, 0, 3, 3, 2, 8]), np.array([5, 4, 6])):  # the second is not divided: replicated
        placed = place_batch(mesh, RowsOf(array, rows))
        assert placed.sharding == batch_sharding(mesh, (len(rows), 2)) and np.array_equal(placed, array[rows])
        numbers, values = local_rows(placed)
        assert np.array_equal(numbers, np.arange(len(rows))) and np.array_equal(values, array[rows])
        assert np.array_equal(place_local(placed.sharding, numbers, values[:, 0], len(rows)), array[rows, 0])


HASHING = """
import sys
from nla_jax.runtime import distributed
from nla_jax.io.hub import fingerprint
address, index, folder = sys.argv[1:]
distributed.join(address, 2, int(index))
print(fingerprint(folder))
distributed.leave()
"""


def test_only_the_first_host_reads_the_weights_for_their_hash(subject_folder):
    """The second one has no such folder."""
    command = [sys.executable, "-c", HASHING, free_address()]
    processes = [
        subprocess.Popen([*command, *arguments], cwd=Path(__file__).parent.parent, stdout=subprocess.PIPE, text=True)
        for arguments in (("0", str(subject_folder)), ("1", "not/here"))
    ]
    try:
        said = [process.communicate(timeout=120)[0].strip() for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert said == [fingerprint(subject_folder)] * 2


def test_two_hosts_equal_one(alone, settings, tmp_path):
    """From the corpus to the report. The first host alone speaks."""
    (first, told), (second, silent) = Hosts(2, "quickstart", tmp_path / "run", settings).finish()
    assert (first, second) == (0, 0), told + silent
    assert "Held-out FVE" in told and "done" not in silent
    same_run(tmp_path / "run", alone)
    assert not list(tmp_path.rglob("*.incomplete"))


def test_a_host_that_does_not_join(settings, tmp_path):
    hosts = Hosts(2, "extract", tmp_path / "run", [*settings, "--join_seconds=5"], of={1: None})
    [(status, output)] = hosts.finish(60)
    assert status == 1
    assert re.search(
        r"host 0 of 2 could not join the run at 127.0.0.1:\d+ within 5 s: not all hosts came", said(output)
    )


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--config.rl.group=2", r"Host 1 \(.+\) runs with rl.group = 2, but host 0 \(.+\) with 4"),
        ("--num_processes=3", r"Host 1 \(.+\) runs with --num_processes = 3, but host 0 \(.+\) with 2"),
    ],
)
def test_hosts_that_disagree(settings, tmp_path, flag, message):
    for status, output in Hosts(2, "extract", tmp_path / "run", settings, of={1: [flag]}).finish(120):
        assert status == 1 and re.search(message, said(output))
    assert not (tmp_path / "run").exists()


@pytest.mark.whole_run
def test_wrong_input_on_one_host_ends_all(settings, tmp_path):
    """The host that notices says what is wrong, and the other passes it on."""
    lines = [json.dumps({"id": f"document {i}", "text": f"{i} word " * 200}) + "\n" for i in range(40)]
    (tmp_path / "here.jsonl").write_text("".join(lines))
    settings = [*settings, "--config.corpus.source=here.jsonl"]
    hosts = Hosts(2, "extract", tmp_path / "run", settings, at={0: tmp_path, 1: tmp_path.parent})
    (first, passed_on), (second, noticed) = hosts.finish(120)
    assert (first, second) == (1, 1)
    assert "There is no corpus 'here.jsonl'" in said(noticed)
    assert f"host 0 of 2 stopped because host 1 did: {said(noticed).removeprefix('nla: ')}" in said(passed_on)


@pytest.mark.slow
def test_a_working_folder_that_is_not_shared(settings, tmp_path):
    hosts = Hosts(2, "extract", tmp_path / "run", settings, of={1: [f"--workdir={tmp_path / 'elsewhere'}"]})
    for status, output in hosts.finish(200):
        assert status == 1
        assert f"Host 1 does not find in {tmp_path / 'elsewhere'} what host 0 wrote there" in said(output)


ABORTED = """
import ctypes, signal, threading, time
from nla_jax.runtime import distributed

distributed._speak_when_aborted()
libc = ctypes.CDLL(None)
libc.signal(signal.SIGALRM, libc.abort)
threading.Thread(target=time.sleep, args=(99,), daemon=True).start()
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])  # another thread aborts
libc.alarm(1)
ctypes.PyDLL(None).sleep(99)  # without letting go of Python's lock
"""


def test_an_abort_waits_for_no_python_code():
    """JAX's runtime aborts in a thread of its own, while Python's lock may be held for ever."""
    process = subprocess.Popen([sys.executable, "-c", ABORTED], cwd=Path(__file__).parent.parent)
    assert process.wait(60) == -signal.SIGABRT


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_killing_a_host_ends_the_others_and_another_count_continues(alone, settings, tmp_path, victim):
    """`kill -9` amid RL; four hosts continue what two began, exactly."""
    workdir = tmp_path / "run"
    shutil.copytree(alone, workdir)
    for stage in ("rl", "evaluate", "report"):
        (workdir / "stages" / f"{stage}.json").unlink()
    for folder in ("train/rl", "pair", "evaluation"):
        shutil.rmtree(workdir / folder)
    hosts = Hosts(2, "quickstart", workdir, settings)
    hosts.wait_for("train/rl/checkpoints/1")
    hosts.processes[victim].send_signal(signal.SIGKILL)
    (status, output) = hosts.finish(60)[1 - victim]
    assert status == 1
    assert f"host {1 - victim} of 2 " in said(output) and "another host was lost" in said(output)
    assert not (workdir / "pair").exists()
    for status, output in Hosts(4, "quickstart", workdir, settings).finish(1200):
        assert status == 0, output
    same_run(workdir, alone)


@pytest.mark.slow
def test_four_hosts_equal_one(alone, settings, tmp_path):
    for status, output in Hosts(4, "quickstart", tmp_path / "run", settings).finish(1200):
        assert status == 0, output
    same_run(tmp_path / "run", alone)
