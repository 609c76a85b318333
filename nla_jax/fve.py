"""Fraction of variance explained: the canonical definition, its intervals, and nothing else."""

from collections.abc import Sequence

import numpy as np

from nla_jax.runtime.errors import InputError


def normalised(x: np.ndarray) -> np.ndarray:
    """Rows at length sqrt(d), float64."""
    x = np.asarray(x, np.float64)
    return x * np.sqrt(x.shape[-1]) / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def row_fve(recon: np.ndarray, vectors: np.ndarray, baseline: str = "mean") -> np.ndarray:
    """1 - mse_i / variance for each row, `[n]`; its mean is `fve`.

    variance = mean((ĝ-μ)²) over all rows with μ the mean of the normalised golds ĝ: not normalised itself for the canonical
    baseline "mean" (reference `fve_nrm`), normalised for "meannorm", which reads 8-13 points higher. Raises `InputError` where
    shapes differ and where the activations have no variance."""
    p, g = normalised(recon), normalised(vectors)
    if p.shape != g.shape or g.ndim != 2 or len(g) < 2:
        raise InputError(
            f"FVE needs two or more rows of equal width; found reconstructions {p.shape} for activations {g.shape}."
        )
    mean = g.mean(0)
    if baseline == "meannorm":
        mean = normalised(mean)
    elif baseline != "mean":
        raise InputError(f"baseline must be 'mean' or 'meannorm', not {baseline!r}.")
    variance = ((g - mean) ** 2).mean()
    if not variance > 1e-12:
        raise InputError("FVE needs activations that differ and are finite; these have no variance to explain.")
    return 1 - ((p - g) ** 2).mean(1) / variance


def fve(recon: np.ndarray, vectors: np.ndarray, baseline: str = "mean") -> float:
    """1 - mean((p̂-ĝ)²) / mean((ĝ-μ)²) over the rows of `recon` and `vectors [n, d]`; see `row_fve`."""
    return float(row_fve(recon, vectors, baseline).mean())


def clustered_interval(
    scores: np.ndarray, clusters: Sequence[str], level: float = 0.95, draws: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Bootstrap interval of the mean of `scores [n]`, whole clusters (documents) redrawn, since the positions of one document
    are not independent. The variance in the scores' denominator is held fixed."""
    _, member = np.unique(np.asarray(clusters), return_inverse=True)
    sums, counts = np.bincount(member, weights=scores), np.bincount(member)
    drawn = np.random.default_rng(seed).integers(0, len(sums), (draws, len(sums)))
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
