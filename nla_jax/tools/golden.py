"""Golden dumps: what the reference printed for its released pairs, token by token, as an acceptance test.

A dump (`examples/*.txt` of the reference) holds a chat. For each of its tokens it has the raw norm of the activation,
the AV's greedy text, and the AR's mse for that text."""

import ast
import dataclasses
import re
from pathlib import Path

import numpy as np

from nla_jax.fve import mse
from nla_jax.pair import Pair
from nla_jax.prompts import plain_ids
from nla_jax.runtime.errors import InputError
from nla_jax.subject import Subject, activations_at

ROW = re.compile(
    r"^\[\s*(?P<position>\d+)\]\s+\w+\s+token=(?P<token>'.*'|\".*\")\s+\|\|v\|\|=(?P<norm>[\d.]+)"
    r"\s+mse_nrm=(?P<mse>[-\d.]+)\s+cos=(?P<cos>[-\d.]+)"
)
NORM, MSE, SHARE = 0.03, (0.05, 0.005), 0.9  # relative; relative and absolute; of the rows that must lie within
LOOSE = 1.5  # times the dump's mean mse, for texts sampled here: greedy decoding parts ways with the kernels


@dataclasses.dataclass(frozen=True)
class Dump:
    """A chat and what the reference found at each of its tokens (rows in order, from the first token on)."""

    layer: int
    width: int
    variance: float | None
    prompt: str
    reply: str
    tokens: list[str]
    norms: np.ndarray  # [n]
    mse: np.ndarray  # [n]
    texts: list[str]


@dataclasses.dataclass(frozen=True)
class Check:
    """One line of the verdict: what was compared, what was found, what was expected, and whether it will do."""

    name: str
    found: str
    expected: str
    passed: bool


def read_dump(file: Path) -> Dump:
    """Reads a dump. Raises `InputError` where the file has another form."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file} cannot be read as text ({getattr(error, 'strerror', error)}).") from None
    whole = "\n".join(lines)
    number = lambda pattern: (found := re.search(pattern, whole, re.MULTILINE)) and found[1]
    layer, width = number(r"^Extraction:\s+layer (\d+)"), number(r"^d_model:\s+(\d+)")
    prompt, reply = _literal(lines, "After apply_chat_template"), _literal(lines, "2. BASE MODEL REPLY")
    rows = [(i, found) for i, line in enumerate(lines) if (found := ROW.match(line))]
    if None in (layer, width, prompt, reply) or not rows:
        raise InputError(f"{file} is no golden dump: it lacks the layer, the width, the prompt, the reply or its rows.")
    texts = []
    for i, _ in rows:
        text = []
        for line in lines[i + 1 :]:
            if line.strip() and not line.startswith("    "):
                break
            text.append(line[4:])
        texts.append("\n".join(text).strip())
    column = lambda name: np.array([float(found[name]) for _, found in rows])
    variance = number(r"^fve_nrm:\s+1 - mse_nrm / ([\d.]+\d)")
    return Dump(
        layer=int(layer),
        width=int(width),
        variance=float(variance) if variance else None,
        prompt=prompt,
        reply=reply,
        tokens=[ast.literal_eval(found["token"]) for _, found in rows],
        norms=column("norm"),
        mse=column("mse"),
        texts=texts,
    )


def _literal(lines: list[str], heading: str) -> str | None:
    """The first Python string that stands alone on a line behind a heading."""
    start = next((i for i, line in enumerate(lines) if line.startswith(heading)), len(lines))
    for line in lines[start + 1 :]:
        if line.strip()[:1] in ("'", '"'):
            try:
                return ast.literal_eval(line.strip())
            except (SyntaxError, ValueError):
                return None
    return None


def token_ids(dump: Dump, subject: Subject) -> list[int]:
    """The ids of the dump's chat. Raises `InputError` where the subject's tokenizer cuts it into other tokens."""
    tokenizer = subject.tokenizer
    ids = [i for text in (dump.prompt, dump.reply) for i in plain_ids(tokenizer, [text])[0]]
    if len(ids) == len(dump.tokens) - 1:  # the end of the turn, which the printed reply leaves out
        ids += plain_ids(tokenizer, [dump.tokens[-1]])[0][:1]
    for i, token in enumerate(dump.tokens):
        if i >= len(ids) or tokenizer.decode([ids[i]]) != token:
            found = "nothing" if i >= len(ids) else repr(tokenizer.decode([ids[i]]))
            raise InputError(
                f"The tokenizer of {subject.name} has {found} where the dump has {token!r}, at token {i}; it is another "
                f"subject's dump, or another revision of its tokenizer."
            )
    return ids[: len(dump.tokens)]


def accept(pair: Pair, subject: Subject, dump: Dump, rows: int = 8) -> list[Check]:
    """Compares extraction by norms, the AR by the mse of the dump's own texts, and the AV, at `rows` positions spread
    over the chat, by the mse of its greedy texts.

    Raises `InputError` where the dump belongs to another layer, width or tokenizer."""
    if (dump.layer, dump.width) != (pair.sidecar.layer, pair.sidecar.width):
        raise InputError(
            f"The dump is of layer {dump.layer} and width {dump.width}, the pair of layer {pair.sidecar.layer} and width "
            f"{pair.sidecar.width}."
        )
    ids = token_ids(dump, subject)
    vectors = activations_at(subject, [ids], [list(range(len(ids)))], ["dump"]).vectors.astype(np.float64)
    norms = np.abs(np.linalg.norm(vectors, axis=1) / dump.norms - 1)
    ours = mse(pair.reconstruct(dump.texts).astype(np.float64), vectors)
    off = np.abs(ours - dump.mse)
    close = off <= MSE[0] * dump.mse + MSE[1]
    at = np.unique(np.linspace(len(ids) // 2, len(ids) - 1, rows).astype(int))  # the reply: as in training
    texts = pair.verbalize(vectors[at], temperature=0.0)
    sampled = mse(pair.reconstruct(texts).astype(np.float64), vectors[at]).mean()
    bound = LOOSE * dump.mse[at].mean() + MSE[1]
    same = sum(text.split()[:5] == theirs.split()[:5] for text, theirs in zip(texts, [dump.texts[i] for i in at]))
    share = f"{SHARE:.0%} of the rows within"
    return [
        Check(
            "extraction: norms",
            f"{(norms <= NORM).mean():.0%} within {NORM:.0%}, median {np.median(norms):.2%} off",
            f"{share} {NORM:.0%}",
            bool((norms <= NORM).mean() >= SHARE),
        ),
        Check(
            "AR: mse of the dump's texts",
            f"{close.mean():.0%} within, median {np.median(off):.4f} off; mean {ours.mean():.4f}",
            f"{share} {MSE[0]:.0%} + {MSE[1]}; mean {dump.mse.mean():.4f}",
            bool(close.mean() >= SHARE),
        ),
        Check(
            "AV: mse of its own texts",
            f"mean {sampled:.4f}; {same} of {len(at)} texts begin with the same five words",
            f"at most {bound:.4f} ({dump.mse[at].mean():.4f} in the dump)",
            bool(sampled <= bound),
        ),
    ]
