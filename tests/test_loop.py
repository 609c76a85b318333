"""The whole loop on a tiny config, as a user runs it: results, and what wrong input is answered with."""

import dataclasses
import json
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from conftest import (
    CONFIG,
    LOOP,
    SPLITS,
    close,
    copy_before,
    history,
    nla_main,
    one_line,
    same_run,
    weights,
)
from safetensors.numpy import load_file

import nla_jax as nla
import nla_jax.pair
from nla_jax.cli import main
from nla_jax.data.corpus import Document, split_of
from nla_jax.data.rows import load_rows
from nla_jax.labels.extractive import label_one
from nla_jax.models.lora import Lora
from nla_jax.pair import new_pair


def test_summary_report_and_pair(finished):
    summary = json.loads((finished / "summary.json").read_text())
    for name in [
        "fve_warm",
        "fve_rl",
        "fve_gold_text",
        "fve_shuffled",
        "fve_empty",
        "fve_no_injection",
        "cos_rl",
        "extraction_rate",
        "mean_length",
        "logprob_gap_max",
        "subject_loss",
        "bigram_loss",
        "heldout_documents",
        "heldout_rows",
    ]:
        assert np.isfinite(summary[name]), name
    assert summary["fve_rl_ci95"][0] <= summary["fve_rl"] <= summary["fve_rl_ci95"][1] <= 1
    assert summary["logprob_gap_max"] < 1e-4
    assert set(summary["seconds_by_stage"]) == set(LOOP) - {"report"}
    record, config = (json.loads((finished / name).read_text()) for name in ("stages/evaluate.json", "config.json"))
    seconds = record["result"]["seconds_by_probe"]
    assert list(seconds) == [path.rpartition(":")[2] for path in config["evaluate"]["probes"]]
    assert 0 < sum(seconds.values()) <= record["seconds"] and all(value >= 0 for value in seconds.values())
    page = (finished / "report.html").read_text()
    assert "Seconds of each probe" in page
    rows = load_rows(finished, "heldout")
    assert any(id in page for id in rows.column("doc_id"))
    assert "http://" not in page.replace("http://www.w3.org", "") and "src=" not in page
    assert [r["step"] for r in history(finished)] == [1, 2, 3, 4]
    assert not list(finished.rglob("*.incomplete"))


def test_a_run_that_never_extracts_has_a_banner(finished, corpus, capsys):
    """On the page, and in the terminal of the command that ends it."""
    said = json.loads((finished / "stages/report.json").read_text())["result"]["warnings"]
    assert said[0].startswith("Only 0.0 % of the responses hold an explanation")
    assert any(sentence.startswith("No control scores lower") for sentence in said)
    capsys.readouterr()
    assert nla_main("quickstart", finished, corpus) == 0
    out, page = capsys.readouterr().out, (finished / "report.html").read_text()
    assert all(f"WARNING: {sentence}" in out and sentence in page for sentence in said)


@pytest.mark.slow
@pytest.mark.whole_run
def test_bfloat16_with_rematerialisation(corpus, tmp_path):
    """The precision of accelerators: bfloat16 compute over float32 parameters, activations recomputed."""
    flags = ["--config.compute.dtype=bfloat16", "--config.compute.remat=nothing_saveable"]
    assert nla_main("quickstart", tmp_path / "run", corpus, *flags) == 0
    steps = history(tmp_path / "run")
    assert all(np.isfinite(r["fve"]) and not r["skipped"] and r["logprob_gap_max"] < 0.1 for r in steps)
    assert all(value.dtype == np.float32 for value in weights(tmp_path / "run").values())


def test_splits_share_no_document(finished):
    documents = [set(load_rows(finished, split).column("doc_id")) for split in SPLITS]
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
    flags = [
        "explain",
        "--pair",
        str(finished / "pair"),
        "--text",
        "The import statement finds",
        "--max-new-tokens",
        "8",
    ]
    assert main([*flags, "--tokens", "all", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert "".join(row["token"] for row in rows) == "The import statement finds"
    scored = [row for row in rows if row["explanation"]]  # an AV that has learnt little may write none
    assert all(-1 <= row["cosine"] <= 1 and row["fve"] <= 1 for row in scored)
    assert main(flags) == 0
    assert ("FVE" in capsys.readouterr().out) is bool(rows[-1]["explanation"])


def test_a_second_run_changes_nothing(finished, corpus, capsys):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*.*")}
    assert nla_main("quickstart", finished, corpus) == 0
    assert capsys.readouterr().err.count("already done") == len(LOOP)
    assert nla_main("sft", finished, corpus, "--config.sft.av.optimizer.lr=0.5") == 1
    assert "made with other settings" in one_line(capsys)
    assert before == {path: path.stat().st_mtime_ns for path in finished.rglob("*.*")}


@pytest.mark.whole_run
def test_evaluation_on_a_mesh_is_that_on_one_device(finished, corpus, tmp_path, monkeypatch):
    """Each pair is laid out for decoding once, whatever the conditions and batches."""
    workdir, laid_out = copy_before(finished, tmp_path, "evaluate"), []
    original = nla_jax.pair.decoding_layout
    monkeypatch.setattr(nla_jax.pair, "decoding_layout", lambda *args: laid_out.append(args) or original(*args))
    sizes = ["--config.mesh.data=2", "--config.mesh.fsdp=4"]
    assert nla_main("evaluate", workdir, corpus, *sizes, "--config.evaluate.batch=8") == 0
    assert len(laid_out) == 2
    read = lambda folder: json.loads((folder / "stages/evaluate.json").read_text())["result"]["summary"]
    close(read(workdir), read(finished), 1e-4)


@pytest.mark.whole_run
def test_functions_of_the_user_are_found_where_the_command_runs(finished, corpus, tmp_path, monkeypatch, capsys):
    """An injection and a reward in a file of the current folder, through training, evaluation and use."""
    code = "def half(states, vectors, scale):\n    return (states + vectors) / 2\n\n\ndef short(s):\n    return -s.mse - 0.1 * s.length\n"
    (tmp_path / "of_mine.py").write_text(code)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path)
    workdir = copy_before(finished, tmp_path, "sft")
    flags = ["--config.prompts.inject=of_mine:half", "--config.rl.reward=of_mine:short", "--config.rl.steps=1"]
    for verb in ("sft", "rl", "evaluate"):
        assert nla_main(verb, workdir, corpus, *flags) == 0
    assert (workdir / "evaluation.json").is_file()
    explain = ["explain", "--pair", str(workdir / "pair"), "--text", "The import statement"]
    capsys.readouterr()
    assert main(explain) == 1 and "--injection" in one_line(capsys)
    assert main([*explain, "--injection", "of_mine:half"]) == 0
    assert main(["export", "--workdir", str(workdir), "--out", "out", "--injection", "of_mine:half"]) == 0


def test_the_subject_must_not_change_behind_the_extraction(finished, corpus, tmp_path, capsys):
    workdir = copy_before(finished, tmp_path, "sft")
    record = json.loads((workdir / "stages/extract.json").read_text())
    record["result"]["base_hash"] = "another"
    del record["checksum"]
    (workdir / "stages/extract.json").write_text(json.dumps(record))
    assert nla_main("sft", workdir, corpus) == 1
    assert "has changed since its activations were extracted (hash another then" in one_line(capsys)


# Files of others in and out


@pytest.fixture(scope="module")
def exported(finished, tmp_path_factory) -> Path:
    """The finished run's pair and datasets in the reference's form."""
    out = tmp_path_factory.mktemp("exported") / "out"
    assert main(["export", "--workdir", str(finished), "--out", str(out)]) == 0
    return out


class Uncalled:
    """A labeller for rows that have labels already."""

    def label(self, rows):
        raise AssertionError("rows with labels need none")


def sources(folder: Path, splits=SPLITS) -> list[str]:
    return [f"--config.extract.source.{split}={folder / split}.parquet" for split in splits]


@pytest.mark.whole_run
@pytest.mark.slow
def test_a_run_from_exported_datasets_is_the_run_itself(finished, exported, corpus, tmp_path, capsys):
    """Vectors and labels from the files give the same models bit for bit; without texts, examples have none."""
    for split in SPLITS:
        table = pq.read_table(exported / f"datasets/{split}.parquet").drop_columns("detokenized_text_truncated")
        pq.write_table(table, tmp_path / f"{split}.parquet")
        meta = f"{split}.parquet.nla_meta.yaml"
        shutil.copy(exported / "datasets" / meta, tmp_path / meta)
    flags = [f"--config.subject.path={finished}/subject", "--config.label.labeller=test_loop:Uncalled"]  # is not called
    assert nla_main("quickstart", tmp_path / "run", corpus, *flags, *sources(tmp_path)) == 0
    assert "was made for the prompt" not in capsys.readouterr().err
    same_run(finished, tmp_path / "run")
    before, after = (json.loads((folder / "evaluation.json").read_text()) for folder in (finished, tmp_path / "run"))
    lacking = {"tokens", "beyond_tokens", "by_place", "truth", "claimed"}  # of token ids, texts or a grammar
    ours, theirs = ([p for p in page["probes"] if p["name"] not in lacking] for page in (before, after))
    assert ours == theirs and len(ours) > 15
    for old, new in zip(before["examples"], after["examples"]):
        assert old["context"] and new == old | {"context": "", "token": "", "after": "", "kinds": []}
    assert (tmp_path / "run/report.html").stat().st_size > 10_000

    other = copy_before(tmp_path / "run", tmp_path, "sft")
    flags.append("--config.prompts.verbalizer_template=Say what {injection_char} is")
    assert nla_main("sft", other, corpus, *flags, *sources(tmp_path)) == 0
    said = "av_sft was made for the prompt 'Explain this activation: {injection_char}'; this pair is trained with"
    assert said in capsys.readouterr().err


def test_files_without_heldout_or_labels(finished, exported, corpus, tmp_path, capsys):
    """Held-out documents leave `rl` by the hash of their ids; they are labelled from their texts."""
    flags = [f"--config.subject.path={finished}/subject", *sources(exported / "datasets", SPLITS[:3])]
    flags += ["--config.split.rl=0.1", "--config.split.heldout=0.3"]
    assert nla_main("extract", tmp_path / "run", corpus, *flags) == 0
    assert nla_main("label", tmp_path / "run", corpus, *flags) == 0
    rl, heldout = (set(load_rows(tmp_path / "run", split).column("doc_id")) for split in ("rl", "heldout"))
    assert rl and heldout and rl | heldout == set(load_rows(finished, "rl").column("doc_id")) and not rl & heldout
    fractions = {"av_sft": 0.4, "ar_sft": 0.2, "rl": 0.1, "heldout": 0.3}
    assert heldout == {id for id in rl | heldout if split_of(Document(id, ""), fractions) == "heldout"}
    rows = load_rows(tmp_path / "run", "heldout")
    assert rows.column("api_explanation") == [label_one(text) for text in rows.column("detokenized_text_truncated")]

    table = pq.read_table(exported / "datasets/rl.parquet")
    pq.write_table(table.drop_columns("detokenized_text_truncated"), tmp_path / "rl.parquet")
    flags.append(f"--config.extract.source.rl={tmp_path}/rl.parquet")
    assert nla_main("extract", tmp_path / "bare", corpus, *flags) == 0
    assert nla_main("label", tmp_path / "bare", corpus, *flags) == 1
    assert "has neither api_explanation nor detokenized_text_truncated" in one_line(capsys)


def test_exported_pairs_load_and_come_back(finished, exported, tmp_path, capsys):
    assert sorted(path.name for path in exported.iterdir()) == ["README.md", "ar", "av", "datasets"]
    folder = tmp_path / "second"
    flags = ["import", "--av", str(exported / "av"), "--ar", str(exported / "ar"), "--out", str(folder)]
    assert main([*flags, "--injection", "norm_matched_addition", "--injection-block", "1"]) == 0
    assert f"{folder}/av: " in capsys.readouterr().out
    (tmp_path / "run").mkdir()
    shutil.copytree(folder, tmp_path / "run/pair")
    first, second = weights(finished), weights(tmp_path / "run")
    assert first.keys() == second.keys() and all(np.array_equal(first[name], second[name]) for name in first)
    meta = yaml.safe_load((folder / "av/nla_meta.yaml").read_text())
    method, block = (meta["extraction"][f"injection_{name}"] for name in ("method", "block"))
    assert (method, block) == ("norm_matched_addition", 1)

    out = tmp_path / "half"
    assert main(["export", "--pair", str(finished / "pair"), "--out", str(out), "--dtype", "bfloat16"]) == 0
    assert capsys.readouterr().out.splitlines()[0].startswith(f"{out}/ar: ")
    assert {value.dtype.name for value in load_file(out / "av/model.safetensors").values()} == {"bfloat16"}
    assert load_file(out / "ar/value_head.safetensors")["weight"].dtype == np.float32


def test_an_imported_pair_gets_a_complete_sidecar(exported, tmp_path):
    """Older sidecars and those of others do not name the tokens of the AR's suffix."""
    for role in ("av", "ar"):
        shutil.copytree(exported / role, tmp_path / role)
        file = tmp_path / role / "nla_meta.yaml"
        meta = yaml.safe_load(file.read_text())
        expected = meta["tokens"].pop("critic_suffix_ids")
        file.write_text(yaml.safe_dump(meta))
    out = tmp_path / "out"
    assert main(["import", "--av", f"{tmp_path}/av", "--ar", f"{tmp_path}/ar", "--out", str(out)]) == 0
    for role in ("av", "ar"):
        meta = yaml.safe_load((out / role / "nla_meta.yaml").read_text())
        assert meta["tokens"]["critic_suffix_ids"] == expected


def test_adapters_are_exported_merged_or_as_they_are(subject_folder, sidecar, tmp_path):
    sidecar, lora = dataclasses.replace(sidecar, base_checkpoint=str(subject_folder)), Lora(2, 4.0)
    pair = new_pair(sidecar, subject_folder, adapters=(lora, lora))
    noise = lambda x: x + np.random.default_rng(0).normal(0, 0.1, x.shape).astype(np.float32)
    pair = dataclasses.replace(pair, verbalizer_params=jax.tree.map(noise, pair.verbalizer_params))
    pair.save(tmp_path / "pair")
    for flags, adapters in (([], False), (["--adapters"], True)):
        out = tmp_path / f"out{adapters}"
        assert main(["export", "--pair", str(tmp_path / "pair"), "--out", str(out), *flags]) == 0
        assert (out / "av/adapter_config.json").is_file() is adapters is not (out / "av/config.json").is_file()
        close(nla.load_pair(out).merged().weights, pair.merged().weights, 1e-6)


def test_help_needs_no_config(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for arguments, words in (
        (["--help"], [*LOOP, "explain", "export", "import"]),
        (["export", "--help"], ["--pair", "--workdir", "--out", "--dtype", "--adapters"]),
        (["import", "--help"], ["--av", "--ar", "--base", "--injection", "--injection-block", "--out"]),
    ):
        with pytest.raises(SystemExit) as exit:
            main(arguments)
        assert exit.value.code == 0
        found = capsys.readouterr().out
        assert all(word in found for word in words)
    with pytest.raises(SystemExit) as exit:
        main(["export", "--pair", "a", "--workdir", "b", "--out", "c"])
    assert exit.value.code == 2


def test_the_subject_must_be_the_pairs(finished, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(finished / "pair_warm/av", other)
    assert main(["explain", "--pair", str(finished / "pair"), "--text", "x", "--subject", str(other)]) == 1
    assert "not the subject" in one_line(capsys)


def test_devices_without_memory_are_one_sentence(corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("nla_jax.stages.rl.rl", lambda run: jnp.zeros(1 << 46).block_until_ready())
    assert nla_main("rl", tmp_path, corpus) == 1
    said = one_line(capsys)
    assert "memory does not hold rl (RESOURCE_EXHAUSTED: Out of memory allocating" in said and "micro_batches" in said
    monkeypatch.setattr("nla_jax.stages.rl.rl", lambda run: np.zeros(1 << 52))  # nor does the host's
    assert nla_main("rl", tmp_path, corpus) == 1
    assert "The host's memory does not hold rl (Unable to allocate 32" in one_line(capsys)


WRONG = {
    "no such config": (["extract", "--config", "nowhere.py"], "no config file nowhere.py"),
    "unknown variant": (["extract", "--config", CONFIG.replace("tiny", "huge")], "no variant 'huge'"),
    "unknown field": (["extract", "--config.rl.stepz=3"], "stepz"),
    "wrong type": (["extract", "--config.rl.steps=many"], "steps"),
    "field of its own": (
        ["rl", "--workdir={warmed}", "--config.rl.av_optimizer.b3=0.9"],
        "unexpected keyword argument 'b3'",
    ),
    "config with an error": (["extract", "--config", "{broken}"], "SyntaxError"),
    "config without get_config": (["extract", "--config", "{bare}"], "it has no function get_config"),
    "empty split": (
        ["extract", "--config.corpus.max_documents=2", "--config.subject.path={subject}"],
        "documents falls into split",
    ),
    "no tokens to write": (["explain", "--pair", "{run}/pair", "--text", "x", "--max-new-tokens", "0"], "1 or more"),
    "base of no adapters": (
        ["import", "--av", "{run}/pair/av", "--ar", "{run}/pair/ar", "--base", "{subject}", "--out", "{new}"],
        "--base names the base model of adapters",
    ),
    "unknown flag": (["extract", "--stepz=3"], "--stepz=3"),
    "verb too early": (["rl"], "nla sft"),
    "no such corpus": (["pretrain", "--config.corpus.source=nowhere.jsonl"], "nowhere.jsonl"),
    "documents too short": (["pretrain", "--config.corpus.min_chars=100000"], "min_chars|short"),
    "no such subject": (["extract", "--config.subject.path=nowhere"], "no model folder nowhere"),
    "wrong layer": (
        ["extract", "--config.subject.path={subject}", "--config.subject.layer=3"],
        "Layer 3 does not exist",
    ),
    "positions beyond every document": (
        ["extract", "--config.subject.path={subject}", "--config.extract.min_position=5000"],
        "min_position = 5000",
    ),
    "no such label function": (
        ["label", "--config.label.labeller=nowhere:f", "--workdir={labelled}"],
        "label.labeller names the module 'nowhere', which cannot be found",
    ),
    "marker of several tokens": (["sft", "--config.prompts.marker=marker", "--workdir={warm}"], "'marker'"),
    "two markers": (
        ["sft", "--config.prompts.verbalizer_template={{injection_char}} or {{injection_char}}", "--workdir={warm}"],
        "holds {injection_char} 2 times",
    ),
    "mesh too large": (["sft", "--config.mesh.data=64", "--workdir={warm}"], "64 devices"),
    "no pair": (["explain", "--pair", "nowhere", "--text", "x"], "nowhere"),
    "no text": (["explain", "--pair", "{run}/pair", "--text", " "], "no text"),
    "no such token": (["explain", "--pair", "{run}/pair", "--text", "one", "--tokens", "999"], "Position 999"),
    "only some sources": (
        ["extract", "--config.subject.path={subject}", "--config.extract.source.rl=x"],
        "extract.source.av_sft is empty",
    ),
    "data of another subject": (
        ["extract", "--config.subject.path={run}/pair_warm/av", *sources(Path("{exported}/datasets"))],
        "base_model is 'subject', expected 'av'",
    ),
    "data of another layer": (
        [
            "extract",
            "--config.subject.path={subject}",
            "--config.subject.layer=0",
            *sources(Path("{exported}/datasets")),
        ],
        "layer_index is 1, expected 0; set subject.layer",
    ),
    "heldout in training": (
        [
            "extract",
            "--config.subject.path={subject}",
            *sources(Path("{exported}/datasets"), SPLITS[:3]),
            "--config.extract.source.heldout={exported}/datasets/rl.parquet",
        ],
        "must not be trained on",
    ),
    "export of no pair": (["export", "--pair", "nowhere", "--out", "{new}"], "nowhere is not a pair"),
    "export of no run": (
        ["export", "--workdir", "nowhere", "--out", "{new}"],
        "nowhere holds no trained pair; run `nla rl`",
    ),
    "export over files": (["export", "--pair", "{run}/pair", "--out", "{run}"], "is not an empty folder"),
    "export to a file": (["export", "--pair", "{run}/pair", "--out", "{run}/summary.json"], "is not an empty folder"),
    "export of no adapters": (["export", "--pair", "{run}/pair", "--out", "{new}", "--adapters"], "no LoRA adapters"),
    "export with a config": (
        ["export", "--pair", "{run}/pair", "--out", "{new}", "--config.seed=1"],
        "--config.seed=1",
    ),
    "import of nothing": (
        ["import", "--av", "nowhere", "--ar", "nowhere", "--out", "{new}"],
        "no model folder nowhere",
    ),
    "import swapped": (
        ["import", "--av", "{run}/pair/ar", "--ar", "{run}/pair/av", "--out", "{new}"],
        "were the AV and AR",
    ),
    "import over files": (
        ["import", "--av", "{run}/pair/av", "--ar", "{run}/pair/ar", "--out", "{run}"],
        "is not an empty folder",
    ),
    "unknown injection": (
        ["import", "--av", "{run}/pair/av", "--ar", "{run}/pair/ar", "--out", "{new}", "--injection", "add"],
        "replace, norm_matched_addition or a function's package.module:function; found 'add'",
    ),
    "block without injection": (
        ["import", "--av", "{run}/pair/av", "--ar", "{run}/pair/ar", "--out", "{new}", "--injection-block", "1"],
        "give --injection too",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_gets_one_sentence(case, finished, exported, corpus, tmp_path, capsys):
    arguments, message = WRONG[case]
    text = " ".join(arguments)
    places = {"subject": finished / "subject", "run": finished, "exported": exported, "new": tmp_path / "new"}
    places["broken"] = tmp_path / "broken.py"
    places["broken"].write_text("def get_config(:\n")
    places["bare"] = tmp_path / "bare.py"
    places["bare"].write_text("steps = 1\n")
    if "{labelled}" in text:
        places["labelled"] = copy_before(finished, tmp_path, "label")
        shutil.rmtree(places["labelled"] / "labels")
    if "{warm}" in text:
        places["warm"] = copy_before(finished, tmp_path, "sft")
    if "{warmed}" in text:
        places["warmed"] = copy_before(finished, tmp_path, "rl")
    arguments = [argument.format(**places) for argument in arguments]
    if arguments[0] in LOOP:
        for flag, value in (
            ("--config", CONFIG),
            ("--workdir", str(tmp_path / "work")),
            ("--config.corpus.source", str(corpus)),
        ):
            if not any(argument.partition("=")[0] == flag for argument in arguments):
                arguments.append(f"{flag}={value}")
    capsys.readouterr()
    assert main(arguments) == 1
    found = one_line(capsys)
    assert not (tmp_path / "new").exists()
    assert any(part in found for part in message.split("|")), found
