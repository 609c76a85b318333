"""The input of users to a pair: checks of it, and the batches that programs take."""

import math
import numbers
import operator
from collections.abc import Iterable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Float
from numpy.typing import ArrayLike

from nla_jax.runtime.errors import InputError

LAST_ROW = 1 << 30
USUAL = 200  # new tokens: the limit where nobody gives another
LONGEST = 1 << 30  # tokens that a text may have, so that programs can count them
ATTENDED = 64 << 20  # pairs of positions that one program attends over, at most: 64 rows of 1024 tokens
FEW = 512  # tokens, padding included, that take less time than loading a program


def whole_number(name: str, value: Any, least: int, most: int | None = None) -> int:
    """`value` as an int. Raises `InputError` naming it where it is none from `least` to `most`."""
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or number < least or (most is not None and number > most):
        limits = f"of {least} or more" if most is None else f"from {least} to {most}"
        raise InputError(f"{name} {limits} is needed, a whole number; found {value!r:.50}.")
    return number


def yes_or_no(name: str, value: Any) -> bool:
    """`value` as a bool. Raises `InputError` naming it where it is none: "no" would count as yes."""
    if not isinstance(value, (bool, np.bool_)):
        raise InputError(f"{name} is True or False; found {value!r:.50}.")
    return bool(value)


def text_list(what: str, texts: Any) -> list[str]:
    """Some texts, of any kind of list. Raises `InputError`, saying that `what` takes one, where an entry is no text, or
    holds half of a character, which no tokenizer reads."""
    if isinstance(texts, (str, bytes)) or not isinstance(texts, Iterable):
        raise InputError(f"{what} a list of texts, even of a single one; found {texts!r:.50}.")
    for i, text in enumerate(texts := list(texts)):
        if not isinstance(text, str):
            raise InputError(f"{what} a list of texts; entry {i} is {text!r:.50}.")
        if not is_whole(text):
            raise InputError(f"{what} a list of texts; entry {i} holds half of a character: {ascii(text):.60}.")
    return texts


def is_whole(text: str) -> bool:
    """Whether a text has no half of a character (a lone surrogate), as badly cut JSON gives it: no tokenizer reads it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_finite(value: Any) -> bool:
    """Whether `value` is a number that a float can hold, which not every whole number is."""
    try:
        return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


def sampling_temperature(value: Any) -> float:
    """`value` as a float. Raises `InputError` where it is no finite number of 0 or more."""
    if not is_finite(value) or value < 0:
        raise InputError(f"Sampling needs a temperature of 0 or more, a finite number; found {value!r:.50}.")
    return float(value)


def sampling(max_new_tokens: Any, temperature: Any, seed: Any) -> tuple[int, float, int]:
    """What sampling needs, as numbers. Raises `InputError` for one out of range."""
    limit, seed = token_limit("max_new_tokens", max_new_tokens), whole_number("seed", seed, 0, (1 << 32) - 1)
    return limit, sampling_temperature(temperature), seed


def token_limit(name: str, value: Any) -> int:
    """How many tokens a text may have. Raises `InputError` for a number that programs cannot count to."""
    if (limit := whole_number(name, value, 1)) > LONGEST:
        raise InputError(f"{name} is more than {LONGEST}, the most tokens that a text may have; give a smaller number.")
    return limit


def row_number(first: Any) -> int:
    """The number of a row. Raises `InputError` for one that random keys cannot be made of."""
    if (first := whole_number("first", first, 0)) > LAST_ROW:
        raise InputError(f"first numbers rows up to {LAST_ROW}; found {first}.")
    return first


def of_class(name: str, value: Any, kind: type) -> None:
    """Raises `InputError` where `value` is of another class."""
    if not isinstance(value, kind):
        raise InputError(f"{name} must be of the class {kind.__name__}; found {value!r:.50}.")


def real_array(given: Any) -> np.ndarray | None:
    """`given` as an array of real numbers. None for what is none, of which NumPy would make numbers: dates, complex
    numbers, numerals."""
    try:
        found = np.asarray(given)
    except (TypeError, ValueError):
        return None
    # bfloat16 has a kind of its own.
    return found if found.dtype.kind in "fiub" or jnp.issubdtype(found.dtype, jnp.floating) else None


def of_ordinary_length(rows: Float[np.ndarray, "*n D"]) -> Float[np.ndarray, "*n D"]:
    """Rows in which those of an extreme length have an ordinary one, in float64 if there are any."""
    largest = np.abs(rows).max(-1, keepdims=True, initial=0)
    extreme = (largest > 0) & ((largest < 1e-3) | (largest > 1e15))
    if not extreme.any():
        return rows
    return np.where(extreme, rows.astype(np.float64) / np.where(extreme, largest, 1), rows)


def usable_rows(vectors: ArrayLike, shape: list[int], keeps_length: bool = False) -> Float[np.ndarray, "n *slots D"]:
    """Rows `[n, *shape]` of any real dtype as float32, in which their squares neither overflow nor vanish: rows of an
    extreme length get an ordinary one, which changes nothing where only the direction counts (not `keeps_length`).

    Raises `InputError` for what is no array of numbers, for another shape, and for a row that is not finite, or zero."""
    expected = ", ".join(map(str, ["n", *shape]))
    if (rows := real_array(vectors)) is None:
        raise InputError(f"Activations must be an array of numbers of shape [{expected}].")
    if list(rows.shape[1:]) != shape or rows.ndim < 2:
        raise InputError(f"Activations must be of shape [{expected}], found shape {list(rows.shape)}.")
    if rows.dtype not in (np.float32, np.float64):
        rows = rows.astype(np.float64)
    if not (finite := np.isfinite(rows).all(tuple(range(1, rows.ndim)))).all():
        raise InputError(f"Row {int(np.argmin(finite))} of the activations holds NaN or infinite values.")
    if not (some := rows.any(-1)).all():
        row = int(np.argwhere(~some)[0, 0])
        raise InputError(f"Row {row} of the activations is zero: it has no direction that could be explained.")
    rows = rows if keeps_length else of_ordinary_length(rows)
    with np.errstate(over="ignore"):
        rows = rows.astype(np.float32)
    if not np.isfinite(rows).all():
        raise InputError("The activations are too long for float32, and this pair injects them at their own length.")
    return rows


def similar_lengths(lengths: Sequence[int], batch: int) -> list[list[int]]:
    """Row numbers in groups of at most `batch` rows of similar length, shortest first, so that padding is small. Rows of
    few tokens in all are one group: a second program would take longer than their padding.

    The memory of attention grows with the square of the length: groups of long rows are smaller."""
    groups: list[list[int]] = []
    few = len(lengths) * max(lengths, default=0) <= FEW
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        group = groups[-1] if groups else []
        room = min(batch, max(1, ATTENDED // lengths[i] ** 2))
        if not group or len(group) >= room or (lengths[i] > 2 * lengths[group[0]] + 64 and not few):
            groups.append(group := [])
        group.append(i)
    return groups


def padded_rows(n: int, batch: int, mesh: Mesh | AbstractMesh) -> int:
    """How many rows a program computes for `n` of them: a power of two up to `batch`, so that there are few programs,
    and on a mesh a multiple of its devices."""
    rows, devices = min(batch, 1 << max(n - 1, 0).bit_length()), max(mesh.size, 1)
    return -(-rows // devices) * devices


def padded_limit(max_new_tokens: int) -> int:
    """The length for which a sampling program is compiled, given a limit: `USUAL` tokens, or that halved or doubled
    until the limit just fits. Limits that are near each other share a program."""
    length = USUAL
    while max_new_tokens <= length // 2 and length % 2 == 0:
        length //= 2
    while max_new_tokens > length:
        length *= 2
    return length
