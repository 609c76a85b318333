"""The model families: how the `config.json` of each one reads and writes, and where each of its tensors belongs.

To add a family, add an entry to `FAMILIES` (`Family` says what it holds). For what no field of `TransformerConfig`
expresses yet, add a field to it and a few lines to models/transformer.py. Then add the family to `tests/parity.py`.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator

from nla_jax.models.rope import Rope
from nla_jax.models.transformer import TransformerConfig


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a checkpoint: its HF name (with `{layer}` if every layer has one) and its path in our tree.
    Matrices marked `linear` are stored `[out, in]` there and `[*inputs, *outputs]` here."""

    hf: str
    path: tuple[str, ...]
    linear: bool = False


@dataclasses.dataclass(frozen=True)
class Family:
    """One `model_type`: the class that `transformers` builds for it, and its tensors. `read(hf config)`: the fields of
    `TransformerConfig` that only it sets. `write(config)`: the fields of `config.json` besides those that all families
    have. `refused`: fields of `config.json` that must not be set."""

    architecture: str
    tensors: tuple[Tensor, ...]
    read: Callable[[dict], dict] = lambda c: {}
    write: Callable[[TransformerConfig], dict] = lambda config: {}
    refused: tuple[str, ...] = ()


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


def _refuse(c: dict, *fields: str) -> None:
    for field in fields:
        if c.get(field):
            raise ValueError(f"{field} = {c[field]!r} is not supported")


def _read_mistral(c: dict) -> dict:
    if len(set(c.get("layer_types") or ())) > 1:
        raise ValueError("a mistral with both local and global layers is not supported")
    return {}


def _read_gemma(c: dict) -> dict:
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
        "sliding_window": config.window or config.max_length,  # transformers wants one even if no layer is local
        "query_pre_attn_scalar": round(config.attention_scale**-2),
        "attn_logit_softcapping": config.attention_cap,
        "final_logit_softcapping": config.logit_cap,
        "hidden_activation": "gelu_pytorch_tanh",
    }


def _write_gemma3(config: TransformerConfig) -> dict:
    return _write_gemma(config) | {"rope_local_base_freq": (config.local_rope or config.rope).theta}


def _write_qwen(config: TransformerConfig) -> dict:
    return {"use_sliding_window": config.window is not None, "layer_types": _layer_types(config)}


_GEMMA_REFUSES = ("attention_bias", "use_bidirectional_attention")
FAMILIES = {
    "llama": Family("LlamaForCausalLM", _LLAMA, refused=("attention_bias", "mlp_bias")),
    "mistral": Family("MistralForCausalLM", _LLAMA, _read_mistral),
    "qwen2": Family("Qwen2ForCausalLM", _LLAMA + _QKV_BIAS, lambda c: {"qkv_bias": True}, _write_qwen),
    "qwen3": Family(
        "Qwen3ForCausalLM", _LLAMA + _QK_NORM, lambda c: {"qk_norm": True}, _write_qwen, ("attention_bias",)
    ),
    "gemma2": Family("Gemma2ForCausalLM", _GEMMA, _read_gemma, _write_gemma, _GEMMA_REFUSES),
    "gemma3_text": Family("Gemma3ForCausalLM", _GEMMA + _QK_NORM, _read_gemma, _write_gemma3, _GEMMA_REFUSES),
}
# A multimodal checkpoint holds a text model among others: its tensors have these prefixes, and the others are ignored.
TEXT_PREFIXES = {"language_model.model.": "model.", "model.language_model.": "model.", "language_model.": ""}
OTHER_TOWERS = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")
CONSTANTS = ("rotary_emb.inv_freq",)  # some checkpoints hold these

FIELDS = {  # of `TransformerConfig` and of `config.json`, with the same value in both
    "family": "model_type",
    "vocab_size": "vocab_size",
    "width": "hidden_size",
    "mlp_width": "intermediate_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "max_length": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
}
FUNCTIONS = {"silu": "silu", "gelu_tanh": "gelu_pytorch_tanh"}  # activation functions: our name, theirs


def from_hf(c: dict) -> dict:
    """`TransformerConfig` fields of a config as `transformers` 5 normalises it. Raises `ValueError` if unsupported."""
    family = FAMILIES[c["model_type"]]
    _refuse(c, *family.refused)
    functions = {theirs: ours for ours, theirs in FUNCTIONS.items()}
    name = c.get("hidden_activation") or c.get("hidden_act")
    if name not in functions:
        raise ValueError(f"the activation function {name!r} is not supported (supported: {', '.join(functions)})")
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
    for field in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"):
        if c[field] < 1:
            raise ValueError(f"{field} = {c[field]} is not positive")
    kv_heads, head_dim = c.get("num_key_value_heads") or heads, c.get("head_dim") or c["hidden_size"] // heads
    if heads % kv_heads or head_dim % 2:
        wrong = f"num_attention_heads = {heads} must be a multiple of num_key_value_heads = {kv_heads}"
        raise ValueError(f"{wrong}, head_dim = {head_dim} of 2")
    full = c | {"num_key_value_heads": kv_heads, "head_dim": head_dim}
    return {ours: full[theirs] for ours, theirs in FIELDS.items()} | {
        "tied_head": bool(c.get("tie_word_embeddings")),
        "activation": functions[name],
        "rope": rope,
        "window": window if any(local) else None,
        "local": local if any(local) else (),
        "local_rope": local_rope if local_rope != rope else None,
        **family.read(c),
    }


def to_hf(config: TransformerConfig) -> dict:
    """`config.json` fields in the form that `transformers` 4 and 5 both read."""
    family, rope = FAMILIES[config.family], config.rope
    same = {theirs: getattr(config, ours) for ours, theirs in FIELDS.items()}
    return {
        "architectures": [family.architecture],
        **same,
        "rope_theta": rope.theta,
        "rope_scaling": _write_rope(rope),
        "tie_word_embeddings": config.tied_head,
        "hidden_act": FUNCTIONS[config.activation],
        "attention_bias": False,
        "sliding_window": config.window,
        **family.write(config),
    }


def tensors_of(config: TransformerConfig, truncated: bool = False) -> Iterator[tuple[str, Tensor, int | None]]:
    """Name, table entry and layer (or None) of each tensor of a checkpoint (`truncated`: no final norm and head)."""
    absent = {"final_norm", "head"} if truncated else {"head"} if config.tied_head else set()
    for tensor in FAMILIES[config.family].tensors:
        if tensor.path[0] not in absent:
            for layer in range(config.layers) if "{layer}" in tensor.hf else [None]:
                yield tensor.hf.format(layer=layer), tensor, layer


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
        _refuse(r, "mscale", "mscale_all_dim")
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
