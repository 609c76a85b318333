"""`nla explain`: what activations say, of texts token by token, of chats, or of vectors in a file."""

import argparse
import dataclasses
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from nla_jax.runtime.environment import import_transformers_alone
from nla_jax.runtime.errors import InputError
from nla_jax.verbs.conventions import add_conventions, given_conventions


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The pair, what is explained, and how."""
    source = add_material(parser)
    source.add_argument("--vectors", help="X.npy, X.safetensors or X.safetensors:TENSOR: vectors as they are")
    parser.add_argument("--tokens", default="last", help="which tokens: last (default), all, or indices such as 3,-1")
    parser.add_argument(
        "--calibrate",
        nargs="+",
        metavar="FILE",
        help="texts of which the FVE's variance is taken (default: the pair's)",
    )
    parser.add_argument("--temperature", type=float, default=0.0, help="of sampling (default 0: greedy)")
    parser.add_argument("--seed", type=int, default=0, help="of sampling (default 0)")
    parser.add_argument(
        "--best-of",
        type=int,
        default=1,
        metavar="N",
        help="of N explanations the one that the reconstructor reads best (default 1; all but a greedy one are sampled)",
    )
    parser.add_argument(
        "--confidence",
        type=int,
        metavar="N",
        help="also the claims of each explanation, with a confidence from N more, sampled ones (default: none)",
    )
    parser.add_argument(
        "--labeller", help="with --confidence: import path of the labeller in whose words claims are read"
    )
    add_output(parser)
    add_conventions(parser)


def add_material(parser: argparse.ArgumentParser) -> argparse._MutuallyExclusiveGroup:
    """The pair, its subject, and what is read; returns the group of sources."""
    parser.add_argument(
        "--pair", required=True, help="folder with av/ and ar/, a run's working folder, a hub id, or quickstart"
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--text", help="the text (default: standard input)")
    source.add_argument("--file", nargs="+", help="files, a document each; the line break at a file's end is left out")
    source.add_argument("--chat", help="conversations: JSON or JSON lines of messages with role and content")
    parser.add_argument("--subject", help="the subject's folder or hub id (default: what the pair's sidecar names)")
    parser.add_argument(
        "--max-tokens", type=int, default=2048, help="tokens of the longest document that is read (default 2048)"
    )
    return source


def add_output(parser: argparse.ArgumentParser) -> None:
    """How much is computed at a time, and where results go."""
    parser.add_argument("--max-new-tokens", type=int, default=200, help="where an explanation is cut (default 200)")
    parser.add_argument("--batch", type=int, default=64, help="explanations that are sampled at a time (default 64)")
    parser.add_argument("--dtype", help="dtype of weights and computation (default: that of the files)")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--out", help="a new file, X.jsonl or X.parquet, instead of the screen")


def run(arguments: argparse.Namespace) -> None:
    """Prints or writes, for each row, the explanation and how much of the activation it carries."""
    out, tokens = new_file(arguments.out), chosen_tokens(arguments.tokens)
    check_numbers(arguments)
    if not (arguments.injection or arguments.labeller):  # which may be functions of the user's
        import_transformers_alone()
    material = None if arguments.vectors else read_material(arguments)
    texts = read_files(arguments.calibrate or [])
    if arguments.labeller and arguments.confidence is None:
        raise InputError("--labeller reads claims, which --confidence N asks for; give both.")
    from nla_jax.io.pairs import place_of
    from nla_jax.pair import load_pair
    from nla_jax.runtime.compiler import enable_compile_cache, give_memory_back
    from nla_jax.tools.explain import (
        Sampling,
        calibrated,
        expected_rows,
        explain_rows,
        of_chats,
        of_texts,
        of_vectors,
        stored_vectors,
        subject_of,
    )

    arrays = stored_vectors(arguments.vectors) if arguments.vectors else None
    enable_compile_cache()
    sampling = Sampling(**{field.name: getattr(arguments, field.name) for field in dataclasses.fields(Sampling)})
    conventions = given_conventions(arguments)
    pair = load_pair(arguments.pair, dtype=arguments.dtype, base=arguments.subject, conventions=conventions)
    subject = None
    if texts or material:
        subject = subject_of(pair, place_of(arguments.pair), arguments.subject, arguments.dtype)
        pair = calibrated(pair, subject, texts, arguments.max_tokens) if texts else pair
    if arrays:
        found = list(of_vectors(arrays, arguments.vectors, pair.sidecar.width))
        total = sum(map(len, found))
    else:
        read = of_chats if arguments.chat else of_texts
        found = read(subject, material, tokens, arguments.max_tokens)
        total = expected_rows(subject, material, tokens)
    claims = None
    if arguments.confidence is not None:
        from nla_jax.runtime.notes import note
        from nla_jax.tools.claims import claim_reader  # which loads what only training needs

        reader = claim_reader(pair, arguments.pair, arguments.confidence, arguments.labeller, subject)
        note(reader.about)
        claims = reader.read
    del subject  # `found` holds it as long as there is something to read
    give_memory_back()  # what reading the weights has left over
    batches = counted(explain_rows(pair, found, sampling, claims), total, arguments.max_new_tokens)
    write(batches, out, arguments.json, spelt)


def write(batches: Iterator[list[dict]], out: Path | None, as_json: bool, spelt: Callable[[dict], str]) -> None:
    """Writes the rows to a file, or prints them: as JSON lines, or as `spelt` has them."""
    if out and out.suffix == ".parquet":
        write_parquet(batches, out)
    elif out:
        write_lines(batches, out)
    else:
        show(batches, (lambda row: json.dumps(row, ensure_ascii=False)) if as_json else spelt)


def new_file(name: str | None) -> Path | None:
    """Where results go. Raises `InputError` for a name that is taken, or says no format."""
    if name is None:
        return None
    path = Path(name)
    if path.suffix not in (".jsonl", ".parquet"):
        raise InputError(f"--out must end in .jsonl or .parquet; found {name}.")
    if path.exists():
        raise InputError(f"{path} exists; give --out another name, or remove it first.")
    return path


def chosen_tokens(given: str) -> str | list[int]:
    """Which tokens: a word or indices. Raises `InputError` for anything else."""
    if given in ("last", "all"):
        return given
    try:
        return [int(i) for i in given.split(",")]
    except ValueError:
        raise InputError(f"--tokens must be last, all, or indices such as 3,-1; found {given!r}.") from None


def check_numbers(arguments: argparse.Namespace) -> None:
    """Raises `InputError` for a number out of range, before a pair is read."""
    from nla_jax.runtime.user_input import sampling_temperature, token_limit, whole_number

    given = vars(arguments)
    if "max_new_tokens" in given:
        token_limit("--max-new-tokens", given["max_new_tokens"])
    for name, least, most in (
        ("max_tokens", 1, None),
        ("batch", 1, None),
        ("best_of", 1, None),
        ("confidence", 1, None),
        ("top", 1, None),  # of `nla diff`
        ("seed", 0, (1 << 32) - 1),
    ):
        if given.get(name) is not None:
            whole_number(f"--{name.replace('_', '-')}", given[name], least, most)
    if "temperature" in given:
        sampling_temperature(given["temperature"])


def read_material(arguments: argparse.Namespace) -> list:
    """Documents (id, text) or chats (id, messages). Raises `InputError` where there is nothing to read."""
    if arguments.chat:
        from nla_jax.data.chats import read_chats

        return read_chats(Path(arguments.chat))
    if arguments.text is not None:
        if not arguments.text.strip():
            raise InputError(f"There is no text to explain in --text {arguments.text!r}; give one with words.")
        return [("text", arguments.text)]
    if arguments.file:
        return read_files(arguments.file)
    if sys.stdin.isatty():
        print("nla: reading the text from the terminal; Ctrl-D ends it.", file=sys.stderr)
    return not_empty([("standard input", document(sys.stdin.buffer.read(), "Standard input"))])


def read_files(names: list[str]) -> list[tuple[str, str]]:
    """Files as documents (id, text). Raises `InputError` for one that cannot be read or holds no text."""
    return not_empty([(name, document(read_bytes(name), name)) for name in names])


def not_empty(documents: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """The documents. Raises `InputError` where one of them has no text."""
    if empty := [name for name, text in documents if not text.strip()]:
        raise InputError(f"There is no text in {empty[0]}; give --text, --file or standard input with words.")
    return documents


def read_bytes(name: str) -> bytes:
    """A file's content. Raises `InputError` where it cannot be read."""
    try:
        return Path(name).read_bytes()
    except OSError as error:
        raise InputError(f"{name} cannot be read as text ({error.strerror}).") from None


def document(content: bytes, name: str) -> str:
    """A file's text as it stands there, but for a byte order mark and the line break that ends its last line: that is
    none of the text, and would be the last token. Raises `InputError` for what is not UTF-8."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{name} cannot be read as text ({error}).") from None
    return text.removesuffix("\n").removesuffix("\r") if text.endswith("\n") else text


def counted(batches: Iterator[list[dict]], expected: int, limit: int) -> Iterator[list[dict]]:
    """The batches as they come, with progress; at the end a note counts the texts that were cut, and those that are empty."""
    total = cut = empty = 0
    progress = None
    for rows in batches:
        if progress is None and expected > len(rows):
            from nla_jax.runtime.metrics import Progress

            progress = Progress("explain", expected)
        total, cut = total + len(rows), cut + sum(row["cut"] for row in rows)
        empty += sum(not row["explanation"] for row in rows)
        if progress:
            progress.update(len(rows))
        yield rows
    if not total:
        raise InputError("The text has no tokens to explain.")
    if cut or empty:
        said = [f"{cut} of {total} explanations were cut at {limit} tokens (--max-new-tokens)"] * bool(cut)
        said += [f"{empty} of {total} responses hold no explanation"] * bool(empty)
        print(f"note: {'; '.join(said)}.", file=sys.stderr)


def show(batches: Iterator[list[dict]], spelt: Callable[[dict], str]) -> None:
    """Prints the rows, until nobody reads them."""
    try:
        for row in itertools.chain.from_iterable(batches):
            print(spelt(row), flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would complain at its end


def spelt(row: dict) -> str:
    """A row as people read it."""
    fve = "FVE unknown" if row["fve"] is None else f"FVE {row['fve']:.2f}"
    fve += "" if row["fve"] is None or row["fve_token"] is None else f" (its token alone: {row['fve_token']:.2f})"
    score = "" if row["cosine"] is None else f"   {fve}, cosine {row['cosine']:.2f}"
    place = f"[{row['position']}] {row['token']!r}" if row["token"] else f"{row['document']}[{row['position']}]"
    text = row["explanation"] or "(no explanation)"
    role = f" ({row['role']})" if row["role"] else ""
    claims = "".join(f"      {c['confidence']:.2f}  {c['kind']}: {c['text']}\n" for c in row.get("claims", []))
    return f"{place}{role}{score}\n    {text}{' …  (cut)' if row['cut'] and row['explanation'] else ''}\n{claims}"


def write_lines(batches: Iterator[list[dict]], out: Path) -> None:
    """Writes the rows as JSON lines."""
    from nla_jax.io.files import replacing

    with replacing(out) as scratch, open(scratch, "w", encoding="utf-8") as file:
        for row in itertools.chain.from_iterable(batches):
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def write_parquet(batches: Iterator[list[dict]], out: Path) -> None:
    """Writes the rows as a Parquet file."""
    import pyarrow as pa

    from nla_jax.io.parquet import write_tables

    claim = pa.struct([("text", pa.string()), ("kind", pa.string()), ("confidence", pa.float64())])
    kinds = {"position": pa.int32(), "cut": pa.bool_(), "claims": pa.list_(claim)}
    kinds |= dict.fromkeys(("cosine", "fve", "fve_token", "norm_ratio"), pa.float64())
    first = next(batches)
    schema = pa.schema([(name, kinds.get(name, pa.string())) for name in first[0]])
    batches = itertools.chain([first], batches)
    write_tables(schema, (pa.Table.from_pylist(rows, schema) for rows in batches), out)
