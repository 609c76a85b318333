"""What a run says about itself: texts beside the metrics, Weights & Biases, damaged logs, and the progress line."""

import json
import struct
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import one_sentence
from tensorboardX.proto.event_pb2 import Event

from nla_jax.runtime import metrics
from nla_jax.runtime.errors import InputError
from nla_jax.runtime.metrics import MetricLog, Progress, read_metrics

ROW = {"text": "<b>a *word*</b>\nand a line", "reward": np.float32(0.5), "fve": float("nan"), "valid": np.bool_(True)}


def events(folder: Path) -> list[tuple[int, str, object]]:
    """Step, name and value (a number or a text) of all that TensorBoard's files show, read without TensorBoard."""
    found = []
    for file in sorted(folder.glob("events*")):
        data = file.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            event, data = Event.FromString(data[12 : 12 + length]), data[16 + length :]
            for value in event.summary.value:
                text = [part.decode() for part in value.tensor.string_val]
                found.append((event.step, value.tag, text[0] if text else value.simple_value))
    return found


def test_texts_are_logged_dropped_on_resume_and_shown_as_they_are(tmp_path):
    log = MetricLog(tmp_path)
    for step in range(1, 5):
        log.write(step, {"loss": step})
        log.write_texts(step, [ROW, {"text": "Zürich", "reward": -2.0}])
    log.close()
    shown = [(step, value) for step, name, value in events(tmp_path / "tensorboard") if name.startswith("texts")]
    with open(tmp_path / "texts.jsonl", "a") as stream:
        stream.write('{"step": 5, "te')  # a kill in the midst of a line
    log = MetricLog(tmp_path, 2)
    log.write_texts(3, [{"text": "new"}])
    log.close()
    rows = [json.loads(line) for line in (tmp_path / "texts.jsonl").read_text().splitlines()]
    first = {"text": "<b>a *word*</b>\nand a line", "reward": 0.5, "fve": None, "valid": True}
    second = {"text": "Zürich", "reward": -2.0}
    expected = [{"step": step} | row for step in (1, 2) for row in (first, second)]
    assert rows == [*expected, {"step": 3, "text": "new"}]
    assert [record["step"] for record in log.records] == [1, 2]

    assert [step for step, _ in shown] == [1, 2, 3, 4]
    for _, text in shown:
        lines = text.splitlines()
        assert all(line.startswith("    ") for line in lines)  # a block of code in Markdown
        assert [json.loads(line) for line in lines] == [first, second] and "Zürich" in lines[1]


@pytest.mark.parametrize("damage", [b'{"step": 3, "lo', b'{"step": 3, "a": "\xff"}', b"null", b"{}", b"\x00\x00"])
def test_the_records_before_a_damaged_line_are_read(tmp_path, damage):
    whole = [{"step": 1, "loss": 0.5}, {"step": 2, "loss": None}]
    lines = b"".join(json.dumps(record).encode() + b"\n" for record in whole)
    (tmp_path / "metrics.jsonl").write_bytes(lines + damage)
    assert read_metrics(tmp_path / "metrics.jsonl") == whole
    (tmp_path / "metrics.jsonl").write_bytes(lines + damage + b'\n{"step": 4}\n')
    log = MetricLog(tmp_path, 9)
    log.close()
    assert log.records == whole and (tmp_path / "metrics.jsonl").read_bytes() == lines


def damages(content: bytes) -> list[bytes]:
    """A file's content with each of its bytes changed, and cut at each."""
    changed = [content[:i] + bytes([content[i] ^ 1 << i % 8]) + content[i + 1 :] for i in range(len(content))]
    return changed + [content[:i] for i in range(len(content))]


@pytest.mark.parametrize("name", ["metrics.jsonl", "texts.jsonl"])
def test_no_changed_byte_of_a_log_is_read(tmp_path, name):
    log = MetricLog(tmp_path)
    for step in (1, 2, 3):
        log.write(step, {"loss": step / 2})
        log.write_texts(step, [ROW])
    log.close()
    file, sums = tmp_path / name, tmp_path / f"{name}.crc32"
    whole, content, stated = read_metrics(file), file.read_bytes(), sums.read_bytes()
    assert len(whole) == 3
    for damaged in damages(content):
        file.write_bytes(damaged)
        with pytest.raises(InputError, match=f"{name} and {name}.crc32 beside it do not fit each other") as error:
            read_metrics(file)
        one_sentence(error)
    file.unlink()
    with pytest.raises(InputError, match="Delete both"):
        MetricLog(tmp_path, 3)
    file.write_bytes(content)
    for damaged in damages(stated):
        sums.write_bytes(damaged)
        try:
            assert read_metrics(file) == whole
        except InputError as error:
            assert damaged.count(b"\n") and "Delete both" in str(error)
    sums.unlink()  # as in runs of earlier releases
    MetricLog(tmp_path, 2).close()
    assert read_metrics(file) == whole[:2] and sums.read_bytes() == stated[:18]
    with open(file, "a") as stream:
        stream.write('{"step": 3}\n{"step": 4, "lo')  # kills between a line and its checksum, and within a line
    assert [record["step"] for record in read_metrics(file)] == [1, 2, 3]


# Weights & Biases: the real package, offline


def wandb_records(folder: Path) -> list:
    """All records that the package has left in its files (LevelDB's log format), in order of time."""
    from wandb.proto.wandb_internal_pb2 import Record

    found = []
    for file in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        data, at, piece = file.read_bytes(), 7, b""
        while at + 7 <= len(data):
            length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
            if kind == 0:  # the rest of a block is empty
                at += -at % 32768
                continue
            piece += data[at + 7 : at + 7 + length]
            at += 7 + length
            at += -at % 32768 if -at % 32768 < 7 else 0
            if kind in (1, 4):  # the last piece of a record
                found.append(Record.FromString(piece))
                piece = b""
    return found


def test_weights_and_biases_gets_numbers_texts_and_config(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "")
    settings, config = {"project": "nla", "name": "try", "mode": "offline"}, {"rl": {"steps": 3}}

    def logged(steps, done=0):
        log = MetricLog(tmp_path, done, wandb=settings, config=config)
        for step in steps:
            log.write(step, {"loss": np.float32(step) / 2, "worst": float("inf")})
            log.write_texts(step, [ROW])
        log.close()

    logged((1, 2))
    time.sleep(1.1)  # the files are named after the second
    logged((2, 3), done=1)  # a process that was killed in step 3, and resumes
    records, limit = [], time.monotonic() + 60
    while sum(record.HasField("exit") for record in records) < 2:  # a process of the package's own writes them
        assert time.monotonic() < limit
        time.sleep(0.1)
        records = wandb_records(tmp_path)
    runs = [record.run for record in records if record.HasField("run")]
    assert {(run.project, run.display_name) for run in runs} == {("nla", "try")}
    assert len({run.run_id for run in runs}) == 1  # both processes belong to one run
    assert json.loads(next(item.value_json for item in runs[0].config.update if item.key == "rl")) == {"steps": 3}
    history = []
    for record in records:
        if record.HasField("history"):
            items = {"".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
            history.append((record.history.step.num or items["_step"], items))
    assert [(step, items["loss"]) for step, items in history] == [(1, 0.5), (2, 1.0), (2, 1.0), (3, 1.5)]
    assert all("worst" not in items for _, items in history)
    [table, *_] = tmp_path.glob("wandb/offline-run-*/files/media/table/texts_1_*.table.json")
    content = json.loads(table.read_text())
    assert content == {"columns": list(ROW), "data": [["<b>a *word*</b>\nand a line", 0.5, None, True]]}


def test_weights_and_biases_is_asked_for_but_cannot_start(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    MetricLog(tmp_path / "none").close()  # nobody asks for it
    with pytest.raises(InputError, match=r"pip install 'nla_jax\[wandb\]'") as error:
        MetricLog(tmp_path / "a", wandb={"project": "nla"})
    one_sentence(error)
    monkeypatch.undo()
    for wrong in ({"project": "nla", "mode": "nowhere"}, {"projekt": "nla"}):
        with pytest.raises(InputError, match="Weights & Biases cannot start with") as error:
            MetricLog(tmp_path / "b", wandb=wrong)
        one_sentence(error)


# The progress line


class Terminal:
    """Standard error that keeps what is written; with a clock that stands."""

    def __init__(self, monkeypatch, terminal: bool):
        self.now, self.written = 1000.0, ""
        monkeypatch.setattr(metrics, "time", SimpleNamespace(monotonic=lambda: self.now))
        monkeypatch.setattr(sys, "stderr", self)
        self.isatty = lambda: terminal

    def write(self, text: str) -> None:
        self.written += text

    def flush(self) -> None:
        pass


def test_the_first_step_does_not_count_for_the_eta(monkeypatch):
    """It compiles: 500 seconds here, where the others take 2."""
    terminal = Terminal(monkeypatch, False)
    progress = Progress("rl", 100, done=40)
    terminal.now += 500
    progress.update(fve=0.25, reward=None)
    for _ in range(19):
        terminal.now += 2
        progress.update(fve=0.5)
    lines = terminal.written.splitlines()
    assert lines[0] == "       rl 41/100  ETA -:--  fve 0.25"
    assert lines[1] == "       rl 51/100  ETA 1:38  fve 0.5"  # one line in 20 seconds
    assert len(lines) == 2
    for _ in range(40):
        terminal.now += 2
        progress.update()
    progress.close()
    assert terminal.written.endswith("       rl 100/100  ETA 0:00\n")


def test_a_terminal_shows_one_line_within_its_width(monkeypatch):
    terminal = Terminal(monkeypatch, True)
    monkeypatch.setenv("COLUMNS", "30")
    progress = Progress("extract", 3)
    for _ in range(2):
        terminal.now += 7200
        progress.update(some_long_name=1.0)
    progress.close()
    first, second = terminal.written.split("\r\x1b[K")[1:]
    assert first == "  extract 1/3  ETA -:--  some"
    assert second == "  extract 2/3  ETA 2:00:00  s\n"
