"""Causal patches: against a forward hook of torch, and against what is known of them."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import SENTENCES, copy_before, nla_main, one_sentence
from parity import torch_model

import nla_jax as nla
from nla_jax.patching import effects, patch, resized
from nla_jax.probes import patching as probes
from nla_jax.probes.fidelity import derangement
from nla_jax.probes.probe import Context, figures
from nla_jax.subject import extract, load_subject

LAYER = 1


@pytest.fixture(scope="module")
def subject(subject_folder):
    return load_subject(subject_folder, LAYER)


@pytest.fixture(scope="module")
def rows(subject):
    return [list(ids) for ids in extract(subject, SENTENCES, "last").token_ids]


def hooked(model, ids, places, vectors):
    """Torch's log-probabilities `[T, V]` of one row, with the output of block LAYER replaced."""
    import torch

    def replaced(_, __, out):
        hidden = out[0] if isinstance(out, tuple) else out
        for place, vector in zip(places, vectors):
            hidden[0, place] = torch.tensor(vector)
        return out

    hook = model.model.layers[LAYER].register_forward_hook(replaced)
    with torch.no_grad():
        found = model(torch.tensor([ids])).logits[0].log_softmax(-1).numpy()
    hook.remove()
    return found


@pytest.fixture(scope="module")
def torch_subject(subject_folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(subject_folder, attn_implementation="eager").eval()


@pytest.mark.torch
@pytest.mark.parametrize("places", [[-1, -1, -1, -1], [[3], [0], [-2], [5]], [[4, 5, 6], [2], [1, 9], [0, 1, -1]]])
def test_a_patch_is_torchs_forward_hook(subject, rows, torch_subject, places):
    per_row = [np.atleast_1d(given) % len(row) for given, row in zip(places, rows)]
    n = sum(map(len, per_row))
    vectors = np.random.default_rng(0).normal(size=(n, subject.model.config.width)).astype(np.float32)
    found = patch(subject, rows, places, vectors, rescale=False)
    at = 0
    for row, chosen, ours in zip(rows, per_row, found):
        expected = hooked(torch_subject, row, chosen, vectors[at : at + len(chosen)])[min(chosen) :]
        at += len(chosen)
        assert ours.shape == expected.shape
        np.testing.assert_allclose(ours, expected, atol=1e-4)


@pytest.mark.torch
@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3"])
def test_a_patch_in_models_with_windows_is_torchs(family, tokenizer, tmp_path):
    model = torch_model(family)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    subject, rng = load_subject(tmp_path, LAYER), np.random.default_rng(1)
    rows = [rng.integers(5, 320, n).tolist() for n in (24, 9)]
    vectors = rng.normal(size=(3, 32)).astype(np.float32)
    found = patch(subject, rows, [[10, 12], [8]], vectors, rescale=False)
    for row, chosen, own, ours in zip(rows, ([10, 12], [8]), (vectors[:2], vectors[2:]), found):
        np.testing.assert_allclose(ours, hooked(model, row, chosen, own)[chosen[0] :], atol=1e-4)


def test_the_activation_itself_changes_nothing(subject, rows):
    own = extract(subject, SENTENCES, -3).vectors
    for rescale in (True, False):
        found = patch(subject, rows, [-3] * 4, {"clean": None, "own": own}, rescale=rescale)
        for clean, patched in zip(found["clean"], found["own"]):
            np.testing.assert_array_equal(clean, patched)
        effect = effects(subject, rows, [-3] * 4, {"own": own}, rescale=rescale)["own"]
        assert all(kl.tolist() == [0, 0, 0] for kl in effect.kl)


def test_vectors_get_the_length_of_what_they_replace(subject, rows):
    own = extract(subject, SENTENCES, "last").vectors
    vectors = np.random.default_rng(0).normal(size=own.shape).astype(np.float32)
    lengths = np.linalg.norm(own, axis=1, keepdims=True)
    by_hand = vectors / np.linalg.norm(vectors, axis=1, keepdims=True) * lengths
    for ours, expected in zip(
        patch(subject, rows, "last", 7 * vectors), patch(subject, rows, "last", by_hand, rescale=False)
    ):
        np.testing.assert_allclose(ours, expected, atol=1e-5)
    np.testing.assert_array_equal(resized(own, own), own)


def test_figures_are_those_of_the_distributions(subject, rows):
    vectors = np.random.default_rng(0).normal(size=(4, subject.model.config.width)).astype(np.float32)
    places = [2, 5, 9, -1]
    found = patch(subject, rows, places, {"clean": None, "new": vectors})
    effect = effects(subject, rows, places, {"clean": None, "new": vectors})
    for i, (row, place) in enumerate(zip(rows, places)):
        p, q = (found[name][i].astype(np.float64) for name in ("clean", "new"))
        np.testing.assert_allclose(effect["new"].kl[i], (np.exp(p) * (p - q)).sum(-1), atol=1e-5)
        assert effect["new"].kl[i].min() > 0 and not effect["clean"].kl[i].any()
        next_ids = row[place % len(row) + 1 :]
        expected = [-q[j, id] for j, id in enumerate(next_ids)]
        np.testing.assert_allclose(effect["new"].loss[i][:-1], expected, rtol=1e-4)
        assert np.isnan(effect["new"].loss[i][-1]) and len(effect["new"].loss[i]) == len(next_ids) + 1


def test_rows_do_not_depend_on_those_beside_them(subject, rows):
    vectors = np.random.default_rng(0).normal(size=(4, subject.model.config.width)).astype(np.float32)
    together = nla.patch(subject, rows, [1, 8, -1, 3], vectors)
    alone = nla.patch(subject, rows, [1, 8, -1, 3], vectors, batch=1)
    for a, b in zip(together, alone):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_a_subject_on_a_mesh_says_the_same(subject, subject_folder, rows):
    there = load_subject(subject_folder, LAYER, mesh=nla.make_mesh(2, 2, 2))
    vectors = np.random.default_rng(0).normal(size=(5, 32)).astype(np.float32)
    places = [1, [3, 8], -1, 3]
    for a, b in zip(patch(there, rows, places, vectors), patch(subject, rows, places, vectors)):
        np.testing.assert_allclose(a, b, atol=1e-3)


@pytest.mark.torch
def test_the_last_block_can_be_patched(subject_folder, rows, torch_subject):
    last = load_subject(subject_folder, 2)
    vectors = np.random.default_rng(0).normal(size=(4, 32)).astype(np.float32)
    import torch

    with torch.no_grad():
        expected = torch_subject.lm_head(torch_subject.model.norm(torch.tensor(vectors))).log_softmax(-1).numpy()
    found = patch(last, rows, "last", vectors, rescale=False)
    np.testing.assert_allclose(np.concatenate(found), expected, atol=1e-4)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"positions": [0, 1]}, "for each of 4 rows"),
        ({"positions": "first"}, "'last'"),
        ({"positions": [0, 1, 2, 900]}, "Position 900"),
        ({"positions": [0, 1, 2, []]}, "Row 3 has no position"),
        ({"vectors": np.ones((3, 32))}, r"shape \[3, 32\], expected \[4, 32\]"),
        ({"vectors": {"mine": np.full((4, 32), np.nan)}}, "'mine' hold NaN"),
        ({"vectors": np.zeros((4, 32))}, "rescale=False"),
        ({"vectors": "x"}, "array of numbers"),
        ({"vectors": np.full((4, 32), 1 + 2j)}, "array of numbers"),
        ({"vectors": np.full((4, 32), "1")}, "array of numbers"),
        ({"vectors": np.full((4, 32), "2026-01-01", "datetime64[s]")}, "array of numbers"),
        ({"token_rows": [[1], [], [2], [3]]}, "Row 1 must be"),
        ({"token_rows": [[1], [9999], [2], [3]]}, "id 9999"),
    ],
)
def test_wrong_input_is_named(subject, rows, change, said):
    given = {"token_rows": rows, "positions": "last", "vectors": np.ones((4, 32))} | change
    with pytest.raises(nla.InputError, match=said) as error:
        patch(subject, **given)
    one_sentence(error)


def test_extreme_lengths_and_batches_change_nothing(subject, rows):
    vectors = np.random.default_rng(0).normal(size=(4, 32))
    expected = patch(subject, rows, "last", vectors)
    for given, batch in ((vectors * 1e-300, 16), (vectors * 1e300, 16), (vectors, 10**18)):
        for a, b in zip(patch(subject, rows, "last", given, batch=batch), expected):
            np.testing.assert_allclose(a, b, atol=1e-5)


# The probes


class Held(Context):
    """What a probe may read, of given rows."""

    def __init__(self, **facts):
        self.__dict__.update(facts)


@pytest.fixture
def context(subject):
    """Rows of four documents. The AR after RL reads "row 7" and gives that row's activation, shortened and noisy; that of
    the warm start gives more noise."""
    acts = extract(subject, SENTENCES, "all", doc_ids=[f"d{i}" for i in range(4)])
    rng, n = np.random.default_rng(3), len(acts)
    noise = rng.normal(size=acts.vectors.shape) * np.abs(acts.vectors).mean()
    reads = lambda share: (
        lambda texts: np.array(
            [(acts.vectors + share * noise)[int(text.split()[-1])] / 3 for text in texts], np.float32
        )
    )
    columns = {"token_ids": acts.token_ids, "doc_id": acts.doc_ids}
    return Held(
        vectors=acts.vectors,
        documents=acts.doc_ids,
        pair=SimpleNamespace(reconstruct=reads(0.3)),
        warm=SimpleNamespace(reconstruct=reads(1.0)),
        texts=lambda name: [f"row {i if name != 'labels' else (i + 1) % n}" for i in range(n)],
        training=SimpleNamespace(vectors=acts.vectors[::2]),
        subject=subject,
        column=lambda name: columns.get(name, [""] * n),
        seed=0,
    )


def test_recovery_is_a_ratio_of_sums_from_the_mean_to_the_activation(context):
    scores, kl = probes.recovery(context), probes.divergence(context)
    assert set(scores) == {f"patch_recovery_{name}" for name in probes.PATCHES}
    assert all(values.shape == (len(context.vectors),) for values in scores.values())
    assert scores["patch_recovery_h"] == pytest.approx(1, abs=1e-6)
    assert scores["patch_recovery_mean"].mean() == pytest.approx(0, abs=1e-12)
    for name in probes.PATCHES:
        sums = [kl[f"patch_kl_{of}"].sum() for of in (name, "mean")]
        assert scores[f"patch_recovery_{name}"].mean() == pytest.approx(1 - sums[0] / sums[1])
    of = {name: scores[f"patch_recovery_{name}"].mean() for name in probes.PATCHES}
    assert of["h"] > of["rl"] > of["warm"] > max(of["shuffled"], of["gold_text"], of["random"])
    drawn = figures(probes.recovery, scores, context.documents)["scores"]
    assert [one["label"] for one in drawn][:2] == ["text after RL", "text of the warm start"]


def test_each_patch_is_the_vector_that_it_is_said_to_be(context, subject):
    h, kl = context.vectors, probes.divergence(context)
    at_length = lambda v: resized(v, h)
    mean = np.broadcast_to(context.training.vectors.mean(0), h.shape)
    after = context.pair.reconstruct(context.texts("rl"))
    expected = {
        "rl": at_length(after),
        "warm": at_length(context.warm.reconstruct(context.texts("warm"))),
        "gold_text": at_length(context.pair.reconstruct(context.texts("labels"))),
        "shuffled": at_length(after[derangement(context.documents, 0)]),
        "mean_direction": at_length(mean),
        "mean": mean,
    }
    ids = context.column("token_ids")
    for name, effect in effects(subject, ids, "last", expected, rescale=False).items():
        np.testing.assert_allclose(kl[f"patch_kl_{name}"], [of[0] for of in effect.kl], atol=1e-4, rtol=1e-3)


def test_the_loss_is_of_the_token_that_truly_comes_next(context, subject):
    scores, ids = probes.loss(context), context.column("token_ids")
    last = [i for i, row in enumerate(ids) if not any(len(o) > len(row) and o[: len(row)] == row for o in ids)]
    assert len(last) == 4 and np.flatnonzero(np.isnan(scores["patch_loss_original"])).tolist() == last
    whole = [ids[i] for i in last]
    logprobs = patch(subject, whole, [0] * 4, {"clean": None})["clean"]
    expected = [
        -of[len(row) - 1, text[len(row)]]
        for of, text in zip(logprobs, whole)
        for row in ids
        if row == text[: len(row)] and len(row) < len(text)
    ]
    found = scores["patch_loss_original"]
    np.testing.assert_allclose(found[~np.isnan(found)], expected, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(scores["patch_loss_h"], found, rtol=1e-3, atol=1e-4)


def test_few_rows_are_looked_at(context, monkeypatch):
    monkeypatch.setattr(probes, "LOOKED_AT", 7)
    scores = probes.recovery(context)
    looked = ~np.isnan(scores["patch_recovery_rl"])
    assert looked.sum() == 7 and looked[0] and looked[-1]
    assert np.nanmean(scores["patch_recovery_mean"]) == pytest.approx(0, abs=1e-12)


def test_rows_without_token_ids_say_nothing(context):
    context.column = lambda name: [""] * len(context.vectors)
    assert probes.recovery(context) == probes.divergence(context) == probes.loss(context) == {}


def test_a_run_measures_them(finished, corpus, tmp_path):
    workdir = copy_before(finished, tmp_path, "evaluate")
    chosen = ("fidelity:after_rl", "patching:recovery", "patching:divergence", "patching:loss")
    setting = f"--config.evaluate.probes={tuple(f'nla_jax.probes.{name}' for name in chosen)!r}"
    assert nla_main("evaluate", workdir, corpus, setting) == 0
    page = json.loads((workdir / "evaluation.json").read_text())
    of = {score["name"]: score["mean"] for probe in page["probes"] for score in probe["scores"]}
    assert of["patch_recovery_h"] == pytest.approx(1, abs=1e-5) and of["patch_recovery_mean"] == pytest.approx(0)
    assert of["patch_kl_h"] == pytest.approx(0, abs=1e-5) and of["patch_kl_random"] > 1e-5
    assert of["patch_loss_h"] == pytest.approx(of["patch_loss_original"], abs=1e-4)
