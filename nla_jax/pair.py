"""A trained pair: verbalize activations, reconstruct them from text, score, load and save."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save_file

from nla_jax.autoencoder import Reconstructor, Verbalizer
from nla_jax.errors import InputError
from nla_jax.models.pretrained import load_params, load_tokenizer, locate, read_config, save_model
from nla_jax.models.transformer import Transformer
from nla_jax.prompts import Prompts, end_of_turn
from nla_jax.sampling import rollout
from nla_jax.sidecar import FILE, Sidecar

HEAD = "value_head.safetensors"


@dataclasses.dataclass(frozen=True)
class Pair:
    """A verbalizer and a reconstructor with their parameters, prompts and sidecar."""

    sidecar: Sidecar
    prompts: Prompts
    verbalizer: Verbalizer
    reconstructor: Reconstructor
    verbalizer_params: dict
    reconstructor_params: dict

    def verbalize(
        self,
        vectors: np.ndarray,
        max_new_tokens: int = 150,
        temperature: float = 1.0,
        seed: int = 0,
        *,
        inject: bool = True,
        batch: int = 64,
    ) -> list[str]:
        """One explanation for each row of `vectors [n, d]` (raw activations); "" where the AV wrote none within
        `max_new_tokens`. Temperature 0 is greedy. The same seed gives the same texts, whatever the `batch`.
        With `inject=False` the slot keeps the marker's own embedding: the control that shows what the prompt alone says."""
        vectors = self._checked(vectors)
        verbalizer = self.verbalizer if inject else dataclasses.replace(self.verbalizer, inject=keep_embedding)
        texts = []
        for start in range(0, len(vectors), batch):
            part = vectors[start : start + batch]
            padded = np.pad(part, ((0, batch - len(part)), (0, 0)), mode="edge")
            sampled = rollout(
                verbalizer, self.verbalizer_params, padded, jax.random.key(seed), start,
                group=1, max_new_tokens=max_new_tokens, temperature=temperature,
            )  # fmt: skip
            tokens, mask, finished = jax.device_get((sampled.tokens, sampled.mask, sampled.finished))
            texts += [text or "" for text in self.prompts.read_responses(tokens, mask, finished)[: len(part)]]
        return texts

    def reconstruct(self, texts: Sequence[str], *, batch: int = 64) -> np.ndarray:
        """ĥ `[n, d]` float32 from explanations: the AR's raw output. Compare it after normalising (`score`, `nla.fve`)."""
        rows = self.prompts.reconstructor_ids(list(texts))
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        out = np.zeros((len(rows), self.sidecar.d_model), np.float32)
        for start in range(0, len(order), batch):
            part = order[start : start + batch]
            length = -(-max(len(rows[i]) for i in part) // 16) * 16
            tokens = np.zeros((batch, length), np.int32)
            lengths = np.ones(batch, np.int32)
            for j, i in enumerate(part):
                tokens[j, : len(rows[i])] = rows[i]
                lengths[j] = len(rows[i])
            out[part] = _reconstruct(self.reconstructor, self.reconstructor_params, tokens, lengths)[: len(part)]
        return out

    def score(self, texts: Sequence[str], vectors: np.ndarray) -> dict[str, np.ndarray]:
        """How well each text brings back its row of `vectors`: `mse` = 2(1 - cos) in [0, 4], and `cosine`, both `[n]`."""
        vectors = self._checked(vectors)
        if len(texts) != len(vectors):
            raise InputError(f"There are {len(texts)} texts for {len(vectors)} vectors; they must be as many.")
        a, b = (x.astype(np.float64) for x in (self.reconstruct(texts), vectors))
        cosine = (a * b).sum(1) / np.maximum(np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1), 1e-12)
        return {"mse": 2 * (1 - cosine), "cosine": cosine}

    def save(self, folder: str | Path) -> None:
        """Writes `folder/av` and `folder/ar` as Hugging Face folders with their sidecars."""
        folder, d = Path(folder), self.sidecar.d_model
        av, ar = jax.device_get((self.verbalizer_params, self.reconstructor_params))
        head = {"weight": np.ascontiguousarray(np.asarray(ar["head"], np.float32).T).reshape(d, d)}
        save_model(
            folder / "av", av, self.verbalizer.model.config, self.prompts.tokenizer,
            extra_files={FILE: lambda path: self.sidecar.write(path, "av")},
        )  # fmt: skip
        save_model(
            folder / "ar", ar["backbone"], self.reconstructor.model.config, self.prompts.tokenizer, truncated=True,
            extra_files={HEAD: lambda path: save_file(head, path), FILE: lambda path: self.sidecar.write(path, "ar")},
        )  # fmt: skip

    def _checked(self, vectors: np.ndarray) -> np.ndarray:
        vectors = np.asarray(vectors, np.float32)
        if vectors.ndim != 2 or vectors.shape[1] != self.sidecar.d_model or not np.isfinite(vectors).all():
            raise InputError(
                f"Activations must be finite and of shape [n, {self.sidecar.d_model}], found shape {list(vectors.shape)}."
            )
        return vectors


def keep_embedding(marker, vectors, scale):
    """The no-injection control: the marker's own embedding stays in the slot."""
    return jnp.broadcast_to(marker, vectors.shape)


_reconstruct = jax.jit(lambda reconstructor, *args: reconstructor.reconstruct(*args), static_argnums=0)


def new_pair(sidecar: Sidecar, folder: Path, dtype: Any = jnp.float32, remat: str | None = None) -> Pair:
    """An untrained pair: AV and AR start from the subject in `folder`, the AR's head is the identity."""
    config = dataclasses.replace(read_config(folder, dtype), remat=remat or None)
    params = load_params(folder, config)
    backbone = {
        "embedding": params["embedding"],
        "blocks": jax.tree.map(lambda x: x[: sidecar.layer + 1], params["blocks"]),
    }
    verbalizer, reconstructor, prompts = _models(sidecar, config, config.truncated(sidecar.layer + 1), folder)
    return Pair(sidecar, prompts, verbalizer, reconstructor, params, reconstructor.init_params(backbone))


def load_pair(av: str | Path, ar: str | Path | None = None, dtype: Any = jnp.float32, remat: str | None = None) -> Pair:
    """Loads an AV and an AR folder (or hub ids); `ar` may be left out where `av` is a folder that holds both as `av`, `ar`.
    Parameters are float32; `dtype` is what they compute in, `remat` the name of a `jax.checkpoint_policies` policy.

    Raises `InputError` where a sidecar is missing, belongs to another model or tokenizer, or the two do not match."""
    if ar is None:
        if not (Path(av) / "av").is_dir():
            raise InputError(f"{av} is not a pair: it has no folders `av` and `ar`.")
        av, ar = Path(av) / "av", Path(av) / "ar"
    av, ar = locate(av), locate(ar)
    sidecar, other = Sidecar.read(av, "av"), Sidecar.read(ar, "ar")
    for field in ("base_checkpoint", "d_model", "layer", "reconstructor_template"):
        if getattr(sidecar, field) != getattr(other, field):
            raise InputError(
                f"{av} and {ar} are not a pair: {field} is {getattr(sidecar, field)!r} in one and {getattr(other, field)!r} in "
                f"the other."
            )
    config, truncated = (dataclasses.replace(read_config(part, dtype), remat=remat or None) for part in (av, ar))
    if (config.width, truncated.width, truncated.layers) != (sidecar.d_model, sidecar.d_model, sidecar.layer + 1):
        raise InputError(
            f"The sidecar of {ar} says d_model {sidecar.d_model} and layer {sidecar.layer} ({sidecar.layer + 1} blocks), but "
            f"config.json says width {truncated.width} and {truncated.layers} blocks (AV: width {config.width})."
        )
    try:
        head = load_file(ar / HEAD)["weight"]
    except Exception as error:  # missing, damaged, or without the key
        raise InputError(f"{ar / HEAD} is missing or damaged ({error}).") from None
    if head.shape != (sidecar.d_model,) * 2:
        raise InputError(f"{ar / HEAD}: weight has shape {head.shape}, expected {(sidecar.d_model,) * 2}.")
    if not np.isfinite(head.astype(np.float32)).all():
        raise InputError(f"{ar / HEAD}: weight holds NaN or infinite values.")
    verbalizer, reconstructor, prompts = _models(sidecar, config, truncated, av)
    backbone = load_params(ar, truncated, truncated=True)
    ar_params = {"backbone": backbone, "head": np.ascontiguousarray(head.T.astype(np.float32))}
    return Pair(sidecar, prompts, verbalizer, reconstructor, load_params(av, config), ar_params)


def _models(sidecar: Sidecar, config, truncated, folder: Path) -> tuple[Verbalizer, Reconstructor, Prompts]:
    prompts = sidecar.prompts(load_tokenizer(folder))
    prefix, suffix = prompts.verbalizer_prompt()
    end = end_of_turn(prompts.tokenizer)
    verbalizer = Verbalizer(Transformer(config), prefix, suffix, end, sidecar.injection_scale)
    return verbalizer, Reconstructor(Transformer(truncated)), prompts
