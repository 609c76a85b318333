"""One held-out document as a whole: what the pair says at every token, for the first heat map of the report."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float

from nla_jax.config import Extract
from nla_jax.data.activations import IDS, Activations
from nla_jax.fve import cosine, joined, lengths, mse, row_fve, variance
from nla_jax.io.parquet import write_table
from nla_jax.runtime.distributed import is_writer
from nla_jax.runtime.errors import InputError
from nla_jax.runtime.metrics import Progress
from nla_jax.runtime.run import Run
from nla_jax.stages.extract import sample_activations
from nla_jax.stages.shown import Shown
from nla_jax.subject import SINK

MOST = 256  # tokens of the document that are read, at most
RULE = (
    "The first document is shown whole. It was chosen by a rule: of the documents with at least as many evaluated tokens "
    "as the median one, it is the one whose mean FVE after RL is their median (of two in the middle, the lower)."
)


def documents(context: Any, shown: Shown, count: int) -> dict:
    """What the page shows as heat maps: `documents`, at most `count`, and a sentence about the first of them, `whole`.

    The first one is whole where its text can be read again, else all are those of the evaluated rows. `context`: what
    the probes read; `shown`: the evaluated rows."""
    if not count:
        return {"documents": [], "whole": ""}
    id = typical(shown.ids, row_fve(context.recon("rl"), context.vectors))
    try:
        evaluated = {row["place"]: row for row in shown.document(id)["rows"]}  # what is said of a token is said once
        whole = whole_document(context, id, evaluated)
    except InputError as error:
        return {"documents": shown.documents(count), "whole": f"No document is shown whole. {error}"}
    whole["rows"] = [evaluated.get(row["place"], row) for row in whole["rows"]]
    others = [document for document in shown.documents(count - 1) if document["document"] != id]
    return {"documents": [whole, *others], "whole": RULE}


def typical(ids: Sequence[str], fve: Float[np.ndarray, "n"]) -> str:
    """The document that `RULE` chooses; `ids`: of which document each row is."""
    names, member, counts = np.unique(ids, return_inverse=True, return_counts=True)
    able = counts >= np.median(counts)
    names, means = names[able], (np.bincount(member, fve) / counts)[able]
    return str(names[np.argsort(means, kind="stable")[(len(means) - 1) // 2]])


def whole_document(context: Any, id: str, evaluated: Mapping[int | None, Mapping]) -> dict:
    """A held-out document as `Shown.document` gives it, with a `note`: every token that can be sampled has a row. Those
    that were `evaluated`, by place, keep what was said of them.

    Writes what is said of each token, with its scores, to `evaluation/whole_document.parquet`. Raises `InputError` where
    the text cannot be read again as it was."""
    c, found = context.run.config, activations_of(context, id)
    said, scores, usual = {}, {}, variance(np.asarray(context.vectors, np.float64))
    vectors = joined(found.vectors, len(found.layers))
    progress, done = Progress("whole document", 2), [evaluated.get(position + 1, {}) for position in found.positions]
    for name, pair in (("warm", context.warm), ("rl", context.pair)):
        explained = pair.explain(
            found.vectors, c.prompts.max_new_tokens, c.evaluate.temperature, c.seed, batch=c.evaluate.batch
        )
        said[name] = [explanation.accepted or "" for explanation in explained]
        recon = pair.reconstruct(said[name], batch=c.evaluate.batch).astype(np.float64)
        new = {f"fve_{name}": 1 - mse(recon, vectors) / usual, f"cos_{name}": cosine(recon, vectors)}
        said[name] = [row.get(name, text) for row, text in zip(done, said[name])]
        scores |= {key: np.array([row.get(key, x) for row, x in zip(done, values)]) for key, values in new.items()}
        progress.update()
    progress.close()
    if is_writer():
        facts = found.table().select(["doc_id", "n_raw_tokens", "token", "role"]).to_pydict()
        write_table(pa.table(facts | said | scores), context.run.workdir / "evaluation" / "whole_document.parquet")
    return Shown(OneDocument(found, said), scores, tuple(said)).document(id) | {"note": note(tokens_read(c.extract))}


def activations_of(context: Any, id: str) -> Activations:
    """The activations of a held-out document at every token that can be sampled, without attention sinks.

    Raises `InputError` where its text is not there, or is another one by now."""
    run: Run = context.run
    c = run.config.extract
    if any(c.source.to_dict().values()):
        raise InputError("The activations came from files, which do not hold the whole texts.")
    document = next((document for document in run.documents() if document.id == id), None)
    every = tokens_read(c)
    found = sample_activations(context.subject, [document] if document else [], every, run.config.seed)
    ids = found.token_ids[-1] if len(found) else []
    as_it_was = [old for i, old in zip(context.column("doc_id"), context.column(IDS)) if i == id]
    if not ids or any(old[: len(ids)] != ids[: len(old)] for old in as_it_was):
        raise InputError(f"The corpus does not hold the document {id!r} as it was any more.")
    layers = len(found.layers)
    heldout = lengths(context.vectors, 1) if layers == 1 else context.rows.lengths(layers)
    ordinary = (lengths(found.vectors, layers) <= SINK * np.median(heldout, axis=0)).all(1)
    if not ordinary.any():
        raise InputError(f"All activations of the document {id!r} are attention sinks.")
    return found[ordinary]


def tokens_read(c: Extract) -> Extract:
    """Settings that read every token of one document which `c` may sample, the first `MOST` of them."""
    return Extract(positions=MOST, min_position=c.min_position, max_tokens=min(c.max_tokens, c.min_position + MOST))


def note(c: Extract) -> str:
    """Which tokens have a colour where these settings have read the document."""
    return (
        f"Every token that may be sampled has a colour. Left out are those before number {c.min_position + 1}, special "
        f"tokens, those of a chat's template, attention sinks, and all beyond the first {c.max_tokens} tokens."
    )


@dataclasses.dataclass(frozen=True, eq=False)
class OneDocument:
    """What `Shown` reads, of the activations of one document and what is `said` of them."""

    activations: Activations
    said: Mapping[str, list[str]]

    def column(self, name: str) -> list:
        """A column of the rows."""
        return self.activations.table().column(name).to_pylist()

    def texts(self, name: str) -> list[str]:
        """What one pair says."""
        return self.said[name]
