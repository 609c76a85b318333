"""Parts of parameters that are held already: a layer of a stack, or the first blocks of a model.

On a CPU a part is a view of the memory of its whole. Other devices have no views of arrays: there it is a copy.
Parameters that are not held at all are a `ByLayer`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Shaped


@dataclasses.dataclass(frozen=True, eq=False)
class ByLayer:
    """Parameters of which only as much exists at a time as is asked for: of a stack `[L, ...]` a layer, `x[i]`; of
    others the whole, `x[()]`. `make(layer)` makes it (layer None: the whole)."""

    shape: tuple[int, ...]
    dtype: np.dtype
    make: Callable[[int | None], Array]

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: int | slice | tuple[()]) -> "Array | ByLayer":
        if isinstance(index, slice):
            which = range(self.shape[0])[index]
            return dataclasses.replace(
                self, shape=(len(which), *self.shape[1:]), make=lambda layer: self.make(which[layer])
            )
        return self.make(None if index == () else index)

    def changed(self, change: Callable[[Array, int], Array]) -> "ByLayer":
        """The stack with `change(value, layer)` for each layer."""
        return dataclasses.replace(self, make=lambda layer: change(self.make(layer), layer))


def part(
    x: Shaped[Array | np.ndarray, "..."] | ByLayer, index: int | slice
) -> Shaped[Array | np.ndarray, "..."] | ByLayer:
    """`x[index]` along the first axis."""
    return _viewed(x, lambda x: x[index]) if _on_one_cpu(x) else x[index]


def split(blocks: dict) -> list[dict]:
    """Stacked parameters as those of each block."""
    return [jax.tree.map(lambda x: part(x, i), blocks) for i in range(len(jax.tree.leaves(blocks)[0]))]


def with_layers(params: dict) -> dict:
    """The parameters of a model. On a CPU they have two more views of the same memory, which spare its programs copies of
    all blocks: `layers`, the parameters of each block apart, and `integers`, embedding and blocks with their numbers of 16
    bits as integers (`cpu_forms.on_halves` says why)."""
    held = {name: params[name] for name in ("embedding", "blocks")}
    arrays = [x for x in jax.tree.leaves(held) if isinstance(x, jax.Array)]
    if not arrays or not all(map(_on_one_cpu, arrays)):
        return params
    return params | {
        "layers": split(params["blocks"]),
        "integers": jax.tree_util.tree_map_with_path(_as_integers, held),
    }


def _as_integers(path: tuple, x: Shaped[Array | np.ndarray, "..."]) -> Shaped[Array | np.ndarray, "..."]:
    """The bits of an array of 16-bit numbers; another one, and an adapter's, which the sampler casts, as it is."""
    if not isinstance(x, jax.Array) or x.dtype.itemsize != 2 or path[-1].key in ("lora_a", "lora_b"):
        return x
    return _viewed(x, lambda x: x.view(np.uint16))


def _viewed(x: Shaped[Array, "..."], view: Callable[[np.ndarray], np.ndarray]) -> Shaped[Array, "..."]:
    """A view of an array on one CPU as an array of its own: no copy where it begins at a multiple of 64 bytes."""
    (device,) = x.sharding.device_set
    return jax.device_put(view(np.asarray(x)), device)


def _on_one_cpu(x: Any) -> bool:
    """Whether x is an array (no tracer) on a single CPU device."""
    if not isinstance(x, jax.Array) or isinstance(x, jax.core.Tracer):
        return False
    devices = x.sharding.device_set
    return len(devices) == 1 and next(iter(devices)).platform == "cpu"
