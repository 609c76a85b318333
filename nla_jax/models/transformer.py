"""One decoder-only transformer for every model family; the differences are data in `TransformerConfig`.

No mutable collections: parameters, key/value segments and caches are explicit arguments and results. Layers are stacked
on a leading axis and scanned, so that truncation to the first K+1 blocks is a slice (`truncate`), and the output of a
truncated model *is* the residual stream after block K: `__call__` ends before the final norm, which belongs to `logits`.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from nla_jax.models.attention import (
    MASKED,
    SAVED,
    Segment,
    attend,
    causal_mask,
    soft_cap,
)
from nla_jax.models.kernels import attend_by
from nla_jax.models.rope import Rope, rotate
from nla_jax.models.sharding import DECODE, TRAIN, cut_batch, gathered, where_table_lies

ACTIVATIONS = {"silu": nn.silu, "gelu_tanh": lambda x: nn.gelu(x, approximate=True)}


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
    family: str = "llama"  # whose names its tensors have in a checkpoint (models/families.py)
    max_length: int = 32_768  # positions that the model was made for; recorded, not enforced
    norm_eps: float = 1e-5
    tied_head: bool = True
    activation: str = "silu"
    rope: Rope = Rope()
    qkv_bias: bool = False  # Qwen2
    qk_norm: bool = False  # Qwen3, Gemma 3: RMS norm over the head dimension of queries and keys
    post_norms: bool = False  # Gemma: a norm also behind attention and MLP, before they are added to the stream
    norm_offset: float = 0.0  # Gemma: norms multiply by 1 + scale
    embedding_scale: float = 1.0  # Gemma: sqrt(width)
    attention_scale: float | None = None  # None: head_dim ** -0.5
    attention_cap: float | None = None  # Gemma 2
    logit_cap: float | None = None  # Gemma 2
    window: int | None = None  # queries of local layers read this many positions, their own included
    local: tuple[bool, ...] = ()  # which layers are local; () none
    local_rope: Rope | None = None  # Gemma 3: the rope of local layers, where it is another one
    dtype: Any = jnp.float32
    # What a block keeps for its backward pass: the name of a `jax.checkpoint_policies` policy (what attention's backward pass
    # wants is kept beside it, but by `nothing_saveable`), or None to keep everything.
    remat: str | None = None
    attention: str = "xla"  # "cudnn", "splash": a kernel of models/kernels.py instead of `attend`, but when decoding
    decoding: bool = False  # on a mesh: weights stay cut as sharding.DECODE says, where training gathers them
    vocab_rows: int | None = None  # of embedding and head, where they are padded for a mesh (None: vocab_size)

    @property
    def rules(self) -> tuple:
        """Where arrays lie on a mesh."""
        return DECODE if self.decoding else TRAIN

    def truncated(self, layers: int) -> "TransformerConfig":
        return dataclasses.replace(self, layers=layers, local=self.local[:layers])


def truncate(params: dict, layers: int) -> dict:
    """The parameters of the first `layers` blocks, without final norm and head: what runs to the residual stream there."""
    return {"embedding": params["embedding"], "blocks": jax.tree.map(lambda x: x[:layers], params["blocks"])}


def _init(*axes: str):
    return nn.with_logical_partitioning(nn.initializers.normal(0.02), axes)


class RMSNorm(nn.Module):
    """Root-mean-square norm in float32, eps inside the square root: x / rms(x) · (offset + scale)."""

    eps: float
    axis: str
    offset: float = 0.0

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        start = nn.initializers.constant(1 - self.offset)
        scale = self.param("scale", nn.with_logical_partitioning(start, (self.axis,)), x.shape[-1:])
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + self.eps)
        return (y * (self.offset + scale)).astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def linear(x: Array, kernel: Array, axes: int) -> Array:
    """x · kernel over the last `axes` axes of x and the first of the kernel. Its own rule for the gradient of the kernel
    says which operand is transposed for it: the smaller one. (JAX would always transpose the gradient of the result, which in
    an MLP is the larger one.)"""
    return jnp.tensordot(x, kernel, axes)


def _linear_forward(x, kernel, axes):
    return jnp.tensordot(x, kernel, axes), (x, kernel)  # not `linear`, in which a remat policy would see no product


def _linear_backward(axes, saved, d_y):
    x, kernel = saved
    outputs, rows = kernel.ndim - axes, x.ndim - axes
    d_x = jnp.tensordot(d_y, kernel, [list(range(-outputs, 0))] * 2)
    if x.size <= d_y.size:
        d_kernel = _over_rows(x, d_y, rows)
    else:
        d_kernel = jnp.moveaxis(_over_rows(d_y, x, rows), range(outputs), range(-outputs, 0))
    return d_x, d_kernel


def _over_rows(x, y, rows: int):
    """xᵀ y, summed over their first `rows` axes. On a CPU, a product of matrices reads xᵀ where x lies; of more axes it would
    first write xᵀ, slowly. Elsewhere flattened rows would have to move."""

    def flattened(x, y):
        a, b = (z.reshape(np.prod(z.shape[:rows], dtype=int), -1) for z in (x, y))
        return jnp.tensordot(a, b, (0, 0)).reshape(x.shape[rows:] + y.shape[rows:])

    plain = lambda x, y: jnp.tensordot(x, y, [list(range(rows))] * 2)
    return jax.lax.platform_dependent(x, y, cpu=flattened, default=plain)


linear.defvjp(_linear_forward, _linear_backward)


@jax.custom_vjp
def vocabulary_scores(x: Float[Array, "*B D"], head: Float[Array, "D V"]) -> Float[Array, "*B V"]:
    """x · head in float32, from operands in the compute dtype; its gradient is cast to that before it meets them again
    (JAX would cast the head to float32 for it, and multiply at half the speed)."""
    return jnp.dot(x, head, preferred_element_type=jnp.float32)


vocabulary_scores.defvjp(
    lambda x, head: (vocabulary_scores(x, head), (x, head)),
    lambda saved, d_scores: _linear_backward(1, saved, d_scores.astype(saved[0].dtype)),
)


class Dense(nn.Module):
    """A linear map over the last axes of its inputs, with a bias where there is one. Where the parameters hold a low-rank pair
    (`lora_a`, `lora_b`, attached by models/lora.py), x · a · b is added."""

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    axes: tuple[str, ...]
    dtype: Any
    bias: bool = False
    decoding: bool = False

    @nn.compact
    def __call__(self, parts: Sequence[Array]) -> list[Array]:
        """The map of each of several arrays; the weights are cast and gathered once for all."""
        n = len(self.inputs)
        kernel = self.param("kernel", _init(*self.axes), self.inputs + self.outputs)
        use = (lambda weight, axes: weight) if self.decoding else gathered
        kernel = use(kernel.astype(self.dtype), self.axes)
        parts = [x.astype(self.dtype) for x in parts]
        results = [linear(x, kernel, n) for x in parts]
        if self.bias:
            zeros = nn.with_logical_partitioning(nn.initializers.zeros, self.axes[n:])
            bias = self.param("bias", zeros, self.outputs).astype(self.dtype)
            results = [y + bias for y in results]
        if self.has_variable("params", "lora_a"):
            a, b = (self.get_variable("params", name).astype(self.dtype) for name in ("lora_a", "lora_b"))
            a, b = use(a, (*self.axes[:n], "lora_rank")), use(b, ("lora_rank", *self.axes[n:]))
            results = [y + jnp.tensordot(jnp.tensordot(x, a, n), b, 1) for x, y in zip(parts, results)]
        return results


def output_head(params: dict, config: TransformerConfig) -> dict:
    """Those of the parameters that `Transformer.logits` reads, the matrix cast and gathered."""
    name, axes = ("embedding", ("vocab", "embed")) if config.tied_head else ("head", ("embed", "vocab"))
    return {"final_norm": params["final_norm"], name: gathered(params[name].astype(config.dtype), axes)}


class Block(nn.Module):
    """One pre-norm block. The carry is `(parts, cache)`: the residual streams `[b, T, D]` of the parts of a text (those of
    `Transformer.__call__`) and, when decoding, the keys and values `[L, B, N, R, H]` of all layers (as scan carry the cache is
    updated in place; as scan input and output it would exist twice), or `[B, N, R, H]` of this one where `layer` is None. `kind`
    says which of a part's stacked `masks` (one stack a segment that it reads, the own one last) and `ropes` this layer uses:
    0 global, 1 local. `edit(parts, layer)`, where there is one, changes the streams behind the block."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, carry, past_kv, layer, kind, masks, ropes, offset, edit):
        c = self.config
        parts, cache = carry
        norm = lambda name: RMSNorm(c.norm_eps, "embed", c.norm_offset, name=name)
        head_norm = lambda name: RMSNorm(c.norm_eps, "head_dim", c.norm_offset, name=name)
        dense = functools.partial(Dense, dtype=c.dtype, decoding=c.decoding)
        project = lambda name, heads, axis: dense(
            (c.width,), (heads, c.head_dim), ("embed", axis, "head_dim"), bias=c.qkv_bias, name=name
        )
        mlp = lambda name: dense((c.width,), (c.mlp_width,), ("embed", "mlp"), name=name)
        cut = lambda parts: [cut_batch(x, rules=c.rules) for x in parts]
        scale, activation = c.attention_scale or c.head_dim**-0.5, ACTIVATIONS[c.activation]

        parts = cut(parts)
        with jax.named_scope("attention"):
            ys = each(norm("attention_norm"), parts)
            qs = project("q", c.heads, "heads")(ys)
            ks, vs = (project(name, c.kv_heads, "kv_heads")(ys) for name in ("k", "v"))
            if c.qk_norm:
                qs, ks = each(head_norm("q_norm"), qs), each(head_norm("k_norm"), ks)
            qs, ks = ([rotate(x, rope[kind]) for x, rope in zip(xs, ropes)] for xs in (qs, ks))
            own_kv = kv = [(jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)) for k, v in zip(ks, vs)]
            if cache is not None:
                at = () if layer is None else (layer,)
                fit = lambda new: jnp.expand_dims(new, tuple(range(len(at))))
                write = lambda whole, new: jax.lax.dynamic_update_slice(whole, fit(new), (*at, 0, 0, offset, 0))
                cache = write(cache[0], kv[0][0]), write(cache[1], kv[0][1])
                kv = [tuple(x[at] for x in cache)]
            reads = [zip([*past_kv, *kv[: i + 1]], masks[i], strict=True) for i in range(len(parts))]
            segments = [[Segment(k, v, mask[kind]) for (k, v), mask in read] for read in reads]
            ys = [self._attend(q, read, kind, scale) for q, read in zip(qs, segments)]
            ys = dense((c.heads, c.head_dim), (c.width,), ("heads", "head_dim", "embed"), name="o")(ys)
            ys = each(norm("attention_post_norm"), ys) if c.post_norms else ys
            parts = [x + y for x, y in zip(parts, ys)]

        with jax.named_scope("mlp"):
            ys = each(norm("mlp_norm"), parts)
            ys = [activation(gate) * up for gate, up in zip(mlp("gate")(ys), mlp("up")(ys))]
            ys = dense((c.mlp_width,), (c.width,), ("mlp", "embed"), name="down")(ys)
            ys = each(norm("mlp_post_norm"), ys) if c.post_norms else ys
            parts = [x + y for x, y in zip(parts, ys)]
        if edit is not None:
            parts = edit(parts, layer)
        return (cut(parts), cache), own_kv if cache is None else None

    def _attend(self, q, segments: list[Segment], kind, scale: float):
        c = self.config
        if c.attention == "xla" or c.decoding:
            return attend(q, segments, scale, c.attention_cap)
        by = lambda window: lambda q, segments: attend_by(c.attention, q, segments, window, scale, c.attention_cap)
        return jax.lax.switch(kind, [by(None), by(c.window)], q, segments) if any(c.local) else by(None)(q, segments)


def each(function: Callable, parts: Sequence[Array]) -> list[Array]:
    return [function(x) for x in parts]


class Transformer(nn.Module):
    """Embedding, blocks, and the head. `params`: `{embedding, blocks, final_norm, head}`, the last two only where used."""

    config: TransformerConfig

    def setup(self):
        c = self.config
        rows = c.vocab_rows or c.vocab_size
        there = lambda name: self.is_initializing() or self.has_variable("params", name)
        if there("embedding"):
            self.embedding = self.param("embedding", _init("vocab", "embed"), (rows, c.width))
        block = Block
        if c.remat:
            policies = jax.checkpoint_policies
            policy = getattr(policies, c.remat)
            if policy is not policies.nothing_saveable:
                policy = policies.save_from_both_policies(policy, policies.save_only_these_names(SAVED))
            block = nn.remat(Block, policy=policy, prevent_cse=False)
        self.blocks = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, 0, 0, nn.broadcast, nn.broadcast, nn.broadcast, nn.broadcast),
            length=c.layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(c)
        self.final_norm = RMSNorm(c.norm_eps, "embed", c.norm_offset)
        if not c.tied_head and there("head"):
            self.head = self.param("head", _init("embed", "vocab"), (c.width, rows))

    def embed(self, tokens: Int[Array, "*B T"]) -> Float[Array, "*B T D"]:
        c = self.config
        x = jnp.take(self.embedding, tokens, axis=0).astype(c.dtype)
        if not c.decoding:
            x = cut_batch(where_table_lies(x))
        return x if c.embedding_scale == 1 else x * jnp.asarray(c.embedding_scale, c.dtype)

    def __call__(
        self,
        parts: Sequence[Float[Array, "b T D"]],
        past: Sequence[Segment] = (),
        start: int = 0,
        edit: Callable[[list[Array], Int[Array, ""]], list[Array]] | None = None,
    ) -> tuple[list[Float[Array, "b T D"]], list[Segment]]:
        """Runs all blocks over embeddings of positions `start …`, which follow the `past` segments.

        `parts` are stretches of the same texts, one after the other, each at its own batch size: the constant part of a prompt
        at batch 1, prompts at batch A, responses at batch A·G. Row i of a part continues row i // r of the part before it, where
        that is r times smaller. They go through each block together, so that its weights are read (on a mesh: gathered) once.

        `edit(parts, layer) -> parts`, a `jax.tree_util.Partial` of a function and its arrays, is applied behind every block.
        Returns of each part the residual stream after the last block (before the final norm), and the segment (all layers) that
        lets later calls read these positions. Right-padded rows need no mask here: padding stands after what is real."""
        starts = [start + sum(x.shape[1] for x in parts[:i]) for i in range(len(parts))]
        visible = [Segment(None, None, jnp.ones((1, 1, x.shape[1]), bool), at) for x, at in zip(parts, starts)]
        reads, positions = [], []
        for i, (x, at) in enumerate(zip(parts, starts)):
            reads.append([*past, *visible[:i], Segment(None, None, causal_mask(x.shape[1]), at)])
            positions.append(at + jnp.arange(x.shape[1]))
        (parts, _), kv = self._run((list(parts), None), past, reads, positions, 0, edit)
        return parts, [segment.replace(k=k, v=v) for segment, (k, v) in zip(visible, kv)]

    def decode(
        self, x: Float[Array, "B 1 D"], past: Sequence[Segment], cache: tuple[Array, Array], start: int, index: Array
    ) -> tuple[Float[Array, "B 1 D"], tuple[Array, Array]]:
        """One token, at position `start + index`: writes its keys and values to slot `index` of `cache`
        (`empty_cache`), attends to `past` and to the slots up to `index`; returns the residual stream and the cache.
        Parameters, past and cache may be those of `layers_apart`."""
        length = jax.tree.leaves(cache)[0].shape[-2]
        own = Segment(None, None, (jnp.arange(length) <= index)[None, None], start)
        ((x,), cache), _ = self._run(([x], cache), past, [[*past, own]], [(start + index)[None]], index, None)
        return x, cache

    def _run(self, carry, past, reads: list[list[Segment]], positions: list[Int[Array, "T"]], offset, edit):
        """The scan over blocks; of each part the segments that it `reads` (the own one last) and its `positions`."""
        c = self.config
        local = np.array(c.local or (False,) * c.layers, np.int32)
        ropes = [c.rope, c.local_rope or c.rope] if local.any() else [c.rope]
        tables = [jnp.stack([rope.tables(c.head_dim, at) for rope in ropes]) for at in positions]
        masks = [[self._masks(segment, at, len(ropes)) for segment in read] for read, at in zip(reads, positions)]
        kv, constants = [(s.k, s.v) for s in past], (masks, tables, offset, edit)
        layers = self.get_variable("params", "layers")
        if not layers:
            return self.blocks(carry, kv, jnp.arange(c.layers), jnp.asarray(local), *constants)

        parts, caches = carry
        block, new = jax.jit(Block(c, parent=None).apply), []  # jitted, so that it is traced but once
        past_kvs = zip(*[zip(*segment) for segment in kv])  # of each layer the keys and values of all segments
        for params, past_kv, cache, kind in zip(layers, past_kvs, zip(*caches), local):
            (parts, cache), _ = block({"params": params}, (parts, cache), past_kv, None, kind, *constants)
            new.append(cache)
        return (parts, tuple(zip(*new))), None

    def _masks(self, segment: Segment, positions: Int[Array, "T"], kinds: int) -> Bool[Array, "kinds b|1 T|1 S"]:
        """What queries at `positions` read of a segment, in global layers and (where there are such) in local ones."""
        if kinds == 1:
            return segment.mask[None]
        distance = positions[:, None] - (segment.start + jnp.arange(segment.mask.shape[-1]))
        near = segment.mask & (distance < self.config.window)
        return jnp.stack([jnp.broadcast_to(segment.mask, near.shape), near])

    def logits(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Final norm and output head; float32. Rows of the head that stand for no token have no mass."""
        hidden = self.final_norm(hidden)
        head = self.embedding.T if self.config.tied_head else self.head
        logits = vocabulary_scores(hidden, head.astype(hidden.dtype))
        logits = soft_cap(logits, self.config.logit_cap)
        real = np.arange(logits.shape[-1]) < self.config.vocab_size
        return logits if real.all() else jnp.where(real, logits, MASKED)

    def next_token_logits(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T V"]:
        """The plain language model: logits of the token after each position."""
        (hidden,), _ = self([self.embed(tokens)])
        return self.logits(hidden)


def empty_cache(config: TransformerConfig, batch: int, length: int) -> tuple[Array, Array]:
    """Keys and values for `decode` to fill, `[L, B, N, R, H]` each."""
    return (jnp.zeros((config.layers, batch, config.kv_heads, length, config.head_dim), config.dtype),) * 2


def layers_apart(params: dict, past: Sequence[Segment], cache: tuple[Array, Array]):
    """Parameters, past and cache for `decode` with an array for each layer instead of a stack. What a block reads of a stack is
    first copied out of it, on a GPU (two thirds of what a token moves) and on a CPU (a tenth of its time); apart, each
    layer is copied but once. A TPU's programs read weights where they lie."""
    split = lambda x: tuple(x[i] for i in range(len(x)))
    layers = [jax.tree.map(lambda x: x[i], params["blocks"]) for i in range(len(cache[0]))]
    others = {name: part for name, part in params.items() if name != "blocks"}
    past = [segment.replace(k=split(segment.k), v=split(segment.v)) for segment in past]
    return others | {"layers": layers}, past, tuple(split(x) for x in cache)


def init_params(model: Transformer, rng: Array) -> dict:
    """Random parameters with logical axis names attached (`flax.linen.LogicallyPartitioned`); unbox before use."""
    return model.init(rng, jnp.zeros((1, 2), jnp.int32), method="next_token_logits")["params"]


def abstract_params(config: TransformerConfig, truncated: bool = False) -> dict:
    """Shapes of the parameter tree with logical axis names attached (`truncated`: without final norm and head)."""
    tree = jax.eval_shape(lambda: init_params(Transformer(config), jax.random.key(0)))
    return {name: part for name, part in tree.items() if not (truncated and name in ("final_norm", "head"))}
