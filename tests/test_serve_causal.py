"""What the page of `nla serve` computes beyond explanations: ablated claims, nearest activations, patches, steering."""

import dataclasses
import json
import math

import numpy as np
import pytest
import test_serve
from conftest import LIMIT, SENTENCES, VARIANCE, one_sentence
from test_serve import CHAT, TEXT, ask, refused

import nla_jax as nla
from nla_jax.io.parquet import SIDECAR, write_table
from nla_jax.labels.extractive import label_one
from nla_jax.probes.evidence import Sentences
from nla_jax.runtime.errors import InputError
from nla_jax.serve import actions, interventions, models, nearest
from nla_jax.serve.actions import Desk, Limits
from nla_jax.serve.claims import claims_of, without_each
from nla_jax.serve.worker import Worker
from nla_jax.steering import EDIT, NOTHING, PARAPHRASE, RANDOM, UNRELATED, UNSTEERED
from nla_jax.subject import extract, load_subject
from nla_jax.tools.claims import ClaimReader

ROW = 6


@pytest.fixture(scope="module")
def desk(served):
    worker = Worker(16, 10_000)
    yield Desk(served, worker, Limits())
    worker.close()


client = test_serve.client  # a fixture, with the desk of this file


@pytest.fixture(scope="module")
def upto(served):
    """The tokens of TEXT up to ROW, and the activation there."""
    found = extract(served[0].subject, [TEXT], ROW + 1)  # its first token is special
    return found.token_ids[0], found.vectors[0]


@pytest.fixture
def document(client):
    return ask(client, "read", text=TEXT)[0]["id"]


# Claims


def test_a_claim_is_worth_what_its_deletion_costs(served, desk, client, document, monkeypatch):
    said = label_one("In the morning the market opens; by noon the fish are gone and only bread is left")
    desk.documents[document].answers[0, ROW] = {"explanation": said}
    (answer,) = ask(client, "ablate", document=document, row=ROW)
    assert [claim["kind"] for claim in claims_of(said, TEXT)] == ["passage", "position", "last words", "last word"]
    texts = [one["text"] for one in answer["ablations"]]
    assert texts == without_each(said) and texts[0] == "It ends late in a sentence with left: … is left"
    assert texts[2] == "An opening. It ends late in a sentence" and texts[3].endswith("sentence: … is")
    vector = desk.documents[document].vectors[0][[ROW]]
    mse = lambda text: served[0].pair.score([text], vector)["mse"][0]
    for one in answer["ablations"]:
        assert one["fve"] == pytest.approx((mse(said) - mse(one["text"])) / VARIANCE, abs=1e-4)
        assert one["mse"] == pytest.approx(100 * (mse(one["text"]) / mse(said) - 1), abs=0.05)
    monkeypatch.setattr(models, "without_each", lambda *_: 1 / 0)
    assert ask(client, "ablate", document=document, row=ROW) == [answer]  # it is kept


def test_an_explanation_without_claims_has_none_to_take_out(desk, client, document):
    desk.documents[document].answers[1, ROW] = {"explanation": "It is about rivers."}
    (answer,) = ask(client, "ablate", document=document, row=ROW, pair=1)
    assert answer == {"pair": 1, "row": ROW, "ablations": []}


def test_the_confidence_of_a_claim_is_the_share_of_samples_that_make_it(served, desk, client, document, monkeypatch):
    grammar, pair = Sentences(), served[1].pair
    sure = [served[0], dataclasses.replace(served[1], claims=ClaimReader(grammar, 3))]
    monkeypatch.setattr(desk, "served", sure)
    assert sure[1].about["confidence"]["samples"] == 3 and sure[0].about["confidence"] is None
    known = desk.documents[document]
    known.answers.clear()  # what other tests have put there
    answers = ask(client, "explain", document=document, rows=list(range(len(known.vectors[1]))), pairs=[1])
    said = next(one for one in answers if grammar.claims(one["explanation"]))
    row = said["row"]
    (answer,) = ask(client, "confidence", document=document, row=row, pair=1)
    vectors = np.repeat(known.vectors[1][[row]], 3, axis=0)
    samples = [grammar.claims(text) for text in pair.verbalize(vectors, LIMIT, 1.0, 1, first=3 * row)]
    makes = lambda claim, of: any(grammar.same(claim, other) for other in of)
    share = {
        claim.value: np.mean([makes(claim, of) for of in samples]) for claim in grammar.claims(said["explanation"])
    }
    assert {one["text"]: one["confidence"] for one in answer["confidence"]} == pytest.approx(share, abs=1e-4) and share
    monkeypatch.setattr(actions, "confidence", lambda *_: 1 / 0)
    assert ask(client, "confidence", document=document, row=row, pair=1) == [answer]  # it is kept
    assert "without the confidence" in refused(client, "confidence", document=document, row=ROW)


def test_where_nothing_is_said_there_are_no_claims_to_be_sure_of(served, desk, document):
    silent = dataclasses.replace(served[0], max_new_tokens=1, claims=ClaimReader(Sentences(), 2))
    desk.documents[document].answers[0, 1] = {"explanation": "", "cut": True}
    assert models.confidence(silent, 0, desk.documents[document], 1) == {"pair": 0, "row": 1, "confidence": []}


# Patching


def test_patches_are_those_of_nla_patch(served, desk, client, document, upto):
    desk.documents[document].answers[0, ROW] = {"explanation": "The river and the mill."}
    *_, answer = ask(client, "patch", document=document, row=ROW)
    ids, h = upto
    recon = served[0].pair.reconstruct(["The river and the mill.", served[0].unrelated])
    clean, patched, other = nla.patch(
        served[0].subject, [ids], "last", {"h": None, "recon": recon[:1], "other": recon[1:]}
    ).values()
    own, reconstructed, unrelated, random = answer["patched"]
    assert own["kl"] == 0 and random["state"] == "random direction" and random["kl"] > 0
    for found, expected in ((own, clean), (reconstructed, patched), (unrelated, other)):
        p, q = clean[0][-1].astype(np.float64), expected[0][-1].astype(np.float64)
        assert found["kl"] == pytest.approx(np.sum(np.exp(p) * (p - q)), rel=1e-3, abs=1e-5)
        best = np.argsort(-q)[:5]
        assert [token for token, _ in found["next"]] == [served[0].subject.tokenizer.decode([i]) for i in best]
        np.testing.assert_allclose([value for _, value in found["next"]], np.exp(q[best]), rtol=1e-3)


def test_a_token_of_a_chat_is_patched_where_it_stands(served, client):
    (shown,) = ask(client, "read", messages=CHAT)
    *_, answer = ask(client, "patch", document=shown["id"], row=len(shown["tokens"]) - 1, pair=1)
    assert answer["pair"] == 1 and all(math.isfinite(row["kl"]) for row in answer["patched"])


def test_the_whole_subject_is_loaded_when_it_is_first_needed(
    served, subject_folder, client, desk, document, monkeypatch
):
    fresh = dataclasses.replace(served[0], subject=load_subject(subject_folder, 1))
    monkeypatch.setattr(desk, "served", [fresh])
    assert not interventions.is_whole(fresh.subject)
    first, answer = ask(client, "patch", document=document, row=2)
    assert first == {"loading": True} and len(answer["patched"]) == 4 and interventions.is_whole(fresh.subject)
    (_,) = ask(client, "patch", document=document, row=3)


def test_a_subject_that_is_not_whole_is_said_in_one_sentence(
    served, subject_folder, client, desk, document, monkeypatch, tmp_path
):
    gone = dataclasses.replace(load_subject(subject_folder, 1), folder=tmp_path / "gone")
    monkeypatch.setattr(desk, "served", [dataclasses.replace(served[0], subject=gone)])
    for fields in ({"do": "patch"}, {"do": "steer", "edited": "A market.", "strengths": [1]}):
        said = refused(client, fields.pop("do"), document=document, row=4, **fields)
        assert said.startswith("Patching and steering need the whole subject, which cannot be loaded here: ")


def test_a_token_far_into_a_text_is_refused(client, document, monkeypatch):
    monkeypatch.setattr(interventions, "MOST", 5)
    assert "more than the 5 that this panel takes" in refused(client, "patch", document=document, row=9)


# Steering


def test_steering_is_that_of_nla_steer(served, desk, client, document, upto):
    original, edited = "The river and the mill.", "The market and the mill."
    desk.documents[document].answers[0, ROW] = {"explanation": original}
    answers = ask(client, "steer", document=document, row=ROW, edited=edited, strengths=[0.5, 2, 0.5])
    answers = [answer for answer in answers if "loading" not in answer]
    assert [answer["strength"] for answer in answers] == [0.5, 2]
    text = served[0].subject.tokenizer.decode(upto[0], skip_special_tokens=True)
    options = {"explanation": original, "edit": ("river", "market")}
    steered = lambda strength: nla.steer(served[0].subject, served[0].pair, text, strengths=[strength], **options)
    recon = served[0].pair.reconstruct([original, edited])
    for answer in answers:
        assert [row["direction"] for row in answer["steered"]] == [
            UNSTEERED,
            EDIT,
            NOTHING,
            PARAPHRASE,
            UNRELATED,
            RANDOM,
        ]
        found = steered(answer["strength"])
        for row, one in zip(answer["steered"], found.rows):
            assert (row["direction"], row["continuation"]) == (one.direction, one.continuation)
            assert row["kl"] == pytest.approx(one.kl, rel=1e-3, abs=1e-6)
            assert row["p"] == pytest.approx([found.probability(word, one) for word in ("market", "river")], rel=1e-3)
        edit = answer["edit"]
        assert edit["words"] == ["market", "river"] and (edit["explanation"], edit["edited"]) == (original, edited)
        assert edit["size"][EDIT] == pytest.approx(
            np.linalg.norm(recon[1] - recon[0]) / np.linalg.norm(recon[0]), rel=1e-4
        )
        assert edit["cosine"] == pytest.approx(recon[0] @ recon[1] / np.prod(np.linalg.norm(recon, axis=1)), rel=1e-4)


@pytest.mark.parametrize(
    "fields, said",
    [
        ({"edited": "  "}, "write something"),
        ({"edited": 3}, "write something"),
        ({"edited": "x" * 5000}, "1 to 4,000 characters"),
        ({"edited": "half \ud800"}, "half of a character"),
        ({"edited": "The river and the mill. "}, "not changed"),
        ({"strengths": []}, "strengths is a list"),
        ({"strengths": [0]}, "strengths is a list"),
        ({"strengths": [True]}, "strengths is a list"),
        ({"strengths": list(range(1, 20))}, "strengths is a list"),
        ({"pair": 2}, "A pair's number"),
        ({"row": None}, "A token's number"),
    ],
    ids=str,
)
def test_wrong_edits_are_named(desk, client, document, fields, said):
    desk.documents[document].answers[0, ROW] = {"explanation": "The river and the mill."}
    given = {"document": document, "row": ROW, "edited": "A market.", "strengths": [1]} | fields
    assert said in refused(client, "steer", **given)


def test_the_words_of_an_edit():
    words = interventions.changed_words('Prose. Next "mill" or "sea", a b', 'Prose. Next "market", sea_side c d e f')
    assert words == ["market", "side", "c", "mill", "or", "a"]


# Nearest training activations


@pytest.fixture(scope="module")
def workdir(served, tmp_path_factory):
    """The folder of a run that has trained on a few activations."""
    folder = tmp_path_factory.mktemp("trained")
    for split, texts in (("av_sft", SENTENCES[:2]), ("rl", SENTENCES[2:])):
        write_table(
            extract(served[0].subject, texts, "all").table(), folder / f"activations/{split}-00000-of-00001.parquet"
        )
    return folder


def test_the_nearest_are_those_of_largest_cosine(served, desk, client, document, workdir, monkeypatch):
    training = nearest.training_of(workdir, served[0].pair, "first")
    trained = extract(served[0].subject, SENTENCES, "all")
    assert len(training) == len(trained)
    monkeypatch.setattr(desk, "served", [dataclasses.replace(served[0], training=training)])
    desk.documents[document].answers[0, ROW] = {"explanation": "The river and the mill."}
    (answer,) = ask(client, "nearest", document=document, row=ROW)
    recon = served[0].pair.reconstruct(["The river and the mill."])[0]
    cosines = trained.vectors @ recon / np.linalg.norm(trained.vectors, axis=1) / np.linalg.norm(recon)
    best = np.argsort(-cosines)[:5]
    assert answer["among"] == len(trained) and len(answer["nearest"]) == 5
    for i, found in zip(best, answer["nearest"]):
        assert found["cosine"] == pytest.approx(cosines[i], abs=1e-5)
        assert (found["text"], found["token"]) == (trained.texts[i][-160:], trained.tokens[i])
        assert (found["position"], found["role"]) == (trained.positions[i], "")
    own = training.nearest(trained.vectors[[3, -1]], 1)  # of both splits
    assert [found["text"] for (found,) in own] == [trained.texts[3], trained.texts[-1]]


def test_of_very_many_activations_some_are_compared(served, workdir, monkeypatch):
    training = nearest.training_of(workdir, served[0].pair, "first")
    whole = [len(rows) for rows in training.splits]
    monkeypatch.setattr(nearest, "MOST", 10)
    monkeypatch.setattr(nearest, "CHUNK", 3)
    steps = [-(-n // 10) for n in whole]
    assert len(training) == sum(-(-n // step) for n, step in zip(whole, steps)) <= 20
    trained = extract(served[0].subject, SENTENCES[2:], "all")
    ((found,),) = training.nearest(trained.vectors[[2 * steps[1]]], 1)
    assert found["text"] == trained.texts[2 * steps[1]]


def test_activations_of_another_run_are_refused(served, client, document, workdir, tmp_path):
    assert "--workdir" in refused(client, "nearest", document=document, row=ROW)
    with pytest.raises(InputError, match="holds no training activations") as error:
        nearest.training_of(tmp_path, served[0].pair, "first")
    one_sentence(error)
    shard = workdir / "activations/rl-00000-of-00001.parquet"
    sidecar = shard.with_name(shard.name + SIDECAR)
    sidecar.write_text(json.dumps({"extraction": {"layer_index": 7}}))
    with pytest.raises(InputError, match="are not those of first: layer 7, not 1") as error:
        nearest.training_of(workdir, served[0].pair, "first")
    one_sentence(error)
    sidecar.unlink()
