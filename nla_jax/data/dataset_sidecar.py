"""The sidecars of datasets: what they say of where activations come from, written, read and compared with a subject."""

import dataclasses
import datetime
import hashlib
import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from nla_jax.io.files import fits_seal
from nla_jax.prompts import Marker, Prompts
from nla_jax.runtime.errors import InputError
from nla_jax.sidecar import read_yaml


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where activations come from: the subject (`base_model` is its folder or hub id, `base_hash` its fingerprint), the
    block, and earlier blocks."""

    base_model: str
    base_hash: str
    d_model: int
    layer_index: int
    earlier_layers: tuple[int, ...] = ()

    def extraction(self, corpus: str, documents: int, positions: int) -> dict:
        """The field `extraction` of a dataset's sidecar: the reference rejects any other key in it, and so what it cannot
        use, activations of several layers."""
        several = {"earlier_layers": list(self.earlier_layers)} if self.earlier_layers else {}
        return several | {
            "base_model": self.base_model,
            "d_model": self.d_model,
            "layer_index": self.layer_index,
            "norm": "none",
            "corpus": corpus,
            "corpus_slice": {"start": 0, "length": documents},
            "positions_per_doc": positions,
        }


def sidecar_content(split: str, stage: str, rows: int, extraction: dict, **fields) -> dict:
    """The sidecar of a dataset. `fields` replace the defaults or are added; readers ignore those that they do not
    know."""
    digest = hashlib.blake2b(json.dumps([split, stage, extraction]).encode(), digest_size=4).hexdigest()
    return {
        "dataset_id": f"{split}_{digest}",
        "stage": stage,
        "row_count": rows,
        "extraction": extraction,
        "kind": "nla_dataset",
        "schema_version": 1,
        "keep_debug_metadata": True,
        "tokens": None,
        "prompt_templates": {},
        "parent_datasets": [],
        "created_at": datetime.datetime.now(datetime.UTC).isoformat(),
        "created_by": "nla_jax",
        "git_commit": None,
    } | fields


def read_facts(file: Path, missing: str = "") -> dict:
    """A dataset's sidecar. Raises `InputError` (`missing` where there is none), also where its checksum does not fit."""
    meta = read_yaml(file, missing)
    if fits_seal(file.read_bytes()) is False:
        raise InputError(
            f"{file} is damaged: its last line holds another checksum; copy it again (or, if you have changed it on "
            f"purpose, take that line out)."
        )
    return meta


def templates_of(meta: dict) -> dict[str, str]:
    """The prompt templates that a sidecar names, by `av` and `ar`, in either generation of names."""
    found = meta.get("prompt_templates")
    found = found if isinstance(found, dict) else {}
    by_role = {role: found.get(role, found.get(older)) for role, older in (("av", "actor"), ("ar", "critic"))}
    return {role: template for role, template in by_role.items() if isinstance(template, str)}


def check_marker(file: Path, tokens: Any, template: str | None, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises `InputError` where the marker that a dataset's sidecar names is not what the tokenizer makes of it in the
    AV's prompt; a sidecar may leave out either."""
    names = [f"injection_{name}" for name in ("char", "token_id", "left_neighbor_id", "right_neighbor_id")]
    if template is None or not isinstance(tokens, dict) or any(tokens.get(name) is None for name in names):
        return
    try:
        Prompts(tokenizer, Marker(*(tokens[name] for name in names)), template).verbalizer_prompt()
    except InputError as error:
        raise InputError(f"{file}: {error}") from None


def check_sidecar(file: Path, meta: dict, subject: Origin) -> dict:
    """The field `extraction` of a dataset's sidecar. Raises `InputError` where it is not of this subject."""
    extraction = meta.get("extraction")
    if meta.get("kind") != "nla_dataset" or not isinstance(extraction, dict):
        raise InputError(
            f"{file}: kind is {meta.get('kind')!r}, expected 'nla_dataset' with a field extraction; it is no dataset's sidecar."
        )
    short = lambda name: str(name).rstrip("/").rsplit("/", 1)[-1]
    found = extraction | {"base_model": short(extraction.get("base_model")), "norm": extraction.get("norm") or "none"}
    earlier = extraction.get("earlier_layers") or ()
    found["earlier_layers"] = tuple(earlier) if isinstance(earlier, list) else earlier
    expected = dataclasses.asdict(subject) | {"base_model": short(subject.base_model), "norm": "none"}
    for name, remedy in (
        ("base_model", "set subject.path to that model, or use data of this one"),
        ("d_model", "set subject.path to the model that the data come from"),
        ("layer_index", "set subject.layer, or use data of that layer"),
        ("earlier_layers", "set subject.earlier_layers, or use data of these layers"),
        ("norm", "use raw vectors"),
    ):
        if found.get(name) != expected[name]:
            raise InputError(
                f"{file}: extraction.{name} is {found.get(name)!r}, expected {expected[name]!r}; {remedy}."
            )
    if meta.get("base_hash") not in (None, subject.base_hash):
        raise InputError(
            f"{file}: base_hash is {meta['base_hash']}, but the subject {subject.base_model} has {subject.base_hash}; set "
            f"subject.path to the model that the data come from (or remove base_hash there, if it is the same model)."
        )
    return extraction
