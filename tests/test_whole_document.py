"""The document that the report shows whole: which one, every token of it, and what is said there."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import CONFIG, SENTENCES

from nla_jax.cli import load_config
from nla_jax.config import read
from nla_jax.data.activations import Activations
from nla_jax.data.corpus import Document
from nla_jax.stages.shown import Shown
from nla_jax.stages.whole_document import RULE, OneDocument, documents, typical
from nla_jax.subject import extract, load_subject

FIRST, LAST, PLACES = 24, 128, (30, 40)  # which tokens may be sampled, by the config; the sampled ones
TEXTS = {"low": " ".join(SENTENCES), "middle": " ".join(SENTENCES[::-1]), "high": " ".join(SENTENCES[1:])}


@pytest.fixture(scope="module")
def subject(subject_folder):
    return load_subject(subject_folder, 1)


@pytest.fixture
def context(subject, pair, tmp_path):
    """What the probes read: two rows of each document, of which "middle" is the typical one."""
    acts = extract(subject, list(TEXTS.values()), PLACES, doc_ids=list(TEXTS))
    rng = np.random.default_rng(0)
    rebuilt = acts.vectors + np.repeat([[2], [0.7], [0.1]], 2, 0) * rng.normal(size=acts.vectors.shape)
    run = SimpleNamespace(workdir=tmp_path, config=read(load_config(CONFIG, []).to_dict(), "test"))
    run.documents = lambda: [Document(id, text) for id, text in TEXTS.items()]
    said = {name: [f"{name} {i}" for i in range(len(acts))] for name in ("labels", "warm", "rl")}
    rows = OneDocument(acts, said)
    return SimpleNamespace(
        run=run,
        subject=subject,
        pair=pair,
        warm=dataclasses.replace(pair),
        vectors=acts.vectors,
        documents=acts.doc_ids,
        column=rows.column,
        texts=rows.texts,
        recon=lambda name: rebuilt,
    )


def expected(subject) -> Activations:
    """Every token of the typical document that may be sampled."""
    acts = extract(subject, [TEXTS["middle"]], "all")
    return acts[(acts.positions >= FIRST) & (acts.positions < LAST)]


def shown(context, count=3) -> dict:
    return documents(context, Shown(context, {"fve_rl": np.arange(6) / 10}), count)


def test_every_token_is_explained_and_scored(context, subject, pair):
    """By the formulas, from activations and texts that the public functions give."""
    found = shown(context)
    whole, *others = found["documents"]
    assert found["whole"] == RULE and whole["document"] == "middle" and TEXTS["middle"].startswith(whole["text"])
    assert [document["document"] for document in others] == ["low", "high"] and "note" not in others[0]
    acts = expected(subject)
    assert [row["place"] for row in whole["rows"]] == (acts.positions + 1).tolist() and len(acts) > 40
    assert "".join(TEXTS["middle"][row["start"] : row["end"]] for row in whole["rows"]) == "".join(acts.tokens)
    said = [one.accepted or "" for one in pair.explain(acts.vectors, 64, 0.0)]
    unit = context.vectors / np.sqrt(np.square(context.vectors).mean(1, keepdims=True))
    cosines = pair.score(said, acts.vectors)["cosine"]
    fve = 1 - 2 * (1 - cosines) / unit.var(0).mean()
    assert len(set(said)) > 10
    for row, text, score, cosine in zip(whole["rows"], said, fve, cosines, strict=True):
        if row["place"] - 1 in PLACES:  # was evaluated: the page says of it what it says elsewhere
            assert (row["rl"], row["fve_rl"]) in {("rl 2", 0.2), ("rl 3", 0.3)}
            continue
        assert row["rl"] == row["warm"] == text and "labels" not in row
        assert row["fve_rl"] == row["fve_warm"] == pytest.approx(score, abs=1e-5)
        assert row["cos_rl"] == pytest.approx(cosine, abs=1e-5)
    table = pq.read_table(context.run.workdir / "evaluation/whole_document.parquet").to_pydict()
    assert table["token"] == acts.tokens
    on_page = lambda key: [row[key] for row in whole["rows"]]  # the file says the same
    assert table["rl"] == on_page("rl") and table["warm"] == on_page("warm")
    np.testing.assert_allclose(table["fve_rl"], on_page("fve_rl"), atol=1e-4)


def test_attention_sinks_are_left_out(context, subject):
    acts = expected(subject)
    norms = np.linalg.norm(acts.vectors, axis=1)
    context.vectors = context.vectors * (np.median(norms) / 5 / np.median(np.linalg.norm(context.vectors, axis=1)))
    places = {row["place"] for row in shown(context)["documents"][0]["rows"]}
    assert places == set(1 + acts.positions[norms <= np.median(norms)])


def test_of_a_chat_only_what_is_said_has_a_colour(context):
    messages = [
        {"role": "user", "content": SENTENCES[0] + SENTENCES[1]},
        {"role": "assistant", "content": "Indeed so."},
    ]
    context.run.documents = lambda: [Document("chat", "", tuple(messages))]
    known = {"doc_id": ["chat"] * 6, "token_ids": [[]] * 6, "n_raw_tokens": [0] * 6}  # no row of the chat was evaluated
    context.column = lambda name, column=context.column: known[name] if name in known else column(name)
    context.run.config = dataclasses.replace(
        context.run.config, extract=dataclasses.replace(context.run.config.extract, min_position=0)
    )
    whole = shown(context)["documents"][0]
    by_role = dict.fromkeys(("user", "assistant"), "")
    for row in whole["rows"]:
        (role,) = [kind.removeprefix("spoken by the ") for kind in row["kinds"] if kind.startswith("spoken")]
        by_role[role] += whole["text"][row["start"] : row["end"]]
    assert by_role == {message["role"]: message["content"] for message in messages}


def test_where_the_text_is_not_there_a_sentence_says_why(context):
    sampled = Shown(context, {"fve_rl": np.arange(6) / 10}).documents(3)
    config = context.run.config
    source = dataclasses.replace(config.extract.source, rl="rl.parquet")
    cases = {
        "came from files": dict(
            config=dataclasses.replace(config, extract=dataclasses.replace(config.extract, source=source))
        ),
        "'middle' as it was": dict(documents=lambda: [Document("middle", TEXTS["low"])]),
        "does not hold the document": dict(documents=list),
    }
    for words, changes in cases.items():
        context.run = SimpleNamespace(**(vars(context.run) | {"config": config} | changes))
        found = shown(context)
        assert found["documents"] == sampled and found["whole"].startswith("No document is shown whole. The ")
        assert words in found["whole"] and found["whole"].endswith(".")
    assert shown(context, 0) == {"documents": [], "whole": ""}


def test_the_typical_document_is_the_median_of_those_with_enough_rows():
    ids = [id for id, count in (("a", 3), ("b", 3), ("c", 4), ("d", 3), ("best", 1)) for _ in range(count)]
    fve = [0.1] * 3 + [0.5] * 3 + [0.3, 0.4, 0.2, 0.3] + [0.2] * 3 + [0.25]
    assert typical(ids, np.array(fve)) == "d"  # of .1, .2, .3 and .5 the lower one in the middle
