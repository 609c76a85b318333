"""`nla serve`: the page on which a click on a token shows what its activation says; or that page as a file."""

import argparse
import socket
import webbrowser
from pathlib import Path

from nla_jax.runtime.environment import import_transformers_alone
from nla_jax.runtime.errors import InputError
from nla_jax.verbs.conventions import add_conventions, given_conventions
from nla_jax.verbs.explain import document, read_bytes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The pairs, where the server listens, and what it refuses."""
    parser.add_argument(
        "--pair",
        action="append",
        required=True,
        help="folder with av/ and ar/, a run's working folder, a hub id, or quickstart; several stand side by side",
    )
    parser.add_argument("--subject", help="the subject's folder or hub id (default: what the pairs' sidecars name)")
    parser.add_argument(
        "--workdir", help="working folder of the run that trained the pairs: shows the nearest training activations"
    )
    parser.add_argument(
        "--confidence",
        type=int,
        metavar="N",
        help="sampled explanations of which the confidence of a claim is made (default 5; with --export: none)",
    )
    parser.add_argument("--labeller", help="import path of the labeller in whose words claims are read for it")
    parser.add_argument("--host", default="127.0.0.1", help="where to listen (default: this machine alone)")
    parser.add_argument("--port", type=int, default=8765, help="default 8765; 0: any that is free")
    parser.add_argument("--open", action="store_true", help="open the page in the browser")
    parser.add_argument(
        "--export", metavar="FILE", help="explain this text (or chat, X.json) without a server; see --out"
    )
    parser.add_argument("--out", metavar="FILE", help="the page that --export writes, X.html")
    parser.add_argument("--batch", type=int, default=16, help="explanations that are sampled at a time (default 16)")
    parser.add_argument("--max-tokens", type=int, default=4000, help="tokens of the longest text (default 4000)")
    parser.add_argument("--queue", type=int, default=40_000, help="explanations that may wait (default 40000)")
    parser.add_argument("--seconds", type=float, default=1800, help="when a request is given up (default 1800)")
    parser.add_argument("--dtype", help="dtype of weights and computation (default: that of the files)")
    add_conventions(parser)


def run(arguments: argparse.Namespace) -> None:
    """Serves until it is stopped, or writes the page."""
    if (arguments.export is None) != (arguments.out is None):
        raise InputError("--export names the text and --out the page that is written; give both, or neither.")
    if arguments.out and arguments.labeller and arguments.confidence is None:
        raise InputError("--labeller reads claims, which an exported page has with --confidence N; give both.")
    out = new_page(arguments.out)
    content = None if out is None else material(arguments.export)
    if not (arguments.injection or arguments.labeller):  # which may be functions of the user's
        import_transformers_alone()
    from nla_jax.probes.confidence import SAMPLES
    from nla_jax.runtime.compiler import enable_compile_cache
    from nla_jax.runtime.user_input import whole_number
    from nla_jax.serve.actions import limits
    from nla_jax.serve.models import load

    batch = whole_number("--batch", arguments.batch, 1)
    samples = SAMPLES if out is None and arguments.confidence is None else arguments.confidence
    if samples is not None:
        whole_number("--confidence", samples, 1)
    port = whole_number("--port", arguments.port, 0, 65535)
    limit = limits(arguments.max_tokens, arguments.queue, arguments.seconds)
    enable_compile_cache()
    listening = None if out else listen(arguments.host, port)  # before minutes go by until the pairs are loaded
    conventions = given_conventions(arguments)
    reading = (arguments.workdir, samples, arguments.labeller)
    served = load(arguments.pair, arguments.subject, arguments.dtype, conventions, *reading)
    if listening is None:
        export(served, content, limit.tokens, batch, out)
    else:
        serve(served, limit, batch, listening, arguments)


def new_page(name: str | None) -> Path | None:
    """Where the page goes. Raises `InputError` for a name that is taken, or is not X.html."""
    if name is None:
        return None
    path = Path(name)
    if path.suffix != ".html":
        raise InputError(f"--out must end in .html; found {name}.")
    if path.exists():
        raise InputError(f"{path} exists; give --out another name, or remove it first.")
    return path


def material(name: str):
    """The text of a file, or the messages of a chat (X.json). Raises `InputError` for what cannot be read."""
    if not name.endswith((".json", ".jsonl")):
        return document(read_bytes(name), name)
    from nla_jax.data.chats import read_chats

    chats = read_chats(Path(name))
    if len(chats) != 1:
        raise InputError(f"{name} holds {len(chats)} conversations; --export takes one.")
    return chats[0][1]


def export(served, content, most: int, batch: int, out: Path) -> None:
    """Writes the page, with progress."""
    from nla_jax.io.files import replacing
    from nla_jax.runtime.metrics import Progress
    from nla_jax.serve.export import exported
    from nla_jax.serve.models import tokenized

    progress = Progress("explain", len(tokenized(served[0].subject, content)[2]) * len(served))
    html = exported(served, content, most, batch, progress.update)
    with replacing(out) as scratch:
        scratch.write_text(html, encoding="utf-8")


def listen(host: str, port: int) -> socket.socket:
    """A socket on which the server listens. Raises `InputError` where that is not possible."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
    except OSError as error:
        raise InputError(
            f"The server cannot listen on {host}:{port} ({error.strerror}); give another --port."
        ) from None
    return listening


def serve(served, limit, batch: int, listening: socket.socket, arguments: argparse.Namespace) -> None:
    """Runs the server until it is stopped. Raises `InputError` where the extra `serve` is not installed."""
    try:
        import uvicorn

        from nla_jax.serve.server import application, new_token
    except ModuleNotFoundError as error:
        raise InputError(f"The server needs {error.name}; install it with: pip install 'nla_jax[serve]'.") from None
    from nla_jax.serve.actions import Desk
    from nla_jax.serve.worker import Worker

    token, port = new_token(arguments.host), listening.getsockname()[1]
    host = f"[{arguments.host}]" if ":" in arguments.host else arguments.host
    address = f"http://{host}:{port}/" + (f"?token={token}" if token else "")
    desk = Desk(served, Worker(batch, limit.queue), limit)
    # Nobody's requests are logged: they would show the token.
    config = uvicorn.Config(
        application(desk, token), log_level="warning", access_log=False, timeout_graceful_shutdown=1
    )
    listening.listen()  # so that who opens the address at once is not turned away
    print(f"The page is at {address} (Ctrl-C ends the server).", flush=True)
    if arguments.open:
        webbrowser.open(address)
    try:
        uvicorn.Server(config).run(sockets=[listening])
    finally:
        desk.worker.close()  # a process must not end amid a computation
