"""What a reconstruction is worth: one definition of normalise, mse, cosine, variance and FVE.

Training calls it with JAX arrays (float32), scoring with NumPy arrays (float64): the functions compute with whichever
library their input belongs to.
"""

import math
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike

from nla_jax.runtime.errors import InputError

Rows = Float[Any, "*B D"]  # arrays of NumPy or JAX


def normalise(x: Rows, scale: float | None = None) -> Rows:
    """`x` at length `scale` (default sqrt(D), so that the mean square is 1); a zero vector stays zero."""
    if isinstance(x, np.ndarray):
        x = x.astype(np.float64, copy=False)
        largest = np.abs(x).max(-1, keepdims=True, initial=0)
        if ((extreme := (largest > 1e100) | (largest < 1e-30)) & (largest > 0) & np.isfinite(largest)).any():
            x = np.where(extreme, x / np.where(largest > 0, largest, 1), x)  # else its squares are infinite or zero
    xp = x.__array_namespace__()
    if xp is not np:
        x = x.astype(np.float32)
    scale = x.shape[-1] ** 0.5 if scale is None else scale
    eps = 1e-12 if x.dtype == np.float32 else 1e-100  # inside the root: the gradient at zero stays finite
    return x * scale / xp.sqrt(xp.sum(x * x, axis=-1, keepdims=True) + eps)


def joined(x: Rows, layers: int) -> Rows:
    """Activations `[*B, W = L·D]` of several blocks, side by side, each at length sqrt(D): every block then counts the same,
    and `normalise` changes nothing. With one layer `x` as it is: training and scores normalise it themselves."""
    if layers == 1:
        return x
    return normalise(x.reshape(*x.shape[:-1], layers, x.shape[-1] // layers)).reshape(x.shape)


def lengths(vectors: Float[np.ndarray, "n ..."], layers: int) -> Float[np.ndarray, "n {layers}"]:
    """The length of activations at each layer, in float64."""
    size = math.prod(vectors.shape[1:]) // layers
    return np.linalg.norm(vectors.reshape(len(vectors), layers, size).astype(np.float64), axis=-1)


def mse(prediction: Rows, gold: Rows) -> Float[Any, "*B"]:
    """mean_D (p̂ - ĝ)² = 2(1 - cos), in [0, 4]: the reconstructor's loss, and minus the verbalizer's reward."""
    return ((normalise(prediction) - normalise(gold)) ** 2).mean(-1)


def cosine(a: Rows, b: Rows) -> Float[Any, "*B"]:
    """The cosine of each row of `a` with its row of `b`."""
    return (normalise(a) * normalise(b)).mean(-1)


def variance(gold: Float[Any, "n D"], baseline: str = "mean") -> Float[Any, ""]:
    """mean((ĝ - μ)²) over the normalised rows ĝ of `gold`, with μ their mean.

    `baseline` "mean" is canonical (the reference's `fve_nrm`): μ as it is. "meannorm" normalises μ; the FVE made with
    it reads 8 to 13 points higher."""
    unit = normalise(gold)
    mean = unit.mean(0)
    return ((unit - (normalise(mean) if baseline == "meannorm" else mean)) ** 2).mean()


def row_fve(recon: ArrayLike, vectors: ArrayLike, baseline: str = "mean") -> Float[np.ndarray, "n"]:
    """1 - mse_i / variance for each row, `[n]`; its mean is `fve`. `baseline`: see `variance`.

    Raises `InputError` where shapes differ and where the activations have no variance."""
    try:
        recon, vectors = np.asarray(recon), np.asarray(vectors)
        if (recon.dtype.kind + vectors.dtype.kind).strip("fiubV"):  # bfloat16 is of kind V
            raise TypeError("no real numbers")
        recon, vectors = recon.astype(np.float64), vectors.astype(np.float64)
    except (TypeError, ValueError):
        raise InputError("FVE needs two arrays of numbers, reconstructions and activations [n, d].") from None
    if recon.shape != vectors.shape or vectors.ndim != 2 or len(vectors) < 2:
        raise InputError(
            f"FVE needs two or more rows of equal width; found reconstructions {recon.shape} for activations "
            f"{vectors.shape}."
        )
    if not (np.isfinite(recon).all() and np.isfinite(vectors).all()):
        raise InputError(
            "FVE needs reconstructions and activations that are finite; these hold NaN or infinite values."
        )
    if baseline not in ("mean", "meannorm"):
        raise InputError(f"baseline must be 'mean' or 'meannorm', not {baseline!r}.")
    spread = variance(vectors, baseline)
    if not spread > 1e-12:
        raise InputError("FVE needs activations that differ and are finite; these have no variance to explain.")
    return 1 - mse(recon, vectors) / spread


def fve(recon: ArrayLike, vectors: ArrayLike, baseline: str = "mean") -> float:
    """Fraction of variance explained: 1 - mean((p̂-ĝ)²) / mean((ĝ-μ)²) over the rows of `recon` and `vectors` [n, d].

    See `row_fve` for what it raises."""
    return float(row_fve(recon, vectors, baseline).mean())
