"""The server: the page, and one address that answers what the page asks for, line by line as it is ready.

Three checks come before everything. The `Host` header must name this machine, else a foreign page could reach the server
under a name of its own (DNS rebinding). Where the server listens elsewhere than on this machine, the URL's token is
asked for instead. And a request must be JSON of the same origin, which no foreign page can send."""

import asyncio
import ipaddress
import json
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from nla_jax.runtime.errors import InputError
from nla_jax.serve.actions import ACTIONS, Desk, Unknown
from nla_jax.serve.page import POLICY, page
from nla_jax.serve.worker import Job

LISTENING = 0.25  # seconds between two looks at whether somebody still waits
HEADERS = {
    "Content-Security-Policy": f"{POLICY}; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


def is_local(host: str) -> bool:
    """Whether `host` names this machine, as nobody else can: a server there is reached from this machine alone."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def new_token(host: str) -> str | None:
    """The token that a server on `host` asks for; None where only this machine reaches it."""
    return None if is_local(host) else secrets.token_urlsafe(24)


def application(desk: Desk, token: str | None = None) -> Starlette:
    """The server as an ASGI application. With a `token` every request must bring it: in the query or in `X-Token`."""
    content = page({"pairs": [one.about for one in desk.served], "tokens": desk.limits.tokens})

    def checked(answer: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        async def guarded(request: Request) -> Response:
            reason = refusal(request, token)
            response = JSONResponse({"error": reason}, 403) if reason else await answer(request)
            response.headers.update(HEADERS)
            return response

        return guarded

    async def shown(request: Request) -> Response:
        return HTMLResponse(content)

    async def ask(request: Request) -> Response:
        return await asked(desk, request)

    return Starlette(
        routes=[
            Route("/", checked(shown)),
            Route("/ask", checked(ask), methods=["POST"]),
        ]
    )


def refusal(request: Request, token: str | None) -> str:
    """Why a request is not answered at all; "" where it is."""
    host = request.headers.get("host", "")
    name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
    if token is None and not is_local(name.strip("[]").lower()):
        return f"This server answers to the names localhost and 127.0.0.1 alone, not to {host[:80]!r}."
    given = request.headers.get("x-token") or request.query_params.get("token", "")
    if token is not None and not secrets.compare_digest(given.encode(), token.encode()):
        return "The token is missing or wrong; open the address that `nla serve` printed."
    origin = request.headers.get("origin")
    if origin is not None and origin.partition("://")[2] != host:
        return f"A page of {origin[:80]} may not ask this server."
    if request.method == "POST" and request.headers.get("content-type", "").partition(";")[0] != "application/json":
        return "Requests must be of the content type application/json."
    return ""


async def asked(desk: Desk, request: Request) -> Response:
    """Answers as lines of JSON: `{"error": sentence}` where something cannot be answered, `{"done": true}` at the end."""
    try:
        fields = await fields_of(request, desk.limits.bytes)
        action = ACTIONS.get(fields.get("do"))
        if action is None:
            raise InputError(f"There is no action {fields.get('do')!r:.50}; there are {', '.join(ACTIONS)}.")
    except InputError as error:
        return JSONResponse({"error": str(error)}, 400)
    return StreamingResponse(answers(desk, action, fields, request), media_type="application/x-ndjson")


def line(answer: dict[str, Any]) -> str:
    """An answer as a line of JSON."""
    return json.dumps(answer, ensure_ascii=False) + "\n"


async def fields_of(request: Request, most: int) -> dict[str, Any]:
    """The request's JSON object. Raises `InputError` for more than `most` bytes, and for what is no object."""
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > most:
            raise InputError(f"The request has more than {most:,} bytes; send a shorter text.")
    try:
        fields = json.loads(bytes(body))
    except (ValueError, RecursionError):
        fields = None
    if not isinstance(fields, dict) or not isinstance(fields.get("do"), str):
        raise InputError('A request is a JSON object with "do".')
    return fields


async def answers(
    desk: Desk, action: Callable[..., list[Job]], fields: dict[str, Any], request: Request
) -> AsyncIterator[str]:
    """Answers, a line each, as they are ready. Who goes away, or waits for too long, has his jobs taken out of the queue."""
    loop, ready, jobs = asyncio.get_running_loop(), asyncio.Queue(), []

    def take(answer: dict | None) -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(ready.put_nowait, answer)

    ends = time.monotonic() + desk.limits.seconds
    try:
        jobs = action(desk, fields, take)
        desk.worker.add(*jobs)
        await asyncio.sleep(0)  # what the action itself answered is in the queue from the loop's next turn on
        left = len(jobs)
        while left or not ready.empty():
            try:
                answer = await asyncio.wait_for(ready.get(), LISTENING)
            except TimeoutError:
                answer = None
                if await request.is_disconnected():
                    return
            else:
                left -= answer is None
            if answer is not None and "error" in answer:
                raise InputError(answer["error"])
            if answer is not None:
                yield line(answer)
            if left and time.monotonic() > ends:
                raise InputError(f"This took longer than {desk.limits.seconds:g} seconds and was given up; ask again.")
        yield line({"done": True})
    except InputError as error:
        yield line({"error": str(error), "unknown": isinstance(error, Unknown)})
    finally:
        for job in jobs:
            desk.worker.cancel(job)
