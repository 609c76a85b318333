"""A trained pair: verbalize activations, reconstruct them from text, score, load and save."""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from numpy.typing import ArrayLike
from safetensors.numpy import save_file

from nla_jax.autoencoder import Injection, Reconstructor, Verbalizer, autoencoder, keep, reconstruct
from nla_jax.data.batches import pad_tokens
from nla_jax.fve import cosine, mse
from nla_jax.io.adapters import CONFIG as ADAPTER
from nla_jax.io.adapters import load_adapter, read_settings, save_adapter
from nla_jax.io.files import AnyPath, new_folder, path_to
from nla_jax.io.folders import load_params, load_tokenizer, read_config, save_model, save_tokenizer
from nla_jax.io.hub import locate
from nla_jax.io.safetensors import read_tensors
from nla_jax.models.kernels import with_kernel
from nla_jax.models.lora import Lora
from nla_jax.models.sharding import TRAIN, place_batch, shardings
from nla_jax.models.transformer import (
    Transformer,
    TransformerConfig,
    abstract_params,
    truncate,
)
from nla_jax.prompts import Prompts
from nla_jax.runtime.distributed import is_writer, to_host
from nla_jax.runtime.errors import InputError
from nla_jax.sampling import Rollout, decoding_layout, rollout, start_all
from nla_jax.sidecar import FILE, INJECTIONS, Sidecar

HEAD = "value_head.safetensors"


@dataclasses.dataclass(frozen=True, eq=False)
class Pair:
    """A verbalizer and a reconstructor with their parameters, prompts and sidecar.

    Where one of them is a LoRA adapter, its parameters are the adapter's, and `base` holds the frozen model that both
    share. `mesh`: the devices over which the parameters are cut (None: they are on one device)."""

    sidecar: Sidecar
    prompts: Prompts
    verbalizer: Verbalizer
    reconstructor: Reconstructor
    verbalizer_params: dict
    reconstructor_params: dict
    base: dict | None = None
    mesh: Mesh | None = None

    @functools.cached_property
    def weights(self) -> tuple[dict, dict]:
        """The whole parameters of AV and AR, adapters attached."""
        return (
            self.verbalizer.assemble(self.verbalizer_params, self.base),
            self.reconstructor.assemble(self.reconstructor_params, self.base),
        )

    @functools.cached_property
    def sampler(self) -> dict:
        """The AV's whole parameters as the sampler reads them.

        On several devices, and where it computes in another dtype than float32, this is a copy of them, made once."""
        if self.mesh is not None and (self.mesh.size > 1 or self.verbalizer.model.config.dtype != jnp.float32):
            return decoding_layout(self.mesh, self.verbalizer, self.base)(self.verbalizer_params)
        return self.weights[0]

    def verbalize(
        self,
        vectors: ArrayLike,
        max_new_tokens: int = 150,
        temperature: float = 1.0,
        seed: int = 0,
        *,
        inject: bool = True,
        batch: int = 64,
        first: int = 0,
    ) -> list[str]:
        """One explanation for each row of `vectors`, raw activations [n, d] ([n, slots, d] for a prompt of several
        slots).

        A text is "" where the AV wrote none within `max_new_tokens`. Temperature 0 is greedy. The same seed gives the
        same texts, whatever the `batch`. `first` numbers the first row: rows given in pieces get the texts they would
        get together. With `inject=False` the slot keeps the marker's embedding: a control that shows what the prompt
        alone says."""
        slots = len(self.verbalizer.slots)
        vectors = self._checked(vectors, slots if slots > 1 else None)
        verbalizer = self.verbalizer if inject else dataclasses.replace(self.verbalizer, injections=(Injection(keep),))
        parts = [vectors[start : start + batch] for start in range(0, len(vectors), batch)]
        with self._on_mesh() as mesh:
            sampler, texts = self.sampler, []

            def sample(i: int) -> Rollout:
                padding = [(0, batch - len(parts[i])), *[(0, 0)] * (vectors.ndim - 1)]
                return rollout(
                    verbalizer,
                    sampler,
                    place_batch(mesh, np.pad(parts[i], padding, mode="edge")),
                    jax.random.key(seed),
                    first + i * batch,
                    group=1,
                    max_new_tokens=max_new_tokens,
                    temperature=temperature,
                )

            for part, sampled in zip(parts, start_all(mesh, sample, len(parts))):
                tokens, mask, finished = to_host((sampled.tokens, sampled.mask, sampled.finished))
                found = self.prompts.explanations(self.prompts.responses(tokens, mask), finished)
                texts += [text or "" for text in found[: len(part)]]
        return texts

    def reconstruct(self, texts: Sequence[str], *, batch: int = 64) -> np.ndarray:
        """ĥ [n, d], float32, from explanations: the AR's raw output. Compare it after normalising (`score`,
        `nla.fve`)."""
        if isinstance(texts, str):
            raise InputError("reconstruct and score take a list of texts; put a single one in a list.")
        rows = self.prompts.reconstructor_ids(list(texts))
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        out = np.zeros((len(rows), self.sidecar.d_model), np.float32)
        with self._on_mesh() as mesh:
            for start in range(0, len(order), batch):
                part = order[start : start + batch]
                padded = [rows[i] for i in part] + [[0]] * (batch - len(part))
                placed = place_batch(mesh, pad_tokens(padded, multiple=16))
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
        vectors = self._checked(vectors)
        if not isinstance(texts, str) and len(texts) != len(vectors):
            raise InputError(f"There are {len(texts)} texts for {len(vectors)} vectors; they must be as many.")
        recon, vectors = (np.asarray(x, np.float64) for x in (self.reconstruct(texts), vectors))
        return {"mse": mse(recon, vectors), "cosine": cosine(recon, vectors)}

    def merged(self) -> "Pair":
        """The pair with its adapters merged into plain parameters: what `transformers` and servers load without
        PEFT."""
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

    def save(self, folder: str | Path, dtype: Any = np.float32) -> None:
        """Writes `folder/av` and `folder/ar` with their sidecars: Hugging Face folders, or PEFT adapters where they are
        such (`merged().save(…)` writes plain folders). `dtype` is that of whole models; adapters and the AR's head are
        float32."""
        folder, d = path_to(folder), self.sidecar.d_model
        if not jnp.issubdtype(dtype, jnp.floating):
            raise InputError(f"Weights are saved as floating point numbers, not as {dtype}.")
        weight = np.asarray(to_host(self.reconstructor_params["head"]), np.float32)
        head = {"weight": np.ascontiguousarray(weight.T).reshape(d, d)}
        extra = {"av": {}, "ar": {HEAD: lambda path: save_file(head, path)}}
        for role, model, params in (
            ("av", self.verbalizer, self.verbalizer_params),
            ("ar", self.reconstructor, self.reconstructor_params["backbone"]),
        ):
            files = extra[role] | {FILE: functools.partial(self.sidecar.write, role=role)}
            config, tokenizer = model.model.config, self.prompts.tokenizer
            if model.lora is None:
                save_model(
                    folder / role,
                    params,
                    config,
                    tokenizer,
                    truncated=role == "ar",
                    dtype=dtype,
                    end_ids=(self.verbalizer.end,),
                    extra_files=files,
                )
                continue
            with new_folder(folder / role) as scratch:
                save_adapter(scratch, params, model.lora, config, self.sidecar.base_checkpoint)
                if not is_writer():
                    continue
                save_tokenizer(tokenizer, scratch)
                for name, write in files.items():
                    write(scratch / name)

    def _checked(self, vectors: ArrayLike, slots: int | None = None) -> np.ndarray:
        shape = ([slots] if slots else []) + [self.sidecar.d_model]
        expected = ", ".join(map(str, ["n", *shape]))
        try:
            vectors = np.asarray(vectors, np.float32)
        except (TypeError, ValueError):
            raise InputError(f"Activations must be an array of numbers of shape [{expected}].") from None
        if list(vectors.shape[1:]) != shape or not vectors.ndim > 1:
            raise InputError(f"Activations must be of shape [{expected}], found shape {list(vectors.shape)}.")
        if not (finite := np.isfinite(vectors).all(tuple(range(1, vectors.ndim)))).all():
            raise InputError(f"Row {int(np.argmin(finite))} of the activations holds NaN or infinite values.")
        return vectors


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
    config, (av_lora, ar_lora) = _config(folder, dtype, remat, attention, mesh), adapters
    prompts = sidecar.prompts(load_tokenizer(folder))
    verbalizer, reconstructor = autoencoder(
        config, sidecar.layer, prompts.ids(), sidecar.injection_scale, sidecar.injections, adapters
    )
    base = _load(folder, config, mesh, dtype=dtype) if av_lora or ar_lora else None
    keys = jax.random.split(jax.random.key(seed))
    av = av_lora.init_params(keys[0], config) if av_lora else _load(folder, config, mesh)
    truncated = reconstructor.model.config
    backbone = ar_lora.init_params(keys[1], truncated) if ar_lora else _load(folder, truncated, mesh, truncated=True)
    return Pair(sidecar, prompts, verbalizer, reconstructor, av, reconstructor.init_params(backbone), base, mesh)


def load_pair(
    av: str | Path,
    ar: str | Path | None = None,
    dtype: Any = jnp.float32,
    remat: str | None = None,
    attention: str = "xla",
    *,
    base: str | Path | None = None,
    injections: tuple[Injection, ...] | Injection | None = None,
    mesh: Mesh | None = None,
) -> Pair:
    """Loads an AV and an AR folder (or hub ids); `ar` may be left out where `av` is a folder that holds both as `av`,
    `ar`.

    Either may be a PEFT adapter: its base is `base`, or what its `adapter_config.json` names. Whole parameters are
    float32, a frozen base `dtype`, which is also what they compute in. `remat` is the name of a
    `jax.checkpoint_policies` policy, `attention` that of a kernel (models/kernels.py). `injections` say how activations
    enter the prompt where that is not what the sidecar says. On a `mesh` every parameter is read straight into its
    training place.

    Raises `InputError` where a sidecar is missing, belongs to another model or tokenizer, or the two do not match."""
    if ar is None:
        if not (path_to(av) / "av").is_dir():
            raise InputError(f"{av} is not a pair: it has no folders `av` and `ar`.")
        av, ar = path_to(av) / "av", path_to(av) / "ar"
    av, ar = locate(av), locate(ar)
    sidecar = Sidecar.read(av, "av").joined(Sidecar.read(ar, "ar"), av, ar)
    given = (injections,) if isinstance(injections, Injection) else injections
    sidecar = dataclasses.replace(sidecar, injections=given or sidecar.injections)
    if sidecar.injections is None:
        raise InputError(
            f"{av / FILE} names no injection that is known here ({', '.join(INJECTIONS)}); pass load_pair "
            f"`injections`, e.g. Injection(add_norm_matched, block=1) for EasyNLA and nanoNLA (`nla`: --injection and "
            f"--injection-block)."
        )

    adapters = {folder: (folder / ADAPTER).is_file() for folder in (av, ar)}
    base_folder = _base_folder(base, [folder for folder in (av, ar) if adapters[folder]])
    read = lambda folder: _config(folder, dtype, remat, attention, mesh)
    config = read(base_folder if adapters[av] else av)
    truncated = read(base_folder).truncated(sidecar.layer + 1) if adapters[ar] else read(ar)
    if (config.width, truncated.width, truncated.layers) != (sidecar.d_model, sidecar.d_model, sidecar.layer + 1):
        raise InputError(
            f"The sidecar of {ar} says d_model {sidecar.d_model} and layer {sidecar.layer} ({sidecar.layer + 1} blocks), but "
            f"config.json says width {truncated.width} and {truncated.layers} blocks (AV: width {config.width})."
        )
    head = read_head(ar / HEAD, sidecar.d_model)
    av_lora, av_params = load_adapter(av, config) if adapters[av] else (None, None)
    ar_lora, backbone = load_adapter(ar, truncated) if adapters[ar] else (None, None)
    prompts = sidecar.prompts(load_tokenizer(av))
    verbalizer, reconstructor = autoencoder(
        config, sidecar.layer, prompts.ids(), sidecar.injection_scale, sidecar.injections, (av_lora, ar_lora)
    )
    reconstructor = dataclasses.replace(reconstructor, model=Transformer(truncated))  # whose config.json is its own
    frozen = _load(base_folder, read(base_folder), mesh, dtype=dtype) if base_folder else None
    sidecar = dataclasses.replace(sidecar, suffix_ids=tuple(prompts.suffix_ids()))  # some sidecars do not say them
    av_params = av_params or _load(av, config, mesh)
    backbone = backbone or _load(ar, truncated, mesh, truncated=True)
    ar_params = {"backbone": backbone, "head": head}
    return Pair(sidecar, prompts, verbalizer, reconstructor, av_params, ar_params, frozen, mesh)


def read_head(file: Path, d: int) -> np.ndarray:
    """The AR's head as it acts here, `x @ head`; the file holds its transpose under `weight`."""
    weight = read_tensors(file).get("weight")
    if weight is None or weight.shape != (d, d):
        found = "no tensor 'weight'" if weight is None else f"weight of shape {weight.shape}"
        raise InputError(f"{file} holds {found}, expected weight of shape {(d, d)}.")
    head = weight.read().T.astype(np.float32)
    if not np.isfinite(head).all():
        raise InputError(f"{file}: weight holds NaN or infinite values.")
    return np.ascontiguousarray(head)


def find_base(recorded: str, beside: AnyPath) -> str | AnyPath:
    """The subject that a pair was made from: the folder or hub id `recorded`; else `subject` beside the pair's folder.

    Raises `InputError` where there is neither."""
    here = path_to(recorded).is_dir()
    if not here and (beside.parent / "subject").is_dir():
        return beside.parent / "subject"
    if here or recorded.count("/") == 1 and not recorded.startswith((".", "/")):
        return recorded
    raise InputError(f"The subject {recorded} that {beside} was made from is not here; name its folder or hub id.")


def _base_folder(given: str | Path | None, adapters: list[Path]) -> Path | None:
    """The folder of the adapters' base model. Raises `InputError` where two name different ones."""
    names = {read_settings(folder).get("base_model_name_or_path") for folder in adapters}
    if not adapters:
        return None
    if given is None and (len(names) > 1 or not isinstance(min(names, key=str), str)):
        raise InputError(f"The adapters {adapters[0]} and {adapters[-1]} name the base models {names}; pass `base`.")
    return locate(given or find_base(names.pop(), adapters[0].parent))


def _config(folder: Path, dtype, remat, attention, mesh) -> TransformerConfig:
    if remat and not hasattr(jax.checkpoint_policies, remat):
        raise InputError(f"remat {remat!r} is no policy of jax.checkpoint_policies; nothing_saveable is one.")
    return dataclasses.replace(with_kernel(read_config(folder, dtype), attention, mesh), remat=remat or None)


def _load(
    folder: Path, config: TransformerConfig, mesh: Mesh | None, *, truncated: bool = False, dtype=jnp.float32
) -> dict:
    """The parameters of a folder, on a mesh each in its training place."""
    layout = shardings(mesh, abstract_params(config, truncated), TRAIN) if mesh else None
    return load_params(folder, config, truncated=truncated, dtype=dtype, layout=layout)
