"""Truth of claims: shares by hand, and a linear probe on activations that hold what is claimed."""

from types import SimpleNamespace

import numpy as np
import pytest
from fake_readers import READERS, Grammar, Reader, explanations
from fake_readers import context_of as explained

from nla_jax.labels.behaviour import Behaviour
from nla_jax.labels.extractive import Extractive
from nla_jax.labels.labeller import Claim, LabelRow
from nla_jax.probes.claims import ablation, claimed, deletions, linear, true_shares, truth
from nla_jax.probes.probe import Context, figures

COLOURS = ("red", "green", "blue")
RNG = np.random.default_rng(1)


class Held(Context):
    """What a probe may read, of given rows."""

    def __init__(self, **facts):
        self.__dict__.update(facts)


class Colours:
    """Claims the words of a text that are colours; they are true if the row's text names them."""

    def claims(self, text):
        return [Claim("colour", word) for word in text.split() if word in COLOURS] + [
            Claim("first letter", word[0]) for word in text.split() if word not in COLOURS
        ]

    def true(self, claim, row):
        return claim.value in row.text


def context_of(held=60, readable=True):
    """Activations in which the colour of a text is written, or is not."""

    def of(count):
        colours = RNG.integers(0, 3, count)
        vectors = RNG.normal(size=(count, 8)) * 0.1
        if readable:
            vectors[np.arange(count), colours] += 1
        texts = [COLOURS[i] for i in colours]
        columns = {"doc_id": [f"d{i // 3}" for i in range(count)], "api_explanation": texts}
        columns |= {"detokenized_text_truncated": texts, "n_raw_tokens": [3] * count}
        return vectors, texts, lambda name: columns.get(name, [""] * count)

    (vectors, _, column), (gold, texts, held_column) = of(900), of(held)
    said = {"labels": [*texts], "rl": texts, "warm": ["red"] * (held - 1) + [""]}
    return Held(
        vectors=gold,
        training=SimpleNamespace(vectors=vectors, column=column),
        column=held_column,
        labeller=Colours(),
        texts=said.__getitem__,
    )


def rows(*texts):
    return [LabelRow(text, "", 0, "", "d") for text in texts]


def test_shares_are_of_the_claims_that_a_text_makes():
    found = true_shares(Colours(), ["red green", "", "blue house"], rows("a red door", "red", "blue sky"))
    np.testing.assert_array_equal(found["colour"], [0.5, np.nan, 1.0])
    np.testing.assert_array_equal(found["first letter"], [np.nan, np.nan, 0.0])


def test_the_linear_probe_reads_what_is_there_and_nothing_else():
    probed = lambda context, kind="colour": linear(context, kind, rows(*context.texts("rl")))
    context = context_of(readable=False)
    assert probed(context_of()).mean() > 0.95 and probed(context).mean() < 0.6
    assert probed(context, "first letter") is None  # no training label claims one
    context.texts("labels")[:2] = ["a door", ""]
    assert np.isnan(probed(context)).tolist() == [True] * 2 + [False] * 58  # where the row's label claims none


def test_of_one_document_the_linear_probe_takes_its_first_strength():
    context = context_of()
    column = context.training.column
    context.training.column = lambda name: ["d"] * 900 if name == "doc_id" else column(name)
    assert linear(context, "colour", rows(*context.texts("rl"))).mean() > 0.95


def test_truth_stands_beside_the_warm_start_and_the_linear_probe():
    context = context_of()
    scores = truth(context)
    assert list(scores) == ["colour_true_after_rl", "colour_true_warm", "colour_true_linear_probe"]
    assert scores["colour_true_after_rl"].mean() == 1
    assert np.isnan(scores["colour_true_warm"]).sum() == 1
    expected = np.mean([text == "red" for text in context.texts("rl")[:-1]])
    assert np.nanmean(scores["colour_true_warm"]) == expected
    assert claimed(context)["colour_claimed_warm"].mean() == 59 / 60
    (drawn,) = (s for s in figures(truth, scores, [f"d{i}" for i in range(60)])["scores"] if "warm" in s["name"])
    assert drawn["mean"] == expected and drawn["ci95"][0] <= expected <= drawn["ci95"][1]
    assert drawn["label"] == "colour true warm"


def test_a_labeller_without_a_grammar_says_nothing():
    context = context_of()
    context.labeller = object()
    assert truth(context) == {} and claimed(context) == {}


def test_a_label_of_the_default_is_wholly_true():
    row = rows("Parameters\n----------\nshape : int\n    The number of rows of the given array")
    found = true_shares(Extractive(), Extractive().label(row), row)
    assert {kind: share.tolist() for kind, share in found.items()} == dict.fromkeys(
        ("last word", "last words", "passage", "position"), [1.0]
    )


# What claims are worth


def taken_out(labeller, text):
    """Each claim of a text as kind and value, with the text that is left without it."""
    return {tuple(claim): labeller.without(text, claim) for claim in labeller.claims(text)}


def test_claims_are_taken_out_of_labels_by_their_grammar():
    assert taken_out(Extractive(), "Prose. It ends late in a sentence with array: … of the given array") == {
        ("passage", "Prose"): "It ends late in a sentence with array: … of the given array",
        ("position", "late in a sentence"): "Prose. It ends with array: … of the given array",
        ("last words", "of the given array"): "Prose. It ends late in a sentence",
        ("last word", "array"): "Prose. It ends late in a sentence: … of the given",
    }
    assert taken_out(Extractive(), "Prose. It ends late in a sentence with -ray of array: … given array") == {
        ("passage", "Prose"): "It ends late in a sentence with -ray of array: … given array",
        ("position", "late in a sentence"): "Prose. It ends with -ray of array: … given array",
        ("last token", "ray"): "Prose. It ends late in a sentence with array: … given array",
        ("last words", "given array"): "Prose. It ends late in a sentence",
        ("last word", "array"): "Prose. It ends late in a sentence: … given",
    }
    assert taken_out(Behaviour("none"), 'Prose. Next perhaps "work", "book" or a blank. It ends: … his') == {
        ("passage", "Prose"): 'Next perhaps "work", "book" or a blank. It ends: … his',
        ("certainty", "Next perhaps"): 'Prose. "work", "book" or a blank. It ends: … his',
        ("next", "work"): 'Prose. Next perhaps "book" or a blank. It ends: … his',
        ("next", "book"): 'Prose. Next perhaps "work" or a blank. It ends: … his',
        ("next", "a blank"): 'Prose. Next perhaps "work" or "book". It ends: … his',
        ("last words", "his"): 'Prose. Next perhaps "work", "book" or a blank.',
        ("last word", "his"): 'Prose. Next perhaps "work", "book" or a blank.',
    }
    assert taken_out(Behaviour("none"), "Prose. Next surely a blank. It ends with -is of his: … in his␣") == {
        ("passage", "Prose"): "Next surely a blank. It ends with -is of his: … in his␣",
        ("certainty", "Next surely"): "Prose. a blank. It ends with -is of his: … in his␣",
        ("next", "a blank"): "Prose. Next surely. It ends with -is of his: … in his␣",
        ("last token", "is"): "Prose. Next surely a blank. It ends with his: … in his␣",
        ("last words", "in his"): "Prose. Next surely a blank.",
        ("last word", "his"): "Prose. Next surely a blank. It ends: … in␣",
    }
    assert (
        taken_out(Behaviour("none"), "Prose. Anything may come next. It ends: … his")[
            ("certainty", "Anything may come next")
        ]
        == "Prose. It ends: … his"
    )


def test_what_is_taken_out_is_claimed_no_more():
    text = "Parameters\n----------\nshape : int\n    The number of rows of the given array"
    (label,) = Extractive().label(rows(text))
    for claim in Extractive().claims(label):
        others = set(Extractive().claims(label)) - {claim}
        now = set(Extractive().claims(Extractive().without(label, claim)))
        assert claim not in now and {c for c in others if "last" not in c.kind} <= now


def test_a_labeller_that_takes_nothing_out_loses_the_value():
    found = deletions(Grammar(), ["The colour is red, a red one."], rows("a red door"))
    assert [tuple(one) for one in found] == [(0, "colour", True, "The colour is , a red one.")]


def worth(reader, texts, gold, said):
    """The effects of claims in `texts` on rows whose activations are those of the texts `gold`."""
    context = explained(reader, gold, labeller=Grammar())
    said = {"detokenized_text_truncated": said, "n_raw_tokens": [1] * len(said)}
    context.texts = {"rl": texts}.__getitem__
    context.recon = lambda name: reader.reconstruct(texts)
    context.column = lambda name: said.get(name, [""] * len(texts))
    return ablation(context)


def test_a_claim_is_worth_what_the_reader_reads_of_it():
    reader = READERS["the order of statements"]
    both = Reader(reader.things, Grammar.words)
    # Entries: 1, and 2 for each word that is read. The activation holds red and round; the first text says red and flat.
    gold = ["red round", "blue long"]
    effects = worth(both, ["It is red and flat.", "It is red and flat."], gold, ["red", "flat"])
    cos = lambda shared, one, other: shared / np.sqrt(one * other)
    error = lambda shared, one: 2 - 2 * cos(shared, one, 9)  # 9: the squared length of what holds two words
    before = [error(1 + 4, 9), error(1, 9)]
    no_colour, no_shape = [error(1, 5), error(1, 5)], [error(5, 5), error(1, 5)]
    grows = lambda after, i: pytest.approx(100 * (after[i] / before[i] - 1), rel=1e-5)
    assert list(effects) == ["colour_effect_true", "colour_effect_false", "shape_effect_true", "shape_effect_false"]
    assert effects["colour_effect_true"][0] == grows(no_colour, 0) and effects["colour_effect_true"][0] > 50
    assert effects["colour_effect_false"][1] == grows(no_colour, 1)
    assert effects["shape_effect_false"][0] == grows(no_shape, 0) and effects["shape_effect_false"][0] < 0
    assert effects["shape_effect_true"][1] == effects["colour_effect_false"][1] < 0  # equal texts, equal effects
    for name, missing in zip(effects, (1, 0, 0, 1)):
        assert np.isnan(effects[name]).tolist() == [i == missing for i in range(2)]


def test_several_claims_of_a_kind_are_averaged_in_their_row():
    both = Reader(READERS["the order of statements"].things, Grammar.words)
    effects = worth(both, ["red and green", "red"], ["red round", "blue long"], ["red, green", ""])
    one, two = (worth(both, [text, "red"], ["red round", "blue long"], ["", ""]) for text in ("red", "green"))
    error = lambda shared, one: 2 - 2 * shared / np.sqrt(one * 9)
    without_red, without_green, before = error(1, 5), error(5, 5), error(5, 9)
    mean = 100 * ((without_red + without_green) / 2 / before - 1)
    assert effects["colour_effect_true"][0] == pytest.approx(mean, rel=1e-5)
    assert "colour_effect_true" not in one and np.isfinite(two["colour_effect_false"][0])


@pytest.mark.parametrize("name", READERS)
def test_only_a_reader_of_claims_loses_by_them(name):
    texts = explanations()
    shifted = texts[1:] + texts[:1]  # activations that the texts do not fit wholly: an exact one has no share
    effects = worth(READERS[name], texts, [a if i % 2 else b for i, (a, b) in enumerate(zip(texts, shifted))], texts)
    reads = {name for name, values in effects.items() if np.nanmax(np.abs(values), initial=0) > 1e-4}
    expected = {"the first claim": {"colour_effect_true"}}
    expected |= {"the order of statements": {"colour_effect_true", "shape_effect_true"}}
    assert reads == expected.get(name, set()) and list(effects) == ["colour_effect_true", "shape_effect_true"]


def test_an_exact_reconstruction_has_no_share():
    texts = explanations(6)
    assert np.isnan(worth(READERS["the first claim"], texts, texts, texts)["colour_effect_true"]).all()


def test_no_claims_and_no_grammar_have_no_effects():
    reader = READERS["the quote"]
    assert worth(reader, ["w1", "w2"], ["w1", "w2"], ["", ""]) == {}
    context = explained(reader, explanations(4), labeller=object())
    assert ablation(context) == {}
