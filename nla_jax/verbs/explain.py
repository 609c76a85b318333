"""`nla explain`: what the activations of a text say, token by token."""

import argparse
import json
import sys
from pathlib import Path

from nla_jax.conventions import Conventions
from nla_jax.io.files import path_to
from nla_jax.io.pairs import find_base
from nla_jax.pair import load_pair
from nla_jax.runtime.compiler import enable_compile_cache
from nla_jax.runtime.errors import InputError
from nla_jax.subject import extract, load_subject
from nla_jax.verbs.conventions import add_conventions, given_conventions


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The pair, the text, and which tokens of it."""
    parser.add_argument("--pair", required=True, help="folder with av/ and ar/")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--text", help="the text (default: standard input)")
    source.add_argument("--file", help="a file with the text")
    parser.add_argument("--subject", help="the subject's folder or hub id (default: what the pair's sidecar names)")
    parser.add_argument("--tokens", default="last", help="which tokens: last, all, or indices such as 3,-1")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--max-new-tokens", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    add_conventions(parser)


def run(arguments: argparse.Namespace) -> None:
    """Prints, for each token asked for, the explanation and how much of the activation it carries."""
    if arguments.file:
        try:
            text = Path(arguments.file).read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{arguments.file} cannot be read as text ({error}).") from None
    else:
        text = arguments.text if arguments.text is not None else sys.stdin.read()
    enable_compile_cache()
    rows = explain_text(
        text,
        arguments.pair,
        subject=arguments.subject,
        tokens=arguments.tokens,
        temperature=arguments.temperature,
        max_new_tokens=arguments.max_new_tokens,
        seed=arguments.seed,
        conventions=given_conventions(arguments),
    )
    for row in rows:
        if arguments.json:
            print(json.dumps(row, ensure_ascii=False))
        else:
            fve = "FVE unknown" if row["fve"] is None else f"FVE {row['fve']:.2f}"
            print(f"[{row['position']}] {row['token']!r}   {fve}, cosine {row['cosine']:.2f}")
            print(f"    {row['explanation'] or '(no explanation within the length limit)'}\n")


def explain_text(
    text: str,
    pair: str | Path,
    *,
    subject: str | None = None,
    tokens: str = "last",
    temperature: float = 0.0,
    max_new_tokens: int = 150,
    seed: int = 0,
    conventions: Conventions = Conventions(),
) -> list[dict]:
    """One dict for each token asked for: `position, token, explanation, cosine, fve`.

    `tokens`: "last", "all", or indices such as "3,-1". fve = 1 - mse / variance, with the variance of the pair's
    training activations (None where its sidecar records none). `conventions`: as for `load_pair`. Raises `InputError`
    where text, pair or subject cannot be used."""
    if not text.strip():
        raise InputError("There is no text to explain; give --text, --file or standard input.")
    loaded = load_pair(pair, base=subject, conventions=conventions)
    model = load_subject(subject or find_base(loaded.sidecar.base_checkpoint, path_to(pair)), loaded.sidecar.layer)
    if model.model.config.width != loaded.sidecar.d_model:
        raise InputError(
            f"The subject {model.name} has width {model.model.config.width}, the pair {loaded.sidecar.d_model}."
        )
    expected = loaded.sidecar.provenance.get("base_hash")
    if expected and expected != model.fingerprint:
        raise InputError(f"{model.name} is not the subject that {pair} was trained on (its weights have another hash).")
    if tokens not in ("last", "all"):
        try:
            tokens = [int(i) for i in tokens.split(",")]
        except ValueError:
            raise InputError(f"--tokens must be last, all, or indices such as 3,-1; found {tokens!r}.") from None
    activations = extract(model, [text], tokens)
    if not len(activations):
        raise InputError("The text has no tokens to explain.")
    explanations = loaded.verbalize(activations.vectors, max_new_tokens, temperature, seed)
    scores = loaded.score(explanations, activations.vectors)
    variance = loaded.sidecar.provenance.get("activation_variance")
    if not isinstance(variance, (int, float, type(None))):
        raise InputError(f"The sidecar of {pair} says activation_variance {variance!r}, expected a number.")
    return [
        {
            "position": int(activations.positions[i]),
            "token": activations.tokens[i],
            "explanation": explanations[i],
            "cosine": float(scores["cosine"][i]),
            "fve": float(1 - scores["mse"][i] / variance) if variance else None,
        }
        for i in range(len(activations))
    ]
