"""Injection: every variant in segments equals the plain full sequence; several slots; what sidecars say of it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from conftest import TINY, close, one_sentence
from jax.tree_util import Partial

from nla_jax.autoencoder import Injection, add_norm_matched, keep, replace
from nla_jax.io.conventions import Conventions
from nla_jax.pair import Pair, load_pair, new_pair
from nla_jax.prompts import Prompts, find_marker
from nla_jax.runtime.errors import InputError
from nla_jax.sampling import rollout
from nla_jax.sidecar import FILE, Sidecar

TWO_SLOTS = "First {injection_char}, then {injection_char}."
VARIANTS = {
    "replace": Injection(replace),
    "add behind the embeddings": Injection(add_norm_matched, -1),
    "add behind block 1": Injection(add_norm_matched, 1),
    "add behind the last block": Injection(add_norm_matched, TINY.layers - 1),
}
G = 2


@pytest.fixture(scope="module", params=["one slot", "two slots"])
def shown(request, sidecar, tokenizer, subject_folder) -> Pair:
    """A pair whose prompt has one or two slots."""
    if request.param == "two slots":
        marker = find_marker(tokenizer, TWO_SLOTS)
        sidecar = dataclasses.replace(sidecar, verbalizer_template=TWO_SLOTS, marker=marker)
    return new_pair(sidecar, subject_folder)


def by_hand(injection: Injection, states, vectors, scale):
    """The definitions, row by row in NumPy."""
    out = np.array(states, np.float64)
    for row, v in np.ndenumerate(np.zeros(out.shape[:2])):
        h, v = out[row], np.asarray(vectors[row], np.float64)
        direction = v / np.linalg.norm(v)
        out[row] = scale * direction if injection.function is replace else h + np.linalg.norm(h) * direction
    return out


@pytest.mark.parametrize("name", VARIANTS)
def test_definitions(name):
    rng = np.random.default_rng(0)
    states, vectors = rng.normal(size=(2, 3, 2, 8)).astype(np.float32)
    close(VARIANTS[name].function(states, vectors, 5.0), by_hand(VARIANTS[name], states, vectors, 5.0), 1e-6)
    np.testing.assert_array_equal(keep(states, vectors, 5.0), states)
    np.testing.assert_array_equal(replace(states, vectors, None), vectors)


@pytest.mark.parametrize("name", VARIANTS)
def test_segmented_equals_full_sequence(name, shown, params):
    """Values and gradients; the oracle runs each sample's whole sequence, with the slots edited in place."""
    injection, at = VARIANTS[name], len(shown.verbalizer.prefix) + np.array(shown.verbalizer.slots)
    verbalizer = dataclasses.replace(shown.verbalizer, injections=(injection,))
    rng = np.random.default_rng(1)
    vectors = rng.normal(size=(3, len(at), TINY.width)).astype(np.float32)
    vectors = vectors[:, 0] if len(at) == 1 else vectors
    responses = rng.integers(4, TINY.vocab_size, (3 * G, 5))
    weight = rng.normal(size=(3 * G, 5, TINY.width))

    def edit(vectors, parts, layer):
        (x,) = parts
        new = injection.function(x[:, at], vectors, verbalizer.injection_scale)
        return [jnp.where(layer == injection.block, x.at[:, at].set(new), x)]

    def full(params, vectors):
        prompt = jnp.tile(jnp.asarray(verbalizer.prefix + verbalizer.suffix), (len(responses), 1))
        x = verbalizer.embed(params, jnp.concatenate([prompt, responses], 1))
        change = Partial(edit, jnp.repeat(vectors.reshape(3, len(at), -1), G, 0))
        (hidden,), _ = verbalizer.model.apply({"params": params}, change([x], -1), edit=change)
        return hidden[:, verbalizer.prompt_length - 1 : -1]

    def run(states):
        def loss(params, vectors):
            hidden = states(params, vectors)
            return jnp.sum(weight * jnp.sin(hidden)), hidden

        (_, hidden), gradients = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(params, vectors)
        return hidden, gradients

    expected = run(full)
    close(run(functools.partial(verbalizer.read_responses, responses=responses)), expected, 1e-5)
    # Behind the last block nothing reads the slots any more, except the last slot's own state.
    seen = np.abs(expected[1][1]).max() > 1e-3
    assert seen == (injection.block < TINY.layers - 1)


@pytest.mark.parametrize("name", VARIANTS)
def test_sampler_and_trainer_see_the_same(name, shown, params):
    verbalizer = dataclasses.replace(shown.verbalizer, injections=(VARIANTS[name],))
    rng, slots = np.random.default_rng(2), len(verbalizer.slots)
    vectors = rng.normal(size=(2, slots, TINY.width)).astype(np.float32)
    drawn = rollout(verbalizer, params, vectors, jax.random.key(0), group=G, max_new_tokens=6)
    hidden = verbalizer.read_responses(params, vectors, drawn.tokens)
    logits = verbalizer.model.apply({"params": params}, hidden, method="logits")
    logp = jnp.take_along_axis(jax.nn.log_softmax(logits), drawn.tokens[..., None], -1)[..., 0]
    close(jnp.where(drawn.mask, logp, 0), drawn.logprobs, 1e-5)


def test_slots_are_not_interchangeable(shown):
    """A pair verbalizes one vector a row, or one a slot; swapping the slots' vectors changes the text."""
    slots = len(shown.verbalizer.slots)
    vectors = np.random.default_rng(3).normal(size=(4, slots, TINY.width)).astype(np.float32)
    if slots == 1:
        with pytest.raises(InputError, match=r"of shape \[n, 32\], found shape \[4, 1, 32\]") as error:
            shown.verbalize(vectors)
        return one_sentence(error)
    with pytest.raises(InputError, match=r"of shape \[n, 2, 32\], found shape \[4, 32\]"):
        shown.verbalize(vectors[:, 0])
    wordy = dataclasses.replace(shown.verbalizer, end=-1)
    write = lambda v: rollout(
        wordy, shown.verbalizer_params, v, jax.random.key(0), group=1, max_new_tokens=12, temperature=0
    )
    assert (write(vectors).tokens != write(vectors[:, ::-1]).tokens).any()
    assert len(shown.verbalize(vectors, max_new_tokens=4)) == 4


# Sidecars


@pytest.mark.parametrize("name", VARIANTS)
def test_the_sidecar_says_how(name, pair, tmp_path):
    sidecar = dataclasses.replace(pair.sidecar, injections=(VARIANTS[name],))
    dataclasses.replace(pair, sidecar=sidecar).save(tmp_path)
    assert load_pair(tmp_path).verbalizer.injections == (VARIANTS[name],)


def mine(states, vectors, scale):
    return states + 2 * vectors


def test_a_function_of_the_users_is_named_but_never_imported(pair, tmp_path):
    sidecar = dataclasses.replace(pair.sidecar, injections=(Injection(mine, 0),))
    dataclasses.replace(pair, sidecar=sidecar).save(tmp_path)
    content = yaml.safe_load((tmp_path / "av" / FILE).read_text(encoding="utf-8"))
    assert content["extraction"]["injection_method"].endswith(":mine")
    with pytest.raises(
        InputError, match="names the injection .*:mine behind block 0, .*pass load_pair `conventions`"
    ) as error:
        load_pair(tmp_path)
    one_sentence(error)
    assert (
        load_pair(tmp_path, conventions=Conventions(injections=Injection(mine, 0))).verbalizer.injections[0].function
        is mine
    )


def test_a_block_that_is_not_there_is_refused(pair, tmp_path):
    pair.save(tmp_path)
    with pytest.raises(InputError, match="behind block 9, but .* has blocks 0 to 2") as error:
        load_pair(tmp_path, conventions=Conventions(injections=Injection(add_norm_matched, 9)))
    one_sentence(error)


def test_a_dataset_sidecar_in_a_model_folder(pair, tokenizer, tmp_path):
    """EasyNLA and nanoNLA copy the dataset's sidecar: no role, no scale, nothing of the injection."""
    pair.save(tmp_path)
    m = pair.sidecar.marker
    content = {
        "kind": "nla_dataset",
        "schema_version": 1,
        "stage": "av_sft",
        "extraction": {"base_model": "org/tiny", "d_model": TINY.width, "layer_index": 1, "norm": "none"},
        "tokens": {
            "injection_char": m.char,
            "injection_token_id": m.id,
            "injection_left_neighbor_id": m.left,
            "injection_right_neighbor_id": m.right,
            "critic_suffix_ids": None,
        },
        "prompt_templates": {"actor": pair.sidecar.verbalizer_template, "critic": pair.sidecar.reconstructor_template},
    }
    for role in ("av", "ar"):
        (tmp_path / role / FILE).write_text(yaml.safe_dump(content), encoding="utf-8")
    with pytest.raises(InputError, match="for EasyNLA and nanoNLA") as error:
        load_pair(tmp_path)
    one_sentence(error)
    loaded = load_pair(tmp_path, conventions=Conventions(True, injections=Injection(add_norm_matched, 1)))
    assert (loaded.sidecar.layer, loaded.sidecar.injection_scale, loaded.sidecar.suffix_ids) == (
        1,
        None,
        pair.sidecar.suffix_ids,
    )
    close(loaded.reconstruct(["a", "b"]), pair.reconstruct(["a", "b"]), 0)


def released(sidecar: Sidecar, role: str) -> dict:
    """The fields of released pairs: the reference's, with its scrubber's names."""
    content = sidecar.content(role)
    content["extraction"] = {"injection_scale": 20.0, "mse_scale": TINY.width**0.5}
    content |= {"stage": "rl", "trained_on": [], "created_at": "2026-05-01T00:00:00", "training": {"lr": 1e-5}}
    for ours in ("provenance", "conventions", "prompt_ids"):
        del content[ours]
    if role == "av":
        content["tokens"]["critic_suffix_ids"] = None
        content["prompt_templates"]["ar"] = None
        del content["extraction_layer_index"]
    else:
        content["critic"] = {"extraction_layer_index": sidecar.layer}
    return content


def test_released_sidecars_are_read(pair, tmp_path):
    pair.save(tmp_path)
    for role in ("av", "ar"):
        text = yaml.safe_dump(released(pair.sidecar, role), allow_unicode=True)
        (tmp_path / role / FILE).write_text(text, encoding="utf-8")
    loaded = load_pair(tmp_path)
    assert dataclasses.replace(
        loaded.sidecar, provenance=pair.sidecar.provenance, thinking="off", reading="tags"
    ) == dataclasses.replace(pair.sidecar, ids=loaded.sidecar.ids)
    assert (loaded.sidecar.thinking, loaded.sidecar.reading) == ("template", "search")
    (tmp_path / "ar" / FILE).write_text(text.replace("extraction_layer_index: 1", "extraction_layer_index: 2"))
    with pytest.raises(
        InputError, match="says d_model 32 and layer 2 .*config.json says width 32 and 2 blocks"
    ) as error:
        load_pair(tmp_path)
    one_sentence(error)


@pytest.mark.parametrize(
    "wrong", ["x: !!python/object/apply:os.system ['true']", "- a", "a: " + "[" * 3000, "b" * (1 << 21)]
)
def test_a_hostile_sidecar_is_refused(wrong, pair, tmp_path):
    pair.save(tmp_path)
    (tmp_path / "av" / FILE).write_text(wrong)
    with pytest.raises(InputError, match="nla_meta.yaml") as error:
        load_pair(tmp_path)
    one_sentence(error)
    assert len(str(error.value)) < 400


def test_prompts_without_bos(pair, tmp_path):
    """EasyNLA's AR reads its text without the BOS that the tokenizer would add; the sidecar says so."""
    sidecar = dataclasses.replace(pair.sidecar, special_tokens=False, ids=None)
    dataclasses.replace(pair, sidecar=sidecar).save(tmp_path)
    prompts: Prompts = load_pair(tmp_path).prompts
    with_bos, without = pair.prompts.reconstructor_ids(["a"])[0], prompts.reconstructor_ids(["a"])[0]
    assert with_bos[1:] == without and with_bos[0] == pair.prompts.tokenizer.bos_token_id
