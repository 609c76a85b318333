"""A server on loopback with the chat completions of OpenAI, and the messages and message batches of Anthropic.

It writes labels, or whatever `writes` says, and calls tools with the arguments that `calls` says."""

import collections
import contextlib
import hashlib
import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

SHOWN = re.compile(r"<text>\n(.*)\n</text>", re.DOTALL)


def wanted(text: str) -> str:
    """The label that the server's model writes for a text."""
    return f"A text of {len(text)} characters, {hashlib.sha256(text.encode()).hexdigest()[:12]}."


class FakeLLM:
    """`replies[text]`: what happens to the first, second, … request about a text; afterwards it is answered.

    "ok", "slow", "refused", "filtered", "cut", "tagged", "blank", "broken", or a status code; where a tool is to be
    called also "bare" (a number instead), "half" (broken JSON) or "other" (arguments of another form). `asked` counts the
    requests about a text, `prompts` those with a whole prompt, `answered` those that cost money. `writes(prompt, text)`
    and `calls(tool, prompt)` say what is answered. Of batches: `results[text]` likewise ("ok", "refused",
    "cut", "invalid", "faulty", "expired", "canceled"), and a batch has ended after it was looked at `looks` times."""

    def __init__(self):
        self.replies, self.results = collections.defaultdict(list), collections.defaultdict(list)
        self.asked, self.answered, self.prompts = (collections.Counter() for _ in range(3))
        self.writes, self.calls = lambda prompt, text: wanted(text), lambda tool, prompt: {}
        self.bodies, self.keys, self.batches = [], set(), {}
        self.looks, self.busy, self.busiest = 1, 0, 0
        self.lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                server.keys.add(self.headers.get("x-api-key") or self.headers.get("authorization"))
                server.answer(self, body)

            def do_GET(self):
                server.show(self)

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def close(self):
        self.http.shutdown()
        self.http.server_close()

    # Single requests

    def answer(self, handler, body):
        if handler.path.endswith("/batches"):
            return self.take(handler, body)
        prompt = body["messages"][0]["content"]
        text = SHOWN.search(prompt)[1]
        with self.lock:
            self.bodies.append(body)
            self.asked[text] += 1
            self.prompts[prompt] += 1
            reply = self.replies[text].pop(0) if self.replies[text] else "ok"
            self.busy += 1
            self.busiest = max(self.busiest, self.busy)
            if reply not in ("broken",) and not isinstance(reply, int):
                self.answered[text] += 1
        try:
            time.sleep(0.3 if reply == "slow" else 0.002)
            self.send(handler, body, reply, chat=handler.path.endswith("/chat/completions"))
        finally:
            with self.lock:
                self.busy -= 1

    def send(self, handler, body, reply, chat):
        if reply == "broken":  # amid the answer
            handler.send_response(200)
            handler.send_header("content-type", "application/json")
            handler.send_header("content-length", "5000")
            handler.end_headers()
            handler.wfile.write(b'{"id": "half an ans')
            handler.wfile.flush()
            handler.close_connection = True
            handler.connection.close()
        elif isinstance(reply, int):
            key = handler.headers.get("authorization") or handler.headers.get("x-api-key")
            words = f"status {reply} for the key {key}"
            error = {"type": "error", "error": {"type": "invalid_request_error", "message": words}}
            respond(handler, error, reply, {"retry-after": "0.02"} if reply == 429 else {})
        else:
            respond(handler, (completion if chat else message)(*self.said(body, reply), reply))

    def said(self, body, reply):
        """What the model writes, and the tool that it calls with the JSON of its arguments."""
        prompt, tools = body["messages"][0]["content"], body.get("tools")
        if not tools or reply in ("refused", "filtered", "cut", "bare", "blank"):
            return ("7" if reply == "bare" else said(self.writes(prompt, SHOWN.search(prompt)[1]), reply)), None
        forced, tool = body["tool_choice"], tools[0].get("function", tools[0])
        assert tool["name"] == forced.get("function", forced)["name"] and len(tools) == 1
        call = json.dumps(self.calls(tool["name"], prompt))
        return "", (tool["name"], {"half": call[: len(call) // 2], "other": '{"nonsense": 1}'}.get(reply, call))

    # Batches

    def take(self, handler, body):
        asked = {r["custom_id"]: r["params"] for r in body["requests"]}
        requests = {id: SHOWN.search(params["messages"][0]["content"])[1] for id, params in asked.items()}
        with self.lock:
            self.bodies.append(body)
            id = f"msgbatch_{len(self.batches)}"
            self.asked.update(requests.values())
            done = {}
            for custom_id, text in requests.items():
                reply = self.results[text].pop(0) if self.results[text] else "ok"
                self.answered[text] += reply in ("ok", "refused", "cut")
                done[custom_id] = result(*self.said(asked[custom_id], reply), reply)
            self.batches[id] = {"looks": 0, "results": done}
        respond(handler, self.batch(id))

    def show(self, handler):
        id = handler.path.split("/")[4]
        if id not in self.batches:
            error = {"type": "error", "error": {"type": "not_found_error", "message": "no such batch"}}
            return respond(handler, error, 404)
        if handler.path.endswith("/results"):
            lines = [{"custom_id": id, "result": found} for id, found in self.batches[id]["results"].items()]
            return respond(handler, "".join(json.dumps(line) + "\n" for line in reversed(lines)))
        self.batches[id]["looks"] += 1
        return respond(handler, self.batch(id))

    def batch(self, id):
        found = self.batches[id]
        ended = found["looks"] > self.looks
        kinds = collections.Counter(r["type"] for r in found["results"].values())
        counts = {kind: ended * kinds[kind] for kind in ("succeeded", "errored", "canceled", "expired")}
        return {
            "id": id,
            "type": "message_batch",
            "processing_status": "ended" if ended else "in_progress",
            "request_counts": counts | {"processing": 0 if ended else kinds.total()},
            "created_at": "2026-11-28T10:00:00Z",
            "expires_at": "2026-11-29T10:00:00Z",
            "ended_at": "2026-11-28T11:00:00Z" if ended else None,
            "results_url": f"{self.url}/v1/messages/batches/{id}/results" if ended else None,
        }


def respond(handler, content, status=200, headers=()):
    data = (content if isinstance(content, str) else json.dumps(content)).encode()
    with contextlib.suppress(OSError):  # the client was killed
        handler.send_response(status)
        handler.send_header("content-type", "application/json")
        handler.send_header("content-length", str(len(data)))
        for name, value in dict(headers).items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(data)


def said(label, reply):
    return {"tagged": f"<explanation>\n{label}\n</explanation>", "cut": label[:12], "blank": " \n"}.get(reply, label)


def completion(written, call, reply):
    refused = reply == "refused"
    content = {"role": "assistant", "content": None if refused or call else written}
    if call:
        function = {"name": call[0], "arguments": call[1]}
        content["tool_calls"] = [{"id": "t", "type": "function", "function": function}]
    return {
        "id": "c",
        "object": "chat.completion",
        "created": 1,
        "model": "m",
        "choices": [
            {
                "index": 0,
                "finish_reason": {"cut": "length", "filtered": "content_filter"}.get(reply, "stop"),
                "message": content | ({"refusal": "I cannot help with that."} if refused else {}),
            }
        ],
    }


def message(written, call, reply):
    content = [] if reply == "refused" else [{"type": "text", "text": written}]
    if call:  # the service sends an object; a broken one can only come as a text
        arguments = call[1] if reply == "half" else json.loads(call[1])
        content = [{"type": "tool_use", "id": "t", "name": call[0], "input": arguments}]
    return {
        "id": "m",
        "type": "message",
        "role": "assistant",
        "model": "m",
        "content": content,
        "stop_reason": {"cut": "max_tokens", "refused": "refusal", "filtered": "refusal"}.get(reply, "end_turn"),
        "stop_sequence": None,
        "usage": {"input_tokens": 1, "output_tokens": 1},
    }


def result(written, call, reply):
    if reply in ("expired", "canceled"):
        return {"type": reply}
    if reply in ("invalid", "faulty"):
        error = {"type": "invalid_request_error" if reply == "invalid" else "api_error", "message": "no luck"}
        return {"type": "errored", "error": {"type": "error", "error": error, "request_id": None}}
    return {"type": "succeeded", "message": message(written, call, reply)}
