"""What the subject makes of a reconstruction: how its expectation of the next token changes when h is replaced by ĥ.

A config adds these probes: `--config.evaluate.probes="('nla_jax.probes.fidelity:after_rl',
'nla_jax.probes.patching:recovery')"`. docs/steering.md says what the numbers mean.
"""

import functools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from nla_jax.patching import Effect, effects, resized
from nla_jax.probes.fidelity import derangement
from nla_jax.probes.probe import Context, probe
from nla_jax.subject import attention_sinks

LOOKED_AT = 256  # rows, spread evenly, at most
PATCHES = {
    "rl": "text after RL",
    "warm": "text of the warm start",
    "gold_text": "gold label text",
    "shuffled": "text of another document",
    "random": "random direction",
    "mean_direction": "mean activation, at the length of h",
    "mean": "mean activation",
    "h": "the activation itself",
}
TITLE = "What the subject makes of a reconstruction"
NEEDED = ("pair", "warm", "labels", "training", "subject")
named = lambda figure: {f"{figure}_{name}": label for name, label in PATCHES.items()}


@probe(TITLE, needs=NEEDED, unit="1 − KL / mean KL of the mean activation", labels=named("patch_recovery"))
def recovery(context: Context) -> dict[str, np.ndarray]:
    """The share of what replacing h by the mean training activation destroys that a reconstruction preserves: 1 minus the
    sum of KL(original || patched) of the next-token distributions, divided by the same sum for the mean. Reconstructions
    are as long as h. 1: the subject goes on as before; 0: as if it knew only the mean."""
    if not (found := _patched(context)):
        return {}
    whole = np.mean(_first(found["mean"].kl))
    return {
        f"patch_recovery_{name}": _of_rows(context, 1 - _first(found[name].kl) / whole)
        for name in found
        if name in PATCHES
    }


@probe(TITLE, needs=NEEDED, unit="KL in nats", labels=named("patch_kl"))
def divergence(context: Context) -> dict[str, np.ndarray]:
    """KL(original || patched) of the subject's next-token distributions, when h is replaced after block K at one token.
    That of the activation itself is 0, but for rounding, where activations, token ids and subject belong together."""
    found = _patched(context)
    return {f"patch_kl_{name}": _of_rows(context, _first(found[name].kl)) for name in found if name in PATCHES}


@probe(
    TITLE,
    needs=NEEDED,
    unit="loss of the true next token in nats",
    labels=named("patch_loss") | {"patch_loss_original": "nothing is replaced"},
)
def loss(context: Context) -> dict[str, np.ndarray]:
    """The subject's loss of the token that truly comes next, when h is replaced after block K at one token. It is known
    where another row of the same document reaches further."""
    found = _patched(context)
    return {f"patch_loss_{name}": _of_rows(context, _first(effect.loss)) for name, effect in found.items()}


@functools.lru_cache(maxsize=1)  # three probes read it
def _patched(context: Context) -> dict[str, Effect]:
    """The effects of each patch, and of none ("original"), on the rows that are looked at. Nothing where activations
    were made elsewhere, and the ids of their tokens are not known."""
    ids = context.column("token_ids")
    if not all(ids):
        return {}
    at, following = _chosen(len(ids)), next_tokens(ids, context.column("doc_id"))
    rows = [[*ids[i], *([] if following[i] is None else [following[i]])] for i in at]
    places, several = [len(ids[i]) - 1 for i in at], bool(context.subject.earlier)
    return effects(context.subject, rows, places, _vectors(context, at), rescale=several)


def _vectors(context: Context, at: Int[np.ndarray, "m"]) -> dict[str, Float[np.ndarray, "m d"] | None]:
    """What h after block K is replaced by, for each of the rows `at`. Of several layers the last counts, all of whose
    lengths are one (`fve.joined`): these vectors are patched at the length of h, the mean too."""
    width = context.subject.model.config.width
    h = np.asarray(context.vectors[at])[:, -width:]
    read = lambda pair, name: pair.reconstruct([context.texts(name)[i] for i in at])[:, -width:]
    layers, training = len(context.subject.layers), context.training.vectors[:, -width:]
    norms = np.linalg.norm(training, axis=1) if layers == 1 else context.training.lengths(layers)
    ordinary = ~attention_sinks(norms)
    mean = np.broadcast_to(training[ordinary].mean(0, dtype=np.float64).astype(np.float32), h.shape)
    rl = read(context.pair, "rl")
    other = derangement([context.documents[i] for i in at], context.seed)
    directions = {
        "rl": rl,
        "warm": read(context.warm, "warm"),
        "gold_text": read(context.pair, "labels"),
        "shuffled": rl[other],
        "random": np.random.default_rng(context.seed).normal(size=h.shape),
        "mean_direction": mean,
    }
    return {name: resized(np.asarray(v, np.float32), h) for name, v in directions.items()} | {
        "mean": mean,
        "h": h,
        "original": None,
    }


def next_tokens(ids: Sequence[Sequence[int]], doc_ids: Sequence[str]) -> list[int | None]:
    """The token after each row, from the longest row of its document; None where no row reaches further."""
    longest: dict[str, Sequence[int]] = {}
    for row, id in zip(ids, doc_ids):
        longest[id] = max(row, longest.get(id, ()), key=len)
    whole = [list(longest[id]) for id in doc_ids]
    return [
        other[len(row)] if len(other) > len(row) and other[: len(row)] == list(row) else None
        for row, other in zip(ids, whole)
    ]


def _chosen(count: int) -> Int[np.ndarray, "m"]:
    """Which rows are looked at."""
    return np.linspace(0, count - 1, min(count, LOOKED_AT)).astype(int)


def _first(of_rows: Sequence[np.ndarray]) -> Float[np.ndarray, "m"]:
    """What happens at the patched token itself."""
    return np.array([values[0] for values in of_rows], np.float64)


def _of_rows(context: Context, values: Float[np.ndarray, "m"]) -> Float[np.ndarray, "n"]:
    """Figures of the rows that were looked at, among NaN for the others."""
    found = np.full(len(context.vectors), np.nan)
    found[_chosen(len(found))] = values
    return found
