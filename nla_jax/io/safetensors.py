"""Checkpoints in safetensors files, one tensor at a time: where each tensor is stored, reading it, writing many.

No host ever holds more than its own share of a model and one tensor (the library's own functions hold whole files).
"""

import dataclasses
import json
import math
import mmap
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from jaxtyping import Float
from safetensors import SafetensorError, safe_open

from nla_jax.io.files import checksum, fits_seal
from nla_jax.runtime.distributed import is_writer, share
from nla_jax.runtime.errors import InputError
from nla_jax.runtime.notes import note

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
INSIDE = "value_head.weight"  # how the name of an AR's head ends where it lies among the tensors of its model
SHARD_BYTES = 2 << 30  # of a saved file, at most
CHECKSUM, UNKNOWN = "nla_jax_crc32", "00000000"  # among a file's metadata; what stands there while it is computed
BESIDE = "nla_jax_beside"  # likewise: the checksums of the files that are written with it
SEALED = "sealed"  # among these, of a file that holds its own
LONGEST = 1 << 28  # bytes of a header that is worth reading
NewTensor = tuple[str, jax.ShapeDtypeStruct, Callable[[], np.ndarray]]  # to be saved: name, form, `read()` to the host


@dataclasses.dataclass(frozen=True)
class Stored:
    """Where the bytes of one tensor are. `dtype` is as the file says ("BF16"), or a NumPy dtype after `typed`."""

    file: Path
    name: str
    dtype: Any
    shape: tuple[int, ...]
    offset: int

    def typed(self) -> "Stored":
        """The tensor with its NumPy dtype. Raises `InputError` for a dtype that weights are not stored in."""
        if self.dtype not in DTYPES:
            found, known = f"tensor {self.name!r} is stored as {self.dtype}", ", ".join(DTYPES)
            raise InputError(f"{self.file}: {found}, expected one of {known}; quantised checkpoints are not supported.")
        return dataclasses.replace(self, dtype=DTYPES[self.dtype])

    def read(self, index: tuple[slice, ...] = ()) -> Float[np.ndarray, "..."]:
        """The tensor, or a part of it, as a view of the file; only the rows asked for are read."""
        if not math.prod(self.shape):
            return np.zeros(self.shape, self.dtype)[index]
        first, last, _ = index[0].indices(self.shape[0]) if index else (0, self.shape[0], 1)
        offset = self.offset + first * math.prod(self.shape[1:]) * np.dtype(self.dtype).itemsize
        data = np.memmap(self.file, self.dtype, "r", offset, (last - first, *self.shape[1:]))
        data._mmap.madvise(mmap.MADV_WILLNEED)
        return data[:, *index[1:]]


def read_tensors(file: Path) -> dict[str, Stored]:
    """The tensors of one file by name, each to be `read()`. Raises `InputError` if it is damaged."""
    return {tensor.name: tensor.typed() for tensor in _header(file)}


def stored_tensors(folder: str | os.PathLike) -> dict[str, Stored]:
    """Every tensor of a checkpoint folder by name, from the headers of its files alone. Raises `InputError` naming the
    file that is missing or damaged, an index that does not fit its files, or a tensor that occurs twice."""
    folder = Path(folder)
    index, listed = folder / INDEX, None
    if index.is_file():
        try:
            listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            files = sorted(set(listed.values()))
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError, UnicodeDecodeError) as error:
            raise InputError(f"{index} is not a valid checkpoint index ({error}).") from None
        for file in files:
            if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
                raise InputError(f"{index} names {file!r}, which is not a safetensors file of the same folder.")
    elif (folder / SINGLE).is_file():
        files = [SINGLE]
    else:
        shards = sorted(folder.glob("*.safetensors"))
        hint = f"; it has {shards[0].name}, whose index is missing" if shards else ""
        raise InputError(f"{folder} holds neither {SINGLE} nor {INDEX}{hint}.")
    found: dict[str, Stored] = {}
    for file in files:
        for tensor in _header(folder / file):
            if tensor.name in found:
                first = found[tensor.name].file.name
                raise InputError(f"{folder}: tensor {tensor.name!r} is duplicate: in {first} and {file}.")
            if listed is not None and listed.get(tensor.name) != file:
                raise InputError(f"{index} does not say that tensor {tensor.name!r} is in {file}, but it is.")
            found[tensor.name] = tensor
    if absent := sorted(set(listed or ()) - found.keys()):
        raise InputError(f"{index} says that tensor {absent[0]!r} is in {listed[absent[0]]}, but it is not.")
    return found


def _header(file: Path) -> Iterator[Stored]:
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
        yield Stored(file, name, entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])


def save_tensors(folder: Path, tensors: Iterable[NewTensor]) -> None:
    """Writes `model.safetensors`, or files of at most `SHARD_BYTES` with an index; the first one holds the checksums of
    the files that are in the folder already (see `check_bytes`). Raises `InputError` if it cannot. Of several hosts all
    must call this: all take part in reading each tensor, and each file is written by one of them."""
    files: list[list[NewTensor]] = [[]]
    room, total = SHARD_BYTES, 0
    for tensor in tensors:
        size = tensor[1].size * tensor[1].dtype.itemsize
        if size > room and files[-1]:
            files.append([])
            room = SHARD_BYTES
        files[-1].append(tensor)
        room, total = room - size, total + size
    many = len(files)
    names = [SINGLE] if many == 1 else [f"model-{i + 1:05d}-of-{many:05d}.safetensors" for i in range(many)]
    for i, (file, content) in enumerate(zip(names, files)):
        try:
            beside = {} if i else checksums_beside(folder)
            _write_file(folder / file if i in share(range(many)) else Path(os.devnull), content, beside)
        except OSError as error:
            raise InputError(f"{folder / file} cannot be written ({error}).") from None
    if many > 1 and is_writer():
        where = {name: file for file, content in zip(names, files) for name, *_ in content}
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n")


def write_file(file: Path, arrays: dict[str, np.ndarray]) -> None:
    """Writes a few arrays as one file, with the checksums of the files that are in its folder already."""
    tensors = [(name, jax.ShapeDtypeStruct(x.shape, x.dtype), lambda x=x: x) for name, x in arrays.items()]
    _write_file(file, tensors, checksums_beside(file.parent))


def checksums_beside(folder: Path) -> dict[str, str]:
    """The checksum of each file in a folder; `SEALED` for those that hold one of their own (so that a weights file does
    not depend on what a sidecar says of the place where it lies), none for weights."""
    files = [file for file in sorted(folder.iterdir()) if file.is_file() and file.suffix != ".safetensors"]
    return {file.name: SEALED if fits_seal(file.read_bytes()) else checksum(file) for file in files}


def _write_file(file: Path, tensors: list[NewTensor], beside: dict[str, str]) -> None:
    """One file: the header's length, the header, the tensors' bytes. The header's metadata hold a checksum of all
    other bytes, and those of some files `beside` it, by which `check_bytes` knows them again."""
    facts = {"format": "pt", CHECKSUM: UNKNOWN} | ({BESIDE: json.dumps(beside)} if beside else {})
    header, end = {"__metadata__": facts}, 0
    for name, form, _ in tensors:
        start, end = end, end + form.size * form.dtype.itemsize
        stored = next(key for key, value in DTYPES.items() if value == form.dtype)
        header[name] = {"dtype": stored, "shape": form.shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text = (len(text) + -len(text) % 8).to_bytes(8, "little") + text + b" " * (-len(text) % 8)
    with open(file, "wb") as stream:
        stream.write(text)
        value = zlib.crc32(text)
        for *_, read in tensors:
            part = np.ascontiguousarray(read()).reshape(-1).view(np.uint8)
            stream.write(part)
            value = zlib.crc32(part, value)
        if file != Path(os.devnull):
            stream.seek(text.index(UNKNOWN.encode()))
            stream.write(f"{value:08x}".encode())


def check_bytes(*folders: Path) -> tuple[int, int]:
    """Reads the weights files in some folders, and returns of how many it knows that they are whole: of those that this
    package has written. Says which of the files written with them (config, tokenizer, sidecar), which people may change
    on purpose, is another one by now, and returns how many are.

    Raises `InputError` naming the first weights file whose bytes are not those that were written."""
    known, other = 0, []
    for file in [file for folder in folders for file in sorted(folder.glob("*.safetensors"))]:
        with open(file, "rb") as stream:
            text = stream.read(8)
            text += stream.read(min(int.from_bytes(text, "little"), LONGEST))
            stated = re.search(rb'"%s": "(\w{8})"' % CHECKSUM.encode(), text)
            value = zlib.crc32(text[: stated.start(1)] + UNKNOWN.encode() + text[stated.end(1) :]) if stated else 0
            while stated and (block := stream.read(1 << 20)):
                value = zlib.crc32(block, value)
        if not stated:
            continue
        if stated[1] != f"{value:08x}".encode():
            raise InputError(
                f"{file} is damaged: its bytes are not those that were written; copy it again from where it is whole, "
                f"or delete its folder and have it made again."
            )
        known += 1
        other += _changed_beside(file, json.loads(json.loads(text[8:])["__metadata__"].get(BESIDE, "{}")))
    for path in dict.fromkeys(other):
        note(f"{path} has changed since it was written; if nobody has meant to, it is damaged: copy it again.")
    return known, len(other)


def _changed_beside(file: Path, beside: dict[str, str]) -> list[Path]:
    """Which of the files that were written with a weights file, and have these checksums, are others now, or gone."""
    now = lambda path: None if not path.is_file() else SEALED if fits_seal(path.read_bytes()) else checksum(path)
    return [path for name, made in beside.items() if now(path := file.with_name(name)) != made]
