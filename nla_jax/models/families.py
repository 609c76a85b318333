"""The model families: how each one's `config.json` reads and writes, and where each of its tensors belongs.

To add a family, add an entry to `FAMILIES`: the class that `transformers` builds for it, a function from its config to the
fields of `TransformerConfig` that only it sets, the inverse, and its table of tensors. What no field expresses yet is a new
field and a few lines in models/transformer.py. Then add it to `tests/parity.py`.
"""

import dataclasses
import math
from collections.abc import Callable

from nla_jax.models.rope import Rope
from nla_jax.models.transformer import TransformerConfig


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a checkpoint: its HF name (`{layer}` where there is one a layer) and its path in our tree. Matrices
    marked `linear` are stored `[out, in]` there and `[in…, out…]` here."""

    hf: str
    path: tuple[str, ...]
    linear: bool = False


@dataclasses.dataclass(frozen=True)
class Family:
    """One `model_type`. `read(hf config) -> fields`, `write(config) -> hf fields`: what differs from the common ones."""

    architecture: str
    tensors: tuple[Tensor, ...]
    read: Callable[[dict], dict] = lambda c: {}
    write: Callable[[TransformerConfig], dict] = lambda config: {}


_BLOCK = "model.layers.{layer}."
PROJECTIONS = {
    **{name: _BLOCK + f"self_attn.{name}_proj" for name in "qkvo"},
    **{name: _BLOCK + f"mlp.{name}_proj" for name in ("gate", "up", "down")},
}
_norm = lambda hf, name: Tensor(_BLOCK + hf + ".weight", ("blocks", name, "scale"))
_COMMON = (
    Tensor("model.embed_tokens.weight", ("embedding",)),
    Tensor("model.norm.weight", ("final_norm", "scale")),
    Tensor("lm_head.weight", ("head",), linear=True),
    *(Tensor(hf + ".weight", ("blocks", name, "kernel"), linear=True) for name, hf in PROJECTIONS.items()),
    _norm("input_layernorm", "attention_norm"),
)
_LLAMA = (*_COMMON, _norm("post_attention_layernorm", "mlp_norm"))
_QKV_BIAS = tuple(Tensor(PROJECTIONS[name] + ".bias", ("blocks", name, "bias")) for name in "qkv")
_QK_NORM = tuple(_norm(f"self_attn.{name}_norm", f"{name}_norm") for name in "qk")
_GEMMA = (
    *_COMMON,
    _norm("post_attention_layernorm", "attention_post_norm"),
    _norm("pre_feedforward_layernorm", "mlp_norm"),
    _norm("post_feedforward_layernorm", "mlp_post_norm"),
)


def _refused(c: dict, *fields: str) -> None:
    for field in fields:
        if c.get(field):
            raise ValueError(f"{field} = {c[field]!r} is not supported")


def _read_llama(c: dict) -> dict:
    _refused(c, "attention_bias", "mlp_bias")
    return {}


def _read_mistral(c: dict) -> dict:
    if len(set(c.get("layer_types") or ())) > 1:
        raise ValueError("a mistral with both local and global layers is not supported")
    return {}


def _read_qwen2(c: dict) -> dict:
    return {"qkv_bias": True}


def _read_qwen3(c: dict) -> dict:
    _refused(c, "attention_bias")
    return {"qk_norm": True}


def _read_gemma(c: dict) -> dict:
    _refused(c, "attention_bias", "use_bidirectional_attention")
    return {
        "post_norms": True,
        "norm_offset": 1.0,
        "embedding_scale": c["hidden_size"] ** 0.5,
        "attention_scale": c["query_pre_attn_scalar"] ** -0.5,
        "attention_cap": c.get("attn_logit_softcapping"),
        "logit_cap": c.get("final_logit_softcapping"),
        "qk_norm": c["model_type"] == "gemma3_text",
    }


def _layer_types(config: TransformerConfig) -> list[str]:
    return ["sliding_attention" if local else "full_attention" for local in config.local or (False,) * config.layers]


def _write_gemma(config: TransformerConfig) -> dict:
    return {
        "layer_types": _layer_types(config),
        "sliding_window": config.window or config.max_length,  # transformers wants one even where no layer is local
        "query_pre_attn_scalar": round(config.attention_scale**-2),
        "attn_logit_softcapping": config.attention_cap,
        "final_logit_softcapping": config.logit_cap,
        "hidden_activation": "gelu_pytorch_tanh",
    }


def _write_gemma3(config: TransformerConfig) -> dict:
    return _write_gemma(config) | {"rope_local_base_freq": (config.local_rope or config.rope).theta}


def _write_qwen(config: TransformerConfig) -> dict:
    return {"use_sliding_window": config.window is not None, "layer_types": _layer_types(config)}


FAMILIES = {
    "llama": Family("LlamaForCausalLM", _LLAMA, _read_llama),
    "mistral": Family("MistralForCausalLM", _LLAMA, _read_mistral),
    "qwen2": Family("Qwen2ForCausalLM", _LLAMA + _QKV_BIAS, _read_qwen2, _write_qwen),
    "qwen3": Family("Qwen3ForCausalLM", _LLAMA + _QK_NORM, _read_qwen3, _write_qwen),
    "gemma2": Family("Gemma2ForCausalLM", _GEMMA, _read_gemma, _write_gemma),
    "gemma3_text": Family("Gemma3ForCausalLM", _GEMMA + _QK_NORM, _read_gemma, _write_gemma3),
}
# Multimodal checkpoints hold a text model among others: its tensors under these prefixes, the others ignored.
TEXT_PREFIXES = {"language_model.model.": "model.", "model.language_model.": "model.", "language_model.": ""}
OTHER_TOWERS = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")
CONSTANTS = ("rotary_emb.inv_freq",)  # which some checkpoints carry


def from_hf(c: dict) -> dict:
    """The fields of `TransformerConfig` from a config as `transformers` 5 normalises it. Raises `ValueError` saying what is
    not supported."""
    activation = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
    name = c.get("hidden_activation") or c.get("hidden_act")
    if name not in activation:
        raise ValueError(f"the activation function {name!r} is not supported (supported: {', '.join(activation)})")
    layers, heads, window = c["num_hidden_layers"], c["num_attention_heads"], c.get("sliding_window")
    kinds = c.get("layer_types") or ["sliding_attention" if window else "full_attention"] * layers
    if unknown := set(kinds) - {"sliding_attention", "full_attention"}:
        raise ValueError(f"layers of type {min(unknown)!r} are not supported")
    local = tuple(kind == "sliding_attention" for kind in kinds)
    ropes = c["rope_parameters"]
    by_kind = "full_attention" in ropes or "sliding_attention" in ropes
    rope, local_rope = (
        _read_rope(ropes[kind] if by_kind else ropes, c) for kind in ("full_attention", "sliding_attention")
    )
    if by_kind and local_rope.kind != "default":
        raise ValueError("rope scaling of the local layers is not supported")
    kv_heads, head_dim = c.get("num_key_value_heads") or heads, c.get("head_dim") or c["hidden_size"] // heads
    for field in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"):
        if c[field] < 1:
            raise ValueError(f"{field} = {c[field]} is not positive")
    if heads % kv_heads or head_dim % 2:
        raise ValueError(
            f"num_attention_heads = {heads} must be a multiple of num_key_value_heads = {kv_heads}, head_dim = {head_dim} of 2"
        )
    return {
        "vocab_size": c["vocab_size"],
        "width": c["hidden_size"],
        "layers": layers,
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "mlp_width": c["intermediate_size"],
        "family": c["model_type"],
        "max_length": c["max_position_embeddings"],
        "norm_eps": c["rms_norm_eps"],
        "tied_head": bool(c.get("tie_word_embeddings")),
        "activation": activation[name],
        "rope": rope,
        "window": window if any(local) else None,
        "local": local if any(local) else (),
        "local_rope": local_rope if local_rope != rope else None,
        **FAMILIES[c["model_type"]].read(c),
    }


def to_hf(config: TransformerConfig) -> dict:
    """`config.json` fields in the form that `transformers` 4 and 5 both read."""
    family, rope = FAMILIES[config.family], config.rope
    fields = {
        "architectures": [family.architecture],
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_length,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": rope.theta,
        "rope_scaling": _write_rope(rope),
        "tie_word_embeddings": config.tied_head,
        "hidden_act": {"silu": "silu", "gelu_tanh": "gelu_pytorch_tanh"}[config.activation],
        "attention_bias": False,
        "sliding_window": config.window,
    }
    return fields | family.write(config)


def tensors_of(config: TransformerConfig, truncated: bool = False) -> list[Tensor]:
    """The tensors that a checkpoint of this config holds (`truncated`: without final norm and head)."""
    absent = {"final_norm", "head"} if truncated else {"head"} if config.tied_head else set()
    return [tensor for tensor in FAMILIES[config.family].tensors if tensor.path[0] not in absent]


def _read_rope(r: dict, c: dict) -> Rope:
    kind, theta = r.get("rope_type") or r.get("type") or "default", float(r["rope_theta"])
    if r.get("partial_rotary_factor", 1) != 1:
        raise ValueError(f"partial_rotary_factor = {r['partial_rotary_factor']} is not supported")
    factor = float(r.get("factor") or 1.0)
    original = r.get("original_max_position_embeddings") or c["max_position_embeddings"]
    if kind == "default":
        return Rope(theta)
    if kind == "linear":
        return Rope(theta, kind, factor)
    if kind == "llama3":
        return Rope(theta, kind, factor, original, float(r["low_freq_factor"]), float(r["high_freq_factor"]))
    if kind == "yarn":
        _refused(r, "mscale", "mscale_all_dim")
        if not r.get("truncate", True):
            raise ValueError("yarn with truncate = False is not supported")
        magnitude = r.get("attention_factor") or (0.1 * math.log(factor) + 1 if factor > 1 else 1.0)
        slow, fast = float(r.get("beta_slow") or 1), float(r.get("beta_fast") or 32)
        return Rope(theta, kind, factor, original, slow, fast, float(magnitude))
    raise ValueError(f"rope scaling of type {kind!r} is not supported (supported: default, linear, llama3, yarn)")


def _write_rope(rope: Rope) -> dict | None:
    if rope.kind == "default":
        return None
    fields = {"rope_type": rope.kind, "factor": rope.factor}
    if rope.kind == "llama3":
        fields |= {"low_freq_factor": rope.low, "high_freq_factor": rope.high}
    if rope.kind == "yarn":
        fields |= {"beta_slow": rope.low, "beta_fast": rope.high, "attention_factor": rope.magnitude}
    return fields | ({"original_max_position_embeddings": rope.original_length} if rope.original_length else {})
