"""The settings of a study: their meaning, their limits, and which of them may change when a run is resumed.

Users write `ConfigDict` files (configs/); `read` turns what such a file gives into a `Config`, checks every value, and
fills in what the file leaves out. `nla <verb> --config.section.field=value` overrides any field.
"""

import dataclasses
import difflib
import sys
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from nla_jax.runtime.errors import InputError


def setting(default: Any, meaning: str, *, least=None, most=None, choices=(), free: bool = False):
    """A field of a section. `least`, `most`: limits of a number. `choices`: the values allowed.

    `free`: the field says where or how a result is computed and how often it is looked at, not what it is. It may
    differ when a run is resumed."""
    facts = {"meaning": meaning, "least": least, "most": most, "choices": choices, "free": free}
    if isinstance(default, (dict, list)) or dataclasses.is_dataclass(default):
        return dataclasses.field(default_factory=lambda: default, metadata=facts)
    return dataclasses.field(default=default, metadata=facts)


def section(kind: type, meaning: str, free: bool = False):
    """A field that is a section of its own."""
    return dataclasses.field(default_factory=kind, metadata={"meaning": meaning, "free": free})


class Section:
    """What all sections can do."""

    def to_dict(self) -> dict:
        """Nested plain dictionaries."""
        return dataclasses.asdict(self)


FIDELITY = (
    "after_rl warm_start gold no_injection empty shuffled temperature_1 gold_through_warm frozen_critic meannorm prefixes "
    "per_activation length similarity extraction"
).split()
HIDDEN_CODES = ("rewrites", "warm_rewrites", "retention", "warm_retention", "surface_form")
PROBES = (
    *(f"nla_jax.probes.fidelity:{name}" for name in FIDELITY),
    *(f"nla_jax.probes.baselines:{name}" for name in ("tokens", "beyond_tokens", "by_place")),
    *(f"nla_jax.probes.claims:{name}" for name in ("truth", "claimed")),
    *(f"nla_jax.probes.hidden_codes:{name}" for name in HIDDEN_CODES),
    *(f"nla_jax.probes.retrieval:{name}" for name in ("hits", "reciprocal_rank", "position_match")),
    "nla_jax.probes.classification:next_kind",
)
PARAPHRASES = "paraphrases warm_paraphrases paraphrase_retention warm_paraphrase_retention paraphrase_gap".split()
JUDGED = (  # those that ask a language model
    *(f"nla_jax.probes.paraphrases:{name}" for name in PARAPHRASES),
    *(f"nla_jax.probes.judged_claims:{name}" for name in ("judged_truth", "warm_judged_truth", "judged_ablation")),
    *(f"nla_jax.probes.judged_matches:{name}" for name in ("judged_source", "judged_position")),
    *(f"nla_jax.probes.writing:{name}" for name in ("writing", "warm_writing")),
)
CHEAP = "fidelity:after_rl fidelity:frozen_critic hidden_codes:surface_form claims:true_after_rl claims:made_after_rl"
IN_TRAINING = tuple(f"nla_jax.probes.{name}" for name in (*CHEAP.split(), "retrieval:hits"))  # rl.probes
SPLITS = ("av_sft", "ar_sft", "rl", "heldout")  # the parts of a corpus, by document
ADAMW = {"function": "nla_jax.objective:adamw", "lr": 1e-5}


@dataclasses.dataclass(frozen=True)
class Compute(Section):
    dtype: str = setting(
        "float32",
        "compute dtype, and that of frozen weights; auto: bfloat16, on a CPU only where it multiplies that faster",
        choices=("float32", "bfloat16", "float16", "auto"),
    )
    remat: str = setting(
        "",
        "what blocks keep for their backward pass ('' all): a policy of jax.checkpoint_policies",
        free=True,
        choices=("", "nothing_saveable", "dots_saveable", "dots_with_no_batch_dims_saveable", "everything_saveable"),
    )
    attention: str = setting("xla", "the attention kernel", choices=("xla", "cudnn", "splash"), free=True)
    optimize: bool = setting(
        True,
        "whether XLA optimizes programs; False compiles them several times faster, and they run slower: for tiny runs",
        free=True,
    )


@dataclasses.dataclass(frozen=True)
class Mesh(Section):
    data: int = setting(1, "copies of the model; -1: all devices that are left", least=-1)
    fsdp: int = setting(1, "parts into which weights are cut along their width", least=-1)
    tensor: int = setting(1, "parts into which heads, MLP and vocabulary are cut for decoding", least=-1)


@dataclasses.dataclass(frozen=True)
class Checkpoints(Section):
    keep: int = setting(2, "the newest checkpoints that are kept", least=1)
    keep_every: int = setting(0, "checkpoints of steps that this divides are kept too (0: none)", least=0)


@dataclasses.dataclass(frozen=True)
class Watchdog(Section):
    window: int = setting(20, "training stops after so many steps in a row outside the limits", least=1)
    stall_minutes: float = setting(10.0, "a step that takes longer is reported", least=1e-3)
    min_extraction_rate: float = setting(0.25, "least share of responses that hold an explanation", least=0, most=1)
    min_entropy: float = setting(0.02, "least entropy of the AV, nats per token", least=0)
    min_length: float = setting(2.0, "least mean length of responses, tokens", least=0)
    max_length_share: float = setting(0.98, "largest mean length, as a share of prompts.max_new_tokens", least=0)
    max_identical_texts: float = setting(0.9, "largest share of texts that equal another of their group", least=0)
    max_rise: dict = setting({}, "tripwires: by how much a figure of rl.probes may rise from its first value")
    max_fall: dict = setting({}, "tripwires: by how much one may fall, such as {'true_after_rl': 0.1}")
    probe_rounds: int = setting(2, "training stops after so many rounds of probes in a row beyond a tripwire", least=1)


@dataclasses.dataclass(frozen=True)
class Log(Section):
    texts: int = setting(8, "sampled texts of each RL step that are logged with their scores", least=0, free=True)
    wandb: str = setting("", "Weights & Biases project to log to ('' none)", free=True)


@dataclasses.dataclass(frozen=True)
class Corpus(Section):
    source: str = setting("python_docs", "python_docs, tfds:NAME, a file or folder, or package.module:function")
    text_field: str = setting("text", "name of the text in rows")
    id_field: str = setting("id", "name of the id in rows")
    split: str = setting("train", "split of a TFDS dataset")
    min_chars: int = setting(0, "shorter documents are left out", least=0)
    max_documents: int = setting(10**9, "only the first documents", least=1)


@dataclasses.dataclass(frozen=True)
class Subject(Section):
    path: str = setting("", "folder or hub id of the subject; '' is the one that `pretrain` writes")
    layer: int = setting(2, "activations are read after this block, counted from 0", least=0)
    earlier_layers: tuple[int, ...] = setting((), "blocks before it that are read too, each in a slot of its own")
    architecture: dict = setting({}, "content of its config.json, for `nla plan` and `nla benchmark` without the model")

    @property
    def layers(self) -> tuple[int, ...]:
        """After which blocks activations are read, ascending."""
        return (*self.earlier_layers, self.layer)


@dataclasses.dataclass(frozen=True)
class Pretrain(Section):
    init_from: str = setting("shipped", "a folder, 'shipped' (comes with the package), or '' (random weights)")
    steps: int = setting(0, "training steps", least=0)
    batch: int = setting(32, "windows of text per step", least=1)
    length: int = setting(256, "tokens of a window", least=2)
    checkpoint_every: int = setting(200, "steps between checkpoints", least=1, free=True)
    dtype: str = setting("bfloat16", "dtype in which the subject is saved", choices=("float32", "bfloat16", "float16"))
    vocab_size: int = setting(2048, "entries of the tokenizer that is trained", least=300)
    model: dict = setting({}, "shapes of a subject from scratch (fields of TransformerConfig)")
    optimizer: dict = setting(ADAMW, "`function`, and its settings")


@dataclasses.dataclass(frozen=True)
class Source(Section):
    av_sft: str = setting("", "Parquet file for the AV's warm start")
    ar_sft: str = setting("", "Parquet file for the AR's warm start")
    rl: str = setting("", "Parquet file for joint training")
    heldout: str = setting("", "Parquet file for evaluation ('': split off `rl` by document)")


@dataclasses.dataclass(frozen=True)
class Extract(Section):
    positions: int = setting(20, "activations sampled from each document", least=1)
    min_position: int = setting(24, "first token, from 0, that may be sampled", least=0)
    max_tokens: int = setting(256, "tokens of a document that are read", least=1)
    shard_documents: int = setting(500, "documents in a file", least=1)
    source: Source = section(Source, "activations that exist already, instead of running the subject")


@dataclasses.dataclass(frozen=True)
class Label(Section):
    labeller: str = setting("nla_jax.labels.extractive:Extractive", "import path of the labeller")
    settings: dict = setting({}, "arguments of the labeller's constructor")
    connection: dict = setting({}, "more of its arguments: how it reaches a model, not what it answers", free=True)
    batch: int = setting(
        0, "texts that the labeller gets at a time (0: as many as it asks for, or 256)", least=0, free=True
    )
    concurrency: int = setting(
        0, "calls of the labeller at a time (0: as many as it asks for, or 1)", least=0, free=True
    )
    max_dropped: float = setting(
        0.05, "largest share of texts that may have no label (refused, cut, …)", least=0, most=1, free=True
    )
    price_in: float = setting(0.0, "price of a million tokens sent, for `nla label --dry-run`", least=0, free=True)
    price_out: float = setting(0.0, "price of a million tokens answered", least=0, free=True)
    splits: tuple[str, ...] = setting(("av_sft", "ar_sft", "heldout"), "which splits get labels")


@dataclasses.dataclass(frozen=True)
class Prompts(Section):
    verbalizer_template: str = setting("", "what the AV is asked, with {injection_char} where the activation enters")
    reconstructor_template: str = setting("", "what the AR reads, with {explanation} where the text stands")
    marker: str = setting("", "the placeholder character; '' finds one that the tokenizer has")
    inject: tuple[str, ...] = setting(
        ("nla_jax.autoencoder:replace",),
        "functions that put activations into the prompt; @BLOCK: after that block (-1: embeddings)",
    )
    injection_scale: float = setting(
        0.0, "length of injected activations; 0: median norm of the training activations", least=0
    )
    max_new_tokens: int = setting(150, "longest response of the AV, in tokens", least=1)


@dataclasses.dataclass(frozen=True)
class LoraSettings(Section):
    rank: int = setting(0, "0 trains the whole model, more an adapter to the subject", least=0)
    alpha: float = setting(16.0, "scale of the adapter", least=0)
    rslora: bool = setting(True, "divide alpha by sqrt(rank), not by rank")
    targets: tuple[str, ...] = setting(("q", "k", "v", "o", "gate", "up", "down"), "which projections")


@dataclasses.dataclass(frozen=True)
class WarmStart(Section):
    batch: int = setting(64, "rows per step", least=2)
    steps: int = setting(1000, "training steps", least=0)
    lora: LoraSettings = section(LoraSettings, "train an adapter")
    optimizer: dict = setting(ADAMW, "`function`, and its settings")


@dataclasses.dataclass(frozen=True)
class Sft(Section):
    checkpoint_every: int = setting(200, "steps between checkpoints", least=1, free=True)
    widths: int = setting(8, "padded lengths of batches, at most; each has a program of its own", least=1, free=True)
    reader: str = setting("nla_jax.objective:whole", "import path: what the AR reads of labels, (texts, rng) -> texts")
    av: WarmStart = section(WarmStart, "the verbalizer")
    ar: WarmStart = section(WarmStart, "the reconstructor")


@dataclasses.dataclass(frozen=True)
class Rl(Section):
    steps: int = setting(1000, "training steps", least=0)
    activations: int = setting(128, "activations per step", least=1)
    group: int = setting(8, "samples of each activation", least=2)
    rollout_chunks: int = setting(1, "parts in which a step samples", least=1, free=True)
    micro_batches: int = setting(1, "parts of a step whose gradients are summed", least=1, free=True)
    temperature: float = setting(1.0, "temperature of sampling, and of the policy that is trained", least=1e-3)
    reward: str = setting("nla_jax.objective:negative_mse", "import path: (Scored) -> [B]")
    advantage: str = setting("nla_jax.objective:group_normalised", "import path: ([A, G]) -> [A, G]")
    reader: str = setting("nla_jax.objective:whole", "import path: what the AR reads, (texts, rng) -> texts")
    features: tuple[str, ...] = setting((), "import paths: (texts, rows) -> {name: [B]}, for the reward")
    truth: bool = setting(False, "measure the share of claims that hold, by the run's labeller: the feature truth")
    subject_kl: bool = setting(False, "measure what the subject makes of reconstructions: the feature subject_kl")
    kl_coefficient: float = setting(0.01, "weight of KL(AV ‖ warm-started AV)", least=0)
    av_optimizer: dict = setting(ADAMW, "`function`, and its settings")
    ar_optimizer: dict = setting(ADAMW, "`function`, and its settings")
    checkpoint_every: int = setting(50, "steps between checkpoints", least=1, free=True)
    heldout_every: int = setting(50, "steps between measurements on held-out rows", least=1, free=True)
    heldout_rows: int = setting(256, "how many held-out rows", least=2)
    heldout_temperature: float = setting(0.0, "temperature of their texts, and of probed ones (0: greedy)", least=0)
    probe_every: int = setting(0, "steps between rounds of probes in training (0: none)", least=0)
    probe_rows: int = setting(256, "rows that a round reads, of documents that are then left out of RL", least=2)
    probes: tuple[str, ...] = setting(IN_TRAINING, "import paths of what a round measures")
    keep_best: dict = setting({}, "weights of a round's figures: the pair with the highest sum is kept")


@dataclasses.dataclass(frozen=True)
class Provider(Section):
    kind: str = setting("", "openai, anthropic, anthropic_batch, local, or an import path; '' asks nobody")
    model: str = setting("", "the model's name, or its folder")
    settings: dict = setting({}, "what else determines its answers, as label.settings")
    connection: dict = setting({}, "how it is reached, as label.connection", free=True)
    concurrency: int = setting(0, "questions at a time (0: as many as the kind asks for)", least=0, free=True)
    rows: int = setting(200, "held-out rows it is asked about, spread evenly", least=2)
    probes: tuple[str, ...] = setting(JUDGED, "import paths of what is measured with it, beside evaluate.probes")
    price_in: float = setting(0.0, "price of a million tokens sent, for `nla probe --dry-run`", least=0, free=True)
    price_out: float = setting(0.0, "price of a million tokens answered", least=0, free=True)


@dataclasses.dataclass(frozen=True)
class Evaluate(Section):
    rows: int = setting(2000, "held-out rows, spread evenly over documents", least=2)
    temperature: float = setting(0.0, "temperature of sampling (0: greedy)", least=0)
    batch: int = setting(128, "rows at a time", least=1)
    examples: int = setting(30, "rows that the report shows", least=0)
    probes: tuple[str, ...] = setting(PROBES, "import paths of what is measured")
    provider: Provider = section(Provider, "a language model that rewrites texts and judges them")


@dataclasses.dataclass(frozen=True)
class Report(Section):
    title: str = setting("", "title of the page")


@dataclasses.dataclass(frozen=True)
class Plan(Section):
    prefix: int = setting(100, "tokens of the AV's prompt before the marker", least=1, most=10**6)
    suffix: int = setting(25, "tokens of the AV's prompt from the marker to the response", least=1, most=10**6)
    text_prefix: int = setting(6, "tokens of the AR's template before the text", least=0, most=10**6)
    text: int = setting(14, "tokens of the AR's template in all", least=1, most=10**6)


@dataclasses.dataclass(frozen=True)
class Config(Section):
    seed: int = setting(0, "seed of everything random", least=0, most=2**32 - 1)
    compute: Compute = section(Compute, "how programs compute")
    mesh: Mesh = section(Mesh, "how many devices, and what they share", free=True)
    checkpoints: Checkpoints = section(Checkpoints, "which checkpoints are kept", free=True)
    watchdog: Watchdog = section(Watchdog, "when training is stopped", free=True)
    log: Log = section(Log, "what training logs", free=True)
    corpus: Corpus = section(Corpus, "the text")
    split: dict = setting(
        {"av_sft": 0.4, "ar_sft": 0.4, "rl": 0.19, "heldout": 0.01}, "shares of the documents, which add up to 1"
    )
    subject: Subject = section(Subject, "the model that is explained")
    pretrain: Pretrain = section(Pretrain, "a small subject from scratch")
    extract: Extract = section(Extract, "where activations are read")
    label: Label = section(Label, "explanations for the warm start")
    prompts: Prompts = section(Prompts, "how AV and AR are asked")
    sft: Sft = section(Sft, "supervised warm start")
    rl: Rl = section(Rl, "joint training")
    evaluate: Evaluate = section(Evaluate, "measurement on held-out documents")
    report: Report = section(Report, "the page")
    plan: Plan = section(Plan, "what only a tokenizer knows, for `nla plan` and `nla benchmark`")

    def __post_init__(self):
        """What no field can say alone."""
        blocks = self.subject.earlier_layers
        if list(blocks) != sorted({*blocks}) or not all(0 <= block < self.subject.layer for block in blocks):
            raise InputError(
                f"subject.earlier_layers is {blocks}; they must be blocks before subject.layer ({self.subject.layer}), "
                f"counted from 0, in ascending order."
            )
        if blocks and (named := [name for name, file in self.extract.source.to_dict().items() if file]):
            raise InputError(
                f"extract.source.{named[0]} names activations of one layer, but subject.earlier_layers is {blocks}; leave out "
                f"one of the two."
            )
        for name in ("micro_batches", "rollout_chunks"):
            if self.rl.activations % getattr(self.rl, name):
                raise InputError(
                    f"rl.{name} is {getattr(self.rl, name)}, which does not divide the rl.activations of a step "
                    f"({self.rl.activations})."
                )
        if absent := sorted(set(SPLITS) - self.split.keys()):
            raise InputError(f"split names no {absent[0]!r}; give the shares of {', '.join(SPLITS)}.")
        for name, share in self.split.items():
            if isinstance(share, bool) or not isinstance(share, (int, float)) or share < 0:
                raise InputError(f"split.{name} is {share!r}, expected a share of the documents from 0 to 1.")
        if abs(sum(self.split.values()) - 1) > 1e-6:
            raise InputError(f"The shares under split add up to {sum(self.split.values()):.6g}; they must add up to 1.")


def read(given: Mapping, source: str) -> Config:
    """The `Config` of nested mappings; `source` names them in messages.

    Raises `InputError` for a name that is no setting, a value of another type or beyond its limits, and values that do
    not go together."""
    try:
        return _read(Config, given, "")
    except InputError as error:
        raise InputError(f"{source}: {error}") from None


def _read(kind: type, given: Mapping, path: str) -> Any:
    fields = {field.name: field for field in dataclasses.fields(kind)}
    if unknown := sorted(given.keys() - fields.keys()):
        near = difflib.get_close_matches(unknown[0], fields, 1)
        raise InputError(f"there is no setting {path}{unknown[0]}{f'; did you mean {path}{near[0]}?' if near else '.'}")
    kinds = typing.get_type_hints(kind)
    return kind(**{name: _checked(fields[name], kinds[name], x, path + name) for name, x in given.items()})


def _checked(field: dataclasses.Field, kind: Any, value: Any, name: str) -> Any:
    """The value of a field in the field's type."""
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, Mapping):
            raise InputError(f"{name} is {value!r}, expected a section with fields.")
        return _read(kind, value, f"{name}.")
    if typing.get_origin(kind) is tuple:
        (of, _) = typing.get_args(kind)
        value = tuple(value) if isinstance(value, list) else (value,) if isinstance(value, of) else value
        good = isinstance(value, tuple) and all(isinstance(x, of) and not isinstance(x, bool) for x in value)
    elif kind is float:
        good = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
        value = float(value) if good else value
    else:
        good = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
    if not good:
        raise InputError(f"{name} is {value!r}, expected {_in_words(kind)}.")
    facts = field.metadata
    if facts["choices"] and value not in facts["choices"]:
        raise InputError(f"{name} is {value!r}; it must be one of {', '.join(facts['choices'])}.")
    if facts["least"] is not None and value < facts["least"]:
        raise InputError(f"{name} is {value}; it must be at least {facts['least']}.")
    if facts["most"] is not None and value > facts["most"]:
        raise InputError(f"{name} is {value}; it must be at most {facts['most']}.")
    if kind is dict:
        _all_finite(value, name)
        return dict(value)
    return value


def _all_finite(tree: Mapping, name: str) -> None:
    """Raises `InputError` for a number of an open mapping that is NaN or infinite."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            _all_finite(value, f"{name}.{key}")
        elif isinstance(value, (int, float)) and not abs(value) <= sys.float_info.max:  # nor is NaN
            raise InputError(f"{name}.{key} is {value!r:.50}, expected a finite number.")


def _in_words(kind: Any) -> str:
    words = {int: "a whole number", float: "a finite number", str: "a text", bool: "True or False", dict: "a mapping"}
    several = {tuple[str, ...]: "a tuple of texts", tuple[int, ...]: "a tuple of whole numbers"}
    return (words | several).get(kind, str(kind))


def settings(kind: type = Config, path: str = "") -> Iterator[tuple[str, dataclasses.Field]]:
    """Every setting with its dotted name, in order."""
    kinds = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(kinds[field.name]):
            yield from settings(kinds[field.name], f"{path}{field.name}.")
        else:
            yield path + field.name, field


def completed(recorded: Mapping) -> dict:
    """Sections of settings that a run has recorded, with the defaults of those that its version did not have yet."""
    found = {name: _copied(section) for name, section in recorded.items()}
    for name, field in settings():
        *path, last = name.split(".")
        section = found
        for part in path:
            section = section.get(part) if isinstance(section, dict) else None
        if isinstance(section, dict) and path and last not in section:
            value = field.default if field.default is not dataclasses.MISSING else field.default_factory()
            section[last] = dict(value) if isinstance(value, Mapping) else value
    return found


def _copied(tree: Any) -> Any:
    return {name: _copied(value) for name, value in tree.items()} if isinstance(tree, Mapping) else tree


def is_free(name: str) -> bool:
    """Whether the setting with this dotted name may differ when a run is resumed."""
    kind, free = Config, False
    for part in name.split("."):
        field = getattr(kind, "__dataclass_fields__", {}).get(part)
        if field is None:
            break
        free, kind = free or field.metadata["free"], typing.get_type_hints(kind)[part]
    return free
