"""Hugging Face folders in and out: one declarative table of tensors serves both directions.

Supported `model_type`s are the keys of `FAMILIES`; to add one, add its config function there and, where its tensors
differ, rows to `TENSORS`. Only safetensors are read; nothing in a checkpoint is executed.
"""

import dataclasses
import hashlib
import json
import os
import shutil
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from nla_jax.errors import InputError
from nla_jax.models.transformer import TransformerConfig, abstract_params


def _llama(c: dict) -> dict:
    return {}


def _qwen2(c: dict) -> dict:
    return {"qkv_bias": True}


def _qwen3(c: dict) -> dict:
    return {"qk_norm": True}


FAMILIES = {"llama": _llama, "qwen2": _qwen2, "qwen3": _qwen3}


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a checkpoint: its HF name (`{layer}` where there is one a layer), its path in our tree, and the
    einops-like meaning of the HF layout: `out_in` matrices are stored `[out, in]`, ours are `[in, …, out]`."""

    hf: str
    path: tuple[str, ...]
    out_in: bool = False
    when: str | None = None  # the config field without which the tensor does not exist


_BLOCK = "model.layers.{layer}."
TENSORS = [
    Tensor("model.embed_tokens.weight", ("embedding",)),
    Tensor("model.norm.weight", ("final_norm", "scale")),
    Tensor("lm_head.weight", ("head",), out_in=True, when="untied_head"),
    Tensor(_BLOCK + "input_layernorm.weight", ("blocks", "attention_norm", "scale")),
    Tensor(_BLOCK + "post_attention_layernorm.weight", ("blocks", "mlp_norm", "scale")),
    *(Tensor(_BLOCK + f"self_attn.{x}_proj.weight", ("blocks", x, "kernel"), out_in=True) for x in "qkvo"),
    *(Tensor(_BLOCK + f"self_attn.{x}_proj.bias", ("blocks", x, "bias"), when="qkv_bias") for x in "qkv"),
    *(Tensor(_BLOCK + f"self_attn.{x}_norm.weight", ("blocks", f"{x}_norm", "scale"), when="qk_norm") for x in "qk"),
    *(Tensor(_BLOCK + f"mlp.{x}_proj.weight", ("blocks", x, "kernel"), out_in=True) for x in ("gate", "up", "down")),
]
IGNORED = ("rotary_emb.inv_freq",)  # constants that some checkpoints carry


def read_config(folder: str | os.PathLike, dtype=jnp.float32) -> TransformerConfig:
    """`config.json` as a `TransformerConfig`. Raises `InputError` for an unknown family or an unsupported feature."""
    file = Path(folder) / "config.json"
    if not file.is_file():
        raise InputError(f"{folder} is not a model folder: it has no config.json.")
    try:
        c = json.loads(file.read_text(encoding="utf-8"))
        family = c.get("model_type")
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError) as error:
        raise InputError(f"{file} is not valid JSON ({error}).") from None
    if family not in FAMILIES:
        raise InputError(
            f"{file}: model_type {family!r} is not supported (supported: {', '.join(FAMILIES)}); "
            f"a family is added in nla_jax/models/pretrained.py."
        )
    rope = c.get("rope_parameters") or c.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        raise InputError(f"{file}: rope scaling {rope} is not supported yet.")
    if c.get("hidden_act", "silu") != "silu" or c.get("use_sliding_window"):
        raise InputError(f"{file}: only hidden_act 'silu' without sliding windows is supported.")
    try:
        heads = c["num_attention_heads"]
        return TransformerConfig(
            vocab_size=c["vocab_size"],
            width=c["hidden_size"],
            layers=c["num_hidden_layers"],
            heads=heads,
            kv_heads=c.get("num_key_value_heads") or heads,
            head_dim=c.get("head_dim") or c["hidden_size"] // heads,
            mlp_width=c["intermediate_size"],
            rope_theta=float(rope.get("rope_theta") or c.get("rope_theta", 10_000.0)),
            norm_eps=c["rms_norm_eps"],
            tied_head=c.get("tie_word_embeddings", False),
            dtype=jnp.dtype(dtype),
            **FAMILIES[family](c),
        )
    except KeyError as error:
        raise InputError(f"{file} lacks the field {error}.") from None


def _exists(tensor: Tensor, config: TransformerConfig) -> bool:
    return tensor.when is None or (
        not config.tied_head if tensor.when == "untied_head" else getattr(config, tensor.when)
    )


def _rows(config: TransformerConfig, truncated: bool):
    """(HF name, path, layer or None, out_in) of every tensor that a checkpoint of this config holds."""
    for tensor in TENSORS:
        if not _exists(tensor, config) or (truncated and tensor.path[0] in ("final_norm", "head")):
            continue
        layers = range(config.layers) if "{layer}" in tensor.hf else [None]
        for layer in layers:
            yield tensor.hf.format(layer=layer), tensor.path, layer, tensor.out_in


def load_params(
    folder: str | os.PathLike, config: TransformerConfig, *, truncated: bool = False, dtype=np.float32
) -> dict:
    """The parameters of a checkpoint as a tree of NumPy arrays, read tensor by tensor.

    `config.layers` may be smaller than the checkpoint's (the first blocks are read); `truncated` leaves out final norm and
    head. Raises `InputError` naming the tensor that is missing, unexpected, or of the wrong shape, or the unreadable file.
    """
    shapes = nn.unbox(abstract_params(config, truncated))
    tree = jax.tree.map(lambda s: np.empty(s.shape, dtype), shapes)
    where = _index(folder)
    wanted = list(_rows(config, truncated))
    names = {row[0] for row in wanted}
    if missing := sorted(names - set(where)):
        raise InputError(f"{folder}: tensor {missing[0]!r} is missing ({len(missing)} missing in all).")
    full = read_config(folder)
    known = {row[0] for row in _rows(full, False)} | {"lm_head.weight"}
    if unexpected := sorted(name for name in set(where) - known if not name.endswith(IGNORED)):
        raise InputError(f"{folder}: tensor {unexpected[0]!r} is unexpected for this model_type.")
    for file in sorted({where[name] for name in names}):
        with _open(file) as tensors:
            for name, path, layer, out_in in wanted:
                if where[name] != file:
                    continue
                target = tree
                for key in path:
                    target = target[key]
                slot = target if layer is None else target[layer]
                try:
                    value = np.asarray(tensors.get_tensor(name))
                except Exception as error:  # safetensors raises several kinds for a damaged file
                    raise InputError(f"{file}: tensor {name!r} cannot be read ({error}).") from None
                stored = (
                    _hf_shape(path, slot.shape) if out_in else (slot.size,) if name.endswith("bias") else slot.shape
                )
                if value.shape != stored:
                    raise InputError(f"{file}: tensor {name!r} has shape {value.shape}, expected {stored}.")
                value = value.astype(dtype)
                if not np.isfinite(value.astype(np.float32)).all():
                    raise InputError(f"{file}: tensor {name!r} holds NaN or infinite values.")
                slot[...] = value.T.reshape(slot.shape) if out_in else value.reshape(slot.shape)
    return tree


def _hf_shape(path: tuple[str, ...], shape: tuple[int, ...]) -> tuple[int, int]:
    """`[out, in]` of a projection stored by us as `[D, N, H]`, `[N, H, D]` or `[in, out]`."""
    inputs = int(np.prod(shape[:-1])) if "o" in path else shape[0]
    return int(np.prod(shape)) // inputs, inputs


def _index(folder: str | os.PathLike) -> dict[str, Path]:
    """The file that holds each tensor of a checkpoint folder."""
    folder = Path(folder)
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            files = json.loads(index.read_text())["weight_map"]
        except (json.JSONDecodeError, KeyError, UnicodeDecodeError) as error:
            raise InputError(f"{index} is not a valid checkpoint index ({error}).") from None
        return {name: folder / Path(file).name for name, file in files.items()}
    single = folder / "model.safetensors"
    if not single.is_file():
        raise InputError(f"{folder} holds neither model.safetensors nor model.safetensors.index.json.")
    with _open(single) as tensors:
        return dict.fromkeys(tensors.keys(), single)


def _open(file: Path):
    try:
        return safe_open(file, framework="flax")
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file} is missing or is not a readable safetensors file ({error}).") from None


def save_model(
    folder: str | os.PathLike,
    params: dict,
    config: TransformerConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    truncated: bool = False,
    dtype=np.float32,
    extra_files: dict | None = None,
) -> None:
    """Writes an ordinary HF folder; it appears under its name only once it is complete. `extra_files` maps further file
    names to `callable(path)` writers (the sidecar, the AR's head)."""
    folder = Path(folder)
    scratch = folder.with_name(folder.name + ".incomplete")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    tensors = {}
    for name, path, layer, out_in in _rows(config, truncated):
        value = params
        for key in path:
            value = value[key]
        value = np.asarray(value if layer is None else value[layer]).astype(dtype)
        tensors[name] = np.ascontiguousarray(
            value.reshape(_hf_shape(path, value.shape)[::-1]).T
            if out_in
            else value.reshape(-1)
            if name.endswith("bias")
            else value
        )
    try:
        save_file(tensors, scratch / "model.safetensors", metadata={"format": "pt"})
    except SafetensorError as error:  # its wrapping of the file system's errors
        raise InputError(f"{scratch / 'model.safetensors'} cannot be written ({error}).") from None
    (scratch / "config.json").write_text(
        json.dumps(hf_config(config, tokenizer, np.dtype(dtype).name), indent=1) + "\n"
    )
    save_tokenizer(tokenizer, scratch)
    for name, write in (extra_files or {}).items():
        write(scratch / name)
    shutil.rmtree(folder, ignore_errors=True)
    scratch.rename(folder)


def hf_config(config: TransformerConfig, tokenizer: PreTrainedTokenizerBase, dtype: str) -> dict:
    """`config.json` in the form that `transformers` 4 and 5 both read."""
    family, architecture = "llama", "LlamaForCausalLM"
    if config.qkv_bias:
        family, architecture = "qwen2", "Qwen2ForCausalLM"
    if config.qk_norm:
        family, architecture = "qwen3", "Qwen3ForCausalLM"
    return {
        "architectures": [architecture],
        "model_type": family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": 32768,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tied_head,
        "hidden_act": "silu",
        "attention_bias": False,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "torch_dtype": dtype,
    }


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """The tokenizer's files, readable by `transformers` 4 as well: version 5 writes a class name that 4 does not know."""
    tokenizer.save_pretrained(folder)
    file = Path(folder) / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    if settings.get("tokenizer_class") in (None, "TokenizersBackend"):
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    for name in ("is_local", "local_files_only"):  # how this process loaded it is no property of the tokenizer
        settings.pop(name, None)
    if isinstance(settings.get("extra_special_tokens"), list):  # version 5's name for what 4 calls
        settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    file.write_text(json.dumps(settings, indent=1, ensure_ascii=False) + "\n")


def load_tokenizer(folder: str | os.PathLike) -> PreTrainedTokenizerBase:
    """The checkpoint's own tokenizer. Raises `InputError` where the folder has none that can be read."""
    try:
        return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    except Exception as error:  # many kinds, by tokenizer class
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"{folder}: its tokenizer cannot be loaded ({reason}).") from None


def locate(name: str | os.PathLike) -> Path:
    """The local folder of a model: a folder as given, or a hub id (`org/name`, `org/name@revision`) fetched once."""
    if Path(name).is_dir():
        return Path(name)
    repo, _, revision = str(name).partition("@")
    if repo.count("/") != 1 or repo.startswith((".", "/", "~")):
        raise InputError(f"There is no model folder {name}, and it is not a hub id of the form org/name.")
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                repo,
                revision=revision or None,
                allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "*.yaml"],
            )
        )
    except Exception as error:  # network, authorisation, unknown repository
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"{name} is neither a folder nor a model that the hub gives ({reason}).") from None


def fingerprint(folder: str | os.PathLike) -> str:
    """A hash of a checkpoint's weights and config, for recording what a run was based on."""
    digest = hashlib.blake2b(digest_size=16)
    for file in [Path(folder) / "config.json", *sorted(set(_index(folder).values()))]:
        with open(file, "rb") as stream:
            while block := stream.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()
