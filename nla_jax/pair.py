"""A trained pair: verbalize activations, reconstruct them from text, score, load and save."""

import contextlib
import dataclasses
import functools
import importlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float
from numpy.typing import ArrayLike

from nla_jax.autoencoder import Injection, Reconstructor, Verbalizer, autoencoder, keep, reconstruct
from nla_jax.data.activations import in_words
from nla_jax.data.batches import pad_tokens
from nla_jax.fve import cosine, joined, mse
from nla_jax.io.adapters import CONFIG as ADAPTER
from nla_jax.io.adapters import load_adapter, save_adapter
from nla_jax.io.conventions import Conventions
from nla_jax.io.files import AnyPath, new_folder, path_to
from nla_jax.io.folders import floating_dtype, is_wrapped, load_tokenizer, save_model, save_tokenizer
from nla_jax.io.heads import HEAD, read_head, stamped, unstamped, write_head
from nla_jax.io.hub import check_once, locate
from nla_jax.io.pairs import base_of, has_tokenizer, pair_folders, same_tokenizer, taken, with_tokenizer
from nla_jax.io.reading import Reading
from nla_jax.models.lora import Lora
from nla_jax.models.sharding import place_batch, usable_mesh, working_dtypes
from nla_jax.models.transformer import Transformer, truncate
from nla_jax.models.views import with_layers
from nla_jax.prompts import Prompts
from nla_jax.runtime.distributed import from_writer, is_writer, to_host
from nla_jax.runtime.errors import InputError, first_line
from nla_jax.runtime.user_input import (
    of_class,
    padded_limit,
    padded_rows,
    row_number,
    sampling,
    similar_lengths,
    text_list,
    usable_rows,
    whole_number,
    yes_or_no,
)
from nla_jax.sampling import Rollout, decoding_layout, rollout, start_all
from nla_jax.sidecar import FILE, Sidecar, with_ids


@dataclasses.dataclass(frozen=True)
class Training:
    """How a pair that is to be trained is loaded. `remat`: the name of a policy of `jax.checkpoint_policies`."""

    remat: str | None = None


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What an AV wrote about one activation."""

    text: str  # as the pair's convention reads the response; "" where it says nothing
    cut: bool  # it had not ended at the limit of new tokens; what it said till then is kept
    accepted: str | None  # the text where training accepts it: it ended, and stood alone in its tags


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Pair:
    """A verbalizer and a reconstructor with their parameters, prompts and sidecar.

    Where one of them is a LoRA adapter, its parameters are the adapter's, and `base` holds the frozen model that both
    share, read from the folder `base_at`. `mesh`: the devices over which the parameters are cut (None: one device).
    `folder`: where it was read from."""

    sidecar: Sidecar
    prompts: Prompts
    verbalizer: Verbalizer
    reconstructor: Reconstructor
    verbalizer_params: dict
    reconstructor_params: dict
    base: dict | None = None
    mesh: Mesh | None = None
    base_at: Path | None = None
    folder: Path | None = None

    def __repr__(self) -> str:
        of = lambda model: (
            f"{model.model.config.family} of {model.model.config.layers} blocks{', LoRA' * bool(model.lora)}"
        )
        return (
            f"Pair(subject {self.sidecar.base_checkpoint!r}, {in_words(self.sidecar.layers)}, width {self.sidecar.d_model}; "
            f"AV: {of(self.verbalizer)}; AR: {of(self.reconstructor)})"
        )

    @functools.cached_property
    def weights(self) -> tuple[dict, dict]:
        """The whole parameters of AV and AR, adapters attached. They share the memory of the pair's parameters."""
        av = self.verbalizer.assemble(self.verbalizer_params, self.base)
        ar = self.reconstructor.assemble(self.reconstructor_params, self.trunk)
        return with_layers(av), ar | {"backbone": with_layers(ar["backbone"])}

    @functools.cached_property
    def trunk(self) -> dict | None:
        """The base up to the pair's layer, which an adapter of the AR and the subject share."""
        return self.base and truncate(self.base, self.sidecar.layer + 1)

    @functools.cached_property
    def sampler(self) -> dict:
        """The AV's whole parameters as the sampler reads them.

        On several devices, and where it computes in another dtype than it is held in, this is a copy made once."""
        dtype, params = self.verbalizer.model.config.dtype, self.verbalizer_params
        as_held = jax.tree.map(lambda x: x.dtype, params) == working_dtypes(params, dtype)
        if self.mesh is not None and (self.mesh.size > 1 or not as_held):
            return decoding_layout(self.mesh, self.verbalizer, self.base)(self.verbalizer_params)
        return self.weights[0]

    def verbalize(
        self,
        vectors: ArrayLike,
        max_new_tokens: int = 200,
        temperature: float = 1.0,
        seed: int = 0,
        *,
        inject: bool = True,
        batch: int = 64,
        first: int = 0,
    ) -> list[str]:
        """One explanation for each row of `vectors`, raw activations [n, d] ([n, slots, d] for a prompt of several
        slots; those of several layers side by side) or `Activations`: the texts of `explain`, which has the same
        arguments."""
        options = {"inject": inject, "batch": batch, "first": first}
        return [found.text for found in self.explain(vectors, max_new_tokens, temperature, seed, **options)]

    def explain(
        self,
        vectors: ArrayLike,
        max_new_tokens: int = 200,
        temperature: float = 1.0,
        seed: int = 0,
        *,
        inject: bool = True,
        batch: int = 64,
        first: int = 0,
    ) -> list[Explanation]:
        """What the AV says of each row of `vectors`, and whether it came to an end within `max_new_tokens`.

        Temperature 0 is greedy. The same seed gives the same texts, whatever the `batch`. `first` numbers the first
        row: rows given in pieces get the texts they would get together. With `inject=False` the slot keeps the marker's
        embedding: a control that shows what the prompt alone says.

        Raises `InputError` for vectors that are no numbers, not finite, zero, or of another layer, and for a setting
        out of range."""
        slots = len(self.verbalizer.slots)
        several = slots > 1 and not self.sidecar.earlier_layers
        vectors = self._checked(vectors, slots if several else None)
        limit, temperature, seed = sampling(max_new_tokens, temperature, seed)
        inject, batch, first = yes_or_no("inject", inject), whole_number("batch", batch, 1), row_number(first)
        verbalizer = self.verbalizer if inject else dataclasses.replace(self.verbalizer, injections=(Injection(keep),))
        parts = [vectors[start : start + batch] for start in range(0, len(vectors), batch)]
        with self._on_mesh() as mesh:
            sampler, found = self.sampler, []
            # A CPU multiplies by two rows sooner than by one.
            rows = batch if len(parts) > 1 else max(2, padded_rows(len(vectors), batch, mesh))

            def sample(i: int) -> Rollout:
                padding = [(0, rows - len(parts[i])), *[(0, 0)] * (vectors.ndim - 1)]
                return rollout(
                    verbalizer,
                    sampler,
                    place_batch(mesh, np.pad(parts[i], padding, mode="edge")),
                    jax.random.key(seed),
                    first + i * batch,
                    limit,
                    group=1,
                    max_new_tokens=padded_limit(limit),
                    temperature=temperature,
                )

            for part, sampled in zip(parts, start_all(mesh, sample, len(parts))):
                tokens, mask, finished = to_host((sampled.tokens, sampled.mask, sampled.finished))
                responses = self.prompts.responses(tokens, mask)[: len(part)]
                strict = self.prompts.explanations(responses, finished)
                texts = self.prompts.read(responses)
                found += [Explanation(*row) for row in zip(texts, (~finished).tolist(), strict)]
        return found

    def reconstruct(self, texts: Sequence[str], *, batch: int = 64) -> Float[np.ndarray, "n W"]:
        """ĥ [n, d], float32, from explanations: the AR's raw output (of several layers side by side). Compare it after
        normalising (`score`, `nla.fve`).

        Texts of similar length are read together, at most `batch` at a time, so that a long one costs its own length
        alone. Raises `InputError` where `texts` is no list of texts."""
        batch = whole_number("batch", batch, 1)
        texts = text_list("reconstruct and score take", texts)
        rows = self.prompts.reconstructor_ids(texts)
        out = np.zeros((len(rows), self.sidecar.width), np.float32)
        with self._on_mesh() as mesh:
            for part in similar_lengths([len(row) for row in rows], batch):
                padding = [[0]] * (padded_rows(len(part), batch, mesh) - len(part))
                placed = place_batch(mesh, pad_tokens([rows[i] for i in part] + padding, multiple=16))
                out[part] = to_host(reconstruct(self.reconstructor, self.weights[1], *placed))[: len(part)]
        return out

    @contextlib.contextmanager
    def _on_mesh(self) -> Iterator[Mesh]:
        """The pair's mesh, in use; an empty one where there is none."""
        if self.mesh is None:
            yield jax.sharding.get_mesh()
            return
        with jax.set_mesh(self.mesh):
            yield self.mesh

    def score(self, texts: Sequence[str], vectors: ArrayLike) -> dict[str, np.ndarray]:
        """How well each text brings back its row of `vectors`: `mse` = 2(1 - cos) in [0, 4], and `cosine`, both
        `[n]`."""
        vectors, texts = self._checked(vectors), text_list("reconstruct and score take", texts)
        if len(texts) != len(vectors):
            raise InputError(f"There are {len(texts)} texts for {len(vectors)} vectors; give one for each.")
        recon, vectors = (np.asarray(x, np.float64) for x in (self.reconstruct(texts), vectors))
        return {"mse": mse(recon, vectors), "cosine": cosine(recon, vectors)}

    def show(
        self, text: str | list[dict[str, str]], subject: Any = None, *, max_tokens: int = 2048, batch: int = 64
    ) -> Any:
        """The page of `nla serve` for a text, or a chat's messages, every token explained: a notebook displays it,
        and `.save("page.html")` writes it. `subject`: a `Subject`, its folder or hub id (None: what the sidecar names).

        Raises `InputError` where the subject is not found, and for a text of more than `max_tokens` tokens."""
        max_tokens, batch = whole_number("max_tokens", max_tokens, 1), whole_number("batch", batch, 1)
        notebook = importlib.import_module("nla_jax.serve.notebook")  # by name: it is made of what stands above a pair
        return notebook.of_text(self, text, subject, max_tokens, batch)

    def merged(self) -> "Pair":
        """The pair with its adapters merged into plain parameters, as `transformers` and servers load them."""
        av, ar = self.verbalizer, self.reconstructor
        av_params, ar_params = self.verbalizer_params, self.reconstructor_params
        if av.lora:
            av_params = av.lora.merge(self.base, av_params)
        if ar.lora:
            blocks = truncate(self.base, ar.model.config.layers)
            ar_params = ar_params | {"backbone": ar.lora.merge(blocks, ar_params["backbone"])}
        return dataclasses.replace(
            self,
            verbalizer=dataclasses.replace(av, lora=None),
            reconstructor=dataclasses.replace(ar, lora=None),
            verbalizer_params=av_params,
            reconstructor_params=ar_params,
            base=None,
        )

    def save(self, folder: str | Path, dtype: Any = None, *, overwrite: bool = False) -> None:
        """Writes `folder/av` and `folder/ar` with their sidecars: Hugging Face folders, or PEFT adapters where they are
        such (`merged().save(…)` writes plain folders). `dtype` is that of whole models (None: in which they are held);
        adapters and the AR's head are float32.

        Raises `InputError` where `av` or `ar` is there already and holds anything (unless `overwrite`, which replaces
        them with all that they hold), for weights that are not finite, and where the disk does not take them."""
        folder, overwrite = path_to(folder), yes_or_no("overwrite", overwrite)
        dtype = None if dtype is None else floating_dtype(dtype)
        try:
            if problem := from_writer(lambda: taken(folder, overwrite)):
                raise InputError(problem)
            self._write(folder, dtype)
        except OSError as error:
            raise InputError(f"{folder} cannot be written ({error.strerror or first_line(error)}).") from None

    def _write(self, folder: AnyPath, dtype: Any) -> None:
        """Writes `folder/av` and `folder/ar`."""
        shape = self.sidecar.d_model, self.sidecar.width
        head = np.asarray(to_host(self.reconstructor_params["head"]), np.float32).reshape(shape)
        sidecar = dataclasses.replace(self.sidecar, provenance=stamped(self.sidecar.provenance, head))
        extra = {"av": {}, "ar": {HEAD: lambda path: write_head(path, head)}}
        for role, model, params in (
            ("av", self.verbalizer, self.verbalizer_params),
            ("ar", self.reconstructor, self.reconstructor_params["backbone"]),
        ):
            files = extra[role] | {FILE: functools.partial(sidecar.write, role=role)}
            config, tokenizer = model.model.config, self.prompts.tokenizer
            if model.lora is None:
                save_model(
                    folder / role,
                    params,
                    config,
                    tokenizer,
                    truncated=role == "ar",
                    dtype=dtype or params["embedding"].dtype,
                    end_ids=(self.verbalizer.end,),
                    extra_files=files,
                )
                continue
            with new_folder(folder / role) as scratch:
                if is_writer():
                    save_tokenizer(tokenizer, scratch)
                    for name, write in files.items():
                        write(scratch / name)
                save_adapter(
                    scratch, params, model.lora, config, self.sidecar.base_checkpoint, wrapped=is_wrapped(self.base_at)
                )

    def _checked(self, vectors: ArrayLike, slots: int | None = None) -> Float[np.ndarray, "n *slots W"]:
        """Activations as float32 rows, those of several layers `fve.joined`. Raises `InputError` where they cannot be
        that, and for those of another layer."""
        sidecar = self.sidecar
        theirs, ours = getattr(vectors, "layers", None), sidecar.layers
        if theirs not in (None, ours):
            earlier = f", earlier={sidecar.earlier_layers}" if sidecar.earlier_layers else ""
            raise InputError(
                f"These are activations of {in_words(theirs)}, the pair reads {in_words(ours)}: load_subject(…, "
                f"{sidecar.layer}{earlier})."
            )
        keeps_length = sidecar.injection_scale is None and Injection() in self.verbalizer.injections
        rows = usable_rows(vectors, [*([slots] if slots else []), sidecar.width], keeps_length)
        return joined(rows, len(ours)).astype(np.float32, copy=False)


def new_pair(
    sidecar: Sidecar,
    folder: Path,
    dtype: Any = jnp.float32,
    remat: str | None = None,
    attention: str = "xla",
    *,
    adapters: tuple[Lora | None, Lora | None] = (None, None),
    seed: int = 0,
    mesh: Mesh | None = None,
) -> Pair:
    """An untrained pair: AV and AR start from the subject in `folder`, the AR's head is the identity.

    `adapters` of AV and AR: None trains the whole model, else a new adapter to the subject, which is then held once, in
    `dtype`. On a `mesh` every parameter is read straight into its training place."""
    how = Reading(dtype, attention, usable_mesh(mesh), remat, trained=True)
    config, (av_lora, ar_lora) = how.config(folder), adapters
    prompts = sidecar.prompts(load_tokenizer(folder))
    sidecar = with_ids(sidecar, prompts)
    verbalizer, reconstructor = autoencoder(
        config,
        sidecar.layer,
        prompts.ids(),
        sidecar.injection_scale,
        sidecar.injections,
        adapters,
        sidecar.earlier_layers,
    )
    base = how.frozen(folder, config) if av_lora or ar_lora else None
    keys = jax.random.split(jax.random.key(seed))
    av = av_lora.init_params(keys[0], config) if av_lora else how.params(folder, config)
    truncated = reconstructor.model.config
    backbone = ar_lora.init_params(keys[1], truncated) if ar_lora else how.params(folder, truncated, truncated=True)
    ar = reconstructor.init_params(backbone)
    return Pair(sidecar, prompts, verbalizer, reconstructor, av, ar, base, how.mesh, folder)


def load_pair(
    av: str | Path,
    ar: str | Path | None = None,
    dtype: Any = None,
    attention: str = "xla",
    *,
    base: str | Path | None = None,
    conventions: Conventions = Conventions(),  # noqa: B008 (frozen)
    mesh: Mesh | None = None,
    training: Training | None = None,
) -> Pair:
    """Loads an AV and an AR folder (or hub ids); `ar` may be left out where `av` is a folder with `av` and `ar`.

    Either may be a PEFT adapter: its base is `base`, or what its `adapter_config.json` names. Whole parameters are
    held, and compute, in `dtype` (None: the one that they are stored in, float16 computing in float32); adapters, norms
    and the AR's head are float32. `attention` names a kernel (models/kernels.py). `conventions` say what the sidecar
    leaves open or has wrong. On a `mesh` every parameter is read straight into its training place. With `training` all
    that is trained is float32.

    Raises `InputError` where a sidecar is missing, belongs to another model or tokenizer, or weights are damaged."""
    of_class("conventions", conventions, Conventions)
    of_class("training", training or Training(), Training)
    how = Reading(dtype, attention, usable_mesh(mesh), training and training.remat, training is not None)
    return _read(av, ar, base, conventions, how)


def open_pair(
    av: str | Path,
    ar: str | Path | None = None,
    dtype: Any = None,
    *,
    base: str | Path | None = None,
    conventions: Conventions = Conventions(),  # noqa: B008 (frozen)
) -> Pair:
    """A pair to be saved: as `load_pair` reads it and with the same checks, but the weights of whole models stay in
    their files, and `save` reads them tensor by tensor."""
    return _read(av, ar, base, conventions, Reading(dtype, saved=True))


def _read(av: str | Path, ar: str | Path | None, base: str | Path | None, said: Conventions, how: Reading) -> Pair:
    """`load_pair` and `open_pair`."""
    av, ar = pair_folders(av, ar)
    sidecar = Sidecar.read(av, "av").joined(Sidecar.read(ar, "ar"), av, ar)
    sidecar = sidecar.settled(said, av)
    adapters = {folder: (folder / ADAPTER).is_file() for folder in (av, ar)}
    base = base_of(base, [folder for folder in (av, ar) if adapters[folder]])
    base_at = locate(base) if base else None
    check_once(av, ar, *[base_at] * bool(base))
    if base and sidecar.maker != "nla_jax":  # which name a checkpoint of training
        sidecar = dataclasses.replace(sidecar, base_checkpoint=str(base))
    config = how.config(base_at if adapters[av] else av)
    truncated = how.config(base_at).truncated(sidecar.layer + 1) if adapters[ar] else how.config(ar)
    if (config.width, truncated.width, truncated.layers) != (sidecar.d_model, sidecar.d_model, sidecar.layer + 1):
        raise InputError(
            f"The sidecar of {ar} says d_model {sidecar.d_model} and layer {sidecar.layer} ({sidecar.layer + 1} blocks), but "
            f"config.json says width {truncated.width} and {truncated.layers} blocks (AV: width {config.width})."
        )
    head = read_head(ar, sidecar.d_model, sidecar.width)
    sidecar = dataclasses.replace(sidecar, provenance=unstamped(sidecar.provenance, head, av, ar))
    av_lora, av_params = load_adapter(av, config) if adapters[av] else (None, None)
    ar_lora, backbone = load_adapter(ar, truncated) if adapters[ar] else (None, None)
    speller = with_tokenizer(av, ar, base_at)
    prompts = sidecar.prompts(load_tokenizer(speller))
    if has_tokenizer(ar) and not (same_tokenizer(ar, speller) or prompts.reads_as(load_tokenizer(ar))):
        raise InputError(f"The tokenizer of {ar} cuts text otherwise than the AV's; AV and AR must share one.")
    verbalizer, reconstructor = autoencoder(
        config,
        sidecar.layer,
        prompts.ids(),
        sidecar.injection_scale,
        sidecar.injections,
        (av_lora, ar_lora),
        sidecar.earlier_layers,
    )
    reconstructor = dataclasses.replace(reconstructor, model=Transformer(truncated))  # whose config.json is its own
    frozen = how.frozen(base_at, how.config(base_at)) if base_at else None
    sidecar = with_ids(sidecar, prompts)  # some sidecars do not say them
    av_params = av_params or how.params(av, config)
    backbone = backbone or how.params(ar, truncated, truncated=True)
    ar_params = {"backbone": backbone, "head": head}
    made = (sidecar, prompts, verbalizer, reconstructor, av_params, ar_params, frozen, how.mesh, base_at)
    return Pair(*made, folder=av.parent)
