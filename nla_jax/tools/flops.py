"""The FLOPs and bytes that a study's programs cannot avoid, from the shapes, for `nla benchmark` and `nla plan`.

- A multiplication and an addition are two FLOPs.
- Attention counts only the keys that a query may see.
- A constant prefix counts once in a pass. What rematerialisation repeats counts nothing.
- A backward pass is twice its forward pass; once where weights are frozen under an adapter (input gradients only).
- Norms, softmax and the optimiser's arithmetic are left out.
"""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from nla_jax.autoencoder import Reconstructor, Verbalizer
from nla_jax.models.lora import Lora
from nla_jax.models.transformer import TransformerConfig, projections
from nla_jax.study import Study
from nla_jax.subject import ROWS


@dataclasses.dataclass(frozen=True)
class Work:
    """What one run of a program cannot avoid on all devices together: FLOPs, and bytes to and from memory."""

    flops: float = 0.0
    bytes: float = 0.0


def work_of(study: Study) -> dict[str, Work]:
    """The work of each of a study's programs, by name, at the shapes of `study.programs()`."""
    c, av, ar = study.config, study.verbalizer, study.reconstructor
    subject, itemsize = ar.model.config, jnp.dtype(av.model.config.dtype).itemsize
    A, G, R, T = c.rl.activations, c.rl.group, c.prompts.max_new_tokens, study.text_width
    trained_av, trained_ar = (parameters(nn.unbox(boxed)) for boxed in study.boxed)
    av_bytes = weight_bytes(av.model.config, av.lora)
    ar_bytes = weight_bytes(subject, ar.lora, vocabulary=False)
    read = verbalizer_flops(av, A, G, R)
    anchor = read.forward if c.rl.kl_coefficient else 0.0  # the KL's reference is read forward alone
    one_pass = av_bytes * (1.5 if c.rl.kl_coefficient else 1) + ar_bytes
    chunks, copies = c.rl.rollout_chunks, study.mesh.shape["data"] * study.mesh.shape["fsdp"]
    token = decode_bytes(av, A // chunks, G, R, copies)
    return {
        "extract": Work(
            blocks(subject, [(ROWS, c.extract.max_tokens, 0)]).forward, weight_bytes(subject, vocabulary=False)
        ),
        "sft_av": Work(verbalizer_flops(av, c.sft.av.batch, 1, R).training, training_bytes(trained_av, av_bytes)),
        "sft_ar": Work(reconstructor_flops(ar, c.sft.ar.batch, T).training, training_bytes(trained_ar, ar_bytes)),
        "relayout": Work(0.0, trained_av * (4 + itemsize)),
        "rollout": Work(read.forward / chunks, (R - 1) * sum(token.values()) + token["weights"]),
        "joint_step": Work(
            read.training + anchor + reconstructor_flops(ar, A * G, T).training,
            training_bytes(trained_av + trained_ar, one_pass, c.rl.micro_batches),
        ),
        "reconstruct": Work(reconstructor_flops(ar, c.evaluate.batch, T).forward, ar_bytes),
    }


def parameters(tree) -> int:
    """Numbers in all arrays (or shapes) of a tree."""
    return sum(x.size for x in jax.tree.leaves(tree))


@dataclasses.dataclass(frozen=True)
class Flops:
    """FLOPs of one forward pass, by what its backward pass adds.

    Products with `frozen` weights count once more; those with `trained` weights, and the attention `scores` (q·k and
    weights·v), twice more."""

    frozen: float = 0
    trained: float = 0
    scores: float = 0

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(self.frozen + other.frozen, self.trained + other.trained, self.scores + other.scores)

    @property
    def forward(self) -> float:
        """FLOPs of the forward pass alone."""
        return self.frozen + self.trained + self.scores

    @property
    def training(self) -> float:
        """FLOPs of forward and backward pass."""
        return 2 * self.frozen + 3 * (self.trained + self.scores)


def matrices(c: TransformerConfig) -> dict[str, tuple[int, int]]:
    """(inputs, outputs) of each matrix of a block."""
    return {name: (math.prod(p.inputs), math.prod(p.outputs)) for name, p in projections(c).items()}


def block_params(c: TransformerConfig) -> int:
    """Weights of the matrices of one block: q, k, v, o, gate, up, down."""
    return sum(inputs * outputs for inputs, outputs in matrices(c).values())


def adapter_params(c: TransformerConfig, lora: Lora | None) -> int:
    """Weights of one block's adapter: rank · (inputs + outputs) of each matrix that it adapts."""
    return lora.rank * sum(sum(matrices(c)[name]) for name in lora.targets) if lora else 0


def visible_pairs(length: int, past: int, window: int | None = None) -> int:
    """Pairs of a query and a key that it may read, for `length` queries after `past` positions.

    With a window each query reads that many positions, its own included."""
    reach = np.arange(past + 1, past + length + 1)
    return int((reach if window is None else np.minimum(reach, window)).sum())


def blocks(c: TransformerConfig, calls: list[tuple[int, int, int]], lora: Lora | None = None) -> Flops:
    """All blocks, for calls of (rows, tokens a row, earlier tokens that each reads).

    2 · weights · tokens, and in every layer 4 · heads · head_dim for each visible pair of query and key."""
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
    """The AV on responses of `response` tokens, as it trains and as it samples.

    The prefix runs once, marker and suffix once per activation, the response once per sample, without its last token,
    which predicts nothing. Every response token has logits."""
    c, rows, prefix, suffix = av.model.config, activations * group, len(av.prefix), len(av.suffix)
    calls = [(1, prefix, 0), (activations, suffix, prefix), (rows, response - 1, prefix + suffix)]
    return blocks(c, calls, av.lora) + head(c, rows * response, av.lora)


def reconstructor_flops(ar: Reconstructor, rows: int, length: int) -> Flops:
    """The AR on inputs of `length` tokens, whose prefix runs once; its linear head reads one token a row."""
    c, prefix = ar.model.config, len(ar.prefix)
    return blocks(c, [(1, prefix, 0), (rows, length - prefix, prefix)], ar.lora) + Flops(
        trained=2 * c.width * ar.width * rows
    )


def weight_bytes(c: TransformerConfig, lora: Lora | None = None, vocabulary: bool = True) -> int:
    """Bytes that one pass over a model's matrices reads in the compute dtype; `vocabulary`: with the output head."""
    params = c.layers * (block_params(c) + adapter_params(c, lora)) + vocabulary * c.width * c.vocab_size
    return params * jnp.dtype(c.dtype).itemsize


def training_bytes(trained: int, one_pass: float, passes: int = 1) -> float:
    """The fewest bytes that a training step moves.

    The weights (`one_pass` bytes) forward and backward in each of `passes` micro-batches; and 32 bytes for each of the
    `trained` parameters: gradient, weight and Adam's two moments, read and written in float32."""
    return 2 * passes * one_pass + 32 * trained


def decode_bytes(av: Verbalizer, activations: int, group: int, response: int, copies: int = 1) -> dict[str, float]:
    """The fewest bytes that one step of decoding reads, on all devices together.

    `weights`: each of the `copies` of the model on a mesh reads its own. `cache`: the prefix once, prompts once per
    activation, responses at their average length over the loop."""
    c = av.model.config
    token = 2 * c.layers * c.kv_heads * c.head_dim * jnp.dtype(c.dtype).itemsize
    positions = len(av.prefix) + activations * len(av.suffix) + activations * group * response / 2
    return {"weights": float(weight_bytes(c, av.lora) * copies), "cache": float(token * positions)}
