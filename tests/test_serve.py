"""`nla serve` without a browser: who is answered, what is refused, batches of many tabs, the page as a file."""

import concurrent.futures
import contextlib
import dataclasses
import json
import re
import socket
import threading
import time

import numpy as np
import pytest
import uvicorn
from conftest import LIMIT, VARIANCE
from starlette.testclient import TestClient

from nla_jax.data.chats import chat_tokens
from nla_jax.labels.extractive import label_one
from nla_jax.quickstart.tokenizer import train_tokenizer
from nla_jax.runtime.errors import InputError
from nla_jax.serve import actions, models
from nla_jax.serve.actions import Desk, Limits
from nla_jax.serve.claims import claims_of
from nla_jax.serve.models import Served, program_rows, read_document
from nla_jax.serve.server import application, is_local, new_token
from nla_jax.serve.worker import Worker
from nla_jax.subject import extract

TEXT = "The river turns north at the old mill and runs through three villages."
CHAT = [{"role": "user", "content": "What is bread?"}, {"role": "assistant", "content": "It is in the market."}]
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(1)>{{SCRIPT}} <!-- \u2028 &amp;"


@pytest.fixture
def desk(served):
    worker = Worker(16, 10_000)
    yield Desk(served, worker, Limits())
    worker.close()


@pytest.fixture
def client(desk):
    return TestClient(application(desk), base_url="http://127.0.0.1:8765")


def ask(client, do, **fields):
    """The answers to a request, without the last line, which must say that they are all."""
    response = client.post("/ask", json={"do": do, **fields})
    assert response.status_code == 200, response.text
    *answers, end = [json.loads(line) for line in response.text.splitlines()]
    assert end == {"done": True}, end
    return answers


def refused(client, do, **fields) -> str:
    """The sentence with which a request ends."""
    body = json.dumps({"do": do, **fields})  # in ASCII, as half of a character has no other form
    response = client.post("/ask", content=body, headers={"content-type": "application/json"})
    said = json.loads(response.text.splitlines()[-1])["error"]
    assert "\n" not in said and said.endswith("."), said
    return said


def within(seconds, condition):
    """Waits until a condition holds."""
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends
        time.sleep(0.01)


@contextlib.contextmanager
def running(desk, port=0):
    """The address of a real server."""
    listening = socket.create_server(("127.0.0.1", port))
    server = uvicorn.Server(uvicorn.Config(application(desk), log_level="warning", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    try:
        within(10, lambda: server.started)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/"
    finally:
        server.should_exit = True
        thread.join(10)
    assert not thread.is_alive()


# Who is answered


@pytest.mark.parametrize(
    "host", ["127.0.0.1:8765", "localhost:8765", "localhost", "[::1]:8765", "LOCALHOST:1", "127.0.0.2"]
)
def test_names_of_this_machine_are_answered(client, host):
    assert client.get("/", headers={"host": host}).status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8765", "127.0.0.1.evil.example:8765", "", "[::2]:8765"])
def test_other_names_are_not(client, host):
    for response in (client.get("/", headers={"host": host}), client.post("/ask", json={}, headers={"host": host})):
        assert response.status_code == 403 and "localhost" in response.json()["error"]


def test_the_token_is_asked_for_where_the_server_listens_elsewhere(desk):
    client = TestClient(application(desk, "secret"), base_url="http://10.0.0.7:8765")
    assert client.get("/?token=secret").status_code == 200
    assert client.post("/ask", json={}, headers={"x-token": "secret"}).status_code == 400
    for address in ("/", "/?token=", "/?token=secre", "/?token=ö"):
        assert client.get(address).status_code == 403
    assert client.post("/ask", json={"do": "read", "text": TEXT}).status_code == 403


def test_only_this_machine_needs_no_token():
    assert all(is_local(host) and new_token(host) is None for host in ("127.0.0.1", "localhost", "::1", "127.1.2.3"))
    tokens = {new_token(host) for host in ("0.0.0.0", "::", "10.0.0.7", "machine.example")}
    assert len(tokens) == 4 and all(len(token) >= 32 for token in tokens)


def test_foreign_pages_may_not_ask(client):
    body = json.dumps({"do": "read", "text": TEXT})
    plain = client.post("/ask", content=body, headers={"content-type": "text/plain"})
    json_of = lambda origin: {"content-type": "application/json", "origin": origin}
    for origin in ("http://evil.example", "null", "http://127.0.0.1:9"):
        assert client.post("/ask", content=body, headers=json_of(origin)).status_code == 403
    assert plain.status_code == 403
    assert client.post("/ask", content=body, headers=json_of("http://127.0.0.1:8765")).status_code == 200


def test_every_answer_forbids_what_the_page_does_not_need(client):
    for response in (client.get("/"), client.get("/", headers={"host": "evil.example"})):
        policy = response.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy and "unsafe" not in policy
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["referrer-policy"] == "no-referrer"
        assert "access-control-allow-origin" not in response.headers


# What is refused


def test_a_text_that_is_too_long_is_refused(desk, client):
    desk.limits = Limits(tokens=5)
    assert re.search(r"The text has \d+ tokens, more than the 5 ", refused(client, "read", text=TEXT))
    assert "more than the 5 " in refused(client, "read", messages=CHAT)


def test_a_request_that_is_too_large_is_refused(desk, client):
    desk.limits = Limits(bytes=1000)
    response = client.post("/ask", json={"do": "read", "text": "a" * 2000})
    assert response.status_code == 400 and "1,000 bytes" in response.json()["error"]


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b'{"do": 3}', b'{"do": "fly"}', b"\xff", b"[" * 100_000])
def test_what_is_no_request_is_refused(client, body):
    response = client.post("/ask", content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400 and response.json()["error"].endswith(".")


@pytest.mark.parametrize(
    "fields",
    [
        {"text": ""},
        {"text": 3},
        {"text": "half \ud800"},
        {"messages": []},
        {"messages": [{"role": "user"}]},
        {"messages": "hello"},
        {},
    ],
    ids=repr,
)
def test_what_cannot_be_read_is_refused(client, fields):
    refused(client, "read", **fields)


@pytest.mark.parametrize("rows", [None, [], [10_000], [-1], [True], ["0"], 3, [0.5]], ids=repr)
def test_tokens_that_do_not_exist_are_refused(client, rows):
    (document,) = ask(client, "read", text=TEXT)
    refused(client, "explain", document=document["id"], rows=rows)


def test_a_text_that_is_not_kept_is_said_to_be_unknown(desk, client):
    answer = client.post("/ask", json={"do": "explain", "document": "0", "rows": [0]}).json()
    assert answer["unknown"] and "read again" in answer["error"]
    for i in range(actions.KEPT + 1):
        ask(client, "read", text=f"{TEXT} {i}")
    assert len(desk.documents) == actions.KEPT


def test_a_full_queue_is_refused(served):
    worker = Worker(16, 3)
    client = TestClient(application(Desk(served, worker, Limits())), base_url="http://localhost")
    (document,) = ask(client, "read", text=TEXT)
    assert "busy" in refused(client, "explain", document=document["id"], rows=[0, 1])  # two pairs: four rows
    assert len(ask(client, "explain", document=document["id"], rows=[0])) == 2
    worker.close()


def test_what_takes_too_long_is_given_up(desk, client, monkeypatch):
    (document,) = ask(client, "read", text=TEXT)
    going = threading.Event()
    monkeypatch.setattr(actions, "explain", lambda *_, **__: going.wait(20) and [])
    desk.limits = Limits(seconds=0.1)
    said = refused(client, "explain", document=document["id"], rows=list(range(len(document["tokens"]))))
    assert "took longer than 0.1 seconds" in said and desk.worker.waiting == 0
    going.set()


# Reading


def test_a_text_is_read_as_it_is_extracted(served, desk, client):
    (document,) = ask(client, "read", text=TEXT)
    expected = extract(served[0].subject, [TEXT], "all")
    assert document["tokens"] == expected.tokens and "".join(document["tokens"]) == TEXT
    np.testing.assert_allclose(desk.documents[document["id"]].vectors[0], expected.vectors, atol=1e-5)
    norms = np.linalg.norm(expected.vectors, axis=1)
    np.testing.assert_allclose(document["norms"][0], norms / np.median(norms), rtol=1e-4)
    kept = desk.documents[document["id"]]
    assert [kept.context(row) for row in range(len(kept.tokens))] == expected.texts


def test_only_what_is_said_in_a_chat_is_explained(served, client):
    (document,) = ask(client, "read", messages=CHAT)
    ids, roles = chat_tokens(served[0].subject.tokenizer, CHAT)
    assert document["roles"] == [role for role in roles if role] and not any(
        "<|" in token for token in document["tokens"]
    )
    said = "".join(token for token, role in zip(document["tokens"], document["roles"]) if role == "assistant")
    assert said.strip() == CHAT[1]["content"]
    assert len(ask(client, "explain", document=document["id"], rows=[0, 1])) == 4


def test_attention_sinks_are_marked(served):
    sidecar = dataclasses.replace(served[0].pair.sidecar, provenance={"activation_norm": 0.01})
    short = dataclasses.replace(served[0], pair=dataclasses.replace(served[0].pair, sidecar=sidecar))
    shown = read_document([short, served[0]], TEXT, 4000).shown
    assert all(shown["sinks"][0]) and not any(shown["sinks"][1])


def test_pairs_of_other_tokens_are_refused(served):
    foreign = train_tokenizer(["Quite another text, with other words."] * 3, 300)
    other = dataclasses.replace(served[1], subject=dataclasses.replace(served[1].subject, tokenizer=foreign))
    with pytest.raises(InputError, match="second cuts this text into other tokens than first"):
        read_document([served[0], other], TEXT, 4000)


# Explaining


def one_at_a_time(one: Served, vector) -> dict:
    (said,) = one.pair.explain(vector[None], LIMIT, 0.0)
    scores = one.pair.score([said.text], vector[None]) if said.text else None
    fve = 1 - scores["mse"][0] / VARIANCE if scores else None
    return {"explanation": said.text, "cut": said.cut, "fve": fve, "cosine": scores["cosine"][0] if scores else None}


def same(answer: dict, expected: dict) -> None:
    assert {name: answer[name] for name in ("explanation", "cut")} == {n: expected[n] for n in ("explanation", "cut")}
    for name in ("fve", "cosine"):
        assert answer[name] == (pytest.approx(expected[name], abs=1e-4) if expected[name] is not None else None)


def test_many_tabs_share_batches_and_none_gets_anothers_answer(served, desk, monkeypatch):
    texts = [f"{TEXT[: 40 + i]} It is number {i}." for i in range(8)]
    sizes, compute, begun = [], models.explain, threading.Event()

    def counted(one, number, wanted, batch):
        begun.wait(10)
        sizes.append(len(wanted))
        return compute(one, number, wanted, batch)

    monkeypatch.setattr(actions, "explain", counted)

    def tab(i):
        client = TestClient(application(desk), base_url="http://127.0.0.1")
        (document,) = ask(client, "read", text=texts[i])
        clicks = [ask(client, "explain", document=document["id"], rows=[row]) for row in (i, 3, 5 + i, 1)]
        return clicks, ask(client, "explain", document=document["id"], rows=[2, 4, 6], pairs=[1], patient=True)

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        tabs = [pool.submit(tab, i) for i in range(8)]
        within(20, lambda: desk.worker.waiting >= 8)
        begun.set()
        found = [tab.result() for tab in tabs]
    assert len(sizes) < sum(sizes) / 3 and max(sizes) >= 7
    for text, (clicks, patient), i in zip(texts, found, range(8)):
        vectors = extract(served[0].subject, [text], "all").vectors
        for row, answers in zip((i, 3, 5 + i, 1), clicks):
            assert sorted((a["pair"], a["row"]) for a in answers) == [(0, row), (1, row)]
            for answer in answers:
                same(answer, one_at_a_time(served[answer["pair"]], vectors[row]))
        assert sorted((a["pair"], a["row"]) for a in patient) == [(1, 2), (1, 4), (1, 6)]
    said = [
        (a["explanation"], a["cosine"] and round(a["cosine"], 3))
        for clicks, _ in found
        for answers in clicks
        for a in answers
    ]
    assert len(set(said)) > 10


def test_what_is_known_is_not_computed_again(desk, client, monkeypatch):
    (document,) = ask(client, "read", text=TEXT)
    first = ask(client, "explain", document=document["id"], rows=[4, 2, 2])
    monkeypatch.setattr(actions, "explain", lambda *_, **__: 1 / 0)
    again = ask(client, "explain", document=document["id"], rows=[2, 4])
    by_place = lambda answer: (answer["pair"], answer["row"])
    assert len(first) == 4 and sorted(first, key=by_place) == sorted(again, key=by_place)
    assert ask(client, "read", text=TEXT) == [document]


def test_there_is_no_score_without_a_text(served, desk):
    silent = dataclasses.replace(served[0], max_new_tokens=1)
    document = read_document(served, TEXT, 4000)
    for answer in models.explain(silent, 0, [(document, 0), (document, 3)], 16):
        assert (answer["explanation"], answer["cosine"], answer["fve"], answer["claims"]) == ("", None, None, [])


def test_alternatives_are_sampled_and_scored_best_first(served, client):
    (document,) = ask(client, "read", text=TEXT)
    vector = extract(served[0].subject, [TEXT], "all").vectors[5]
    answers = ask(client, "alternatives", document=document["id"], row=5, count=6, seed=3)
    for one, answer in zip(served, answers):
        said = one.pair.explain(np.repeat(vector[None], 6, 0), LIMIT, 1.0, 3)
        assert sorted(found.text for found in said) == sorted(a["explanation"] for a in answer["alternatives"])
        scored = [a["cosine"] for a in answer["alternatives"] if a["explanation"]]
        assert scored == sorted(scored, reverse=True)
    assert "to 16" in refused(client, "alternatives", document=document["id"], row=5, count=17)


def test_claims_are_read_and_checked():
    context = "In the morning the market opens; by noon the fish are gone and only bread is left"
    right = {claim["kind"]: claim["true"] for claim in claims_of(label_one(context), context)}
    assert right == {"passage": True, "position": True, "last words": True, "last word": True}
    wrong = {claim["kind"]: claim["true"] for claim in claims_of(label_one(context), "def f(x):\n    return x")}
    assert set(wrong.values()) == {False}
    named = "Prose. Next surely a blank. It ends with -ft of left: … is left"
    told = lambda token: [claim["true"] for claim in claims_of(named, TEXT, token) if claim["kind"] == "last token"]
    assert [told("ft"), told(" left"), told("")] == [[True], [False], [None]]
    behaviour = 'Prose. Next perhaps "over", "." or a line break. It ends: … only bread is left'
    found = [(claim["kind"], claim["value"], claim["true"]) for claim in claims_of(behaviour, context)]
    assert ("last words", "only bread is left", True) in found and ("last word", "left", True) in found
    assert ("next", "over", None) in found and ("certainty", "Next perhaps", None) in found
    first, last = (claims_of(label_one(context, "ft", first=first), context, "ft") for first in (True, False))
    assert first == last  # a text that begins with the last word says the same
    assert claims_of("It is about rivers.", context) == []
    within = {token: claims_of(label_one(context, "ft"), context, token) for token in ("ft", " left")}
    assert [[c["true"] for c in found if c["kind"] == "last token"] for found in within.values()] == [[True], [False]]


@pytest.mark.parametrize("n, rows", [(1, 1), (2, 4), (4, 4), (5, 16), (16, 16), (20, 24), (24, 24)])
def test_programs_are_few(n, rows):
    assert program_rows(n, 24) == rows


def test_a_closed_tab_takes_its_work_with_it(desk, monkeypatch):
    going = threading.Event()
    explained = lambda one, number, wanted, batch: (
        going.wait(20) and [{"pair": number, "row": row} for _, row in wanted]
    )
    monkeypatch.setattr(actions, "explain", explained)
    (document,) = ask(TestClient(application(desk), base_url="http://127.0.0.1"), "read", text=TEXT)
    body = json.dumps({"do": "explain", "document": document["id"], "rows": list(range(len(document["tokens"])))})
    with running(desk) as address:
        host, port = address.removeprefix("http://").removesuffix("/").split(":")
        head = f"POST /ask HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
        with socket.create_connection((host, int(port))) as tab:
            tab.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
            within(10, lambda: desk.worker.waiting > 20)
        within(10, lambda: desk.worker.waiting == 0)
        assert not going.is_set()
        going.set()
