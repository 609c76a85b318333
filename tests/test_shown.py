"""What the page shows of an evaluation row by row: where tokens stand in the text of their document."""

import numpy as np
import pytest

from nla_jax.data.activations import TEXT
from nla_jax.stages.shown import Shown, place_in

TOKENS = ["Rain", " fell", " 3", "\n", "times", "."]


class Context:
    """Every second token of three documents; the second of them is a part of the first."""

    documents = ["a"] * 6 + ["b"] * 3

    def column(self, name):
        ids = [id for id in ("a", "a#2", "b") for _ in range(3)]
        at = [1, 3, 5] * 2 + [5, 1, 3]  # in any order
        return {
            "doc_id": ids,
            TEXT: ["".join(TOKENS[: i + 1]) for i in at],
            "token": [TOKENS[i] for i in at],
            "following": ["".join(TOKENS[i + 1 :][:2]) for i in at],
            "role": [""] * 6 + ["user"] * 3,
            "n_raw_tokens": [i + 1 for i in at],
        }[name]

    def texts(self, name):
        return [f"{name} {i}" for i in range(9)]


def test_rows_stand_in_the_text_of_their_document():
    shown = Shown(Context(), {"fve_rl": np.linspace(0, 0.8, 9), "other": np.zeros(9)})
    documents = shown.documents(12)
    assert [document["document"] for document in documents] == ["a", "b"]
    for document, numbers in zip(documents, ([0, 1, 2], [7, 8, 6])):
        assert document["text"] == "".join(TOKENS) and document["tokens"] == 6
        rows = document["rows"]
        assert [document["text"][row["start"] : row["end"]] for row in rows] == [TOKENS[i] for i in (1, 3, 5)]
        assert [row["place"] for row in rows] == [2, 4, 6]
        assert [row["rl"] for row in rows] == [f"rl {i}" for i in numbers]
        assert [row["fve_rl"] for row in rows] == pytest.approx([0.1 * i for i in numbers])
        assert all({"labels", "warm"} < row.keys() and not {"other", "fve_warm"} & row.keys() for row in rows)
    assert [row["kinds"] for row in documents[0]["rows"]] == [["a word begins"], ["punctuation or blank"]] + [
        ["punctuation or blank"]
    ]
    assert documents[1]["rows"][0]["kinds"] == ["a word begins", "spoken by the user"]


def test_examples_are_one_row_of_each_document():
    examples = Shown(Context(), {}).examples(30)
    assert [(row["document"], row["context"], row["token"], row["after"]) for row in examples] == [
        ("a", "Rain", " fell", " 3\n"),
        ("b", "Rain fell 3\ntimes", ".", ""),
    ]


def test_a_token_that_is_not_in_the_text_is_not_shown():
    assert place_in("ab 😀c", "ab ", " ") == (2, 3)
    assert place_in("ab 😀c", "ab \ufffd", "\ufffd") == (3, 4)  # the first bytes of the emoji
    assert place_in("ab", "ab", "<|end|>") == (0, 0)  # which the text does not say
    assert place_in("abc", "abx", "x") == (0, 0)
