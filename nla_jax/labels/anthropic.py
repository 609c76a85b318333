"""Labels from Anthropic's models: a request for each text, or thousands in a batch at half the price."""

import dataclasses
import functools
import hashlib
import json
import time
from collections.abc import Sequence
from typing import Any, ClassVar

from nla_jax.io.files import AnyPath, replacing
from nla_jax.labels.asking import Question, Served, Tool, read_answer
from nla_jax.labels.labeller import Label, NoLabel
from nla_jax.labels.openai import unanswered, without_key
from nla_jax.runtime.errors import InputError

KEY = "ANTHROPIC_API_KEY"


@dataclasses.dataclass
class Anthropic(Served):
    """One request a text, several at a time. The key is `ANTHROPIC_API_KEY` of the environment (or what else the SDK
    finds there).

    `request`: more fields of each request. `retries`, `timeout`: of the SDK, which sends a request again after a broken
    connection, a timeout (seconds), 408, 409, 429 or 5xx: it waits as long as the server's `retry-after` says, else 0.5
    s, 1 s, … up to 8 s."""

    concurrency: ClassVar[int] = 8

    @functools.cached_property
    def client(self) -> Any:
        """The SDK's client. Raises `InputError` without its package or a key."""
        try:
            import anthropic
        except ImportError:
            raise InputError("This labeller needs Anthropic's package: pip install 'nla_jax[labels]'.") from None
        make = functools.partial(anthropic.Anthropic, **self.reached)
        client = make()
        if not any(getattr(client, name, None) for name in ("api_key", "auth_token", "credentials")):
            if not self.base_url:
                raise InputError(f"Anthropic needs a key; set {KEY} in the environment.")
            return make(api_key="none")
        return client

    def message(self, question: Question) -> dict:
        """The request for one answer."""
        content = [{"role": "user", "content": question.prompt}]
        forced = _forced(question.tool) if question.tool else {}
        return {"model": self.model, "max_tokens": self.max_tokens, "messages": content} | forced | self.request

    def ask(self, question: Question) -> Label:
        """The answer of the model. Raises `InputError` where the server gives none, after all retries."""
        import anthropic

        try:
            return read_message(self.client.messages.create(**_for_sdk(self.message(question))))
        except (anthropic.BadRequestError, anthropic.UnprocessableEntityError) as error:
            return NoLabel("rejected", without_key(error, self.client), paid=False)
        except anthropic.AnthropicError as error:
            raise InputError(unanswered(error, self.client, question.about, KEY)) from None


def _forced(tool: Tool) -> dict:
    """The fields of a request that must be answered by a call of the tool."""
    described = {"name": tool.name, "description": tool.description, "input_schema": tool.schema}
    return {"tools": [described], "tool_choice": {"type": "tool", "name": tool.name}}


def _for_sdk(message: dict) -> dict:
    """A request as arguments of the SDK: fields that it may not know, or knows no more, in `extra_body`."""
    known = {name: message[name] for name in ("model", "max_tokens", "messages")}
    return known | {"extra_body": {name: value for name, value in message.items() if name not in known}}


def read_message(message: Any) -> Label:
    """The text of an answer, or the JSON of its tool call; `NoLabel` where it was refused or cut."""
    if message.stop_reason == "refusal":
        return NoLabel("refused")
    if message.stop_reason in ("max_tokens", "model_context_window_exceeded"):
        return NoLabel("cut")
    if called := [block.input for block in message.content if block.type == "tool_use"]:
        return json.dumps(called[0])
    return read_answer("".join(block.text for block in message.content if block.type == "text"))


@dataclasses.dataclass
class AnthropicBatch(Anthropic):
    """Many texts in one batch of the Message Batches API, which answers within a day.

    The id of a batch is written down when it is handed in: a run that was stopped waits for the same batch, whose
    answers the server keeps for 29 days. What a batch leaves open (expired, a fault of the server) is handed in again,
    `retries` times at most. `poll`: seconds between two looks at a batch."""

    poll: float = 60.0

    batch: ClassVar[int] = 10_000
    concurrency: ClassVar[int] = 4
    folder: ClassVar[AnyPath | None] = None
    connects: ClassVar[tuple[str, ...]] = (*Anthropic.connects, "poll")

    def work_in(self, folder: AnyPath) -> None:
        """Where the ids of batches are written down."""
        self.folder = folder

    def replies(self, questions: Sequence[Question]) -> list[Label]:
        """The answers of a batch; without a folder of its own, as in `nla check`, those of single requests.

        Raises `InputError` where the server gives none."""
        import anthropic

        if self.folder is None:
            return super().replies(questions)
        requests = [self.message(question) for question in questions]
        ids = [hashlib.blake2b(json.dumps(r, sort_keys=True).encode(), digest_size=16).hexdigest() for r in requests]
        wanted = dict(zip(ids, requests))  # texts that `chars` made equal share an answer
        try:
            answers = self._answers(wanted)
        except anthropic.AnthropicError as error:
            raise InputError(unanswered(error, self.client, questions[0].about, KEY)) from None
        return [answers[id] for id in ids]

    def _answers(self, wanted: dict[str, dict]) -> dict[str, Label]:
        """The answers to requests by their ids, from batches of an earlier run and from new ones."""
        answers: dict[str, Label] = {}
        for batch, ids in self._handed_in():
            if not wanted.keys().isdisjoint(ids):
                answers |= self._collect(batch, ids, resumed=True)
        rounds = 0
        while missing := [id for id in wanted if id not in answers]:
            if rounds > self.retries:
                raise InputError(
                    f"{len(missing)} texts have no answer after {rounds} batches; the same command hands them in again."
                )
            requests = [{"custom_id": id, "params": wanted[id]} for id in missing]
            batch = self.client.messages.batches.create(requests=requests).id
            self.folder.mkdir(parents=True, exist_ok=True)
            with replacing(self.folder / f"{batch}.json") as scratch:
                scratch.write_text(json.dumps(missing) + "\n")
            answers |= self._collect(batch, missing)
            rounds += 1
        return answers

    def _handed_in(self) -> list[tuple[str, list[str]]]:
        """The batches of this run with the ids of their requests."""
        files = sorted(self.folder.glob("*.json")) if self.folder.exists() else []
        return [(file.name.removesuffix(".json"), json.loads(file.read_bytes())) for file in files]

    def _collect(self, batch: str, ids: list[str], resumed: bool = False) -> dict[str, Label]:
        """Waits for a batch; the answers that it has. Raises `InputError` where it was canceled meanwhile."""
        import anthropic

        try:
            while self.client.messages.batches.retrieve(batch).processing_status != "ended":
                time.sleep(self.poll)
            found = {line.custom_id: line.result for line in self.client.messages.batches.results(batch)}
        except anthropic.NotFoundError:  # deleted, or archived after 29 days
            return {}
        if absent := set(ids) - found.keys():
            raise InputError(
                f"{len(absent)} results of the batch {batch} are missing; the same command reads them again."
            )
        if not resumed and any(result.type == "canceled" for result in found.values()):
            raise InputError(f"The batch {batch} was canceled; the same command hands in what it has not answered.")
        read = {id: _read_result(result) for id, result in found.items()}
        return {id: answer for id, answer in read.items() if answer is not None}


def _read_result(result: Any) -> Label | None:
    """The answer to one request of a batch; None where it has to be asked again."""
    if result.type == "succeeded":
        return read_message(result.message)
    error = result.error.error if result.type == "errored" else None
    if error is not None and error.type == "invalid_request_error":
        return NoLabel("rejected", error.message, paid=False)
    return None
