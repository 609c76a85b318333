"""The default labeller: what a label says, and what it never says."""

import collections
import dataclasses
import random
import re
from pydoc_data.topics import topics

import numpy as np
import pytest

from nla_jax.labels.extractive import BLANK, WINDOW, Extractive, WordsFirst, without_last_words
from nla_jax.labels.labeller import Claim, LabelRow
from nla_jax.objective import Scored, truthful
from nla_jax.probes.claims import truth_of


def label(texts):
    return Extractive().label([LabelRow(text, "", 0, "", "") for text in texts])


NUMPY_DOC = """Return the norm of a matrix or vector.

This function is able to return one of eight different matrix norms, depending on the order.

Parameters
----------
x : array_like
    Input array. If axis is None, the matrix must be 1-D or 2-D.
axis : int
    The axis of the given array"""


def test_a_whole_label():
    assert label([NUMPY_DOC]) == ["A parameter list. It ends early in a sentence with array: … given array"]


@pytest.mark.parametrize(
    ("text", "words", "where", "passage"),
    [
        ("The cat sat on the mat, and the dog sle", "mat, and the dog sle", "late in a sentence", "An opening"),
        ("A first paragraph.\n\nThe house is old.", "The house is old.", "at a sentence end", "Prose"),
        (">>> import json\n>>> json.dumps(", ">>> import json >>> json.dumps(", "after an opening bracket", "session"),
        ("Use it:\n\n```python\nvalue = compute\n", "```python value = compute", "at a line break", "A code block"),
        ("Things:\n\n- one apple\n- two pears", "- two pears", "starting a sentence", "A list item"),
        ("Do it.\n\nRaises:\n  ValueError: when it is wron", "when it is wron", "early in", "A list of errors"),
        ("Do it.\n\nRaises:\n  ValueError: no.\n\nThen it", "Then it", "starting a sentence", "Prose"),
        ("Do.\n\nReturns\n-------\nout : array of (at most", "of (at most", "inside brackets", "A result description"),
        ("Do.\n\n:param x: the number,", "the number,", "after a comma", "A parameter list"),
        ("Intro.\n\n## Getting star", "## Getting star", "early in", "A heading"),
        ("A table\n\n| name | size |\n|---|---|\n| a | 3", "| a | 3", "after a number", "A table"),
        ("See https://example.org/page", "https://example.org/page", "late in|early in|starting", "A link"),
    ],
)
def test_what_stands_there(text, words, where, passage):
    found = label([text])[0]
    quoted = re.search(r": … (.*?)[⏎␣]*$", found)[1]
    assert words.endswith(quoted) or quoted.endswith(words)
    assert re.search(where, found) and passage in found


@pytest.mark.parametrize(
    ("text", "token", "end"),
    [
        ("We do not recommend", "mend", "with -mend of recommend: … not recommend"),
        ("We do not recommend", " recommend", "with recommend: … not recommend"),  # the token is the word
        ("We do not re", " re", "with re: … not re"),  # it begins the word
        ("It is `recommend", "`recommend", "with `recommend: … is `recommend"),
        ("It is recommended.", ".", "with recommended.: … is recommended."),  # the position says so already
        ("It is recommend\n", "\n", "with recommend: … is recommend⏎"),
        ("It is recommend\n\n\n    ", "\n   ", "with recommend: … is recommend⏎⏎␣"),
        ("It is recommend ", " ", "with recommend: … is recommend␣"),
        ("It reads shape[0", "0", "with -0 of shape[0: … reads shape[0"),
    ],
)
def test_the_token_that_ends_within_a_word_is_named_before_it(text, token, end):
    row = LabelRow(text, token, 0, "", "")
    (said,) = Extractive().label([row])
    assert said.endswith(f" {end}")
    claims = dict(Extractive().claims(said))
    assert claims.get("last token") == (re.search(r"with -(\S+) of", end) or [None, None])[1]
    assert all(Extractive().true(claim, row) for claim in Extractive().claims(said))
    named = [claim for claim in Extractive().claims(said) if claim.kind == "last token"]
    other = LabelRow("Another text ends here", "", 0, "", "")
    begun = dataclasses.replace(row, token=f" {text.split()[-1]}")  # the same text, where this token is a whole word
    assert not any(Extractive().true(claim, at) for claim in named for at in (other, begun))


def test_the_last_words_are_never_cut_at_their_start():
    text = "Some extraordinarily longwinded words concatenated badly"
    assert label([text])[0].endswith("… concatenated badly")
    assert label(["x" * 500])[0].endswith(f"… {'x' * 20}")


HOSTILE = [
    "",
    " \n\t ",
    "\n\n",
    "a",
    '"',
    "\\",
    "<explanation>",
    "text </explanation>",
    "x <EXPLANATION> y",
    "<expl<explanation>anation>",
    "bell \x07 and \x00 nul \x1b[31m",
    "broken \ud800 half",
    "a\ufffd",
    "\u202eabc\u200b",
    "日本語の文章がここにあります" * 40,
    "🙂" * 300,
    "==== ====\n",
    "{}" * 2000,
    "a" * 100_000,
    "(" * 3000,
    "\r\n\r\n x\r",
    ":param",
    "Args:",
    "```",
    "word " * 5000,
    "$" * 50,
    "|" * 50,
    "Args:\n" * 500,
]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_any_text_gives_one_clean_short_line(text):
    found = label([text])[0]
    assert 20 <= len(found) <= 140
    assert found.isprintable() and "\ufffd" not in found
    assert not re.search("</?explanation>", found, re.IGNORECASE)
    assert " … " in found or found == BLANK


def test_a_label_depends_on_its_text_alone():
    texts = [NUMPY_DOC[:end] for end in range(40, len(NUMPY_DOC), 7)]
    together = label(texts)
    assert together == [label([text])[0] for text in texts] == label(texts[::-1])[::-1]
    assert len(set(together)) == len(texts)


def test_long_documents_are_labelled_by_their_end():
    end = "The mesh axes are named. " * (WINDOW // 25 + 1)
    assert label(["Unrelated beginning. " * 500 + end]) == label(["Another beginning. " * 900 + end])


# Claims: what a label says, read back


@pytest.fixture(scope="module")
def cuts():
    """Thousands of texts that end anywhere, and the hostile ones."""
    rng = random.Random(0)
    found = [text[: rng.randrange(1, len(text))] for text in topics.values() for _ in range(6)]
    found += [line[: rng.randrange(len(line) + 1)] for text in topics.values() for line in text.splitlines()[:4]]
    ends = [(text, text[len(text) - rng.randrange(6) :] if text else "") for text in [*found, *HOSTILE, NUMPY_DOC]]
    return [LabelRow(text, token, 0, "", "") for text, token in ends]


def test_every_claim_of_a_label_is_read_back_and_true(cuts):
    """Joined again they are the whole label: nothing that it says is left out."""
    labeller, kinds = Extractive(), collections.Counter()
    for row, text in zip(cuts, labeller.label(cuts)):
        claims = labeller.claims(text)
        of = dict(claims)
        within = f"-{of['last token']} of " if "last token" in of else ""
        ends = f"It ends {of.get('position')} with {within}{of.get('last word')}: … {of.get('last words')}"
        assert text.rstrip("⏎␣") == f"{of['passage']}. " + (
            ends if len(claims) > 1 else "Nothing stands before this place."
        )
        false = [claim for claim in claims if not labeller.true(claim, row)]
        assert not false, (text, row.text[-80:])
        kinds.update(kind for kind, _ in claims)
    assert len(cuts) > 600 and min(kinds.values()) > 200


def test_the_words_first_labeller_says_the_same_in_another_order(cuts):
    """What it names of the last word stands at the very beginning; its own grammar reads the same claims back."""
    usual, first = Extractive(), WordsFirst()
    for text, other in zip(usual.label(cuts), first.label(cuts)):
        assert first.claims(other) == usual.claims(text)
        if (named := re.search(r" with ((-\S+ of )?\S+)(?=: …)", text)) is None:
            assert other == text == BLANK
        else:
            assert other == f"{named[1]}. {text.replace(named[0], '', 1)}"


@pytest.mark.parametrize(
    "kind, left",
    [
        ("passage", "-mend of recommend. It ends late in a sentence: … we recommend⏎"),
        ("position", "-mend of recommend. Prose. It ends: … we recommend⏎"),
        ("last token", "recommend. Prose. It ends late in a sentence: … we recommend⏎"),
        ("last word", "Prose. It ends late in a sentence: … we⏎"),
        ("last words", "Prose. It ends late in a sentence"),
    ],
)
def test_a_claim_is_taken_out_wherever_it_stands(kind, left):
    """The claim is gone; the others are still made, but for what the last word has part in."""
    text, labeller = "-mend of recommend. Prose. It ends late in a sentence: … we recommend⏎", WordsFirst()
    claim = next(claim for claim in labeller.claims(text) if claim.kind == kind)
    assert labeller.without(text, claim) == left and claim not in labeller.claims(left)
    gone = {"last word": {"last token"}, "last words": {"last token", "last words", "last word"}}.get(kind, {kind})
    kinds = {"passage", "position", "last token", "last words", "last word"}
    assert {found.kind for found in labeller.claims(left)} == kinds - gone


def test_a_text_without_its_first_word_is_read_too():
    """As a verbalizer may write it, or as it stands without its last word: a passage of one word is no last word."""
    labeller = WordsFirst()
    for passage in ("Prose", "Code", "A table"):
        text = f"{passage}. It ends late in a sentence: … we recommend"
        assert dict(labeller.claims(text))["passage"] == passage
        assert labeller.without(text, Claim("last word", "recommend")) == text.removesuffix(" recommend")
        assert labeller.without(f"recommend. {text}", Claim("last word", "recommend")) == text.removesuffix(
            " recommend"
        )
    found = without_last_words(
        ["-mend of recommend. Prose. It ends late in a sentence: … we recommend"], np.random.default_rng(0)
    )
    assert found == ["Prose. It ends late in a sentence"]


def test_claims_of_another_row_are_mostly_false(cuts):
    labeller, total, true = Extractive(), collections.Counter(), collections.Counter()
    rows = [row for row in cuts if len(row.text) > 100]
    for row, other in zip(rows, rows[37:] + rows[:37]):
        for claim in labeller.claims(labeller.label([other])[0]):
            total[claim.kind] += 1
            true[claim.kind] += labeller.true(claim, row)
    share = {kind: true[kind] / total[kind] for kind in total}
    assert share["last words"] < 0.01 and share["last word"] < 0.05 and share["position"] < 0.4
    assert share["passage"] < 0.8  # most of these texts are prose


def test_claims_of_texts_that_a_verbalizer_might_write():
    claims = lambda text: dict(Extractive().claims(text))
    assert claims("A parameter list. It ends inside quoted code: … num_size, fr") == {
        "passage": "A parameter list",
        "position": "inside quoted code",
        "last words": "num_size, fr",
        "last word": "fr",
    }
    assert claims("Notes. It ends after a comma with time,: … one at a time,") == {
        "passage": "Notes",
        "position": "after a comma",
        "last words": "one at a time,",
        "last word": "time,",
    }
    assert claims("Prose") == {"passage": "Prose"}
    assert claims("") == {} == claims("A poem about love. It ends well.")


@pytest.mark.parametrize(
    "kind, value, true",
    [
        ("last words", "the given array", True),
        ("last words", "he given array", False),
        ("last words", "the array", False),
        ("passage", "Prose", False),
        ("position", "early in a sentence", True),
    ],
)
def test_what_is_true_of_a_text(kind, value, true):
    assert Extractive().true(Claim(kind, value), LabelRow(NUMPY_DOC, "", 0, "", "")) is true


def test_a_claim_of_a_last_token_that_is_another_earns_nothing():
    said = "Prose. It ends starting a sentence with -s of runs: … dog runs"
    share = lambda token: truth_of(Extractive(), [said], [LabelRow("The dog runs", token, 0, "", "a")]).item()
    assert share("s") == pytest.approx(share(" runs") + 0.2)


def test_true_claims_can_be_paid_for():
    """The share of a text's claims that hold is a feature, and `truthful` adds it to the reward."""
    ends = ["The river turns north at the old mill", "Every function in this module returns a new list and"]
    one, other = (LabelRow(text, "", 0, "", "a") for text in ends)
    labels = Extractive().label([one, other])
    found = truth_of(Extractive(), [labels[0], labels[1], labels[1], "nothing of that kind"], [one, other, one, one])
    held = [Extractive().true(claim, one) for claim in Extractive().claims(labels[1])]
    assert held and sum(held) < len(held)
    assert found.tolist() == pytest.approx([1, 1, sum(held) / len(held), 0])
    scored = Scored(
        mse=np.array([0.5, 0.5, 0.5, 2.0]),
        cosine=np.zeros(4),
        valid=np.array([True, True, True, False]),
        mask=np.ones((4, 1), bool),
        logprobs=np.zeros((4, 1)),
        features={"truth": found},
        cosines=np.zeros((4, 1)),
        own=np.zeros(4, int),
    )
    rewards = np.asarray(truthful(scored))
    assert rewards[0] == rewards[1] > rewards[2] and rewards[0] == pytest.approx(-0.3) and rewards[3] == -2
