"""Rotary position embeddings and the ways in which released models stretch them to longer texts."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


@dataclasses.dataclass(frozen=True)
class Rope:
    """Base and scaling of the rotary frequencies, as in the `rope_parameters` of a Hugging Face config.

    `kind`: "default"; "linear": frequencies divided by `factor` (Gemma 3); "llama3": wavelengths beyond
    `original_length / low` divided, those under `original_length / high` kept, a ramp between (Llama 3.1); "yarn": a
    ramp between the dimensions that turn `high` and `low` times in `original_length`, sines and cosines multiplied by
    `magnitude` (arXiv 2309.00071)."""

    theta: float = 10_000.0
    kind: str = "default"
    factor: float = 1.0
    original_length: int = 0
    low: float = 1.0
    high: float = 4.0
    magnitude: float = 1.0

    def frequencies(self, head_dim: int) -> Float[np.ndarray, "{head_dim}//2"]:
        """Radians per position of each pair of dimensions, float32."""
        exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
        plain = (1.0 / self.theta**exponent).astype(np.float32)
        if self.kind == "default":
            return plain
        if self.kind == "linear":
            return plain / np.float32(self.factor)
        if self.kind == "llama3":
            turns = self.original_length * plain / (2 * math.pi)
            kept = np.clip((turns - self.low) / (self.high - self.low), 0, 1)
        else:
            dimension = lambda turns: (
                head_dim * math.log(self.original_length / (turns * 2 * math.pi)) / (2 * math.log(self.theta))
            )
            first = max(math.floor(dimension(self.high)), 0)
            last = min(math.ceil(dimension(self.low)), head_dim - 1)
            kept = 1 - np.clip((np.arange(head_dim // 2) - first) / max(last - first, 1e-3), 0, 1)
        return (plain * kept + plain / self.factor * (1 - kept)).astype(np.float32)

    def tables(self, head_dim: int, positions: Int[Array, "T"]) -> Float[Array, "2 T {head_dim}//2"]:
        """Sine and cosine of the angles at `positions`, float32 (bfloat16 would round position 257 to 256)."""
        angles = positions[:, None].astype(jnp.float32) * self.frequencies(head_dim)
        return jnp.stack([jnp.sin(angles), jnp.cos(angles)]) * self.magnitude


def rotate(x: Float[Array, "B T N H"], table: Float[Array, "2 T H//2"]) -> Float[Array, "B T N H"]:
    """Rotary embedding in the half-split convention of Hugging Face checkpoints."""
    sin, cos = table[:, :, None, :]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1).astype(x.dtype)
