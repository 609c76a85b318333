"""LoRA adapters in the format of PEFT: `adapter_config.json` and `adapter_model.safetensors` in a folder."""

import itertools
import json
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np

from nla_jax.io.safetensors import INSIDE, Stored, read_tensors, write_file
from nla_jax.models.families import PROJECTIONS
from nla_jax.models.lora import Lora
from nla_jax.models.transformer import TransformerConfig
from nla_jax.runtime.distributed import is_writer, to_host
from nla_jax.runtime.errors import InputError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
UNSUPPORTED = (  # settings with which a file is not W + scale · B·A, or holds more
    "use_dora",
    "modules_to_save",
    "rank_pattern",
    "alpha_pattern",
    "fan_in_fan_out",
    "lora_bias",
    "alora_invocation_tokens",
    "arrow_config",
)
CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # initialisations that change the base model too
MERGE = "merge it into its base with PEFT (merge_and_unload, save_pretrained) and use that as a whole model"
WRAPPED = ("model.language_model.", "language_model.model.")  # before the text model's layers in a multimodal one
MODULES = {name: hf.rsplit(".", 1)[1] for name, hf in PROJECTIONS.items()}  # as `target_modules` names them


def _key(projection: str, layer: int, letter: str, wrapped: bool = False) -> str:
    """The name of a tensor in the file; `letter`: A or B. `wrapped`: of a multimodal base."""
    module = PROJECTIONS[projection].format(layer=layer)
    module = module.replace("model.", WRAPPED[0], 1) if wrapped else module
    return f"base_model.model.{module}.lora_{letter}.weight"


def save_adapter(
    folder: Path, adapter: dict, lora: Lora, config: TransformerConfig, base: str, *, wrapped: bool = False
) -> None:
    """Writes the two files. `base`: the name of the base model; `wrapped`: it is the text part of a multimodal one, in
    which PEFT finds its layers under other names. Of several hosts all must call this; one writes."""
    tensors = {}
    for name, pair in adapter["blocks"].items():
        a, b = (np.asarray(to_host(pair[x]), np.float32) for x in ("lora_a", "lora_b"))
        for layer in range(config.layers):
            tensors[_key(name, layer, "A", wrapped)] = np.ascontiguousarray(a[layer].reshape(-1, lora.rank).T)
            tensors[_key(name, layer, "B", wrapped)] = np.ascontiguousarray(b[layer].reshape(lora.rank, -1).T)
    if broken := [key for key, value in tensors.items() if not np.isfinite(value).all()]:
        raise InputError(f"Tensor {broken[0]!r} holds NaN or infinite values; it is not saved.")
    if not is_writer():
        return
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "use_rslora": lora.rslora,
        "target_modules": [MODULES[name] for name in lora.targets],
        "layers_to_transform": list(range(config.layers)),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    if wrapped:  # names alone would put adapters into the vision tower too
        layers, names = "|".join(map(str, range(config.layers))), "|".join(settings["target_modules"])
        settings["target_modules"] = rf".*language_model\.layers\.({layers})\.(self_attn|mlp)\.({names})"
        settings["layers_to_transform"] = None
    (folder / CONFIG).write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
    write_file(folder / WEIGHTS, tensors)


def load_adapter(folder: Path, config: TransformerConfig) -> tuple[Lora, dict]:
    """The settings and parameters (float32) of the adapter in a folder. `config`: the base model's. Raises `InputError`
    naming the setting that is not supported, or the tensor that is missing, unexpected, misshapen or not finite."""
    settings, file = read_settings(folder), folder / CONFIG
    if settings.get("peft_type") != "LORA":
        raise InputError(f"{file}: peft_type is {settings.get('peft_type')!r}, expected 'LORA'.")
    heads = settings.get("modules_to_save") in (["value_head"], ["v_head"])  # which `read_head` reads
    if used := [name for name in UNSUPPORTED if settings.get(name) and not (heads and name == "modules_to_save")]:
        raise InputError(f"{file}: {used[0]} = {settings[used[0]]!r} is not supported; {MERGE}.")
    if str(initial := settings.get("init_lora_weights")).lower().startswith(CHANGED_BASE):
        raise InputError(
            f"{file}: init_lora_weights = {initial!r} changes the base model too, so that this file alone does not say "
            f"what was trained; save it with PEFT's path_initial_model_for_weight_conversion, or {MERGE}."
        )
    try:
        rank, alpha = int(settings["r"]), float(settings["lora_alpha"])
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{file}: r or lora_alpha is missing or no number ({error}).") from None
    if rank < 1:
        raise InputError(f"{file}: r = {rank} is no rank; it must be at least 1.")
    stored = _text_tensors(folder / WEIGHTS)
    present = tuple(name for name in PROJECTIONS if any(_key(name, i, "A") in stored for i in range(config.layers)))
    if not present:
        found, known = settings.get("target_modules"), ", ".join(MODULES.values())
        raise InputError(f"{file}: target_modules = {found!r} are not supported (supported: {known}).")

    lora = Lora(rank, alpha, bool(settings.get("use_rslora")), present)
    tree = jax.tree.map(lambda s: np.empty(s.shape, np.float32), nn.unbox(lora.abstract_params(config)))
    chosen = settings.get("layers_to_transform")
    chosen = range(config.layers) if chosen is None else [chosen] if isinstance(chosen, int) else chosen
    for name, layer, letter in itertools.product(present, range(config.layers), "AB"):
        key, slot = _key(name, layer, letter), tree["blocks"][name][f"lora_{letter.lower()}"][layer]
        if key not in stored and layer not in chosen:
            slot[...] = 0
            continue
        if key not in stored:
            raise InputError(f"{folder / WEIGHTS}: tensor {key!r} is missing.")
        value = stored.pop(key).read().T.astype(np.float32)
        if value.size != slot.size or rank not in value.shape:
            raise InputError(f"{folder / WEIGHTS}: tensor {key!r} does not fit rank {rank} and its base.")
        if not np.isfinite(value).all():
            raise InputError(f"{folder / WEIGHTS}: tensor {key!r} holds NaN or infinite values.")
        slot[...] = value.reshape(slot.shape)
    if stored:
        raise InputError(f"{folder / WEIGHTS}: tensor {min(stored)!r} is unexpected for its base model.")
    return lora, tree


def _text_tensors(file: Path) -> dict[str, Stored]:
    """The tensors of the text model's adapter, under the names of a text-only base; no head, no vision tower's."""
    found = {}
    for name, tensor in read_tensors(file).items():
        if ".vision_tower." in name or ".multi_modal_projector." in name or name.endswith(INSIDE):
            continue
        for prefix in WRAPPED:
            name = name.replace(f"base_model.model.{prefix}", "base_model.model.model.", 1)
        found[name] = tensor
    return found


def read_settings(folder: Path) -> dict:
    """`adapter_config.json`. Raises `InputError` if it is not a JSON object."""
    try:
        return dict(json.loads((folder / CONFIG).read_text(encoding="utf-8")).items())
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"{folder / CONFIG} is missing or is not a JSON object ({error}).") from None
