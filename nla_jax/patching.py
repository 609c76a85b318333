"""Causal patches: what a subject expects next when its residual stream is replaced at some positions.

    acts = nla.extract(subject, texts, positions=-1)
    clean, patched = nla.patch(subject, acts.token_ids, "last", {"clean": None, "recon": recon}).values()

Blocks 0..K run once for a batch of rows, whatever the number of conditions. So do the blocks above over all tokens before
the first patched one; each condition runs them over the remaining tokens only, which read the keys and values of the
others.
"""

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from numpy.typing import ArrayLike

from nla_jax.models.transformer import KeyValues, Transformer
from nla_jax.runtime.errors import InputError
from nla_jax.runtime.user_input import of_ordinary_length, padded_rows, real_array, whole_number, yes_or_no
from nla_jax.subject import ROWS, Subject, at_positions, check_ids, indices, on_mesh, residual_batch

MULTIPLE = 64  # tokens before a patch are padded to a multiple of it, so that few programs are compiled


def patch(
    subject: Subject,
    token_rows: Sequence[Sequence[int]],
    positions: Any,
    vectors: ArrayLike | Mapping[str, ArrayLike | None],
    *,
    rescale: bool = True,
    batch: int = ROWS,
) -> list[Float[np.ndarray, "_S V"]] | dict[str, list[Float[np.ndarray, "_S V"]]]:
    """Runs the whole subject over rows of token ids, with the residual stream after block `subject.layer` replaced.

    `positions`: "last", or for each row an index or several (a span), negative ones from its end. `vectors` [n, D]: one
    for each of these positions, row after row. To compare several replacements, give a mapping of names to arrays; the
    name of the unpatched run has None. `rescale` gives each vector the length of the activation that it replaces. `batch`:
    rows that are read at a time.

    Returns for each row the log-probabilities of the next token `[S, V]`, float32, from its first patched position to its
    end: entry 0 is what the first patched token predicts. For a mapping: a mapping of such lists. They are large; for
    figures alone see `effects`.

    The subject's remaining blocks and its head are read when they are first needed (`Subject.whole`).

    Raises `InputError` for positions that a row does not have, token ids that the subject does not know, and vectors of
    another number, width or kind, not finite, or zero where they are to be rescaled."""
    named = vectors if isinstance(vectors, Mapping) else {"": vectors}
    task = _task(subject, token_rows, positions, named, rescale, batch)
    found: dict[str, list] = {name: [None] * len(task.rows) for name in named}
    for chunk in _chunks(task):
        for name in named:
            for i, logprobs, length in zip(chunk.numbers, np.asarray(chunk.logprobs(name)), chunk.lengths):
                found[name][i] = logprobs[:length]
    return found if isinstance(vectors, Mapping) else found[""]


@dataclasses.dataclass(frozen=True)
class Effect:
    """What a patch does, for each row an array `[S]` in nats: from its first patched position to its end."""

    kl: list[np.ndarray]  # KL(unpatched || patched) of the next token's distributions
    loss: list[np.ndarray]  # -log p of the token that comes next in the row; NaN at its end, where none does


def effects(
    subject: Subject,
    token_rows: Sequence[Sequence[int]],
    positions: Any,
    vectors: Mapping[str, ArrayLike | None],
    *,
    rescale: bool = True,
    batch: int = ROWS,
) -> dict[str, Effect]:
    """What each of several patches does to the next-token distribution; arguments as those of `patch`."""
    task = _task(subject, token_rows, positions, vectors, rescale, batch)
    found = {name: Effect([np.zeros(0)] * len(task.rows), [np.zeros(0)] * len(task.rows)) for name in vectors}
    for chunk in _chunks(task):
        clean = chunk.logprobs(None)
        for name in vectors:
            kl, loss = map(np.asarray, _compare(clean, chunk.logprobs(name), chunk.following))
            for j, (i, length) in enumerate(zip(chunk.numbers, chunk.lengths)):
                found[name].kl[i] = kl[j, :length]
                found[name].loss[i] = np.where(np.arange(length) < length - 1, loss[j, :length], np.nan)
    return found


@dataclasses.dataclass(frozen=True)
class _Task:
    """Checked arguments. `places`: indices from 0 of each row; `starts`: where a row's vectors begin in `vectors`."""

    subject: Subject
    rows: list[list[int]]
    places: list[list[int]]
    starts: np.ndarray
    vectors: dict[str, np.ndarray | None]
    rescale: bool
    batch: int


def _task(
    subject: Subject,
    token_rows: Sequence[Sequence[int]],
    positions: Any,
    vectors: Mapping[str, ArrayLike | None],
    rescale: bool,
    batch: int,
) -> _Task:
    rescale, batch = yes_or_no("rescale", rescale), whole_number("batch", batch, 1)
    if isinstance(token_rows, (str, bytes)) or not isinstance(token_rows, Iterable):
        raise InputError(f"token_rows must be a list of rows of token ids; found {token_rows!r:.50}.")
    rows = [_ids(row, i) for i, row in enumerate(token_rows)]
    batch = min(batch, max(ROWS, 1 << max(len(rows) - 1, 0).bit_length()))  # no room for rows that are not there
    check_ids(subject, rows, [f"row {i}" for i in range(len(rows))])
    chosen = [-1] * len(rows) if isinstance(positions, str) and positions == "last" else positions
    if isinstance(chosen, str) or not isinstance(chosen, (Sequence, np.ndarray)) or len(chosen) != len(rows):
        raise InputError(f"positions must be 'last', or an index or indices for each of {len(rows)} rows.")
    places = [indices(given, len(row)) for given, row in zip(chosen, rows)]
    if empty := [i for i, given in enumerate(places) if not given]:
        raise InputError(f"Row {empty[0]} has no position to patch; give at least one, or leave the row out.")
    counts = list(map(len, places))
    shape = (sum(counts), subject.model.config.width)
    checked = {
        name: None if given is None else _checked(name, given, shape, rescale) for name, given in vectors.items()
    }
    return _Task(subject, rows, places, np.cumsum([0, *counts]), checked, rescale, batch)


def _ids(row: Any, number: int) -> list[int]:
    found = real_array(row)
    if found is None or found.ndim != 1 or not found.size or found.dtype.kind not in "iu" or found.min() < 0:
        raise InputError(f"Row {number} must be a list of token ids, at least one; found {row!r:.50}.")
    return found.tolist()


def _checked(name: str, given: ArrayLike, shape: tuple[int, int], rescale: bool) -> Float[np.ndarray, "n D"]:
    """Vectors as float32 `[n, D]`."""
    of = f"The vectors {name!r}" if name else "The vectors"
    if (found := real_array(given)) is None:
        raise InputError(f"{of} must be an array of numbers of shape {list(shape)}.")
    if found.shape != shape:
        raise InputError(
            f"{of} have shape {list(found.shape)}, expected {list(shape)}: one for each position, row after row."
        )
    found = found.astype(np.float64)
    if np.isfinite(found).all():
        with np.errstate(over="ignore"):
            found = (of_ordinary_length(found) if rescale else found).astype(np.float32)
    if not np.isfinite(found).all():
        raise InputError(f"{of} hold NaN or infinite values.")
    if rescale and not found.any(1).all():
        raise InputError(f"{of} hold a zero vector, which has no direction; pass rescale=False to patch it as it is.")
    return found


@dataclasses.dataclass(frozen=True)
class _Chunk:
    """Rows that run together. `hidden [B, T, D]`: after block K; `first [B]`: their first patched positions, before
    which `past` has the keys and values `[.., P, H]`; `span`: from there so many tokens are computed."""

    task: _Task
    numbers: list[int]
    lengths: list[int]  # tokens of each row from its first patched position on
    hidden: Array
    first: np.ndarray
    past: list[KeyValues]
    following: np.ndarray  # [B, span], the token that comes next in the row; 0 behind its end

    def logprobs(self, name: str | None) -> Float[Array, "B S V"]:
        """Log-probabilities of the next token under the condition `name` (None: nothing is patched)."""
        task, span = self.task, self.following.shape[1]
        places, given = [task.places[i] for i in self.numbers], None if name is None else task.vectors[name]
        states = at_positions(self.hidden, places)
        if given is not None:
            news = [given[task.starts[i] : task.starts[i + 1]] for i in self.numbers]
            states = [resized(new, own) for new, own in zip(news, states)] if task.rescale else news
        most = max(map(len, places))
        at = np.full((len(self.hidden), most), span, np.int32)
        vectors = np.zeros((*at.shape, self.hidden.shape[-1]), np.float32)
        for j, (place, state) in enumerate(zip(places, states)):
            at[j, : len(place)], vectors[j, : len(place)] = np.array(place) - self.first[j], state
        model, params = task.subject.rest
        with on_mesh(task.subject):
            return _predict(model, params, self.hidden, self.first, self.past, at, vectors, span)


def resized(vectors: Float[np.ndarray, "n D"], like: Float[np.ndarray, "n D"]) -> Float[np.ndarray, "n D"]:
    """`vectors` at the lengths of the rows of `like`; a row that is equal there stays as it is, to the last bit."""
    own, new = (np.sqrt(np.square(x, dtype=np.float64).sum(1, keepdims=True)) for x in (like, vectors))
    return (vectors * (own / new)).astype(np.float32)


def _chunks(task: _Task) -> Iterator[_Chunk]:
    """The rows in batches of similar length, their common part computed."""
    model, params = task.subject.rest
    starts, lengths = (
        np.array([min(place) for place in task.places], int),
        np.array([len(row) for row in task.rows], int),
    )
    order = np.lexsort((lengths - starts, starts)).tolist()
    for begin in range(0, len(order), task.batch):
        numbers = order[begin : begin + task.batch]
        rows = [task.rows[i] for i in numbers]
        with on_mesh(task.subject) as mesh:
            count = padded_rows(len(rows), task.batch, mesh)
            hidden = residual_batch(task.subject, rows, max(task.batch, count))[:count]
            first = np.zeros(count, np.int32)
            first[: len(rows)] = starts[numbers]
            width = MULTIPLE * max(1, -(-int(first.max()) // MULTIPLE))
            past = _read(model, params, hidden, first, width)
        after = [row[start:] for row, start in zip(rows, first)]
        span = 1 << (max(map(len, after)) - 1).bit_length()
        following = np.zeros((count, span), np.int32)
        for target, ids in zip(following, after):
            target[: len(ids) - 1] = ids[1:]
        yield _Chunk(task, numbers, list(map(len, after)), hidden, first, past, following)


@functools.partial(jax.jit, static_argnums=(0, 4))
def _read(
    model: Transformer,
    params: dict,
    hidden: Float[Array, "B T D"],
    first: Int[Array, "B"],
    width: int,
) -> list[KeyValues]:
    """Keys and values of the tokens before the `first` patched one, at the right end of `width` columns."""
    x = _columns(hidden, jnp.arange(width) - width + first[:, None])
    return model.apply({"params": params}, [x.astype(model.config.dtype)], real=_real(first, width))[1]


def _real(first: Int[Array, "B"], width: int) -> Bool[Array, "B {width}"]:
    """Which of the columns before the `first` patched token are no padding."""
    return jnp.arange(width) >= width - first[:, None]


@functools.partial(jax.jit, static_argnums=(0, 7))
def _predict(
    model: Transformer,
    params: dict,
    hidden: Float[Array, "B T D"],
    first: Int[Array, "B"],
    past: list[KeyValues],
    at: Int[Array, "B m"],
    vectors: Float[Array, "B m D"],
    span: int,
) -> Float[Array, "B {span} V"]:
    """Log-probabilities of the next token after each of `span` tokens from the `first` patched one on, with `vectors` in
    the places `at` (counted from there; `span`: nowhere)."""
    x = _columns(hidden, jnp.arange(span) + first[:, None])
    x = x.at[jnp.arange(len(x))[:, None], at].set(vectors, mode="drop").astype(model.config.dtype)
    width = jax.tree.leaves(past)[0].shape[-2]
    (x,), _ = model.apply({"params": params}, [x], past=past, start=width, real=_real(first, width))
    logits = model.apply({"params": params}, x, method="logits")
    return jax.nn.log_softmax(logits)[..., : model.config.vocab_size]


def _columns(hidden: Float[Array, "B T D"], index: Int[Array, "B n"]) -> Float[Array, "B n D"]:
    """The states at some positions of each row; where there is no such position, any other's."""
    return jnp.take_along_axis(hidden, jnp.clip(index, 0, hidden.shape[1] - 1)[..., None], axis=1)


@jax.jit
def _compare(
    clean: Float[Array, "B S V"], patched: Float[Array, "B S V"], following: Int[Array, "B S"]
) -> tuple[Float[Array, "B S"], Float[Array, "B S"]]:
    """KL(clean || patched), and -log p of the following token."""
    kl = jnp.sum(jnp.exp(clean) * (clean - patched), -1)
    return kl, -jnp.take_along_axis(patched, following[..., None], -1)[..., 0]
