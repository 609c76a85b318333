"""The evidence for claims and the confidence made of it: by hand, against brute force, and on pairs built by hand."""

import dataclasses
import json

import numpy as np
import pytest
from conftest import SENTENCES, one_sentence
from fake_readers import READERS, Grammar, Reader, explanations
from fake_readers import context_of as explained
from scipy.optimize import minimize

from nla_jax.labels.labeller import Claim
from nla_jax.probes import confidence as probes
from nla_jax.probes.claims import ablation
from nla_jax.probes.evidence import Confidence, Evidence, Sentences, evidence, explained_before, fit, mark_of, sampled
from nla_jax.probes.linear import logistic
from nla_jax.probes.probe import clustered_interval, run_probe
from nla_jax.runtime.errors import InputError
from nla_jax.runtime.user_code import UserFunction
from nla_jax.subject import extract, load_subject

RNG = np.random.default_rng(7)


# The parts


def test_a_logistic_regression_is_what_a_general_minimiser_finds():
    x = RNG.normal(size=(80, 3))
    y = (RNG.random(80) < 1 / (1 + np.exp(-x @ [2, -1, 0] - 0.5))).astype(float)

    def loss(w):
        z = x @ w[1:] + w[0]
        return np.sum(np.log1p(np.exp(-np.where(y == 1, z, -z)))) + np.sum(w[1:] ** 2) + 0.5e-3 * w[0] ** 2

    expected = minimize(loss, np.zeros(4), tol=1e-12).x
    weights, intercept = logistic(x, y, penalty=2.0)
    np.testing.assert_allclose([intercept, *weights], expected, atol=1e-4)
    alike = logistic(x, np.ones(80))  # nothing but the penalty holds it
    assert np.isfinite([*alike[0], alike[1]]).all() and alike[1] > 3


def judged_of(scores, true, rows, count):
    found = [Evidence(int(row), Claim("kind", "x"), 0.0, 0.0, 0.0) for row in rows]
    return probes.Judged(found, np.asarray(true), {"confidence": np.asarray(scores)}, np.ones(count, bool))


def pairs_won(scores, true):
    """AUROC as the share of pairs in which the true one is ahead."""
    ahead = scores[true][:, None] - scores[~true][None, :]
    return np.mean((ahead > 0) + (ahead == 0) / 2)


def test_the_mean_over_rows_is_the_auroc_and_its_interval_that_of_redrawn_documents():
    count, documents = 120, np.repeat(np.arange(40), 3)
    rows = np.sort(RNG.integers(0, count, 300))  # several claims of a row, none of some
    level = RNG.normal(size=40)[documents][rows]  # documents differ, so that they are worth less than as many rows
    true = level + RNG.normal(size=300) > 0
    scores = np.round(true + level + RNG.normal(size=300), 1)  # with ties
    judged = judged_of(scores, true, rows, count)
    values = judged.auroc(scores)
    assert values.shape == (count,) and values.mean() == pytest.approx(pairs_won(scores, true), abs=1e-12)
    drawn = []
    for _ in range(400):
        chosen = RNG.integers(0, 40, 40)
        at = np.concatenate([np.flatnonzero(documents[rows] == document) for document in chosen])
        drawn.append(pairs_won(scores[at], true[at]))
    low, high = np.quantile(drawn, [0.025, 0.975])
    found = clustered_interval(values, documents)
    assert found[1] - found[0] == pytest.approx(high - low, rel=0.2) and found == pytest.approx((low, high), abs=0.02)
    half = np.arange(300) % 2 == 0
    assert judged.auroc(scores, half).mean() == pytest.approx(pairs_won(scores[half], true[half]))
    assert judged.auroc(scores, true) is None


def test_calibration_errors_are_those_of_the_bins():
    p = RNG.random(500)
    true = RNG.random(500) < p**2
    bins = [np.flatnonzero((p >= low / 10) & (p < (low + 1) / 10)) for low in range(10)]
    expected = sum(abs(true[of].sum() - p[of].sum()) for of in bins) / 500
    assert probes.calibration_errors(p, true).mean() == pytest.approx(expected)
    assert probes.bin_of(np.array([0.0, 0.1, 0.99, 1.0])).tolist() == [0, 1, 9, 9]


def test_sentences_are_claims_that_agree_by_their_words():
    grammar = Sentences()
    said = "A river. It ends: the old mill! … 'x'"
    assert [claim.value for claim in grammar.claims(said)] == ["A river.", "It ends: the old mill!", "… 'x'"]
    assert grammar.claims("… !") == []
    same = lambda a, b: grammar.same(Claim("sentence", a), Claim("sentence", b))
    assert same("The old mill.", "the OLD mill") and same("the old mill", "the new mill")
    assert not same("the old mill", "a new mill")


# What speaks for a claim


def test_evidence_is_counted_over_samples_and_tokens_before():
    reader = Reader(READERS["the order of statements"].things, Grammar.words)
    vectors = reader.reconstruct(["red round", "blue long"])
    samples = [["red", "red flat", "blue", ""], ["long"]]
    before = [["red", "green"], []]
    found = evidence(reader, Grammar(), vectors, ["red and flat", "long"], samples, before)
    assert [(one.row, one.claim.value, one.agreement) for one in found] == [
        (0, "flat", 0.25),
        (0, "red", 0.5),
        (1, "long", 1.0),
    ]
    assert [one.recurrence for one in found[:2]] == [0.0, 0.5] and np.isnan(found[2].recurrence)
    assert evidence(reader, Grammar(), vectors, ["", ""], samples, before) == []


def test_a_reader_of_the_first_claim_is_found_out_by_ablation():
    texts = explanations(20)
    reader = READERS["the first claim"]
    gold = reader.reconstruct(texts[1:] + texts[:1])  # an exact reconstruction has nothing to lose by
    found = evidence(reader, Grammar(), gold, texts, [[]] * 20, [[]] * 20)
    assert {one.claim.kind for one in found if abs(one.ablation) > 1e-9} == {"colour"}
    # log(mse without / mse with) = log(1 + effect / 100), with the effect in % of the probe `ablation`
    context = explained(reader, texts, labeller=Grammar(), vectors=gold)
    columns = {"detokenized_text_truncated": texts, "n_raw_tokens": [1] * 20}
    context.column = lambda name: columns.get(name, [""] * 20)
    effects = ablation(context)["colour_effect_true"]
    colours = np.array([one.ablation for one in found if one.claim.kind == "colour"])
    moved = ~np.isnan(effects) & (colours < 10)
    np.testing.assert_allclose(np.exp(colours[moved]) - 1, effects[moved] / 100, rtol=1e-3, atol=1e-6)
    assert moved.sum() > 5


def test_a_confidence_reads_as_its_formula_says(tmp_path):
    learned = Confidence("a:B", {"x": 1}, 0.5, {"colour": -1.0}, (0.2, 0.1, 0.0), (0.5, 1.0, 2.0), (1.0, 2.0, -4.0))
    found = [Evidence(0, Claim("colour", "red"), 0.7, 0.6, 1.0), Evidence(1, Claim("new", "x"), 0.2, np.nan, 0.0)]
    z = [0.5 - 1 + (0.7 - 0.2) / 0.5 + 2 * (0.6 - 0.1) - 4 * 1.0 / 2, 0.5]
    np.testing.assert_allclose(learned.of(found), 1 / (1 + np.exp(-np.array(z))))
    learned.write(tmp_path / "confidence.json")
    again = Confidence.read(tmp_path / "confidence.json")
    np.testing.assert_allclose(again.of(found), learned.of(found))
    stored = json.loads((tmp_path / "confidence.json").read_text())
    for broken in ("[]", "{", json.dumps(stored | {"weights": [1.0]}), json.dumps(stored | {"intercept": None})):
        (tmp_path / "confidence.json").write_text(broken)
        with pytest.raises(InputError, match="holds no confidence of claims") as error:
            Confidence.read(tmp_path / "confidence.json")
        one_sentence(error)


def test_tokens_before_are_explained_once_and_in_their_places(pair, subject_folder, monkeypatch):
    subject = load_subject(subject_folder, 1)
    texts = [SENTENCES[0][:40], SENTENCES[1][:30]]
    whole = extract(subject, texts, "all", doc_ids=["a", "b"])
    said = dict(zip(zip(whole.doc_ids, whole.positions.tolist()), pair.verbalize(whole, 8, 0.0)))
    some = whole[[5, 2, 7, len(whole) - 1]]
    given, asked = pair.verbalize, []
    spy = lambda self, vectors, *a, **k: asked.append(len(vectors)) or given(vectors, *a, **k)
    monkeypatch.setattr(type(pair), "verbalize", spy)
    found = explained_before(pair, subject, some.token_ids, 3, max_new_tokens=8)
    for id, position, texts in zip(some.doc_ids, some.positions.tolist(), found):
        near = range(max(1, position - 3), position)
        assert texts == [said[id, at] for at in near if (id, at) in said]
    near = {(id, at - k) for id, at in zip(some.doc_ids, some.positions.tolist()) for k in (1, 2, 3)}
    assert sum(asked) == len(near & said.keys())
    assert explained_before(pair, subject, [[0], [0, 5]], 3, max_new_tokens=8) == [[], []]


def test_samples_are_others_than_the_explanation(pair, vectors):
    found = sampled(pair, vectors, 3, max_new_tokens=8, seed=4)
    again = pair.verbalize(np.repeat(vectors, 3, axis=0), 8, 1.0, 5)
    assert found == [again[i : i + 3] for i in range(0, 12, 3)]


# The probes, on pairs whose samples are made by hand


def context_of(monkeypatch, agrees, count=200, labeller=None):
    """Explanations of which each claim is true in half of the rows; `agrees(true)` says whether a sample makes it."""
    texts, rows = explanations(count), []
    for text in texts:  # what truly stands there
        rows.append(" ".join(word for word in Grammar.words(text) if RNG.random() < 0.5))
    reader, kept = READERS["the first claim"], {}
    draw = lambda i: " ".join(word for word in Grammar.words(texts[i]) if agrees(word in rows[i]))
    monkeypatch.setattr(probes, "sampled", lambda *a, **k: [[draw(i) for _ in range(5)] for i in range(count)])
    monkeypatch.setattr(probes, "explained_before", lambda *a, **k: [[draw(i)] for i in range(count)])
    monkeypatch.setattr(probes, "mark_of", lambda pair: "mark")
    columns = {"detokenized_text_truncated": rows, "n_raw_tokens": [1] * count, "token_ids": [[1]] * count}
    return explained(
        reader,
        texts,
        labeller=labeller or Grammar(),
        column=lambda name: columns.get(name, [""] * count),
        vectors=reader.reconstruct(texts[1:] + texts[:1]),
        subject=None,
        max_new_tokens=8,
        keep=kept.__setitem__,
        kept=kept,
    )


def measured(context, probe):
    return run_probe(UserFunction("probe", probe.name, probe), probe, context)


def test_a_coin_flip_tells_nothing(monkeypatch):
    context = context_of(monkeypatch, lambda true: RNG.random() < 0.5)
    scores = measured(context, probes.confidence)
    for name in ("auroc_confidence", "auroc_agreement", "auroc_recurrence"):
        low, high = clustered_interval(scores[name], context.documents, level=0.999)
        assert low < 0.5 < high and abs(np.nanmean(scores[name]) - 0.5) < 0.15


def test_a_perfect_feature_tells_everything(monkeypatch):
    context = context_of(monkeypatch, lambda true: true)
    scores = measured(context, probes.confidence)
    for name in ("confidence", "agreement", "recurrence", "within_colour", "within_shape"):
        assert np.nanmean(scores[f"auroc_{name}"]) == pytest.approx(1)
    assert abs(np.nanmean(scores["auroc_base_rate"]) - 0.5) < 0.2
    errors = measured(context, probes.calibration)
    assert np.nanmean(errors["brier_agreement"]) == np.nanmean(errors["error_agreement"]) == 0
    assert np.nanmean(errors["brier_confidence"]) < 0.01 < 0.2 < np.nanmean(errors["brier_base_rate"])
    curve = measured(context, probes.reliability)
    assert {name: np.nanmean(values) for name, values in curve.items()} == {"0.05": 0.0, "0.95": 1.0}
    tested = ~probes.first_half(context.documents)
    for values in scores.values():
        assert (~np.isnan(values)).tolist() == tested.tolist()


def test_what_is_tested_is_kept(monkeypatch):
    context = context_of(monkeypatch, lambda true: RNG.random() < (0.8 if true else 0.4))
    scores = measured(context, probes.confidence)
    learned = context.kept["confidence.json"]
    facts = learned.facts
    assert learned.labeller == "fake_readers:Grammar" and facts["samples"] == 5 and facts["pair"] == "mark"
    assert facts["auroc"] == pytest.approx(np.nanmean(scores["auroc_confidence"])) and 0.6 < facts["auroc"] < 0.95
    fitted = probes.first_half(context.documents)
    assert facts["documents"] == len({d for d, own in zip(context.documents, fitted) if own})
    judged = probes.judge(context)
    np.testing.assert_allclose(learned.of(judged.found), judged.scores["confidence"])
    assert not fitted[judged.rows].any()


def test_without_a_grammar_or_two_outcomes_nothing_is_said(monkeypatch):
    for labeller in (object(), Always(True), Always(False)):
        context = context_of(monkeypatch, lambda true: true, labeller=labeller)
        for probe in (probes.confidence, probes.calibration, probes.reliability):
            assert measured(context, probe) == {}
        assert context.kept == {}


class Always(Grammar):
    def __init__(self, answer):
        self.answer = answer

    def true(self, claim, row):
        return self.answer


def test_an_unknown_feature_counts_as_its_mean():
    found = [Evidence(i, Claim("k", "x"), agreement=i % 2, recurrence=np.nan, ablation=0.0) for i in range(40)]
    learned = fit(found, np.arange(40) % 2 == 1, "a:B", {}, note="x")
    assert learned.center[1] == 0 and learned.spread[1] == 1 and learned.facts == {"note": "x"}
    assert learned.of(found)[1] > 0.8 > 0.2 > learned.of(found)[0]


def test_the_mark_of_a_pair_changes_with_its_training(pair):
    other = dataclasses.replace(
        pair, reconstructor_params=pair.reconstructor_params | {"head": pair.reconstructor_params["head"] + 1e-3}
    )
    assert mark_of(pair) != mark_of(other) and mark_of(pair) == mark_of(dataclasses.replace(pair))
