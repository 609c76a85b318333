"""A pair on disk and in use, against torch."""

import dataclasses
import inspect
import json
import os
import shutil

import jax
import numpy as np
import optax
import pytest
import transformers
from conftest import TINY, close, one_sentence
from safetensors.numpy import load_file, save_file

import nla_jax.pair
from nla_jax.data.batches import TextBatch
from nla_jax.fve import fve
from nla_jax.io import hub
from nla_jax.io.conventions import Conventions
from nla_jax.joint_step import SupervisedStep
from nla_jax.losses import reconstructor_loss
from nla_jax.models.sharding import make_mesh
from nla_jax.pair import HEAD, Pair, Training, load_pair, new_pair
from nla_jax.probes.fidelity import derangement
from nla_jax.runtime.compiler import compilations
from nla_jax.runtime.errors import InputError
from nla_jax.runtime.user_input import padded_limit, similar_lengths
from nla_jax.subject import extract, load_subject

TEXTS = ["The river turns north.", "By noon the fish are gone and only bread is left.", "é", ""]
SAMPLE = dict(max_new_tokens=24, seed=3, batch=8)


@pytest.fixture(scope="module")
def saved(pair, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    pair.save(folder)
    return folder


@pytest.fixture
def copy(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "pair")
    return tmp_path / "pair"


@pytest.fixture(scope="module")
def texts(pair, vectors):
    return pair.verbalize(np.concatenate([vectors, -vectors, 3 * vectors[::-1]]), **SAMPLE)


def test_verbalize_writes_distinct_texts(texts):
    assert len(texts) == 12 and len({text for text in texts if text}) > 3
    assert not any("explanation>" in text for text in texts)


def test_a_loaded_pair_is_the_saved_one(pair, saved, vectors, texts):
    loaded = load_pair(saved)
    assert loaded.sidecar == pair.sidecar
    assert loaded.verbalize(np.concatenate([vectors, -vectors, 3 * vectors[::-1]]), **SAMPLE) == texts
    np.testing.assert_array_equal(loaded.reconstruct(TEXTS, batch=4), pair.reconstruct(TEXTS, batch=4))
    close(load_pair(saved / "av", saved / "ar").reconstructor_params, pair.reconstructor_params, 0)


def test_an_av_with_the_ar_of_another_step_is_said(pair, saved, tmp_path, capsys):
    head = pair.reconstructor_params["head"]
    later = dataclasses.replace(pair, reconstructor_params=pair.reconstructor_params | {"head": head * 1.001})
    later.save(tmp_path)
    load_pair(tmp_path)
    assert "saved with another AR" not in capsys.readouterr().err
    load_pair(tmp_path / "av", saved / "ar")
    assert "av was saved with another AR than" in capsys.readouterr().err


def test_activations_of_another_layer_are_refused(pair, subject_folder):
    there, elsewhere = (load_subject(subject_folder, layer) for layer in (pair.sidecar.layer, pair.sidecar.layer - 1))
    acts, others = (extract(subject, TEXTS[:2], "all") for subject in (there, elsewhere))
    assert pair.verbalize(acts[:2], **SAMPLE) == pair.verbalize(acts.vectors[:2], **SAMPLE)
    np.testing.assert_array_equal(
        pair.score(TEXTS[:2], acts[:2])["mse"], pair.score(TEXTS[:2], acts.vectors[:2])["mse"]
    )
    for use in (lambda: pair.verbalize(others), lambda: pair.score(TEXTS[:2], others[:2])):
        with pytest.raises(
            InputError, match=r"activations of layer \d, the pair reads layer \d: load_subject"
        ) as error:
            use()
        one_sentence(error)


def test_texts_do_not_depend_on_the_batch(pair, vectors, texts):
    batch = np.concatenate([vectors, -vectors, 3 * vectors[::-1]])
    assert pair.verbalize(batch, **SAMPLE | {"batch": 5}) == texts
    assert pair.verbalize(batch[:3], **SAMPLE) == texts[:3]
    assert pair.verbalize(batch, **SAMPLE | {"seed": 4}) != texts
    assert pair.verbalize(batch[:0], **SAMPLE) == []


def test_without_injection_the_vector_is_not_seen(pair, vectors):
    options = SAMPLE | {"temperature": 0.0}
    seen, other = (pair.verbalize(v, inject=False, **options) for v in (vectors, -vectors))
    assert seen == other
    assert len(set(pair.verbalize(vectors, **options))) > 1


@pytest.mark.torch
def test_greedy_texts_equal_generate_of_transformers(pair, saved, vectors):
    import torch

    model = transformers.AutoModelForCausalLM.from_pretrained(saved / "av").eval()
    verbalizer = pair.verbalizer
    prompt = torch.tensor(verbalizer.prefix + verbalizer.suffix)
    expected = []
    for vector in torch.tensor(vectors):
        embeds = model.get_input_embeddings()(prompt).detach().clone()
        embeds[len(verbalizer.prefix)] = vector / vector.norm() * pair.sidecar.injection_scale
        ids = model.generate(
            inputs_embeds=embeds[None],
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=24,
            do_sample=False,
            eos_token_id=verbalizer.end,
            pad_token_id=verbalizer.end,
        )[0].numpy()
        ended = np.array([verbalizer.end in ids])
        expected += pair.prompts.explanations(pair.prompts.responses(ids[None], np.ones((1, len(ids)), bool)), ended)
    found = pair.explain(vectors, temperature=0.0, **SAMPLE)
    assert [explanation.accepted or "" for explanation in found] == [text or "" for text in expected]
    assert any(expected)


@pytest.mark.torch
def test_reconstruct_equals_torch(pair, saved):
    """K+1 blocks, no final norm, the head as a `torch.nn.Linear`, read at the last token."""
    import torch

    tokenizer = transformers.AutoTokenizer.from_pretrained(saved / "ar")
    model, info = transformers.AutoModelForCausalLM.from_pretrained(saved / "ar", output_loading_info=True)
    assert info["missing_keys"] <= {"model.norm.weight", "lm_head.weight"} and not info["unexpected_keys"]
    assert model.config.num_hidden_layers == pair.sidecar.layer + 1
    head = torch.nn.Linear(TINY.width, TINY.width, bias=False)
    head.weight.data = torch.tensor(load_file(saved / "ar" / HEAD)["weight"])
    states = []
    last = model.model.layers[-1]
    last.register_forward_hook(lambda _, __, out: states.append(out[0] if isinstance(out, tuple) else out))
    expected = []
    for text in TEXTS:
        with torch.no_grad():
            model(torch.tensor([tokenizer(f"<text>{text}</text><summary>").input_ids]))
            expected.append(head(states.pop()[0, -1]).numpy())
    close(pair.reconstruct(TEXTS, batch=4), np.stack(expected), 1e-4)
    close(pair.reconstruct(TEXTS[::-1], batch=3), np.stack(expected[::-1]), 1e-4)
    assert pair.reconstruct([]).shape == (0, TINY.width)


def test_score_closed_form(pair, vectors):
    scores = pair.score(TEXTS, vectors)
    recon = pair.reconstruct(TEXTS)
    cosine = (recon * vectors).sum(1) / np.linalg.norm(recon, axis=1) / np.linalg.norm(vectors, axis=1)
    np.testing.assert_allclose(scores["cosine"], cosine, rtol=1e-5)
    unit = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True) * np.sqrt(TINY.width)
    np.testing.assert_allclose(scores["mse"], ((unit(recon) - unit(vectors)) ** 2).mean(1), rtol=1e-5)
    with pytest.raises(InputError, match="3 texts for 4 vectors") as error:
        pair.score(TEXTS[:3], vectors)
    one_sentence(error)


def test_shuffled_texts_are_no_better_than_the_mean(pair):
    """With an AR that was trained to read: a word names a direction, and the wrong word misleads."""
    words = ["river", "mill", "sea", "list", "market", "bread", "shadow", "margin"]
    rng = np.random.default_rng(0)
    which = rng.integers(0, len(words), 64)
    golds = rng.normal(size=(len(words), TINY.width)).astype(np.float32)[which] * 5
    golds += rng.normal(size=golds.shape).astype(np.float32)
    texts = [f"It is about the {words[i]}." for i in which]
    tokens, lengths = pair.prompts.reconstructor_batch(texts, 48)
    step = SupervisedStep("reconstructor", reconstructor_loss(pair.reconstructor), optax.adam(1e-2))
    state, train = step.init(pair.reconstructor_params), jax.jit(step)
    for _ in range(80):
        state, _ = train(state, TextBatch(tokens, lengths, golds), None)
    reader = dataclasses.replace(pair, reconstructor_params=state.models["reconstructor"].params)
    assert fve(reader.reconstruct(texts), golds) > 0.7
    shuffled = derangement([words[i] for i in which], seed=0)
    assert np.all(which[shuffled] != which)
    assert fve(reader.reconstruct([texts[i] for i in shuffled]), golds) < 0


def test_a_new_pair_starts_from_the_subject(sidecar, subject_folder, params):
    new = new_pair(sidecar, subject_folder)
    close(new.verbalizer_params, params, 0)
    np.testing.assert_array_equal(new.reconstructor_params["head"], np.eye(TINY.width))
    close(new.reconstructor_params["backbone"]["blocks"]["q"]["kernel"], params["blocks"]["q"]["kernel"][:2], 0)


# Odd requests: the right answer


def test_texts_that_were_cut_are_kept_and_marked(pair, vectors):
    whole, short = (pair.explain(vectors, limit, 0.0) for limit in (60, 4))
    assert any(not x.cut for x in whole) and any(x.cut for x in short)
    assert all(x.accepted is None for x in short if x.cut)
    for a, b in zip(whole, short):
        assert b.text and a.text.startswith(b.text) and "explanation>" not in b.text
        assert a.cut or a.text == a.accepted
    assert pair.verbalize(vectors, 4, 0.0) == [x.text for x in short]


@pytest.mark.parametrize("count", [0, 1, 7])
def test_any_number_of_rows_gives_the_rows_of_the_whole(pair, vectors, count):
    many = np.concatenate([vectors, -vectors])
    options = SAMPLE | {"max_new_tokens": 12}
    assert pair.verbalize(many[:count], **options) == pair.verbalize(many, **options)[:count]
    close(pair.reconstruct((TEXTS * 2)[:count]), pair.reconstruct(TEXTS * 2)[:count], 1e-5)


def test_other_limits_find_the_program_compiled(pair, vectors):
    """And a text that is cut earlier is the beginning of the longer one."""
    whole = pair.explain(vectors, 20, seed=3)
    assert any(not x.cut for x in whole) and len({x.text for x in whole}) > 1
    with compilations() as compiled:
        cut = {limit: pair.explain(vectors, limit, seed=3) for limit in (1, 5, 25)}
    assert not compiled
    assert all(a == b for a, b in zip(cut[25], whole) if not b.cut)
    for limit in (1, 5):
        assert all(b.text.startswith(a.text) for a, b in zip(cut[limit], whole))
        assert any(a.cut and not b.cut for a, b in zip(cut[limit], whole))


@pytest.mark.parametrize("limit, length", [(1, 25), (25, 25), (26, 50), (100, 100), (150, 200), (200, 200), (201, 400)])
def test_lengths_of_which_programs_are_compiled(limit, length):
    assert padded_limit(limit) == length


@pytest.mark.parametrize("factor", [1e37, 1e-30, 1e-200, 1e200], ids=str)
def test_only_the_direction_counts_however_long(pair, vectors, factor):
    texts, exact = ["a river"] * len(vectors), vectors.astype(np.float64)
    options = SAMPLE | {"max_new_tokens": 12, "temperature": 0.0}
    assert pair.verbalize(exact * factor, **options) == pair.verbalize(exact, **options)
    np.testing.assert_allclose(
        pair.score(texts, exact * factor)["cosine"], pair.score(texts, exact)["cosine"], atol=1e-6
    )
    recon = pair.reconstruct(TEXTS)
    assert fve(recon, exact * factor) == pytest.approx(fve(recon, exact), abs=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64", "int32", "int8"])
def test_vectors_of_any_real_dtype(pair, vectors, dtype):
    given = np.asarray(jax.numpy.asarray(vectors * 20)).astype(jax.numpy.dtype(dtype))
    options = SAMPLE | {"max_new_tokens": 12, "temperature": 0.0}
    assert pair.verbalize(given, **options) == pair.verbalize(given.astype(np.float32), **options)


def test_a_long_text_costs_its_own_length_alone(pair, monkeypatch):
    shapes = []
    run = nla_jax.pair.reconstruct
    monkeypatch.setattr(nla_jax.pair, "reconstruct", lambda *a: shapes.append(a[2].shape) or run(*a))
    texts = [*TEXTS, "word " * 900]
    recon = pair.reconstruct(texts)
    assert shapes[-1][0] == 1 and all(width <= 64 for _, width in shapes[:-1])
    close(recon[:4], pair.reconstruct(TEXTS), 1e-5)
    assert similar_lengths([5000] * 3 + [20] * 100, 64) == [[*range(3, 67)], [*range(67, 103)], [0, 1], [2]]


def test_few_short_rows_are_read_by_one_program():
    """A pair of a long text and its token alone are one batch; many texts and their tokens are two."""
    assert similar_lengths([112, 4], 64) == [[1, 0]]
    assert similar_lengths([112] * 8 + [4] * 8, 64) == [[*range(8, 16)], [*range(8)]]


def test_a_tokenizer_that_both_folders_hold_is_loaded_once(saved, copy, monkeypatch):
    loaded, load = [], nla_jax.pair.load_tokenizer
    monkeypatch.setattr(nla_jax.pair, "load_tokenizer", lambda folder: loaded.append(folder) or load(folder))
    load_pair(saved)
    assert loaded == [saved / "av"]
    file = copy / "ar" / "tokenizer_config.json"
    file.write_text(file.read_text() + " ")
    load_pair(copy)
    assert loaded[1:] == [copy / "av", copy / "ar"]


def test_a_mesh_of_jax_make_mesh(saved, subject_folder, vectors, pair):
    mesh = jax.make_mesh((1, 2, 1), ("data", "fsdp", "tensor"), devices=jax.devices()[:2])
    loaded = load_pair(saved, mesh=mesh)
    close(loaded.reconstruct(TEXTS), pair.reconstruct(TEXTS), 1e-4)
    assert len(loaded.verbalize(vectors, 4)) == 4
    found = extract(load_subject(subject_folder, 1, mesh=mesh), TEXTS[:2])
    close(found.vectors, extract(load_subject(subject_folder, 1), TEXTS[:2]).vectors, 1e-4)
    with pytest.raises(InputError, match="axes data, fsdp, tensor; found x;") as error:
        load_pair(saved, mesh=jax.make_mesh((2,), ("x",), devices=jax.devices()[:2]))
    one_sentence(error)


def test_a_pair_prints_in_one_line(pair):
    assert "layer 1" in repr(pair) and len(repr(pair)) < 300


# What is refused


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (np.zeros((2, 31)), r"shape \[n, 32\], found shape \[2, 31\]"),
        (np.zeros(32), r"shape \[n, 32\], found shape \[32\]"),
        ([[1.0, 2.0], [3.0]], r"an array of numbers of shape \[n, 32\]"),
        (np.full((1, 32), np.nan), "Row 0 of the activations holds NaN or infinite values"),
        (np.diag([1.0, np.inf] + [1.0] * 30), "Row 0|Row 1"),
        (np.eye(32)[:3] * [[1.0], [1.0], [0.0]], "Row 2 of the activations is zero"),
        (np.full((1, 32), 1 + 2j), r"an array of numbers of shape \[n, 32\]"),
        (np.full((1, 32), "1"), r"an array of numbers of shape \[n, 32\]"),
        (np.full((1, 32), None), r"an array of numbers of shape \[n, 32\]"),
    ],
)
def test_wrong_vectors(pair, bad, message):
    for call in (lambda: pair.verbalize(bad), lambda: pair.score(["a"] * len(bad), bad)):
        with pytest.raises(InputError, match=message) as error:
            call()
        one_sentence(error)


def unchecked(pair, **options):
    """A call as users make it: the tests' check of types is not there."""
    return inspect.unwrap(Pair.explain)(pair, np.ones((1, TINY.width)), **options)


def test_wrong_requests(pair, vectors, subject_folder, sidecar, tmp_path):
    subject = load_subject(subject_folder, 1)
    for call, message in (
        (lambda: pair.verbalize(vectors, max_new_tokens=0), "max_new_tokens of 1 or more"),
        (lambda: pair.verbalize(vectors, temperature=-1.0), "a temperature of 0 or more"),
        (lambda: pair.verbalize(vectors, temperature=np.nan), "a temperature of 0 or more"),
        (lambda: pair.verbalize(vectors, temperature=np.inf), "a temperature of 0 or more"),
        (lambda: unchecked(pair, temperature=None), "a temperature of 0 or more"),
        (lambda: unchecked(pair, temperature=10**400), "a temperature of 0 or more"),  # no float holds it
        (lambda: unchecked(pair, temperature="0"), "a temperature of 0 or more"),
        (lambda: unchecked(pair, max_new_tokens=36.0), "max_new_tokens of 1 or more"),
        (lambda: unchecked(pair, max_new_tokens=10**12), "max_new_tokens is more than 1073741824"),
        (lambda: unchecked(pair, seed=None), "seed from 0 to 4294967295"),
        (lambda: pair.verbalize(vectors, batch=0), "batch of 1 or more"),
        (lambda: pair.verbalize(vectors, batch=-1), "batch of 1 or more"),
        (lambda: pair.verbalize(vectors, seed=10**30), "seed from 0 to 4294967295"),
        (lambda: pair.verbalize(vectors, seed=True), "seed from 0 to 4294967295"),
        (lambda: pair.verbalize(vectors, first=-1), "first of 0 or more"),
        (lambda: pair.reconstruct(["a"], batch=-1), "batch of 1 or more"),
        (lambda: inspect.unwrap(Pair.reconstruct)(pair, ["a", None]), "entry 1 is None"),
        (lambda: fve(vectors + 1j, vectors), "two arrays of numbers"),
        (lambda: pair.reconstruct("one text"), "a list of texts"),
        (lambda: pair.reconstruct(["a", "half \ud83d"]), "entry 1 holds half of a character"),
        (lambda: inspect.unwrap(Pair.score)(pair, iter(["a"]), vectors), "There are 1 texts for"),
        (lambda: pair.verbalize(vectors, first=10**30), "first numbers rows up to"),
        (lambda: unchecked(pair, inject="no"), "inject is True or False"),
        (lambda: inspect.unwrap(Pair.save)(pair, tmp_path / "out", overwrite="no"), "overwrite is True or False"),
        (lambda: pair.save(tmp_path / "out", dtype="bogus"), "not as bogus"),
        (lambda: pair.save(tmp_path / ("x" * 300)), "cannot be written"),
        (lambda: pair.save(f"{tmp_path}/a\0b"), "named by texts and paths"),
        (lambda: load_pair("x" * 300), "cannot be looked at"),
        (lambda: load_pair(""), "is not a pair"),
        (lambda: inspect.unwrap(load_pair)(subject_folder, conventions={}), "of the class Conventions"),
        (lambda: inspect.unwrap(load_pair)(subject_folder, training="x"), "of the class Training"),
        (lambda: make_mesh(10**19, 10**19), "needs 1"),
        (lambda: Conventions(injections=()), "an Injection, or a tuple"),
        (lambda: inspect.unwrap(load_subject)(subject_folder, "1"), "layer of -1 or more"),
        (lambda: load_subject(subject_folder, 1, "complex64"), "not as complex64"),
        (lambda: inspect.unwrap(extract)(subject, ["a"], max_tokens="1"), "max_tokens of 1 or more"),
        (lambda: inspect.unwrap(extract)(subject, ["a"], doc_ids=3), "a list of names"),
        (lambda: extract(subject, ["\ud83d"]), "half of a character"),
        (lambda: fve(vectors, vectors.astype(str)), "two arrays of numbers"),
        (lambda: fve(vectors.astype("datetime64[s]"), vectors), "two arrays of numbers"),
        (lambda: fve(np.where(vectors > 0, np.inf, vectors), vectors), "are finite|finite numbers"),
        (lambda: pair.score("one text", vectors), "a list of texts"),
        (lambda: pair.save(tmp_path / "out", dtype="int8"), "not as int8"),
        (lambda: new_pair(sidecar, subject_folder, remat="foo"), "'foo' is no policy"),
        (lambda: fve(vectors, np.full_like(vectors, 2.0)), "no variance to explain"),
        (lambda: fve(vectors, np.where(np.arange(len(vectors))[:, None] == 1, np.nan, vectors)), "are finite"),
    ):
        with pytest.raises(InputError, match=message) as error:
            call()
        one_sentence(error)
    assert not (tmp_path / "out").exists()


def test_save_replaces_nothing_unasked(pair, tmp_path):
    (tmp_path / "mine/av").mkdir(parents=True)
    (tmp_path / "mine/av/notes.txt").write_text("precious")
    (tmp_path / "file.dat").write_text("x")
    for folder, message in (("mine", "mine/av exists and is not empty"), ("file.dat", "file.dat is a file")):
        with pytest.raises(InputError, match=message) as error:
            pair.save(tmp_path / folder)
        one_sentence(error)
    assert (tmp_path / "mine/av/notes.txt").read_text() == "precious" and not (tmp_path / "mine/ar").exists()
    pair.save(tmp_path / "mine", overwrite=True)
    assert load_pair(tmp_path / "mine").sidecar == pair.sidecar


@pytest.mark.parametrize("part", ["av", "backbone", "head"])
def test_weights_that_are_not_finite_are_not_saved(pair, tmp_path, part):
    def broken(tree, *path):
        if not path:
            return np.where(np.arange(np.size(tree)).reshape(np.shape(tree)) == 3, np.nan, tree).astype(np.float32)
        return tree | {path[0]: broken(tree[path[0]], *path[1:])}

    av, ar = pair.verbalizer_params, pair.reconstructor_params
    changes = {
        "av": {"verbalizer_params": broken(av, "embedding")},
        "backbone": {"reconstructor_params": broken(ar, "backbone", "blocks", "q", "kernel")},
        "head": {"reconstructor_params": broken(ar, "head")},
    }
    with pytest.raises(InputError, match="NaN or infinite values.*not saved") as error:
        dataclasses.replace(pair, **changes[part]).save(tmp_path / "out")
    one_sentence(error)


def test_subjects_are_told_apart_by_their_hash(copy, pair):
    def sidecar(role, name, base_hash):
        made_from = {"base_hash": base_hash} if base_hash else {}
        changed = dataclasses.replace(pair.sidecar, base_checkpoint=name, provenance=made_from)
        changed.write(copy / role / "nla_meta.yaml", role)

    sidecar("av", "runs/a/subject", "aaaa")
    sidecar("ar", "runs/b/subject", "bbbb")
    refused("provenance.base_hash is 'aaaa' in one and 'bbbb'", copy)
    sidecar("ar", "a/copy/of/it", "aaaa")
    assert load_pair(copy).sidecar.base_checkpoint == "runs/a/subject"


def refused(match, *folders):
    with pytest.raises(InputError, match=match) as error:
        load_pair(*folders)
    one_sentence(error)


def edit(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_wrong_folders(copy):
    refused("role is 'ar', expected 'av'", copy / "ar", copy / "av")
    refused("role is 'av', expected 'ar'", copy / "av", copy / "av")
    refused("is not a pair", copy / "av")
    with pytest.raises(InputError, match="is not a model folder|holds neither"):
        load_subject(copy, 1)  # without a single file
    (copy / "ar" / "nla_meta.yaml").unlink()
    refused("has no nla_meta.yaml", copy)


def test_sidecars_of_different_pairs(copy, pair):
    changes = [({"layer": 0}, "layer is 1 in one and 0"), ({"base_checkpoint": "x"}, "base_checkpoint is 'tiny'")]
    for change, message in changes:
        dataclasses.replace(pair.sidecar, **change).write(copy / "ar" / "nla_meta.yaml", "ar")
        refused(message, copy)


def test_depth_that_the_sidecar_denies(copy):
    edit(copy / "ar" / "config.json", num_hidden_layers=3)
    refused(r"layer 1 \(2 blocks\).* 3 blocks", copy)


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (None, "missing or is not a readable safetensors file"),
        (b"not safetensors", "missing or is not a readable safetensors file"),
        ({"other": np.eye(32)}, "no tensor 'weight'"),
        ({"weight": np.eye(31)}, r"shape \(31, 31\), expected weight of shape \(32, 32\)"),
        ({"weight": np.full((32, 32), np.nan)}, "NaN"),
    ],
)
def test_damaged_head(copy, head, message):
    file = copy / "ar" / HEAD
    file.unlink()
    if isinstance(head, bytes):
        file.write_bytes(head)
    elif head is not None:
        save_file({name: value.astype(np.float32) for name, value in head.items()}, file)
    refused(message, copy)


@pytest.mark.torch
def test_a_bfloat16_head_is_read(copy, pair):
    import torch

    head = torch.tensor(load_file(copy / "ar" / HEAD)["weight"]).to(torch.bfloat16)
    import safetensors.torch

    safetensors.torch.save_file({"weight": head}, copy / "ar" / HEAD)
    close(load_pair(copy).reconstructor_params["head"], head.float().numpy().T, 0)


# Memory


def dtypes(tree) -> set[str]:
    return {str(leaf.dtype) for leaf in jax.tree.leaves(tree)}


@pytest.mark.parametrize("stored", ["bfloat16", "float16", "float32"])
def test_weights_are_held_as_they_are_stored_or_asked_for(pair, tmp_path, vectors, stored):
    pair.save(tmp_path / "pair", stored)
    loaded = load_pair(tmp_path / "pair")
    assert dtypes(loaded.verbalizer_params) == {stored, "float32"}  # the scales of norms
    assert dtypes(loaded.verbalizer_params["blocks"]["q"]) == dtypes(loaded.verbalizer_params["embedding"]) == {stored}
    assert dtypes(loaded.reconstructor_params["backbone"]["blocks"]["up"]) == {stored}
    assert loaded.verbalizer.model.config.dtype == ("float32" if stored == "float16" else stored)
    assert loaded.sampler is loaded.weights[0]  # no second copy to sample from
    loaded.save(tmp_path / "again")
    for file in ("av/model.safetensors", "ar/model.safetensors"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "pair" / file).read_bytes()
    asked = load_pair(tmp_path / "pair", dtype="bfloat16")
    assert dtypes(asked.verbalizer_params["blocks"]["q"]) == {"bfloat16"}
    close(asked.reconstruct(TEXTS), pair.reconstruct(TEXTS), 0.1)
    assert len(asked.verbalize(vectors, 4)) == 4
    trained = load_pair(tmp_path / "pair", dtype="bfloat16", training=Training())
    assert dtypes(trained.verbalizer_params) == dtypes(trained.reconstructor_params) == {"float32"}
    assert trained.verbalizer.model.config.dtype == "bfloat16"
    for wrong in ("int32", "tall"):
        with pytest.raises(InputError, match="held as floating point numbers") as error:
            load_pair(tmp_path / "pair", dtype=wrong)
        one_sentence(error)


def test_a_fingerprint_is_read_once_and_every_change_is_noticed(subject_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(hub, "SETTLED_SECONDS", -1.0)
    folder, read, whole = tmp_path / "subject", [], hub._hash
    monkeypatch.setattr(hub, "_hash", lambda files: read.append(files) or whole(files))
    shutil.copytree(subject_folder, folder)
    first = hub.fingerprint(folder)
    assert hub.fingerprint(folder) == first and len(read) == 1
    shutil.copytree(folder, tmp_path / "copy")
    assert hub.fingerprint(tmp_path / "copy") == first and len(read) == 2
    file = folder / "model.safetensors"
    before, content = file.stat(), bytearray(file.read_bytes())
    content[-3] ^= 1  # one bit at the end; size and time of change as before
    with open(file, "r+b") as stream:
        stream.write(content)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert hub.fingerprint(folder) != first and len(read) == 3
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/none")  # a cache that cannot be written costs only time
    assert hub.fingerprint(tmp_path / "copy") == first
