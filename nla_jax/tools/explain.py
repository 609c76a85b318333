"""What a pair says of the activations of texts, chats or files of vectors, row by row, in batches."""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from nla_jax.data.activations import Activations, median_norm_and_variance
from nla_jax.data.chats import Messages, chat_tokens, spoken_positions
from nla_jax.fve import joined, lengths
from nla_jax.io.files import AnyName, AnyPath
from nla_jax.io.folders import dtypes_of, load_tokenizer, read_config
from nla_jax.io.hub import locate
from nla_jax.io.pairs import find_base
from nla_jax.io.safetensors import read_tensors
from nla_jax.models.transformer import Transformer
from nla_jax.pair import Explanation, Pair
from nla_jax.runtime.errors import InputError
from nla_jax.runtime.notes import note
from nla_jax.subject import ROWS, SINK, Subject, activations_at, attention_sinks, extract, load_subject

RELEASED = {  # of the subjects of released pairs, whose sidecars do not say it: as the reference's examples print it
    ("qwen2.5-7b-instruct", 20): 0.7335,
    ("gemma-3-12b-it", 32): 0.0302,
    ("gemma-3-27b-it", 41): 0.0579,
    ("llama-3.3-70b-instruct", 53): 0.9169,
}
SPREAD, ENOUGH = 32, 64  # activations: of a document, and in all, to calibrate with


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How explanations are sampled: see `Pair.explain`, and `best_of` for more than one of each activation."""

    max_new_tokens: int = 200
    temperature: float = 0.0
    seed: int = 0
    batch: int = 64
    best_of: int = 1


def subject_of(pair: Pair, folder: AnyPath, name: str | None = None, dtype: Any = None) -> Subject:
    """The subject of a pair in `folder`: the model `name`, or what its sidecar names, up to the pair's layer.

    Raises `InputError` where it is not the model that the pair was trained on."""
    made_from = pair.sidecar.provenance.get("base_hash")
    name = name or find_base(pair.sidecar.base_checkpoint, folder, made_from)
    compute = dtypes_of(locate(name), dtype)[1]
    subject = shared_subject(pair, name, compute) or load_subject(
        name, pair.sidecar.layer, compute, earlier=pair.sidecar.earlier_layers
    )
    if (width := subject.model.config.width) != pair.sidecar.d_model:
        raise InputError(f"The subject {subject.name} has width {width}, the pair {pair.sidecar.d_model}.")
    if made_from and made_from != subject.fingerprint:
        raise InputError(
            f"{subject.name} is not the subject that {folder} was trained on (its weights have another hash)."
        )
    return subject


def shared_subject(pair: Pair, name: AnyName, dtype: np.dtype) -> Subject | None:
    """The subject `name`, computing in `dtype`, in the memory of the pair's adapters' base; None where that is another
    folder."""
    at = locate(name)
    if pair.base is None or pair.mesh is not None or at.resolve() != pair.base_at.resolve():
        return None
    config = read_config(at, dtype).truncated(pair.sidecar.layer + 1)
    as_loaded = lambda path, x: x.astype(dtype) if path[-1].key == "scale" else x  # as `load_subject` holds them
    params = jax.tree_util.tree_map_with_path(as_loaded, pair.trunk)
    earlier = pair.sidecar.earlier_layers
    return Subject(str(name), at, pair.sidecar.layer, Transformer(config), params, load_tokenizer(at), earlier=earlier)


def of_texts(
    subject: Subject, documents: Sequence[tuple[str, str]], tokens: str | list[int], max_tokens: int
) -> Iterator[Activations]:
    """The activations of some documents (id, text) after another, at "last", "all" or the indices `tokens`."""
    for start in range(0, len(documents), ROWS):
        ids, texts = zip(*documents[start : start + ROWS])
        found = extract(subject, list(texts), tokens, max_tokens=max_tokens, doc_ids=list(ids))
        if start + ROWS >= len(documents):
            del subject  # its memory is free while the last ones are explained
        yield found


def of_chats(
    subject: Subject, chats: Sequence[tuple[str, Messages]], tokens: str | list[int], max_tokens: int
) -> Iterator[Activations]:
    """The activations of conversations, each with who speaks there; tokens of the chat template have none.

    Raises `InputError` for a chat of more than `max_tokens` tokens, and for an index where nobody speaks."""
    for number, (id, messages) in enumerate(chats, 1):
        ids, roles = chat_tokens(subject.tokenizer, messages)
        if len(ids) > max_tokens:
            raise InputError(f"The chat {id} has {len(ids)} tokens, more than max_tokens = {max_tokens}; raise it.")
        chosen = spoken_positions(roles, tokens, f"the chat {id}")
        found = activations_at(subject, [ids], [chosen], [id])
        if number == len(chats):
            del subject  # as above
        yield dataclasses.replace(found, roles=[roles[i] for i in chosen])


def expected_rows(subject: Subject, material: Sequence[tuple[str, str | Messages]], tokens: str | list[int]) -> int:
    """About how many rows texts or chats will give, for whoever waits for them."""
    if tokens != "all":
        return len(material) * (1 if tokens == "last" else len(tokens))
    texts = [said if isinstance(said, str) else " ".join(m["content"] for m in said) for _, said in material]
    return sum(map(len, subject.tokenizer(texts, add_special_tokens=False, verbose=False).input_ids))


def stored_vectors(name: str) -> dict[str, np.ndarray]:
    """The array of an `.npy` file, or the tensors of a `.safetensors` file (FILE:TENSOR names one), by name. Raises
    `InputError` for another file."""
    file, _, tensor = name.partition(":")
    path = Path(file)
    if path.suffix == ".npy":
        try:
            return {path.name: np.load(path, allow_pickle=False, mmap_mode="r")}
        except (OSError, ValueError, EOFError) as error:
            raise InputError(f"{path} is missing or is no array of numbers ({error}).") from None
    if path.suffix == ".safetensors":
        stored = read_tensors(path)
        if tensor and tensor not in stored:
            raise InputError(f"{path} holds no tensor {tensor!r}; it holds {', '.join(sorted(stored)[:8])}.")
        return {name: stored[name].read() for name in ([tensor] if tensor else sorted(stored))}
    raise InputError(f"Vectors are read from .npy and .safetensors files, not from {name}.")


def of_vectors(arrays: dict[str, np.ndarray], file: str, width: int) -> Iterator[Activations]:
    """The rows of arrays `[n, width]` or `[width]` from a `file`, as if they were activations. Raises `InputError` for
    another shape."""
    for label, array in arrays.items():
        rows = array[None] if array.ndim == 1 else array
        if rows.ndim != 2 or rows.shape[1] != width:
            raise InputError(f"{file}: {label} has shape {list(array.shape)}, expected [n, {width}] or [{width}].")
        n, blank = len(rows), [""] * len(rows)
        yield Activations(rows, blank, blank, blank, np.arange(n, dtype=np.int32), [label] * n, [[]] * n, blank)


def calibrated(pair: Pair, subject: Subject, documents: Sequence[tuple[str, str]], max_tokens: int = 2048) -> Pair:
    """The pair with the variance and the median norm of the subject's activations of `documents` in its sidecar, which
    make its FVE known: those of about `SPREAD` tokens a document, spread evenly, attention sinks left out.

    Raises `InputError` for documents that give fewer than `ENOUGH` activations."""
    kept = []
    for found in of_texts(subject, documents, "all", max_tokens):
        count = min(len(found), SPREAD * len(set(found.doc_ids)))
        kept.append(found.vectors[np.linspace(0, len(found) - 1, count).astype(int)])
    vectors, layers = np.concatenate(kept), len(pair.sidecar.layers)
    vectors = vectors[~attention_sinks(lengths(vectors, layers))]
    if len(vectors) < ENOUGH:
        raise InputError(f"The texts to calibrate with give {len(vectors)} activations; give at least {ENOUGH}.")
    norm, variance = median_norm_and_variance(joined(vectors, layers))
    norm = norm if layers == 1 else np.median(lengths(vectors, layers), axis=0).tolist()
    facts = {"activation_variance": variance, "activation_norm": norm, "calibrated_on": len(vectors)}
    sidecar = dataclasses.replace(pair.sidecar, provenance=pair.sidecar.provenance | facts)
    return dataclasses.replace(pair, sidecar=sidecar)


def explain_rows(
    pair: Pair, found: Iterable[Activations], sampling: Sampling, claims: Callable | None = None
) -> Iterator[list[dict]]:
    """For each batch of activations its rows: `document, position, token, role, explanation, cut, cosine, fve,
    fve_token`, and `claims` where a function is given that reads them (`ClaimReader.read` of tools/claims.py).

    `cut`: the text had not ended at the limit. fve = 1 - mse / variance, with the variance of the pair's training
    activations (None where its sidecar records none). `fve_token` is a control: the FVE where the AR reads the row's
    token alone (None for vectors, which have none). Where there is no text there is no score."""
    variance, first = training_variance(pair), itertools.count()
    for activations in found:
        for start in range(0, len(activations), sampling.batch):
            rows = range(start, min(start + sampling.batch, len(activations)))
            vectors = np.asarray(activations.vectors[rows.start : rows.stop])
            note_sinks(pair, activations, rows, vectors)
            numbers = [next(first) for _ in rows]
            options = {"batch": sampling.batch, "first": numbers[0]}
            said = best_of(pair, vectors, sampling, numbers[0])
            tokens = activations.tokens[rows.start : rows.stop]
            scores = measured(pair, [x.text for x in said], tokens, vectors, variance)
            more = {"max_new_tokens": sampling.max_new_tokens, "seed": sampling.seed, **options}
            made = claims(pair, activations[rows.start : rows.stop], said, **more) if claims else []
            yield [
                {
                    "document": activations.doc_ids[row],
                    "position": int(activations.positions[row]),
                    "token": activations.tokens[row],
                    "role": activations.roles[row],
                    "explanation": said[i].text,
                    "cut": said[i].cut,
                }
                | scores[i]
                | ({"claims": made[i]} if claims else {})
                for i, row in enumerate(rows)
            ]


def best_of(pair: Pair, vectors: np.ndarray, sampling: Sampling, first: int = 0) -> list[Explanation]:
    """Of each activation that of `sampling.best_of` explanations from which the AR rebuilds it best.

    The first is the one that the temperature asks for; at temperature 0 (greedy) the others are sampled at 1. What is
    chosen by its score scores higher: that does not make it truer."""
    tried = []
    for i in range(sampling.best_of):
        temperature = sampling.temperature or float(i > 0)
        seed = int(np.random.SeedSequence([sampling.seed, i]).generate_state(1)[0]) if i else sampling.seed
        options = {"batch": sampling.batch, "first": first}
        tried.append(pair.explain(vectors, sampling.max_new_tokens, temperature, seed, **options))
    if len(tried) == 1:
        return tried[0]
    cosines = [pair.score([found.text for found in said], vectors)["cosine"] for said in tried]
    there = [[bool(found.text) for found in said] for said in tried]
    return [tried[i][row] for row, i in enumerate(np.where(there, cosines, -2).argmax(0))]


def measured(
    pair: Pair, texts: list[str], tokens: list[str], vectors: np.ndarray, variance: float | None
) -> list[dict[str, float | None]]:
    """`cosine`, `fve` and `fve_token` of each row: of its text, and of its token in place of the text. None where there
    is no text, no token, or no variance."""
    read = [(i, "text", text) for i, text in enumerate(texts) if text]
    read += [(i, "token", token.strip()) for i, token in enumerate(tokens) if token]
    found = pair.score([text for *_, text in read], vectors[[i for i, *_ in read]]) if read else {}
    score = {(i, of): j for j, (i, of, _) in enumerate(read)}

    def value(i: int, of: str, name: str) -> float | None:
        return float(found[name][score[i, of]]) if (i, of) in score else None

    def fve(i: int, of: str) -> float | None:
        mse = value(i, of, "mse")
        return None if mse is None or not variance else 1 - mse / variance

    return [
        {"cosine": value(i, "text", "cosine"), "fve": fve(i, "text"), "fve_token": fve(i, "token")}
        for i in range(len(texts))
    ]


def note_sinks(pair: Pair, activations: Activations, rows: range, vectors: np.ndarray) -> None:
    """Says which activations are far longer than those that the pair was trained on, where its sidecar has their norm."""
    for row, times in zip(rows, relative_norms(vectors, pair, len(pair.sidecar.layers)) if usual_norms(pair) else ()):
        if times > SINK:
            note(
                f"The activation of {activations.tokens[row]!r} (position {activations.positions[row]} of "
                f"{activations.doc_ids[row]}) is {times:.0f} times as long as the median of the pair's training: "
                f"an attention sink, of which an explanation says little."
            )


def usual_norms(pair: Pair) -> list[float]:
    """The median length of the activations that a pair was trained on, of each layer; empty where its sidecar does not
    say it."""
    found = pair.sidecar.provenance.get("activation_norm")
    found = found if isinstance(found, list) else [found]
    good = len(found) == len(pair.sidecar.layers) and all(isinstance(x, (int, float)) and x > 0 for x in found)
    return [float(x) for x in found] if good else []


def relative_norms(vectors: Float[np.ndarray, "n ..."], pair: Pair | None, layers: int) -> list[float]:
    """The lengths of activations as multiples of the median one, of several layers the largest multiple: of the pair's
    training where its sidecar says that, else of these."""
    found = lengths(vectors, layers)
    return (found / ((pair and usual_norms(pair)) or np.median(found, axis=0))).max(1).tolist()


def training_variance(pair: Pair) -> float | None:
    """The variance of the normalised activations that a pair was trained on; None where its sidecar does not say it.

    Raises `InputError` where it says what no variance is."""
    found = pair.sidecar.provenance.get("activation_variance")
    if found is None:
        name = pair.sidecar.base_checkpoint.rstrip("/").rpartition("/")[2].lower()
        return RELEASED.get((name, pair.sidecar.layer))
    if isinstance(found, (int, float)) and not isinstance(found, bool) and 0 < found <= 1.01:
        return found
    raise InputError(f"The pair's sidecar says activation_variance {found!r:.50}, expected a number between 0 and 1.")
