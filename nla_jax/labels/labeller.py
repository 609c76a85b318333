"""What a labeller is: an object that writes an explanation of each activation's text, for the warm start.

A config names one by import path (`label.labeller`), and gives its settings (`label.settings`):

    class Loud:
        def __init__(self, mark="!"):
            self.mark = mark

        def label(self, rows):  # list[LabelRow] -> list[str], one text for each row
            return [row.text[-20:] + self.mark for row in rows]
"""

import dataclasses
import re
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from nla_jax.data.rows import TEXT
from nla_jax.io.files import AnyPath
from nla_jax.io.parquet import columns_of, read_table
from nla_jax.runtime.errors import InputError
from nla_jax.runtime.user_code import UserFunction, resolve
from nla_jax.runtime.user_input import is_whole

TAG = re.compile(r"</?explanation>")


@dataclasses.dataclass(frozen=True)
class LabelRow:
    """What a labeller sees of an activation. `role`: who speaks there, in a chat; "" elsewhere."""

    text: str  # the document up to and with the token
    token: str
    position: int  # of the token in its document, from 0
    role: str
    doc_id: str


@runtime_checkable
class Labeller(Protocol):
    """Anything with this method."""

    def label(self, rows: Sequence[LabelRow]) -> list[str]:
        """One explanation for each row."""


@dataclasses.dataclass(frozen=True)
class CheckedLabeller:
    """A user's labeller, whose answers are checked and whose errors name its file and line."""

    function: UserFunction
    labeller: Labeller

    def label(self, rows: Sequence[LabelRow]) -> list[str]:
        """One explanation for each row. Raises `InputError` where the labeller does not give that."""
        with self.function.blamed():
            labels = self.labeller.label(rows)
        if not isinstance(labels, (list, tuple)) or len(labels) != len(rows):
            found = f"{len(labels)} labels" if isinstance(labels, (list, tuple)) else type(labels).__name__
            raise InputError(
                f"{self.function} returns {found} for {len(rows)} rows; return a list with one text for each."
            )
        for row, text in zip(rows, labels):
            if not isinstance(text, str) or not text.strip() or not is_whole(text):
                raise InputError(
                    f"{self.function} returns {text!r} for token {row.position} of {row.doc_id!r}; return one non-empty "
                    f"text for each row."
                )
            if tag := TAG.search(text):
                raise InputError(
                    f"{self.function} returns a label with {tag[0]!r} for token {row.position} of {row.doc_id!r}; the tags are "
                    f"put around it later: leave them out."
                )
        return list(labels)


def make_labeller(path: str, settings: dict) -> CheckedLabeller:
    """The labeller that a config names, made with its settings. Raises `InputError` where that is not possible."""
    function = resolve(path, "label.labeller")
    labeller = function(**settings)
    if not callable(getattr(labeller, "label", None)):
        raise InputError(f"{function} makes a {type(labeller).__name__}, which has no method `label(rows)`.")
    return CheckedLabeller(function, labeller)


def rows_of(file: AnyPath) -> list[LabelRow]:
    """The rows of a shard as labellers see them."""
    there = [name for name in (TEXT, "token", "n_raw_tokens", "role", "doc_id") if name in columns_of(file)]
    rows = read_table(file, there).to_pylist()
    return [
        LabelRow(row[TEXT], row.get("token", ""), row["n_raw_tokens"] - 1, row.get("role", ""), row["doc_id"])
        for row in rows
    ]
