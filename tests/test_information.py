"""What explanations tell a reader: the subject, graded like torch, and a linear classifier of their words."""

import numpy as np
import pytest
from conftest import SENTENCES
from fake_readers import Held

from nla_jax.probes import information
from nla_jax.probes.classification import classified, kind_of, next_kind, words_of
from nla_jax.probes.information import bits, of_other_documents, source_gain, source_match, suffix_prediction
from nla_jax.probes.probe import run_probe
from nla_jax.runtime.user_code import UserFunction
from nla_jax.subject import load_subject


def measured(context, probe):
    return run_probe(UserFunction("probe", probe.name, probe), probe, context)


# Graded by the subject


@pytest.mark.torch
def test_bits_are_torchs(subject_folder):
    import torch
    from transformers import AutoModelForCausalLM

    subject = load_subject(subject_folder, 1)
    tokenizer = subject.tokenizer
    model = AutoModelForCausalLM.from_pretrained(subject_folder, attn_implementation="eager").eval()
    said = ["", "A river.", SENTENCES[2]]
    ends = [SENTENCES[0] * 6, " and", ""]  # more tokens together than are scored at a time; and a text that is empty
    found = bits(subject, "goes on there", said, ends)
    for text, end, value in zip(said[:2], ends, found):
        prompt = tokenizer(f"A note about a place in a text: {text}\n\nThe text goes on there:\n").input_ids
        ids = prompt + (own := tokenizer(end, add_special_tokens=False).input_ids)
        with torch.no_grad():
            logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        expected = np.mean([float(logprobs[len(prompt) - 1 + i, token]) for i, token in enumerate(own)])
        assert value == pytest.approx(expected / np.log(2), abs=1e-4)
    assert np.isnan(found[2])


def context_of(texts, following=None):
    count = len(texts)
    columns = {"following": following or texts, "detokenized_text_truncated": texts}
    return Held(
        vectors=np.zeros((count, 4)),
        documents=[f"d{i // 2}" for i in range(count)],
        texts={"rl": texts}.__getitem__,
        column=columns.__getitem__,
        subject=None,
        seed=0,
    )


@pytest.fixture
def reader(monkeypatch):
    """A subject that knows of a text what the explanation spells out, and is misled by another one."""

    def read(subject, where, explanations, ends):
        cost = lambda said, end: 0.0 if said == end else 3.0 if said else 2.0
        return np.array([-cost(said, end) if end else np.nan for said, end in zip(explanations, ends)])

    monkeypatch.setattr(information, "bits", read)


def test_what_an_explanation_spells_out_is_gained(reader):
    context = context_of([f"text {i}" for i in range(20)])
    for probe, name in ((suffix_prediction, "suffix_gain"), (source_gain, "source_gain")):
        found = measured(context, probe)
        assert {key: set(values) for key, values in found.items()} == {
            name: {2.0},
            f"{name}_shuffled": {-1.0},
            f"{name}_difference": {3.0},
        }
    found = measured(context, source_match)
    assert set(found["source_match"]) == {1.0} and set(found["source_match_chance"]) == {0.25}


def test_one_text_for_all_is_chance(reader):
    found = measured(context_of(["the same"] * 20), source_match)
    assert set(found["source_match"]) == {0.25}


def test_rows_without_such_a_text_say_nothing(reader):
    found = measured(context_of([f"text {i}" for i in range(6)], following=["x"] * 5 + [""]), suffix_prediction)
    assert [np.isnan(values).tolist() for values in found.values()] == [[False] * 5 + [True]] * 3
    assert measured(context_of(["a", "b"], following=["", ""]), suffix_prediction) == {}
    assert measured(context_of(["", ""]), source_match) == {}


def test_other_documents_are_drawn():
    documents = ["a", "a", "b", "c", "d", "d"]
    drawn = of_other_documents(documents, 3, seed=1)
    for i, row in enumerate(drawn):
        assert len(set(row)) == 3 and all(documents[j] != documents[i] for j in row)
    for documents in (["a", "b"], ["a", "a"]):
        assert of_other_documents(documents, 3, 0).tolist() == [[1] * 3, [0] * 3]


# Told from the words


def test_the_kind_of_what_follows():
    kinds = {
        " word": "a word",
        "ing": "more of a word",
        " 12": "a number",
        "3.5": "a number",
        ", and": "a mark",
        " (x": "a mark",
        "\nNew": "a line break",
        "  \n": "a line break",
        "": "the end",
        "  ": "the end",
    }
    assert {text: kind_of(text) for text in kinds} == kinds


def test_words_that_occur_in_the_fitting_texts_are_counted():
    fits = np.array([True, True, False])
    found = words_of(["A b, b", "c b", "b zebra"], fits)
    assert found.shape == (3, 4) and found.sum(1).tolist() == [3.0, 2.0, 1.0]
    assert words_of(["", ""], np.array([True, False])).sum() == 0


def told_of(texts, vectors, following):
    context = context_of(texts, following)
    context.vectors = vectors
    return {name.removeprefix("next_from_"): np.nanmean(v) for name, v in measured(context, next_kind).items()}


def test_only_what_is_written_is_told():
    rng = np.random.default_rng(3)
    kinds = rng.integers(0, 3, 240)
    following = [(" word", "4", ", and")[kind] for kind in kinds]
    noise = rng.normal(size=(240, 6))
    vectors = noise + 6 * np.eye(6)[kinds]
    telling = [f"Next perhaps {('work', 'digits', 'marks')[kind]}, word w{rng.integers(5)}" for kind in kinds]
    silent = [f"Next perhaps word w{rng.integers(5)}" for _ in kinds]
    by_text = told_of(telling, noise, following)
    assert by_text["text"] == 1 and by_text["activation"] < 0.5 and by_text["commonest"] < 0.5
    by_vector = told_of(silent, vectors, following)
    assert by_vector["text"] < 0.5 and by_vector["activation"] > 0.95


def test_one_kind_or_one_document_tells_nothing():
    context = context_of(["x"] * 30, [" word"] * 30)
    assert measured(context, next_kind) == {}
    context = context_of([f"w{i % 2}" for i in range(30)], [(" word", "4")[i % 2] for i in range(30)])
    context.documents = ["one"] * 30
    assert measured(context, next_kind) == {}
    fits, y = np.arange(30) < 15, np.eye(2)[np.arange(30) % 2]
    assert classified(y, y, fits, ["one"] * 30).tolist() == [
        i % 2 for i in range(30)
    ]  # nothing to choose a strength on
