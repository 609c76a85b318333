"""Low-rank adapters beside the linear maps of a frozen model, and their files in the format of PEFT.

An adapter is a tree `{blocks: {projection: {lora_a [L, in…, r], lora_b [L, r, out…]}}}`; y = x·W + scale · x·A·B (Hu et al.
2021, arXiv 2106.09685; rank-stabilised scale: arXiv 2312.03732).
"""

import dataclasses
import json
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from safetensors.numpy import save_file

from nla_jax.io.pretrained import read_tensors
from nla_jax.models.families import PROJECTIONS
from nla_jax.models.transformer import TransformerConfig, abstract_params
from nla_jax.runtime.distributed import is_writer, to_host
from nla_jax.runtime.errors import InputError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."


@dataclasses.dataclass(frozen=True)
class Lora:
    """Rank, scale and targets of an adapter; `targets` are projections: q, k, v, o, gate, up, down."""

    rank: int
    alpha: float = 16.0
    rslora: bool = False
    targets: tuple[str, ...] = tuple(PROJECTIONS)

    def __post_init__(self):
        if self.rank < 1 or not self.targets:
            raise InputError(f"A LoRA adapter needs a rank of at least 1 and targets; found {self}.")
        if unknown := [name for name in self.targets if name not in PROJECTIONS]:
            raise InputError(f"LoRA has no target {unknown[0]!r}; there are {', '.join(PROJECTIONS)}.")

    @property
    def scale(self) -> float:
        """alpha / r, rank-stabilised alpha / sqrt(r)."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)

    def abstract_params(self, config: TransformerConfig) -> dict:
        """Shapes of the adapter's tree with logical axis names attached."""
        blocks = {}
        for name in self.targets:
            kernel = abstract_params(config)["blocks"][name]["kernel"]
            shape, axes, n = kernel.value.shape, kernel.names, _inputs(name)
            box = lambda shape, axes: nn.LogicallyPartitioned(jax.ShapeDtypeStruct(shape, jnp.float32), axes)
            blocks[name] = {
                "lora_a": box((*shape[: 1 + n], self.rank), (*axes[: 1 + n], "lora_rank")),
                "lora_b": box((shape[0], self.rank, *shape[1 + n :]), (axes[0], "lora_rank", *axes[1 + n :])),
            }
        return {"blocks": blocks}

    def init_params(self, rng: Array, config: TransformerConfig) -> dict:
        """A new adapter: A uniform in ±1/sqrt(inputs) as in PEFT, B zero, so that it changes nothing yet."""

        def draw(path, shape):
            if path[-1].key == "lora_b":
                return jnp.zeros(shape.shape)
            key = jax.random.fold_in(rng, self.targets.index(path[1].key))
            bound = np.prod(shape.shape[1:-1]) ** -0.5
            return jax.random.uniform(key, shape.shape, minval=-bound, maxval=bound)

        return jax.tree_util.tree_map_with_path(draw, nn.unbox(self.abstract_params(config)))

    def attach(self, base: dict, adapter: dict) -> dict:
        """The base with the adapter beside its kernels, the scale folded into B."""
        blocks = dict(base["blocks"])
        for name, pair in adapter["blocks"].items():
            blocks[name] = blocks[name] | {"lora_a": pair["lora_a"], "lora_b": pair["lora_b"] * self.scale}
        return base | {"blocks": blocks}

    def merge(self, base: dict, adapter: dict) -> dict:
        """The plain parameters W + scale · A·B, in the dtype of the base."""
        blocks = dict(base["blocks"])
        for name, pair in adapter["blocks"].items():
            kernel = blocks[name]["kernel"]
            flat = lambda x, shape: jnp.asarray(x, jnp.float32).reshape(len(x), *shape)
            delta = flat(pair["lora_a"], (-1, self.rank)) @ flat(pair["lora_b"], (self.rank, -1))
            merged = jnp.asarray(kernel, jnp.float32) + self.scale * delta.reshape(kernel.shape)
            blocks[name] = blocks[name] | {"kernel": merged.astype(kernel.dtype)}
        return base | {"blocks": blocks}


def _inputs(name: str) -> int:
    """Input axes of a projection's kernel: heads and head dimension for `o`, one for all others."""
    return 2 if name == "o" else 1


def save_adapter(folder: Path, adapter: dict, lora: Lora, config: TransformerConfig, base: str) -> None:
    """Writes `adapter_config.json` and `adapter_model.safetensors`, which PEFT reads. `base`: the name of the base model."""
    tensors = {}
    for name, pair in adapter["blocks"].items():
        a, b = (np.asarray(to_host(pair[x]), np.float32) for x in ("lora_a", "lora_b"))
        for layer in range(config.layers):
            key = _PREFIX + PROJECTIONS[name].format(layer=layer)
            tensors[f"{key}.lora_A.weight"] = np.ascontiguousarray(a[layer].reshape(-1, lora.rank).T)
            tensors[f"{key}.lora_B.weight"] = np.ascontiguousarray(b[layer].reshape(lora.rank, -1).T)
    if not is_writer():  # all hosts take part in reading the tensors
        return
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "use_rslora": lora.rslora,
        "target_modules": [PROJECTIONS[name].rsplit(".", 1)[1] for name in lora.targets],
        "layers_to_transform": list(range(config.layers)),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    (folder / CONFIG).write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")


def load_adapter(folder: Path, config: TransformerConfig) -> tuple[Lora, dict]:
    """The adapter in a PEFT folder and its settings. `config`: the base model's.

    Raises `InputError` naming the setting that is not supported, or the tensor that is missing, unexpected or misshapen."""
    settings = read_settings(folder)
    unsupported = ("use_dora", "modules_to_save", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "lora_bias")
    if settings.get("peft_type") != "LORA":
        raise InputError(f"{folder / CONFIG}: peft_type is {settings.get('peft_type')!r}, expected 'LORA'.")
    if used := [name for name in unsupported if settings.get(name)]:
        raise InputError(f"{folder / CONFIG}: {used[0]} = {settings[used[0]]!r} is not supported.")
    stored = read_tensors(folder / WEIGHTS)
    present = [p for p, hf in PROJECTIONS.items() if f"{_PREFIX}{hf.format(layer=0)}.lora_A.weight" in stored]
    try:
        lora = Lora(int(settings["r"]), float(settings["lora_alpha"]), bool(settings.get("use_rslora")), tuple(present))
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{folder / CONFIG}: r or lora_alpha is missing or no number ({error}).") from None
    tree = jax.tree.map(lambda s: np.empty(s.shape, np.float32), nn.unbox(lora.abstract_params(config)))
    for name in present:
        for layer in range(config.layers):
            for leaf, letter in (("lora_a", "A"), ("lora_b", "B")):
                key = f"{_PREFIX}{PROJECTIONS[name].format(layer=layer)}.lora_{letter}.weight"
                if key not in stored:
                    raise InputError(f"{folder / WEIGHTS}: tensor {key!r} is missing.")
                value, slot = stored.pop(key).read().T.astype(np.float32), tree["blocks"][name][leaf][layer]
                if value.size != slot.size or lora.rank not in value.shape:
                    raise InputError(f"{folder / WEIGHTS}: tensor {key!r} does not fit rank {lora.rank} and its base.")
                if not np.isfinite(value).all():
                    raise InputError(f"{folder / WEIGHTS}: tensor {key!r} holds NaN or infinite values.")
                slot[...] = value.reshape(slot.shape)
    if stored:
        raise InputError(f"{folder / WEIGHTS}: tensor {min(stored)!r} is unexpected for its base model.")
    return lora, tree


def read_settings(folder: Path) -> dict:
    """`adapter_config.json`. Raises `InputError` where it is not a JSON object."""
    try:
        settings = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        assert isinstance(settings, dict)
        return settings
    except (OSError, ValueError, AssertionError) as error:
        raise InputError(f"{folder / CONFIG} is missing or is not a JSON object ({error}).") from None
