"""The device mesh and where every array lives on it.

Parameters carry logical axis names; two tables map them to the mesh axes (data, fsdp, tensor). Under `TRAIN` weights are
cut over `fsdp` along their width and gathered where a layer needs them. Under `DECODE` they are cut over `tensor` alone, so
that no all-gather stands inside the decode loop: the parameters are re-laid out once per rollout.
"""

from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from nla_jax.errors import InputError

AXES = ("data", "fsdp", "tensor")
TRAIN = (
    ("layers", None), ("embed", "fsdp"), ("embed_out", None), ("vocab", "tensor"), ("heads", "tensor"),
    ("kv_heads", "tensor"), ("head_dim", None), ("mlp", "tensor"), ("lora_rank", None),
)  # fmt: skip
DECODE = tuple((name, None if axis == "fsdp" else axis) for name, axis in TRAIN)


def make_mesh(data: int = 1, fsdp: int = 1, tensor: int = 1) -> Mesh:
    """A mesh of the given sizes over the first devices; one size may be -1 (whatever is left).

    Raises InputError where the sizes do not fit the devices there are, or leave out a host's."""
    sizes, devices = [data, fsdp, tensor], jax.devices()
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise InputError(f"mesh sizes {dict(zip(AXES, sizes))} must be positive, and at most one of them -1.")
    if -1 in sizes:
        sizes[sizes.index(-1)] = len(devices) // -int(np.prod(sizes))
    count = int(np.prod(sizes))
    if not 0 < count <= len(devices):
        raise InputError(f"mesh {dict(zip(AXES, sizes))} needs {count} devices, but there are {len(devices)}.")
    if idle := {d.process_index for d in devices} - {d.process_index for d in devices[:count]}:
        raise InputError(
            f"mesh {dict(zip(AXES, sizes))} takes {count} of {len(devices)} devices and none of host {min(idle)}; make one "
            f"size -1 to use all."
        )
    return Mesh(np.array(devices[:count]).reshape(sizes), AXES)


def shardings(mesh: Mesh, abstract: Any, rules=TRAIN) -> Any:
    """The sharding of each array of a tree of (boxed) shapes; what carries no axis names is replicated.

    Raises InputError naming the parameter and axis whose size the mesh does not divide."""
    specs = nn.logical_to_mesh_sharding(nn.get_partition_spec(abstract), mesh, rules)

    def checked(path, shape, sharding):
        for size, axis in zip(shape.shape, sharding.spec):
            if axis is not None and size % mesh.shape[axis]:
                name = jax.tree_util.keystr(path)
                raise InputError(
                    f"{name} has {size} entries, which mesh axis {axis}={mesh.shape[axis]} does not divide."
                )
        return sharding

    return jax.tree_util.tree_map_with_path(checked, nn.unbox(abstract), specs)


def batch_sharding(mesh: Mesh, shape: tuple[int, ...]) -> NamedSharding:
    """Of an array whose first axis is a batch: over data and fsdp together; replicated where those do not divide it."""
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")) if shape and shape[0] % ways == 0 else PartitionSpec())


class RowsOf:
    """`array[rows]` as a leaf of a batch: of the array (one mapped from disk, say) a host reads only the rows it places."""

    def __init__(self, array: np.ndarray, rows: np.ndarray):
        self.array, self.rows, self.shape = array, rows, (len(rows), *array.shape[1:])

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        return self.array[self.rows[index[0]]][:, *index[1:]]


def place_batch(mesh: Mesh, tree: Any) -> Any:
    """Host arrays (the same on all hosts, or `RowsOf` such) onto the mesh, each with its `batch_sharding`; a host reads only
    the rows that its devices hold. An empty mesh leaves them where they are."""
    if mesh.empty:
        return tree
    return jax.tree.map(
        lambda x: jax.make_array_from_callback(x.shape, batch_sharding(mesh, x.shape), x.__getitem__), tree
    )


def local_rows(x: jax.Array) -> tuple[np.ndarray, np.ndarray]:
    """The rows of a batch that this host's devices hold, `(row numbers, x[rows])`, each row once. `x` is cut along its first
    axis alone."""
    pieces = {}
    for shard in x.addressable_shards:
        start = shard.index[0].start or 0
        if start not in pieces:
            pieces[start] = np.asarray(shard.data)
    numbers = [start + np.arange(len(pieces[start])) for start in sorted(pieces)]
    return np.concatenate(numbers), np.concatenate([pieces[start] for start in sorted(pieces)])


def place_local(sharding: NamedSharding, rows: np.ndarray, values: np.ndarray, count: int) -> jax.Array:
    """The opposite of `local_rows`: an array of `count` rows of which this host knows those that its devices hold."""

    def read(index: tuple[slice, ...]) -> np.ndarray:
        start, stop, _ = index[0].indices(count)
        first = np.searchsorted(rows, start)
        return values[first : first + stop - start]

    return jax.make_array_from_callback((count, *values.shape[1:]), sharding, read)


def relayout(mesh: Mesh, abstract: Any, dtype: Any, rules: Any):
    """A jitted function that casts parameters to `dtype` and lays them out by `rules`: frozen weights for training, and
    once per rollout the verbalizer's for decoding."""
    cast = lambda params: jax.tree.map(lambda x: x.astype(dtype), params)
    return jax.jit(cast, out_shardings=shardings(mesh, abstract, rules))
