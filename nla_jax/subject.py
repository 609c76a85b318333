"""The frozen subject: a language model cut after block K, and its activations at token positions."""

import contextlib
import dataclasses
import functools
import operator
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float
from transformers import PreTrainedTokenizerBase

from nla_jax.autoencoder import residual
from nla_jax.config import Config
from nla_jax.data.activations import Activations
from nla_jax.data.batches import pad_tokens
from nla_jax.io.folders import dtypes_of, load_params, load_tokenizer, model_config, read_config
from nla_jax.io.hub import check_once, fingerprint, locate
from nla_jax.models.kernels import with_kernel
from nla_jax.models.sharding import place_batch, shardings, usable_mesh
from nla_jax.models.transformer import Transformer, TransformerConfig, abstract_params, between
from nla_jax.models.views import with_layers
from nla_jax.runtime.errors import InputError, first_line
from nla_jax.runtime.user_input import padded_rows, real_array, text_list, whole_number

ROWS = 16  # texts that are read at a time
SINK = 5.0  # how many times longer than the median an activation is that counts as an attention sink
# The subject that comes with the package, made by `nla pretrain --config configs/quickstart.py:subject`.
SHIPPED = Path(__file__).parent / "quickstart/subject"


@dataclasses.dataclass(frozen=True)
class Subject:
    """Blocks 0..K of a frozen model; `model` ends with the residual stream after block `layer`. Its activations are
    those after the `earlier` blocks (ascending) too, side by side."""

    name: str
    folder: Path
    layer: int
    model: Transformer
    params: dict
    tokenizer: PreTrainedTokenizerBase
    mesh: Mesh | None = None  # where the parameters lie
    earlier: tuple[int, ...] = ()

    @property
    def layers(self) -> tuple[int, ...]:
        """After which blocks the activations are read, ascending."""
        return (*self.earlier, self.layer)

    @property
    def width(self) -> int:
        """Entries of an activation."""
        return len(self.layers) * self.model.config.width

    @functools.cached_property
    def weights(self) -> dict:
        """The parameters as programs read them; they share the memory of `params`."""
        return with_layers(self.params)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash of the checkpoint's config and weights."""
        return fingerprint(self.folder)

    @functools.cached_property
    def whole(self) -> "Subject":
        """The same model with all its blocks and its head, read when it is first asked for."""
        return load_whole(self.folder, self.model.config.dtype, self.mesh)

    @functools.cached_property
    def rest(self) -> tuple[Transformer, dict]:
        """What reads an activation: the blocks after `layer` and the head, with their parameters. On a CPU these share
        the memory of `whole`; other devices hold the blocks twice."""
        config = self.whole.model.config
        config, params = between(config, self.whole.params, self.layer + 1, config.layers)
        return Transformer(config), with_layers(params)


def load_whole(name: str | Path, dtype: Any = jnp.float32, mesh: Mesh | None = None) -> Subject:
    """All blocks of a model folder or hub id, with its head: what `Transformer.logits` needs. Its activations are those
    after the last block."""
    folder, mesh = locate(name), usable_mesh(mesh)
    check_once(folder)
    dtype = dtypes_of(folder, dtype)[1]
    config = read_config(folder, dtype)
    layout = shardings(mesh, abstract_params(config)) if mesh else None
    params = load_params(folder, config, dtype=dtype, layout=layout)
    return Subject(str(name), folder, config.layers - 1, Transformer(config), params, load_tokenizer(folder), mesh)


def load_subject(
    name: str | Path,
    layer: int,
    dtype=jnp.float32,
    mesh: Mesh | None = None,
    attention: str = "xla",
    *,
    earlier: Sequence[int] = (),
) -> Subject:
    """Loads blocks 0..`layer` of a model folder or hub id in `dtype`, on a `mesh` straight into their training place.
    `attention` names a kernel (models/kernels.py). `earlier`: blocks before `layer`, ascending, whose activations are
    read too.

    Raises `InputError` for a layer that the model does not have, where the mesh does not divide it, and for damaged
    weights."""
    folder, mesh, layer = locate(name), usable_mesh(mesh), whole_number("layer", layer, -1)
    earlier = ascending("earlier", earlier, layer)
    check_once(folder)
    dtype = dtypes_of(folder, dtype)[1]
    config = with_kernel(read_config(folder, dtype), attention, mesh)
    if not 0 <= layer < config.layers:
        raise InputError(
            f"Layer {layer} does not exist: {name} has blocks 0 to {config.layers - 1}; set subject.layer."
        )
    config = config.truncated(layer + 1)
    layout = shardings(mesh, abstract_params(config, truncated=True)) if mesh else None
    params = load_params(folder, config, truncated=True, dtype=dtype, layout=layout)
    return Subject(str(name), folder, layer, Transformer(config), params, load_tokenizer(folder), mesh, earlier)


def ascending(name: str, blocks: Sequence[int], layer: int) -> tuple[int, ...]:
    """Blocks before `layer` as a tuple. Raises `InputError` where they are not whole numbers in ascending order."""
    found = real_array(blocks)
    found = (
        None if found is None or found.ndim != 1 or (found.size and found.dtype.kind not in "iu") else found.tolist()
    )
    if found is None or found != sorted({*found}) or (found and not 0 <= found[0] <= found[-1] < layer):
        raise InputError(
            f"{name} is {blocks!r:.60}; it must be blocks before {layer}, counted from 0, in ascending order."
        )
    return tuple(found)


def extract(
    subject: Subject,
    texts: Sequence[str],
    positions: Any = "last",
    *,
    max_tokens: int = 2048,
    doc_ids: Sequence[str] | np.ndarray | None = None,
) -> Activations:
    """Activations of `texts` at "last", "all", one index, or several indices of each text's tokens (negative from the
    end), in the order of the texts; `doc_ids` name them (default: their numbers). Special tokens are left out of "all".

    Raises `InputError` for positions of another kind, an index that a text does not have, an empty text, one of more
    than `max_tokens` tokens (16 are read at a time, and the memory for it grows with the square of their length), and
    `doc_ids` that are not as many as the texts."""
    texts = text_list("extract takes", [texts] if isinstance(texts, str) else texts)
    max_tokens = whole_number("max_tokens", max_tokens, 1)
    if not texts:
        raise InputError("There is no text to extract activations from.")
    if isinstance(positions, str) and positions not in ("last", "all"):
        raise InputError(f"positions must be 'last', 'all', an index or indices; found {positions!r}.")
    if not isinstance(doc_ids, (Iterable, type(None))):
        raise InputError(f"doc_ids are a list of names, one for each text; found {doc_ids!r:.50}.")
    doc_ids = [str(i) for i in range(len(texts))] if doc_ids is None else list(doc_ids)
    if len(doc_ids) != len(texts):
        raise InputError(f"There are {len(doc_ids)} doc_ids for {len(texts)} texts; give one for each.")
    rows = text_rows(subject.tokenizer, texts)
    special = set(subject.tokenizer.all_special_ids)
    wanted = []
    for text, row in zip(texts, rows):
        if not text or not row:
            raise InputError("A text has no tokens; it is empty.")
        if len(row) > max_tokens:
            raise InputError(
                f"A text has {len(row)} tokens, more than max_tokens = {max_tokens}; shorten it, or raise max_tokens."
            )
        if isinstance(positions, str):
            ordinary = [i for i, token in enumerate(row) if token not in special]
            wanted.append(ordinary if positions == "all" else [len(row) - 1])
        else:
            wanted.append(indices(positions, len(row)))
    return activations_at(subject, rows, wanted, doc_ids)


def text_rows(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """The token ids of texts, as the subject reads them."""
    rows, bos = tokenizer(texts, verbose=False).input_ids, tokenizer.bos_token_id
    return [row[1:] if row[:2] == [bos, bos] else row for row in rows]  # a chat's rendered text has its own already


def indices(positions: Any, length: int) -> list[int]:
    """One index or several (negative from the end) as indices from 0 of a text of `length` tokens.

    Raises `InputError` for what is none, and for one that the text does not have."""
    try:
        chosen = [operator.index(i) for i in np.atleast_1d(positions).tolist()]
    except (TypeError, ValueError):
        raise InputError(f"positions must be 'last', 'all', an index or indices; found {positions!r}.") from None
    if bad := [i for i in chosen if not -length <= i < length]:
        raise InputError(f"Position {bad[0]} does not exist in a text of {length} tokens.")
    return [i % length for i in chosen]


def activations_at(
    subject: Subject,
    rows: Sequence[Sequence[int]],
    positions: Sequence[Sequence[int]],
    doc_ids: Sequence[str],
    batch: int | None = None,
) -> Activations:
    """Activations of token rows at the given indices of each, in the order of the rows.

    `batch`: so many rows are read at a time; None: up to `ROWS`, few as few. The size of a program can change the last
    digits. Raises `InputError` for a token that the subject has no embedding of, and where an activation is not finite."""
    check_ids(subject, rows, doc_ids)
    decode = lambda ids: subject.tokenizer.decode(ids, skip_special_tokens=True)
    batch = batch or padded_rows(len(rows), ROWS, subject.mesh or jax.sharding.get_mesh())
    vectors = list(residual_rows(subject, rows, positions, batch))
    vectors = np.concatenate(vectors) if vectors else np.zeros((0, subject.width), np.float32)
    where = [(list(row), i, id) for row, chosen, id in zip(rows, positions, doc_ids, strict=True) for i in chosen]
    for at in np.flatnonzero(~np.isfinite(vectors).all(1))[:1]:
        row, i, id = where[at]
        dtype = jnp.dtype(subject.model.config.dtype).name
        cure = "; compute in bfloat16 or float32 (compute.dtype)" if dtype == "float16" else ""
        raise InputError(
            f"The activation of token {subject.tokenizer.decode([row[i]])!r} (position {i} of {id!r}) is not finite in "
            f"{dtype}{cure}: leave out this text, {decode(row[: i + 1])[-60:]!r}, or check the subject."
        )
    return Activations(
        vectors=vectors,
        tokens=[subject.tokenizer.decode([row[i]]) for row, i, _ in where],
        texts=[decode(row[: i + 1]) for row, i, _ in where],
        following=[decode(row[i + 1 : i + 17]) for row, i, _ in where],
        positions=np.array([i for _, i, _ in where], np.int32),
        doc_ids=[id for _, _, id in where],
        token_ids=[row[: i + 1] for row, i, _ in where],
        roles=[""] * len(where),
        layer=subject.layer,
        earlier=subject.earlier,
    )


def check_ids(subject: Subject, rows: Sequence[Sequence[int]], names: Sequence[str]) -> None:
    """Raises `InputError` for a token id beyond the embedding, as some tokenizers have: all of its text would be NaN."""
    entries = subject.model.config.vocab_size
    for row, name in zip(rows, names):
        if wrong := [i for i, token in enumerate(row) if token >= entries]:
            text = subject.tokenizer.decode(row[: wrong[0] + 1])
            raise InputError(
                f"Token {subject.tokenizer.decode([row[wrong[0]]])!r} (id {row[wrong[0]]}, position {wrong[0]} of {name!r}) is "
                f"none of the {entries} that {subject.name} has an embedding of; take it out of the text {text[-60:]!r}."
            )


def attention_sinks(norms: Float[np.ndarray, "n *L"]) -> Bool[np.ndarray, "n"]:
    """Which activations are far longer than the others (`SINK` times the median), at one of their layers at least: a first
    token, a rare apostrophe.

    They carry little of their text, and most of the raw variance."""
    if not len(norms):
        return np.zeros(0, bool)
    return (norms > SINK * np.median(norms, axis=0)).reshape(len(norms), -1).any(1)


def residual_rows(
    subject: Subject, rows: Sequence[Sequence[int]], positions: Sequence[Sequence[int]], batch: int = ROWS
) -> Iterator[np.ndarray]:
    """For each row the vectors `[len(positions), W]`, batched by length so that shapes are few and padding is small."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    found: dict[int, np.ndarray] = {}
    for start in range(0, len(order), batch):
        some = order[start : start + batch]
        hidden = residual_batch(subject, [rows[i] for i in some], batch, subject.earlier)
        chosen = at_positions(hidden, [positions[i] for i in some])
        for i, vectors in zip(some, chosen):
            found[i] = vectors
    for i in range(len(rows)):
        yield found[i]


def residual_batch(
    subject: Subject, rows: Sequence[Sequence[int]], batch: int = ROWS, earlier: tuple[int, ...] = ()
) -> Float[Array, "{batch} T W"]:
    """The residual stream after block K (before it those after `earlier` blocks) of up to `batch` token rows at all
    positions, float32: T is the longest row's length, rounded up to a multiple of 64. What stands behind a row's end, and
    behind the last row, means nothing."""
    tokens, _ = pad_tokens([*rows, *[[0]] * (batch - len(rows))], multiple=64)
    with on_mesh(subject) as mesh:
        return _residual(subject.model, subject.weights, place_batch(mesh, tokens), earlier)


def at_positions(hidden: Float[Array, "B T D"], positions: Sequence[Sequence[int]]) -> list[Float[np.ndarray, "_n D"]]:
    """For each row of positions the states `[len(positions), D]` there."""
    index = np.zeros((len(hidden), max([1, *map(len, positions)])), np.int32)
    for target, chosen in zip(index, positions):
        target[: len(chosen)] = chosen
    found = np.asarray(_gather(hidden, index))
    return [states[: len(chosen)] for states, chosen in zip(found, positions)]


@contextlib.contextmanager
def on_mesh(subject: Subject) -> Iterator[Mesh]:
    """The subject's mesh, in use within the block; an empty one where there is none."""
    if subject.mesh is None:
        yield jax.sharding.get_mesh()
        return
    with jax.set_mesh(subject.mesh):
        yield subject.mesh


_residual = jax.jit(residual, static_argnums=(0, 3))


@jax.jit
def _gather(hidden, index):
    return jnp.take_along_axis(hidden, index[..., None], axis=1)


# The shapes of a subject that need not be here, for `nla plan` and `nla benchmark`


def subject_config(config: Config, mesh: Mesh) -> TransformerConfig:
    """The shapes of a config's whole subject, as programs on `mesh` compute with it: dtype, remat, attention kernel.

    They come from the folder that `subject.path` names, else from `subject.architecture`, else from the hub's
    `config.json`, the only file that is fetched. Without a path they are those of the model that `pretrain` would make.

    Raises `InputError` where the hub does not give that file, for a layer that the model does not have, for an
    attention kernel that these devices or this model cannot use, and where the dtype is still "auto"."""
    c, compute = config.subject, config.compute
    if compute.dtype == "auto":
        raise InputError(
            "compute.dtype is auto; choose it for these devices by nla_jax.tools.precision.settled(config)."
        )
    model = with_kernel(_shapes(config, jnp.dtype(compute.dtype)), compute.attention, mesh)
    if not 0 <= c.layer < model.layers:
        raise InputError(f"subject.layer {c.layer} does not exist: the subject has blocks 0 to {model.layers - 1}.")
    return dataclasses.replace(model, remat=compute.remat or None)


def known_shapes(config: Config) -> TransformerConfig | None:
    """The shapes of a config's whole subject, in float32, from where `subject_config` finds them. None where they are not
    there, or have no such layer: the stage that needs the subject says so."""
    try:
        model = _shapes(config, jnp.dtype("float32"))
    except InputError:
        return None
    return model if 0 <= config.subject.layer < model.layers else None


def _shapes(config: Config, dtype: jnp.dtype) -> TransformerConfig:
    """The subject's shapes, from the first place that has them."""
    path, init = config.subject.path, config.pretrain.init_from
    if not path and init:
        return read_config(SHIPPED if init == "shipped" else locate(init), dtype)
    if not path:
        return TransformerConfig(vocab_size=config.pretrain.vocab_size, dtype=dtype, **config.pretrain.model)
    if Path(path).is_dir():
        return read_config(path, dtype)
    if config.subject.architecture:
        return model_config(config.subject.architecture, "subject.architecture", dtype)
    return read_config(_hub_folder(path), dtype)


def _hub_folder(name: str) -> Path:
    """The folder with a hub model's config.json."""
    from huggingface_hub import hf_hub_download

    repo, _, revision = name.partition("@")
    try:
        return Path(hf_hub_download(repo, "config.json", revision=revision or None)).parent
    except Exception as error:  # network, authorisation, unknown repository
        raise InputError(
            f"{name} is not a folder, and cannot be read from the hub ({first_line(error)}); set subject.architecture."
        ) from None
