"""Labels from any server with OpenAI's chat completions: OpenAI itself, vLLM, SGLang, Ollama, llama.cpp."""

import dataclasses
import functools
from typing import Any, ClassVar

from nla_jax.labels.asking import Question, Served, Tool, read_answer
from nla_jax.labels.labeller import Label, NoLabel
from nla_jax.runtime.errors import InputError, first_line


@dataclasses.dataclass
class OpenAI(Served):
    """One request a text, several at a time. The key is `OPENAI_API_KEY` of the environment; a server named by
    `base_url` may need none.

    `request`: more fields of each request, as the server's documentation has them. `retries`, `timeout`: of the SDK,
    which sends a request again after a broken connection, a timeout (seconds), 408, 409, 429 or 5xx: it waits as long
    as the server's `retry-after` says (it gives up where that is more than two minutes), else 0.5 s, 1 s, … up to 8
    s."""

    concurrency: ClassVar[int] = 16

    @functools.cached_property
    def client(self) -> Any:
        """The SDK's client. Raises `InputError` without its package or a key."""
        try:
            import openai
        except ImportError:
            raise InputError("This labeller needs OpenAI's package: pip install 'nla_jax[labels]'.") from None
        make = functools.partial(openai.OpenAI, **self.reached)
        try:
            return make()
        except openai.OpenAIError:
            if self.base_url:
                return make(api_key="none")
            raise InputError(
                "OpenAI needs a key; set OPENAI_API_KEY in the environment, or label.connection.base_url for a server "
                "without one."
            ) from None

    def ask(self, question: Question) -> Label:
        """The answer of the model. Raises `InputError` where the server gives none, after all retries."""
        import openai

        limit = {} if "max_tokens" in self.request else {"max_completion_tokens": self.max_tokens}
        try:
            found = self.client.chat.completions.create(
                model=self.model,
                messages=[{"role": "user", "content": question.prompt}],
                extra_body=self.request,
                **limit,
                **(_forced(question.tool) if question.tool else {}),
            )
        except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
            return NoLabel("rejected", without_key(error, self.client), paid=False)
        except openai.OpenAIError as error:
            raise InputError(unanswered(error, self.client, question.about, "OPENAI_API_KEY")) from None
        if not found.choices:
            return NoLabel("empty")
        choice = found.choices[0]
        if choice.finish_reason == "content_filter" or choice.message.refusal:
            return NoLabel("refused", choice.message.refusal or "content filter")
        if choice.finish_reason == "length":
            return NoLabel("cut")
        if called := [call.function.arguments for call in choice.message.tool_calls or () if call.type == "function"]:
            return called[0] or NoLabel("empty")
        return read_answer(choice.message.content)


def _forced(tool: Tool) -> dict:
    """The arguments of a request that must be answered by a call of the tool."""
    function = {"name": tool.name, "description": tool.description, "parameters": tool.schema}
    return {
        "tools": [{"type": "function", "function": function}],
        "tool_choice": {"type": "function", "function": {"name": tool.name}},
    }


# What the SDKs of OpenAI and Anthropic, which are made alike, say when they fail


def without_key(error: Exception, client: Any) -> str:
    """What an SDK's error says, which may quote the key."""
    said = first_line(error)
    for key in (client.api_key, getattr(client, "auth_token", None)):
        said = said.replace(key, "…") if key and len(key) > 7 else said
    return said


def unanswered(error: Exception, client: Any, about: str, variable: str) -> str:
    """A sentence for an SDK's error at a question `about` something; `variable` holds the key."""
    cure = {
        401: f"check {variable} in the environment",
        403: f"check what the key in {variable} may use",
        404: "check label.settings.model and label.connection.base_url",
    }.get(getattr(error, "status_code", None), "what is answered is kept, and the same command asks for the rest")
    return f"{client.base_url} gives no answer for {about} ({without_key(error, client)}); {cure}."
