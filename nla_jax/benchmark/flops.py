"""What the programs cannot avoid, from the shapes: FLOPs and bytes.

A multiplication and an addition are two FLOPs; attention counts the keys that a query may see; the constant prefixes count
once a pass; what rematerialisation repeats counts nothing; a backward pass is twice its forward, but where weights are
frozen under an adapter only once (input gradients). Norms, softmax and the optimiser's arithmetic are left out.
"""

import dataclasses

import jax.numpy as jnp

from nla_jax.benchmark.settings import Settings
from nla_jax.models.transformer import TransformerConfig


@dataclasses.dataclass(frozen=True)
class Flops:
    """FLOPs of one forward pass, by what a backward pass costs beside it: the products with `frozen` weights once more,
    those with `trained` weights and the attention `scores` (q·k and weights·v) twice."""

    frozen: float = 0
    trained: float = 0
    scores: float = 0

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(self.frozen + other.frozen, self.trained + other.trained, self.scores + other.scores)

    @property
    def forward(self) -> float:
        return self.frozen + self.trained + self.scores

    @property
    def training(self) -> float:
        return 2 * self.frozen + 3 * (self.trained + self.scores)


def block_params(c: TransformerConfig) -> int:
    """Weights of the matrices of one block: q, k, v, o, gate, up, down."""
    return c.width * (2 * (c.heads + c.kv_heads) * c.head_dim + 3 * c.mlp_width)


def adapter_params(c: TransformerConfig, rank: int) -> int:
    """Weights of one block's adapter: rank · (inputs + outputs) of each matrix."""
    q, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
    return rank * (2 * (c.width + q) + 2 * (c.width + kv) + 3 * (c.width + c.mlp_width))


def blocks(c: TransformerConfig, calls: list[tuple[int, int, int]], rank: int = 0) -> Flops:
    """All blocks, for calls of (rows, tokens a row, earlier tokens that each reads): 2 · weights · tokens; and for each pair
    of a query and a key that it may see 4 · heads · head_dim, in every layer."""
    tokens = sum(rows * length for rows, length, _ in calls)
    pairs = sum(rows * (length * past + length * (length + 1) / 2) for rows, length, past in calls)
    weights, scores = 2 * tokens * c.layers * block_params(c), 4 * c.heads * c.head_dim * pairs * c.layers
    if not rank:
        return Flops(trained=weights, scores=scores)
    return Flops(weights, 2 * tokens * c.layers * adapter_params(c, rank), scores)


def head(c: TransformerConfig, tokens: int, rank: int = 0) -> Flops:
    """Logits: 2 · width · vocabulary a token."""
    flops = 2 * c.width * c.vocab_size * tokens
    return Flops(frozen=flops) if rank else Flops(trained=flops)


def verbalizer_flops(s: Settings, activations: int, group: int, response: int) -> Flops:
    """The AV on responses, as it trains and as it samples: the prefix once, marker and suffix once an activation, all but
    the last response token (which predicts nothing) once a sample; logits of every response token."""
    rows, prompt = activations * group, s.prefix + s.suffix
    calls = [(1, s.prefix, 0), (activations, s.suffix, s.prefix), (rows, response - 1, prompt)]
    return blocks(s.config, calls, s.av_lora) + head(s.config, rows * response, s.av_lora)


def reconstructor_flops(s: Settings, rows: int, text: int) -> Flops:
    """The AR on texts of `text` tokens in its template, whose prefix runs once; its linear head reads one token a row."""
    c = s.config.truncated(s.ar_blocks)
    return blocks(c, [(1, s.ar_prefix, 0), (rows, text + s.ar_suffix, s.ar_prefix)], s.ar_lora) + Flops(
        trained=2 * c.width**2 * rows
    )


def weight_bytes(s: Settings, layers: int, rank: int = 0, vocabulary: bool = True) -> int:
    """Bytes that one pass over a model's matrices reads, in the compute dtype (with the output head where it has one)."""
    c = s.config
    params = layers * (block_params(c) + adapter_params(c, rank)) + vocabulary * c.width * c.vocab_size
    return params * jnp.dtype(s.dtype).itemsize


def training_bytes(s: Settings, trained: int, one_pass: int, passes: int = 1) -> int:
    """The least that a training step moves: the weights forward and backward in every pass over a (micro-)batch, and 32
    bytes for each of `trained` parameters: gradient, weight and Adam's two moments, read and written in float32."""
    return 2 * passes * one_pass + 32 * trained


def decode_bytes(s: Settings) -> dict[str, float]:
    """The least that one step of decoding reads, on all devices: the `weights` (each copy of the model on the mesh reads its
    own) and the `cache`: prefix once, prompts once an activation, responses as long as they are on average."""
    activations = s.activations // s.rollout_chunks
    token = 2 * s.layers * s.kv_heads * s.head_dim * jnp.dtype(s.dtype).itemsize
    positions = s.prefix + activations * s.suffix + activations * s.group * s.response / 2
    return {
        "weights": float(weight_bytes(s, s.layers, s.av_lora) * s.data * s.fsdp),
        "cache": float(token * positions),
    }
