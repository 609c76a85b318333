"""What the programs cannot avoid, from the shapes: FLOPs and bytes, for `nla benchmark` and `nla plan`.

A multiplication and an addition are two FLOPs; attention counts the keys that a query may see; the constant prefixes count
once a pass; what rematerialisation repeats counts nothing; a backward pass is twice its forward, but where weights are
frozen under an adapter only once (input gradients). Norms, softmax and the optimiser's arithmetic are left out.
"""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np

from nla_jax.autoencoder import Reconstructor, Verbalizer
from nla_jax.models.lora import Lora
from nla_jax.models.transformer import TransformerConfig, projections


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


def matrices(c: TransformerConfig) -> dict[str, tuple[int, int]]:
    """(inputs, outputs) of each matrix of a block."""
    return {name: (math.prod(p.inputs), math.prod(p.outputs)) for name, p in projections(c).items()}


def block_params(c: TransformerConfig) -> int:
    """Weights of the matrices of one block: q, k, v, o, gate, up, down."""
    return sum(inputs * outputs for inputs, outputs in matrices(c).values())


def adapter_params(c: TransformerConfig, lora: Lora | None) -> int:
    """Weights of one block's adapter: rank · (inputs + outputs) of each matrix that it stands beside."""
    return lora.rank * sum(sum(matrices(c)[name]) for name in lora.targets) if lora else 0


def visible_pairs(length: int, past: int, window: int | None = None) -> int:
    """Pairs of a query and a key that it may read: `length` queries behind `past` positions; with a window each query reads
    that many positions, its own included."""
    reach = np.arange(past + 1, past + length + 1)
    return int((reach if window is None else np.minimum(reach, window)).sum())


def blocks(c: TransformerConfig, calls: list[tuple[int, int, int]], lora: Lora | None = None) -> Flops:
    """All blocks, for calls of (rows, tokens a row, earlier tokens that each reads): 2 · weights · tokens; and for each pair
    of a query and a key that it may see 4 · heads · head_dim, in every layer."""
    tokens, local = sum(rows * length for rows, length, _ in calls), sum(c.local)
    pairs = sum(
        rows * (layers * visible_pairs(length, past, window))
        for rows, length, past in calls
        for layers, window in ((c.layers - local, None), (local, c.window))
    )
    weights, scores = 2 * tokens * c.layers * block_params(c), 4 * c.heads * c.head_dim * pairs
    if not lora:
        return Flops(trained=weights, scores=scores)
    return Flops(weights, 2 * tokens * c.layers * adapter_params(c, lora), scores)


def head(c: TransformerConfig, tokens: int, lora: Lora | None = None) -> Flops:
    """Logits: 2 · width · vocabulary a token."""
    flops = 2 * c.width * c.vocab_size * tokens
    return Flops(frozen=flops) if lora else Flops(trained=flops)


def verbalizer_flops(av: Verbalizer, activations: int, group: int, response: int) -> Flops:
    """The AV on responses, as it trains and as it samples: the prefix once, marker and suffix once an activation, all but
    the last response token (which predicts nothing) once a sample; logits of every response token."""
    c, rows, prefix, suffix = av.model.config, activations * group, len(av.prefix), len(av.suffix)
    calls = [(1, prefix, 0), (activations, suffix, prefix), (rows, response - 1, prefix + suffix)]
    return blocks(c, calls, av.lora) + head(c, rows * response, av.lora)


def reconstructor_flops(ar: Reconstructor, rows: int, length: int) -> Flops:
    """The AR on inputs of `length` tokens, whose prefix runs once; its linear head reads one token a row."""
    c, prefix = ar.model.config, len(ar.prefix)
    return blocks(c, [(1, prefix, 0), (rows, length - prefix, prefix)], ar.lora) + Flops(trained=2 * c.width**2 * rows)


def weight_bytes(c: TransformerConfig, lora: Lora | None = None, vocabulary: bool = True) -> int:
    """Bytes that one pass over a model's matrices reads, in the compute dtype (with the output head where it has one)."""
    params = c.layers * (block_params(c) + adapter_params(c, lora)) + vocabulary * c.width * c.vocab_size
    return params * jnp.dtype(c.dtype).itemsize


def training_bytes(trained: int, one_pass: float, passes: int = 1) -> float:
    """The least that a training step moves: the weights forward and backward in every pass over a (micro-)batch, and 32
    bytes for each of `trained` parameters: gradient, weight and Adam's two moments, read and written in float32."""
    return 2 * passes * one_pass + 32 * trained


def decode_bytes(av: Verbalizer, activations: int, group: int, response: int, copies: int = 1) -> dict[str, float]:
    """The least that one step of decoding reads, on all devices: the `weights` (each of the `copies` of the model on a mesh
    reads its own) and the `cache`: prefix once, prompts once an activation, responses as long as they are on average."""
    c = av.model.config
    token = 2 * c.layers * c.kv_heads * c.head_dim * jnp.dtype(c.dtype).itemsize
    positions = len(av.prefix) + activations * len(av.suffix) + activations * group * response / 2
    return {"weights": float(weight_bytes(c, av.lora) * copies), "cache": float(token * positions)}
