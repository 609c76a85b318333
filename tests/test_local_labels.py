"""Labels from a model in a folder, through this package's own sampler."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY, random_params, talkative

from nla_jax.io.folders import save_model
from nla_jax.labels.labeller import LabelRow, NoLabel, make_labeller
from nla_jax.models.transformer import Transformer
from nla_jax.runtime.errors import InputError
from nla_jax.sampling import respond

LOCAL = "nla_jax.labels.local:Local"
SETTINGS = {"instruction": "Explain: {text} {token}", "temperature": 0.0, "dtype": "float32", "max_tokens": 24}
WINDOWED = dataclasses.replace(TINY, local=(True, False, True), window=5)


@pytest.mark.parametrize("config", [TINY, WINDOWED], ids=["global", "local and global"])
def test_padded_prompts_are_continued_as_if_alone(config):
    """The oracle: the whole sequence read again for every token, without padding, without a cache."""
    params, end, limit = random_params(config), 3, 6
    rng = np.random.default_rng(0)
    prompts = [rng.integers(4, config.vocab_size, n).tolist() for n in (1, 4, 9, 11)]
    tokens = np.zeros((4, 11), np.int32)
    for row, ids in zip(tokens, prompts):
        row[11 - len(ids) :] = ids
    lengths = np.array([len(ids) for ids in prompts], np.int32)
    keys = jax.vmap(jax.random.key)(jnp.arange(4))
    found = respond(
        Transformer(config),
        params,
        jnp.asarray(tokens),
        jnp.asarray(lengths),
        keys,
        end=end,
        max_new_tokens=limit,
        temperature=0.0,
    )
    model = Transformer(config)
    logits = jax.jit(lambda ids: model.apply({"params": params}, ids, method="next_token_logits"))
    for ids, written, real, logprobs in zip(prompts, found.tokens, found.mask, found.logprobs):
        ids = list(ids)
        for t in range(int(real.sum())):
            padded = np.zeros((1, 20), np.int32)
            padded[0, : len(ids)] = ids
            of_next = np.asarray(logits(padded)[0, len(ids) - 1], np.float64)
            assert int(written[t]) == of_next.argmax()
            logprob = of_next.max() - np.log(np.exp(of_next - of_next.max()).sum()) - of_next.max()
            assert logprobs[t] == pytest.approx(logprob, abs=1e-4)
            ids.append(int(written[t]))
        assert len(ids) == 20 or ids[-1] == end or real.sum() == limit


@pytest.fixture(scope="module")
def instruct(tokenizer, tmp_path_factory):
    """The folder of a model that writes an explanation in its tags and ends."""
    folder = tmp_path_factory.mktemp("instruct") / "model"
    save_model(folder, talkative(random_params(TINY), tokenizer), TINY, tokenizer)
    return folder


@pytest.fixture(scope="module")
def rows():
    texts = ["The river", "The river turns north at the old mill and runs through three villages", "By noon"]
    return [LabelRow(text, text.split()[-1], 3, "", "doc") for text in texts]


def test_labels_do_not_depend_on_the_texts_beside_them(instruct, rows):
    labeller = make_labeller(LOCAL, SETTINGS | {"model": str(instruct)}, {"rows": 2})
    labeller.ready()
    found = labeller.label(rows)
    assert all(isinstance(text, str) and text and "<" not in text for text in found)
    assert found == [labeller.label([row])[0] for row in rows]
    assert labeller.facts["version"] and labeller.facts["settings"]["model"] == str(instruct)
    assert "rows" not in labeller.facts["settings"]


def test_an_answer_that_does_not_end_is_no_label(instruct, rows):
    labeller = make_labeller(LOCAL, SETTINGS | {"model": str(instruct), "max_tokens": 1})
    assert labeller.label(rows[:1]) == [NoLabel("cut")]


@pytest.mark.parametrize(
    "wrong, words",
    [({"model": "no/folder/here"}, "no/folder/here"), ({"dtype": "int8"}, "dtype is 'int8'"), ({"rows": 0}, "rows")],
)
def test_wrong_settings_are_named(wrong, words, instruct):
    with pytest.raises(InputError, match=words):
        make_labeller(LOCAL, {"model": str(instruct)} | wrong).ready()
