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
from nla_jax.models.layers import transposed
from nla_jax.models.sharding import DECODE, cut_batch, relayout, vocabulary_parts
from nla_jax.models.transformer import (
    Edit,
    KeyValues,
    Transformer,
    abstract_params,
    empty_cache,
    layers_apart,
)
from nla_jax.runtime.errors import InputError

BLOCK = 128  # entries of the vocabulary, at most, whose mass a draw sums first


@struct.dataclass
class Rollout:
    """Sampled responses, B = A·G, an activation's G samples in a row."""

    tokens: Array  # [B, R], padded with the end token
    logprobs: Array  # [B, R], of the sampled tokens under softmax(logits / temperature)
    mask: Array  # [B, R], True up to and including the end token
    finished: Array  # [B], False where the response was cut at R tokens


def decoding_layout(mesh: Mesh, verbalizer: Verbalizer, base: dict | None = None) -> Callable[[dict], dict]:
    """A function from the AV's trained parameters to the whole ones from which `rollout` samples on a mesh.

    Those are a copy in the compute dtype (`working_dtypes`), laid out for decoding. An adapter's frozen `base` is
    copied once, here; on one device it is used as it is."""
    move = _mover(mesh, verbalizer)
    if verbalizer.lora and mesh.size > 1:
        config = verbalizer.model.config
        base = relayout(mesh, abstract_params(config), config.dtype, DECODE)(base)
    return lambda params: verbalizer.assemble(move(params), base)


@functools.lru_cache(
    maxsize=8
)  # compiled once for a mesh and a model, however often a pair is made from new parameters
def _mover(mesh: Mesh, verbalizer: Verbalizer) -> Callable[[dict], dict]:
    return relayout(mesh, verbalizer.abstract_params(), verbalizer.model.config.dtype, DECODE)


def sample_tokens(
    keys: Array, logits: Float[Array, "B V"], temperature: float
) -> tuple[Int[Array, "B"], Float[Array, "B"]]:
    """One token of each row and its log-probability under softmax(logits / temperature), in float32.

    Temperature 0 is greedy (the log-probability is then that of temperature 1). Raises `InputError` for a negative one.

    The mesh may cut the vocabulary over `tensor`. All that is needed of other devices are sums, maxima and minima over
    it: a few numbers per row, never the logits."""
    if not temperature >= 0:
        raise InputError(f"Sampling needs a temperature of 0 or more; found {temperature}.")
    logits, scale = logits.astype(jnp.float32), temperature or 1.0
    total = jax.nn.logsumexp(logits / scale, -1, keepdims=True)
    if temperature == 0:
        token = _likeliest(logits)
        return token, _at(logits, token) - total[:, 0]

    def mass(logits: Float[Array, "B *n"]) -> Float[Array, "B *n"]:
        """The probabilities of some entries of the rows."""
        of_row = lambda x: jnp.expand_dims(x[:, 0], range(1, logits.ndim))
        return jnp.exp(logits / scale - of_row(total))

    token = _inverse_cdf(logits, mass, jax.vmap(jax.random.uniform)(keys))
    return token, _at(logits, token) / scale - total[:, 0]


def _inverse_cdf(logits: Float[Array, "B V"], mass: Callable, uniform: Float[Array, "B"]) -> Int[Array, "B"]:
    """Inverse-CDF sampling: one uniform number per row (the Gumbel trick needs one per vocabulary entry).

    The token is searched in three steps: part of the vocabulary (one per device), block, token. The logits are read
    once.
    """
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

    # In every part: the block, and the token in it, to which the rest of the share leads.
    rest = jnp.minimum(target - before, part)
    block = _first(upto, rest)
    rest -= jnp.where(block > 0, _pick(upto, jnp.maximum(block - 1, 0)), 0)
    inside = mass(jax.lax.platform_dependent(blocks, block, tpu=_block_by_sum, default=_block))
    upto = jnp.cumsum(inside, -1)
    place = _first(upto, jnp.minimum(rest, upto[..., -1]))
    place = jnp.where(
        _pick(inside, place) > 0, place, jnp.argmax(inside, -1)
    )  # rounding may lead to a token without mass
    token = np.arange(parts) * (V // parts) + block * width + place
    return jnp.sum(jnp.where(np.arange(parts) == chosen[:, None], token, 0), -1)


def _block(blocks: Float[Array, "B P n w"], index: Int[Array, "B P"]) -> Float[Array, "B P w"]:
    return jnp.take_along_axis(blocks, index[..., None, None], 2)[:, :, 0]


def _block_by_sum(blocks: Float[Array, "B P n w"], index: Int[Array, "B P"]) -> Float[Array, "B P w"]:
    """`_block` without a gather, for which a TPU would copy all blocks into another layout."""
    chosen = np.arange(blocks.shape[2]) == index[..., None]
    return jnp.sum(jnp.where(chosen[..., None], blocks, 0), 2)


def _first(upto: Float[Array, "B P n"], share: Float[Array, "B P"]) -> Int[Array, "B P"]:
    """The index of the first of growing sums that reaches a share; the last one where, by rounding, none does."""
    return jnp.minimum(jnp.sum(upto < share[..., None], -1), upto.shape[-1] - 1)


def _pick(x: Float[Array, "B P n"], index: Int[Array, "B P"]) -> Float[Array, "B P"]:
    return jnp.take_along_axis(x, index[..., None], -1)[..., 0]


def _at(x: Float[Array, "B V"], token: Int[Array, "B"]) -> Float[Array, "B"]:
    return jnp.take_along_axis(x, token[:, None], 1)[:, 0]


def _likeliest(x: Float[Array, "B V"]) -> Int[Array, "B"]:
    """argmax, first within each part of the vocabulary, then over the parts (a plain one would gather a row that is
    cut)."""
    B, V = x.shape
    x = x.reshape(B, vocabulary_parts(V), -1)
    token = jnp.argmax(x, -1) + np.arange(x.shape[1]) * x.shape[2]
    if x.shape[1] == 1:
        return token[:, 0]
    best = x.max(-1)
    return jnp.min(jnp.where(best >= _less(best.max(-1, keepdims=True)), token, V - 1), -1)


def _less(x: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """A little less than x, for comparisons.

    The compiler may compute the two sides of an equality in different fusions, whose last bits differ: then nothing
    would be equal to its own maximum."""
    return x - 1e-6 * (1 + jnp.abs(x))


@functools.partial(jax.jit, static_argnames=("verbalizer", "group", "max_new_tokens", "temperature"))
def rollout(
    verbalizer: Verbalizer,
    params: dict,
    vectors: Float[Array, "A *W"],
    rng: Array,
    first_row: Int[Array, ""] | int = 0,
    limit: Int[Array, ""] | int | None = None,
    *,
    group: int,
    max_new_tokens: int,
    temperature: float = 1.0,
) -> Rollout:
    """`group` responses for each activation, at most `max_new_tokens` tokens; the loop ends when every row has ended.

    `limit` (None: `max_new_tokens`) cuts responses earlier. One compiled program serves all limits.

    On a mesh `params` must be laid out by `decoding_layout`. Row i draws from `fold_in(rng, first_row + i)`: the text
    does not depend on how a batch is cut or sharded. Raises `InputError` for a number that means nothing."""
    if min(group, max_new_tokens) < 1:
        raise InputError(
            f"A rollout needs a group and max_new_tokens of 1 or more; found {group} and {max_new_tokens}."
        )
    config = dataclasses.replace(verbalizer.model.config, decoding=True, vocab_rows=len(params["embedding"]))
    if "layers" in params and config.tied_head and jnp.dtype(config.dtype).itemsize == 2:
        config = dataclasses.replace(config, tied_head=False)
        params = params | {"head": transposed(params["embedding"])}
    model = Transformer(config)
    cast = lambda path, x: x.astype(config.dtype) if path[-1].key in ("lora_a", "lora_b") else x
    params = jax.tree_util.tree_map_with_path(cast, params)  # adapters: once, not for every token
    past, first = dataclasses.replace(verbalizer, model=model).read_prompt(params, cut_batch(vectors, rules=DECODE))
    decoder = _Decoder(model, verbalizer.end, verbalizer.prompt_length, max_new_tokens, temperature, limit=limit)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(rng, first_row + jnp.arange(len(vectors) * group))
    return decoder.respond(params, keys, past, jnp.repeat(first, group, axis=0))


@functools.partial(jax.jit, static_argnames=("model", "end", "max_new_tokens", "temperature"))
def respond(
    model: Transformer,
    params: dict,
    prompts: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    keys: Array,
    *,
    end: int,
    max_new_tokens: int,
    temperature: float = 1.0,
) -> Rollout:
    """A response of a plain language model to each prompt, on one device: row i has its `lengths[i]` ids at the right
    end, and draws from `keys[i]`. `end`: the token that ends a response.

    Padding changes nothing: no position reads it, and rotary positions only count the distance between two tokens."""
    model, past, first, real = _read(model, params, prompts, lengths)
    decoder = _Decoder(model, end, prompts.shape[1], max_new_tokens, temperature, real)
    return decoder.respond(params, keys, past, first)


@functools.partial(jax.jit, static_argnames=("model", "end", "max_new_tokens"))
def respond_edited(
    model: Transformer,
    params: dict,
    prompts: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    edit: Edit,
    *,
    end: int,
    max_new_tokens: int,
) -> Rollout:
    """The greedy responses of `respond` to prompts whose streams `edit` changes after every block
    (`Transformer.__call__`): steering."""
    model, past, first, real = _read(model, params, prompts, lengths, edit)
    decoder = _Decoder(model, end, prompts.shape[1], max_new_tokens, 0.0, real)
    return decoder.respond(params, jax.random.split(jax.random.key(0), len(prompts)), past, first)


def _read(
    model: Transformer, params: dict, prompts: Int[Array, "B T"], lengths: Int[Array, "B"], edit: Edit | None = None
) -> tuple[Transformer, list[KeyValues], Float[Array, "B D"], Bool[Array, "B T"]]:
    """The model as it decodes, keys and values of the prompts, the states that predict what follows them, and which of
    their tokens are no padding."""
    config = dataclasses.replace(model.config, decoding=True, vocab_rows=len(params["embedding"]))
    model, width = Transformer(config), prompts.shape[1]
    real = jnp.arange(width) >= width - lengths[:, None]
    x = model.apply({"params": params}, prompts, method="embed")
    (states,), past = model.apply({"params": params}, [x], edit=edit, real=real)
    return model, past, states[:, -1], real


@dataclasses.dataclass(frozen=True)
class _Decoder:
    """The decode loop: `length` tokens at most, the first at position `start`; `real [B, start]` marks what is no
    padding in the prompts (None: all of it). It ends after `limit` tokens (None: `length`)."""

    model: Transformer
    end: int
    start: int
    length: int
    temperature: float
    real: Array | None = None
    limit: Array | int | None = None

    def respond(self, params: dict, keys: Array, past: list, first: Float[Array, "B D"]) -> Rollout:
        """Responses to prompts whose keys and values are `past`; `first` predicts their first token."""
        B, R = len(first), self.length
        empty = Rollout(
            tokens=jnp.full((B, R), self.end, jnp.int32),
            logprobs=jnp.zeros((B, R)),
            mask=jnp.zeros((B, R), bool),
            finished=jnp.zeros(B, bool),
        )
        state = self.write(empty, 0, *self.sample(params, keys, 0, first))
        # A GPU pads other lengths, in a copy for every token.
        cache = empty_cache(self.model.config, B, -(-max(R - 1, 1) // 8) * 8)
        by_layer = lambda params, past, cache, state: self.generate(keys, *layers_apart(params, past, cache), state)
        stacked = lambda params, past, cache, state: self.generate(keys, params, past, cache, state)
        if "layers" in params:
            return by_layer(params, past, cache, state)
        return jax.lax.platform_dependent(params, past, cache, state, tpu=stacked, default=by_layer)

    def sample(self, params: dict, keys: Array, t: Int[Array, ""] | int, hidden: Float[Array, "B D"]):
        """Token t of each row and its log-probability."""
        logits = self.model.apply({"params": params}, hidden, method="logits")
        return sample_tokens(jax.vmap(jax.random.fold_in, (0, None))(keys, t), logits, self.temperature)

    def write(
        self, state: Rollout, t: Int[Array, ""] | int, token: Int[Array, "B"], logp: Float[Array, "B"]
    ) -> Rollout:
        """The responses with token t; rows that have ended stay as they are."""
        running = ~state.finished
        return Rollout(
            tokens=state.tokens.at[:, t].set(jnp.where(running, token, self.end)),
            logprobs=state.logprobs.at[:, t].set(jnp.where(running, logp, 0)),
            mask=state.mask.at[:, t].set(running),
            finished=state.finished | (token == self.end),
        )

    def generate(self, keys: Array, params: dict, past, cache, state: Rollout) -> Rollout:
        """All tokens after the first."""

        def step(carry):
            t, state, cache = carry
            apply = functools.partial(self.model.apply, {"params": params})
            x = apply(jax.lax.dynamic_slice_in_dim(state.tokens, t - 1, 1, 1), method="embed")
            hidden, cache = apply(x, past, cache, self.start, t - 1, self.real, method="decode")
            return t + 1, self.write(state, t, *self.sample(params, keys, t, hidden[:, 0])), cache

        limit = self.length if self.limit is None else self.limit
        running = lambda carry: (carry[0] < limit) & ~jnp.all(carry[1].finished)
        with jax.named_scope("decode"):
            return jax.lax.while_loop(running, step, (jnp.int32(1), state, cache))[1]


def start_all(mesh: Mesh, sample: Callable[[int], Rollout], chunks: int) -> Iterator[Rollout]:
    """`sample(0)`, …, `sample(chunks - 1)`, in this order; all are started before the first is waited for.

    Accelerators work through them one after the other, while the host reads what is done. The small matrices of
    decoding leave the cores of a CPU half idle, so there as many chunks as cores run at a time, each in a thread."""
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
