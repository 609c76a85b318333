"""Many people click at once: is every click answered, rightly, and how fast?

    python experiments/serve/load.py --pair quickstart --clients 8 --clicks 200

Two fresh servers get the same clicks on the same texts, one after the other from a single client, then from all clients at
once; each client clicks again as soon as it is answered. An answer counts as mixed up unless it is that of the single client:
the same words, FVE to 0.01. Prints a table; exits with 1 where an answer is lost or mixed up."""

import argparse
import concurrent.futures
import contextlib
import http.client
import json
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pydoc_data.topics import topics

CHARACTERS = 600  # of each client's text
CLOSE = 0.01  # FVE of the same words, computed in a batch of another size
WARM = {1: 48, 4: 12, 16: 4}  # rows of a batch, and how many such batches are compiled and run before the clock starts


class Client:
    """Asks a server over one connection, as a tab does."""

    def __init__(self, port: int):
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)

    def ask(self, **fields) -> list[dict]:
        """The answers to a request, without the line that ends them."""
        self.connection.request("POST", "/ask", json.dumps(fields), {"Content-Type": "application/json"})
        *answers, end = map(json.loads, self.connection.getresponse().read().splitlines())
        if end != {"done": True}:
            raise RuntimeError(end.get("error"))
        return answers

    def read(self, text: str) -> dict:
        (document,) = self.ask(do="read", text=text)
        return document

    def click(self, document: str, row: int) -> tuple[dict, float]:
        """What a click on a token shows, and after how many seconds."""
        start = time.perf_counter()
        (answer,) = self.ask(do="explain", document=document, rows=[row])
        return answer, time.perf_counter() - start


@contextlib.contextmanager
def server(pair: str, batch: int) -> Iterator[int]:
    """The port of a fresh server that has compiled its programs."""
    command = [sys.executable, "-m", "nla_jax.cli", "serve", "--pair", pair, "--port", "0", "--batch", str(batch)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        port = int(re.search(r"http://\S+:(\d+)/", process.stdout.readline())[1])
        client, row = Client(port), 0
        document = client.read(" ".join(sorted(topics)) * 2)["id"]
        for rows, count in WARM.items():
            for _ in range(count):
                client.ask(do="explain", document=document, rows=list(range(row, row + rows)))
                row += rows
        yield port
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)


def clicked(port: int, texts: list[str], each: int, clients: int) -> tuple[dict, list[float], float]:
    """The answers to `each` clicks on every text, by text and click; how long each took; and all together."""
    documents = [Client(port).read(text) for text in texts]

    def clicks(i: int) -> list[tuple]:
        client, step = Client(port), len(documents[i]["tokens"]) // each
        return [((i, j), *client.click(documents[i]["id"], j * step)) for j in range(each)]

    start = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(clients) as pool:
        found = [row for rows in pool.map(clicks, range(len(texts))) for row in rows]
    total = time.perf_counter() - start
    return {key: answer for key, answer, _ in found}, [seconds for _, _, seconds in found], total


def same(answer: dict, expected: dict) -> bool:
    """Whether two answers are the same but for rounding."""
    words = ("pair", "row", "explanation", "cut")
    close = answer["fve"] is expected["fve"] or abs(answer["fve"] - expected["fve"]) < CLOSE
    return all(answer[name] == expected[name] for name in words) and close


def line(name: str, seconds: list[float], total: float) -> str:
    quantiles = statistics.quantiles(seconds, n=20)
    return f"| {name} | {statistics.median(seconds):.3f} | {quantiles[-1]:.3f} | {len(seconds) / total:.2f} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pair", default="quickstart")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--clicks", type=int, default=200, help="in all")
    parser.add_argument("--batch", type=int, default=16, help="that of `nla serve`")
    arguments = parser.parse_args()
    longest = sorted(topics, key=lambda name: -len(topics[name]))[: arguments.clients]
    texts, each = [topics[name][:CHARACTERS] for name in longest], arguments.clicks // arguments.clients
    with server(arguments.pair, arguments.batch) as port:
        expected, alone, alone_total = clicked(port, texts, each, 1)
    with server(arguments.pair, arguments.batch) as port:
        found, seconds, total = clicked(port, texts, each, arguments.clients)
    lost, mixed = expected.keys() - found.keys(), [key for key in found if not same(found[key], expected[key])]
    print("| | median, s | 95th percentile, s | clicks/s |\n|---|---|---|---|")
    print(line("one at a time", alone, alone_total))
    print(line(f"{arguments.clients} clients at once", seconds, total))
    ratio = (len(seconds) / total) / (len(alone) / alone_total)
    print(
        f"\n{len(found)} clicks: {len(lost)} lost, {len(mixed)} mixed up; throughput {ratio:.1f} times one at a time."
    )
    for key in mixed[:5]:
        print(f"{key}: {found[key]['explanation']!r} is not {expected[key]['explanation']!r}")
    return 1 if lost or mixed else 0


if __name__ == "__main__":
    sys.exit(main())
