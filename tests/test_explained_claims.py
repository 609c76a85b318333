"""`nla explain --confidence`: the claims of explanations, each with how sure one may be of it."""

import dataclasses
import json
import re

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import SENTENCES, one_line

from nla_jax.cli import main
from nla_jax.io.pairs import SHIPPED
from nla_jax.labels.labeller import Claim
from nla_jax.pair import load_pair
from nla_jax.probes.evidence import FILE, Confidence, Sentences, evidence, explained_before, mark_of
from nla_jax.runtime.notes import note
from nla_jax.runtime.user_code import resolve
from nla_jax.subject import extract, load_subject
from nla_jax.tools.claims import GRAMMARS, claim_reader

TEXT, SAMPLES, LIMIT = SENTENCES[0][:30], 2, 8


class Letters:
    """A grammar: which letters a text holds."""

    def claims(self, text):
        return [Claim("letter", letter) for letter in sorted(set(text)) if letter.isalpha()]


@pytest.fixture(scope="module")
def place(pair, subject_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("claims") / "pair"
    sidecar = dataclasses.replace(pair.sidecar, base_checkpoint=str(subject_folder))
    dataclasses.replace(pair, sidecar=sidecar).save(folder)
    return folder


@pytest.fixture(scope="module")
def material(place, subject_folder):
    """The activations of the text, what the pair says of each, and samples, as the verb should take them."""
    pair, acts = load_pair(place), extract(load_subject(subject_folder, 1), [TEXT], "all")
    said = pair.verbalize(acts, LIMIT, 0.0)
    more = pair.verbalize(np.repeat(acts.vectors, SAMPLES, axis=0), LIMIT, 1.0, 1)
    return pair, acts, said, [more[i : i + SAMPLES] for i in range(0, len(more), SAMPLES)]


@pytest.fixture
def explain(place, capsys):
    note.cache_clear()  # each is said once a process

    def run(*flags, status=0):
        command = ["explain", "--pair", str(place), "--text", TEXT, "--tokens", "all", "--max-new-tokens", str(LIMIT)]
        assert main([*command, *map(str, flags)]) == status
        return capsys.readouterr()

    return run


@pytest.fixture
def learned(place):
    """A confidence beside the pair, for as long as a test runs."""
    made = Confidence(
        "test_explained_claims:Letters",
        {},
        -0.2,
        {"letter": 0.5},
        (0.5, 0.5, 0.1),
        (0.5, 0.4, 0.2),
        (1.0, -2.0, 0.3),
        {"pair": mark_of(load_pair(place)), "samples": 5, "documents": 9, "claims": 70, "auroc": 0.71},
    )
    made.write(place / FILE)
    yield made
    (place / FILE).unlink()


def rows_of(out):
    return [json.loads(line) for line in out.splitlines()]


def test_without_a_grammar_sentences_have_the_share_of_samples_that_say_them(explain, material):
    _, _, said, samples = material
    printed = explain("--confidence", SAMPLES, "--json")
    rows = rows_of(printed.out)
    assert [row["explanation"] for row in rows] == said
    grammar, count = Sentences(), 0
    for row, text, others in zip(rows, said, samples, strict=True):
        expected = [
            {
                "text": claim.value,
                "kind": "sentence",
                "confidence": np.mean([any(grammar.same(claim, o) for o in grammar.claims(s)) for s in others]),
            }
            for claim in grammar.claims(text)
        ]
        assert row["claims"] == expected
        count += len(expected)
    assert count > 3 and "nothing was fitted to this pair (confidence.json)" in printed.err
    again = rows_of(explain("--confidence", SAMPLES, "--json", "--batch", 3).out)
    assert [row["claims"] for row in again] == [row["claims"] for row in rows]


def test_it_is_off_unless_it_is_asked_for(explain, learned):
    printed = explain("--json")
    assert all("claims" not in row for row in rows_of(printed.out)) and "Confidence" not in printed.err


def test_a_confidence_beside_the_pair_is_used(explain, learned, material, subject_folder):
    pair, acts, said, samples = material
    before = explained_before(pair, load_subject(subject_folder, 1), acts.token_ids, max_new_tokens=LIMIT)
    expected = learned.of(found := evidence(pair, Letters(), acts.vectors, said, samples, before))
    printed = explain("--confidence", SAMPLES, "--json", "--labeller", learned.labeller)
    claims = [claim for row in rows_of(printed.out) for claim in row["claims"]]
    assert [(claim["kind"], claim["text"]) for claim in claims] == [one.claim for one in found] and len(found) > 3
    np.testing.assert_allclose([claim["confidence"] for claim in claims], expected, atol=2e-4)
    assert "fitted to 70 claims of 9 documents with 5 samples each; on others its AUROC was 0.71" in printed.err


def test_the_shipped_pair_has_a_confidence_of_its_own(capsys):
    note.cache_clear()
    text = "Return the sum of the array elements"
    assert main(["explain", "--pair", "quickstart", "--text", text, "--confidence", "5", "--json"]) == 0
    printed = capsys.readouterr()
    assert re.search(r"fitted to \d{3} claims of \d{3} documents with 5 samples each", printed.err)
    (row,) = rows_of(printed.out)
    assert {claim["kind"] for claim in row["claims"]} <= set(Confidence.read(SHIPPED / FILE).kinds) and row["claims"]
    assert all(0 < claim["confidence"] < 1 for claim in row["claims"])


def test_an_exported_page_says_what_the_command_says(explain, learned, place, tmp_path):
    flags = ["--confidence", SAMPLES, "--labeller", learned.labeller]
    rows = rows_of(explain(*flags, "--json", "--max-new-tokens", 200).out)
    (tmp_path / "text.txt").write_text(TEXT)
    files = ["--export", tmp_path / "text.txt", "--out", tmp_path / "page.html"]
    assert main(["serve", "--pair", str(place), *map(str, [*flags, *files])]) == 0
    html = (tmp_path / "page.html").read_text(encoding="utf-8")
    data = json.loads(re.search('id="data">(.*?)</script>', html)[1])
    (about,), (answers,), (sure,) = data["pairs"], data["answers"], data["confidence"]
    assert about["confidence"]["fitted"] and "fitted to 70 claims" in about["confidence"]["about"]
    assert [answers[str(i)]["explanation"] for i in range(len(rows))] == [row["explanation"] for row in rows]
    without_number = lambda claims: [(claim["kind"], claim["text"]) for claim in claims]
    for i, row in enumerate(rows):
        assert without_number(sure[str(i)]) == without_number(row["claims"])
        numbers = lambda claims: [claim["confidence"] for claim in claims]
        np.testing.assert_allclose(numbers(sure[str(i)]), numbers(row["claims"]), atol=2e-4)
    assert sum(map(len, sure.values())) > 3


@pytest.mark.parametrize("path, settings", zip(GRAMMARS, ({}, {}, {"subject": "nowhere"}), strict=True))
def test_the_grammars_of_the_package_need_no_flag(learned, place, path, settings):
    dataclasses.replace(learned, labeller=path, settings=settings).write(place / FILE)
    reader = claim_reader(load_pair(place), place, 2)
    assert isinstance(reader.grammar, resolve(path, "test").function) and reader.learned.labeller == path
    assert reader.grammar.claims("Prose.") == [Claim("passage", "Prose")]


def test_code_that_only_the_file_names_is_not_run(explain, learned):
    printed = explain("--confidence", SAMPLES, "--json")
    assert {claim["kind"] for row in rows_of(printed.out) for claim in row["claims"]} == {"sentence"}
    assert f"read by {learned.labeller}; name it with --labeller" in printed.err


def test_the_confidence_of_another_training_is_not_used(explain, learned, place):
    dataclasses.replace(learned, facts=learned.facts | {"pair": "another"}).write(place / FILE)
    printed = explain("--confidence", SAMPLES, "--json", "--labeller", learned.labeller)
    assert {claim["kind"] for row in rows_of(printed.out) for claim in row["claims"]} == {"letter"}
    assert "belongs to another training" in printed.err and "nothing was fitted" in printed.err


def test_it_is_one_line_a_claim_and_a_column_of_lists(explain, learned, tmp_path):
    flags = ["--confidence", SAMPLES, "--labeller", learned.labeller]
    explain(*flags, "--out", tmp_path / "rows.parquet")
    rows = pq.read_table(tmp_path / "rows.parquet").to_pylist()
    assert rows == rows_of(explain(*flags, "--json").out)
    shown = explain(*flags).out
    for row in rows:
        for claim in row["claims"]:
            assert f"\n      {claim['confidence']:.2f}  letter: {claim['text']}\n" in shown


def test_it_travels_with_an_exported_pair(learned, place, tmp_path):
    assert main(["export", "--pair", str(place), "--out", str(tmp_path / "out"), "--with-subject"]) == 0
    assert Confidence.read(tmp_path / "out" / FILE).weights == list(learned.weights)
    assert learned.facts["pair"] == mark_of(load_pair(tmp_path / "out"))
    assert (tmp_path / "out/subject/model.safetensors").is_file()


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--confidence", "0"], "--confidence of 1 or more"),
        (["--labeller", "a:b"], "--labeller reads claims, which --confidence N asks for"),
        (["--confidence", "2", "--labeller", "json:JSONDecoder"], "cannot read claims: it has no method `claims"),
        (["--confidence", "2", "--labeller", "json:nope"], "--labeller names 'nope'"),
    ],
)
def test_wrong_input_gets_one_sentence(place, capsys, flags, said):
    assert main(["explain", "--pair", str(place), "--text", TEXT, *flags]) == 1
    assert said in one_line(capsys)


def test_a_broken_file_beside_the_pair_is_named(place, learned, capsys):
    (place / FILE).write_text("{}")
    assert main(["explain", "--pair", str(place), "--text", TEXT, "--confidence", "2"]) == 1
    assert "confidence.json holds no confidence of claims" in one_line(capsys)
