"""Rewrites by hand, and readers built by hand that each of them has to find out, and the others not."""

import numpy as np
import pytest
from fake_readers import COLOURS, READERS, SHAPES, Reader, context_of, explanations, words_of

from nla_jax.fve import fve
from nla_jax.labels.behaviour import Behaviour
from nla_jax.labels.extractive import Extractive
from nla_jax.labels.labeller import LabelRow
from nla_jax.probes.hidden_codes import (
    READ_AS,
    normalised,
    only_quotes,
    retention,
    rewrite,
    rewrites,
    shuffled,
    statements,
    strip_quotes,
    surface_form,
    swap_quotes,
    warm_retention,
    warm_rewrites,
)
from nla_jax.probes.probe import figures

BEHAVIOUR = 'Prose. Next perhaps "work", "b. c" or "idea". It ends: … in his. Next one'
LOSES = {  # which rewrites take from a reader what it reads
    "the quote": {"quotes_stripped", "quotes_swapped"},
    "the order of words": {"words_shuffled", "quotes_only"},
    "the first claim": {"quotes_only"},
    "the order of statements": {"words_shuffled", "statements_shuffled", "quotes_only"},
}


def test_rewrites_of_a_label():
    assert statements(BEHAVIOUR) == ["Prose.", 'Next perhaps "work", "b. c" or "idea".', "It ends: … in his. Next one"]
    assert strip_quotes(BEHAVIOUR) == "Prose. Next perhaps , or . It ends:"
    assert only_quotes(BEHAVIOUR) == '"work" "b. c" "idea" … in his. Next one'
    assert normalised("A_b, “C”\n(d1)… É") == "a b c d1 é"


def test_what_the_labellers_quote_is_what_is_taken_out():
    (label,) = Extractive().label([LabelRow('It says "given array', "array", 0, "", "d")])
    assert label.endswith(": … 'given array")
    assert strip_quotes(label) + " " + only_quotes(label) == label and only_quotes(label) == "… 'given array"
    assert [claim.value for claim in Behaviour("none").claims(only_quotes(BEHAVIOUR))] == []


def test_an_ellipsis_within_a_text_quotes_nothing():
    for text in ("It goes on… and ends here.", "A … gap\nin two lines", "It ends …", ""):
        assert strip_quotes(text) == " ".join(text.split()) and only_quotes(text) == ""


def test_shuffling_keeps_the_parts_and_always_changes_their_order():
    for seed in range(20):
        assert shuffled(["a", "b"], np.random.default_rng(seed)) == "b a"
        found = shuffled(list("abcd"), np.random.default_rng(seed))
        assert sorted(found.split()) == list("abcd") and found != "a b c d"
    assert shuffled([], np.random.default_rng(0)) == "" and shuffled(["a"], np.random.default_rng(0)) == "a"


def test_quotes_are_swapped_between_documents_and_by_kind():
    texts = ['Says "a" and "b": … x', 'Says "c": … y', "Says nothing", 'Says "d"']
    found = swap_quotes(texts, ["1", "2", "3", "4"], 0)
    assert found[2] == texts[2]
    whole = {0: ("a", "b", "x"), 1: ("c", "y"), 3: ("d",)}
    givers = {
        i: [j for j, words in whole.items() if any(word in only_quotes(found[i]) for word in words)] for i in whole
    }
    assert sorted(j for (j,) in givers.values()) == [0, 1, 3] and all([i] != of for i, of in givers.items())
    assert found[0] == {1: 'Says "c" and "c": … y', 3: 'Says "d" and "d":'}[givers[0][0]]
    same = swap_quotes(texts[:2] * 2, ["1", "1", "2", "2"], 0)  # only the quotes of another document
    assert {only_quotes(text) for text in same} <= {'"a" "b" … x', '"c" … y', '"a" … x', '"c" "c" … y'}
    assert swap_quotes(["none"], ["1"], 0) == ["none"]


@pytest.mark.parametrize("name", READERS)
def test_a_reader_is_found_out_by_the_rewrites_made_for_it(name):
    context = context_of(READERS[name], explanations())
    assert context.row_fve(context.texts("rl")) == pytest.approx(np.ones(240))
    means = {key: values.mean() for key, values in retention(context).items()}
    lost = {key.removeprefix("retention_") for key, kept in means.items() if kept < 0.5}
    whole = {key.removeprefix("retention_") for key, kept in means.items() if kept == pytest.approx(1)}
    assert lost == LOSES[name] and whole == READ_AS.keys() - lost


def test_scores_are_those_of_the_rewritten_texts():
    reader, texts = READERS["the quote"], explanations()
    context = context_of(reader, texts, warm=READERS["the quote"])
    scores = rewrites(context)
    assert list(scores) == [f"fve_{name}" for name in READ_AS]
    constant = np.tile(reader.reconstruct([""]), (240, 1))
    assert scores["fve_quotes_stripped"].mean() == pytest.approx(fve(constant, context.vectors))
    assert warm_rewrites(context)["fve_words_shuffled_warm"] == pytest.approx(np.ones(240))


def test_retention_is_a_ratio_of_means():
    half = Reader(READERS["the quote"].things, lambda text: READERS["the quote"].read(text)[:1])  # one word of two
    context = context_of(READERS["the quote"], explanations(), warm=half)
    kept = warm_retention(context)["retention_quotes_swapped_warm"]
    original = context.row_fve(context.texts("rl"), half).mean()
    rewritten = context.row_fve(rewrite("quotes_swapped", context), half).mean()
    assert 0.1 < original < 0.9 and kept.mean() == pytest.approx(rewritten / original)
    (drawn,) = (s for s in figures(warm_retention, {"x": kept}, context.documents)["scores"])
    assert drawn["ci95"][0] < drawn["mean"] < drawn["ci95"][1]


def test_texts_that_explain_nothing_have_no_retention():
    blind = Reader(READERS["the quote"].things, lambda text: [])
    context = context_of(READERS["the quote"], explanations(), warm=blind)
    assert warm_retention(context) == {} and len(retention(context)) == len(READ_AS)


def test_only_a_reader_that_came_to_read_form_trips_the_wire():
    form, words = READERS["the order of statements"], Reader(COLOURS + SHAPES, words_of(*COLOURS))
    tripped = surface_form(context_of(form, explanations(), warm=words))
    assert tripped["gap_statements_shuffled_warm"] == pytest.approx(np.zeros(240))
    assert tripped["gap_statements_shuffled_difference"].mean() > 0.5
    assert tripped["gap_quotes_stripped_difference"] == pytest.approx(np.zeros(240))
    calm = surface_form(context_of(form, explanations(), warm=form))  # both read it: RL taught nothing new
    assert calm["gap_statements_shuffled_live"].mean() > 0.5
    assert calm["gap_statements_shuffled_difference"] == pytest.approx(np.zeros(240))


def test_the_same_seed_gives_the_same_texts():
    one, same = (context_of(READERS["the quote"], explanations()) for _ in range(2))
    other = context_of(READERS["the quote"], explanations(), seed=6)
    for name in READ_AS:
        assert rewrite(name, one) == rewrite(name, same)
    assert rewrite("words_shuffled", one) != rewrite("words_shuffled", other)
    assert rewrite("quotes_swapped", one) != rewrite("quotes_swapped", other)
