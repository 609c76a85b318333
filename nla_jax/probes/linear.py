"""What linear baselines and probes share: a ridge regression, and the documents on which its strength is chosen."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float

from nla_jax.data.corpus import document_of


def ridge(
    x: Float[np.ndarray, "n D"], y: Float[np.ndarray, "n C"], at: Float[np.ndarray, "m D"], penalty: float
) -> Float[np.ndarray, "m C"]:
    """Predictions at `at` of a ridge regression of `y` on `x`, both centred. `penalty`: as a share of the mean variance of
    the inputs, times rows."""
    center, mean = x.mean(0), y.mean(0)
    x = x - center
    gram = x.T @ x
    gram[np.diag_indices_from(gram)] += penalty * np.trace(gram) / len(gram) + 1e-12
    return (at - center) @ np.linalg.solve(gram, x.T @ (y - mean)) + mean


def set_aside(doc_ids: Sequence[str]) -> Bool[np.ndarray, "n"]:
    """The rows of a fifth of the documents, on which a setting is chosen; parts of a document stay together."""
    return np.unique([document_of(id) for id in doc_ids], return_inverse=True)[1] % 5 == 0
