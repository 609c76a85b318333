"""Every family read in segments and decoded from the key/value cache, where windows end within earlier segments."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
from conftest import close

from nla_jax.autoencoder import Reconstructor
from nla_jax.io.folders import load_params, read_config
from nla_jax.models.transformer import Transformer, empty_cache

PREFIX, SUFFIX, RESPONSE = 5, 4, 9  # tokens; windows of 6 end inside each of the three
A, G = 2, 3


def run(model: Transformer, params: dict, *parts):
    """Streams and segments of stretches of token ids that follow each other."""
    apply = functools.partial(model.apply, {"params": params})
    return apply([apply(tokens, method="embed") for tokens in parts])


@pytest.mark.parametrize("family", parity.FAMILIES)
def test_a_shared_prefix_of_the_reconstructor_changes_nothing(family):
    """Values and gradients, where the prefix runs once and where every row runs whole."""
    config = read_config(parity.GOLDEN / family)
    rng = np.random.default_rng(1)
    tokens, lengths = rng.integers(0, config.vocab_size, (6, 12)), np.array([6, 12, 7, 9, 12, 8])
    tokens[:, :PREFIX] = tokens[0, :PREFIX]
    whole = Reconstructor(Transformer(config))
    shared = Reconstructor(Transformer(config), tuple(tokens[0, :PREFIX].tolist()))
    backbone = load_params(parity.GOLDEN / family, config, truncated=True)
    params = whole.init_params(backbone) | {"head": rng.normal(size=(config.width,) * 2).astype(np.float32)}
    weight = rng.normal(size=(6, config.width))

    def both(reconstructor):
        def loss(params):
            found = reconstructor.reconstruct(params, tokens, lengths)
            return jnp.sum(weight * found), found

        return jax.jit(jax.grad(loss, has_aux=True))(params)

    close(both(shared), both(whole), 1e-5)


@pytest.mark.parametrize("family", parity.FAMILIES)
def test_segments_and_decoding_equal_the_full_forward(family):
    config = read_config(parity.GOLDEN / family)
    params = load_params(parity.GOLDEN / family, config)
    model, rng = Transformer(config), np.random.default_rng(0)
    draw = lambda *shape: rng.integers(0, config.vocab_size, shape)
    prefix, suffix, responses = draw(1, PREFIX), draw(A, SUFFIX), draw(A * G, RESPONSE)
    apply = functools.partial(model.apply, {"params": params})

    def full(params):
        rows = np.concatenate([prefix.repeat(A * G, 0), suffix.repeat(G, 0), responses], 1)
        return run(model, params, rows)[0][0][:, PREFIX + SUFFIX :]

    def segmented(params):
        return run(model, params, prefix, suffix, responses)[0][-1]

    def continued(params):
        """The last part in a call of its own, behind segments that were read before."""
        past = run(model, params, prefix, suffix)[1]
        embedded = model.apply({"params": params}, responses, method="embed")
        return model.apply({"params": params}, [embedded], past, PREFIX + SUFFIX)[0][0]

    weight = rng.normal(size=(A * G, RESPONSE, config.width))
    gradient = lambda states: jax.jit(jax.grad(lambda p: jnp.sum(weight * states(p))))(params)
    expected = jax.jit(full)(params)
    close(jax.jit(segmented)(params), expected, 1e-5)
    close(jax.jit(continued)(params), expected, 1e-5)
    close(gradient(segmented), gradient(full), 1e-5)

    @jax.jit
    def decoded():
        segments = run(model, params, prefix, suffix)[1]
        cache = empty_cache(config, A * G, RESPONSE)

        def step(cache, index):
            x = apply(jax.lax.dynamic_slice_in_dim(jnp.asarray(responses), index, 1, 1), method="embed")
            x, cache = apply(x, segments, cache, PREFIX + SUFFIX, index, method="decode")
            return cache, x[:, 0]

        return jax.lax.scan(step, cache, jnp.arange(RESPONSE))[1].swapaxes(0, 1)

    close(decoded(), expected, 1e-5)
