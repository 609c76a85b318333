"""Baselines without any text, on activations of which the answer is known."""

from types import SimpleNamespace

import numpy as np
import pytest

from nla_jax.fve import fve, normalise
from nla_jax.probes.baselines import (
    TOKENS,
    Fit,
    beyond_tokens,
    by_place,
    choose,
    last_tokens,
    regression,
    token_means,
    tokens,
)
from nla_jax.probes.linear import set_aside
from nla_jax.probes.probe import Context

RNG = np.random.default_rng(0)
EMBEDDING = RNG.normal(size=(40, 12)).astype(np.float32)
MAPS = RNG.normal(size=(2, 12, 6))


class Held(Context):
    """What a probe may read, of given rows."""

    def __init__(self, **facts):
        self.__dict__.update(facts)


def rows(count: int, order: int):
    """Activations that are a linear function of the last `order` tokens' embeddings, with the ids of their texts."""
    ids = RNG.integers(0, 40, (count, 10))
    vectors = sum(EMBEDDING[ids[:, -1 - n]] @ MAPS[n] for n in range(order)) + 3.0
    return ids, vectors.astype(np.float32)


def fit_of(ids, vectors):
    return Fit(last_tokens(ids.tolist()), normalise(vectors.astype(np.float64)), EMBEDDING)


def context_of(order: int, count: int = 600, held: int = 90, spoken: bool = False):
    (train, vectors), (test, gold) = rows(count, order), rows(held, order)

    def columns(ids):
        of = {"token_ids": ids.tolist(), "doc_id": [f"d{i // 6}" for i in range(len(ids))]}
        of |= {"token": [f" t{row[-1]}" for row in ids.tolist()], "n_raw_tokens": [10] * len(ids)}
        return lambda name: of.get(name, ["user" if spoken and i % 2 else "" for i in range(len(ids))])

    asked = []
    return Held(
        vectors=gold,
        pair=SimpleNamespace(sidecar=SimpleNamespace(layers=(1,))),
        training=SimpleNamespace(vectors=vectors, column=columns(train)),
        column=columns(test),
        embedding=EMBEDDING,
        recon=lambda name: gold,
        row_fve=lambda texts: asked.extend(texts) or np.zeros(len(texts)),
        asked=asked,
    )


def test_last_tokens_are_aligned_at_the_end():
    found = last_tokens([[5], list(range(20)), ()])
    assert found.shape == (3, TOKENS) and found[:, -1].tolist() == [5, 19, -1]
    assert found[0, :-1].tolist() == [-1] * (TOKENS - 1) and found[1].tolist() == list(range(12, 20))


def test_a_table_of_means_is_what_a_plain_loop_finds():
    ids, vectors = rows(300, 1)
    fit, strength = fit_of(ids % 5, vectors), 2.0
    asked = last_tokens([[1, 2], [7, 2], [3, 39]])
    found = token_means(fit, asked, 2, strength)
    mean = fit.vectors.mean(0)

    def pulled(end, prior):
        there = [v for v, row in zip(fit.vectors, fit.ids) if tuple(row[-len(end) :]) == end]
        return (sum(there) + strength * prior) / (len(there) + strength) if there else prior

    two = pulled((2,), mean)
    np.testing.assert_allclose(
        found, [pulled((1, 2), two), two, mean], rtol=1e-9
    )  # 39 was never seen, nor was 7 before 2


def test_a_regression_finds_a_linear_function_of_the_last_tokens():
    ids, vectors = rows(800, 2)
    # The lengths of activations differ, and a regression to unit length is not exact: its direction is nearly so.
    fit, (test, gold) = Fit(last_tokens(ids.tolist()), vectors.astype(np.float64), EMBEDDING), rows(200, 2)
    two, one = (fve(regression(fit, last_tokens(test.tolist()), n, 1e-6), gold) for n in (2, 1))
    assert two > 0.999 and one < 0.8


def test_the_setting_is_the_one_that_is_best_on_other_documents():
    ids, vectors = rows(600, 2)
    documents = [f"d{i // 6}" for i in range(600)]
    grid = [{"order": n, "penalty": p} for n in (1, 2, 8) for p in (1e-4, 100.0)]
    assert choose(regression, fit_of(ids, vectors), documents, grid) == {"order": 2, "penalty": 1e-4}
    assert choose(regression, fit_of(ids, vectors), ["one"] * 600, grid) == grid[0]


def test_parts_of_a_document_are_set_aside_together():
    ids = [f"{letter}{part}" for letter in "abcdefgh" for part in ("", "#2", "#10003")]
    aside = set_aside(ids).reshape(8, 3)
    assert (aside == aside[:, :1]).all() and aside[:, 0].sum() == 2


def test_tokens_that_determine_the_activation_leave_nothing_beyond_them():
    context = context_of(order=1, count=2000)
    scores = tokens(context)
    assert scores["fve_token_mean"].mean() > 0.95 and scores["fve_token_ridge"].mean() > 0.9
    assert scores["fve_nearest"].mean() > 0.95
    assert scores["fve_constant"].mean() < 0
    assert context.asked[0] == context.column("token")[0].strip()
    assert beyond_tokens(context)["fve_beyond_tokens"] == pytest.approx(np.ones(90))  # the reconstruction is exact
    context.recon = lambda name: -context.vectors
    assert beyond_tokens(context)["fve_beyond_tokens"].mean() < -10


def test_two_tokens_beat_one_where_the_activation_holds_two():
    scores = {name: values.mean() for name, values in tokens(context_of(order=2, count=2000)).items()}
    assert scores["fve_token_ridge"] > scores["fve_token_mean"] + 0.1


def test_rows_without_ids_have_the_baselines_that_need_none():
    context = context_of(order=1)
    for of in (context, context.training):
        column = of.column
        of.column = lambda name, column=column: [""] * len(column("token")) if name == "token_ids" else column(name)
    assert set(tokens(context)) == {"fve_nearest", "fve_constant", "fve_token_name"}
    assert beyond_tokens(context) == {}


def test_places_are_groups_of_the_rows():
    context = context_of(order=1, spoken=True)
    context.column = lambda name, column=context.column: [" 7"] * 30 + ["ab"] * 60 if name == "token" else column(name)
    scores = by_place(context)
    numbers = scores["number"]
    assert np.isnan(numbers[30:]).all() and not np.isnan(numbers[:30]).any()
    assert np.isnan(scores["within a word"]).sum() == 30 and "a word begins" not in scores
    assert np.isnan(scores["spoken by the user"]).sum() == 45
