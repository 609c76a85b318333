"""A pair on disk and in use, against torch."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import optax
import pytest
import transformers
from conftest import TINY, close, one_sentence
from safetensors.numpy import load_file, save_file

from nla_jax.data.batches import TextBatch
from nla_jax.fve import fve
from nla_jax.joint_step import SupervisedStep
from nla_jax.losses import reconstructor_loss
from nla_jax.pair import HEAD, load_pair, new_pair
from nla_jax.probes.fidelity import derangement
from nla_jax.runtime.errors import InputError

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
    assert pair.verbalize(vectors, temperature=0.0, **SAMPLE) == [text or "" for text in expected]
    assert any(expected)


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


# What is refused


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (np.zeros((2, 31)), r"shape \[n, 32\], found shape \[2, 31\]"),
        (np.zeros(32), r"shape \[n, 32\], found shape \[32\]"),
        ([[1.0, 2.0], [3.0]], r"an array of numbers of shape \[n, 32\]"),
        (np.full((1, 32), np.nan), "Row 0 of the activations holds NaN or infinite values"),
        (np.diag([1.0, np.inf] + [1.0] * 30), "Row 0|Row 1"),
    ],
)
def test_wrong_vectors(pair, bad, message):
    for call in (lambda: pair.verbalize(bad), lambda: pair.score(["a"] * len(bad), bad)):
        with pytest.raises(InputError, match=message) as error:
            call()
        one_sentence(error)


def test_wrong_requests(pair, vectors, subject_folder, sidecar, tmp_path):
    for call, message in (
        (lambda: pair.verbalize(vectors, max_new_tokens=0), "max_new_tokens of 1 or more"),
        (lambda: pair.verbalize(vectors, temperature=-1.0), "a temperature of 0 or more"),
        (lambda: pair.reconstruct("one text"), "a list of texts"),
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


def test_a_bfloat16_head_is_read(copy, pair):
    import torch

    head = torch.tensor(load_file(copy / "ar" / HEAD)["weight"]).to(torch.bfloat16)
    import safetensors.torch

    safetensors.torch.save_file({"weight": head}, copy / "ar" / HEAD)
    close(load_pair(copy).reconstructor_params["head"], head.float().numpy().T, 0)
