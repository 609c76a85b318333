"""The natural language autoencoder as pure functions of parameters.

    activation h ──► Verbalizer (AV): a language model whose prompt carries h in one slot ──► explanation
    explanation  ──► Reconstructor (AR): the subject's first K+1 blocks and a linear head ──► ĥ

Vectors are compared after scaling them to length sqrt(d) (`fve.normalise`). The dataclasses here are static
descriptions (hashable, no arrays); parameters are always arguments.
"""

import dataclasses
import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Float, Int

from nla_jax.fve import normalise
from nla_jax.models.lora import Lora
from nla_jax.models.transformer import KeyValues, Transformer, TransformerConfig, abstract_params, truncate
from nla_jax.runtime.errors import InputError


def residual(
    model: Transformer, params: dict, tokens: Int[Array, "B T"], earlier: tuple[int, ...] = ()
) -> Float[Array, "B T W"]:
    """The residual stream after the last block of `model` (a subject truncated to K+1 blocks: after block K), float32.

    With `earlier` blocks, ascending: the streams after each of them and after the last one, side by side."""
    x = model.apply({"params": params}, tokens, method="embed")
    if not earlier:
        (hidden,), _ = model.apply({"params": params}, [x])
        return hidden.astype(jnp.float32)
    streams = model.apply({"params": params}, x, (*earlier, model.config.layers - 1), method="streams_after")
    return jnp.concatenate(list(streams.astype(jnp.float32)), -1)


def replace(
    states: Float[Array, "A n D"], vectors: Float[Array, "A n D"], scale: float | None
) -> Float[Array, "A n D"]:
    """The paper's injection, at the input embeddings: the slots become the activations at length `scale`.

    None keeps their own length. The marker's embedding is dropped."""
    return vectors if scale is None else normalise(vectors, scale)


def add_norm_matched(
    states: Float[Array, "A n D"], vectors: Float[Array, "A n D"], scale: float | None
) -> Float[Array, "A n D"]:
    """h' = h + ‖h‖ · v/‖v‖: what EasyNLA and nanoNLA do after block 1. `scale` is not used."""
    h, v = states.astype(jnp.float32), vectors.astype(jnp.float32)
    length = lambda x: jnp.sqrt(jnp.sum(x * x, -1, keepdims=True) + 1e-12)
    return h + length(h) * v / length(v)


def keep(states: Float[Array, "A n D"], vectors: Float[Array, "A n D"], scale: float | None) -> Float[Array, "A n D"]:
    """The no-injection control: the slots stay as they are."""
    return states


@dataclasses.dataclass(frozen=True)
class Injection:
    """One way in which activations enter the prompt.

    `function(states [A, n, D], vectors [A, n, D], scale) -> [A, n, D]` gives the new states of the n slots after block
    `block`, counted from 0; -1 means the input embeddings."""

    function: Callable = replace
    block: int = -1


@dataclasses.dataclass(frozen=True)
class PromptIds:
    """The literal token ids of a pair's prompts.

    `prefix`: the AV's prompt before the first marker. `suffix`: from that marker up to the response; `slots`: where in
    the suffix the markers stand. `end`: the token that ends a response. `text_prefix`, `text_suffix`: with what every
    input of the AR begins and ends."""

    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    slots: tuple[int, ...]
    end: int
    text_prefix: tuple[int, ...]
    text_suffix: tuple[int, ...] = ()


def _inject(
    slots: tuple[int, ...],
    injections: tuple[Injection, ...],
    scale: float | None,
    vectors: Float[Array, "A n D"],
    parts: list[Array],
    layer: Int[Array, ""] | int,
) -> list[Array]:
    """The streams of prefix, prompt, … after block `layer`; the injections of that block change the prompt's slots."""
    prefix, x, *responses = parts
    at = jnp.asarray(slots)
    for injection in injections:
        old = x[:, at]
        new = jnp.asarray(injection.function(old, vectors, scale))
        if new.shape != old.shape:
            raise InputError(
                f"The injection {injection.function} gives an array of shape {new.shape}, expected {old.shape}."
            )
        x = jnp.where(layer == injection.block, x.at[:, at].set(new.astype(x.dtype)), x)
    return [prefix, x, *responses]


@dataclasses.dataclass(frozen=True)
class Verbalizer:
    """The AV: a causal language model and the prompt that shows it an activation (see `PromptIds`).

    Injection is by position: no marker that the model might write, or that a text might contain, is ever looked for.
    With `lora`, what is trained is an adapter, which `assemble` joins to a frozen base; every other method takes the
    whole parameters.

    Activations are `[A, D]`; `[A, n, D]` or `[A, n·D]` for a prompt with n slots."""

    model: Transformer
    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    end: int
    injection_scale: float | None
    injections: tuple[Injection, ...] = (Injection(),)
    slots: tuple[int, ...] = (0,)
    lora: Lora | None = None

    @property
    def prompt_length(self) -> int:
        """Tokens of the whole prompt."""
        return len(self.prefix) + len(self.suffix)

    def abstract_params(self) -> dict:
        """Shapes of what is trained, with logical axis names."""
        config = self.model.config
        return self.lora.abstract_params(config) if self.lora else abstract_params(config)

    def assemble(self, params: dict, base: dict | None = None) -> dict:
        """The whole parameters, from the trained ones and the frozen base."""
        return self.lora.attach(base, params) if self.lora else params

    def embed(self, params: dict, tokens: Int[Array, "*B T"]) -> Float[Array, "*B T D"]:
        """The input embeddings of token ids."""
        return self.model.apply({"params": params}, tokens, method="embed")

    def read_prompt(self, params: dict, vectors: Float[Array, "A *W"]) -> tuple[list[KeyValues], Float[Array, "A D"]]:
        """Runs the prompt: the constant prefix once, markers and suffix once per activation.

        Returns the two segments that responses attend to, and the state that predicts a response's first token."""
        (_, prompt), past = self._read(params, vectors)
        return past, prompt[:, -1]

    def read_responses(
        self, params: dict, vectors: Float[Array, "A *W"], responses: Int[Array, "B R"]
    ) -> Float[Array, "B R D"]:
        """The states that predict each response token; B = A·G, an activation's G responses in a row.

        Prefix (batch 1), prompt (batch A) and responses (batch B) run as three parts. The result equals one
        full-sequence forward of each sample."""
        (_, prompt, states), _ = self._read(params, vectors, self.embed(params, responses[:, :-1]))
        first = jnp.repeat(prompt[:, -1:], len(responses) // len(vectors), axis=0)
        return jnp.concatenate([first, states], 1)

    def _read(self, params: dict, vectors: Float[Array, "A *W"], *responses: Float[Array, "B T D"]):
        """Runs prefix, prompt and responses (if any). Returns the residual streams and the segments of all parts."""
        prefix, suffix = (self.embed(params, jnp.asarray(ids, jnp.int32)) for ids in (self.prefix, self.suffix))
        prompt = jnp.broadcast_to(suffix, (len(vectors), *suffix.shape))
        parts = [prefix[None], prompt, *responses]
        vectors = jnp.reshape(vectors, (len(vectors), len(self.slots), -1))
        at_embeddings, at_blocks = (
            tuple(x for x in self.injections if (x.block < 0) == embedded) for embedded in (True, False)
        )
        edit = lambda found: Partial(functools.partial(_inject, self.slots, found, self.injection_scale), vectors)
        parts = edit(at_embeddings)(parts, -1)
        return self.model.apply({"params": params}, parts, edit=edit(at_blocks) if at_blocks else None)


@dataclasses.dataclass(frozen=True)
class Reconstructor:
    """The AR: K+1 blocks without final norm, then a linear map read at the last real token.

    `params`: `{backbone, head [D, W]}`; the head acts as `x @ head` and starts as the identity, once for each of the
    `layers` L whose activations are rebuilt side by side. `prefix`: token ids with which every input begins. With
    `lora`, the backbone that is trained is an adapter, which `assemble` joins to the frozen base; the head is trained
    whole."""

    model: Transformer
    prefix: tuple[int, ...] = ()
    lora: Lora | None = None
    layers: int = 1

    @property
    def width(self) -> int:
        """W = L·D, the entries of what is rebuilt."""
        return self.layers * self.model.config.width

    def init_params(self, backbone: dict) -> dict:
        """The AR before training: the subject's blocks (or a new adapter to them) and the identity."""
        identity = np.eye(self.model.config.width, dtype=np.float32)
        return {"backbone": backbone, "head": np.tile(identity, self.layers)}

    def abstract_params(self) -> dict:
        """Shapes of what is trained, with logical axis names."""
        config = self.model.config
        shape = jax.ShapeDtypeStruct((config.width, self.width), jnp.float32)
        head = nn.LogicallyPartitioned(shape, ("embed", "embed_out"))
        backbone = self.lora.abstract_params(config) if self.lora else abstract_params(config, truncated=True)
        return {"backbone": backbone, "head": head}

    def assemble(self, params: dict, base: dict | None = None) -> dict:
        """The whole parameters, from the trained ones and the frozen base (a model of at least as many blocks)."""
        if not self.lora:
            return params
        backbone = self.lora.attach(truncate(base, self.model.config.layers), params["backbone"])
        return {"backbone": backbone, "head": params["head"]}

    def reconstruct(self, params: dict, tokens: Int[Array, "B T"], lengths: Int[Array, "B"]) -> Float[Array, "B W"]:
        """ĥ, raw (not normalised), float32, read at index `length - 1` of right-padded token rows.

        Each row begins with `prefix`, which runs once, at batch 1."""
        backbone, P = {"params": params["backbone"]}, len(self.prefix)
        embed = lambda tokens: self.model.apply(backbone, tokens, method="embed")
        prefix = [embed(jnp.asarray([self.prefix]))] if P else []
        (*_, states), _ = self.model.apply(backbone, [*prefix, embed(tokens[:, P:])])
        last = jnp.take_along_axis(states, (lengths - 1 - P)[:, None, None], axis=1)[:, 0]
        return last.astype(jnp.float32) @ params["head"].astype(jnp.float32)


def autoencoder(
    model: TransformerConfig,
    layer: int,
    prompt: PromptIds,
    injection_scale: float | None,
    injections: tuple[Injection, ...] = (Injection(),),
    adapters: tuple[Lora | None, Lora | None] = (None, None),
    earlier: tuple[int, ...] = (),
) -> tuple[Verbalizer, Reconstructor]:
    """AV and AR of a subject whose activations are read after block `layer`, and after the `earlier` blocks, each in a
    slot of its own; `adapters` of AV and AR, None: trained whole.

    Raises `InputError` for an injection behind a block that the model does not have, and for several layers where the
    prompt does not have a slot for each."""
    layers = len(earlier) + 1
    if layers > 1 and len(prompt.slots) != layers:
        raise InputError(
            f"The AV's prompt has {len(prompt.slots)} slots for the activations of {layers} layers; it needs one for each."
        )
    for injection in injections:
        if not -1 <= injection.block < model.layers:
            raise InputError(
                f"Activations are to be injected behind block {injection.block}, but the model has blocks 0 to "
                f"{model.layers - 1} (-1: the input embeddings)."
            )
    av = Verbalizer(
        Transformer(model),
        prompt.prefix,
        prompt.suffix,
        prompt.end,
        injection_scale,
        injections,
        prompt.slots,
        adapters[0],
    )
    return av, Reconstructor(Transformer(model.truncated(layer + 1)), prompt.text_prefix, adapters[1], layers)


@functools.partial(jax.jit, static_argnums=0)
def reconstruct(
    reconstructor: Reconstructor, params: dict, tokens: Int[Array, "B T"], lengths: Int[Array, "B"]
) -> Float[Array, "B W"]:
    """`Reconstructor.reconstruct`, compiled."""
    return reconstructor.reconstruct(params, tokens, lengths)
