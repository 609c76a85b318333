"""What labellers that ask a language model have in common: the instruction, and how an answer is read."""

import dataclasses
import functools
import re
from collections.abc import Sequence
from typing import Any, ClassVar

from nla_jax.labels.labeller import Label, LabelRow, NoLabel
from nla_jax.prompts import read_response
from nla_jax.runtime.errors import InputError
from nla_jax.runtime.user_input import whole_number

# The paper's warm start asks for two or three features of the text up to the token, the last about the token itself.
INSTRUCTION = """\
A language model has read the beginning of a document, which stands below in <text> tags. It ends in the middle, at \
the token {token}. Describe what the model has to know there to predict what comes next.

Write two or three features, the most important one first, each in a paragraph of one or two sentences: what kind of \
text this is, what it is about, and what is going on at its end. The last feature is about the final token itself: its \
part in its word, phrase or structure, and what is likely to follow. Quote a few words from the end of the text where \
they say more than a description. Name what is there; do not guess at what is not.

Write 80 to 100 words in all, as plain text, without headings, lists, tags, or a sentence before or after. Do not \
mention that the text is cut, or this task.

<text>
{text}
</text>"""

TAGS = re.compile(r"</?(?:explanation|text|summary)>", re.IGNORECASE)


@dataclasses.dataclass
class Asking:
    """A labeller that asks a language model. Its fields are its settings.

    `model`: the model's name or folder. `instruction`: with {text} where the text stands, and {token} for its last
    token. `max_tokens`: longer answers count as cut. `chars`: only so many characters from the end of a text are shown
    (0: all of it)."""

    model: str
    instruction: str = INSTRUCTION
    max_tokens: int = 400
    chars: int = 0

    reads: ClassVar[tuple[str, ...]] = ("text", "token")
    connects: ClassVar[tuple[str, ...]] = ()  # fields that say how the model is reached, not what it answers

    def __post_init__(self):
        if not isinstance(self.model, str) or not self.model.strip():
            raise InputError(f"label.settings.model is {self.model!r}; name the model that writes the labels.")
        if not isinstance(self.instruction, str) or self.instruction.count("{text}") != 1:
            raise InputError("label.settings.instruction must hold {text} once, where the text stands.")
        self.max_tokens = whole_number("label.settings.max_tokens", self.max_tokens, 1)
        self.chars = whole_number("label.settings.chars", self.chars, 0)

    def prompt(self, row: LabelRow) -> str:
        """What the model is asked about a row."""
        before, after = self.instruction.replace("{token}", repr(row.token)).split("{text}")
        return before + row.text[-self.chars :] + after


@dataclasses.dataclass
class Served(Asking):
    """A labeller that asks a server through its SDK, a request a text, several at a time. `request`: more fields of each
    request. `base_url`, `retries`, `timeout`: how the SDK reaches the server."""

    base_url: str = ""
    request: dict = dataclasses.field(default_factory=dict)
    retries: int = 8
    timeout: float = 120.0

    batch: ClassVar[int] = 1
    connects: ClassVar[tuple[str, ...]] = ("base_url", "retries", "timeout")

    @functools.cached_property
    def client(self) -> Any:
        """The SDK's client. Raises `InputError` without its package or a key."""
        raise NotImplementedError

    @property
    def reached(self) -> dict:
        """The client's arguments."""
        return {"base_url": checked_url(self.base_url), "max_retries": self.retries, "timeout": self.timeout}

    def ready(self) -> None:
        """Raises `InputError` without a key."""
        _ = self.client

    def label(self, rows: Sequence[LabelRow]) -> list[Label]:
        """An answer for each row, asked for one after the other."""
        return [self.ask(row) for row in rows]

    def ask(self, row: LabelRow) -> Label:
        """The answer for one row."""
        raise NotImplementedError


def read_answer(text: str | None) -> Label:
    """The label in a model's answer: without tags, in which some models put it."""
    said = TAGS.sub(" ", read_response(text or "", "search")).strip()
    return said or NoLabel("empty")


def checked_url(url: Any) -> str | None:
    """The address of a server; None for "", the one that the SDK knows.

    Raises `InputError` where it is no address, or holds a password."""
    if url == "":
        return None
    if not isinstance(url, str) or not re.fullmatch(r"https?://[^\s@]+", url):
        raise InputError(
            f"label.connection.base_url is {str(url).rpartition('@')[2]!r}; give http(s)://HOST/PATH, without user or "
            f"password: keys come from the environment."
        )
    return url
