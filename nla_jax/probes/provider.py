"""The language model that rewrites texts for probes, and judges them: settings, questions, answers.

Labellers reach it, with their SDKs and retries (nla_jax/labels). Every answer is kept in a folder by a hash of the
model, its settings and the question: what was answered once is not asked, or paid for, again. Questions without an
answer are counted by why there is none, and are neither a yes nor a no.
"""

import collections
import contextlib
import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
from jaxtyping import Int

from nla_jax.config import Provider as Settings
from nla_jax.io.files import AnyName, path_to
from nla_jax.labels.asking import Question, read_call
from nla_jax.labels.cache import Cache, as_json, from_json
from nla_jax.labels.calls import as_done
from nla_jax.labels.cost import Cost, Tokens, price
from nla_jax.labels.labeller import Label, NoLabel, make_labeller
from nla_jax.runtime.distributed import from_writer, is_writer
from nla_jax.runtime.errors import InputError
from nla_jax.runtime.metrics import Progress
from nla_jax.runtime.notes import note
from nla_jax.runtime.user_input import is_whole, whole_number

KINDS = {
    "openai": "nla_jax.labels.openai:OpenAI",
    "anthropic": "nla_jax.labels.anthropic:Anthropic",
    "anthropic_batch": "nla_jax.labels.anthropic:AnthropicBatch",
    "local": "nla_jax.labels.local:Local",
}
MAX_TOKENS = 1000  # of an answer, unless the settings say it
TRIAL = 20  # questions of one kind of which one at least must have an answer
UNUSED = ("instruction", "chars")  # settings of labellers that shape their own question


class Provider:
    """A language model that writes texts and judges them.

    `kind`: one of `KINDS`, or the import path of a class that answers questions as `labels.asking.Asking` does. `settings`
    and `connection`: more arguments of the labeller behind it (docs/labels.md). `folder` keeps the answers. `rows`:
    how many held-out rows probes ask about. `concurrency`: questions at a time (0: as many as suit the kind)."""

    def __init__(
        self,
        kind: str,
        model: str,
        settings: Mapping | None = None,
        connection: Mapping | None = None,
        *,
        folder: AnyName,
        rows: int = 200,
        concurrency: int = 0,
    ):
        if not isinstance(model, str) or not model.strip():
            raise InputError(f"evaluate.provider.model is {model!r}; name the model that writes and judges.")
        if kind not in KINDS and ":" not in kind:
            raise InputError(f"evaluate.provider.kind is {kind!r}; it must be {', '.join(KINDS)}, or an import path.")
        given = dict(settings or {})
        if unused := sorted(given.keys() & set(UNUSED)):
            raise InputError(f"evaluate.provider.settings gives {unused[0]!r}, which only labels have; leave it out.")
        self.rows, self.folder = whole_number("evaluate.provider.rows", rows, 2), path_to(folder)
        with _as_provider():
            given = {"max_tokens": MAX_TOKENS} | given | {"model": model}
            self.model = make_labeller(KINDS.get(kind, kind), given, dict(connection or {}))
        if not callable(getattr(self.model.labeller, "replies", None)):
            raise InputError(f"evaluate.provider.kind is {kind!r}, whose class has no method `replies(questions)`.")
        self.concurrency = whole_number("evaluate.provider.concurrency", concurrency, 0) or self.model.concurrency
        self.rejected: dict[str, Label] = {}  # answers that cost nothing, and are asked for again by the next process
        self._told: list[str] = []

    def ready(self) -> None:
        """Raises `InputError` where the model cannot be asked: no key, no package, no such folder."""
        if is_writer():
            with _as_provider():
                self.model.ready()

    def looked_at(self, count: int) -> Int[np.ndarray, "m"]:
        """Which of `count` rows are asked about: at most `rows` of them, spread evenly."""
        return np.unique(np.linspace(0, count - 1, min(count, self.rows)).astype(int))

    def write(
        self, what: str, questions: Sequence[Question], accept: Callable[[int, str], Label] | None = None
    ) -> list[Label]:
        """The text that the model writes for each question; `NoLabel` where it writes none.

        `what` names the kind of questions in messages. `accept(i, text)` may turn an answer down."""
        answers = [_read(*pair) for pair in zip(questions, self._ask(what, questions))]
        if accept is not None:
            answers = [a if isinstance(a, NoLabel) else accept(i, a) for i, a in enumerate(answers)]
        return self._counted(what, answers)

    def judge(self, what: str, questions: Sequence[Question]) -> list[dict | NoLabel]:
        """The arguments with which the model calls the tool of each question; `NoLabel` where it does not."""
        return self._counted(what, [_read(*pair) for pair in zip(questions, self._ask(what, questions))])

    def told(self) -> list[str]:
        """How many questions were answered since the last call, and why others were not: a sentence for each kind."""
        said, self._told = list(dict.fromkeys(self._told)), []
        return said

    def key(self, question: Question) -> str:
        """A hash of the model, its settings and a question: equal keys have equal answers."""
        facts = {name: value for name, value in self.model.settings.items() if name not in UNUSED}
        tool = question.tool and [question.tool.name, question.tool.description, question.tool.schema]
        made_of = [self.model.function.path, facts, self.model.facts["version"], question.prompt, tool]
        return hashlib.blake2b(json.dumps(made_of, sort_keys=True, default=repr).encode(), digest_size=16).hexdigest()

    def _counted(self, what: str, answers: list) -> list:
        why = collections.Counter(answer.why for answer in answers if isinstance(answer, NoLabel))
        lacks = f" ({', '.join(f'{count} {reason}' for reason, count in sorted(why.items()))})" if why else ""
        said = f"{what}: {len(answers) - why.total()} of {len(answers)} questions answered{lacks}."
        if why:
            note(said)
        self._told += [said] * bool(answers)
        return answers

    def _ask(self, what: str, questions: Sequence[Question]) -> list[Label]:
        """An answer to each question: a kept one, or a new one. The first host asks for all."""
        keys = list(map(self.key, questions))
        wanted = dict(zip(keys, questions))
        found = from_writer(lambda: {key: as_json(answer) for key, answer in self._answers(what, wanted).items()})
        return [from_json(found[key]) for key in keys]

    def _answers(self, what: str, wanted: Mapping[str, Question]) -> dict[str, Label]:
        cache = Cache(self.folder)
        kept = cache.answers | self.rejected
        found = {key: kept[key] for key in wanted if key in kept}
        new = [(key, question) for key, question in wanted.items() if key not in found]
        progress = Progress(what, len(new))
        self.model.work_in(self.folder / "work")
        try:
            with _as_provider():
                for asked, answers in as_done(self._replies, _parts(new, self.model.batch), self.concurrency):
                    made = {key: answer for (key, _), answer in zip(asked, answers)}
                    cache.add(made)
                    self.rejected |= {key: a for key, a in made.items() if isinstance(a, NoLabel) and not a.paid}
                    found |= made
                    _check(what, wanted, found)
                    progress.update(len(asked))
        finally:
            progress.close()
            cache.close()
        _check(what, wanted, found)
        return found

    def _replies(self, asked: Sequence[tuple[str, Question]]) -> list[Label]:
        with self.model.function.blamed():
            answers = self.model.labeller.replies([question for _, question in asked])
        if len(answers) != len(asked):
            raise InputError(f"{self.model.function} gives {len(answers)} replies to {len(asked)} questions.")
        return answers


def provider_of(c: Settings, folder: AnyName) -> Provider:
    """The provider that a section of a config describes."""
    more = {"folder": folder, "rows": c.rows, "concurrency": c.concurrency}
    return Provider(c.kind, c.model, c.settings, c.connection, **more)


class DryRun(Provider):
    """A provider that asks nobody, and counts what would be asked. Examples stand in for the answers of a judge.

    `count`, `counted_by`: how tokens are counted (`labels.cost.counter`)."""

    def __init__(self, c: Settings, folder: AnyName, count: Callable[[str], float], counted_by: str):
        super().__init__(c.kind, c.model, c.settings, c.connection, folder=folder, rows=c.rows)
        self.prices, self.tokens, self.counted_by = (c.price_in, c.price_out), Tokens(count, 8), counted_by
        self.seen: set[str] = set()
        self.questions = 0

    def ready(self) -> None:
        """It needs no key."""

    def cost(self) -> Cost:
        """What the questions counted so far would cost."""
        new, tokens = self.tokens.prompts, self.tokens.total
        most = None if self.model.max_tokens is None else self.model.max_tokens * new
        rest = f"of {self.questions:,}: the others are answered, or equal to one of these"
        costs = price(tokens, most, *self.prices)
        return Cost("questions", new, rest, tokens, most, self.counted_by, costs, "evaluate.provider")

    def _counted(self, what: str, answers: list) -> list:
        return answers

    def _answers(self, what: str, wanted: Mapping[str, Question]) -> dict[str, Label]:
        kept = Cache(self.folder).answers
        self.questions += len(wanted)
        for key, question in wanted.items():
            if key not in kept and key not in self.seen:
                self.seen.add(key)
                schema = json.dumps(question.tool.schema) if question.tool else ""
                self.tokens.add(question.prompt + schema)
        stand_in = lambda tool: json.dumps(tool.example) if tool else NoLabel("not asked")
        return {key: kept.get(key) or stand_in(question.tool) for key, question in wanted.items()}


def _read(question: Question, answer: Label) -> dict | str | NoLabel:
    """The text of an answer, or the arguments of its call; `NoLabel` where it has another form than was asked for."""
    if isinstance(answer, NoLabel):
        return answer
    found = read_call(answer, question.tool) if question.tool else answer
    if isinstance(found, NoLabel) or is_whole(json.dumps(found, ensure_ascii=False)):
        return found
    return NoLabel("malformed", "half of a character")


def _parts(new: Sequence[tuple[str, Question]], size: int) -> Iterator[list[tuple[str, Question]]]:
    rest = iter(new)
    while part := list(itertools.islice(rest, size)):
        yield part


def _check(what: str, wanted: Mapping[str, Question], found: Mapping[str, Label]) -> None:
    """Raises `InputError` where no question of many has an answer."""
    read = (_read(wanted[key], answer) for key, answer in found.items())
    if len(found) < TRIAL or any(not isinstance(answer, NoLabel) for answer in read):
        return
    last = _read(*next((wanted[key], answer) for key, answer in reversed(found.items())))
    raise InputError(
        f"None of the first {len(found)} questions has an answer ({what}; the last one: {last.why}"
        f"{f': {last.detail}' if last.detail else ''}); name another model or other settings under evaluate.provider."
    )


@contextlib.contextmanager
def _as_provider() -> Iterator[None]:
    """Labellers name their settings in messages; here these are the provider's."""
    try:
        yield
    except InputError as error:
        said = str(error).replace("label.labeller", "evaluate.provider.kind")
        raise InputError(re.sub(r"\blabel\.(?=settings|connection)", "evaluate.provider.", said)) from None
