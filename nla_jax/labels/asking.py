"""What labellers that ask a language model have in common: the instruction, and how an answer is read.

Probes put their own questions to the same models (`replies`), as text or as the call of a tool, whose arguments have a
form that can be checked."""

import dataclasses
import functools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

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
TYPES = {"object": Mapping, "array": list, "string": str, "boolean": bool, "integer": int}  # of JSON schemas


class Tool(NamedTuple):
    """What a model has to call instead of writing a text. `schema`: the JSON schema of its arguments, of which
    `read_call` checks type, enum, minimum, maximum, minItems, maxItems, items, properties and required. `example`: such
    arguments, which stand in for an answer while a dry run counts what would be asked."""

    name: str
    description: str
    schema: dict
    example: dict


class Question(NamedTuple):
    """What a model is asked. `about`: what an error message says of it, such as "token 7 of 'page'"."""

    prompt: str
    about: str
    tool: Tool | None = None


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

    def question(self, row: LabelRow) -> Question:
        """The question about a row."""
        return Question(self.prompt(row), f"token {row.position} of {row.doc_id!r}")

    def label(self, rows: Sequence[LabelRow]) -> list[Label]:
        """An answer for each row."""
        return self.replies([self.question(row) for row in rows])

    def replies(self, questions: Sequence[Question]) -> list[Label]:
        """The answer to each question: a text, or the JSON with which the tool was called (`read_call` reads it);
        `NoLabel` where there is none."""
        raise NotImplementedError


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

    def replies(self, questions: Sequence[Question]) -> list[Label]:
        """The answer to each question, asked for one after the other."""
        return [self.ask(question) for question in questions]

    def ask(self, question: Question) -> Label:
        """The answer to one question."""
        raise NotImplementedError


def read_answer(text: str | None) -> Label:
    """The label in a model's answer: without tags, in which some models put it."""
    said = TAGS.sub(" ", read_response(text or "", "search")).strip()
    return said or NoLabel("empty")


def read_call(text: str, tool: Tool) -> dict | NoLabel:
    """The arguments with which a model has called a tool: the JSON object in its answer, which may stand in a text.
    `NoLabel` where there is none, and where it does not fit the tool's schema."""
    start, end = text.find("{"), text.rfind("}") + 1
    if start < 0:
        return NoLabel("no tool call", f"it says: {text:.80}")
    try:
        found = json.loads(text[start:end])
    except (ValueError, RecursionError):
        return NoLabel("malformed", f"no JSON: {text:.80}")
    return found if fits(found, tool.schema) else NoLabel("malformed", f"another form: {text:.80}")


def fits(value: Any, schema: Mapping) -> bool:
    """Whether a value has the form that a JSON schema describes, as far as `Tool` says."""
    kind = schema["type"]
    if not isinstance(value, TYPES[kind]) or (kind == "integer" and isinstance(value, bool)):
        return False
    if kind == "object":
        known = all(fits(value[name], of) for name, of in schema["properties"].items() if name in value)
        return known and all(name in value for name in schema.get("required", ()))
    if kind == "array":
        counted = schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value))
        return counted and all(fits(one, schema["items"]) for one in value)
    if kind == "integer":
        return schema.get("minimum", value) <= value <= schema.get("maximum", value)
    return value in schema.get("enum", [value])


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
