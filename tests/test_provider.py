"""A model that writes and judges, through the real SDKs against a server on loopback: failures, what is kept, what a dry
run counts."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from conftest import one_sentence
from fake_llm import FakeLLM

from nla_jax.config import Provider as Settings
from nla_jax.labels.asking import Question, Tool, fits, read_call
from nla_jax.labels.labeller import NoLabel
from nla_jax.labels.local import Local
from nla_jax.probes.provider import DryRun, Provider
from nla_jax.runtime.errors import InputError

KEY = "sk-secret-0123456789"
RATE = Tool(
    "rate",
    "Rates a text.",
    {
        "type": "object",
        "properties": {"rating": {"type": "integer", "minimum": 1, "maximum": 10}},
        "required": ["rating"],
    },
    {"rating": 5},
)
API = ["openai", "anthropic"]


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("ANTHROPIC_API_KEY", KEY)
    server = FakeLLM()
    server.calls = lambda tool, prompt: {"rating": len(re.search(r"<text>\n(.*)\n", prompt)[1])}
    yield server
    server.close()


def provider(kind, server, folder, **more):
    base = {"base_url": f"{server.url}/v1" if kind == "openai" else server.url}
    return Provider(kind, "m", connection=base | more.pop("connection", {}), folder=folder, **more)


def question(text, tool=RATE):
    return Question(f"Rate it.\n<text>\n{text}\n</text>", f"the text {text!r}", tool)


FAILURES = {
    "a": [429, "ok"],
    "bb": [500, "ok"],
    "ccc": ["broken", "ok"],
    "dddd": ["refused"],
    "e" * 5: ["filtered"],
    "f" * 6: ["cut"],
    "g" * 7: [400],
    "h" * 8: ["bare"],
    "i" * 9: ["half"],
    "j" * 10: ["other"],
    "k" * 11: ["ok"],  # a rating above 10
    "l" * 3: ["blank"],
}
EXPECTED = [
    *({"rating": n} for n in (1, 2, 3)),
    *("refused", "refused", "cut", "rejected", "no tool call", "malformed", "malformed", "malformed", "empty"),
]


@pytest.mark.parametrize("kind", API)
def test_failures_are_counted_and_are_no_verdicts(kind, server, tmp_path, capsys):
    """Faults are retried by the SDK. What is refused, cut, broken or of another form is neither yes nor no."""
    server.replies |= {text: list(replies) for text, replies in FAILURES.items()}
    judge = provider(kind, server, tmp_path)
    found = judge.judge(f"ratings by {kind}", list(map(question, FAILURES)))
    assert [one if isinstance(one, dict) else one.why for one in found] == EXPECTED
    (said,) = judge.told()
    why = "1 cut, 1 empty, 3 malformed, 1 no tool call, 2 refused, 1 rejected"
    assert said == f"ratings by {kind}: 3 of 12 questions answered ({why})." and judge.told() == []
    assert said in capsys.readouterr().err
    assert [server.asked[text] for text in FAILURES] == [2, 2, 2] + [1] * 9
    sent = server.bodies[0]
    if kind == "openai":
        assert sent["tool_choice"] == {"type": "function", "function": {"name": "rate"}}
        assert sent["tools"][0]["function"]["parameters"] == RATE.schema and sent["max_completion_tokens"] == 1000
    else:
        assert sent["tool_choice"] == {"type": "tool", "name": "rate"} and sent["max_tokens"] == 1000
        assert sent["tools"][0]["input_schema"] == RATE.schema
    assert not [file for file in tmp_path.rglob("*") if file.is_file() and KEY in file.read_text()]
    # Asked again, nobody is asked again; by another process only what cost nothing.
    assert [one if isinstance(one, dict) else one.why for one in judge.judge("", list(map(question, FAILURES)))] == (
        EXPECTED
    )
    assert server.prompts.total() == 15
    again = provider(kind, server, tmp_path).judge("ratings", list(map(question, FAILURES)))
    assert server.prompts.total() == 16 and again[6] == {"rating": 7} and again[:6] == found[:6]


@pytest.mark.parametrize("kind", API)
def test_an_error_that_stays_ends_in_one_sentence_and_loses_nothing(kind, server, tmp_path):
    server.replies["six"] = [401]
    texts = [question(text) for text in ("one", "two", "six", "ten")]
    with pytest.raises(InputError) as error:
        provider(kind, server, tmp_path).judge("ratings", texts)
    one_sentence(error)
    said = str(error.value)
    assert "gives no answer for the text 'six'" in said and KEY not in said and "_API_KEY" in said
    before = dict(server.asked)
    assert provider(kind, server, tmp_path).judge("ratings", texts) == [{"rating": 3}] * 4
    assert {text: n - before.get(text, 0) for text, n in server.asked.items()}["six"] == 1
    assert server.asked.total() == 5


def test_killed_and_resumed(server, tmp_path):
    """After SIGKILL no question is asked again that was answered."""
    texts = [f"text {i}" for i in range(10)]
    server.replies |= {text: ["slow"] for text in texts}
    folder = tmp_path / "answers"
    script = (
        "import sys, test_provider as t; from types import SimpleNamespace as S\n"
        f"t.provider('openai', S(url={server.url!r}), {str(folder)!r}, concurrency=2).judge('x', "
        f"list(map(t.question, {texts!r})))"
    )
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen([sys.executable, "-c", script], env=environment, stderr=subprocess.PIPE)
    kept = lambda: sum(file.read_text().count("\n") for file in folder.glob("*.jsonl"))
    try:
        while kept() < 4:
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    answered = kept()
    server.replies.clear()
    found = provider("openai", server, folder).judge("x", list(map(question, texts)))
    assert found == [{"rating": 6}] * 10
    again = [text for text in texts if server.asked[text] > 1]
    assert len(again) <= 2 and 4 <= answered < 10  # those under way


def test_equal_questions_share_an_answer_and_other_settings_do_not(server, tmp_path):
    judge = provider("openai", server, tmp_path)
    assert judge.judge("x", [question("one"), question("one")]) == [{"rating": 3}] * 2 and server.asked["one"] == 1
    assert judge.write("x", [question("one", None)]) != [{"rating": 3}] and server.asked["one"] == 2
    provider("openai", server, tmp_path, settings={"request": {"temperature": 0}}).judge("x", [question("one")])
    assert server.asked["one"] == 3
    provider("openai", server, tmp_path, connection={"timeout": 9.0}).judge("x", [question("one")])
    assert server.asked["one"] == 3


def test_a_writer_may_be_turned_down(server, tmp_path):
    server.writes = lambda prompt, text: f"<text>{text.upper()}</text>"
    server.replies["two"] = ["refused"]
    writer = provider("anthropic", server, tmp_path)
    texts = [question(text, None) for text in ("one", "two", "six")]
    accept = lambda i, text: text if i < 2 else NoLabel("too short")
    assert writer.write("x", texts, accept) == ["ONE", NoLabel("refused"), NoLabel("too short")]
    assert writer.told() == ["x: 1 of 3 questions answered (1 refused, 1 too short)."]


def test_half_a_character_is_no_answer(server, tmp_path):
    """No tokenizer reads it, and no server takes it."""
    server.writes = lambda prompt, text: "half \ud83d" if text == "one" else text
    server.calls = lambda tool, prompt: {"rating": 3, "why": "\ud83d"}
    writer = provider("openai", server, tmp_path)
    found = writer.write("x", [question("one", None), question("two", None)])
    assert found == [NoLabel("malformed", "half of a character"), "two"]
    assert writer.judge("x", [question("one")]) == [NoLabel("malformed", "half of a character")]


def test_a_batch_answers_by_tool_calls(server, tmp_path):
    server.results |= {"two": ["expired", "ok"], "six": ["refused"]}
    judge = provider("anthropic_batch", server, tmp_path, connection={"poll": 0.01})
    found = judge.judge("x", [question(text) for text in ("one", "two", "six")])
    assert found == [{"rating": 3}, {"rating": 3}, NoLabel("refused")] and len(server.batches) == 2
    assert judge.judge("x", [question("one")]) == [{"rating": 3}] and len(server.batches) == 2


def test_a_local_model_is_asked_for_the_form(tmp_path, monkeypatch):
    """No tool can be forced there."""
    seen = []

    def answers(self, prompts):
        seen.extend(prompts)
        return [('Sure: {"rating": 7}.', True), ("7", True), ('{"rating": 7', False)][: len(prompts)]

    monkeypatch.setattr(Local, "answers", answers)
    monkeypatch.setattr(Local, "version", "v")
    judge = Provider("local", "folder", folder=tmp_path)
    found = judge.judge("x", [question(text) for text in ("one", "two", "six")])
    assert found[0] == {"rating": 7} and [one.why for one in found[1:]] == ["no tool call", "cut"]
    assert json.dumps(RATE.schema) in seen[0] and "Rate it." in seen[0]


def test_a_model_that_answers_nothing_is_noticed(server, tmp_path):
    texts = [f"text {i}" for i in range(60)]
    server.replies |= {text: ["bare"] for text in texts}
    with pytest.raises(
        InputError, match=r"None of the first \d+ questions has an answer \(x; .*no tool call: it says: 7"
    ):
        provider("openai", server, tmp_path).judge("x", list(map(question, texts)))
    assert 20 <= server.asked.total() <= 40


def test_a_dry_run_asks_nobody_and_writes_nothing(server, tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    c = Settings("openai", "m", connection={"base_url": f"{server.url}/v1"}, price_in=2.0, price_out=10.0)
    dry = DryRun(c, tmp_path / "answers", len, "characters")
    dry.ready()
    texts = list(map(question, ("one", "two", "two", "four")))
    assert dry.judge("x", texts) == [{"rating": 5}] * 4
    assert dry.write("x", [question("one", None)]) == [NoLabel("not asked")]
    sent = sum(len(question(text).prompt) + len(json.dumps(RATE.schema)) for text in ("one", "two", "four"))
    sent += len(question("one").prompt)
    lines = dict(line.split(None, 1) for line in str(dry.cost()).splitlines())
    assert lines["questions"].startswith("4 to ask for, of 4")
    assert lines["tokens"] == f"about {sent:,} sent, and at most 4,000 in the answers (characters)"
    assert lines["price"].startswith(f"at most {(sent * 2 + 4000 * 10) / 1e6:.2f}, as evaluate.provider.price_in")
    assert not server.asked and not list(tmp_path.iterdir())
    provider("openai", server, tmp_path / "answers").judge("x", texts[:1])
    again = DryRun(c, tmp_path / "answers", len, "characters")
    assert again.judge("x", texts)[0] == {"rating": 3} and "2 to ask for, of 3" in str(again.cost())


WRONG = {
    "a kind": (("claude", "m"), {}, "evaluate.provider.kind is 'claude'; it must be openai"),
    "no model": (("openai", " "), {}, "evaluate.provider.model is ' '"),
    "a password": (
        ("openai", "m"),
        {"connection": {"base_url": "http://me:secret@x/v1"}},
        "evaluate.provider.connection",
    ),
    "an instruction": (("openai", "m"), {"settings": {"instruction": "{text}"}}, "gives 'instruction'"),
    "no tokens": (("openai", "m"), {"settings": {"max_tokens": 0}}, "evaluate.provider.settings.max_tokens"),
    "a key": (("openai", "m"), {"settings": {"api_key": "sk-x"}}, "unexpected keyword argument 'api_key'"),
    "one row": (("openai", "m"), {"rows": 1}, "evaluate.provider.rows of 2 or more"),
    "no labeller that answers": (("nla_jax.labels.behaviour:Behaviour", "m"), {}, "Behaviour"),
    "no key": (("openai", "m"), {}, "set OPENAI_API_KEY in the environment, or evaluate.provider.connection.base_url"),
    "no folder": (("local", "no/folder/here"), {}, "no/folder/here"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_settings_are_one_sentence(case, monkeypatch, tmp_path):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    given, more, words = WRONG[case]
    with pytest.raises(InputError) as error:
        Provider(*given, folder=tmp_path, **more).ready()
    one_sentence(error)
    assert words in str(error.value) and "secret" not in str(error.value)


def test_what_fits_a_schema():
    """By hand; a bool is no integer, and an array has as many entries as asked for."""
    verdicts = {"type": "array", "minItems": 2, "maxItems": 2, "items": {"type": "string", "enum": ["a", "b"]}}
    assert fits(["a", "b"], verdicts)
    assert not any(fits(value, verdicts) for value in (["a"], ["a", "c"], ["a", "b", "a"], "ab", None, [1, 2]))
    number = {"type": "integer", "minimum": 1, "maximum": 3}
    assert fits(3, number) and not any(fits(value, number) for value in (0, 4, True, 2.0, "2", None))
    assert fits(True, {"type": "boolean"}) and not fits(1, {"type": "boolean"})
    assert read_call('{"rating": 3, "why": "more"}', RATE) == {"rating": 3, "why": "more"}
    assert read_call('{"a":' * 10**5 + "1" + "}" * 10**5, RATE).why == "malformed"
    assert read_call("[3]", RATE).why == "no tool call" and read_call('{"ratings": 3}', RATE).why == "malformed"
