"""The rollout: what is drawn, with which log-probability, where rows end."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY, close
from jax.sharding import NamedSharding, PartitionSpec
from test_transformer import full_states

from nla_jax.losses import TokenLoss
from nla_jax.models.attention import MASKED, soft_cap
from nla_jax.models.lora import Lora
from nla_jax.models.sharding import make_mesh
from nla_jax.models.transformer import Transformer
from nla_jax.models.views import with_layers
from nla_jax.runtime.compiler import compilations
from nla_jax.runtime.errors import InputError
from nla_jax.sampling import rollout, sample_tokens, start_all

G, R = 6, 7


@pytest.fixture(scope="module")
def draw(verbalizer, params, vectors):
    """Samples from a model that rarely ends, with one program for each set of static options."""

    def draw(vectors=vectors[:2], seed=0, first_row=0, params=params, verbalizer=verbalizer, group=G, **options):
        options = dict(group=group, max_new_tokens=R, temperature=1.0) | options
        return jax.device_get(rollout(verbalizer, params, vectors, jax.random.key(seed), first_row, **options))

    return draw


def states_then_statistics(verbalizer, params, vectors, tokens, temperature):
    hidden = verbalizer.read_responses(params, vectors, tokens)
    return TokenLoss(verbalizer.model, lambda tokens: tokens.logprob, temperature)(params, hidden, tokens)[1]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampler_and_trainer_agree_on_logprobs(draw, verbalizer, params, vectors, temperature):
    sampled = draw(temperature=temperature)
    statistics = jax.jit(functools.partial(states_then_statistics, verbalizer), static_argnums=3)
    trainer = statistics(params, vectors[:2], sampled.tokens, temperature).logprob
    close(np.where(sampled.mask, trainer, 0), sampled.logprobs, 1e-5)
    assert sampled.mask.sum() > G * R


def test_first_tokens_differ_within_a_group(draw):
    first = draw().tokens[:, 0].reshape(2, G)
    assert all(len(set(group)) > G // 2 for group in first)


def test_the_seed_determines_the_text(draw):
    assert np.array_equal(draw().tokens, draw().tokens)
    assert not np.array_equal(draw().tokens, draw(seed=1).tokens)


def test_text_does_not_depend_on_how_the_batch_is_cut(draw, vectors):
    whole = draw(vectors)
    for i in (0, 2):
        part = draw(vectors[i : i + 2], first_row=i * G)
        close(part, jax.tree.map(lambda x: x[i * G : (i + 2) * G], whole), 1e-5)


def test_chunks_of_a_batch_are_started_at_once_and_come_in_order(draw, verbalizer, params, vectors):
    """The text of the whole batch, from a program that is compiled once, though each chunk has a thread."""
    rows, key, mesh = [vectors[i : i + 1] for i in range(3)], jax.random.key(0), make_mesh()

    def sample(i):
        return rollout(verbalizer, params, rows[i], key, i * 5, group=5, max_new_tokens=R)

    whole = draw(vectors[:3], group=5)
    with compilations() as compiled:
        chunks = jax.device_get(list(start_all(mesh, sample, 3)))
    assert len(compiled) == 1
    close(jax.tree.map(lambda *x: np.concatenate(x), *chunks), whole, 1e-5)


def test_an_error_in_a_chunk_is_raised():
    def sample(i):
        raise ValueError(f"chunk {i}")

    with pytest.raises(ValueError, match="chunk 0"):
        list(start_all(make_mesh(), sample, 2))


def test_equal_activations_get_different_texts(draw, vectors):
    same = draw(np.repeat(vectors[:1], 2, 0)).tokens
    assert not np.array_equal(same[:G], same[G:])


def test_greedy_is_the_argmax_of_a_full_forward(draw, verbalizer, params, vectors):
    sampled = draw(vectors[:2], temperature=0.0, group=1)

    @jax.jit
    def best(params, vectors, tokens):
        hidden = full_states(verbalizer, params, vectors, tokens)
        return jnp.argmax(verbalizer.model.apply({"params": params}, hidden, method="logits"), -1)

    expected = best(params, vectors[:2], sampled.tokens)
    assert sampled.mask.sum() > R
    assert np.array_equal(sampled.tokens[sampled.mask], np.asarray(expected)[sampled.mask])


def test_rows_end_at_the_end_token(draw, pair, verbalizer):
    """A model that ends often: the mask covers the end token, padding follows it, and log-probs stop there."""
    sampled = draw(params=pair.verbalizer_params)
    for tokens, mask, logprobs, finished in zip(sampled.tokens, sampled.mask, sampled.logprobs, sampled.finished):
        ends = np.flatnonzero(tokens == verbalizer.end)
        length = ends[0] + 1 if len(ends) else R
        assert mask.tolist() == [True] * length + [False] * (R - length)
        assert finished == bool(len(ends))
        assert (tokens[length:] == verbalizer.end).all() and (logprobs[length:] == 0).all()
        assert (logprobs[:length] <= 0).all() and logprobs[:length].min() < -1
    assert 0 < sampled.finished.sum() < len(sampled.finished)


def test_one_token_is_enough(draw):
    """The shortest response: the first token of a longer one."""
    assert np.array_equal(draw(max_new_tokens=1).tokens, draw().tokens[:, :1])


def test_a_marker_in_a_response_injects_nothing(verbalizer, params, vectors):
    rng = np.random.default_rng(0)
    tokens = rng.integers(4, 320, (4, 5))
    prompt = verbalizer.prompt_length
    tokens[:, 1:4] = (verbalizer.suffix * 3)[:3]  # the marker with what follows it in the prompt
    tokens[1, 0] = verbalizer.prefix[-1]  # and once with both its neighbours
    assert prompt > 5
    hidden = jax.jit(verbalizer.read_responses)(params, vectors[:2], tokens)
    close(hidden, jax.jit(functools.partial(full_states, verbalizer))(params, vectors[:2], tokens), 1e-5)


def test_rollout_compiles_once(draw, verbalizer, params, vectors):
    with compilations() as compiled:
        draw(vectors, group=4)
        assert compiled
        compiled.clear()
        for seed in range(3):
            draw(vectors + np.float32(seed), group=4, seed=seed, first_row=4 * seed)
        draw(vectors, group=4, verbalizer=dataclasses.replace(verbalizer))  # equal, though another object
    assert not compiled


# One token


@pytest.fixture(scope="module")
def logits():
    return 2 * np.random.default_rng(1).normal(size=40).astype(np.float32)


def softmax(x, temperature=1.0):
    e = np.exp((x - x.max()).astype(np.float64) / temperature)
    return e / e.sum()


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_draws_follow_the_softmax(logits, temperature):
    n = 20_000
    draw = jax.jit(lambda keys: sample_tokens(keys, jnp.tile(logits, (n, 1)), temperature))
    tokens, logprobs = jax.device_get(draw(jax.random.split(jax.random.key(0), n)))
    p = softmax(logits, temperature)
    np.testing.assert_allclose(logprobs, np.log(p)[tokens], atol=1e-5)
    share = np.bincount(tokens, minlength=40) / n
    assert (np.abs(share - p) <= 5 * np.sqrt(p * (1 - p) / n) + 1e-4).all()


@pytest.mark.parametrize("size", [37, 512, 1000, 4096])  # one block, whole blocks, blocks of 125, many
def test_a_draw_is_the_inverse_of_the_cumulated_softmax(size):
    logits = 3 * np.random.default_rng(size).normal(size=(4000, size)).astype(np.float32)
    logits[:, ::7] = MASKED
    keys = jax.random.split(jax.random.key(1), len(logits))
    tokens = np.asarray(jax.jit(lambda keys, x: sample_tokens(keys, x, 0.8)[0])(keys, logits))
    upto = np.cumsum(np.stack([softmax(x, 0.8) for x in logits]), 1)
    share = 1 - np.asarray(jax.vmap(jax.random.uniform)(keys), np.float64)
    expected = np.array([np.searchsorted(row, s) for row, s in zip(upto, share)])
    rounded = np.abs(upto - share[:, None]).min(1) < 1e-5  # float32 may lie on the other side
    assert (tokens == expected)[~rounded].all() and rounded.mean() < 0.1
    assert (tokens % 7 > 0).all()


def test_a_negative_temperature_is_refused(logits):
    with pytest.raises(InputError, match="Sampling needs a temperature"):
        sample_tokens(jax.random.split(jax.random.key(0), len(logits)), logits[None], -1.0)


def test_temperature_zero_is_greedy_and_tiny_mass_is_safe(logits):
    keys = jax.random.split(jax.random.key(0), 1000)
    token, logprob = sample_tokens(keys[:1], logits[None], 0)
    assert token[0] == logits.argmax() and abs(logprob[0] - np.log(softmax(logits).max())) < 1e-5
    certain = np.where(np.arange(40) == 17, 1e4, -1e4).astype(np.float32)
    assert set(sample_tokens(keys, np.tile(certain, (1000, 1)), 1.0)[0].tolist()) == {17}


def test_the_likeliest_token_is_found_whatever_is_computed_twice():
    """Logits that one program makes and compares: their last bits may differ from one use to the next."""
    x = np.random.default_rng(4).normal(size=(2000, 321)).astype(np.float32)
    keys = jax.random.split(jax.random.key(0), len(x))
    tokens, _ = jax.jit(lambda x: sample_tokens(keys, soft_cap(5 * x, 3.0), 0))(x)
    best = np.take_along_axis(x, np.asarray(tokens)[:, None], 1)[:, 0]
    capped = lambda x: 3 * np.tanh(5 * x.astype(np.float64) / 3)
    np.testing.assert_allclose(capped(best), capped(x.max(1)), atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 0])
def test_draws_do_not_depend_on_how_the_vocabulary_is_cut(temperature):
    """A row at a time on one device, and cut over eight: the same tokens; and rows of which only part is real."""
    rng = np.random.default_rng(3)
    logits = 3 * rng.normal(size=(256, 64)).astype(np.float32)
    logits[:, 50:] = MASKED
    keys = jax.random.split(jax.random.key(2), 256)
    alone = jax.device_get(sample_tokens(keys, logits, temperature))
    mesh = make_mesh(1, 1, 8)
    with jax.set_mesh(mesh):
        cut = jax.device_put(logits, NamedSharding(mesh, PartitionSpec(None, "tensor")))
        program = jax.jit(lambda keys, logits: sample_tokens(keys, logits, temperature)).lower(keys, cut).compile()
        found = jax.device_get(program(jax.device_put(keys, NamedSharding(mesh, PartitionSpec())), cut))
    assert np.array_equal(found[0], alone[0]) and found[0].max() < 50
    close(found[1], alone[1], 1e-6)
    assert "all-gather" not in program.as_text() and "all-reduce" in program.as_text()


@pytest.mark.parametrize("adapted", [None, "float32", "bfloat16"])
@pytest.mark.parametrize("held", ["float32", "bfloat16", "float16"])
def test_views_of_the_weights_change_no_text(verbalizer, params, vectors, held, adapted):
    """`with_layers` spares copies, whatever the weights are held in, tied embeddings and adapters included."""
    config = dataclasses.replace(TINY, tied_head=True, dtype=jnp.dtype("bfloat16" if held == "float32" else held))
    av, rng = dataclasses.replace(verbalizer, model=Transformer(config)), np.random.default_rng(0)
    cast = lambda tree, dtype: jax.tree.map(lambda x: jnp.asarray(x, dtype), tree)
    params = cast({name: part for name, part in params.items() if name != "head"}, held)
    if adapted:
        draw = lambda shape: rng.normal(size=shape.shape) * 0.3
        adapter = jax.tree.map(draw, nn.unbox(Lora(4).abstract_params(config)))
        params = Lora(4).attach(params, cast(adapter, adapted))
    options = {"group": 1, "max_new_tokens": 1, "temperature": 0.0}
    plain, viewed = (
        rollout(av, given, vectors[:2], jax.random.key(0), **options) for given in (params, with_layers(params))
    )
    np.testing.assert_allclose(plain.logprobs, viewed.logprobs, atol=0.1)
    assert np.array_equal(plain.tokens, viewed.tokens)


def test_parts_that_are_not_on_the_device_are_left_as_they_are(params):
    mixed = jax.tree.map(
        lambda x: jnp.asarray(x, jnp.bfloat16), {name: params[name] for name in ("embedding", "blocks")}
    )
    mixed["embedding"] = np.asarray(mixed["embedding"])
    assert with_layers(mixed)["integers"]["embedding"] is mixed["embedding"]
