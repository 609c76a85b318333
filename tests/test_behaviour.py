"""Labels of what the subject expects next: against torch, and read back by their own grammar."""

import jax
import numpy as np
import pytest
from conftest import SENTENCES, one_sentence

from nla_jax.labels import behaviour
from nla_jax.labels.behaviour import OPEN, SURE, Behaviour, in_words
from nla_jax.labels.labeller import Claim, LabelRow
from nla_jax.models.sharding import make_mesh
from nla_jax.runtime.errors import InputError


@pytest.fixture(scope="module")
def labeller(subject_folder):
    return Behaviour(str(subject_folder), least=0.0)


@pytest.fixture(scope="module")
def rows(tokenizer):
    """Rows at several places of two documents and a chat, out of order."""
    rows = []
    for doc, (text, role) in enumerate([(SENTENCES[0], ""), (" ".join(SENTENCES[:2]), ""), (SENTENCES[2], "user")]):
        ids = tokenizer(text).input_ids
        for at in (len(ids) - 1, 4, 7):
            said = tokenizer.decode(ids[: at + 1], skip_special_tokens=True)
            rows.append(LabelRow(said, tokenizer.decode([ids[at]]), at, role, f"d{doc}", tuple(ids[: at + 1])))
    return rows


@pytest.mark.torch
def test_next_tokens_are_those_of_torch(labeller, rows, subject_folder, tokenizer):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(subject_folder).eval()
    for row, (texts, p) in zip(rows, labeller.expected(rows)):
        with torch.no_grad():
            expected = model(torch.tensor([row.token_ids])).logits[0, -1].softmax(-1).topk(5)
        np.testing.assert_allclose(p, expected.values.numpy(), rtol=1e-3)
        assert texts == [tokenizer.decode([token]) for token in expected.indices.tolist()]


def test_labels_do_not_depend_on_the_rows_beside_them(labeller, rows, subject_folder):
    together = labeller.label(rows)
    assert together == Behaviour(str(subject_folder), least=0.0).label(rows[::-1])[::-1]
    alone = Behaviour(str(subject_folder), least=0.0)
    assert [alone.label([row])[0] for row in rows] == together


def test_every_claim_of_a_label_is_read_back_and_true(labeller, rows):
    for row, label in zip(rows, labeller.label(rows)):
        claims = labeller.claims(label)
        kinds = [claim.kind for claim in claims]
        assert {"passage", "certainty", "next", "last words", "last word"} == set(kinds) and kinds.count("next") <= 3, (
            label
        )
        assert all(labeller.true(claim, row) for claim in claims), label
        words = row.text.split()[-1]
        assert claims[2] == Claim("last words", claims[2].value) and claims[2].value.endswith(words)
        assert claims[3] == Claim("last word", words.replace('"', "'"))
    speaks = [label.startswith("A user speaks. ") for label in labeller.label(rows)]
    assert speaks == [row.role == "user" for row in rows]


def test_the_last_word_may_be_named_before_the_others(labeller, rows, subject_folder):
    """The same label otherwise; every claim of it is read back, and true, that of the token within a word too."""
    named, kinds = Behaviour(str(subject_folder), least=0.0, name_last=True), set()
    for row, usual, label in zip(rows, labeller.label(rows), named.label(rows)):
        claims = named.claims(label)
        assert all(named.true(claim, row) for claim in claims), label
        assert [claim for claim in claims if claim.kind != "last token"] == labeller.claims(usual)
        last = row.text.split()[-1].replace('"', "'")
        within = last != row.token and last.endswith(row.token) and any(map(str.isalnum, row.token))
        assert label.startswith(usual.replace("It ends:", f"It ends with {f'-{row.token} of ' * within}{last}:")), label
        assert label.endswith("␣") == row.text.endswith(" ")
        kinds |= {claim.kind for claim in claims}
    assert "last token" in kinds
    with pytest.raises(InputError, match="label.settings.name_last"):
        Behaviour("x", name_last="yes")


def test_claims_of_another_row_are_false(labeller, rows):
    label, other = labeller.label([rows[0], rows[-2]])
    of = {claim.kind: claim for claim in labeller.claims(label)}
    assert not labeller.true(of["last words"], rows[-2]) and not labeller.true(of["passage"], rows[-2])
    assert not labeller.true(Claim("next", "nowhere"), rows[0])
    assert not labeller.true(Claim("certainty", OPEN), rows[0])


def test_only_what_is_likely_is_named(labeller, rows):
    text, p = [" river", "s", "\n", ""], [0.5, 0.2, 0.15, 0.1]
    of = lambda least, p: Behaviour("x", least=least)._described(rows[0], text, p)["next"]
    assert of(0.05, p) == 'Next perhaps "river", "-s" or a line break'
    assert of(0.19, p) == 'Next perhaps "river" or "-s"' and of(0.6, p) == OPEN
    assert of(0.05, [SURE, 0.2, 0.1, 0.05]) == 'Next surely "river"'
    assert in_words(["</explanation>"]) == ["a blank"]  # a label holds no tags
    assert in_words(["", ' "', "\u200b \n", "the", "The", "the"]) == [
        "the end",
        '"\'"',
        "a line break",
        '"-the"',
        '"-The"',
    ]


def test_rows_without_ids_are_refused(labeller, rows):
    with pytest.raises(InputError, match="needs the column token_ids") as error:
        labeller.label([LabelRow("text", "t", 3, "", "d")])
    one_sentence(error)


def test_a_model_that_is_not_there_is_said_before_the_first_stage():
    with pytest.raises(InputError, match="There is no model folder"):
        Behaviour("./nowhere").ready()


def test_what_many_claims_need_is_computed_together(labeller, rows, subject_folder, monkeypatch):
    fresh, computed = Behaviour(str(subject_folder), least=0.0), []
    whole = Behaviour._computed
    monkeypatch.setattr(Behaviour, "_computed", lambda self, ids: computed.append(len(ids)) or whole(self, ids))
    fresh.ready_for(rows)
    assert all(fresh.true(claim, row) for row, text in zip(rows, labeller.label(rows)) for claim in fresh.claims(text))
    assert [count for count in computed if count] == [len({row.token_ids for row in rows})]


def test_what_is_remembered_makes_room_before_it_is_asked_for(rows, subject_folder, monkeypatch):
    """Whatever was computed for some rows together is there when a claim about one of them is checked."""
    monkeypatch.setattr(behaviour, "KEPT", 2)
    fresh, computed = Behaviour(str(subject_folder), least=0.0), []
    whole = Behaviour._computed
    monkeypatch.setattr(Behaviour, "_computed", lambda self, ids: computed.append(len(ids)) or whole(self, ids))
    for start in range(0, len(rows), 2):
        fresh.ready_for(some := rows[start : start + 2])
        asked = len(computed)
        assert [found for row in some for found in fresh.expected([row])] == fresh.expected(some)
        assert not any(computed[asked:])


def test_it_computes_alone_amid_training_on_a_mesh(labeller, rows, subject_folder):
    """On one of the devices: of the rows that another host asks about it knows nothing."""
    with jax.set_mesh(make_mesh(4, 1, 1)):
        fresh = Behaviour(str(subject_folder), least=labeller.least)
        assert fresh.label(rows) == labeller.label(rows)
        assert {len(x.devices()) for x in jax.tree.leaves(fresh._whole.params)} == {1}
