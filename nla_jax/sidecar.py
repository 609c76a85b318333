"""`nla_meta.yaml`: what a model or dataset of a natural language autoencoder says about itself."""

import dataclasses
from pathlib import Path

import yaml

from nla_jax.errors import InputError
from nla_jax.prompts import Marker, Prompts

FILE = "nla_meta.yaml"


@dataclasses.dataclass(frozen=True)
class Sidecar:
    """The facts shared by an AV, its AR and their data. `base_hash` and the like go to `provenance`."""

    base_checkpoint: str
    d_model: int
    layer: int
    injection_scale: float
    marker: Marker
    verbalizer_template: str
    reconstructor_template: str
    suffix_ids: tuple[int, ...]
    provenance: dict = dataclasses.field(default_factory=dict, hash=False)

    def write(self, path: Path, role: str) -> None:
        """Writes `nla_meta.yaml` for a model of `role` "av" or "ar"."""
        m = self.marker
        content = {
            "kind": "nla_model",
            "schema_version": 1,
            "role": role,
            "base_checkpoint": self.base_checkpoint,
            "d_model": self.d_model,
            "extraction": {
                "layer_index": self.layer,
                "injection_scale": self.injection_scale,
                "mse_scale": "sqrt_d_model",
                "norm": "none",
            },
            "tokens": {
                "injection_char": m.char,
                "injection_token_id": m.id,
                "injection_left_neighbor_id": m.left,
                "injection_right_neighbor_id": m.right,
                "critic_suffix_ids": list(self.suffix_ids),
            },
            "prompt_templates": {"av": self.verbalizer_template, "ar": self.reconstructor_template},
            "provenance": self.provenance,
        }
        if role == "ar":
            content["ar"] = {"extraction_layer_index": self.layer}
        path.write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True), encoding="utf-8")

    @classmethod
    def read(cls, folder: Path, role: str) -> "Sidecar":
        """Reads the sidecar of a model folder, in either naming generation (av/actor, ar/critic).

        Raises `InputError` naming the field that is missing or wrong."""
        file = Path(folder) / FILE
        if not file.is_file():
            raise InputError(f"{folder} has no {FILE}: it is not an NLA model folder.")
        try:
            content = yaml.safe_load(file.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise InputError(f"{file} is not plain YAML ({str(error).splitlines()[0]}).") from None

        def get(*names: str, of=content, kind=object):
            path = names[0]
            for alternative in names:
                value = of
                for key in alternative.split("."):
                    value = value.get(key) if isinstance(value, dict) else None
                if value is not None:
                    if not isinstance(value, kind) or isinstance(value, bool):
                        raise InputError(f"{file}: field {alternative} is {value!r}, of the wrong type.")
                    return value
            raise InputError(f"{file} lacks the field {path}.")

        found = {"actor": "av", "critic": "ar"}.get(get("role", kind=str), get("role", kind=str))
        if found != role:
            raise InputError(f"{file}: role is {found!r}, expected {role!r}; were the AV and AR folders swapped?")
        d_model = get("d_model", kind=int)
        scale = get("extraction.injection_scale", kind=(int, float, str))
        if isinstance(scale, str) and scale != "sqrt_d_model":
            raise InputError(f"{file}: extraction.injection_scale is {scale!r}, expected a number or 'sqrt_d_model'.")
        return cls(
            base_checkpoint=get("base_checkpoint", kind=str),
            d_model=d_model,
            layer=get("extraction.layer_index", "ar.extraction_layer_index", "critic.extraction_layer_index", kind=int),
            injection_scale=d_model**0.5 if isinstance(scale, str) else float(scale),
            marker=Marker(
                get("tokens.injection_char", kind=str),
                get("tokens.injection_token_id", kind=int),
                get("tokens.injection_left_neighbor_id", kind=int),
                get("tokens.injection_right_neighbor_id", kind=int),
            ),
            verbalizer_template=get("prompt_templates.av", "prompt_templates.actor", kind=str),
            reconstructor_template=get("prompt_templates.ar", "prompt_templates.critic", kind=str),
            suffix_ids=tuple(get("tokens.critic_suffix_ids", kind=list)),
            provenance=content.get("provenance") or {},
        )

    def prompts(self, tokenizer) -> Prompts:
        """The templates with a live tokenizer, checked against it: marker id, its neighbours, the template's suffix.

        Raises `InputError` naming field, expected and found."""
        prompts = Prompts(tokenizer, self.marker, self.verbalizer_template, self.reconstructor_template)
        for name, field in (("av", self.verbalizer_template), ("ar", self.reconstructor_template)):
            wanted = "{injection_char}" if name == "av" else "{explanation}"
            if field.count(wanted) != 1:
                raise InputError(f"prompt_templates.{name} must contain {wanted} exactly once.")
        prompts.verbalizer_prompt()
        if (live := tuple(prompts.suffix_ids())) != tuple(self.suffix_ids):
            raise InputError(
                f"The sidecar's tokens.critic_suffix_ids is {list(self.suffix_ids)}, but this tokenizer gives {list(live)}; "
                f"the sidecar belongs to another tokenizer."
            )
        return prompts
