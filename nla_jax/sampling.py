"""The rollout: sampling explanations with a key/value cache inside one jitted program."""

import concurrent.futures
import dataclasses
import functools
import os
import threading
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from nla_jax.autoencoder import Verbalizer
from nla_jax.models.sharding import DECODE, cut_batch, relayout, vocabulary_parts
from nla_jax.models.transformer import (
    Transformer,
    abstract_params,
    empty_cache,
    layers_apart,
)
from nla_jax.runtime.errors import InputError

BLOCK = 128  # entries of the vocabulary, at most, whose mass a draw sums first


@struct.dataclass
class Rollout:
    """`tokens [B, R]`: responses, B = A·G, padded with the end token. `logprobs [B, R]`: of the sampled tokens under
    softmax(logits / temperature). `mask [B, R]`: True up to and including the end token. `finished [B]`: False where the
    response was cut at R tokens."""

    tokens: Int[Array, "B R"]
    logprobs: Float[Array, "B R"]
    mask: Bool[Array, "B R"]
    finished: Bool[Array, "B"]


def decoding_layout(mesh: Mesh, verbalizer: Verbalizer, base: dict | None = None) -> Callable[[dict], dict]:
    """A function from the AV's trained parameters to the whole ones from which `rollout` samples on a mesh: a copy in the
    compute dtype (`working_dtypes`), laid out for decoding. An adapter's frozen `base` is copied once, here; on one device it
    serves as it is."""
    config = verbalizer.model.config
    move = relayout(mesh, verbalizer.abstract_params(), config.dtype, DECODE)
    if verbalizer.lora and mesh.size > 1:
        base = relayout(mesh, abstract_params(config), config.dtype, DECODE)(base)
    return lambda params: verbalizer.assemble(move(params), base)


def sample_tokens(
    keys: Array, logits: Float[Array, "B V"], temperature: float, top_k: int | None, top_p: float | None
) -> tuple[Int[Array, "B"], Float[Array, "B"]]:
    """One token of each row and its log-probability under softmax(logits / temperature); temperature 0 is greedy (the
    log-probability is then that of temperature 1). `top_k` and `top_p` restrict what can be drawn, in float32. Raises
    `InputError` for values that mean nothing.

    The mesh may cut the vocabulary over `tensor`. All that is needed of other devices are sums, maxima and minima over it:
    a few numbers a row, never the logits."""
    if not temperature >= 0 or (top_k is not None and top_k < 1) or (top_p is not None and not 0 < top_p <= 1):
        raise InputError(
            f"Sampling needs a temperature of 0 or more, top_k of 1 or more and top_p above 0 and up to 1 (or None); found "
            f"temperature {temperature}, top_k {top_k}, top_p {top_p}."
        )
    logits, scale = logits.astype(jnp.float32), temperature or 1.0
    total = jax.nn.logsumexp(logits / scale, -1, keepdims=True)
    if temperature == 0:
        token = _likeliest(logits)
        return token, _at(logits, token) - total[:, 0]
    logp, least = logits / scale - total, jnp.full_like(total, -jnp.inf)
    if top_k is not None:
        least = _threshold(logp, 1, top_k)
    if top_p is not None:
        least = jnp.maximum(least, _threshold(logp, jnp.exp(logp), top_p))

    def mass(logits: Float[Array, "B *n"]) -> Float[Array, "B *n"]:
        """The probabilities of some entries of the rows, 0 where the draw excludes them."""
        of_row = lambda x: jnp.expand_dims(x[:, 0], range(1, logits.ndim))
        logp = logits / scale - of_row(total)
        return jnp.where(logp >= of_row(least), jnp.exp(logp), 0)

    token = _inverse_cdf(logits, mass, jax.vmap(jax.random.uniform)(keys))
    return token, _at(logits, token) / scale - total[:, 0]


def _inverse_cdf(logits: Float[Array, "B V"], mass: Callable, uniform: Float[Array, "B"]) -> Int[Array, "B"]:
    """The first token up to which the share `1 - uniform` of a row's mass lies: one random number a row, where the Gumbel trick
    draws one for every entry of the vocabulary. First the part of the vocabulary, then a block of that part, then the token:
    logits are read once, to sum their mass by blocks; what is accumulated, and written, are a few numbers a row."""
    B, V = logits.shape
    parts = vocabulary_parts(V)
    width = max(w for w in range(1, BLOCK + 1) if V // parts % w == 0)
    blocks = logits.reshape(B, parts, -1, width)
    upto = jnp.cumsum(mass(blocks).sum(-1), -1)
    part = upto[..., -1]
    earlier = np.tri(parts, k=-1, dtype=np.float32)
    before = cut_batch(jnp.sum(part[:, None] * earlier, -1), rules=DECODE)  # the mass of all earlier parts
    target = (jnp.sum(part, -1) * (1 - uniform))[:, None]
    chosen = jnp.max(jnp.where((before < target) & (part > 0), np.arange(parts), 0), -1)

    # In every part: the block, and the token in it, that what is left of the share leads to.
    rest = jnp.minimum(target - before, part)
    block = _first(upto, rest)
    rest -= jnp.where(block > 0, _pick(upto, jnp.maximum(block - 1, 0)), 0)
    inside = mass(jax.lax.platform_dependent(blocks, block, tpu=_block_by_sum, default=_block))
    upto = jnp.cumsum(inside, -1)
    place = _first(upto, jnp.minimum(rest, upto[..., -1]))
    place = jnp.where(_pick(inside, place) > 0, place, jnp.argmax(inside, -1))  # rounding may lead to a token without mass
    token = np.arange(parts) * (V // parts) + block * width + place
    return jnp.sum(jnp.where(np.arange(parts) == chosen[:, None], token, 0), -1)


def _block(blocks: Float[Array, "B P n w"], index: Int[Array, "B P"]) -> Float[Array, "B P w"]:
    return jnp.take_along_axis(blocks, index[..., None, None], 2)[:, :, 0]


def _block_by_sum(blocks: Float[Array, "B P n w"], index: Int[Array, "B P"]) -> Float[Array, "B P w"]:
    """`_block` without a gather, for which a TPU would lay out all blocks anew."""
    chosen = np.arange(blocks.shape[2]) == index[..., None]
    return jnp.sum(jnp.where(chosen[..., None], blocks, 0), 2)


def _first(upto: Float[Array, "B P n"], share: Float[Array, "B P"]) -> Int[Array, "B P"]:
    """The index of the first of growing sums that reaches a share; the last one where rounding lets none reach it."""
    return jnp.minimum(jnp.sum(upto < share[..., None], -1), upto.shape[-1] - 1)


def _pick(x: Float[Array, "B P n"], index: Int[Array, "B P"]) -> Float[Array, "B P"]:
    return jnp.take_along_axis(x, index[..., None], -1)[..., 0]


def _at(x: Float[Array, "B V"], token: Int[Array, "B"]) -> Float[Array, "B"]:
    return jnp.take_along_axis(x, token[:, None], 1)[:, 0]


def _likeliest(x: Float[Array, "B V"]) -> Int[Array, "B"]:
    """argmax: of each part of the vocabulary where it lies, then of the parts (a plain one would gather a row that is cut)."""
    B, V = x.shape
    x = x.reshape(B, vocabulary_parts(V), -1)
    token = jnp.argmax(x, -1) + np.arange(x.shape[1]) * x.shape[2]
    if x.shape[1] == 1:
        return token[:, 0]
    best = x.max(-1)
    return jnp.min(jnp.where(best >= _less(best.max(-1, keepdims=True)), token, V - 1), -1)


def _less(x: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """A little less than x. Values are never compared for equality: the compiler may compute both sides in different fusions,
    whose last bits differ, and nothing would be equal to its own maximum."""
    return x - 1e-6 * (1 + jnp.abs(x))


def _threshold(logp: Float[Array, "B V"], weight: Float[Array, "B V"] | int, limit: float) -> Float[Array, "B 1"]:
    """A little less than the least t for which the entries above t weigh less than `limit` together: of weight 1 the limit-th
    largest entry, of weight p the least likely entry of the nucleus. By bisection over the bits of -t, whose order is its own."""

    def halve(_, bounds):
        low, high = bounds
        middle = low + (high - low + 1) // 2
        above = logp > -jax.lax.bitcast_convert_type(middle, jnp.float32)
        light = jnp.sum(jnp.where(above, weight, 0), -1, keepdims=True) < limit
        return jnp.where(light, middle, low), jnp.where(light, high, middle - 1)

    zero, infinity = (jnp.full((len(logp), 1), bits, jnp.int32) for bits in (0, 0x7F800000))
    bits = jax.lax.fori_loop(0, 31, halve, (zero, infinity))[0]
    return _less(-jax.lax.bitcast_convert_type(bits, jnp.float32))


@functools.partial(jax.jit, static_argnames=("verbalizer", "group", "max_new_tokens", "temperature", "top_k", "top_p"))
def rollout(
    verbalizer: Verbalizer,
    params: dict,
    vectors: Float[Array, "A D"],
    rng: Array,
    first_row: Int[Array, ""] | int = 0,
    *,
    group: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Rollout:
    """`group` responses for each activation, at most `max_new_tokens` tokens; the loop ends when every row has ended.

    On a mesh `params` lie as `decoding_layout` gives them. Row i draws from `fold_in(rng, first_row + i)`: the text does not
    depend on how a batch is cut or sharded. Raises `InputError` where a number means nothing."""
    if min(group, max_new_tokens) < 1:
        raise InputError(f"A rollout needs a group and max_new_tokens of 1 or more; found {group} and {max_new_tokens}.")
    config = dataclasses.replace(verbalizer.model.config, decoding=True, vocab_rows=len(params["embedding"]))
    model = Transformer(config)
    cast = lambda path, x: x.astype(config.dtype) if path[-1].key in ("lora_a", "lora_b") else x
    params = jax.tree_util.tree_map_with_path(cast, params)  # adapters: once, not for every token
    verbalizer = dataclasses.replace(verbalizer, model=model)
    past, first = verbalizer.read_prompt(params, cut_batch(vectors, rules=DECODE))
    B, R = len(vectors) * group, max_new_tokens
    keys = jax.vmap(jax.random.fold_in, (None, 0))(rng, first_row + jnp.arange(B))

    def sample(params, t, hidden):
        logits = model.apply({"params": params}, hidden, method="logits")
        return sample_tokens(jax.vmap(jax.random.fold_in, (0, None))(keys, t), logits, temperature, top_k, top_p)

    def write(state: Rollout, t, token, logp) -> Rollout:
        running = ~state.finished
        return Rollout(
            state.tokens.at[:, t].set(jnp.where(running, token, verbalizer.end)),
            state.logprobs.at[:, t].set(jnp.where(running, logp, 0)),
            state.mask.at[:, t].set(running),
            state.finished | (token == verbalizer.end),
        )

    def generate(params, past, cache, state):
        def step(carry):
            t, state, cache = carry
            x = verbalizer.embed(params, jax.lax.dynamic_slice_in_dim(state.tokens, t - 1, 1, 1))
            hidden, cache = model.apply(
                {"params": params}, x, past, cache, verbalizer.prompt_length, t - 1, method="decode"
            )
            return t + 1, write(state, t, *sample(params, t, hidden[:, 0])), cache

        running = lambda carry: (carry[0] < R) & ~jnp.all(carry[1].finished)
        with jax.named_scope("decode"):
            return jax.lax.while_loop(running, step, (jnp.int32(1), state, cache))[1]

    by_layer = lambda params, past, cache, state: generate(*layers_apart(params, past, cache), state)

    empty = Rollout(
        jnp.full((B, R), verbalizer.end, jnp.int32), jnp.zeros((B, R)), jnp.zeros((B, R), bool), jnp.zeros(B, bool)
    )
    state = write(empty, 0, *sample(params, 0, jnp.repeat(first, group, axis=0)))
    cache = empty_cache(model.config, B, -(-max(R - 1, 1) // 8) * 8)  # a GPU pads other lengths, in a copy for every token
    return jax.lax.platform_dependent(params, past, cache, state, tpu=generate, default=by_layer)


def start_all(mesh: Mesh, sample: Callable[[int], Rollout], chunks: int) -> Iterator[Rollout]:
    """`sample(0)`, …, `sample(chunks - 1)`, in this order; all are started before the first is waited for.

    Accelerators work through them one after the other, while the host reads what is done. The cores of a CPU, which the small
    matrices of decoding leave half idle, work on as many chunks at a time: the CPU runs one program of each thread."""
    if chunks < 2 or mesh.size > 1 or jax.default_backend() != "cpu":
        return iter([sample(i) for i in range(chunks)])
    starting = threading.Lock()

    def done(i: int) -> Rollout:
        with starting, jax.set_mesh(mesh):  # the first to start compiles for all
            chunk = sample(i)
        return jax.block_until_ready(chunk)

    threads = concurrent.futures.ThreadPoolExecutor(min(chunks, os.cpu_count()))
    results = threads.map(done, range(chunks))
    threads.shutdown(wait=False)
    return results
