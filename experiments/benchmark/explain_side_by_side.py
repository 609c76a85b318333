"""`nla explain` against a plain script with transformers and PyTorch, each a process from start to end, in turn.

    python experiments/smollm2/make_folder.py --out runs/smollm2_bf16 --dtype bfloat16
    python experiments/benchmark/explain_side_by_side.py --subject runs/smollm2_bf16 --rounds 5

The subject is SmolLM2-135M-Instruct, the pair one of its size: the AV has the subject's weights, the AR its first 21
blocks. The embedding of the token that ends a turn is zero in the AV, so that no text ends before `--new-tokens`; both
sides are checked to have written so many. Explained are one token, and 64 tokens of one text. Both sides read the same
folders, and write greedily; PyTorch (`explain_pytorch.py`) takes all 64 rows in one batch.

A round runs every side once, in an order that turns. One round before the first does not count: it fills the caches of
files and of compiled programs. Wall and CPU seconds and peak memory (resident) are the operating system's, of the whole
process. Prints Markdown; writes it and all figures to `OUT.md` and `OUT.json`.
"""

import argparse
import dataclasses
import datetime
import json
import multiprocessing
import os
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path

from side_by_side import HERE, ROOT, machine, positive

LAYER, SCALE = 20, 240.0  # about the median norm of the subject's activations there
TEXT = """The lighthouse keeper wrote every evening, first the weather and then whatever had come past the rocks that
day. On the ninth of March 1887 she noted three barques, a collier from Cardiff and, towards dusk, a whale. Her brother
read it forty years later in the archive at Penzance and copied the entry by hand, because nobody there would let him
borrow the book. He kept the copy in his coat until the day he died."""
TOKENS = {"1 token": "63", "64 tokens": ",".join(map(str, range(1, 65)))}
OURS = "nla explain"
AIMS = {"1 token": 0.7, "64 tokens": 0.4}  # our wall time over PyTorch's, at most
MEMORY_AIM = 0.8


@dataclasses.dataclass(frozen=True)
class Turn:
    """What one process took, and the lines that it printed."""

    wall: float
    cpu: float
    peak: int  # bytes
    rows: list[dict]


def make_pair(subject: Path, folder: Path) -> None:
    """Saves the pair of the comparison in `folder`, in the dtype of the subject's files."""
    from nla_jax.io.folders import load_tokenizer, stored_dtype
    from nla_jax.pair import new_pair
    from nla_jax.prompts import RECONSTRUCTOR_TEMPLATE, VERBALIZER_TEMPLATE, Prompts, find_marker
    from nla_jax.sidecar import Sidecar

    tokenizer = load_tokenizer(subject)
    marker = find_marker(tokenizer, VERBALIZER_TEMPLATE)
    prompts = Prompts(tokenizer, marker)
    facts = {"d_model": json.loads((subject / "config.json").read_text())["hidden_size"], "layer": LAYER}
    templates = {"verbalizer_template": VERBALIZER_TEMPLATE, "reconstructor_template": RECONSTRUCTOR_TEMPLATE}
    sidecar = Sidecar(
        base_checkpoint=str(subject.resolve()),
        injection_scale=SCALE,
        marker=marker,
        suffix_ids=tuple(prompts.suffix_ids()),
        reading="whole",
        **facts,
        **templates,
    )
    pair = new_pair(sidecar, subject)
    params = pair.verbalizer_params
    silent = params["embedding"].at[pair.verbalizer.end].set(0)
    pair = dataclasses.replace(pair, verbalizer_params=params | {"embedding": silent})
    pair.save(folder, stored_dtype(subject))


def commands(arguments: argparse.Namespace, pair: Path, text: Path, tokens: str) -> dict[str, list[str]]:
    """The command of each side."""
    limit = ["--max-new-tokens", str(arguments.new_tokens)]
    shared = ["--pair", str(pair), "--subject", str(arguments.subject), "--file", str(text), *limit]
    torch = [sys.executable, str(HERE / "explain_pytorch.py"), *shared, "--positions", tokens]
    return {
        OURS: [sys.executable, "-m", "nla_jax.cli", "explain", *shared, "--tokens", tokens, "--json"],
        "PyTorch": torch,
        "PyTorch, float32": [*torch, "--dtype", "float32"],
    }


def run(command: list[str], limit: int) -> Turn:
    """One process from start to end. Ends with a sentence where it fails, or wrote texts of another length."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"`{shlex.join(command)}` ended with status {process.returncode}; its last words stand above.")
    rows = [json.loads(line) for line in output.splitlines()]
    if short := [row for row in rows if not (row.get("cut") or row.get("new_tokens") == limit)]:
        raise SystemExit(f"A text ended before {limit} tokens, so that the sides did not do the same: {short[0]}.")
    return Turn(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024, rows)


def compare(name: str, arguments: argparse.Namespace, pair: Path, text: Path) -> dict:
    """The turns of all sides for one number of tokens, and their medians."""
    sides = commands(arguments, pair, text, TOKENS[name])
    turns: dict[str, list[Turn]] = {side: [] for side in sides}
    for i in range(arguments.rounds + 1):
        order = list(sides)[i % len(sides) :] + list(sides)[: i % len(sides)]
        for side in order:
            turns[side] += [run(sides[side], arguments.new_tokens)]
        said = "; ".join(f"{side} {turns[side][-1].wall:.1f} s" for side in sides)
        print(
            f"{name}: {f'round {i} of {arguments.rounds}' if i else 'before the first round'}: {said}", file=sys.stderr
        )
    found = {}
    for side, taken in turns.items():
        median = lambda field, taken=taken: statistics.median(getattr(turn, field) for turn in taken[1:])
        found[side] = {field: median(field) for field in ("wall", "cpu", "peak")}
        found[side]["turns"] = [[turn.wall, turn.cpu, turn.peak] for turn in taken]
    for side, theirs in turns.items():
        same = sum(a["explanation"] == b["explanation"] for a, b in zip(turns[OURS][-1].rows, theirs[-1].rows))
        found[side]["texts_as_ours"] = f"{same} of {len(theirs[-1].rows)}"
    return found


def table(name: str, sides: dict) -> str:
    """One comparison in Markdown."""
    head = (
        "side",
        "wall s",
        "CPU s",
        "peak memory",
        "our wall / its",
        "our CPU / its",
        "our memory / its",
        "same texts",
    )
    ours, lines = sides[OURS], []
    for side, of in sides.items():
        ratios = [f"{ours[field] / of[field]:.2f}" for field in ("wall", "cpu", "peak")]
        cells = (side, f"{of['wall']:.2f}", f"{of['cpu']:.2f}", f"{of['peak'] / 2**20:,.0f} MiB", *ratios)
        lines.append((*cells, of["texts_as_ours"]))
    rows = [f"| {' | '.join(row)} |" for row in (head, ("---", *["---:"] * (len(head) - 1)), *lines)]
    aims = f"Aimed at: at most {AIMS[name]} of PyTorch's wall time, {MEMORY_AIM} of its memory."
    return "\n".join([f"**{name}**", "", *rows, "", aims, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subject", type=Path, required=True, help="the folder that make_folder.py has made")
    parser.add_argument("--rounds", type=positive, default=5, help="counted turns of each side")
    parser.add_argument("--new-tokens", type=positive, default=100, help="tokens of each explanation")
    parser.add_argument("--only", choices=TOKENS, help="one comparison (default: both)")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "explain", help="where the pair is written, once")
    parser.add_argument(
        "--out", type=Path, default=HERE / "results" / "explain", help="OUT.json and OUT.md are written"
    )
    arguments = parser.parse_args()
    pair, text = arguments.work / "pair", arguments.work / "text.txt"
    if not pair.is_dir():  # in a process of its own: the system counts a parent's memory as its children's peak
        maker = multiprocessing.get_context("spawn").Process(target=make_pair, args=(arguments.subject, pair))
        maker.start()
        maker.join()
        if maker.exitcode:
            raise SystemExit("The pair could not be made; the reason stands above.")
    text.write_text(TEXT, encoding="utf-8")
    command, about = shlex.join(["python", *sys.argv]), machine()
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    found = {name: compare(name, arguments, pair, text) for name in ([arguments.only] if arguments.only else TOKENS)}
    where = f"{about['processor']}, {about['cpus']} CPUs, jax {about['jax']}, torch {about['torch']}"
    settings = f"{arguments.new_tokens} new tokens each; medians of {arguments.rounds} rounds."
    tables = [table(name, sides) for name, sides in found.items()]
    markdown = "\n".join([f"`{command}`, {date}", "", f"{where}; {settings}", "", *tables])
    print(markdown)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    report = {"command": command, "date": date, "machine": about, "comparisons": found}
    arguments.out.with_name(arguments.out.name + ".json").write_text(json.dumps(report, indent=1) + "\n")
    arguments.out.with_name(arguments.out.name + ".md").write_text(markdown)


if __name__ == "__main__":
    main()
