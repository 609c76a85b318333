"""What the page may ask for. Another panel adds a function here, which `ACTIONS` names, and a file in browser/panels/.

An action gets the desk, the request's fields and the function that takes answers; it returns the jobs that make them.
It raises `InputError` for a request that cannot be answered."""

import collections
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

from nla_jax.runtime.errors import InputError
from nla_jax.runtime.user_input import text_list, whole_number
from nla_jax.serve.interventions import is_whole, patched, steering
from nla_jax.serve.models import (
    Document,
    Served,
    ablations,
    alternatives,
    confidence,
    explain,
    identity,
    nearest,
    read_document,
)
from nla_jax.serve.worker import Job, Worker

KEPT = 16  # documents that are remembered; the page sends one again that is not
MOST_ALTERNATIVES = 16
MOST_STRENGTHS = 8  # that one request may ask for
LONGEST_EDIT = 4000  # characters of an edited explanation
Answer = Callable[[dict | None], None]


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one request may cost."""

    tokens: int = 4000  # of a text or a chat
    queue: int = 40_000  # explanations that wait, of all tabs together
    seconds: float = 1800.0  # after which a request is given up
    bytes: int = 1 << 20  # of a request


@dataclasses.dataclass(eq=False)
class Desk:
    """What actions work with: the pairs, the worker, the limits, and the documents that were read."""

    served: list[Served]
    worker: Worker
    limits: Limits
    documents: collections.OrderedDict[str, Document] = dataclasses.field(default_factory=collections.OrderedDict)

    def document(self, fields: dict[str, Any]) -> Document:
        """The document that a request is about. Raises `Unknown` where it is not kept."""
        found = self.documents.get(fields.get("document"))
        if found is None:
            raise Unknown("The server does not hold this text (any more); it has to be read again.")
        self.documents.move_to_end(found.id)
        return found

    def keep(self, document: Document) -> None:
        """Remembers a document; forgets the one that nobody has asked about for longest."""
        self.documents[document.id] = document
        while len(self.documents) > KEPT:
            self.documents.popitem(last=False)

    def pairs(self, fields: dict[str, Any]) -> list[int]:
        """The numbers of the pairs that a request names (default: all)."""
        numbers = fields.get("pairs", list(range(len(self.served))))
        if not isinstance(numbers, list):
            raise InputError(f"pairs is a list of numbers; found {numbers!r:.50}.")
        return [whole_number("A pair's number", number, 0, len(self.served) - 1) for number in numbers]

    def place(self, fields: dict[str, Any]) -> tuple[Document, int, int]:
        """The document, the token (`row`) and the pair that a request is about."""
        document = self.document(fields)
        row = whole_number("A token's number", fields.get("row"), 0, len(document.tokens) - 1)
        return document, row, whole_number("A pair's number", fields.get("pair", 0), 0, len(self.served) - 1)


class Unknown(InputError):
    """The request names a document that is not kept."""


def read(desk: Desk, fields: dict[str, Any], answer: Answer) -> list[Job]:
    """`text` or `messages` -> the document: `id, tokens, roles, norms, sinks`."""
    kind, name = (str, "text") if "text" in fields else (list, "messages")
    content = fields.get(name)
    if not isinstance(content, kind) or not content:
        raise InputError("There is nothing to read; write a text, or say something in the chat.")

    def compute(_: list) -> list[dict]:
        document = desk.documents.get(identity(content)) or read_document(desk.served, content, desk.limits.tokens)
        desk.keep(document)
        return [document.shown]

    return [Job(object(), collections.deque([None]), compute, answer)]


def explain_tokens(desk: Desk, fields: dict[str, Any], answer: Answer) -> list[Job]:
    """`document, rows[, pairs, patient]` -> for each pair and row `pair, row, explanation, cut, cosine, fve, claims`."""
    document, rows, patient = desk.document(fields), fields.get("rows"), fields.get("patient") is True
    if not isinstance(rows, list) or not rows:
        raise InputError("rows is a list of numbers of tokens; name at least one.")
    last = len(document.tokens) - 1
    rows = list(dict.fromkeys(whole_number("A token's number", row, 0, last) for row in rows))
    jobs = []
    for number in desk.pairs(fields):
        known = [document.answers[number, row] for row in rows if (number, row) in document.answers]
        for one in known:
            answer(one)
        left = collections.deque((document, row) for row in rows if (number, row) not in document.answers)
        compute = functools.partial(explain, desk.served[number], number, batch=desk.worker.batch)
        jobs += [Job(("explain", number), left, compute, answer, patient)] if left else []
    return jobs


def best_of_some(desk: Desk, fields: dict[str, Any], answer: Answer) -> list[Job]:
    """`document, row[, pairs, count, seed]` -> for each pair `pair, row, seed, alternatives`, best first."""
    document = desk.document(fields)
    row = whole_number("A token's number", fields.get("row"), 0, len(document.tokens) - 1)
    count = whole_number("The number of alternatives", fields.get("count", 8), 1, MOST_ALTERNATIVES)
    seed = whole_number("The seed", fields.get("seed", 0), 0, (1 << 32) - 1)
    jobs = []
    for number in desk.pairs(fields):
        of_one = functools.partial(alternatives, desk.served[number], number, document, row, count, seed)
        jobs.append(Job(object(), collections.deque([None]), lambda _, of_one=of_one: [of_one()], answer))
    return jobs


def ablate(desk: Desk, fields: dict[str, Any], answer: Answer) -> list[Job]:
    """`document, row[, pair]` -> `pair, row, ablations`: what each claim of the explanation is worth to the AR."""
    document, row, number = desk.place(fields)
    return once(
        document, ("ablate", number, row), lambda: ablations(desk.served[number], number, document, row), answer
    )


def sureness(desk: Desk, fields: dict[str, Any], answer: Answer) -> list[Job]:
    """`document, row[, pair]` -> `pair, row, confidence`: how sure one may be of each claim of the explanation."""
    document, row, number = desk.place(fields)
    if (one := desk.served[number]).claims is None:
        raise InputError("This server was started without the confidence of claims.")
    return once(document, ("confidence", number, row), lambda: confidence(one, number, document, row), answer)


def find_nearest(desk: Desk, fields: dict[str, Any], answer: Answer) -> list[Job]:
    """`document, row[, pair]` -> `pair, row, nearest, among`: training activations nearest to the reconstruction."""
    document, row, number = desk.place(fields)
    if (one := desk.served[number]).training is None:
        raise InputError("The training activations are not here; start `nla serve` with --workdir, the run's folder.")
    return once(document, ("nearest", number, row), lambda: nearest(one, number, [(document, row)])[0], answer)


def patch(desk: Desk, fields: dict[str, Any], answer: Answer) -> list[Job]:
    """`document, row[, pair]` -> `pair, row, patched`: what the subject says with the reconstruction. First
    `{"loading": true}`, where the subject has to be loaded whole."""
    document, row, number = desk.place(fields)
    jobs = once(document, ("patch", number, row), lambda: patched(desk.served[number], number, document, row), answer)
    if jobs and not is_whole(desk.served[number].subject):
        answer({"loading": True})
    return jobs


def steer(desk: Desk, fields: dict[str, Any], answer: Answer) -> list[Job]:
    """`document, row, edited, strengths[, pair]` -> for each strength `pair, row, edit, strength, steered`, the first
    one as soon as can be. First `{"loading": true}`, where the subject has to be loaded whole."""
    document, row, number = desk.place(fields)
    edited, strengths = fields.get("edited"), fields.get("strengths")
    if not isinstance(edited, str) or not edited.strip() or len(edited) > LONGEST_EDIT:
        raise InputError(f"An edited explanation has 1 to {LONGEST_EDIT:,} characters; write something into it.")
    text_list("steer takes", [edited])
    usable = lambda x: isinstance(x, (int, float)) and not isinstance(x, bool) and 0 < x <= 100
    if not isinstance(strengths, list) or not all(map(usable, strengths)) or not 0 < len(strengths) <= MOST_STRENGTHS:
        raise InputError(f"strengths is a list of up to {MOST_STRENGTHS} numbers above 0, up to 100.")
    one, jobs = desk.served[number], []
    ready = functools.cache(lambda: steering(one, number, document, row, edited))  # by the worker, for all strengths
    for strength in map(float, dict.fromkeys(strengths)):
        at = lambda strength=strength: ready()(strength)
        patient = strength != strengths[0]
        jobs += once(document, ("steer", number, row, edited, strength), at, answer, patient)
    if jobs and not is_whole(one.subject):
        answer({"loading": True})
    return jobs


def once(
    document: Document, key: tuple, compute: Callable[[], dict], answer: Answer, patient: bool = False
) -> list[Job]:
    """The job that computes an answer about a document, which is kept under `key`. A known one is given at once."""
    if key in document.kept:
        answer(document.kept[key])
        return []
    keep = lambda _: [document.kept.setdefault(key, compute())]
    return [Job(object(), collections.deque([None]), keep, answer, patient)]


ACTIONS: dict[str, Callable[[Desk, dict[str, Any], Answer], list[Job]]] = {
    "read": read,
    "explain": explain_tokens,
    "alternatives": best_of_some,
    "ablate": ablate,
    "confidence": sureness,
    "nearest": find_nearest,
    "patch": patch,
    "steer": steer,
}


def limits(tokens: int, queue: int, seconds: float) -> Limits:
    """Limits from the command line. Raises `InputError` for one that is out of range."""
    if not 0 < seconds < math.inf:
        raise InputError(f"--seconds is a positive number; found {seconds}.")
    return Limits(whole_number("--max-tokens", tokens, 1), whole_number("--queue", queue, 1), seconds)
