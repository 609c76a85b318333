"""Hugging Face folders in and out, tensor by tensor: no host ever holds more than its own share and one tensor.

What the tensors of each model family are called is in models/families.py. Only safetensors are read; nothing in a checkpoint
is executed.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import mmap
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding
from safetensors import SafetensorError, safe_open
from transformers import CONFIG_MAPPING, AutoTokenizer, PreTrainedTokenizerBase

from nla_jax.io.files import local, path_to, reaching, upload
from nla_jax.models.families import (
    CONSTANTS,
    FAMILIES,
    OTHER_TOWERS,
    TEXT_PREFIXES,
    Tensor,
    from_hf,
    tensors_of,
    to_hf,
)
from nla_jax.models.transformer import TransformerConfig, abstract_params
from nla_jax.runtime.distributed import barrier, from_writer, is_writer, share, to_host
from nla_jax.runtime.errors import InputError, first_line

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
SHARD_BYTES = 2 << 30  # of a saved file


def read_config(folder: str | os.PathLike, dtype: Any = jnp.float32) -> TransformerConfig:
    """`config.json` as a `TransformerConfig`; of a multimodal checkpoint the text model's.

    Raises `InputError` as `model_config` does, and where there is no such file."""
    file = Path(folder) / "config.json"
    if not file.is_file():
        raise InputError(f"{folder} is not a model folder: it has no config.json.")
    try:
        architecture = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{file} is not valid JSON ({error}).") from None
    return model_config(architecture, str(file), dtype)


def model_config(c: dict, source: str, dtype: Any = jnp.float32) -> TransformerConfig:
    """The content of a `config.json` as a `TransformerConfig`; `source` names it in messages.

    Raises `InputError` for an unknown family, an unsupported feature, a missing or malformed field."""
    try:
        # What the text model's part does not say, the wrapper does (transformers reads the tied head there).
        outer = {name: c[name] for name in ("model_type", "tie_word_embeddings") if name in c}
        c = outer | (c.get("text_config") or c)
        family = str(c.get("model_type"))
    except (AttributeError, TypeError) as error:
        raise InputError(f"{source} is not valid JSON of a model ({error}).") from None
    family = {"gemma3": "gemma3_text"}.get(family, family)
    if family not in FAMILIES:
        raise InputError(
            f"{source}: model_type {family!r} is not supported (supported: {', '.join(FAMILIES)}); "
            f"a family is added in nla_jax/models/families.py."
        )
    if absent := {"hidden_size", "num_hidden_layers", "intermediate_size"} - c.keys():
        raise InputError(f"{source} lacks the field {min(absent)!r}.")
    try:
        # transformers knows each family's defaults (which hub files leave out) and every spelling of rope and layer types.
        full = CONFIG_MAPPING[family](**{k: v for k, v in c.items() if k != "model_type"}).to_dict()
        return TransformerConfig(**from_hf(full), dtype=jnp.dtype(dtype))
    except Exception as error:  # its validation raises many kinds
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise InputError(f"{source} cannot be used: {reason}.") from None


@dataclasses.dataclass(frozen=True)
class _Stored:
    """Where the bytes of one tensor are."""

    file: Path
    name: str
    dtype: Any
    shape: tuple[int, ...]
    offset: int

    def read(self, index: tuple[slice, ...] = ()) -> np.ndarray:
        """The tensor, or a part of it, as a view of the file; nothing beyond its rows is read."""
        if not math.prod(self.shape):
            return np.zeros(self.shape, self.dtype)[index]
        first, last, _ = index[0].indices(self.shape[0]) if index else (0, self.shape[0], 1)
        offset = self.offset + first * math.prod(self.shape[1:]) * np.dtype(self.dtype).itemsize
        data = np.memmap(self.file, self.dtype, "r", offset, (last - first, *self.shape[1:]))
        data._mmap.madvise(mmap.MADV_WILLNEED)
        return data[:, *index[1:]]


def stored_tensors(folder: str | os.PathLike) -> dict[str, _Stored]:
    """Every tensor of a checkpoint folder by name, from the headers of its files (nothing else is read).

    Raises `InputError` naming the file that is missing or damaged, an index that does not fit its files, or a tensor that
    occurs twice."""
    folder = Path(folder)
    index, single = folder / INDEX, folder / SINGLE
    listed = None
    if index.is_file():
        try:
            listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            files = sorted(set(listed.values()))
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError, UnicodeDecodeError) as error:
            raise InputError(f"{index} is not a valid checkpoint index ({error}).") from None
        for file in files:
            if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
                raise InputError(f"{index} names {file!r}, which is not a safetensors file of the same folder.")
    elif single.is_file():
        files = [SINGLE]
    else:
        shards = sorted(folder.glob("*.safetensors"))
        hint = f"; it has {shards[0].name}, whose index is missing" if shards else ""
        raise InputError(f"{folder} holds neither {SINGLE} nor {INDEX}{hint}.")
    found: dict[str, _Stored] = {}
    for file in files:
        for tensor in _header(folder / file):
            if tensor.name in found:
                raise InputError(
                    f"{folder}: tensor {tensor.name!r} is duplicate: in {found[tensor.name].file.name} and {file}."
                )
            if listed is not None and listed.get(tensor.name) != file:
                raise InputError(f"{index} does not say that tensor {tensor.name!r} is in {file}, but it is.")
            found[tensor.name] = tensor
    if absent := sorted(set(listed or ()) - found.keys()):
        raise InputError(f"{index} says that tensor {absent[0]!r} is in {listed[absent[0]]}, but it is not.")
    return found


def _header(file: Path) -> Iterator[_Stored]:
    try:
        with safe_open(file, framework="np"):  # checks the header against the file's length
            pass
        with open(file, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{file} is missing or is not a readable safetensors file ({error}).") from None
    header.pop("__metadata__", None)
    for name, entry in header.items():
        yield _Stored(file, name, entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])


def _text_tensors(folder: Path) -> dict[str, _Stored]:
    """The tensors of the text model, under the names of a text-only checkpoint."""
    found = {}
    for name, tensor in stored_tensors(folder).items():
        if name.startswith(OTHER_TOWERS) or name.endswith(CONSTANTS):
            continue
        for prefix, plain in TEXT_PREFIXES.items():
            if name.startswith(prefix):
                name = plain + name.removeprefix(prefix)
                break
        if name in found:
            raise InputError(f"{folder}: tensor {name!r} is duplicate: as {found[name].name!r} and as {tensor.name!r}.")
        found[name] = _typed(tensor)
    return found


def _typed(tensor: _Stored) -> _Stored:
    """The tensor with its NumPy dtype. Raises `InputError` for a dtype that weights are not stored in."""
    if tensor.dtype not in DTYPES:
        raise InputError(
            f"{tensor.file}: tensor {tensor.name!r} is stored as {tensor.dtype}, expected one of {', '.join(DTYPES)}; "
            f"quantised checkpoints are not supported."
        )
    return dataclasses.replace(tensor, dtype=DTYPES[tensor.dtype])


def read_tensors(file: Path) -> dict[str, _Stored]:
    """The tensors of one safetensors file by name, each to be `read()`. Raises `InputError` where it is damaged."""
    return {tensor.name: _typed(tensor) for tensor in _header(file)}


def load_params(
    folder: str | os.PathLike,
    config: TransformerConfig,
    *,
    truncated: bool = False,
    dtype: Any = jnp.float32,
    layout: Any = None,
) -> dict:
    """The parameters of a checkpoint in `dtype`, each tensor read straight into its place: `layout` is the tree of their
    shardings (`sharding.shardings`; None: the default device). Hosts read only what their devices hold.

    `config.layers` may be smaller than the checkpoint's (the first blocks are read); `truncated` leaves out final norm and
    head. Raises `InputError` naming the tensor that is missing, unexpected, duplicate, of the wrong shape or dtype or not
    finite, or the unreadable file."""
    folder = Path(folder)
    stored, full = _text_tensors(folder), read_config(folder)
    if surplus := sorted(stored.keys() - {name for name, *_ in _rows(full)} - {"lm_head.weight"}):
        raise InputError(
            f"{folder}: tensor {stored[surplus[0]].name!r} is unexpected in a {full.family} of {full.layers} blocks."
        )
    rows = list(_rows(config, truncated))
    if absent := sorted({name for name, *_ in rows} - stored.keys()):
        raise InputError(f"{folder}: tensor {absent[0]!r} is missing ({len(absent)} missing in all).")

    shapes = nn.unbox(abstract_params(config, truncated))
    places = layout if layout is not None else jax.tree.map(lambda _: None, shapes)
    tree: dict = jax.tree.map(lambda _: None, shapes)
    finite = {}
    for name, tensor, layer in rows:
        *parents, leaf = tensor.path
        target, shape, place = (functools.reduce(dict.get, parents, x) for x in (tree, shapes, places))
        whole, slot = target[leaf], shape[leaf].shape[layer is not None :]
        source, sharding = stored[name], place[leaf]
        if source.shape != (expected := _hf_shape(tensor, slot)):
            raise InputError(f"{source.file}: tensor {source.name!r} has shape {source.shape}, expected {expected}.")
        if whole is None and layer is not None:
            whole = _zeros(shape[leaf].shape, dtype, sharding)
        part = _place(source, _hf_sharding(tensor, slot, sharding))
        value, finite[name] = _convert(part, slot, tensor.linear, dtype, _slot_sharding(sharding, layer))
        target[leaf] = value if layer is None else _insert(whole, value, layer)
        target[leaf].block_until_ready()  # else the parts of many tensors would be under way at once
    for name, good in jax.device_get(finite).items():
        if not good:
            raise InputError(f"{stored[name].file}: tensor {stored[name].name!r} holds NaN or infinite values.")
    return tree


def _rows(config: TransformerConfig, truncated: bool = False) -> Iterator[tuple[str, Tensor, int | None]]:
    """(HF name, table entry, layer or None) of every tensor that a checkpoint of this config holds."""
    for tensor in tensors_of(config, truncated):
        for layer in range(config.layers) if "{layer}" in tensor.hf else [None]:
            yield tensor.hf.format(layer=layer), tensor, layer


def _inputs(tensor: Tensor, rank: int) -> int:
    """How many leading axes of our tensor are inputs of a linear map: all but one for the attention's output projection."""
    return rank - 1 if tensor.path[-2:-1] == ("o",) else 1


def _hf_shape(tensor: Tensor, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The stored shape of a tensor that is `shape` in our tree: `[out, in]` of a linear map, `[out]` of a bias."""
    if tensor.linear:
        n = _inputs(tensor, len(shape))
        return math.prod(shape[n:]), math.prod(shape[:n])
    return (math.prod(shape),) if tensor.path[-1] == "bias" else shape


def _hf_sharding(tensor: Tensor, shape: tuple[int, ...], sharding: Sharding | None) -> Sharding | None:
    """The sharding of the stored tensor under which each device reads just what it will hold."""
    if not isinstance(sharding, NamedSharding):
        return sharding
    spec = (tuple(sharding.spec) + (None,) * 9)[tensor.path[0] == "blocks" :][: len(shape)]
    if not tensor.linear:
        return NamedSharding(sharding.mesh, PartitionSpec(spec[0], *(spec[1:] if tensor.path[-1] != "bias" else ())))
    n = _inputs(tensor, len(shape))
    return NamedSharding(
        sharding.mesh, PartitionSpec(spec[n], spec[0])
    )  # heads before head_dim: the leading axis is cut


def _slot_sharding(sharding: Sharding | None, layer: int | None) -> Sharding | None:
    """The sharding of one layer of an array that is stacked over the layers."""
    if not isinstance(sharding, NamedSharding) or layer is None:
        return sharding
    return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))


def _place(source: _Stored, sharding: Sharding | None) -> jax.Array:
    if sharding is None:
        return jax.device_put(source.read())
    return jax.make_array_from_callback(source.shape, sharding, source.read)


@functools.lru_cache(maxsize=None)
def _zeros_program(shape, dtype, sharding):
    return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)


def _zeros(shape, dtype, sharding) -> jax.Array:
    return _zeros_program(shape, jnp.dtype(dtype), sharding)()


@functools.lru_cache(maxsize=None)
def _convert_program(slot, linear, dtype, sharding):
    convert = lambda part: ((part.T if linear else part).astype(dtype).reshape(slot), jnp.isfinite(part).all())
    return jax.jit(convert, out_shardings=(sharding, None))


def _convert(part, slot, linear, dtype, sharding) -> tuple[jax.Array, jax.Array]:
    """`part` transposed, cast and laid out as it is in our tree, and whether all of it is finite."""
    return _convert_program(slot, linear, jnp.dtype(dtype), sharding)(part)


# A program of its own: fused into the update, XLA's CPU backend transposes element by element, ten times slower.
@functools.partial(jax.jit, donate_argnums=0)
def _insert(whole, value, layer):
    """`value` as layer `layer` of `whole`, in place."""
    return jax.lax.dynamic_update_index_in_dim(whole, value, layer, 0)


def save_model(
    folder: str | os.PathLike,
    params: dict,
    config: TransformerConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    truncated: bool = False,
    dtype: Any = np.float32,
    end_ids: tuple[int, ...] = (),
    extra_files: dict[str, Callable[[Path], None]] | None = None,
) -> None:
    """Writes an ordinary HF folder, tensor by tensor; it appears under its name only once it is complete. All hosts must call
    this; each writes its share of the weights' files. `end_ids`: tokens that end a generation beside the tokenizer's own.
    `extra_files` maps further file names to `callable(path)` writers (the sidecar, the AR's head)."""
    with new_folder(folder) as scratch:
        save_tensors(scratch, _hf_tensors(params, config, truncated, jnp.dtype(dtype)))
        if not is_writer():
            return
        ends = [i for i in dict.fromkeys([tokenizer.eos_token_id, *end_ids]) if i is not None]
        ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": ends[0] if len(ends) == 1 else ends or None}
        write = lambda name, content: (scratch / name).write_text(json.dumps(content, indent=1) + "\n")
        write("config.json", to_hf(config) | ids | {"torch_dtype": jnp.dtype(dtype).name})
        write("generation_config.json", {"_from_model_config": True} | ids)
        save_tokenizer(tokenizer, scratch)
        for name, writer in (extra_files or {}).items():
            writer(scratch / name)


@contextlib.contextmanager
def new_folder(folder: str | os.PathLike) -> Iterator[Path]:
    """A scratch folder that takes the place of `folder` when the block ends without an error, on all hosts where there are
    several. On a bucket, where no folder can be renamed, each host uploads from a scratch folder of its own: a kill meanwhile
    leaves a part of the new one."""
    if not isinstance(folder := path_to(folder), Path):
        with tempfile.TemporaryDirectory() as scratch:
            yield Path(scratch)
            if is_writer() and folder.exists():
                with reaching(folder):
                    folder.rmtree()
            barrier(f"a new {folder.name}")
            upload(Path(scratch), folder)
        barrier(f"{folder.name} in place")
        return
    scratch = folder.with_name(folder.name + ".incomplete")
    if is_writer():
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
    barrier(f"a new {folder.name}")
    yield scratch
    barrier(f"the end of {folder.name}")
    if is_writer():
        _take_place(scratch, folder)
    barrier(f"{folder.name} in place")


def _take_place(scratch: Path, folder: Path) -> None:
    previous = folder.with_name(folder.name + ".previous")
    shutil.rmtree(previous, ignore_errors=True)
    if folder.exists():
        folder.rename(previous)  # at every moment one of the two is there, whole
    scratch.rename(folder)
    shutil.rmtree(previous, ignore_errors=True)


def _hf_tensors(
    params, config, truncated, dtype
) -> Iterator[tuple[str, tuple[int, ...], Any, Callable[[], np.ndarray]]]:
    """(name, shape, dtype, read) of each tensor to write; `read()` brings it to the host."""
    for name, tensor, layer in _rows(config, truncated):
        whole = functools.reduce(dict.get, tensor.path, params)
        slot = whole.shape[layer is not None :]
        shape = _hf_shape(tensor, slot)

        def read(whole=whole, layer=layer, shape=shape, linear=tensor.linear):
            value = whole if layer is None else whole[layer]
            return to_host(_export(value, shape, linear, dtype))

        yield name, shape, dtype, read


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _export(value, shape, linear, dtype):
    return (value.reshape(shape[::-1]).T if linear else value.reshape(shape)).astype(dtype)


def save_tensors(folder: Path, tensors: Iterator[tuple[str, tuple[int, ...], Any, Callable[[], np.ndarray]]]) -> None:
    """Writes tensors as `model.safetensors`, or as files of at most `SHARD_BYTES` with an index, one tensor in memory at a
    time. Raises `InputError` where a file cannot be written. Of several hosts all must call this, and all take part in reading
    each tensor, but each file is written by one."""
    files: list[list] = [[]]
    room = SHARD_BYTES
    total = 0
    for tensor in tensors:
        size = math.prod(tensor[1]) * np.dtype(tensor[2]).itemsize
        if size > room and files[-1]:
            files.append([])
            room = SHARD_BYTES
        files[-1].append(tensor)
        room, total = room - size, total + size
    names = (
        [SINGLE]
        if len(files) == 1
        else [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    )
    for i, (name, content) in enumerate(zip(names, files)):
        try:
            _write_file(folder / name if i in share(range(len(files))) else Path(os.devnull), content)
        except OSError as error:
            raise InputError(f"{folder / name} cannot be written ({error}).") from None
    if len(files) > 1 and is_writer():
        where = {tensor[0]: name for name, content in zip(names, files) for tensor in content}
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n")


def _write_file(file: Path, tensors: list) -> None:
    """One safetensors file: the header's length, the header, the tensors' bytes. (The library's own writer wants all of the
    tensors in memory, twice.)"""
    header: dict = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape, dtype, _ in tensors:
        start, end = end, end + math.prod(shape) * np.dtype(dtype).itemsize
        stored = next(key for key, value in DTYPES.items() if value == dtype)
        header[name] = {"dtype": stored, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for *_, read in tensors:
            stream.write(np.ascontiguousarray(read()).reshape(-1).view(np.uint8))


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
        raise InputError(f"{folder}: its tokenizer cannot be loaded ({first_line(error)}).") from None


def locate(name: str | os.PathLike) -> Path:
    """The local folder of a model: a folder as given, a copy of one on a bucket, or a hub id (`org/name`,
    `org/name@revision`) fetched once."""
    if path_to(name).is_dir():
        return local(name)
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
        raise InputError(f"{name} is neither a folder nor a model that the hub gives ({first_line(error)}).") from None


def fingerprint(folder: str | os.PathLike) -> str:
    """A hash of the weights and config of a checkpoint (or a PEFT adapter), for recording what a run was based on. Of several
    hosts, which must all call this, only the first one reads the files."""
    return from_writer(lambda: _hash(local(folder)))


def _hash(folder: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    files = [folder / "adapter_config.json", folder / "adapter_model.safetensors"]
    if not files[0].is_file():
        files = [folder / "config.json", *sorted({tensor.file for tensor in stored_tensors(folder).values()})]
    for file in files:
        with open(file, "rb") as stream:
            while block := stream.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()
