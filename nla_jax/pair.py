"""A trained pair: verbalize activations, reconstruct them from text, score, load and save."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from safetensors.numpy import save_file

from nla_jax.autoencoder import Injection, Reconstructor, Verbalizer, keep
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
from nla_jax.prompts import Prompts, end_of_turn
from nla_jax.runtime.distributed import is_writer, to_host
from nla_jax.runtime.errors import InputError
from nla_jax.sampling import Rollout, decoding_layout, rollout, start_all
from nla_jax.sidecar import FILE, INJECTIONS, Sidecar

HEAD = "value_head.safetensors"


@dataclasses.dataclass(frozen=True)
class Pair:
    """A verbalizer and a reconstructor with their parameters, prompts and sidecar. Where one of them is a LoRA adapter, its
    parameters are the adapter's, and `base` holds the frozen model that both share."""

    sidecar: Sidecar
    prompts: Prompts
    verbalizer: Verbalizer
    reconstructor: Reconstructor
    verbalizer_params: dict
    reconstructor_params: dict
    base: dict | None = None

    @functools.cached_property
    def weights(self) -> tuple[dict, dict]:
        """The whole parameters of AV and AR, adapters attached."""
        return (
            self.verbalizer.assemble(self.verbalizer_params, self.base),
            self.reconstructor.assemble(self.reconstructor_params, self.base),
        )

    def sampler(self, to_decoding: Callable[[dict], dict] | None = None) -> dict:
        """The AV's whole parameters as `verbalize` samples from them: on the mesh in use a copy laid out for decoding, made by
        `to_decoding` where there is one already (`sampling.decoding_layout` of this AV and base); on one device no copy."""
        mesh = jax.sharding.get_mesh()
        if mesh.size < 2:
            return self.weights[0]
        to_decoding = to_decoding or decoding_layout(mesh, self.verbalizer, self.base)
        return to_decoding(self.verbalizer_params)

    def verbalize(
        self,
        vectors: np.ndarray,
        max_new_tokens: int = 150,
        temperature: float = 1.0,
        seed: int = 0,
        *,
        inject: bool = True,
        batch: int = 64,
        first: int = 0,
        sampler: dict | None = None,
    ) -> list[str]:
        """One explanation for each row of `vectors [n, d]` (raw activations; `[n, slots, d]` for a prompt of several slots); ""
        where the AV wrote none within `max_new_tokens`. Temperature 0 is greedy. The same seed gives the same texts, whatever the `batch`.
        `first` numbers the first row: rows given in pieces get the texts they would get together.
        `sampler`: what `sampler()` gives, where several calls share it.
        With `inject=False` the slot keeps the marker's own embedding: the control that shows what the prompt alone says."""
        slots = len(self.verbalizer.slots)
        vectors = self._checked(vectors, slots if slots > 1 else None)
        verbalizer = self.verbalizer if inject else dataclasses.replace(self.verbalizer, injection=Injection(keep))
        mesh, sampler, texts = jax.sharding.get_mesh(), sampler or self.sampler(), []
        parts = [vectors[start : start + batch] for start in range(0, len(vectors), batch)]

        def sample(i: int) -> Rollout:
            padding = [(0, batch - len(parts[i])), *[(0, 0)] * (vectors.ndim - 1)]
            return rollout(
                verbalizer, sampler, place_batch(mesh, np.pad(parts[i], padding, mode="edge")), jax.random.key(seed),
                first + i * batch, group=1, max_new_tokens=max_new_tokens, temperature=temperature,
            )  # fmt: skip

        for part, sampled in zip(parts, start_all(mesh, sample, len(parts))):
            tokens, mask, finished = to_host((sampled.tokens, sampled.mask, sampled.finished))
            texts += [text or "" for text in self.prompts.read_responses(tokens, mask, finished)[: len(part)]]
        return texts

    def reconstruct(self, texts: Sequence[str], *, batch: int = 64) -> np.ndarray:
        """ĥ `[n, d]` float32 from explanations: the AR's raw output. Compare it after normalising (`score`, `nla.fve`)."""
        if isinstance(texts, str):
            raise InputError("reconstruct and score take a list of texts; put a single one in a list.")
        rows = self.prompts.reconstructor_ids(list(texts))
        order, mesh = sorted(range(len(rows)), key=lambda i: len(rows[i])), jax.sharding.get_mesh()
        out = np.zeros((len(rows), self.sidecar.d_model), np.float32)
        for start in range(0, len(order), batch):
            part = order[start : start + batch]
            length = -(-max(len(rows[i]) for i in part) // 16) * 16
            tokens = np.zeros((batch, length), np.int32)
            lengths = np.ones(batch, np.int32)
            for j, i in enumerate(part):
                tokens[j, : len(rows[i])] = rows[i]
                lengths[j] = len(rows[i])
            placed = place_batch(mesh, (tokens, lengths))
            out[part] = to_host(_reconstruct(self.reconstructor, self.weights[1], *placed))[: len(part)]
        return out

    def score(self, texts: Sequence[str], vectors: np.ndarray) -> dict[str, np.ndarray]:
        """How well each text brings back its row of `vectors`: `mse` = 2(1 - cos) in [0, 4], and `cosine`, both `[n]`."""
        vectors = self._checked(vectors)
        if not isinstance(texts, str) and len(texts) != len(vectors):
            raise InputError(f"There are {len(texts)} texts for {len(vectors)} vectors; they must be as many.")
        similarity = cosine(self.reconstruct(texts), vectors)
        return {"mse": 2 * (1 - similarity), "cosine": similarity}

    def merged(self) -> "Pair":
        """The pair with its adapters merged into plain parameters: what `transformers` and servers load without PEFT."""
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
        """Writes `folder/av` and `folder/ar` with their sidecars: Hugging Face folders, or PEFT adapters where they are such
        (`merged().save(…)` writes plain folders). `dtype` is that of whole models; adapters and the AR's head are float32."""
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
                    folder / role, params, config, tokenizer, truncated=role == "ar", dtype=dtype,
                    end_ids=(self.verbalizer.end,), extra_files=files,
                )  # fmt: skip
                continue
            with new_folder(folder / role) as scratch:
                save_adapter(scratch, params, model.lora, config, self.sidecar.base_checkpoint)
                if not is_writer():
                    continue
                save_tokenizer(tokenizer, scratch)
                for name, write in files.items():
                    write(scratch / name)

    def _checked(self, vectors: np.ndarray, slots: int | None = None) -> np.ndarray:
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


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosine of each row of `a` with its row of `b`, `[n]` float64."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    return (a * b).sum(1) / np.maximum(np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1), 1e-12)


_reconstruct = jax.jit(lambda reconstructor, *args: reconstructor.reconstruct(*args), static_argnums=0)


def new_pair(
    sidecar: Sidecar,
    folder: Path,
    dtype: Any = jnp.float32,
    remat: str | None = None,
    attention: str = "xla",
    *,
    av_lora: Lora | None = None,
    ar_lora: Lora | None = None,
    seed: int = 0,
    mesh: Mesh | None = None,
) -> Pair:
    """An untrained pair: AV and AR start from the subject in `folder`, whole or as new adapters to it (whose base is then held
    once, in `dtype`); the AR's head is the identity. On a `mesh` every parameter is read straight into its training place."""
    config = _config(folder, dtype, remat, attention, mesh)
    verbalizer, reconstructor, prompts = _models(
        sidecar, config, config.truncated(sidecar.layer + 1), folder, av_lora, ar_lora
    )
    base = _load(folder, config, mesh, dtype=dtype) if av_lora or ar_lora else None
    keys = jax.random.split(jax.random.key(seed))
    av = av_lora.init_params(keys[0], config) if av_lora else _load(folder, config, mesh)
    truncated = reconstructor.model.config
    backbone = ar_lora.init_params(keys[1], truncated) if ar_lora else _load(folder, truncated, mesh, truncated=True)
    return Pair(sidecar, prompts, verbalizer, reconstructor, av, reconstructor.init_params(backbone), base)


def load_pair(
    av: str | Path,
    ar: str | Path | None = None,
    dtype: Any = jnp.float32,
    remat: str | None = None,
    attention: str = "xla",
    *,
    base: str | Path | None = None,
    injection: Injection | None = None,
    mesh: Mesh | None = None,
) -> Pair:
    """Loads an AV and an AR folder (or hub ids); `ar` may be left out where `av` is a folder that holds both as `av`, `ar`.
    Either may be a PEFT adapter: its base is `base`, or what its `adapter_config.json` names.

    Whole parameters are float32, a frozen base `dtype`, which is also what they compute in; `remat` is the name of a
    `jax.checkpoint_policies` policy, `attention` that of a kernel (models/kernels.py). `injection` says how activations enter the prompt where that is not what the sidecar
    says. On a `mesh` every parameter is read straight into its training place.

    Raises `InputError` where a sidecar is missing, belongs to another model or tokenizer, or the two do not match."""
    if ar is None:
        if not (path_to(av) / "av").is_dir():
            raise InputError(f"{av} is not a pair: it has no folders `av` and `ar`.")
        av, ar = path_to(av) / "av", path_to(av) / "ar"
    av, ar = locate(av), locate(ar)
    sidecar = Sidecar.read(av, "av").joined(Sidecar.read(ar, "ar"), av, ar)
    sidecar = dataclasses.replace(sidecar, injection=injection or sidecar.injection)
    if sidecar.injection is None:
        raise InputError(
            f"{av / FILE} names no injection that is known here ({', '.join(INJECTIONS)}); pass load_pair an "
            f"`injection`, e.g. Injection(add_norm_matched, block=1) for EasyNLA and nanoNLA (`nla`: --injection and "
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
    verbalizer, reconstructor, prompts = _models(sidecar, config, truncated, av, av_lora, ar_lora)
    frozen = _load(base_folder, read(base_folder), mesh, dtype=dtype) if base_folder else None
    sidecar = dataclasses.replace(sidecar, suffix_ids=tuple(prompts.suffix_ids()))  # some sidecars do not say them
    av_params = av_params or _load(av, config, mesh)
    backbone = backbone or _load(ar, truncated, mesh, truncated=True)
    return Pair(sidecar, prompts, verbalizer, reconstructor, av_params, {"backbone": backbone, "head": head}, frozen)


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


def _models(
    sidecar: Sidecar, config, truncated, folder: Path, av_lora: Lora | None, ar_lora: Lora | None
) -> tuple[Verbalizer, Reconstructor, Prompts]:
    prompts = sidecar.prompts(load_tokenizer(folder))
    prefix, suffix, slots = prompts.verbalizer_prompt()
    if not -1 <= sidecar.injection.block < config.layers:
        raise InputError(
            f"Activations are to be injected behind block {sidecar.injection.block}, but {folder} has blocks 0 to "
            f"{config.layers - 1} (-1: the input embeddings)."
        )
    verbalizer = Verbalizer(
        Transformer(config), prefix, suffix, end_of_turn(prompts.tokenizer), sidecar.injection_scale, sidecar.injection,
        slots, av_lora,
    )  # fmt: skip
    return verbalizer, Reconstructor(Transformer(truncated), prompts.reconstructor_prefix, ar_lora), prompts
