"""The training activations that are nearest to a vector, with their texts."""

import dataclasses

import numpy as np
import yaml
from jaxtyping import Float

from nla_jax.data.rows import Rows, load_rows
from nla_jax.io.files import AnyName, AnyPath, path_to
from nla_jax.io.parquet import SIDECAR
from nla_jax.pair import Pair
from nla_jax.runtime.errors import InputError

SPLITS = ("av_sft", "ar_sft", "rl")  # what a run trains on
MOST = 200_000  # activations of a split that are compared, evenly spread: one pass over them answers a click
CHUNK = 8192  # of them at a time in memory
CHARACTERS = 160  # of a text's end


@dataclasses.dataclass(frozen=True, eq=False)
class Training:
    """The activations that a run trained on."""

    splits: list[Rows]

    def __len__(self) -> int:
        return sum(len(_compared(rows)) for rows in self.splits)

    def nearest(self, vectors: Float[np.ndarray, "n D"], count: int) -> list[list[dict]]:
        """For each vector the `count` nearest activations by cosine: `cosine, text` (the end of it, up to the token),
        `token, position, role, document`."""
        cosines = np.concatenate([_cosines(rows, vectors) for rows in self.splits])
        best = np.argsort(-cosines, axis=0, kind="stable")[:count]
        shown = self._shown(np.unique(best))
        return [[shown[i] | {"cosine": float(cosines[i, j])} for i in column] for j, column in enumerate(best.T)]

    def _shown(self, at: np.ndarray) -> dict[int, dict]:
        """What is shown of some activations, by their numbers in all splits."""
        found, start = {}, 0
        for rows in self.splits:
            size = len(_compared(rows))
            mine = at[(start <= at) & (at < start + size)]
            for i, record in zip(mine, rows.records((mine - start) * _step(rows))):
                text = {"text": record["text"][-CHARACTERS:], "document": record["doc_id"]}
                found[int(i)] = text | {name: record[name] for name in ("token", "position", "role")}
            start += size
        return found


def training_of(workdir: AnyName, pair: Pair, name: str) -> Training:
    """The training activations of the run in `workdir`, for the pair of this `name`.

    Raises `InputError` where there are none, and where they are not those of the pair's subject and layer."""
    place = path_to(workdir)
    here = [split for split in SPLITS if any((place / "activations").glob(f"{split}-*.parquet"))]
    if not here:
        raise InputError(
            f"{workdir} holds no training activations; --workdir is the folder of the run with activations/."
        )
    try:
        splits = [load_rows(place, split) for split in here]
        for rows in splits:
            rows.records(np.arange(0))  # decodes the texts now, while somebody looks
    except OSError as error:
        raise InputError(f"The activations in {workdir} cannot be prepared ({error.strerror}).") from None
    for rows in splits:
        check_belongs(rows, pair, name, workdir)
    return Training(splits)


def check_belongs(rows: Rows, pair: Pair, name: str, workdir: AnyName) -> None:
    """Raises `InputError` where activations are of another subject or layer than a pair's."""
    facts = _facts(rows.shards[0])
    made = [(pair.sidecar.width, rows.vectors.shape[1], "width")]
    read = facts.get("extraction") or {}
    made += [(pair.sidecar.layer, read.get("layer_index"), "layer")]
    made += [(list(pair.sidecar.earlier_layers), read.get("earlier_layers", []) if read else None, "earlier layers")]
    made += [(pair.sidecar.provenance.get("base_hash"), facts.get("base_hash"), "subject (hash of its weights)")]
    for ours, theirs, what in made:
        if None not in (ours, theirs) and ours != theirs:
            raise InputError(f"The activations in {workdir} are not those of {name}: {what} {theirs}, not {ours}.")


def _facts(shard: AnyPath) -> dict:
    """What the sidecar of a shard says; nothing where there is none."""
    file = shard.with_name(shard.name + SIDECAR)
    found = yaml.safe_load(file.read_text(encoding="utf-8")) if file.exists() else None
    return found if isinstance(found, dict) else {}


def _step(rows: Rows) -> int:
    """Every so manieth row of a split is compared."""
    return -(-len(rows) // MOST)


def _compared(rows: Rows) -> Float[np.ndarray, "m D"]:
    return rows.vectors[:: _step(rows)]


def _cosines(rows: Rows, vectors: Float[np.ndarray, "n D"]) -> Float[np.ndarray, "m n"]:
    """The cosine of each row that is compared with each vector."""
    unit = lambda x: x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-30)
    wanted, given = unit(vectors).T, _compared(rows)
    parts = [unit(np.asarray(given[start : start + CHUNK])) @ wanted for start in range(0, len(given), CHUNK)]
    return np.concatenate(parts)
