"""Model folders of Hugging Face in and out: config, weights and tokenizer.

What the tensors of each model family are called is in models/families.py. Only safetensors are read; nothing in a
folder is executed. No host ever holds more than its own share of a model and one tensor.
"""

import functools
import json
import math
import mmap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import NamedSharding, PartitionSpec, Sharding
from jaxtyping import Array, Bool, Float, Shaped
from tokenizers import Tokenizer, models
from transformers import CONFIG_MAPPING, AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from nla_jax.io.files import AnyName, new_folder
from nla_jax.io.safetensors import DTYPES, INSIDE, NewTensor, Stored, save_tensors, stored_tensors
from nla_jax.models import families
from nla_jax.models.transformer import TransformerConfig, abstract_params, projections
from nla_jax.models.views import ByLayer
from nla_jax.runtime.distributed import is_writer, to_host
from nla_jax.runtime.errors import InputError, first_line


def read_config(folder: AnyName, dtype: Any = jnp.float32) -> TransformerConfig:
    """The config in `config.json`, as `model_config` reads it. Raises `InputError` also if there is no such file."""
    file = Path(folder) / "config.json"
    if not file.is_file():
        raise InputError(f"{folder} is not a model folder: it has no config.json.")
    try:
        architecture = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{file} is not valid JSON ({error}).") from None
    return model_config(architecture, str(file), dtype)


def model_config(c: Any, source: str, dtype: Any = jnp.float32) -> TransformerConfig:
    """The content of a `config.json` (if multimodal: its text model) as a `TransformerConfig`; `source` names it in
    messages. Raises `InputError` for an unknown family, an unsupported feature, a missing or malformed field."""
    try:
        # A multimodal config may set these two in its outer part only (`transformers` reads the tied head there).
        outer = {name: c[name] for name in ("model_type", "tie_word_embeddings") if name in c}
        c = outer | (c.get("text_config") or c)
        family = str(c.get("model_type"))
    except (AttributeError, TypeError) as error:
        raise InputError(f"{source} is not valid JSON of a model ({error}).") from None
    family = {"gemma3": "gemma3_text"}.get(family, family)
    if family not in families.FAMILIES:
        raise InputError(
            f"{source}: model_type {family!r} is not supported (supported: {', '.join(families.FAMILIES)}); "
            f"a family is added in nla_jax/models/families.py."
        )
    if absent := {"hidden_size", "num_hidden_layers", "intermediate_size"} - c.keys():
        raise InputError(f"{source} lacks the field {min(absent)!r}.")
    try:
        # transformers knows each family's defaults, which hub files leave out, and all spellings of rope and layers.
        full = CONFIG_MAPPING[family](**{k: v for k, v in c.items() if k != "model_type"}).to_dict()
        return TransformerConfig(**families.from_hf(full), dtype=jnp.dtype(dtype))
    except Exception as error:  # its validation raises many kinds
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise InputError(f"{source} cannot be used: {reason}.") from None


def is_wrapped(folder: AnyName | None) -> bool:
    """Whether a folder's model is the text part of a multimodal one, as `transformers` loads it."""
    file = Path(folder) / "config.json" if folder else None
    return bool(file and file.is_file() and "text_config" in json.loads(file.read_text(encoding="utf-8")))


def load_params(
    folder: AnyName,
    config: TransformerConfig,
    *,
    truncated: bool = False,
    dtype: Any = jnp.float32,
    scales: Any = None,
    layout: Any = None,
) -> dict:
    """The parameters of a checkpoint in `dtype` (those of norms in `scales`, if that is given), each tensor read
    straight into its place: `layout` is the tree of
    their shardings (`sharding.shardings`; None: the default device). Hosts read only what their devices hold.

    `config.layers` may be smaller than the checkpoint's (the first blocks are read); `truncated` leaves out final norm
    and head. Raises `InputError` naming the unreadable file, or the tensor that is missing, unexpected or unusable."""
    stored, rows, shapes = _checked(Path(folder), config, truncated)
    if layout is None and jax.default_backend() == "cpu":
        return _read_to_memory(stored, rows, shapes, lambda path: _kept(path, dtype, scales))
    places = flatten_dict(layout) if layout is not None else dict.fromkeys(shapes)
    arrays, finite = {}, {}
    for name, tensor, layer in rows:
        path, source = tensor.path, stored[name]
        shape, sharding = shapes[path], places[path]
        slot = shape[layer is not None :]
        kept = _kept(path, dtype, scales)
        if layer is not None and path not in arrays:
            arrays[path] = _zeros(shape, kept, sharding)()
        if isinstance(sharding, NamedSharding):
            spec = (*sharding.spec, *[None] * len(shape))[layer is not None :]
            sharding = NamedSharding(sharding.mesh, PartitionSpec(*spec[: len(slot)]))
        part = _placed(source, _hf_axes(tensor, config, len(slot)), sharding)
        value, finite[name] = _converted(slot, tensor.linear, kept, sharding)(part)
        arrays[path] = value if layer is None else _insert(arrays[path], value, layer)
        arrays[path].block_until_ready()  # else the parts of many tensors would be on their way at once
    for name, good in jax.device_get(finite).items():
        if not good:
            raise InputError(_not_finite(stored[name]))
    return unflatten_dict(arrays)


def _read_to_memory(stored: dict[str, Stored], rows: list, shapes: dict, kept: Callable) -> dict:
    """`load_params` where the device is a CPU: the arrays are filled in this process's memory, which the device shares,
    and no program is compiled. A program that such an array is donated to copies it first."""
    arrays = {path: _room(shape, kept(path)) for path, shape in shapes.items()}
    for name, tensor, layer in rows:
        source, whole = stored[name], arrays[tensor.path]
        value, place = source.read(), whole if layer is None else whole[layer]
        value = (value.T if tensor.linear else value).reshape(place.shape)
        value = np.asarray(jax.device_put(value))  # JAX lays out a transposed view four times as fast as NumPy
        if not _all_finite(value):
            raise InputError(_not_finite(source))
        with np.errstate(all="ignore"):  # of a cast to fewer bits
            np.copyto(place, value, casting="unsafe")
    return unflatten_dict(jax.device_put(arrays))


def _room(shape: tuple[int, ...], dtype: np.dtype) -> Shaped[np.ndarray, "..."]:
    """An array in pages of its own: it begins at a multiple of 64 bytes, so that the CPU device takes it without a copy, and
    its memory goes back to the system with it. NumPy's own arrays ask for huge pages, for which the system may have to
    move others first: half a second for 256 MB."""
    size = math.prod(shape) * dtype.itemsize
    pages = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return np.frombuffer(pages, dtype, math.prod(shape)).reshape(shape)


def _all_finite(x: Float[np.ndarray, "..."]) -> bool:
    """Whether no number is NaN or infinite: those have the largest exponent, so that their bits, sign aside, are at least
    infinity's. Read as signed integers the positive numbers are in their order, as unsigned ones the negative numbers."""
    signed, unsigned = (np.dtype(f"{kind}{x.itemsize}") for kind in "iu")
    infinity = np.array([np.inf, -np.inf], x.dtype)
    return not x.size or bool(
        x.view(signed).max() < infinity.view(signed)[0] and x.view(unsigned).max() < infinity.view(unsigned)[1]
    )


def _not_finite(source: Stored) -> str:
    """What a user reads of a tensor that cannot be used."""
    return f"{source.file}: tensor {source.name!r} holds NaN or infinite values."


def open_params(
    folder: AnyName, config: TransformerConfig, *, truncated: bool = False, dtype: Any = jnp.float32, scales: Any = None
) -> dict:
    """The tree of `load_params` with a `ByLayer` for each array: every tensor is read when it is asked for, and is
    checked then to be finite. The other checks are made now, and raise the same errors."""
    stored, rows, shapes = _checked(Path(folder), config, truncated)
    sources = {(tensor.path, layer): (tensor, stored[name]) for name, tensor, layer in rows}

    def array(path: tuple[str, ...]) -> ByLayer:
        kept = _kept(path, dtype, scales)

        def read(layer: int | None) -> Float[Array, "..."]:
            tensor, source = sources[path, layer]
            slot = shapes[path][layer is not None :]
            part = _placed(source, _hf_axes(tensor, config, len(slot)), None)
            value, finite = _converted(slot, tensor.linear, kept, None)(part)
            if not finite:
                raise InputError(_not_finite(source))
            return value

        return ByLayer(shapes[path], kept, read)

    return unflatten_dict({path: array(path) for path in shapes})


def _kept(path: tuple[str, ...], dtype: Any, scales: Any) -> np.dtype:
    """In which dtype a parameter is held."""
    return jnp.dtype(scales if scales and path[-1] == "scale" else dtype)


def _checked(folder: Path, config: TransformerConfig, truncated: bool) -> tuple[dict, list, dict]:
    """The stored tensors of a checkpoint, the rows of `families.tensors_of`, and the shapes of our tree by path.

    Raises `InputError` where the three do not fit together."""
    stored, full = _text_tensors(folder), read_config(folder)
    if surplus := sorted(stored.keys() - {name for name, *_ in families.tensors_of(full)} - {"lm_head.weight"}):
        raise InputError(
            f"{folder}: tensor {stored[surplus[0]].name!r} is unexpected in a {full.family} of {full.layers} blocks."
        )
    rows = list(families.tensors_of(config, truncated))
    if absent := sorted({name for name, *_ in rows} - stored.keys()):
        raise InputError(f"{folder}: tensor {absent[0]!r} is missing ({len(absent)} missing in all).")
    shapes = {path: s.shape for path, s in flatten_dict(nn.unbox(abstract_params(config, truncated))).items()}
    for name, tensor, layer in rows:
        source, expected = stored[name], _hf_shape(tensor, config, shapes[tensor.path][layer is not None :])
        if source.shape != expected:
            raise InputError(f"{source.file}: tensor {source.name!r} has shape {source.shape}, expected {expected}.")
    return stored, rows, shapes


def dtypes_of(folder: Path, asked: Any) -> tuple[np.dtype, np.dtype]:
    """In which dtype a folder's weights are held, and in which they compute. Raises `InputError` for one that is no
    floating point."""
    if asked is None:
        stored = stored_dtype(folder)
        stored = stored if stored.itemsize <= 4 else np.dtype(np.float32)
        return stored, np.dtype(np.float32) if stored == np.float16 else stored
    return floating_dtype(asked), floating_dtype(asked)


def floating_dtype(asked: Any) -> np.dtype:
    """A dtype by its name. Raises `InputError` for one that weights are not stored in."""
    try:
        dtype = jnp.dtype(asked)
    except TypeError:
        dtype = None
    if dtype not in DTYPES.values():
        raise InputError(
            f"Weights are held as floating point numbers, such as bfloat16 or float32, not as {asked!s:.50}."
        )
    return dtype


def stored_dtype(folder: AnyName) -> np.dtype:
    """The dtype in which most of a checkpoint's bytes are stored."""
    bytes_of: dict[np.dtype, int] = {}
    for tensor in _text_tensors(Path(folder)).values():
        dtype = np.dtype(tensor.dtype)
        bytes_of[dtype] = bytes_of.get(dtype, 0) + math.prod(tensor.shape) * dtype.itemsize
    return max(bytes_of, key=bytes_of.get)


def _text_tensors(folder: Path) -> dict[str, Stored]:
    """The tensors of the text model, under the names of a text-only checkpoint."""
    found = {}
    for name, tensor in stored_tensors(folder).items():
        if name.startswith(families.OTHER_TOWERS) or name.endswith((*families.CONSTANTS, INSIDE)):
            continue
        for prefix, plain in families.TEXT_PREFIXES.items():
            if name.startswith(prefix):
                name = plain + name.removeprefix(prefix)
                break
        if name in found:
            raise InputError(f"{folder}: tensor {name!r} is duplicate: as {found[name].name!r} and as {tensor.name!r}.")
        found[name] = tensor.typed()
    return found


def _hf_axes(tensor: families.Tensor, config: TransformerConfig, rank: int) -> list[range]:
    """For each axis of a stored tensor, which of our `rank` axes (without the layers') it joins."""
    if tensor.linear:
        n = len(projections(config)[tensor.path[1]].inputs) if tensor.path[0] == "blocks" else 1
        return [range(n, rank), range(n)]
    return [range(rank)] if tensor.path[-1] == "bias" else [range(i, i + 1) for i in range(rank)]


def _hf_shape(tensor: families.Tensor, config: TransformerConfig, slot: tuple[int, ...]) -> tuple[int, ...]:
    """The stored shape of a tensor that has the shape `slot` in our tree."""
    return tuple(math.prod(slot[i] for i in joined) for joined in _hf_axes(tensor, config, len(slot)))


def _placed(source: Stored, axes: list[range], sharding: Sharding | None) -> Shaped[Array, "..."]:
    """A stored tensor on the devices, each reading only what it will hold under `sharding` in our tree."""
    if sharding is None:
        return jax.device_put(source.read())
    if isinstance(sharding, NamedSharding):
        # Of several axes that are joined the first may be cut: heads come before head_dim.
        sharding = NamedSharding(sharding.mesh, PartitionSpec(*(sharding.spec[joined[0]] for joined in axes)))
    return jax.make_array_from_callback(source.shape, sharding, source.read)


@functools.cache
def _zeros(shape: tuple[int, ...], dtype: np.dtype, sharding: Sharding | None) -> Callable:
    """A compiled program that makes an array of zeros."""
    return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)


@functools.cache
def _converted(slot: tuple[int, ...], linear: bool, dtype: np.dtype, sharding: Sharding | None) -> Callable:
    """A compiled program: a stored tensor transposed, cast and laid out as in our tree, and whether it is finite."""
    convert = lambda part: ((part.T if linear else part).astype(dtype).reshape(slot), jnp.isfinite(part).all())
    return jax.jit(convert, out_shardings=(sharding, None))


# A program of its own: fused with the conversion, it makes XLA's CPU backend transpose by element, ten times slower.
@functools.partial(jax.jit, donate_argnums=0)
def _insert(whole: Array, value: Array, layer: int | Array) -> Array:
    """`value [*slot]` as one layer of `whole [L, *slot]`, in place."""
    return jax.lax.dynamic_update_index_in_dim(whole, value, layer, 0)


def save_model(
    folder: AnyName,
    params: dict,
    config: TransformerConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    truncated: bool = False,
    dtype: Any = np.float32,
    end_ids: tuple[int, ...] = (),
    extra_files: dict[str, Callable[[Path], None]] | None = None,
) -> None:
    """Writes an ordinary HF folder, tensor by tensor; it appears under its name once it is complete.

    `end_ids`: tokens that end a generation, besides the tokenizer's own. `extra_files`: further file names, each with a
    `callable(path)` that writes it. All hosts must call this; each writes its share of the weights."""
    with new_folder(folder) as scratch:
        if is_writer():  # before the weights, among which their checksums are kept
            ends = [i for i in dict.fromkeys([tokenizer.eos_token_id, *end_ids]) if i is not None]
            ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": ends[0] if len(ends) == 1 else ends or None}
            write = lambda name, content: (scratch / name).write_text(json.dumps(content, indent=1) + "\n")
            write("config.json", families.to_hf(config) | ids | {"torch_dtype": jnp.dtype(dtype).name})
            write("generation_config.json", {"_from_model_config": True} | ids)
            save_tokenizer(tokenizer, scratch)
            for name, writer in (extra_files or {}).items():
                writer(scratch / name)
        save_tensors(scratch, _new_tensors(params, config, truncated, jnp.dtype(dtype)))


def _new_tensors(params: dict, config: TransformerConfig, truncated: bool, dtype: np.dtype) -> Iterator[NewTensor]:
    """The tensors of a model, to be written in `dtype`."""
    arrays = flatten_dict(params)
    for name, tensor, layer in families.tensors_of(config, truncated):
        whole = arrays[tensor.path]
        shape = _hf_shape(tensor, config, whole.shape[layer is not None :])

        def read(name=name, whole=whole, layer=layer, shape=shape, linear=tensor.linear):
            value, finite = _export(whole[() if layer is None else layer], shape, linear, dtype)
            if not jax.device_get(finite):
                raise InputError(f"Tensor {name!r} holds NaN or infinite values in {dtype.name}; it is not saved.")
            return to_host(value)

        yield name, jax.ShapeDtypeStruct(shape, dtype), read


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _export(
    value: Float[Array, "..."], shape: tuple[int, ...], linear: bool, dtype: np.dtype
) -> tuple[Float[Array, "..."], Bool[Array, ""]]:
    """An array of our tree as it is stored, and whether it is finite."""
    stored = (value.reshape(shape[::-1]).T if linear else value.reshape(shape)).astype(dtype)
    return stored, jnp.isfinite(stored).all()


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """The tokenizer's files, readable by `transformers` 4 too: version 5 writes a class name that 4 does not know."""
    tokenizer.save_pretrained(folder)
    file = Path(folder) / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    if settings.get("tokenizer_class") in (None, "TokenizersBackend"):
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    for name in ("is_local", "local_files_only"):  # say how this process loaded it: not a property of the tokenizer
        settings.pop(name, None)
    if isinstance(settings.get("extra_special_tokens"), list):  # version 5's name; version 4 has another
        settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    file.write_text(json.dumps(settings, indent=1, ensure_ascii=False) + "\n")


def load_tokenizer(folder: AnyName) -> PreTrainedTokenizerBase:
    """The checkpoint's own tokenizer. Raises `InputError` if the folder has none that can be read."""
    options = {"trust_remote_code": False, "local_files_only": True}
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), **options)
        if not _cuts_as_its_file(tokenizer, Path(folder) / "tokenizer.json"):
            tokenizer = PreTrainedTokenizerFast.from_pretrained(str(folder), **options)
        return tokenizer
    except Exception as error:  # many kinds, by tokenizer class
        raise InputError(f"{folder}: its tokenizer cannot be loaded ({first_line(error)}).") from None


def _cuts_as_its_file(tokenizer: PreTrainedTokenizerBase, file: Path) -> bool:
    """Whether a tokenizer normalises and splits text as its tokenizer.json says.

    transformers 5 rebuilds these two by the class that tokenizer_config.json names, which may be another model's:
    SmolLM2's says GPT2Tokenizer."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not file.is_file():
        return True
    parts = {"normalizer", "pre_tokenizer"}
    stored = {name: part for name, part in json.loads(file.read_text(encoding="utf-8")).items() if name in parts}
    bare = json.loads(Tokenizer(models.BPE()).to_str()) | stored
    state = lambda part: None if part is None else part.__getstate__()
    theirs = Tokenizer.from_str(json.dumps(bare))
    return all(state(getattr(theirs, name)) == state(getattr(backend, name)) for name in parts)
