"""Many people click at once: is every click answered, rightly, and how fast?

    python experiments/serve/load.py --pair quickstart --clients 8 --clicks 200

Two fresh servers get the same clicks on the same texts, one after the other from a single client, then from all clients at
once; each client clicks again as soon as it is answered. An answer counts as mixed up unless it is that of the single client:
the same words, FVE to 0.01. Prints a table; exits with 1 where an answer is lost or mixed up."""

import argparse
import concurrent.futures
import contextlib
import json
import re
import signal
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pydoc_data.topics import topics

CHARACTERS = 600  # of each client's text
CLOSE = 0.01  # FVE of the same words, computed in a batch of another size
WARM = (1, 4, 16)  # rows of the batches that are compiled before the clock runs


@contextlib.contextmanager
def server(pair: str, batch: int) -> Iterator[str]:
    """The address of a fresh server that has compiled its programs."""
    command = [sys.executable, "-m", "nla_jax.cli", "serve", "--pair", pair, "--port", "0", "--batch", str(batch)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        address = re.search(r"http://\S+/", process.stdout.readline())[0]
        document = read(address, " ".join(sorted(topics)))
        for start, count in zip((0, 1, 5), WARM):
            ask(address, do="explain", document=document["id"], rows=list(range(start, start + count)))
        yield address
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)


def ask(address: str, **fields) -> list[dict]:
    """The answers to a request, without the line that ends them."""
    request = urllib.request.Request(f"{address}ask", json.dumps(fields).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=600) as response:
        *answers, end = map(json.loads, response.read().splitlines())
    if end != {"done": True}:
        raise RuntimeError(end.get("error"))
    return answers


def read(address: str, text: str) -> dict:
    (document,) = ask(address, do="read", text=text)
    return document


def click(address: str, document: str, row: int) -> tuple[dict, float]:
    """What a click on a token shows, and after how many seconds."""
    start = time.perf_counter()
    (answer,) = ask(address, do="explain", document=document, rows=[row])
    return answer, time.perf_counter() - start


def clicked(address: str, texts: list[str], each: int, clients: int) -> tuple[dict, list[float], float]:
    """The answers to `each` clicks on every text, by text and click; how long each took; and all together."""
    documents = [read(address, text) for text in texts]

    def client(i: int) -> list[tuple]:
        step = len(documents[i]["tokens"]) // each
        return [((i, j), *click(address, documents[i]["id"], j * step)) for j in range(each)]

    start = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(clients) as pool:
        found = [row for rows in pool.map(client, range(len(texts))) for row in rows]
    total = time.perf_counter() - start
    return {key: answer for key, answer, _ in found}, [seconds for _, _, seconds in found], total


def same(answer: dict, expected: dict) -> bool:
    """Whether two answers are the same but for rounding."""
    words = ("pair", "row", "explanation", "cut")
    close = answer["fve"] is expected["fve"] or abs(answer["fve"] - expected["fve"]) < CLOSE
    return all(answer[name] == expected[name] for name in words) and close


def line(name: str, seconds: list[float], total: float) -> str:
    quantiles = statistics.quantiles(seconds, n=20)
    return f"| {name} | {statistics.median(seconds):.2f} | {quantiles[-1]:.2f} | {len(seconds) / total:.2f} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pair", default="quickstart")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--clicks", type=int, default=200, help="in all")
    parser.add_argument("--batch", type=int, default=16, help="that of `nla serve`")
    arguments = parser.parse_args()
    longest = sorted(topics, key=lambda name: -len(topics[name]))[: arguments.clients]
    texts, each = [topics[name][:CHARACTERS] for name in longest], arguments.clicks // arguments.clients
    with server(arguments.pair, arguments.batch) as address:
        expected, alone, alone_total = clicked(address, texts, each, 1)
    with server(arguments.pair, arguments.batch) as address:
        found, seconds, total = clicked(address, texts, each, arguments.clients)
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
