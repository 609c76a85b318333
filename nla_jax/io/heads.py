"""The AR's linear head on disk: `value_head.safetensors`, whose `weight` is the transpose of how it acts here."""

import hashlib
from pathlib import Path

import numpy as np
from jaxtyping import Float

from nla_jax.io.adapters import WEIGHTS as ADAPTER_WEIGHTS
from nla_jax.io.safetensors import INDEX, INSIDE, SINGLE, Stored, read_tensors, stored_tensors, write_file
from nla_jax.runtime.errors import InputError
from nla_jax.runtime.notes import note

HEAD = "value_head.safetensors"
STAMP = "ar_head_hash"  # in the provenance of both sidecars


def read_head(ar: Path, d: int, width: int) -> Float[np.ndarray, "{d} {width}"]:
    """The head of the AR in a folder, as it acts here, `x @ head`: of a file of its own, or of the model's or adapter's.
    `width`: entries of what it rebuilds.

    Raises `InputError` where there is none, saying what there is, and for one that is not finite or does not fit."""
    files = [ar / HEAD, *sorted(ar.glob(f"*_{HEAD}")), ar.parent / f"{ar.name}_{HEAD}", ar.parent / f"ar_lora_{HEAD}"]
    inside = [] if any(file.is_file() for file in files) else _inside(ar)
    if inside:
        weight, file = inside[0], inside[0].file
    else:
        file = next((file for file in files if file.is_file()), files[0])
        tensors = read_tensors(file)
        found = ", ".join(f"{name!r} of shape {tensor.shape}" for name, tensor in sorted(tensors.items())[:4])
        weight = tensors.get("weight", tensors.get("value_head.weight"))
        if weight is None or len(tensors) > 1:
            reason = "no tensor 'weight'" if weight is None else "more than the tensor 'weight'"
            raise InputError(f"{file} holds {reason} ({found}), expected weight of shape {(width, d)} alone.")
    if weight.shape != (width, d):
        raise InputError(f"{file} holds weight of shape {weight.shape}, expected weight of shape {(width, d)}.")
    head = weight.read().T.astype(np.float32)
    if not np.isfinite(head).all():
        raise InputError(f"{file}: weight holds NaN or infinite values.")
    return np.ascontiguousarray(head)


def _inside(ar: Path) -> list[Stored]:
    """The heads among the tensors of the model or adapter in a folder."""
    if (ar / ADAPTER_WEIGHTS).is_file():
        tensors = read_tensors(ar / ADAPTER_WEIGHTS)
    elif any((ar / name).is_file() for name in (INDEX, SINGLE)):
        tensors = stored_tensors(ar)
    else:
        return []
    return [
        tensor.typed() if isinstance(tensor.dtype, str) else tensor
        for name, tensor in sorted(tensors.items())
        if name.endswith(INSIDE)
    ]


def write_head(file: Path, head: Float[np.ndarray, "D W"]) -> None:
    """Writes a head. Raises `InputError` for one that is not finite."""
    if not np.isfinite(head).all():
        raise InputError("The AR's head holds NaN or infinite values; it is not saved.")
    write_file(file, {"weight": np.ascontiguousarray(head.T)})


def stamped(provenance: dict, head: Float[np.ndarray, "D W"]) -> dict:
    """A sidecar's provenance with a hash of the AR's head: every step of training changes the head, so the hash says
    which AR an AV was saved with."""
    return provenance | {STAMP: _hash(head)}


def unstamped(provenance: dict, head: Float[np.ndarray, "D W"], av: Path, ar: Path) -> dict:
    """The provenance of `av` without that hash. A note says where it is of another head than that of `ar`."""
    if provenance.get(STAMP) not in (None, _hash(head)):
        note(f"{av} was saved with another AR than {ar}, from another step or run; this AR may read its texts worse.")
    return {name: value for name, value in provenance.items() if name != STAMP}


def _hash(head: Float[np.ndarray, "D W"]) -> str:
    return hashlib.blake2b(np.ascontiguousarray(head, np.float32), digest_size=16).hexdigest()
