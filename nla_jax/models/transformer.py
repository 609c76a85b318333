"""One decoder-only transformer for every model family; the differences are data in `TransformerConfig`.

No mutable collections: parameters, key/value segments and caches are explicit arguments and results. Layers are stacked
on a leading axis and scanned, so that truncation to the first K+1 blocks is a slice (`truncate`), and the output of a
truncated model *is* the residual stream after block K: `__call__` ends before the final norm, which belongs to `logits`.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from nla_jax.models.attention import Segment, attend, causal_mask


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
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    tied_head: bool = True
    qkv_bias: bool = False  # Qwen2
    qk_norm: bool = False  # Qwen3: RMS norm over the head dimension of queries and keys
    dtype: Any = jnp.float32
    remat: str | None = None  # name of a `jax.checkpoint_policies` policy, or None to keep every activation

    def truncated(self, layers: int) -> "TransformerConfig":
        return dataclasses.replace(self, layers=layers)


def truncate(params: dict, layers: int) -> dict:
    """The parameters of the first `layers` blocks, without final norm and head: what runs to the residual stream there."""
    return {"embedding": params["embedding"], "blocks": jax.tree.map(lambda x: x[:layers], params["blocks"])}


def _init(*axes: str):
    return nn.with_logical_partitioning(nn.initializers.normal(0.02), axes)


class RMSNorm(nn.Module):
    """Root-mean-square norm in float32, eps inside the square root."""

    eps: float
    axis: str

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        scale = self.param("scale", nn.with_logical_partitioning(nn.initializers.ones, (self.axis,)), x.shape[-1:])
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + self.eps)
        return (y * scale).astype(x.dtype)


def rope_tables(config: TransformerConfig, positions: Int[Array, "T"]) -> tuple[Array, Array]:
    """Sine and cosine of the rotary angles, each `[T, H/2]` float32 (bfloat16 would round position 257 to 256)."""
    inverse = config.rope_theta ** (-jnp.arange(0, config.head_dim, 2, dtype=jnp.float32) / config.head_dim)
    angles = positions[:, None].astype(jnp.float32) * inverse
    return jnp.sin(angles), jnp.cos(angles)


def rotate(x: Float[Array, "B T N H"], rope: tuple[Array, Array]) -> Float[Array, "B T N H"]:
    """Rotary embedding in the half-split convention of Hugging Face checkpoints."""
    sin, cos = (table[:, None, :] for table in rope)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1).astype(x.dtype)


def batch_sharded(x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """Keeps a batch cut over data and fsdp, where the mesh in use divides it: left alone, the compiler follows the weights'
    cut along `fsdp` instead, replicates the batch and all-reduces every layer's result."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or x.shape[0] % (mesh.shape["data"] * mesh.shape["fsdp"]):
        return x
    return jax.lax.with_sharding_constraint(x, jax.sharding.PartitionSpec(("data", "fsdp")))


class Block(nn.Module):
    """One pre-norm block. The carry is `(x, cache)`: the residual stream `[B, T, D]` and, when decoding, the keys and
    values `[L, B, R, N, H]` of all layers (as scan carry the cache is updated in place; as scan input and output it
    would exist twice)."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, carry, past_kv, layer, past_masks, rope, own_mask, offset):
        c = self.config
        x, cache = carry
        x = batch_sharded(x)
        dense = lambda name, shape, axes, **kw: nn.DenseGeneral(
            shape, use_bias=kw.pop("bias", False), dtype=c.dtype, kernel_init=_init(*axes),
            bias_init=nn.with_logical_partitioning(nn.initializers.zeros, axes[1:]), name=name, **kw)  # fmt: skip

        with jax.named_scope("attention"):
            y = RMSNorm(c.norm_eps, "embed", name="attention_norm")(x)
            q = dense("q", (c.heads, c.head_dim), ("embed", "heads", "head_dim"), bias=c.qkv_bias)(y)
            k = dense("k", (c.kv_heads, c.head_dim), ("embed", "kv_heads", "head_dim"), bias=c.qkv_bias)(y)
            v = dense("v", (c.kv_heads, c.head_dim), ("embed", "kv_heads", "head_dim"), bias=c.qkv_bias)(y)
            if c.qk_norm:
                q = RMSNorm(c.norm_eps, "head_dim", name="q_norm")(q)
                k = RMSNorm(c.norm_eps, "head_dim", name="k_norm")(k)
            q, k = rotate(q, rope), rotate(k, rope)
            own_k, own_v = k, v
            if cache is not None:
                write = lambda whole, new: jax.lax.dynamic_update_slice(whole, new[None], (layer, 0, offset, 0, 0))
                cache = write(cache[0], k), write(cache[1], v)
                own_k, own_v = (jax.lax.dynamic_index_in_dim(x, layer, keepdims=False) for x in cache)
            segments = [Segment(k, v, mask) for (k, v), mask in zip(past_kv, past_masks, strict=True)]
            y = attend(q, [*segments, Segment(own_k, own_v, own_mask)], c.head_dim**-0.5)
            x = x + dense("o", c.width, ("heads", "head_dim", "embed"), axis=(-2, -1))(y)

        with jax.named_scope("mlp"):
            y = RMSNorm(c.norm_eps, "embed", name="mlp_norm")(x)
            gate = dense("gate", c.mlp_width, ("embed", "mlp"))(y)
            up = dense("up", c.mlp_width, ("embed", "mlp"))(y)
            x = x + dense("down", c.width, ("mlp", "embed"))(nn.silu(gate) * up)
        return (x, cache), (k, v) if cache is None else None


class Transformer(nn.Module):
    """Embedding, blocks, and the head. `params`: `{embedding, blocks, final_norm, head}`, the last two only where used."""

    config: TransformerConfig

    def setup(self):
        c = self.config
        self.embedding = self.param("embedding", _init("vocab", "embed"), (c.vocab_size, c.width))
        block = Block
        if c.remat:
            block = nn.remat(Block, policy=getattr(jax.checkpoint_policies, c.remat), prevent_cse=False)
        self.blocks = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, 0, nn.broadcast, nn.broadcast, nn.broadcast, nn.broadcast),
            length=c.layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(c)
        self.final_norm = RMSNorm(c.norm_eps, "embed")
        if not c.tied_head and (self.is_initializing() or self.has_variable("params", "head")):
            self.head = self.param("head", _init("embed", "vocab"), (c.width, c.vocab_size))

    def embed(self, tokens: Int[Array, "*B T"]) -> Float[Array, "*B T D"]:
        return jnp.take(self.embedding, tokens, axis=0).astype(self.config.dtype)

    def __call__(
        self, x: Float[Array, "B T D"], past: tuple[Segment, ...] = (), start: int = 0
    ) -> tuple[Float[Array, "B T D"], Segment]:
        """Runs all blocks over the embeddings `x` of positions `start … start+T-1`, which follow the `past` segments.

        Returns the residual stream after the last block (before the final norm), and the segment (all layers) that lets
        later calls read these positions. Right-padded rows need no mask here: padding stands after what is real.
        """
        T = x.shape[1]
        rope = rope_tables(self.config, start + jnp.arange(T))
        kv, masks = [(s.k, s.v) for s in past], [s.mask for s in past]
        layer = jnp.arange(self.config.layers)
        (x, _), (k, v) = self.blocks((x, None), kv, layer, masks, rope, causal_mask(T), 0)
        return x, Segment(k, v, jnp.ones((1, 1, T), bool))

    def decode(
        self, x: Float[Array, "B 1 D"], past: tuple[Segment, ...], cache: tuple[Array, Array], start: int, index: Array
    ) -> tuple[Float[Array, "B 1 D"], tuple[Array, Array]]:
        """One token, at position `start + index`: writes its keys and values to slot `index` of `cache` (two arrays
        `[L, B, R, N, H]`), attends to `past` and to the slots up to `index`; returns the residual stream and the cache."""
        rope = rope_tables(self.config, (start + index)[None])
        visible = (jnp.arange(cache[0].shape[2]) <= index)[None, None]
        kv, masks = [(s.k, s.v) for s in past], [s.mask for s in past]
        layer = jnp.arange(self.config.layers)
        (x, cache), _ = self.blocks((x, cache), kv, layer, masks, rope, visible, index)
        return x, cache

    def logits(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Final norm and output head; float32."""
        hidden = self.final_norm(hidden)
        head = self.embedding.T if self.config.tied_head else self.head
        return jnp.dot(hidden, head.astype(hidden.dtype), preferred_element_type=jnp.float32)

    def next_token_logits(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T V"]:
        """The plain language model: logits of the token after each position."""
        hidden, _ = self(self.embed(tokens))
        return self.logits(hidden)


def init_params(model: Transformer, rng: Array) -> dict:
    """Random parameters with logical axis names attached (`flax.linen.LogicallyPartitioned`); unbox before use."""
    return model.init(rng, jnp.zeros((1, 2), jnp.int32), method="next_token_logits")["params"]


def abstract_params(config: TransformerConfig, truncated: bool = False) -> dict:
    """Shapes of the parameter tree with logical axis names attached (`truncated`: without final norm and head)."""
    tree = jax.eval_shape(lambda: init_params(Transformer(config), jax.random.key(0)))
    return {name: part for name, part in tree.items() if not (truncated and name in ("final_norm", "head"))}
