"""The device mesh, and where every array lies on it.

Parameters carry logical axis names; a table maps these to the mesh axes (data, fsdp, tensor). `TRAIN`: every weight is
cut along its width over fsdp and tensor together, and gathered whole where a layer computes with it; the batch is cut
over all devices. `DECODE`: weights are cut over tensor along heads, MLP and vocabulary, and stay so; the batch is cut
over data and fsdp. Parameters are laid out for decoding once per rollout (`relayout`); its loop has no all-gather. So
`tensor` sets the size of a device's decoding copy, and costs training no all-reduce of activations.
"""

import functools
import itertools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Shaped

from nla_jax.runtime.errors import InputError

AXES = ("data", "fsdp", "tensor")
_TABLE = {  # logical axis: mesh axes in training, in decoding
    "batch": (AXES, ("data", "fsdp")),
    "layers": (None, None),
    "embed": (("fsdp", "tensor"), None),
    "embed_out": (None, None),
    "vocab": (None, "tensor"),
    "heads": (None, "tensor"),
    "kv_heads": (None, "tensor"),
    "head_dim": (None, None),
    "mlp": (None, "tensor"),
    "lora_rank": (None, None),
}
TRAIN, DECODE = (tuple((name, axes[i]) for name, axes in _TABLE.items()) for i in (0, 1))
FLOAT32 = ("scale", "lora_a", "lora_b")  # parameters (norms, adapters) that stay float32 in working copies


def make_mesh(data: int = 1, fsdp: int = 1, tensor: int = 1) -> Mesh:
    """A mesh over the first devices; one size may be -1 (the rest). Raises `InputError` if the sizes do not fit."""
    sizes, devices = [data, fsdp, tensor], jax.devices()
    if wrong := [size for size in sizes if isinstance(size, bool) or not hasattr(size, "__index__")]:
        raise InputError(f"The sizes of a mesh are whole numbers; found {wrong[0]!r:.50}.")
    sizes = [operator.index(size) for size in sizes]
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise InputError(f"mesh sizes {dict(zip(AXES, sizes))} must be positive, and at most one of them -1.")
    if -1 in sizes:
        sizes[sizes.index(-1)] = len(devices) // -math.prod(sizes)
    count = math.prod(sizes)
    if not 0 < count <= len(devices):
        raise InputError(f"mesh {dict(zip(AXES, sizes))} needs {count} devices, but there are {len(devices)}.")
    if idle := {d.process_index for d in devices} - {d.process_index for d in devices[:count]}:
        taken = f"mesh {dict(zip(AXES, sizes))} takes {count} of {len(devices)} devices"
        raise InputError(f"{taken} and none of host {min(idle)}; make one size -1 to use all.")
    return device_mesh(sizes, devices[:count])


def usable_mesh(mesh: Mesh | None) -> Mesh | None:
    """A mesh of the caller's as programs here use it: with the axes of `AXES`, whose arrays the compiler lays out.

    `jax.make_mesh` gives "explicit" axes, with which every array would have to say its layout. Raises `InputError` for
    other axes, and for what is no mesh."""
    if mesh is not None and not isinstance(mesh, Mesh):
        raise InputError(f"A mesh is one of JAX, which nla_jax.make_mesh makes; found {mesh!r:.50}.")
    if mesh is None or mesh.empty:
        return None
    if mesh.axis_names != AXES:
        found = ", ".join(mesh.axis_names)
        raise InputError(f"A mesh has the axes {', '.join(AXES)}; found {found}; nla_jax.make_mesh makes one.")
    return Mesh(mesh.devices, AXES)


def device_mesh(sizes: Sequence[int], devices: Sequence[Any]) -> Mesh:
    """The devices as a mesh whose axes follow the wires between them, if JAX knows these."""
    return Mesh(mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True), AXES)


def host_mesh(mesh: Mesh, host: int | None = None) -> Mesh:
    """One host's devices of a mesh (default: this host's), to cut weights over: for work that hosts do separately."""
    host = jax.process_index() if host is None else host
    own = [device for device in mesh.devices.flat if device.process_index == host]
    return device_mesh((1, len(own), 1), own)


def ways(mesh: Mesh | AbstractMesh, axes: str | tuple[str, ...] | None) -> int:
    """The number of parts into which these mesh axes cut an axis of an array."""
    return math.prod(mesh.shape[axis] for axis in ((axes,) if isinstance(axes, str) else axes or ()))


def shardings(mesh: Mesh, abstract: Any, rules=TRAIN) -> Any:
    """The sharding of each array of a tree of (boxed) shapes. Arrays without axis names are replicated. Raises
    `InputError` naming the parameter and the mesh axis that does not divide its size."""
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
    """The (boxed) shapes with vocabulary axes padded to the next size that the mesh divides."""
    parts = ways(mesh, dict(rules)["vocab"])

    def padded(box):
        if not isinstance(box, nn.LogicallyPartitioned):
            return box
        shape = [-(-n // parts) * parts if name == "vocab" else n for n, name in zip(box.value.shape, box.names)]
        return box.replace_boxed(jax.ShapeDtypeStruct(tuple(shape), box.value.dtype))

    return jax.tree.map(padded, abstract, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))


def batch_axes(mesh: Mesh | AbstractMesh, size: int, rules=TRAIN) -> tuple[str, ...]:
    """The mesh axes that cut a batch of `size`: as many of those in the rules, from the first on, as divide it."""
    axes = dict(rules)["batch"]
    while axes and size % ways(mesh, axes):
        axes = axes[:-1]
    return axes


def batch_sharding(mesh: Mesh, shape: tuple[int, ...]) -> NamedSharding:
    """The sharding in training of an array whose first axis is a batch."""
    return NamedSharding(mesh, PartitionSpec(batch_axes(mesh, shape[0]) or None) if shape else PartitionSpec())


class RowsOf:
    """`array[rows]` as a leaf of a batch. Of the array, which may be on disk, a host reads only the rows it places."""

    def __init__(self, array: np.ndarray, rows: np.ndarray):
        self.array, self.rows, self.shape = array, rows, (len(rows), *array.shape[1:])

    def __getitem__(self, index: tuple) -> np.ndarray:
        return self.array[self.rows[index[0]]][:, *index[1:]]


def place_batch(mesh: Mesh, tree: Any) -> Any:
    """Places host arrays (the same on all hosts, or `RowsOf` them) on the mesh, each with its `batch_sharding`. A host
    reads only the rows that its devices hold. With an empty mesh the arrays stay where they are."""
    if mesh.empty:
        return tree
    place = lambda x: jax.make_array_from_callback(x.shape, batch_sharding(mesh, x.shape), x.__getitem__)
    return jax.tree.map(place, tree)


def local_rows(x: jax.Array) -> tuple[np.ndarray, np.ndarray]:
    """The rows of a batch (cut along its first axis alone) on this host's devices: numbers `[n]`, rows `[n, ...]`."""
    pieces = sorted({shard.index[0].start or 0: shard.data for shard in x.addressable_shards}.items())
    numbers = [start + np.arange(len(piece)) for start, piece in pieces]
    return np.concatenate(numbers), np.concatenate([np.asarray(piece) for _, piece in pieces])


def place_local(sharding: NamedSharding, rows: np.ndarray, values: np.ndarray, count: int) -> jax.Array:
    """The inverse of `local_rows`: an array `[count, ...]` from the rows `[n, ...]` of each host."""

    def read(index: tuple) -> np.ndarray:
        start, stop, _ = index[0].indices(count)
        first = np.searchsorted(rows, start)
        return values[first : first + stop - start]

    return jax.make_array_from_callback((count, *values.shape[1:]), sharding, read)


def parked(tree: Any) -> Callable[[], Any]:
    """Copies arrays to the memory of the hosts; the function that is returned places them again where they lay."""

    def park(x: Any) -> Callable[[], Any]:
        if not isinstance(x, jax.Array):
            return lambda: x
        shape, sharding = x.shape, x.sharding
        pieces = {repr(shard.index): shard.data for shard in x.addressable_shards}
        pieces = {index: np.array(piece) for index, piece in pieces.items()}  # replicas are copied once
        return lambda: jax.make_array_from_callback(shape, sharding, lambda index: pieces[repr(index)])

    places = jax.tree.map(park, tree)
    return lambda: jax.tree.map(lambda place: place(), places)


def working_dtypes(params: Any, dtype: Any) -> Any:
    """The dtype of each parameter in a working copy: `dtype` for matrices, which the model casts anyway. Norm scales
    and adapters stay float32, as the model uses them: rounded, they would be another policy than the trained one."""
    of_leaf = lambda path, _: jnp.dtype(jnp.float32 if path[-1].key in FLOAT32 else dtype)
    return jax.tree_util.tree_map_with_path(of_leaf, params)


def relayout(mesh: Mesh, abstract: Any, dtype: Any, rules: Any):
    """A jitted function that casts parameters (`working_dtypes`) and lays them out by `rules`: frozen weights for
    training; the verbalizer's for decoding, once per rollout. Layers move one by one, so there is no second copy."""
    padded = padded_vocabulary(mesh, abstract, rules)
    layout, before = shardings(mesh, padded, rules), shardings(mesh, abstract, TRAIN)
    stacked = jax.tree.map(lambda spec: tuple(spec)[:1] == ("layers",), nn.get_partition_spec(abstract))

    def move(x, shape, dtype, place, old, stacked):
        if stacked and not place.is_equivalent_to(old, x.ndim):
            layer = NamedSharding(mesh, PartitionSpec(*place.spec[1:]))
            return jax.lax.map(lambda x: jax.lax.with_sharding_constraint(x.astype(dtype), layer), x)
        return jnp.pad(x.astype(dtype), [(0, n - m) for n, m in zip(shape.shape, x.shape)])

    shapes = nn.unbox(padded)
    others = shapes, working_dtypes(shapes, dtype), layout, before, stacked
    return jax.jit(lambda params: jax.tree.map(move, params, *others), out_shardings=layout)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def gathered(weight: Any, names: tuple[str, ...]) -> Any:
    """A weight with these axis names, whole on every device, as a training step computes with it. Its gradient is cut
    like the weight at once; with a plain constraint it would be all-reduced whole first."""
    return constrained(weight, (None,) * weight.ndim)


gathered.defvjp(
    lambda weight, names: (gathered(weight, names), None),
    lambda names, _, gradient: (constrained(gradient, names),),
)


def on_each_device(function: Callable, weights: Any, *batches: Any) -> Any:
    """`function(weights, *batches)`, run by each device on the rows of the batches that it holds. All arrays of
    `batches` and of the result have the same number of rows; the weights are whole. Gradients of the weights are added
    up over the devices once, at the end; the compiler itself would do that in every turn of a loop in `function`."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size <= 1:
        return function(weights, *batches)
    axes = batch_axes(mesh, len(jax.tree.leaves(batches)[0]))

    def local(weights, *batches):
        return function(jax.tree.map(lambda x: jax.lax.pcast(x, axes, to="varying"), weights), *batches)

    specs = (PartitionSpec(), *[PartitionSpec(axes)] * len(batches))
    return jax.shard_map(local, in_specs=specs, out_specs=PartitionSpec(axes))(weights, *batches)


def vocabulary_parts(size: int) -> int:
    """The number of parts into which the mesh in use cuts a vocabulary of `size` for decoding."""
    mesh = jax.sharding.get_abstract_mesh()
    parts = 1 if mesh.empty else mesh.shape["tensor"]
    return 1 if size % parts else parts


def cut_batch(x: Shaped[Array, "..."], axis: int = 0, rules=TRAIN) -> Shaped[Array, "..."]:
    """x with its batch (`axis`) cut as the rules say and everything else whole. Without this the compiler follows the
    cut of the weights instead: it replicates the batch and all-reduces the result of every layer."""
    return _laid_out(x, lambda mesh: (*[None] * axis, batch_axes(mesh, x.shape[axis], rules) or None))


def where_table_lies(x: Shaped[Array, "B *T D"]) -> Shaped[Array, "B *T D"]:
    """Looked-up embeddings, cut like their table along the width: so the result is communicated, and not the table."""
    rows = lambda mesh: batch_axes(mesh, len(x), (("batch", ("data",)),)) or None
    return _laid_out(x, lambda mesh: (rows(mesh), *[None] * (x.ndim - 2), dict(TRAIN)["embed"]))


def constrained(x: Shaped[Array, "..."], names: tuple[str | None, ...], rules=TRAIN) -> Shaped[Array, "..."]:
    """x cut along the axes with these names as the rules say."""
    return _laid_out(x, lambda mesh: nn.logical_to_mesh_axes(names, rules))


def _laid_out(x: Shaped[Array, "..."], spec: Callable[[AbstractMesh], Sequence]) -> Shaped[Array, "..."]:
    """x with the layout `spec(mesh)`; x itself on one device or without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec(mesh))) if mesh.size > 1 else x


# Shapes of what lies on a mesh, for programs that are compiled before any array exists


def state_shapes(init: Callable, *abstract: Any) -> Any:
    """The (boxed) shapes of the state that a step's `init` makes of parameters with these (boxed) shapes.

    What has the path and the shape of a parameter, such as a moment of it, has its axis names too. What an optimizer
    keeps in another shape (Adafactor's factors, say) has none, and so lies whole on every device. `init` sees no boxes."""
    is_box = lambda x: isinstance(x, nn.LogicallyPartitioned)
    leaves = itertools.chain(*(jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_box) for tree in abstract))
    boxes = {(path, box.value.shape): box for path, box in leaves if is_box(box)}

    def named(path, x):
        of = (boxes.get((path[start:], x.shape)) for start in range(len(path)))
        return next((box.replace_boxed(x) for box in of if box), x)

    return jax.tree_util.tree_map_with_path(named, jax.eval_shape(init, *nn.unbox(abstract)))


def placed(mesh: Mesh, boxed: Any, rules=TRAIN, dtype: Any = None) -> Any:
    """Shapes with their shardings, of (boxed) shapes with axis names; of a working copy in `dtype` where one is
    given."""
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
