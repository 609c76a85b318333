"""Truth of claims: shares by hand, and a linear probe on activations that hold what is claimed."""

from types import SimpleNamespace

import numpy as np

from nla_jax.labels.extractive import Extractive
from nla_jax.labels.labeller import Claim, LabelRow
from nla_jax.probes.claims import claimed, linear, true_shares, truth
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
    said = {"rl": texts, "warm": ["red"] * (held - 1) + [""]}
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
