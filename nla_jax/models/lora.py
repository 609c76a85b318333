"""Low-rank adapters to the linear maps of a frozen model. Their files are those of PEFT (io/adapters.py).

An adapter is a tree `{blocks: {projection: {lora_a [L, *inputs, r], lora_b [L, r, *outputs]}}}`; y = x·W + scale ·
x·A·B (Hu et al. 2021, arXiv 2106.09685; rank-stabilised scale: arXiv 2312.03732).
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from nla_jax.models.families import PROJECTIONS
from nla_jax.models.transformer import TransformerConfig, projections
from nla_jax.models.views import ByLayer
from nla_jax.runtime.errors import InputError


@dataclasses.dataclass(frozen=True)
class Lora:
    """Rank, scale and targets (projections) of an adapter. Raises `InputError` for a rank below 1 or a wrong target."""

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
        """alpha / r, or alpha / sqrt(r) if rank-stabilised."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)

    def abstract_params(self, config: TransformerConfig) -> dict:
        """Shapes of the adapter's tree with logical axis names attached."""
        box = lambda axes, *shape: nn.LogicallyPartitioned(jax.ShapeDtypeStruct(shape, jnp.float32), axes)
        blocks = {}
        for name in self.targets:
            p = projections(config)[name]
            n = len(p.inputs)
            blocks[name] = {
                "lora_a": box(("layers", *p.axes[:n], "lora_rank"), config.layers, *p.inputs, self.rank),
                "lora_b": box(("layers", "lora_rank", *p.axes[n:]), config.layers, self.rank, *p.outputs),
            }
        return {"blocks": blocks}

    def init_params(self, rng: Array, config: TransformerConfig) -> dict:
        """A new adapter: A uniform in ±1/sqrt(inputs) as in PEFT, B zero, so that it does not change the model yet."""

        def draw(path, shape):
            if path[-1].key == "lora_b":
                return jnp.zeros(shape.shape)
            key = jax.random.fold_in(rng, self.targets.index(path[1].key))
            bound = np.prod(shape.shape[1:-1]) ** -0.5
            return jax.random.uniform(key, shape.shape, minval=-bound, maxval=bound)

        return jax.tree_util.tree_map_with_path(draw, nn.unbox(self.abstract_params(config)))

    def attach(self, base: dict, adapter: dict) -> dict:
        """The base parameters with the adapter next to its kernels, the scale folded into B."""
        blocks = dict(base["blocks"])
        for name, pair in adapter["blocks"].items():
            blocks[name] = blocks[name] | {"lora_a": pair["lora_a"], "lora_b": pair["lora_b"] * self.scale}
        return base | {"blocks": blocks}

    def merge(self, base: dict, adapter: dict) -> dict:
        """The plain parameters W + scale · A·B, in the dtype of the base."""
        flat = lambda x, shape: jnp.asarray(x, jnp.float32).reshape(len(x), *shape)

        def merged(kernel: Array, a: Array, b: Array) -> Array:
            delta = flat(a, (-1, self.rank)) @ flat(b, (self.rank, -1))
            return (jnp.asarray(kernel, jnp.float32) + self.scale * delta.reshape(kernel.shape)).astype(kernel.dtype)

        blocks = dict(base["blocks"])
        for name, pair in adapter["blocks"].items():
            kernel, (a, b) = blocks[name]["kernel"], (pair["lora_a"], pair["lora_b"])
            one = lambda value, i, a=a, b=b: merged(value[None], a[i : i + 1], b[i : i + 1])[0]
            new = kernel.changed(one) if isinstance(kernel, ByLayer) else merged(kernel, a, b)
            blocks[name] = blocks[name] | {"kernel": new}
        return base | {"blocks": blocks}
