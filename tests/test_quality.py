"""Quality per minute: what runs record of it, and what `nla benchmark quality` makes of the records."""

import json
import zlib

import pytest
from conftest import CONFIG, one_line

import nla_jax.runtime.run as run_module
from nla_jax.cli import load_config, main
from nla_jax.data.rows import LABEL, load_rows
from nla_jax.pair import load_pair
from nla_jax.runtime.metrics import read_metrics
from nla_jax.runtime.run import Run
from nla_jax.stages import heldout
from nla_jax.stages.table import STAGES
from nla_jax.tools.benchmark.quality import compare, curve_of
from nla_jax.tools.benchmark.quality_page import shown_names

SUMMARY = {"fve_warm": 0.1, "passage_true_warm": 0.8, "position_true_warm": 0.6, "passage_true_after_rl": 0.1}


def write_run(folder, records, sft=(100.0, 150.0), rl=(60.0, 90.0), summary=SUMMARY, finished=True):
    """A working folder with the records that a comparison reads. `sft`, `rl`: seconds and seconds of computing."""
    (folder / "stages").mkdir(parents=True)
    (folder / "train/rl").mkdir(parents=True)
    for stage, spent in (("sft", sft), ("rl", rl)):
        record = {"basis": {}, "seconds": spent[0], "made": {"commit": "abc"}}
        record |= {"cpu_seconds": spent[1]} if len(spent) > 1 else {}
        record |= {"result": {}} if stage == "sft" or finished else {}
        (folder / "stages" / f"{stage}.json").write_text(json.dumps(record))
    if summary:
        record = {"basis": {}, "seconds": 9, "result": {"summary": summary}}
        (folder / "stages/evaluate.json").write_text(json.dumps(record))
    lines = [json.dumps(record) + "\n" for record in records]
    (folder / "train/rl/metrics.jsonl").write_text("".join(lines))
    (folder / "train/rl/metrics.jsonl.crc32").write_text("".join(f"{zlib.crc32(x.encode()):08x}\n" for x in lines))
    return str(folder)


def step(number, seconds, computing, **measures):
    return {"step": number, "seconds_so_far": seconds, "cpu_seconds_so_far": computing} | measures


RECORDS = [
    step(1, 10.0, 20.0),
    step(2, 20.0, 30.0, heldout_fve=0.3, heldout_true=0.6, heldout_length=20.0),
    step(3, 30.0, 40.0, **{"heldout_fve": None, "probe/fve_rl_frozen": 0.9}),
    step(
        4, 40.0, 70.0, **{"heldout_fve": 0.5, "heldout_true": 0.7, "heldout_length": 10.0, "probe/fve_rl_frozen": 0.4}
    ),
]


def test_times_and_measures_lie_on_straight_lines_between_the_measurements(tmp_path):
    """From the start of sft: 100 seconds of it, and RL's own. A step that measured nothing is no point of the curve."""
    curve = curve_of(write_run(tmp_path / "a", RECORDS))
    assert [(p["step"], p["seconds"], p["cpu_seconds"]) for p in curve.points] == [
        (0, 100.0, 150.0),
        (2, 120.0, 180.0),
        (4, 140.0, 220.0),
    ]
    assert [p["true"] for p in curve.points] == pytest.approx([0.7, 0.6, 0.7])
    assert [p["fve_frozen"] for p in curve.points] == [0.1, None, 0.4] and not curve.estimated
    assert curve.whole == {"seconds": 160.0, "cpu_seconds": 240.0}
    at = compare([curve], 0.4)["runs"][0]["reached"]  # half the way from 0.3 to 0.5
    assert at == pytest.approx(
        {"step": 4, "seconds": 130.0, "cpu_seconds": 200.0, "fve_frozen": None, "true": 0.65, "length": 15.0}
    )
    at = compare([curve], 0.15)["runs"][0]["reached"]  # a quarter of the way from the warm start
    assert (at["step"], at["seconds"]) == (2, pytest.approx(105.0))


def test_what_a_run_has_from_its_first_point_or_never_reaches(tmp_path):
    curve = curve_of(write_run(tmp_path / "a", RECORDS))
    start = compare([curve], 0.05)["runs"][0]["reached"]
    assert (start["step"], start["seconds"], start["true"]) == (0, 100.0, pytest.approx(0.7))
    never = compare([curve], 0.6)["runs"][0]
    assert never["reached"] is None and never["ratio"] == {"seconds": None, "cpu_seconds": None}
    assert never["best_fve"] == 0.5


def test_the_ratio_to_the_first_run(tmp_path):
    """By default the quality is the highest that all of them reach. A fall behind it takes nothing back."""
    faster = [step(2, 20.0, 10.0, heldout_fve=0.7), step(4, 40.0, 20.0, heldout_fve=0.2)]
    folders = [
        write_run(tmp_path / "a", RECORDS),
        write_run(tmp_path / "b", faster, sft=(20.0, 30.0), summary={}, finished=False),
    ]
    report = compare([curve_of(folder) for folder in folders])
    first, second = report["runs"]
    assert report["fve"] == 0.5 and first["ratio"] == {"seconds": 1.0, "cpu_seconds": 1.0}
    assert second["reached"]["step"] == 2 and second["ratio"] == pytest.approx(
        {"seconds": 40 / 140, "cpu_seconds": 40 / 220}
    )
    assert second["true_at_start"] is None and second["whole"] == {}


def test_older_builds_recorded_no_times_of_steps(tmp_path):
    """A step of theirs has the share of the stage that it has of all steps' phases."""
    phases = lambda rollout, train: {"seconds_rollout": rollout, "seconds_host": 0.5, "seconds_train": train}
    records = [
        {"step": 1, **phases(4.0, 1.5), "heldout_fve": 0.2},
        {"step": 2, **phases(1.0, 0.5), "heldout_fve": 0.4},
    ]
    curve = curve_of(write_run(tmp_path / "a", records, sft=(100.0,), rl=(16.0,), summary={}))
    assert curve.estimated and [p["seconds"] for p in curve.points] == pytest.approx([112.0, 116.0])
    assert [p["cpu_seconds"] for p in curve.points] == [None, None]
    assert curve.whole == {"seconds": 116.0, "cpu_seconds": None}


def test_the_command_prints_json_says_it_in_words_and_draws_a_chart(tmp_path, capsys):
    hostile = "<b>&run"
    folders = [write_run(tmp_path / "a/run", RECORDS), write_run(tmp_path / hostile / "run", RECORDS, sft=(50.0, 75.0))]
    flags = ["--fve", "0.4", "--out", str(tmp_path / "quality.html")]
    assert main(["benchmark", "quality", "--workdir", *folders, *flags]) == 0
    out, err = capsys.readouterr()
    report, page = json.loads(out), (tmp_path / "quality.html").read_text()
    assert [run["reached"]["seconds"] for run in report["runs"]] == pytest.approx([130.0, 80.0])
    assert report["command"].startswith("nla benchmark quality") and report["runs"][1]["made"]["commit"] == "abc"
    assert "80 s, 0.615 times the first's, by step 4 of RL" in err and "65.0 % of the claims hold" in err
    assert "FVE 0.400" in page and "&lt;b&gt;&amp;run/run" in page and "<b>" not in page and "<script" not in page
    assert page.count("<figure>") == 5 and "0.615" in page  # FVE against both clocks, frozen critic, truth, length


def test_runs_are_called_by_what_tells_them_apart():
    assert shown_names(["runs/a/", "runs/b"]) == ["a", "b"]
    assert shown_names(["old/run", "new/run"]) == ["old/run", "new/run"]
    assert shown_names(["run", "run"]) == ["run", "run"]


@pytest.mark.parametrize(
    "flags, said",
    [
        ([], "needs --workdir"),
        (["--workdir", "RUN", "--fve", "nan"], "--fve is nan"),
        (["--workdir", "nowhere"], "nowhere holds no finished 'sft' stage"),
        (["--workdir", "EMPTY"], "has measured nothing on held-out rows"),
        (["--workdir", "DAMAGED"], "damaged"),
    ],
)
def test_wrong_input_is_one_sentence(tmp_path, capsys, flags, said):
    write_run(tmp_path / "RUN", RECORDS)
    write_run(tmp_path / "EMPTY", RECORDS[:1])
    write_run(tmp_path / "DAMAGED", RECORDS)
    (tmp_path / "DAMAGED/stages/rl.json").write_text("{")
    flags = [str(tmp_path / flag) if flag.isupper() else flag for flag in flags]
    assert main(["benchmark", "quality", *flags]) == 1
    assert said in one_line(capsys)


def test_flags_of_quality_are_refused_where_a_program_is_timed(capsys):
    assert main(["benchmark", "rl", "--fve", "0.4"]) == 1
    assert "--fve belongs to `nla benchmark quality`" in one_line(capsys)


# What runs record


def test_a_stage_counts_all_processes_that_worked_on_it(tmp_path, monkeypatch):
    """One that was stopped has recorded its time; of one that was killed the time of its last step is known."""
    now = 1000.0
    monkeypatch.setattr(run_module, "clocks", lambda: {"seconds": now, "cpu_seconds": now / 2})
    start = lambda: Run(load_config(CONFIG, []), tmp_path, STAGES)
    recorded = lambda: json.loads((tmp_path / "stages/sft.json").read_text())
    run = start()
    with pytest.raises(KeyboardInterrupt), run.stage("sft"):
        now += 10
        assert run.spent() == {"seconds": 10.0, "cpu_seconds": 5.0}
        raise KeyboardInterrupt
    assert (recorded()["seconds"], recorded()["cpu_seconds"]) == (10.0, 5.0)
    now += 100  # in which nothing runs
    run = start()
    with run.stage("sft"):
        now += 2
        assert run.spent() == {"seconds": 12.0, "cpu_seconds": 6.0}
        run.spent_at_least({"seconds": 30.0, "cpu_seconds": 4.0})
        now += 1
        assert run.spent() == {"seconds": 31.0, "cpu_seconds": 6.5}
    assert (recorded()["seconds"], recorded()["cpu_seconds"]) == (31.0, 6.5)


def test_rl_records_time_and_what_its_held_out_texts_are(finished):
    records = read_metrics(finished / "train/rl/metrics.jsonl")
    times = [record["seconds_so_far"] for record in records]
    whole = json.loads((finished / "stages/rl.json").read_text())
    assert times[0] > 0 and times == sorted(times) and times[-1] <= whole["seconds"] + 0.01
    assert records[-1]["cpu_seconds_so_far"] <= whole["cpu_seconds"] + 0.01
    assert [record["step"] for record in records if "heldout_length" in record] == [2, 4]
    assert curve_of(str(finished)).points[-1]["fve"] == records[-1]["heldout_fve"]


def test_held_out_truth_is_the_mean_over_kinds_of_claims(finished, monkeypatch):
    """Labels are true. Of two rows' texts one names another passage: of all kinds of claims one is then half true."""
    labels = load_rows(finished, "heldout").column(LABEL)
    run = Run(load_config(str(finished / "config.json"), ["--config.rl.heldout_rows=2"]), finished, STAGES)
    measured, pair = heldout.Heldout(run), load_pair(finished / "pair/av", finished / "pair/ar")
    texts = [labels[i] for i in measured.context.rows.at]
    monkeypatch.setattr(heldout, "fve_of", lambda *_: 0.25)
    monkeypatch.setattr(heldout, "explained", lambda *_: texts)
    assert measured.measure(pair)["heldout_true"] == 1 and measured.measure(pair)["heldout_fve"] == 0.25
    texts[0] = "A table" + texts[0][texts[0].index(".") :]
    kinds = len({claim.kind for text in texts for claim in measured.context.labeller.claims(text)})
    assert measured.measure(pair)["heldout_true"] == pytest.approx((0.5 + kinds - 1) / kinds)
    texts[:] = ["", ""]
    found = measured.measure(pair)
    assert found["heldout_length"] == 0 and "heldout_true" not in found


def test_truth_is_measured_only_where_the_text_alone_decides(finished):
    """A labeller that asks the subject, or that has no grammar, would make each measurement dear, or has none."""
    for labeller in ("nla_jax.labels.behaviour:Behaviour", "nla_jax.labels.file:File"):
        flags = [f"--config.label.labeller={labeller}"]
        run = Run(load_config(str(finished / "config.json"), flags), finished, STAGES)
        assert heldout.Heldout(run).rows == []
