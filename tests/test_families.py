"""Every family read in segments and decoded from the key/value cache, where windows end within earlier segments."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest

from conftest import close
from nla_jax.models.pretrained import load_params, read_config
from nla_jax.models.transformer import Transformer, empty_cache

PREFIX, SUFFIX, RESPONSE = 5, 4, 9  # tokens; windows of 6 end inside each of the three
A, G = 2, 3


@pytest.mark.parametrize("family", parity.FAMILIES)
def test_segments_and_decoding_equal_the_full_forward(family):
    config = read_config(parity.GOLDEN / family)
    params = load_params(parity.GOLDEN / family, config)
    model, rng = Transformer(config), np.random.default_rng(0)
    draw = lambda *shape: rng.integers(0, config.vocab_size, shape)
    prefix, suffix, responses = draw(1, PREFIX), draw(A, SUFFIX), draw(A * G, RESPONSE)
    apply = functools.partial(model.apply, {"params": params})
    embed = functools.partial(apply, method="embed")

    @jax.jit
    def full():
        rows = np.concatenate([prefix.repeat(A * G, 0), suffix.repeat(G, 0), responses], 1)
        return apply(embed(rows))[0][:, PREFIX + SUFFIX :]

    @jax.jit
    def past():
        _, first = apply(embed(prefix))
        _, second = apply(embed(suffix), (first,), PREFIX)
        return first, second

    @jax.jit
    def segmented():
        return apply(embed(responses), past(), PREFIX + SUFFIX)[0]

    @jax.jit
    def decoded():
        segments = past()
        cache = empty_cache(config, A * G, RESPONSE)

        def step(cache, index):
            x = embed(jax.lax.dynamic_slice_in_dim(jnp.asarray(responses), index, 1, 1))
            x, cache = apply(x, segments, cache, PREFIX + SUFFIX, index, method="decode")
            return cache, x[:, 0]

        return jax.lax.scan(step, cache, jnp.arange(RESPONSE))[1].swapaxes(0, 1)

    expected = full()
    close(segmented(), expected, 1e-5)
    close(decoded(), expected, 1e-5)
