"""The natural language autoencoder as pure functions of parameters.

    activation h ──► Verbalizer (AV): a language model whose prompt carries h in one slot ──► explanation
    explanation  ──► Reconstructor (AR): the subject's first K+1 blocks and a linear head ──► ĥ

Both compare vectors after scaling them to length sqrt(d) (`normalise`). The dataclasses here are static descriptions
(hashable, no arrays); parameters are always arguments.
"""

import dataclasses
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from nla_jax.models.attention import Segment
from nla_jax.models.transformer import Transformer, abstract_params


def normalise(x: Float[Array, "*B D"], scale: float | None = None) -> Float[Array, "*B D"]:
    """`x` at length `scale` (default sqrt(D), so that the mean square is 1), in float32; eps keeps zero vectors finite."""
    x = x.astype(jnp.float32)
    scale = x.shape[-1] ** 0.5 if scale is None else scale
    return x * scale / jnp.sqrt(jnp.sum(x * x, -1, keepdims=True) + 1e-12)


def normalised_mse(prediction: Float[Array, "*B D"], gold: Float[Array, "*B D"]) -> Float[Array, "*B"]:
    """mean_D (p̂ - ĝ)² = 2(1 - cos), in [0, 4]: the reconstructor's loss and minus the verbalizer's reward."""
    return jnp.mean((normalise(prediction) - normalise(gold)) ** 2, -1)


def residual(model: Transformer, params: dict, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """The residual stream after the last block of `model` (a subject truncated to K+1 blocks: after block K), float32."""
    hidden, _ = model.apply({"params": params}, model.apply({"params": params}, tokens, method="embed"))
    return hidden.astype(jnp.float32)


def replace_embedding(marker: Float[Array, "D"], vectors: Float[Array, "A D"], scale: float) -> Float[Array, "A D"]:
    """The slot's input embedding is the activation at length `scale`; the marker's own embedding is dropped."""
    return normalise(vectors, scale)


@dataclasses.dataclass(frozen=True)
class Verbalizer:
    """The AV: a causal language model and the prompt that shows it an activation.

    `prefix`: token ids before the slot, the same in every sample. `suffix`: the marker and what follows it up to the
    response. `inject(marker_embedding [D], vectors [A, D], scale) -> [A, D]` says what enters the slot. Injection is by
    position: no marker that the model might write, or that a text might contain, is ever looked for.
    """

    model: Transformer
    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    end: int  # the token that ends a response
    injection_scale: float
    inject: Callable = replace_embedding

    @property
    def prompt_length(self) -> int:
        return len(self.prefix) + len(self.suffix)

    def abstract_params(self) -> dict:
        """Shapes with logical axis names."""
        return abstract_params(self.model.config)

    def embed(self, params: dict, tokens: Int[Array, "*B T"]) -> Float[Array, "*B T D"]:
        return self.model.apply({"params": params}, tokens, method="embed")

    def read_prompt(
        self, params: dict, vectors: Float[Array, "A D"]
    ) -> tuple[tuple[Segment, Segment], Float[Array, "A D"]]:
        """Runs the prompt: the constant prefix once, marker and suffix once per activation.

        Returns the two segments that responses attend to, and the state that predicts a response's first token."""
        prefix = self.embed(params, jnp.asarray(self.prefix, jnp.int32)[None])
        _, constant = self.model.apply({"params": params}, prefix)
        suffix = self.embed(params, jnp.asarray(self.suffix, jnp.int32))
        slot = self.inject(suffix[0], vectors, self.injection_scale).astype(suffix.dtype)
        rest = jnp.broadcast_to(suffix[1:], (len(vectors), *suffix[1:].shape))
        prompt = jnp.concatenate([slot[:, None], rest], 1)
        hidden, own = self.model.apply({"params": params}, prompt, (constant,), len(self.prefix))
        return (constant, own), hidden[:, -1]

    def read_responses(
        self, params: dict, vectors: Float[Array, "A D"], responses: Int[Array, "B R"]
    ) -> Float[Array, "B R D"]:
        """The states that predict each response token, B = A·G with an activation's G responses in a row: three calls
        (prefix at batch 1, prompt at batch A, responses at batch B), equal to one full-sequence forward of each sample."""
        past, first = self.read_prompt(params, vectors)
        first = jnp.repeat(first, len(responses) // len(vectors), axis=0)
        inputs = self.embed(params, responses[:, :-1])
        hidden, _ = self.model.apply({"params": params}, inputs, past, self.prompt_length)
        return jnp.concatenate([first[:, None], hidden], 1)


@dataclasses.dataclass(frozen=True)
class Reconstructor:
    """The AR: K+1 blocks without final norm, then a linear map read at the last real token.

    `params`: `{backbone, head [D, D]}`; the head acts as `x @ head` and starts as the identity."""

    model: Transformer

    def init_params(self, backbone: dict) -> dict:
        """The AR before training: the subject's blocks and the identity."""
        return {"backbone": backbone, "head": np.eye(self.model.config.width, dtype=np.float32)}

    def abstract_params(self) -> dict:
        """Shapes with logical axis names."""
        d = self.model.config.width
        head = nn.LogicallyPartitioned(jax.ShapeDtypeStruct((d, d), jnp.float32), ("embed", "embed_out"))
        return {"backbone": abstract_params(self.model.config, truncated=True), "head": head}

    def reconstruct(self, params: dict, tokens: Int[Array, "B T"], lengths: Int[Array, "B"]) -> Float[Array, "B D"]:
        """ĥ from right-padded token rows, read at index `length - 1`; raw (not normalised), float32."""
        hidden = residual(self.model, params["backbone"], tokens)
        last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
        return last @ params["head"].astype(jnp.float32)
