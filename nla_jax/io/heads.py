"""The AR's linear head on disk: `value_head.safetensors`, whose `weight` is the transpose of how it acts here."""

from pathlib import Path

import numpy as np
from jaxtyping import Float
from safetensors.numpy import save_file

from nla_jax.io.safetensors import read_tensors
from nla_jax.runtime.errors import InputError

HEAD = "value_head.safetensors"


def read_head(file: Path, d: int) -> Float[np.ndarray, "{d} {d}"]:
    """The head as it acts here, `x @ head`. Raises `InputError` where the file holds no such head, or one that is not
    finite."""
    weight = read_tensors(file).get("weight")
    if weight is None or weight.shape != (d, d):
        found = "no tensor 'weight'" if weight is None else f"weight of shape {weight.shape}"
        raise InputError(f"{file} holds {found}, expected weight of shape {(d, d)}.")
    head = weight.read().T.astype(np.float32)
    if not np.isfinite(head).all():
        raise InputError(f"{file}: weight holds NaN or infinite values.")
    return np.ascontiguousarray(head)


def write_head(file: Path, head: Float[np.ndarray, "D D"]) -> None:
    """Writes a head. Raises `InputError` for one that is not finite."""
    if not np.isfinite(head).all():
        raise InputError("The AR's head holds NaN or infinite values; it is not saved.")
    save_file({"weight": np.ascontiguousarray(head.T)}, file)
