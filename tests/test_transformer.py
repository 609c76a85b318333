"""The transformer: attention, segments, the key/value cache, truncation, rematerialisation."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY, close

from nla_jax.models import cpu_forms
from nla_jax.models.attention import Segment, attend
from nla_jax.models.layers import gated, linear, tied_scores
from nla_jax.models.transformer import Transformer, empty_cache, layers_apart, truncate
from nla_jax.models.views import with_layers

G = 3


def naive_attention(q, segments, scale):
    """Softmax over all segments' keys, row by row and head by head."""
    B, T, M, _ = q.shape
    keys, values, masks = [], [], []
    for s in segments:
        spread = lambda x: jnp.repeat(jnp.repeat(x, B // len(x), 0), M // x.shape[1], 1).swapaxes(1, 2)
        keys.append(spread(s.k))
        values.append(spread(s.v))
        mask = jnp.broadcast_to(s.mask, (len(s.k) if len(s.mask) > 1 else 1, T, s.k.shape[2]))
        masks.append(jnp.repeat(mask, B // len(mask), 0))
    k, v, mask = jnp.concatenate(keys, 1), jnp.concatenate(values, 1), jnp.concatenate(masks, 2)
    scores = jnp.einsum("btmh,bsmh->bmts", q, k) * scale
    weights = jax.nn.softmax(jnp.where(mask[:, None], scores, -jnp.inf))
    return jnp.einsum("bmts,bsmh->btmh", weights, v)


@pytest.mark.parametrize("dtype, tolerance", [(jnp.float32, 1e-5), (jnp.bfloat16, 2e-2)])
@pytest.mark.parametrize(
    "function, shapes",
    [
        (lambda x, w: linear(x, w, 1), [(3, 5, 16), (16, 24)]),
        (lambda x, w: linear(x, w, 1), [(3, 5, 24), (24, 8)]),  # here x is the larger operand
        (lambda x, w: linear(x, w, 2), [(3, 5, 4, 6), (4, 6, 8)]),
        (tied_scores, [(3, 5, 16), (40, 16)]),
        (functools.partial(gated, jax.nn.silu), [(3, 5, 16), (3, 5, 16)]),
    ],
    ids=["a wide result", "a narrow one", "of heads", "scores of the vocabulary", "a gate"],
)
def test_products_and_their_gradients_are_those_of_numpy(function, shapes, dtype, tolerance):
    """Whatever form this platform computes: results and gradients from products in float64 of the same rounded arrays."""
    rng = np.random.default_rng(0)
    x, w = (jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)
    y, backward = jax.vjp(jax.jit(function), x, w)
    d_y = jnp.asarray(rng.normal(size=y.shape), y.dtype)
    found = [y, *backward(d_y)]
    a, b, d = (np.asarray(z, np.float64) for z in (x, w, d_y.astype(dtype)))
    if function is tied_scores:
        expected = [a @ b.T, d @ b, np.einsum("rtv,rtd->vd", d, a)]
    elif len(shapes[0]) == len(shapes[1]):
        sigmoid = 1 / (1 + np.exp(-a))
        expected = [a * sigmoid * b, d * b * sigmoid * (1 + a * (1 - sigmoid)), d * a * sigmoid]
    else:
        flat, kernel = a.reshape(15, -1), b.reshape(-1, b.shape[-1])
        expected = [flat @ kernel, d.reshape(15, -1) @ kernel.T, flat.T @ d.reshape(15, -1)]
    for given, true in zip(found, expected, strict=True):
        close(np.asarray(given, np.float64).reshape(true.shape), true, tolerance)


@pytest.mark.parametrize("cache", [cpu_forms.CACHE, 1])
def test_attention_equals_naive_softmax(monkeypatch, cache):
    """With a cache of one byte a CPU computes as few rows at a time as segments allow: of six rows, three."""
    monkeypatch.setattr(cpu_forms, "CACHE", cache)
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    B, T, M, N, H = 6, 4, 4, 2, 8
    shapes = [(1, 5, (1, 1)), (2, 3, (2, T)), (2, 2, (1, 1)), (6, T, (1, T)), (6, 3 * T, (1, 1))]
    # Of the last segment there are more keys than queries, as when decoding.
    segments = [Segment(draw(b, N, S, H), draw(b, N, S, H), rng.random((*m, S)) < 0.6) for b, S, m in shapes]
    hidden = segments[2]._replace(mask=np.zeros((1, 1, 2), bool))  # no key of it is visible
    causal = segments[3]._replace(mask=np.tril(np.ones((1, T, T), bool)))
    segments, q = [segments[0], segments[1], hidden, causal, segments[4]], draw(B, T, M, H)

    @functools.partial(jax.jit, static_argnums=0)
    def run(function, q, segments):
        def loss(q, kv):
            out = function(q, [Segment(k, v, s.mask) for (k, v), s in zip(kv, segments)], 0.7)
            return jnp.sum(jnp.sin(3 * out)), out

        return jax.grad(loss, (0, 1), has_aux=True)(q, [(s.k, s.v) for s in segments])

    expected = run(naive_attention, q, segments)
    close(run(attend, q, segments), expected, 1e-5)
    assert ("while" in run.lower(attend, q, segments).as_text()) == (cache == 1)
    assert all(np.abs(gradient).max() > 1e-3 for i in (0, 1, 3, 4) for gradient in expected[0][1][i])


def full_states(verbalizer, params, vectors, responses):
    """The oracle: each sample's prompt and response in one plain sequence; the states that predict the response."""
    group = len(responses) // len(vectors)
    repeated = jnp.repeat(vectors, group, 0)[:, None]
    slot = verbalizer.injections[0].function(jnp.zeros_like(repeated), repeated, verbalizer.injection_scale)[:, 0]
    prompt = jnp.tile(jnp.asarray(verbalizer.prefix + verbalizer.suffix), (len(responses), 1))
    x = verbalizer.embed(params, jnp.concatenate([prompt, responses], 1)).at[:, len(verbalizer.prefix)].set(slot)
    (hidden,), _ = verbalizer.model.apply({"params": params}, [x])
    return hidden[:, verbalizer.prompt_length - 1 : -1]


@pytest.fixture(scope="module")
def responses():
    return np.random.default_rng(3).integers(4, TINY.vocab_size, (2 * G, 5))


def test_segmented_forward_equals_full_sequence(verbalizer, params, vectors, responses):
    weight = np.random.default_rng(4).normal(size=(2 * G, 5, TINY.width))

    def run(states):
        def loss(params, vectors):
            hidden = states(params, vectors)
            return jnp.sum(weight * jnp.sin(hidden)), hidden

        (_, hidden), gradients = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(params, vectors[:2])
        return hidden, gradients

    segmented = run(lambda params, vectors: verbalizer.read_responses(params, vectors, responses))
    full = run(lambda params, vectors: full_states(verbalizer, params, vectors, responses))
    close(segmented, full, 1e-5)
    assert np.abs(full[1][1]).max() > 1e-3, "the responses must depend on the vectors"


@pytest.mark.parametrize("apart", [False, True])
def test_decoding_equals_full_forward(verbalizer, params, vectors, responses, apart):
    """Of stacked layers, as a TPU decodes, and of layers apart, as a CPU does."""
    model = verbalizer.model

    @jax.jit
    def decoded(params, vectors):
        past, first = verbalizer.read_prompt(params, vectors)
        cache = empty_cache(TINY, 2 * G, 5)
        if apart:
            params, past, cache = layers_apart(params, past, cache)

        def step(cache, t):
            x = verbalizer.embed(params, jax.lax.dynamic_slice_in_dim(responses, t, 1, 1))
            inputs = x, past, cache, verbalizer.prompt_length, t
            hidden, cache = model.apply({"params": params}, *inputs, method="decode")
            return cache, hidden[:, 0]

        _, rest = jax.lax.scan(step, cache, jnp.arange(4))
        return jnp.concatenate([jnp.repeat(first, G, 0)[None], rest]).transpose(1, 0, 2)

    expected = jax.jit(functools.partial(full_states, verbalizer))(params, vectors[:2], responses)
    close(decoded(params, vectors[:2]), expected, 1e-5)


@pytest.mark.parametrize("past", [False, True])
def test_parts_in_16_bits_equal_the_whole_text(params, responses, past):
    """On a CPU parts are read by a loop over the layers, a text of one part layer by layer."""
    model = Transformer(dataclasses.replace(TINY, dtype=jnp.bfloat16))
    params = with_layers(jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), params))
    x = params["embedding"][responses]
    run = lambda parts, before=(), start=0: model.apply({"params": params}, parts, before, start)
    (whole,), _ = run([x])
    if past:
        (first,), before = run([x[:, :1]])
        parts, _ = run([x[:, 1:2], x[:, 2:]], before, 1)
        parts = [first, *parts]
    else:
        parts, _ = run([x[:, :2], x[:, 2:]])
    close(jnp.concatenate(parts, 1).astype(jnp.float32), whole.astype(jnp.float32), 2e-2)


@pytest.mark.parametrize("apart", [False, True])
def test_decoding_without_a_past_passes_through_all_layers(model, params, responses, apart):
    """A text that is decoded from its first token on, with nothing before it, equals its full forward pass."""

    @jax.jit
    def decoded(params):
        length = responses.shape[1]
        cache = empty_cache(TINY, len(responses), length)
        own, past, cache = layers_apart(params, [], cache) if apart else (params, [], cache)

        def step(cache, t):
            x = own["embedding"][jax.lax.dynamic_slice_in_dim(responses, t, 1, 1)]
            hidden, cache = model.apply({"params": own}, x, past, cache, 0, t, method="decode")
            return cache, hidden[:, 0]

        return jax.lax.scan(step, cache, jnp.arange(length))[1].transpose(1, 0, 2)

    (expected,), _ = jax.jit(lambda params: model.apply({"params": params}, [params["embedding"][responses]]))(params)
    close(decoded(params), expected, 1e-5)


def test_truncation_is_the_residual_stream(model, params, responses):
    """The first block's output, sent through the other blocks, is the whole model's."""
    rest = {"embedding": params["embedding"], "blocks": jax.tree.map(lambda x: x[1:], params["blocks"])}

    @jax.jit
    def both(x):
        first = Transformer(TINY.truncated(1)).apply({"params": truncate(params, 1)}, [x])[0]
        last = Transformer(TINY.truncated(TINY.layers - 1)).apply({"params": rest}, first)[0]
        return last, model.apply({"params": params}, [x])[0]

    close(*both(params["embedding"][responses]), 1e-5)
    assert set(truncate(params, 1)) == {"embedding", "blocks"}


def test_rematerialisation_changes_no_gradient(params, responses):
    def gradients(remat):
        model = Transformer(dataclasses.replace(TINY, remat=remat))
        loss = lambda p: jnp.sum(jnp.sin(model.apply({"params": p}, responses, method="next_token_logits")))
        return jax.jit(jax.grad(loss))(params)

    close(gradients("nothing_saveable"), gradients(None), 1e-5)


def test_what_a_remat_policy_keeps_is_not_computed_again(params, responses):
    """Keeping products keeps those of the linear maps: the gradient has no more of them than without
    rematerialisation."""

    def maps(jaxpr) -> int:
        """Products without batch axes, loop bodies counted once."""
        own = sum(e.primitive.name == "dot_general" and not e.params["dimension_numbers"][1][0] for e in jaxpr.eqns)
        inner = (getattr(x, "jaxpr", x) for e in jaxpr.eqns for x in jax.tree.leaves(list(e.params.values())))
        return own + sum(maps(x) for x in inner if hasattr(x, "eqns"))

    def of_gradient(remat):
        model = Transformer(dataclasses.replace(TINY, remat=remat))
        loss = lambda p: jnp.sum(jnp.sin(model.apply({"params": p}, responses, method="next_token_logits")))
        return maps(jax.make_jaxpr(jax.grad(loss))(params).jaxpr)

    assert of_gradient("dots_with_no_batch_dims_saveable") == of_gradient(None) < of_gradient("nothing_saveable")


def test_only_distances_between_positions_count(model, params, responses):
    """Rotary positions: moving all tokens changes nothing, swapping two of them changes the states after them."""
    states = jax.jit(lambda x, start: model.apply({"params": params}, [x], (), start)[0][0])
    x = params["embedding"][responses]
    close(states(x, 7), states(x, 0), 1e-4)
    assert np.abs(states(x[:, [1, 0, 2, 3, 4]], 0) - states(x, 0))[:, -1].max() > 1e-2
