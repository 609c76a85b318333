"""Activations at token positions, with all that it takes to look at a row and to run it again."""

import dataclasses
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float

from nla_jax.fve import normalise
from nla_jax.io.parquet import VECTORS, columns_of, list_column, list_vectors, read_table, write_table
from nla_jax.runtime.errors import InputError

TEXT, IDS = "detokenized_text_truncated", "token_ids"
EARLIER = "earlier_layers"  # a column of activations of several layers
COLUMNS = ("doc_id", "n_raw_tokens", "activation_layer", TEXT, "token", "following", "role", IDS)


@dataclasses.dataclass(frozen=True)
class Activations:
    """Activations of a text's tokens, raw. `acts[3]`, `acts[2:5]` and `acts[mask]` are some of the rows; NumPy and a
    `Pair` take it as the array `acts.vectors`."""

    vectors: np.ndarray  # [n, D] float32; of several layers side by side [n, L·D]
    tokens: list[str]
    texts: list[str]  # up to and with the token
    following: list[str]  # the text after it
    positions: np.ndarray  # [n], the token's index in its document, from 0
    doc_ids: list[str]
    token_ids: list[list[int]]  # of the document, up to and with the token
    roles: list[str]  # who speaks there, in a chat; "" elsewhere
    layer: int | None = None  # after which block of the subject; None: not known, as of a vector from a file
    earlier: tuple[int, ...] = ()  # blocks before it, after which they are read too

    def __len__(self) -> int:
        return len(self.vectors)

    @property
    def layers(self) -> tuple[int, ...] | None:
        """After which blocks they are read, ascending; None: not known."""
        return None if self.layer is None else (*self.earlier, self.layer)

    def __repr__(self) -> str:
        place = "" if self.layers is None else f" {after_blocks(self.layers)}"
        return f"Activations({len(self)} of width {self.vectors.shape[-1]}{place})"

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.vectors, dtype, copy=copy)

    def __getitem__(self, index: Any) -> "Activations":
        """The rows that NumPy's indexing of one axis chooses; an integer chooses one row."""
        at = np.atleast_1d(np.arange(len(self))[index])
        some = {name: [value[i] for i in at] for name, value in vars(self).items() if isinstance(value, list)}
        return dataclasses.replace(self, vectors=self.vectors[at], positions=self.positions[at], **some)

    def table(self) -> pa.Table:
        """The rows as Parquet columns: the reference's, and what is known beyond them.

        `token_ids` are those of the document up to the row's token; `role` is who speaks there, in a chat."""
        strings = lambda x: pa.array(x, pa.string())
        several = {EARLIER: pa.array([self.earlier] * len(self), pa.list_(pa.int32()))} if self.earlier else {}
        return pa.table(
            {
                VECTORS: list_column(self.vectors.astype(np.float32, copy=False)),
                "doc_id": strings(self.doc_ids),
                "n_raw_tokens": pa.array(self.positions + 1, pa.int32()),
                "activation_layer": pa.array([self.layer] * len(self), pa.int32()),
                TEXT: strings(self.texts),
                "token": strings(self.tokens),
                "following": strings(self.following),
                "role": strings(self.roles),
                IDS: pa.array(self.token_ids, pa.list_(pa.int32())),
                **several,
            }
        )

    def show(self, pair: Any = None, *, batch: int = 64) -> Any:
        """The tokens as the page of `nla serve` shows them, coloured by norm; with a `Pair`, each explained. A notebook
        displays it, and `.save("page.html")` writes it.

        Raises `InputError` where there are no rows, and for a pair of another layer."""
        notebook = importlib.import_module("nla_jax.serve.notebook")  # by name: it is made of what stands above
        return notebook.of_activations(self, pair, batch)

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Writes the rows as a Parquet file, which `Activations.load` reads. Raises `InputError` where the file is
        there already (unless `overwrite`)."""
        if Path(path).exists() and not overwrite:
            raise InputError(f"{path} exists; save under another name, or pass overwrite=True to replace it.")
        write_table(self.table(), Path(path))

    @classmethod
    def load(cls, path: str | Path) -> "Activations":
        """Activations that `save` wrote, or a shard of a run.

        Raises `InputError` where the file cannot be read, and where its rows are of different layers."""
        several = [name for name in columns_of(Path(path)) if name == EARLIER]
        table = read_table(Path(path), [VECTORS, *COLUMNS, *several])
        vectors = table.column(VECTORS).combine_chunks()
        column = {name: table.column(name).to_pylist() for name in COLUMNS}
        earlier = table.column(EARLIER).to_pylist() if several else [()] * len(table)
        layers = {(*before, layer) for before, layer in zip(earlier, column["activation_layer"])}
        if len(layers) > 1:
            found = ", others of ".join(map(in_words, sorted(layers, key=str)))
            raise InputError(f"{path} holds activations of {found}; give those of one kind.")
        width = (
            vectors.type.list_size
            if pa.types.is_fixed_size_list(vectors.type)
            else len(vectors[0])
            if len(vectors)
            else 0
        )
        return cls(
            vectors=list_vectors(vectors, width, Path(path)),
            tokens=column["token"],
            texts=column[TEXT],
            following=column["following"],
            positions=np.array(column["n_raw_tokens"], np.int32) - 1,
            doc_ids=column["doc_id"],
            token_ids=column[IDS],
            roles=column["role"],
            layer=max(layers)[-1] if layers else None,
            earlier=max(layers)[:-1] if layers else (),
        )


def after_blocks(layers: Sequence[int]) -> str:
    """Where activations are read: "after block 2", "after blocks 0 and 2"."""
    return f"after block{'s' * (len(layers) > 1)} {_listed(layers)}"


def in_words(layers: Sequence[int]) -> str:
    """Layers as messages name them: "layer 2", "the layers 0 and 2"."""
    return f"{'the layers' if len(layers) > 1 else 'layer'} {_listed(layers)}"


def _listed(layers: Sequence[int]) -> str:
    *others, last = layers
    return f"{', '.join(map(str, others))} and {last}" if others else str(last)


def median_norm_and_variance(vectors: Float[np.ndarray, "n D"], chunk: int = 1024) -> tuple[float, float]:
    """The median norm of `vectors`, and the mean variance of their normalised entries, without a second copy of them.

    The median, since a few attention sinks among the rows move the mean by any factor."""
    norms, total, squares = [], 0.0, 0.0
    for start in range(0, len(vectors), chunk):
        part = vectors[start : start + chunk]
        norms.append(np.linalg.norm(part, axis=1))
        unit = normalise(np.asarray(part))
        total, squares = total + unit.sum(0), squares + (unit**2).sum(0)
    variance = (squares / len(vectors) - (total / len(vectors)) ** 2).mean()
    return float(np.median(np.concatenate(norms))), float(variance)
