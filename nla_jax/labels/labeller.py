"""What a labeller is: an object that writes an explanation of each activation's text, for the warm start.

A config names one by import path (`label.labeller`), and gives its settings (`label.settings`):

    class Loud:
        def __init__(self, mark="!"):
            self.mark = mark

        def label(self, rows):  # list[LabelRow] -> list[str], one text for each row
            return [row.text[-20:] + self.mark for row in rows]

Its answers are checked, kept in a cache, and not asked for again. It may return a `NoLabel` for a row. What suits it is
read from these attributes, all of which it may leave out:

    batch = 256       # rows that `label` is given at a time, unless `label.batch` says it
    concurrency = 1   # calls of `label` at a time, each in a thread, unless `label.concurrency` says it
    reads = ("text",) # fields of a row on which its label depends (default: all): rows that agree in them share one
    version = "2"     # changes whenever the same settings would give other labels
    connects = ()     # fields of a dataclass that say how a model is reached, not what it answers

    def ready(self): ...           # before the first stage: raises `InputError` where it could not work (no key, say)
    def work_in(self, folder): ... # a folder of its own in the working folder, which outlives a kill
    def prompt(self, row): ...     # the text that it sends for a row, and `max_tokens`, the longest answer:
                                   # what `nla label --dry-run` counts

A labeller that writes by a formula may also read what is written so, and check it against a row:

    def claims(self, text): ...    # -> list[Claim]
    def true(self, claim, row): ...  # -> bool
    def without(self, text, claim): ...  # -> str, the text without this claim (default: without its value)
    def ready_for(self, rows): ...   # before many calls of `true`: computes together what they need
"""

import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

from nla_jax import config
from nla_jax.data.activations import IDS, TEXT
from nla_jax.io.files import AnyPath
from nla_jax.io.parquet import columns_of, read_table, row_count
from nla_jax.runtime.environment import VERSION
from nla_jax.runtime.errors import InputError
from nla_jax.runtime.user_code import UserFunction, resolve
from nla_jax.runtime.user_input import is_whole, whole_number

TAG = re.compile(r"</?explanation>")
BATCH = 256


@dataclasses.dataclass(frozen=True)
class LabelRow:
    """What a labeller sees of an activation. `role`: who speaks there, in a chat; "" elsewhere."""

    text: str  # the document up to and with the token
    token: str
    position: int  # of the token in its document, from 0
    role: str
    doc_id: str
    token_ids: tuple[int, ...] = ()  # of the document up to and with the token; none where they are not known


class Claim(NamedTuple):
    """One thing that a label says of its text. A labeller that writes by a formula may read its claims back (`claims`),
    and check them against a row (`true`)."""

    kind: str
    value: str


FIELDS = tuple(field.name for field in dataclasses.fields(LabelRow))


@dataclasses.dataclass(frozen=True)
class NoLabel:
    """What a labeller returns for a row that it has no label of. The warm start leaves such rows out."""

    why: str  # a word or two, by which such rows are counted: "refused"
    detail: str = ""  # what a message may add
    paid: bool = True  # False: nothing was paid for it, and the next run asks again


Label = str | NoLabel


@runtime_checkable
class Labeller(Protocol):
    """Anything with this method."""

    def label(self, rows: Sequence[LabelRow]) -> list[Label]:
        """One explanation for each row."""


@dataclasses.dataclass(frozen=True)
class CheckedLabeller:
    """A labeller whose answers are checked, and whose errors name its file and line."""

    function: UserFunction
    labeller: Labeller
    settings: dict  # which determine its labels

    def label(self, rows: Sequence[LabelRow]) -> list[Label]:
        """One explanation (or `NoLabel`) for each row. Raises `InputError` where the labeller does not give that."""
        with self.function.blamed():
            labels = self.labeller.label(rows)
        if not isinstance(labels, (list, tuple)) or len(labels) != len(rows):
            found = f"{len(labels)} labels" if isinstance(labels, (list, tuple)) else type(labels).__name__
            raise InputError(
                f"{self.function} returns {found} for {len(rows)} rows; return a list with one text for each."
            )
        for row, text in zip(rows, labels):
            if isinstance(text, NoLabel):
                continue
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

    @property
    def batch(self) -> int:
        """The rows of a call that suit the labeller."""
        return whole_number(f"batch of {self.function}", getattr(self.labeller, "batch", BATCH), 1)

    @property
    def concurrency(self) -> int:
        """The calls at a time that suit the labeller."""
        return whole_number(f"concurrency of {self.function}", getattr(self.labeller, "concurrency", 1), 1)

    @functools.cached_property
    def reads(self) -> tuple[str, ...]:
        """The fields of a row on which a label depends."""
        reads = tuple(getattr(self.labeller, "reads", FIELDS))
        if unknown := sorted(set(reads) - set(FIELDS)):
            raise InputError(f"{self.function} reads {unknown[0]!r}; a row has {', '.join(FIELDS)}.")
        return reads

    @functools.cached_property
    def facts(self) -> dict[str, Any]:
        """What made the labels: the labeller, its settings (model and instruction among them) and versions."""
        version = str(getattr(self.labeller, "version", ""))
        return {"labeller": self.function.path, "settings": self.settings, "version": version, "nla_jax": VERSION}

    @functools.cached_property
    def _identity(self) -> bytes:
        made_by = {name: fact for name, fact in self.facts.items() if name != "nla_jax"}
        return _digest(made_by | {"reads": self.reads})

    def key(self, row: LabelRow) -> str:
        """A hash of the labeller and of what it reads of a row: equal keys have equal labels."""
        read = _digest([getattr(row, name) for name in self.reads])
        return hashlib.blake2b(read, key=self._identity, digest_size=16).hexdigest()

    def ready(self) -> None:
        """Raises `InputError` where the labeller says that it could not work."""
        if check := getattr(self.labeller, "ready", None):
            with self.function.blamed():
                check()

    def work_in(self, folder: AnyPath) -> None:
        """Gives the labeller a folder of its own, if it wants one."""
        if take := getattr(self.labeller, "work_in", None):
            with self.function.blamed():
                take(folder)

    def prompt(self, row: LabelRow) -> str:
        """What is sent for a row."""
        with self.function.blamed():
            return getattr(self.labeller, "prompt", lambda row: row.text)(row)

    @property
    def max_tokens(self) -> int | None:
        """The longest answer, in tokens, where the labeller has such a limit."""
        return getattr(self.labeller, "max_tokens", None)


def _digest(content: Any) -> bytes:
    return hashlib.blake2b(json.dumps(content, sort_keys=True, default=repr).encode(), digest_size=32).digest()


def make_labeller(path: str, settings: dict, connection: dict | None = None) -> CheckedLabeller:
    """The labeller that a config names, made with its settings and with what reaches it (`label.connection`).

    Raises `InputError` where that is not possible."""
    function, connection = resolve(path, "label.labeller"), connection or {}
    if both := sorted(settings.keys() & connection.keys()):
        raise InputError(f"label.settings and label.connection both give {both[0]!r}; give it in one of them.")
    labeller = function(**settings, **connection)
    if not callable(getattr(labeller, "label", None)):
        raise InputError(f"{function} makes a {type(labeller).__name__}, which has no method `label(rows)`.")
    if dataclasses.is_dataclass(labeller):  # with the settings that were left out
        whole = {field.name: getattr(labeller, field.name) for field in dataclasses.fields(labeller)}
        connects = getattr(labeller, "connects", ()) + tuple(connection)
        settings = {name: value for name, value in whole.items() if name not in connects}
    return CheckedLabeller(function, labeller, dict(settings))


def configured_labeller(c: config.Label) -> CheckedLabeller:
    """The labeller of the section `label` of a config. Raises `InputError` as `make_labeller` does."""
    return make_labeller(c.labeller, c.settings, c.connection)


def label_rows(column: Callable[[str], list]) -> list[LabelRow]:
    """Rows of activations as labellers see them; `column(name)` gives "" for each row where there is no such column."""
    names = (TEXT, "token", "n_raw_tokens", "role", "doc_id", IDS)
    rows = zip(*map(column, names))
    return [LabelRow(text, token, n - 1, role, id, tuple(ids or ())) for text, token, n, role, id, ids in rows]


def rows_of(file: AnyPath) -> list[LabelRow]:
    """The rows of a shard as labellers see them."""
    there = columns_of(file)
    column = lambda name: read_table(file, [name]).column(0).to_pylist() if name in there else [""] * row_count(file)
    return label_rows(column)
