"""The device mesh and where every array lives on it.

Parameters carry logical axis names; two tables map them to the mesh axes (data, fsdp, tensor). `TRAIN`: every weight is cut
along its width over fsdp and tensor together, and gathered whole where a layer computes with it; the batch is cut over all
devices. `DECODE`: weights are cut over tensor along heads, MLP and vocabulary and stay so; the batch is cut over data and
fsdp. No all-gather stands inside the decode loop: the parameters are re-laid out once per rollout (`relayout`), which is also
where a vocabulary that tensor does not divide is padded. So `tensor` says how small a device's decoding copy is, and costs
training no all-reduce of activations.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from nla_jax.runtime.errors import InputError

AXES = ("data", "fsdp", "tensor")
TRAIN = (
    ("batch", AXES), ("layers", None), ("embed", ("fsdp", "tensor")), ("embed_out", None), ("vocab", None),
    ("heads", None), ("kv_heads", None), ("head_dim", None), ("mlp", None), ("lora_rank", None),
)  # fmt: skip
DECODE = (
    ("batch", ("data", "fsdp")), ("layers", None), ("embed", None), ("embed_out", None), ("vocab", "tensor"),
    ("heads", "tensor"), ("kv_heads", "tensor"), ("head_dim", None), ("mlp", "tensor"), ("lora_rank", None),
)  # fmt: skip
FLOAT32 = ("scale", "lora_a", "lora_b")  # parameters (norms, adapters) whose working copies keep float32


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
    return device_mesh(sizes, devices[:count])


def device_mesh(sizes: Sequence[int], devices: Sequence[Any]) -> Mesh:
    """The devices as a mesh whose axes follow the wires between them, where they are known."""
    return Mesh(mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True), AXES)


def host_mesh(mesh: Mesh, host: int | None = None) -> Mesh:
    """One host's devices of a mesh (default: this host's), over which weights are cut: for work that hosts share out."""
    host = jax.process_index() if host is None else host
    own = [device for device in mesh.devices.flat if device.process_index == host]
    return device_mesh((1, len(own), 1), own)


def ways(mesh: Mesh, axes: str | tuple[str, ...] | None) -> int:
    """Into how many parts these mesh axes cut an array's axis."""
    return math.prod(mesh.shape[axis] for axis in ((axes,) if isinstance(axes, str) else axes or ()))


def shardings(mesh: Mesh, abstract: Any, rules=TRAIN) -> Any:
    """The sharding of each array of a tree of (boxed) shapes; what carries no axis names is replicated.

    Raises InputError naming the parameter and axis whose size the mesh does not divide."""
    specs = nn.logical_to_mesh_sharding(nn.get_partition_spec(abstract), mesh, rules)

    def checked(path, shape, sharding):
        for size, axes in zip(shape.shape, sharding.spec):
            if size % ways(mesh, axes):
                name = jax.tree_util.keystr(path)
                sizes = " x ".join(f"{a}={mesh.shape[a]}" for a in ((axes,) if isinstance(axes, str) else axes))
                raise InputError(f"{name} has {size} entries, which mesh axis {sizes} does not divide.")
        return sharding

    return jax.tree_util.tree_map_with_path(checked, nn.unbox(abstract), specs)


def padded_vocabulary(mesh: Mesh, abstract: Any, rules=DECODE) -> Any:
    """The (boxed) shapes with their vocabulary axes at the next size that the mesh divides."""
    parts = ways(mesh, dict(rules)["vocab"])

    def padded(box):
        if not isinstance(box, nn.LogicallyPartitioned):
            return box
        shape = [-(-n // parts) * parts if name == "vocab" else n for n, name in zip(box.value.shape, box.names)]
        return box.replace_boxed(jax.ShapeDtypeStruct(tuple(shape), box.value.dtype))

    return jax.tree.map(padded, abstract, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))


def batch_axes(mesh: Mesh, size: int, rules=TRAIN) -> tuple[str, ...]:
    """The mesh axes that cut a batch of `size`: of those of the rules the first ones, as many as divide it."""
    axes = dict(rules)["batch"]
    while axes and size % ways(mesh, axes):
        axes = axes[:-1]
    return axes


def batch_sharding(mesh: Mesh, shape: tuple[int, ...]) -> NamedSharding:
    """Of an array whose first axis is a batch, in training."""
    return NamedSharding(mesh, PartitionSpec(batch_axes(mesh, shape[0]) or None) if shape else PartitionSpec())


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


def working_dtypes(params: Any, dtype: Any) -> Any:
    """The dtype of each parameter in a working copy: `dtype`, which models cast the others to anyway, but float32 for what they
    compute with before they cast. Rounded here already, the copy would be another policy than the one that is trained."""
    of_leaf = lambda path, _: jnp.dtype(jnp.float32 if path[-1].key in FLOAT32 else dtype)
    return jax.tree_util.tree_map_with_path(of_leaf, params)


def relayout(mesh: Mesh, abstract: Any, dtype: Any, rules: Any):
    """A jitted function that casts parameters to `dtype` (`working_dtypes`) and lays them out by `rules`: frozen weights for
    training, and once per rollout the verbalizer's for decoding. Stacked layers move one by one, so that no second copy exists."""
    padded = padded_vocabulary(mesh, abstract, rules)
    layout, before = shardings(mesh, padded, rules), shardings(mesh, abstract, TRAIN)
    stacked = jax.tree.map(lambda spec: tuple(spec)[:1] == ("layers",), nn.get_partition_spec(abstract))

    def move(x, shape, dtype, place, old, stacked):
        if stacked and not place.is_equivalent_to(old, x.ndim):
            layer = NamedSharding(mesh, PartitionSpec(*place.spec[1:]))
            return jax.lax.map(lambda x: jax.lax.with_sharding_constraint(x.astype(dtype), layer), x)
        return jnp.pad(x.astype(dtype), [(0, n - m) for n, m in zip(shape.shape, x.shape)])

    shapes = nn.unbox(padded)
    dtypes = working_dtypes(shapes, dtype)
    return jax.jit(
        lambda params: jax.tree.map(move, params, shapes, dtypes, layout, before, stacked), out_shardings=layout
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def gathered(weight: Any, names: tuple[str, ...]) -> Any:
    """A weight with these axis names as a training step computes with it: whole on every device. Its gradient goes straight
    to where the weight lies; the transpose of a plain constraint would have it all-reduced whole first."""
    return constrained(weight, (None,) * weight.ndim)


gathered.defvjp(
    lambda weight, names: (gathered(weight, names), None),
    lambda names, _, gradient: (constrained(gradient, names),),
)


def on_each_device(function: Callable, weights: Any, *batches: Any) -> Any:
    """`function(weights, *batches)`, run by each device on the rows of the batches that it holds. All arrays of `batches` and of
    the result have the same number of rows; the weights are whole. Gradients of the weights are added up over devices once, at
    the end; left alone, the compiler does it in every turn of a loop in `function`."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return function(weights, *batches)
    axes = batch_axes(mesh, len(jax.tree.leaves(batches)[0]))

    def local(weights, *batches):
        return function(jax.tree.map(lambda x: jax.lax.pcast(x, axes, to="varying"), weights), *batches)

    whole, rows = PartitionSpec(), PartitionSpec(axes)
    return jax.shard_map(local, in_specs=(whole, *[rows] * len(batches)), out_specs=rows)(weights, *batches)


def vocabulary_parts(size: int) -> int:
    """Into how many parts the mesh in use cuts a vocabulary of `size` for decoding."""
    mesh = jax.sharding.get_abstract_mesh()
    parts = 1 if mesh.empty else mesh.shape["tensor"]
    return 1 if size % parts else parts


def cut_batch(x: Any, axis: int = 0, rules=TRAIN) -> Any:
    """Keeps a batch (`axis` of x) cut as the rules say, and everything else of x whole: left alone, the compiler follows the
    weights' cut instead, replicates the batch and all-reduces every layer's result."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    axes = batch_axes(mesh, x.shape[axis], rules) or None
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*[None] * axis, axes))


def where_table_lies(x: Any) -> Any:
    """What was looked up in a table, `[*batch, width]`, cut as its table is along the width, and its first axis over the copies of
    the table: not the table crosses devices, but what was found."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    rows = batch_axes(mesh, len(x), (("batch", ("data",)),)) or None
    return jax.lax.with_sharding_constraint(x, PartitionSpec(rows, *[None] * (x.ndim - 2), dict(TRAIN)["embed"]))


def constrained(x: Any, names: tuple[str | None, ...], rules=TRAIN) -> Any:
    """x, cut along the axes with these names as the rules say; as it is where there is no mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, nn.logical_to_mesh_axes(names, rules))


# Shapes of what lies on a mesh, for programs that are compiled before any array exists


def placed(mesh: Mesh, boxed: Any, rules=TRAIN, dtype: Any = None) -> Any:
    """Shapes with their shardings, of (boxed) shapes with axis names; of a working copy in `dtype` where one is given."""
    boxed = padded_vocabulary(mesh, boxed, rules)
    shapes = nn.unbox(boxed)
    dtypes = working_dtypes(shapes, dtype) if dtype else jax.tree.map(lambda s: s.dtype, shapes)
    shape = lambda s, dtype, sharding: jax.ShapeDtypeStruct(s.shape, dtype, sharding=sharding)
    return jax.tree.map(shape, shapes, dtypes, shardings(mesh, boxed, rules))


def placed_batch(mesh: Mesh, tree: Any) -> Any:
    """Shapes with the shardings that `place_batch` gives to arrays."""
    place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=batch_sharding(mesh, x.shape))
    return jax.tree.map(place, tree)


def device_bytes(tree: Any) -> float:
    """Bytes of the placed shapes of a tree on one device."""
    shapes = [x for x in jax.tree.leaves(tree) if isinstance(x, jax.ShapeDtypeStruct)]
    return float(sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in shapes))
