"""Batches as pure functions of (seed, step): the same on every mesh and after every restart, with no iterator state."""

import functools
from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Int

from nla_jax.models.sharding import RowsOf


@struct.dataclass
class TextBatch:
    """Right-padded rows of token ids; `lengths` counts the real tokens. `vectors` belong to the rows (if any do)."""

    tokens: Array  # [B, T]
    lengths: Array  # [B]
    vectors: Array | None = None  # [B, D]

    @property
    def mask(self) -> Bool[Array, "B T"]:
        """Which tokens are real."""
        return jnp.arange(self.tokens.shape[1]) < self.lengths[:, None]


def rows_of_step(n: int, batch: int, step: int, seed: int) -> np.ndarray:
    """The `batch` row numbers (of `n`) that step `step` (from 0) reads: consecutive pieces of one permutation an
    epoch."""
    places = np.arange(step * batch, (step + 1) * batch)
    return np.array([_permutation(n, seed, epoch)[place] for epoch, place in zip((places // n).tolist(), places % n)])


@functools.lru_cache(maxsize=4)
def _permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(n)


class LengthBatches:
    """Batches of rows of similar length, `lengths [n]`: as `rows_of_step`, but each epoch's permutation is sorted by
    length within windows of `WINDOW` batches, whose order is then shuffled. They have at most `widths` padded lengths,
    for each of which programs are compiled."""

    WINDOW = 32

    def __init__(self, lengths: np.ndarray, batch: int, seed: int, widths: int = 8):
        self.lengths, self.batch, self.seed, self.widths = lengths, batch, seed, widths
        self.order = functools.lru_cache(maxsize=2)(self._order)

    def rows(self, step: int) -> np.ndarray:
        """The row numbers of step `step` (from 0)."""
        n = len(self.lengths)
        places = np.arange(step * self.batch, (step + 1) * self.batch)
        return np.array([self.order(epoch)[place] for epoch, place in zip((places // n).tolist(), places % n)])

    def width(self, rows: np.ndarray) -> int:
        """The padded length of a batch: its longest row's, rounded up to a part of the longest of all rows and to a
        multiple of 8."""
        piece = -(-int(self.lengths.max()) // (8 * self.widths)) * 8
        return -(-int(self.lengths[rows].max()) // piece) * piece

    def _order(self, epoch: int) -> np.ndarray:
        """The rows of an epoch. The last batch of an epoch that the batch does not divide is completed by the next one's
        first rows: both are the longest of their windows, and all batches after them begin with a group of their own."""
        rows, n = _permutation(len(self.lengths), self.seed, epoch), len(self.lengths)
        rng = np.random.Generator(np.random.Philox(key=[self.seed, epoch + (1 << 32)]))
        head = min(-epoch * n % self.batch, n)
        ends = [*range(head + self.WINDOW * self.batch, n, self.WINDOW * self.batch), n]
        pieces = []
        for start, end in zip([0, *ends], ends):
            window = rows[start:end]
            window = window[np.argsort(self.lengths[window], kind="stable")]
            if start == 0:
                window, first = np.split(window, [len(window) - head])
                pieces.append(first)
            whole, rest = np.split(window, [len(window) // self.batch * self.batch])
            pieces += [rng.permutation(whole.reshape(-1, self.batch)).reshape(-1), rest]
        return np.concatenate(pieces)


def pad_tokens(
    rows: Sequence[Sequence[int]], length: int | None = None, multiple: int = 8
) -> tuple[np.ndarray, np.ndarray]:
    """Right-padded ids `[B, T]` (zeros behind each row) and lengths `[B]`; T is `length`, or the longest row rounded
    up."""
    lengths = np.array([len(row) for row in rows], np.int32)
    if length is None:
        length = -(-max(lengths.max(initial=1), 1) // multiple) * multiple
    tokens = np.zeros((len(rows), length), np.int32)
    for target, row in zip(tokens, rows):
        target[: len(row)] = row
    return tokens, lengths


def text_batches(
    tokens: Int[np.ndarray, "n T"],
    lengths: Int[np.ndarray, "n"],
    vectors: np.ndarray,
    kept: Int[np.ndarray, "n"],
    batch: int,
    seed: int,
    widths: int,
) -> Callable[[int], TextBatch]:
    """The batch of each step, of rows of similar length; row i of `tokens` belongs to row `kept[i]` of `vectors`."""
    batches = LengthBatches(lengths, batch, seed, widths)

    def of_step(step: int) -> TextBatch:
        rows = batches.rows(step)
        return TextBatch(tokens[rows, : batches.width(rows)], lengths[rows], RowsOf(vectors, kept[rows]))

    return of_step


def text_windows(tokens: np.ndarray, step: int, batch: int, length: int, seed: int) -> TextBatch:
    """`batch` windows of `length` tokens at random places of one long stream of token ids."""
    rng = np.random.Generator(np.random.Philox(key=[seed, step]))
    starts = rng.integers(0, len(tokens) - length + 1, batch)
    return TextBatch(tokens[starts[:, None] + np.arange(length)].astype(np.int32), np.full(batch, length, np.int32))
