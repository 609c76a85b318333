"""`nla probe` and `nla_jax.probe`: any pair on texts, and a finished run without its evaluation."""

import importlib
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import SENTENCES, copy_before, nla_main, one_line
from fake_llm import FakeLLM

import nla_jax as nla
from nla_jax.cli import main
from nla_jax.config import Evaluate
from nla_jax.data.corpus import Document
from nla_jax.labels.asking import Question
from nla_jax.probes.probe import Probe, asks, clustered_interval, probe
from nla_jax.probes.retrieval import hits
from nla_jax.probes.writing import RATED
from nla_jax.runtime.errors import InputError
from nla_jax.tools.probe import PairContext, activations_of

FIDELITY = "nla_jax.probes.fidelity:"
TEXTS = [f"{a} {b}" for a in SENTENCES for b in SENTENCES if a != b]


@pytest.fixture(scope="module")
def place(pair, subject_folder, tmp_path_factory):
    """A folder with a pair, its subject, and texts."""
    folder = tmp_path_factory.mktemp("probe")
    pair.save(folder / "pair")
    shutil.copytree(subject_folder, folder / "subject")
    rows = [{"id": f"text {i}", "text": text} for i, text in enumerate(TEXTS)]
    (folder / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def nla_probe(place, capsys):
    """Probes the pair on the texts; returns what was printed."""

    def run(*arguments, status=0):
        flags = ["--pair", place / "pair", "--subject", place / "subject", "--max-new-tokens", 16]
        assert main(list(map(str, ["probe", *flags, *arguments]))) == status
        return capsys.readouterr() if status == 0 else one_line(capsys)

    return run


def probes(*names):
    return ["--probes", ",".join(names)]


@probe("Letters", unit="letters")
def letters(context):
    """How long the explanations are."""
    return {"letters": np.array([len(text) for text in context.texts("rl")], float)}


@probe("Asks a judge", needs=("pair", "judge"))
def judged(context):
    """Never run."""
    raise AssertionError


@probe("Asks a judge about documents", needs=("pair", "judge"))
def rated(context):
    """How the judge rates them."""
    documents, found = context.column("detokenized_text_truncated"), np.full(len(context.vectors), np.nan)
    at = context.provider.looked_at(len(found))
    answers = context.provider.judge(
        "documents", [Question(f"<text>\n{documents[i]}\n</text>", "x", RATED) for i in at]
    )
    found[at] = [answer["rating"] for answer in answers]
    return {"rated": found}


def nothing(context):
    """Has nothing to say."""
    return {}


def test_a_pair_is_probed_on_texts(nla_probe, place, tmp_path):
    names = [f"{FIDELITY}after_rl", f"{FIDELITY}warm_start", "test_probe_verb:judged", "test_probe_verb:nothing"]
    said = nla_probe("--texts", place / "texts.jsonl", "--rows", 30, "--out", tmp_path / "out", *probes(*names)).out
    pair, subject = nla.load_pair(place / "pair"), nla.load_subject(place / "subject", 1)
    acts = activations_of(subject, [Document(f"text {i}", text) for i, text in enumerate(TEXTS)], 30, 2048, 0)
    assert len(acts) == 30 and set(acts.doc_ids) == {f"text {i}" for i in range(12)}
    texts = pair.verbalize(acts.vectors, 16, 0.0)
    assert any(texts)
    expected = nla.fve(pair.reconstruct(texts), acts.vectors)
    table = pq.read_table(tmp_path / "out/after_rl.parquet").to_pydict()
    assert np.mean(table["fve_rl"]) == pytest.approx(expected, abs=1e-4) and table["doc_id"] == acts.doc_ids
    (score,) = json.loads((tmp_path / "out/after_rl.json").read_text())["scores"]
    low, high = clustered_interval(np.array(table["fve_rl"]), table["doc_id"])
    assert score["mean"] == pytest.approx(expected, abs=1e-4) and score["ci95"] == pytest.approx([low, high])
    row = next(line for line in said.splitlines() if line.startswith("  AV after RL"))
    figures = [float(x.replace("−", "-")) for x in row.removeprefix("  AV after RL").replace(" to ", " ").split()]
    assert figures == pytest.approx([expected, low, high], abs=2e-3)
    for left in ("warm_start (it needs warm)", "judged (it needs judge)", "nothing (it has nothing to say here)"):
        assert f"left out: {left}" in said
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["after_rl.json", "after_rl.parquet"]


def test_few_rows_are_said_to_say_little(nla_probe, place):
    said = nla_probe("--texts", place / "texts.jsonl", "--rows", 11, *probes("test_probe_verb:letters"))
    assert "only 11 activations" in said.err and "letters: Letters (score; letters; mean, 95 % interval)" in said.out


def test_documents_of_several_files_have_names_of_their_own(nla_probe, place, tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(" ".join(SENTENCES) + name)
    files = [tmp_path / "a.txt", tmp_path / "b.txt"]
    nla_probe("--texts", *files, "--rows", 8, "--out", tmp_path / "out", *probes("test_probe_verb:letters"))
    ids = pq.read_table(tmp_path / "out/letters.parquet").column("doc_id").to_pylist()
    assert sorted(set(ids)) == [f"{file}:{file.name}:1" for file in files]


@pytest.mark.parametrize(
    "flags, said",
    {
        "no texts": ([], "--pair needs --texts"),
        "no such file": (["--texts", "nowhere.txt"], "There is no corpus 'nowhere.txt'"),
        "one row": (["--texts", "TEXTS", "--rows", "1"], "--rows"),
        "no import path": (["--texts", "TEXTS", "--probes", "hits"], "--probes is 'hits', expected an import path"),
        "no such probe": (["--texts", "TEXTS", "--probes", f"{FIDELITY}nope"], "--probes names 'nope'"),
        "a probe twice": (["--texts", "TEXTS", *probes(f"{FIDELITY}after_rl", f"{FIDELITY}after_rl")], "twice"),
        "only needs that are not met": (["--texts", "TEXTS", *probes(f"{FIDELITY}gold")], "There is no probe to run"),
        "no tokens": (["--texts", "TEXTS", "--max-new-tokens", "0"], "--max-new-tokens"),
        "short texts": (["--texts", "SHORT"], "The texts give 0 activations"),
    }.values(),
)
def test_a_wrong_input_gets_one_sentence(nla_probe, place, tmp_path, flags, said):
    (tmp_path / "short.txt").write_text("Too short.")
    places = {"TEXTS": place / "texts.jsonl", "SHORT": tmp_path / "short.txt"}
    line = nla_probe(*[places.get(flag, flag) for flag in flags], status=1)
    assert said in line and line.endswith((".", "?"))


def test_the_two_ways_are_not_mixed(capsys, tmp_path, place):
    for flags, said in (
        (["--workdir", str(tmp_path), "--texts", "a.txt"], "--texts belongs to --pair"),
        (["--workdir", str(tmp_path), "--injection-block", "1"], "--injection-block belongs to --pair"),
        (["--workdir", str(tmp_path)], "is no working folder of a run"),
        (["--workdir", str(tmp_path / "mistyped")], "is no working folder of a run"),
        (["--workdir", ""], "--workdir is no working folder of a run"),
    ):
        assert main(["probe", *flags]) == 1
        assert said in one_line(capsys)
    assert list(tmp_path.iterdir()) == []  # nothing was made


def test_a_finished_run_is_probed_without_its_evaluation(finished, corpus, tmp_path, capsys):
    workdir = tmp_path / "copy"
    shutil.copytree(finished, workdir)
    evaluated = (workdir / "evaluation.json").read_bytes()
    names = [f"{FIDELITY}after_rl", "nla_jax.probes.retrieval:hits", "nla_jax.probes.claims:ablation"]
    names += ["nla_jax.probes.hidden_codes:surface_form", "nla_jax.probes.classification:next_kind"]
    names += [f"nla_jax.probes.confidence:{name}" for name in ("confidence", "reliability")]
    names += [f"nla_jax.probes.information:{name}" for name in ("suffix_prediction", "source_match")]
    assert main(["probe", "--workdir", str(workdir), *probes(*names)]) == 0
    said = capsys.readouterr().out
    for name in ("after_rl", "hits", "surface_form", "suffix_prediction", "source_match"):
        table = pq.read_table(workdir / f"probes/{name}.parquet")
        assert len(table) == 16 and f"{name}: " in said
        seconds = json.loads((workdir / f"probes/{name}.json").read_text())["seconds"]
        assert seconds >= 0 and f"95 % interval), {seconds:.1f} s\n" in said
    same = pq.read_table(workdir / "evaluation/probes/after_rl.parquet").column("fve_rl").to_pylist()
    assert pq.read_table(workdir / "probes/after_rl.parquet").column("fve_rl").to_pylist() == pytest.approx(same)
    assert (workdir / "evaluation.json").read_bytes() == evaluated
    assert nla_main("report", workdir, corpus) == 0  # and the run is as it was
    out = tmp_path / "out"
    assert main(["probe", "--workdir", str(workdir), "--rows", "6", "--out", str(out), *probes(names[0])]) == 0
    assert len(pq.read_table(out / "after_rl.parquet")) == 6


def test_an_unfinished_run_is_refused(finished, tmp_path, capsys):
    workdir = tmp_path / "copy"
    shutil.copytree(finished, workdir)
    (workdir / "stages/rl.json").unlink()
    assert main(["probe", "--workdir", str(workdir)]) == 1
    assert "holds no finished 'rl' stage" in one_line(capsys)


def test_probes_are_run_from_python(pair, subject_folder, capsys):
    subject = nla.load_subject(subject_folder, 1)
    acts = nla.extract(subject, TEXTS, positions=[20, 40])
    chosen = [letters, hits, f"{FIDELITY}gold", lambda context: {"table": context.embedding[:24, 0]}]
    found = nla.probe(pair, subject, acts, chosen, max_new_tokens=16)
    assert list(found) == ["letters", "hits", "<lambda>"]
    texts = pair.verbalize(acts, 16, 0.0)
    assert found["letters"].rows["letters"].tolist() == [len(text) for text in texts]
    assert found["letters"].figures["scores"][0]["mean"] == pytest.approx(np.mean([len(text) for text in texts]))
    np.testing.assert_allclose(found["hits"].rows["hit_at_1_chance"], np.full(24, 1 / 23))
    np.testing.assert_allclose(found["<lambda>"].rows["table"], np.asarray(subject.params["embedding"])[:24, 0])
    assert "gold needs labels" in capsys.readouterr().err


def test_probing_from_python_refuses_what_does_not_fit(pair, subject_folder):
    acts = nla.extract(nla.load_subject(subject_folder, 2), TEXTS[:2])
    with pytest.raises(InputError, match="activations of layer 2, the pair reads layer 1"):
        nla.probe(pair, nla.load_subject(subject_folder, 1), acts, [letters])
    subject = nla.load_subject(subject_folder, 1)
    with pytest.raises(InputError, match="give at least 2"):
        nla.probe(pair, subject, nla.extract(subject, TEXTS[:1]), [letters])
    with pytest.raises(InputError, match="no texts 'warm'; there are rl, rl_temperature_1, no_injection"):
        nla.probe(pair, subject, nla.extract(subject, TEXTS[:2]), [lambda context: {"x": context.texts("warm")}])


def test_a_context_of_a_pair_gives_what_probes_read(pair, subject_folder):
    from nla_jax.tools.explain import Sampling

    subject = nla.load_subject(subject_folder, 1)
    acts = nla.extract(subject, TEXTS[:3], positions=[5, 9], doc_ids=["a", "a#2", "b"])
    context = PairContext(pair, subject, acts, Sampling(12, batch=4))
    assert context.documents == ["a"] * 4 + ["b"] * 2
    assert context.column("token") == acts.tokens and context.column("no such") == [""] * 6
    assert context.column("token_ids") == acts.token_ids
    assert context.texts("rl") == pair.verbalize(acts, 12, 0.0) != context.texts("no_injection")
    np.testing.assert_allclose(context.recon("rl"), pair.reconstruct(context.texts("rl")), rtol=1e-4, atol=1e-4)
    assert context.row_fve(context.texts("rl")).mean() == pytest.approx(nla.fve(context.recon("rl"), acts), abs=1e-4)


def test_a_pair_is_judged_and_rewritten(nla_probe, place, tmp_path, monkeypatch):
    """By a model that the flags name; a dry run counts the same questions, and a second run asks nobody."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    server = FakeLLM()
    server.calls = lambda tool, prompt: {"rating": 7}
    server.writes = lambda prompt, text: text[::-1]
    try:
        asked = ["--judge", "openai", "--judge-model", "m", "--judge-url", f"{server.url}/v1", "--judge-rows", 10]
        out, names = tmp_path / "out", ["nla_jax.probes.writing:writing", "nla_jax.probes.paraphrases:paraphrases"]
        run = ["--texts", place / "texts.jsonl", "--rows", 30, "--out", out, *probes(*names, f"{FIDELITY}after_rl")]
        costs = nla_probe(*run, *asked, "--dry-run").out
        assert not server.asked and not out.exists()
        said = nla_probe(*run, *asked).out
        number = server.prompts.total()
        assert f"questions  {number:,} to ask for, of " in costs and number >= 10
        told = re.findall(r"^  (.*): (\d+) of (\d+) questions answered\.$", said, re.MULTILINE)
        asked_about = {what: int(count) for what, count, of in told if count == of}
        assert asked_about["light paraphrase"] == asked_about["writing (rl)"] > 0
        rows = pq.read_table(out / "writing.parquet").column("writing").to_pylist()
        assert len(rows) == 30 and sum(value == 7 for value in rows) == asked_about["writing (rl)"]
        assert sum(map(np.isnan, rows)) == 20
        figures = json.loads((out / "writing.json").read_text())
        assert figures["answers"][0] in figures["about"]
        nla_probe(*run, *asked)
        assert server.prompts.total() == number
    finally:
        server.close()


@pytest.mark.parametrize(
    "flags, said",
    {
        "no model": (["--judge", "openai"], "--judge needs --judge-model"),
        "no judge": (["--judge-model", "m"], "--judge-model belongs to --judge"),
        "no folder": (["--judge", "openai", "--judge-model", "m"], "--judge needs --out"),
        "nobody to ask": (["--dry-run"], "--dry-run says what a model would be asked"),
        "another kind": (["--judge", "gpt", "--judge-model", "m", "--out", "OUT"], "evaluate.provider.kind is 'gpt'"),
        "no key": (["--judge", "openai", "--judge-model", "m", "--out", "OUT"], "set OPENAI_API_KEY"),
        "no rows": (["--judge", "openai", "--judge-model", "m", "--judge-rows", "0"], "--judge-rows of 2 or more"),
    }.values(),
)
def test_a_judge_that_cannot_be_asked_gets_one_sentence(nla_probe, place, tmp_path, monkeypatch, flags, said):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    flags = [str(tmp_path / "out") if flag == "OUT" else flag for flag in flags]
    line = nla_probe("--texts", place / "texts.jsonl", *flags, status=1)
    assert said in line and not list(tmp_path.iterdir())


def test_a_run_is_judged_as_its_config_says(finished, corpus, tmp_path, capsys):
    """`evaluate` runs the provider's probes beside its own; without a provider it names what lacks one."""
    server = FakeLLM()
    server.calls = lambda tool, prompt: {"rating": 7}
    workdir = copy_before(finished, tmp_path, "evaluate")
    judged = "test_probe_verb:rated"
    flags = [f"--config.evaluate.probes=('{FIDELITY}after_rl',)"]
    ours = [f"--config.evaluate.provider.probes=('{judged}', 'nla_jax.probes.writing:warm_writing')"]
    ours += ["--config.evaluate.provider.kind=openai", "--config.evaluate.provider.model=m"]
    ours += [f"--config.evaluate.provider.connection.base_url={server.url}/v1", "--config.evaluate.provider.rows=8"]
    try:
        assert nla_main("evaluate", workdir, corpus, *flags, *ours) == 0
        found = {one["name"]: one for one in json.loads((workdir / "evaluation.json").read_text())["probes"]}
        assert list(found) == ["after_rl", "rated", "warm_writing"]
        assert found["rated"]["about"] == "How the judge rates them. documents: 8 of 8 questions answered."
        assert "answers" not in found["after_rl"]
        rows = pq.read_table(workdir / "evaluation/probes/rated.parquet").column("rated").to_pylist()
        assert len(rows) == 16 and sum(value == 7 for value in rows) == 8
        assert len(list((workdir / "evaluation/answers").glob("*.jsonl"))) >= 1
        number = server.prompts.total()
        assert number >= 8
        assert main(["probe", "--workdir", str(workdir), *probes(judged)]) == 0
        assert server.prompts.total() == number  # the same answers serve `nla probe`
        assert nla_main("report", workdir, corpus, *flags, *ours) == 0
    finally:
        server.close()
    capsys.readouterr()
    assert nla_main("evaluate", workdir, corpus, f"--config.evaluate.probes=('{judged}',)") == 1
    said = one_line(capsys)
    assert "needs 'judge'; a run has pair, warm, labels, training, subject, study (evaluate.provider" in said


def test_the_documentation_lists_every_probe():
    folder = Path(nla.__file__).parent / "probes"
    modules = [importlib.import_module(f"nla_jax.probes.{file.stem}") for file in folder.glob("[a-z]*.py")]
    found = {value.name for module in modules for value in vars(module).values() if isinstance(value, Probe)}
    rows = (folder.parent.parent / "docs/probes.md").read_text(encoding="utf-8").splitlines()
    assert {match[1] for row in rows if (match := re.match(r"\| ?\w* \| `(\w+)`", row))} == found
    assert {path.rpartition(":")[2] for path in Evaluate().probes} == found - {
        *("ablation", "recovery", "divergence", "loss"),
        *("confidence", "calibration", "reliability"),
        *("suffix_prediction", "source_gain", "source_match"),
        *("true_after_rl", "made_after_rl", "fresh_reader", "opening", "copied"),
        *(path.rpartition(":")[2] for path in Evaluate().provider.probes),
    }
    assert {path.partition(":")[0].rpartition(".")[2] for path in Evaluate().provider.probes} == {
        module.__name__.rpartition(".")[2]
        for module in modules
        if any(isinstance(value, Probe) and asks(value) for value in vars(module).values())
    }


def test_rewrites_and_retrieval_are_measured_by_default():
    assert {path.rpartition(".")[2].partition(":")[0] for path in Evaluate().probes} == {
        "fidelity",
        "baselines",
        "claims",
        "hidden_codes",
        "retrieval",
        "classification",
    }
