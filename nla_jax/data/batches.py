"""Batches as pure functions of (seed, step): the same on every mesh and after every restart, with no iterator state."""

import functools
from collections.abc import Sequence

import numpy as np

from nla_jax.train_step import TextBatch


def rows_of_step(n: int, batch: int, step: int, seed: int) -> np.ndarray:
    """The `batch` row numbers (of `n`) that step `step` (from 0) reads: consecutive pieces of one permutation an epoch."""
    places = np.arange(step * batch, (step + 1) * batch)
    return np.array([_permutation(n, seed, epoch)[place] for epoch, place in zip(places // n, places % n)])


@functools.lru_cache(maxsize=4)
def _permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(n)


def pad_tokens(
    rows: Sequence[Sequence[int]], length: int | None = None, multiple: int = 8
) -> tuple[np.ndarray, np.ndarray]:
    """Right-padded ids `[B, T]` (zeros behind each row) and lengths `[B]`; T is `length`, or the longest row rounded up."""
    lengths = np.array([len(row) for row in rows], np.int32)
    if length is None:
        length = -(-max(lengths.max(initial=1), 1) // multiple) * multiple
    tokens = np.zeros((len(rows), length), np.int32)
    for target, row in zip(tokens, rows):
        target[: len(row)] = row
    return tokens, lengths


def text_windows(tokens: np.ndarray, step: int, batch: int, length: int, seed: int) -> TextBatch:
    """`batch` windows of `length` tokens at random places of one long stream of token ids."""
    rng = np.random.Generator(np.random.Philox(key=[seed, step]))
    starts = rng.integers(0, len(tokens) - length + 1, batch)
    return TextBatch(tokens[starts[:, None] + np.arange(length)].astype(np.int32), np.full(batch, length, np.int32))
