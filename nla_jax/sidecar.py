"""`nla_meta.yaml`: what a model of a natural language autoencoder says about itself, in the reference's format."""

import contextlib
import dataclasses
import reprlib
from pathlib import Path

import yaml

from nla_jax.autoencoder import Injection, PromptIds, add_norm_matched, replace
from nla_jax.io.conventions import MAKERS, Conventions
from nla_jax.io.files import sealed
from nla_jax.prompts import READINGS, THINKING, Marker, Prompts
from nla_jax.runtime.errors import InputError, first_line
from nla_jax.runtime.notes import note
from nla_jax.runtime.user_input import is_finite

FILE = "nla_meta.yaml"
INJECTIONS = {"replace": replace, "norm_matched_addition": add_norm_matched}  # by their names in a sidecar
JOINT = ("d_model", "layer", "earlier_layers", "reconstructor_template")  # what AV and AR of a pair must agree in
LARGEST = 1 << 20  # bytes of a sidecar that is worth reading


@dataclasses.dataclass(frozen=True)
class _Fields:
    """The fields of a sidecar `file` by dotted names. Where several names are given, the first one that is there counts."""

    file: Path
    content: dict

    def get(self, *names: str, kind=object, default=...):
        """The value of a field. Raises `InputError` where it is missing and has no default, or is of another type."""
        for name in names:
            value = self.content
            for key in name.split("."):
                value = value.get(key) if isinstance(value, dict) else None
            if value is not None:
                if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
                    raise InputError(f"{self.file}: field {name} is {reprlib.repr(value)}, of the wrong type.")
                return value
        if default is ...:
            raise InputError(f"{self.file} lacks the field {names[0]}.")
        return default

    def count(self, *names: str, least: int, **default) -> int | None:
        """The value of an integer field. Raises `InputError` where it is below `least`."""
        value = self.get(*names, kind=int, **default)
        if value is not None and value < least:
            raise InputError(f"{self.file}: field {names[0]} is {value}, expected at least {least}.")
        return value


@dataclasses.dataclass(frozen=True)
class Sidecar:
    """The facts shared by an AV, its AR and their data. None: the folder's sidecar does not say (its partner's may).

    `earlier_layers`: blocks before `layer` whose activations the pair reads too, ascending. `injection_scale` None means
    that activations are injected at their own length. `special_tokens`, `thinking`,
    `reading`: see `Conventions`. `ids`: the prompts as the pair was trained with them. `maker`: whose sidecar it is, of
    `MAKERS`; `guessed`: what it does not say, and the maker is known to do. `base_hash` and the like go to
    `provenance`."""

    base_checkpoint: str
    d_model: int
    layer: int | None
    injection_scale: float | None
    marker: Marker
    verbalizer_template: str
    reconstructor_template: str | None
    suffix_ids: tuple[int, ...] | None
    injections: tuple[Injection, ...] | None = (Injection(),)
    special_tokens: bool = True
    thinking: str = "off"
    reading: str = "tags"
    ids: PromptIds | None = None
    earlier_layers: tuple[int, ...] = ()
    provenance: dict = dataclasses.field(default_factory=dict, hash=False)
    maker: str = dataclasses.field(default="nla_jax", compare=False)
    guessed: tuple[str, ...] = dataclasses.field(default=(), compare=False)
    foreign: tuple[str, ...] = dataclasses.field(default=(), compare=False)  # names of injections not known here

    @property
    def layers(self) -> tuple[int, ...]:
        """After which blocks the activations are read, ascending."""
        return (*self.earlier_layers, self.layer)

    @property
    def width(self) -> int:
        """Entries of an activation: `d_model` of each layer."""
        return len(self.layers) * self.d_model

    def write(self, path: Path, role: str) -> None:
        """Writes `nla_meta.yaml` for a model of `role` "av" or "ar"."""
        text = yaml.safe_dump(self.content(role), sort_keys=False, allow_unicode=True)
        path.write_text(sealed(text), encoding="utf-8")

    def content(self, role: str) -> dict:
        """The fields of `nla_meta.yaml`. Scales are written as numbers: the reference's client reads nothing else."""
        m, injections = self.marker, [injection_fields(x) for x in self.injections]
        content = {
            "kind": "nla_model",
            "schema_version": 2,
            "role": role,
            "base_checkpoint": self.base_checkpoint,
            "d_model": self.d_model,
            "extraction_layer_index": self.layer,
            "extraction": {
                "layer_index": self.layer,
                **({"earlier_layers": list(self.earlier_layers)} if self.earlier_layers else {}),
                "injection_scale": self.injection_scale,
                **injections[0],
                **({"more_injections": injections[1:]} if injections[1:] else {}),
                "mse_scale": self.d_model**0.5,
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
            "conventions": {"thinking": self.thinking, "reading": self.reading},
            "provenance": self.provenance,
        }
        if self.ids:
            content["prompt_ids"] = {
                name: getattr(self.ids, field) if field == "end" else list(getattr(self.ids, field))
                for name, field in ID_FIELDS.items()
            }
        if role == "ar":
            content["critic"] = {"extraction_layer_index": self.layer, "add_special_tokens": self.special_tokens}
        return content

    @classmethod
    def read(cls, folder: Path, role: str) -> "Sidecar":
        """Reads the sidecar of a model folder of `role` "av" or "ar", in either naming generation (av/actor,
        ar/critic), or the dataset's sidecar that EasyNLA and nanoNLA copy there.

        Raises `InputError` naming the field that is missing or wrong."""
        file, shared = sidecar_file(Path(folder))
        fields = _Fields(file, read_yaml(file, f"{folder} has no {FILE}: it is not an NLA model folder."))
        get, count = fields.get, fields.count
        kind = get("kind", kind=str, default="nla_model")
        if kind not in ("nla_model", "nla_dataset"):
            raise InputError(f"{file}: kind is {reprlib.repr(kind)}, expected 'nla_model'.")
        found = get("role", kind=str, **({"default": role} if shared or kind == "nla_dataset" else {}))
        if not shared and (named := {"actor": "av", "critic": "ar"}.get(found, found)) != role:
            raise InputError(f"{file}: role is {named!r}, expected {role!r}; were the AV and AR folders swapped?")
        of_the_ar = {"default": None} if role == "av" else {}  # what an AV's sidecar may leave out
        d_model = count("d_model", "extraction.d_model", least=1)
        maker = _maker(kind, fields)
        stated = get("extraction.injection_scale", default=None)
        scale = read_scale(f"{file}: extraction.injection_scale", stated, d_model)
        conventions, guessed = _conventions(fields, maker)
        guessed += ["injection_scale"] * (stated is None and maker != "nla_jax" and role == "av")
        method = get("extraction.injection_method", kind=str, default="replace" if kind == "nla_model" else None)
        first = {"injection_method": method, "injection_block": get("extraction.injection_block", kind=int, default=-1)}
        injections = [first, *get("extraction.more_injections", kind=list, default=[])]
        marker = [get(f"tokens.injection_{x}", kind=int) for x in ("token_id", "left_neighbor_id", "right_neighbor_id")]
        suffix_ids = get("tokens.critic_suffix_ids", kind=list, default=None)
        if suffix_ids is not None and not all(type(i) is int for i in suffix_ids):
            raise InputError(
                f"{file}: field tokens.critic_suffix_ids is {reprlib.repr(suffix_ids)}, expected token ids."
            )
        return cls(
            base_checkpoint=get("base_checkpoint", "extraction.base_model", kind=str),
            d_model=d_model,
            layer=count(*LAYER_FIELDS, least=0, **of_the_ar),
            injection_scale=scale,
            marker=Marker(get("tokens.injection_char", kind=str), *marker),
            verbalizer_template=get("prompt_templates.av", "prompt_templates.actor", kind=str),
            reconstructor_template=get("prompt_templates.ar", "prompt_templates.critic", kind=str, **of_the_ar),
            suffix_ids=None if suffix_ids is None else tuple(suffix_ids),
            injections=read_injections(injections),
            **conventions,
            ids=_read_ids(fields),
            earlier_layers=_read_layers(fields),
            maker=maker,
            guessed=tuple(guessed),
            foreign=_foreign_injections(injections),
            provenance=get("provenance", kind=dict, default={}),
        )

    def joined(self, other: "Sidecar", av: Path, ar: Path) -> "Sidecar":
        """The facts of a pair from the sidecars of its AV (self) and its AR (`other`).

        Raises `InputError` naming the field in which the two disagree."""
        short = lambda name: name.rstrip("/").rsplit("/", 1)[-1]
        hashes = [sidecar.provenance.get("base_hash") for sidecar in (self, other)]
        facts = {field: (getattr(self, field), getattr(other, field)) for field in JOINT}
        facts["prompt_ids"] = (self.ids if other.ids else None, other.ids)
        if all(hashes):  # says more than a name, which is another wherever a folder was copied or moved to
            facts["provenance.base_hash"] = tuple(hashes)
        elif self.maker == other.maker == "nla_jax":
            facts["base_checkpoint"] = (short(self.base_checkpoint), short(other.base_checkpoint))
        elif short(self.base_checkpoint) != short(other.base_checkpoint):  # others name what each was trained from
            note(
                f"The AV's sidecar says that it was made from {self.base_checkpoint}, the AR's says {other.base_checkpoint}."
            )
        for field, (a, b) in facts.items():
            if a is not None and a != b:
                raise InputError(
                    f"{av} and {ar} are not a pair: {field} is {reprlib.repr(a)} in one and {reprlib.repr(b)} in the other."
                )
        if self.earlier_layers and self.earlier_layers[-1] >= other.layer:
            raise InputError(
                f"{av}: extraction.earlier_layers is {list(self.earlier_layers)}, expected blocks before the layer {other.layer}."
            )
        return dataclasses.replace(
            self,
            layer=other.layer,
            reconstructor_template=other.reconstructor_template,
            suffix_ids=other.suffix_ids if other.suffix_ids is not None else self.suffix_ids,
            special_tokens=other.special_tokens,
            ids=self.ids or other.ids,
            guessed=(
                *[name for name in self.guessed if name != "special_tokens"],
                *[name for name in other.guessed if name == "special_tokens"],
            ),
            provenance=other.provenance | self.provenance,
        )

    def settled(self, said: Conventions, av: Path) -> "Sidecar":
        """The facts with what who loads the pair says of them; what is still a guess is said in a note.

        Raises `InputError` where the sidecar names no injection that is known here, or no scale that it needs."""
        given = {name: value for name, value in vars(said).items() if value is not None}
        guessed = [name for name in self.guessed if name not in given]
        if isinstance(said.injections, Injection):
            given["injections"] = (said.injections,)
        if "injection_scale" in given:
            given["injection_scale"] = read_scale("injection_scale", said.injection_scale, self.d_model)
        if self.ids and (changed := [name for name in ("special_tokens", "thinking") if name in given]):
            raise InputError(f"{av} records the ids of its prompts, which {changed[0]} does not change; leave it out.")
        sidecar = dataclasses.replace(self, guessed=(), **given)
        replaced = any(x.function is replace for x in sidecar.injections or ())
        if sidecar.earlier_layers and sidecar.injection_scale is None and replaced:
            raise InputError(
                f"{av} reads several layers, which enter the prompt at one length; give an injection_scale."
            )
        if sidecar.injections is None:
            named = f"the injection {', '.join(self.foreign)}, which is not" if self.foreign else "no injection that is"
            raise InputError(
                f"{av / FILE} names {named} known here ({', '.join(INJECTIONS)}); pass load_pair "
                f"`conventions`, e.g. Conventions(injections=Injection(add_norm_matched, block=1)) for EasyNLA and "
                f"nanoNLA (`nla`: --injection and --injection-block)."
            )
        if "injection_scale" in guessed and any(x.function is replace for x in sidecar.injections):
            raise InputError(
                f"{av / FILE} names no injection_scale; pass load_pair `conventions=Conventions(injection_scale=…)` "
                f"(`nla`: --injection-scale), the length at which its AV was shown activations (150 for the released "
                f"Qwen2.5-7B), or raw where they are injected as they are."
            )
        if unsure := [name for name in guessed if name != "injection_scale"]:
            facts = ", ".join(f"{name} = {getattr(sidecar, name)}" for name in unsure)
            note(f"{av}: its sidecar does not say {facts}; that is what pairs of {self.maker} do (`Conventions`).")
        return sidecar

    def prompts(self, tokenizer) -> Prompts:
        """The templates with a live tokenizer, checked against it: marker id, its neighbours, the template's suffix.

        Raises `InputError` naming field, expected and found."""
        for name, field, slot in (
            ("av", self.verbalizer_template, "{injection_char}"),
            ("ar", self.reconstructor_template, "{explanation}"),
        ):
            if slot not in field or (name == "ar" and field.count(slot) > 1):
                raise InputError(
                    f"prompt_templates.{name} must contain {slot}{' exactly once' if name == 'ar' else ''}, but it is "
                    f"{reprlib.repr(field)}."
                )
        prompts = Prompts(
            tokenizer,
            self.marker,
            self.verbalizer_template,
            self.reconstructor_template,
            self.special_tokens,
            self.thinking,
            self.reading,
            self.ids,
        )
        if self.ids:
            if drift := prompts.drift():
                note(f"{drift[0].upper()}{drift[1:]}; the ids that the pair was trained with are used.")
            return prompts
        prompts.verbalizer_prompt()
        if self.suffix_ids is not None and (live := tuple(prompts.suffix_ids())) != tuple(self.suffix_ids):
            raise InputError(
                f"The sidecar's tokens.critic_suffix_ids is {list(self.suffix_ids)}, but this tokenizer gives {list(live)}; "
                f"the sidecar belongs to another tokenizer."
            )
        return prompts


def sidecar_file(folder: Path) -> tuple[Path, bool]:
    """The sidecar of a model folder, and whether folders beside each other share it. Raises `InputError` for none."""
    for file, shared in ((folder / FILE, False), (folder.parent / FILE, True)):
        if file.is_file():
            return file, shared
    held = f"; it holds {', '.join(sorted(path.name for path in folder.iterdir())[:8])}" if folder.is_dir() else ""
    raise InputError(f"{folder} has no {FILE}: it is not an NLA model folder{held}.")


def _maker(kind: str, fields: _Fields) -> str:
    """Whose sidecar it is, of `MAKERS`: EasyNLA and nanoNLA copy the dataset's; the reference says neither how
    activations enter nor whether the AR's input has special tokens."""
    if kind == "nla_dataset":
        return "EasyNLA or nanoNLA"
    ours = ("conventions", "extraction.injection_method", "critic.add_special_tokens")
    return "nla_jax" if any(fields.get(name, default=None) is not None for name in ours) else "the reference"


def _conventions(fields: _Fields, maker: str) -> tuple[dict[str, bool | str], list[str]]:
    """The facts of `Conventions` that a sidecar states, else those of its maker; and which ones it does not state.

    Raises `InputError` for a value that there is not."""
    values, guessed = {}, []
    for field, name, kind, known in (
        ("critic.add_special_tokens", "special_tokens", bool, None),
        ("conventions.thinking", "thinking", str, THINKING),
        ("conventions.reading", "reading", str, READINGS),
    ):
        value = fields.get(field, kind=kind, default=None)
        if value is not None and known and value not in known:
            raise InputError(f"{fields.file}: {field} is {value!r:.50}, expected one of {', '.join(known)}.")
        values[name] = getattr(MAKERS[maker], name) if value is None else value
        guessed += [name] * (value is None and maker != "nla_jax")
    return values, guessed


LAYER_FIELDS = (  # the names under which K is written
    "extraction_layer_index",
    "extraction.layer_index",
    "ar.extraction_layer_index",
    "critic.extraction_layer_index",
    "ar.num_hidden_layers",
    "critic.num_hidden_layers",
)
ID_FIELDS = {  # as the sidecar names them
    "av_prefix": "prefix",
    "av_suffix": "suffix",
    "av_slots": "slots",
    "av_end": "end",
    "ar_prefix": "text_prefix",
    "ar_suffix": "text_suffix",
}


def _read_layers(fields: _Fields) -> tuple[int, ...]:
    """The earlier layers. Raises `InputError` where they are no numbers of blocks in ascending order."""
    found = fields.get("extraction.earlier_layers", kind=list, default=[])
    if not all(type(i) is int and i >= 0 for i in found) or found != sorted(set(found)):
        raise InputError(
            f"{fields.file}: extraction.earlier_layers is {reprlib.repr(found)}, expected numbers of blocks, ascending."
        )
    return tuple(found)


def _read_ids(fields: _Fields) -> PromptIds | None:
    """The recorded ids of the prompts. Raises `InputError` where they are damaged."""
    if fields.get("prompt_ids", kind=dict, default=None) is None:
        return None
    values = {}
    for name, field in ID_FIELDS.items():
        value = fields.get(f"prompt_ids.{name}", kind=int if field == "end" else list)
        ids = [value] if field == "end" else value
        if not all(type(i) is int and i >= 0 for i in ids):
            raise InputError(f"{fields.file}: prompt_ids.{name} is {reprlib.repr(value)}, expected token ids.")
        values[field] = value if field == "end" else tuple(value)
    ids = PromptIds(**values)
    if not ids.slots or max(ids.slots) >= len(ids.suffix):
        raise InputError(f"{fields.file}: prompt_ids.av_slots is {list(ids.slots)}, no places of prompt_ids.av_suffix.")
    return ids


def with_ids(sidecar: Sidecar, prompts: Prompts) -> Sidecar:
    """The sidecar with the ids of the prompts that are in use, for whoever loads the pair next."""
    return dataclasses.replace(sidecar, suffix_ids=tuple(prompts.ids().text_suffix), ids=prompts.ids())


def injection_fields(injection: Injection) -> dict:
    """How a sidecar names an injection."""
    names = {function: name for name, function in INJECTIONS.items()}
    function = getattr(injection.function, "function", injection.function)  # of a `UserFunction`
    method = names.get(function, f"{function.__module__}:{function.__qualname__}")
    return {"injection_method": method, "injection_block": injection.block}


def _foreign_injections(found: list) -> tuple[str, ...]:
    """What a sidecar calls the injections that are not known here, as `--injection` takes them."""
    named = [x for x in found if isinstance(x, dict) and x.get("injection_method") not in (None, *INJECTIONS)]
    return tuple(f"{x['injection_method']!s:.60} behind block {x.get('injection_block', -1)}" for x in named)


def read_injections(found: list) -> tuple[Injection, ...] | None:
    """The injections that a sidecar names; None where one of them is not known here."""
    known = [x for x in found if isinstance(x, dict) and x.get("injection_method") in INJECTIONS]
    if len(known) < len(found):
        return None
    return tuple(Injection(INJECTIONS[x["injection_method"]], x.get("injection_block", -1)) for x in known)


def read_yaml(file: Path, missing: str) -> dict:
    """A YAML mapping of plain values. Raises `InputError` (`missing` where there is no file)."""
    if not file.is_file():
        raise InputError(missing)
    if file.stat().st_size > LARGEST:
        raise InputError(f"{file} has {file.stat().st_size} bytes, expected at most {LARGEST}; it is no sidecar.")
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{file} is not plain YAML ({first_line(error)}).") from None
    if not isinstance(content, dict):
        raise InputError(f"{file} holds {reprlib.repr(content)}, expected fields and values.")
    return content


def read_scale(name: str, value, d_model: int) -> float | None:
    """A scale as the reference reads it: null, "raw" and "none" mean none; "sqrt_d_model"; a number, also in quotes."""
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            value = float(value)
    if value in (None, "raw", "none"):
        return None
    if value == "sqrt_d_model":
        return d_model**0.5
    if is_finite(value) and value > 0:
        return float(value)
    raise InputError(f"{name} is {reprlib.repr(value)}, expected a positive number, 'sqrt_d_model' or null.")
