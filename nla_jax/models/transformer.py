"""One decoder-only transformer for every model family; the differences are data in `TransformerConfig`.

No mutable collections: parameters, keys and values, and caches are explicit arguments and results. Layers are stacked
on a leading axis and scanned, so that truncation to the first K+1 blocks is a slice (`truncate`). What a truncated
model returns *is* the residual stream after block K: the final norm belongs to `logits`.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from nla_jax.models.attention import MASKED, SAVED, Queries, Segment, attend, causal_mask, soft_cap
from nla_jax.models.kernels import attend_by
from nla_jax.models.layers import (
    Dense,
    Projection,
    RMSNorm,
    frozen_scores,
    gated,
    moved,
    normal,
    of_integers,
    tied_scores,
    vocabulary_scores,
)
from nla_jax.models.rope import Rope, rotate
from nla_jax.models.sharding import DECODE, TRAIN, cut_batch, gathered, where_table_lies
from nla_jax.models.views import part, split

ACTIVATIONS = {"silu": nn.silu, "gelu_tanh": lambda x: nn.gelu(x, approximate=True)}
Index = Int[ArrayLike, ""]
Streams = Sequence[Float[ArrayLike, "_b _T D"]]  # residual streams of the parts of a text, each at its own batch size
Edit = Callable[[Streams, Index], Streams]  # `edit(streams, layer)`, applied after every block


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Everything that distinguishes one model from another. `dtype` is the compute dtype."""

    vocab_size: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    family: str = "llama"  # decides the names of tensors in a checkpoint (models/families.py)
    max_length: int = 32_768  # positions that the model was made for; recorded, not enforced
    norm_eps: float = 1e-5
    tied_head: bool = True
    activation: str = "silu"
    rope: Rope = Rope()
    qkv_bias: bool = False  # Qwen2
    qk_norm: bool = False  # Qwen3, Gemma 3: RMS norm over the head dimension of queries and keys
    post_norms: bool = False  # Gemma: another norm after attention and after the MLP, before they join the stream
    norm_offset: float = 0.0  # Gemma: norms multiply by 1 + scale
    embedding_scale: float = 1.0  # Gemma: sqrt(width)
    attention_scale: float | None = None  # None: head_dim ** -0.5
    attention_cap: float | None = None  # Gemma 2
    logit_cap: float | None = None  # Gemma 2
    window: int | None = None  # queries of local layers read this many positions, their own included
    local: tuple[bool, ...] = ()  # which layers are local; () none
    local_rope: Rope | None = None  # Gemma 3: the rope of local layers, if it differs
    dtype: Any = jnp.float32
    # What a block saves for its backward pass: a policy of `jax.checkpoint_policies` by name, or None for everything.
    # Except under `nothing_saveable`, the output and log-sum-exp of attention are saved too.
    remat: str | None = None
    attention: str = "xla"  # "cudnn", "splash": a kernel of models/kernels.py instead of `attend`, except when decoding
    decoding: bool = False  # on a mesh: weights stay cut as sharding.DECODE says; training gathers them
    vocab_rows: int | None = None  # rows of embedding and head, if padded for a mesh (None: vocab_size)

    @property
    def rules(self) -> tuple:
        """Where arrays lie on a mesh."""
        return DECODE if self.decoding else TRAIN

    def truncated(self, layers: int) -> "TransformerConfig":
        """The config of the first `layers` blocks."""
        return dataclasses.replace(self, layers=layers, local=self.local[:layers])


def projections(c: TransformerConfig) -> dict[str, Projection]:
    """The linear maps of a block, by name: the one place that knows their shapes."""
    of_heads = lambda n, axis: Projection((c.width,), (n, c.head_dim), ("embed", axis, "head_dim"), c.qkv_bias)
    into_mlp = Projection((c.width,), (c.mlp_width,), ("embed", "mlp"))
    return {
        "q": of_heads(c.heads, "heads"),
        "k": of_heads(c.kv_heads, "kv_heads"),
        "v": of_heads(c.kv_heads, "kv_heads"),
        "o": Projection((c.heads, c.head_dim), (c.width,), ("heads", "head_dim", "embed")),
        "gate": into_mlp,
        "up": into_mlp,
        "down": Projection((c.mlp_width,), (c.width,), ("mlp", "embed")),
    }


class KeyValues(NamedTuple):
    """Keys and values of a stretch of text: of one layer, of all layers stacked, or in tuples (`layers_apart`)."""

    k: Float[Array, "*L b N S H"] | tuple[Float[Array, "b N S H"], ...]
    v: Float[Array, "*L b N S H"] | tuple[Float[Array, "b N S H"], ...]


class Context(NamedTuple):
    """What a block needs to know that is the same in all layers. The lists have an entry for each part of the text.

    `masks[i][j][kind]`: what part i may read of stretch j; stretches are the past, then the parts up to i itself.
    `ropes[i][kind]`: sines and cosines at the positions of part i. `slot`: where in the cache a decoded token goes."""

    masks: list[list[Bool[Array, "kinds #b #T S"]]]
    ropes: list[Float[Array, "kinds 2 T H//2"]]
    slot: int | Index


@struct.dataclass
class Kept:
    """The streams `[n, B, T, D]` after n of the blocks, as far as these have run."""

    blocks: Int[Array, "n"]
    streams: Float[Array, "n B T D"]

    def record(self, cut: Callable[[Streams], Streams], x: Float[Array, "B T D"], block: Index) -> "Kept":
        """With the stream `x` after a block, where it is one of these. `cut`: lays streams out over the devices."""
        new = [jnp.where(here, x, old) for here, old in zip(self.blocks == block, self.streams)]
        return self.replace(streams=jnp.stack(cut(new)))


class Block(nn.Module):
    """One pre-norm block."""

    config: TransformerConfig

    @nn.compact
    def __call__(
        self, carry: tuple, past: list[KeyValues], layer: Index | None, kind: Index, context: Context, edit: Edit | None
    ) -> tuple[tuple, list[KeyValues] | None]:
        """`carry`: the `Streams`; when decoding, the cache (`KeyValues`): of all layers, or of this one if `layer` is None
        (in the carry of a scan it is updated in place; as its input and output it would exist twice); and what is `Kept`.
        `past`: of this layer. `kind`: 0 global, 1 local. `edit`: changes the streams after the block.

        Returns the new carry, and without a cache the keys and values of each part."""
        c, maps = self.config, projections(self.config)
        parts, cache, kept = carry
        norm = lambda name, axis="embed": RMSNorm(c.norm_eps, axis, c.norm_offset, name=name)
        dense = lambda name: Dense(maps[name], c.dtype, c.decoding, name=name)
        cut = lambda parts: [cut_batch(x, rules=c.rules) for x in parts]

        parts = cut(parts)
        with jax.named_scope("attention"):
            ys = norm("attention_norm")(parts)
            qs, ks, vs = (dense(name)(ys) for name in "qkv")
            if c.qk_norm:
                qs, ks = norm("q_norm", "head_dim")(qs), norm("k_norm", "head_dim")(ks)
            qs, ks = ([rotate(x, rope[kind]) for x, rope in zip(xs, context.ropes)] for xs in (qs, ks))
            own = kv = [KeyValues(jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)) for k, v in zip(ks, vs)]
            if cache is not None:
                at = () if layer is None else (layer,)
                new = [x[(None,) * len(at)] for x in own[0]]
                write = lambda whole, x: jax.lax.dynamic_update_slice(whole, x, (*at, 0, 0, context.slot, 0))
                cache = KeyValues(*(moved(write, whole, x) for whole, x in zip(cache, new)))
                kv = [KeyValues(*(whole[at] for whole in cache))]
            reads = [zip([*past, *kv[: i + 1]], masks, strict=True) for i, masks in enumerate(context.masks)]
            segments = [[Segment(k, v, mask[kind]) for (k, v), mask in read] for read in reads]
            ys = dense("o")([self._attend(q, read, kind) for q, read in zip(qs, segments)])
            ys = norm("attention_post_norm")(ys) if c.post_norms else ys
            parts = [x + y for x, y in zip(parts, ys)]

        with jax.named_scope("mlp"):
            ys = norm("mlp_norm")(parts)
            ys = [gated(ACTIVATIONS[c.activation], *pair) for pair in zip(dense("gate")(ys), dense("up")(ys))]
            ys = dense("down")(ys)
            ys = norm("mlp_post_norm")(ys) if c.post_norms else ys
            parts = [x + y for x, y in zip(parts, ys)]
        if edit is not None:
            parts = edit(parts, layer)
        parts = cut(parts)
        if kept is not None:
            kept = kept.record(cut, parts[0], layer)
        return (parts, cache, kept), own if cache is None else None

    def _attend(self, q: Queries, segments: list[Segment], kind: Index) -> Queries:
        c = self.config
        scale = c.attention_scale or c.head_dim**-0.5
        if c.attention == "xla" or c.decoding:
            return attend(q, segments, scale, c.attention_cap)
        by = lambda window: lambda q, segments: attend_by(c.attention, q, segments, window, scale, c.attention_cap)
        return jax.lax.switch(kind, [by(None), by(c.window)], q, segments) if any(c.local) else by(None)(q, segments)


class Transformer(nn.Module):
    """Embedding, blocks, and head. `params`: `{embedding, blocks, final_norm, head}`, the last two only where used."""

    config: TransformerConfig

    def setup(self):
        c = self.config
        rows = c.vocab_rows or c.vocab_size
        there = lambda name: self.is_initializing() or self.has_variable("params", name)
        if there("embedding"):
            self.embedding = self.param("embedding", normal("vocab", "embed"), (rows, c.width))
        block, policies = Block, jax.checkpoint_policies
        if c.remat:
            policy = getattr(policies, c.remat)
            if policy is not policies.nothing_saveable:
                policy = policies.save_from_both_policies(policy, policies.save_only_these_names(SAVED))
            block = nn.remat(Block, policy=policy, prevent_cse=False)
        self.blocks = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, 0, 0, nn.broadcast, nn.broadcast),
            length=c.layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(c)
        self.final_norm = RMSNorm(c.norm_eps, "embed", c.norm_offset)
        if not c.tied_head and there("head"):
            self.head = self.param("head", normal("embed", "vocab"), (c.width, rows))

    def embed(self, tokens: Int[ArrayLike, "*B T"]) -> Float[Array, "*B T D"]:
        """The embeddings of token ids."""
        c = self.config
        take = lambda table: jnp.take(table, tokens, axis=0)
        if self.has_variable("params", "integers"):
            x = of_integers(take(self.get_variable("params", "integers")["embedding"]), self.embedding.dtype)
        else:
            x = moved(take, self.embedding) if c.decoding else take(self.embedding)
        x = x.astype(c.dtype)
        if not c.decoding:
            x = cut_batch(where_table_lies(x))
        return x if c.embedding_scale == 1 else x * jnp.asarray(c.embedding_scale, c.dtype)

    def __call__(
        self,
        parts: Streams,
        past: Sequence[KeyValues] = (),
        start: int | Index = 0,
        edit: Edit | None = None,
        real: Bool[Array, "B T"] | None = None,
    ) -> tuple[Streams, list[KeyValues]]:
        """Runs all blocks over embeddings of positions `start …`, which follow the `past`.

        `parts` are stretches of the same texts, one after the other, each at its own batch size: the constant part of a
        prompt at batch 1, prompts at batch A, responses at batch A·G. Row i of a part continues row i // r of the part
        before it, if that has r times fewer rows. The parts go through each block together, so that its weights are
        read (on a mesh: gathered) once. `edit` must be a `jax.tree_util.Partial` of a function and its arrays.

        Returns for each part the residual stream after the last block (before the final norm), and the keys and values
        that later calls read. Rows padded on the right need no mask: no position can read what follows it. `real`
        marks what is no padding in rows padded on the left: those of a single part, or of a past of one stretch."""
        lengths = [x.shape[1] for x in parts]
        own = [causal_mask(length) for length in lengths]
        if real is not None and not past:
            own, real = [mask & real[:, None] for mask in own], None
        positions = [start + sum(lengths[:i]) + jnp.arange(length) for i, length in enumerate(lengths)]
        context = self._context(past, start, own, positions, 0, real)
        (streams, *_), kv = self._run((list(parts), None, None), past, context, edit)
        return streams, kv

    def streams_after(self, x: Float[Array, "B T D"], blocks: tuple[int, ...]) -> Float[Array, "n B T D"]:
        """The residual streams of embeddings at positions 0 … after each of some blocks. (Running the blocks up to each
        one in turn would copy their weights out of the stack.)"""
        length = x.shape[1]
        context = self._context((), 0, [causal_mask(length)], [jnp.arange(length)], 0)
        kept = Kept(jnp.asarray(blocks), jnp.zeros((len(blocks), *x.shape), x.dtype))
        (*_, kept), _ = self._run(([x], None, kept), (), context, None)
        return kept.streams

    def decode(
        self,
        x: Float[Array, "B 1 D"],
        past: Sequence[KeyValues],
        cache: KeyValues,
        start: int,
        index: Index,
        real: Bool[Array, "B S"] | None = None,
    ) -> tuple[Float[Array, "B 1 D"], KeyValues]:
        """One token, at position `start + index`: writes its keys and values to slot `index` of the cache
        (`empty_cache`), reads the `past` and the slots up to `index`. Returns the residual stream and the cache.

        Parameters, past and cache may be those of `layers_apart`. `real` marks what is no padding in a past of one
        stretch (None: all of it)."""
        length = jax.tree.leaves(cache)[0].shape[-2]
        own = (jnp.arange(length) <= index)[None, None]
        context = self._context(past, start, [own], [(start + index)[None]], index, real)
        ((x,), cache, _), _ = self._run(([x], cache, None), past, context, None)
        return x, cache

    def _context(
        self,
        past: Sequence[KeyValues],
        start,
        own: list[Array],
        positions: list[Array],
        slot,
        real: Array | None = None,
    ) -> Context:
        """The context of parts at `positions [T]` from `start` on, each of which reads the past (of it what is `real`)
        and the parts before it whole, and of itself (or of the cache) what the mask `own [1 or B, T or 1, S]` shows."""
        c, local = self.config, any(self.config.local)
        ropes = [c.rope, c.local_rope or c.rope] if local else [c.rope]
        tables = [jnp.stack([rope.tables(c.head_dim, at) for rope in ropes]) for at in positions]
        earlier = [jax.tree.leaves(kv)[0].shape[-2] for kv in past]
        lengths = [*earlier, *(mask.shape[-1] for mask in own)]
        starts = [start - sum(earlier) + sum(lengths[:j]) for j in range(len(lengths))]
        whole = [jnp.ones((1, 1, length), bool) for length in lengths] if real is None else [real[:, None]]

        def by_kind(mask, first, at):
            """A mask for global layers and, if the model has such, for local ones; `first`: the position of key 0."""
            if not local:
                return mask[None]
            distance = at[:, None] - (first + jnp.arange(mask.shape[-1]))
            near = mask & (distance < c.window)
            return jnp.stack([jnp.broadcast_to(mask, near.shape), near])

        reads = [[*whole[: len(past) + i], mask] for i, mask in enumerate(own)]
        masks = [[by_kind(mask, first, at) for mask, first in zip(read, starts)] for read, at in zip(reads, positions)]
        return Context(masks, tables, slot)

    def _run(self, carry: tuple, past: Sequence[KeyValues], context: Context, edit: Edit | None) -> tuple:
        """All blocks: one scan over the stacked layers, or a call for each of those that are given apart
        (`views.with_layers`, on a CPU).

        Without a cache the stack is read where there is one, which is the smaller program. A single part in 16 bits is
        the exception: called apart, its blocks pass on a stream that XLA's CPU backend keeps in float32."""
        c, (parts, cache, kept) = self.config, carry
        kinds, layers = np.array(c.local or (False,) * c.layers, np.int32), self.get_variable("params", "layers")
        if not layers or (cache is None and jnp.dtype(c.dtype).itemsize > 2):
            return self.blocks(carry, list(past), jnp.arange(c.layers), jnp.asarray(kinds), context, edit)

        # The barrier: else the compiler would compute the sines again in every block, for every head.
        frozen, context = dataclasses.replace(c, decoding=True), jax.lax.optimization_barrier(context)
        block, new = jax.jit(Block(frozen, parent=None).apply), []  # jitted, so that it is traced once
        if cache is None and len(parts) > 1:
            return self._scan_halves(block, parts, past, kinds, context, edit)
        for i, (params, kind) in enumerate(zip(layers, kinds, strict=True)):
            kv = [KeyValues(k[i], v[i]) for k, v in past]
            at, own = (np.int32(i), None) if cache is None else (None, KeyValues(cache.k[i], cache.v[i]))
            (parts, own, kept), read = block({"params": params}, (parts, own, kept), kv, at, kind, context, edit)
            new.append(read if cache is None else [own])
        of_parts = [KeyValues(*zip(*of_layers)) for of_layers in zip(*new)]
        return ((parts, None, kept), of_parts) if cache is None else ((parts, of_parts[0], None), None)

    def _scan_halves(self, block: Callable, parts: Streams, past: Sequence[KeyValues], kinds, context, edit) -> tuple:
        """`_run` of `block` over the stacked layers in 16 bits (`views.with_layers`). A scan that has the stack as its
        input would do the same, but XLA's CPU backend would write a copy of it in float32."""
        stack, integers = self.get_variable("params", "blocks"), self.get_variable("params", "integers")["blocks"]
        joined = lambda x: jnp.stack(x) if isinstance(x, tuple) else x  # of layers that were called apart
        past = [KeyValues(joined(k), joined(v)) for k, v in past]

        def step(parts: Streams, layer: tuple) -> tuple[Streams, list[KeyValues]]:
            i, kind, kv = layer
            of_layer = lambda x, bits: of_integers(jax.lax.dynamic_index_in_dim(bits, i, 0, False), x.dtype)
            params = jax.tree.map(of_layer, stack, integers)
            (parts, *_), read = block({"params": params}, (parts, None, None), kv, i, kind, context, edit)
            return parts, read

        parts, of_parts = jax.lax.scan(step, parts, (jnp.arange(len(kinds)), jnp.asarray(kinds), past))
        return (parts, None, None), of_parts

    def logits(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Final norm and output head; float32. Rows of the head that pad the vocabulary get no probability."""
        (hidden,) = self.final_norm([hidden])
        if self.config.decoding:
            head = self.embedding.T if self.config.tied_head else self.head
            logits = frozen_scores(hidden, head.astype(hidden.dtype))
        elif self.config.tied_head:
            logits = tied_scores(hidden, self.embedding.astype(hidden.dtype))
        else:
            logits = vocabulary_scores(hidden, self.head.astype(hidden.dtype))
        logits = soft_cap(logits, self.config.logit_cap)
        real = np.arange(logits.shape[-1]) < self.config.vocab_size
        return logits if real.all() else jnp.where(real, logits, MASKED)

    def next_token_logits(self, tokens: Int[ArrayLike, "B T"]) -> Float[Array, "B T V"]:
        """The plain language model: logits of the token after each position."""
        (hidden,), _ = self([self.embed(tokens)])
        return self.logits(hidden)


def init_params(model: Transformer, rng: Array) -> dict:
    """Random parameters with logical axis names attached (`flax.linen.LogicallyPartitioned`); unbox before use."""
    return model.init(rng, jnp.zeros((1, 2), jnp.int32), method="next_token_logits")["params"]


def abstract_params(config: TransformerConfig, truncated: bool = False) -> dict:
    """Shapes of the parameter tree with logical axis names attached (`truncated`: without final norm and head)."""
    return {name: part for name, part in _shapes(config).items() if not (truncated and name in ("final_norm", "head"))}


@functools.cache  # tracing a model takes a tenth of a second
def _shapes(config: TransformerConfig) -> dict:
    """The whole tree of `abstract_params`."""
    return jax.eval_shape(lambda: init_params(Transformer(config), jax.random.key(0)))


def truncate(params: dict, layers: int) -> dict:
    """The parameters of the first `layers` blocks, without final norm and head; on a CPU views of the given ones."""
    first = lambda x: part(x, slice(layers)) if len(x) > layers else x
    return {"embedding": params["embedding"], "blocks": jax.tree.map(first, params["blocks"])}


def between(config: TransformerConfig, params: dict, start: int, stop: int) -> tuple[TransformerConfig, dict]:
    """The model of the blocks `start` to `stop - 1` of another, with their parameters and all that is no block's. `params`
    are those before `views.with_layers`."""
    config = dataclasses.replace(config, layers=stop - start, local=config.local[start:stop])
    return config, params | {"blocks": jax.tree.map(lambda x: part(x, slice(start, stop)), params["blocks"])}


def output_head(params: dict, config: TransformerConfig) -> dict:
    """The parameters that `Transformer.logits` reads, the matrix cast and gathered."""
    name, axes = ("embedding", ("vocab", "embed")) if config.tied_head else ("head", ("embed", "vocab"))
    return {"final_norm": params["final_norm"], name: gathered(params[name].astype(config.dtype), axes)}


def empty_cache(config: TransformerConfig, batch: int, length: int) -> KeyValues:
    """`[L, batch, N, length, H]` for `decode` to fill."""
    return KeyValues(*[jnp.zeros((config.layers, batch, config.kv_heads, length, config.head_dim), config.dtype)] * 2)


def layers_apart(params: dict, past: Sequence[KeyValues], cache: KeyValues) -> tuple[dict, list[KeyValues], KeyValues]:
    """Parameters, past and cache for `decode` with an array for each layer instead of a stack. Parameters that have
    `layers` already (`views.with_layers`) are not copied.

    Inside a scan XLA copies each layer out of the stack at every token: on a GPU two thirds of the memory traffic, on a
    CPU a tenth of the time. Splitting the stack before the loop avoids that. TPUs read a stack in place."""
    apart = lambda kv: KeyValues(*(tuple(x[i] for i in range(len(x))) for x in kv))
    layers = params.get("layers") or split(params["blocks"])
    others = {name: values for name, values in params.items() if name != "blocks"}
    return others | {"layers": layers}, [apart(kv) for kv in past], apart(cache)
