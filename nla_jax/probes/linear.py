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


def logistic(
    x: Float[np.ndarray, "n D"], y: Float[np.ndarray, "n"], penalty: float = 1.0, steps: int = 50
) -> tuple[Float[np.ndarray, "D"], float]:
    """Weights and intercept of a logistic regression of `y` (0 or 1) on `x`, by Newton's method: they minimise
    Σ -log p(y) + penalty / 2 · ‖weights‖². The intercept is held by a tiny penalty, for `y` that are all equal."""
    x = np.concatenate([np.ones((len(x), 1)), x], axis=1)
    pull = np.full(x.shape[1], penalty)
    pull[0] = 1e-3
    weights = np.zeros(x.shape[1])
    for _ in range(steps):
        p = 1 / (1 + np.exp(-np.clip(x @ weights, -30, 30)))
        gradient = x.T @ (p - y) + pull * weights
        step = np.linalg.solve((x * (p * (1 - p))[:, None]).T @ x + np.diag(pull), gradient)
        weights = weights - np.clip(step, -5, 5)
        if np.abs(step).max() < 1e-8:
            break
    return weights[1:], float(weights[0])
