"""Ranks by hand: reconstructions that point at their own activation, at another's, or at nothing."""

import numpy as np
import pytest
from fake_readers import Held

from nla_jax.probes.probe import figures, run_probe
from nla_jax.probes.retrieval import (
    MOST,
    candidates_of,
    expected,
    first_and_reciprocal,
    hits,
    position_match,
    ranked,
    reciprocal_rank,
)
from nla_jax.runtime.user_code import UserFunction


def context_of(recon, vectors, documents):
    recon, vectors = (np.asarray(x, np.float32) for x in (recon, vectors))
    return Held(vectors=vectors, documents=documents, seed=0, recon=lambda name: {"rl": recon}[name])


def test_places_among_ties_are_drawn_by_chance():
    first, reciprocal = expected(np.array([0, 0, 2, 1]), np.array([0, 2, 0, 1]))
    np.testing.assert_allclose(first, [1, 1 / 3, 0, 0])
    np.testing.assert_allclose(reciprocal, [1, (1 + 1 / 2 + 1 / 3) / 3, 1 / 3, (1 / 2 + 1 / 3) / 2])


def test_ranks_are_what_a_plain_loop_finds():
    rng = np.random.default_rng(0)
    gold, documents = rng.normal(size=(12, 5)), [f"d{i // 2}" for i in range(12)]
    recon = gold + rng.normal(size=(12, 5))
    cos = lambda a, b: a @ b / np.linalg.norm(a) / np.linalg.norm(b)
    ranks = []
    for i in range(12):
        others = [j for j in range(12) if documents[j] != documents[i]]
        assert len(others) == 10
        ranks.append(1 + sum(cos(recon[i], gold[j]) > cos(recon[i], gold[i]) for j in others))
    assert len(set(ranks)) > 2
    context = context_of(recon, gold, documents)
    assert hits(context)["hit_at_1_rl"].tolist() == [float(rank == 1) for rank in ranks]
    np.testing.assert_allclose(reciprocal_rank(context)["mrr_rl"], 1 / np.array(ranks), rtol=1e-6)
    np.testing.assert_allclose(hits(context)["hit_at_1_chance"], np.full(12, 1 / 11))
    np.testing.assert_allclose(reciprocal_rank(context)["mrr_chance"], np.full(12, sum(1 / np.arange(1, 12)) / 11))


def test_exact_reconstructions_come_first_and_shuffled_ones_do_not():
    gold, documents = np.eye(30)[:, ::-1] * 3 + 1, [f"d{i // 3}" for i in range(30)]
    scores = hits(context_of(gold * 2, gold, documents))  # length does not matter
    assert scores["hit_at_1_rl"].tolist() == [1] * 30 and scores["hit_at_1_shuffled"].tolist() == [0] * 30
    match = position_match(context_of(gold, gold, documents))
    assert match["position_match_rl"].tolist() == [1] * 30
    np.testing.assert_allclose(match["position_match_chance"], np.full(30, 1 / 3))


def test_one_vector_for_all_is_chance_where_activations_are_alike():
    gold, documents = np.eye(20), [f"d{i // 4}" for i in range(20)]
    context = context_of(np.ones((20, 20)), gold, documents)  # as near to each
    for scores in (hits(context), reciprocal_rank(context), position_match(context)):
        rl, shuffled, chance = scores.values()
        np.testing.assert_allclose(rl, chance)
        np.testing.assert_allclose(shuffled, chance)


def test_a_text_that_names_the_document_finds_no_position():
    documents = [f"d{i // 4}" for i in range(20)]
    gold = np.kron(np.eye(5), np.ones((4, 1))) * 5  # one direction for each document, and a small one for each row
    gold = np.concatenate([gold, np.eye(20)], axis=1)
    recon = gold.copy()
    recon[:, 5:] = 0
    context = context_of(recon, gold, documents)
    assert hits(context)["hit_at_1_rl"].tolist() == [1] * 20  # rows of the own document do not compete
    np.testing.assert_allclose(position_match(context)["position_match_rl"], np.full(20, 1 / 4))


def test_documents_with_one_row_have_no_positions():
    gold = np.eye(5)
    match = position_match(context_of(gold, gold, ["a", "a", "b", "c", "c"]))
    for values in match.values():
        assert np.isnan(values[2]) and not np.isnan(values[[0, 1, 3, 4]]).any()
    drawn = figures(position_match, match, ["a", "a", "b", "c", "c"])["scores"]
    assert [score["mean"] for score in drawn] == [1.0, pytest.approx(drawn[1]["mean"]), 0.5]


def test_at_most_so_many_rows_are_ranked():
    rng, count = np.random.default_rng(1), 2 * MOST + 7
    gold = rng.normal(size=(count, 4)).astype(np.float32)
    context = context_of(gold, gold, [str(i) for i in range(count)])
    scores = run_probe(UserFunction("probe", "hits", hits), hits, context)
    seen = ~np.isnan(scores["hit_at_1_rl"])
    assert seen.sum() == MOST and seen[[0, -1]].all()
    assert scores["hit_at_1_rl"][seen].tolist() == [1] * MOST
    np.testing.assert_allclose(ranked(context)["chance"][0][seen], 1 / MOST)


def test_candidates_are_the_row_and_other_documents():
    np.testing.assert_array_equal(candidates_of(["a", "a", "b"]), [[1, 0, 1], [0, 1, 1], [1, 1, 1]])
    first, _ = first_and_reciprocal(np.eye(2)[::-1].copy(), np.eye(2), np.ones((2, 2), bool))
    assert first.tolist() == [0, 0]
