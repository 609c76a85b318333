"""The command line of `nla benchmark`: shapes, and the models that they describe."""

import argparse
import dataclasses
import functools

import numpy as np

from nla_jax.autoencoder import Reconstructor, Verbalizer
from nla_jax.io.folders import model_config
from nla_jax.models.families import FAMILIES
from nla_jax.models.kernels import PLATFORMS, with_kernel
from nla_jax.models.lora import Lora
from nla_jax.models.transformer import Transformer, TransformerConfig
from nla_jax.runtime.errors import InputError

PROGRAMS = ("rl", "rollout", "sft_av", "sft_ar", "extract", "load")
DTYPES = ("float32", "bfloat16")
REMAT = ("none", "nothing_saveable", "dots_saveable", "dots_with_no_batch_dims_saveable", "everything_saveable")
PRESETS = {
    "cpu": {},
    "qwen2.5-7b": dict(
        vocab=152_064, width=3584, layers=28, heads=28, kv_heads=4, head_dim=128, mlp_width=18_944, untied_head=True,
        ar_blocks=21, prefix=111, suffix=14, response=150, activations=64, group=8, dtype="bfloat16",
        remat="nothing_saveable",
    ),
}  # fmt: skip


def _flag(default, text: str):
    return dataclasses.field(default=default, metadata={"help": text})


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything that the command line sets; one flag a field."""

    program: str
    family: str = _flag("qwen2", f"model family: {', '.join(FAMILIES)}")
    vocab: int = _flag(4096, "vocabulary")
    width: int = _flag(256, "width of the residual stream")
    layers: int = _flag(6, "blocks of the AV")
    heads: int = _flag(8, "query heads")
    kv_heads: int = _flag(2, "key/value heads")
    head_dim: int = _flag(32, "dimensions of a head")
    mlp_width: int = _flag(704, "width of the MLP")
    untied_head: bool = _flag(False, "output head with weights of its own")
    ar_blocks: int = _flag(5, "blocks of the AR and of the subject")
    prefix: int = _flag(100, "tokens of the AV's prompt before the marker")
    suffix: int = _flag(25, "marker and the tokens behind it, up to the response")
    response: int = _flag(64, "tokens of each sampled response (exactly: the end token never comes)")
    ar_prefix: int = _flag(8, "tokens of the AR's template before the text")
    ar_suffix: int = _flag(5, "tokens of the AR's template behind the text")
    activations: int = _flag(8, "activations of an RL step")
    group: int = _flag(8, "samples of each activation")
    kl: float = _flag(0.01, "coefficient of the KL; 0 leaves its forward pass out")
    batch: int = _flag(64, "rows of a batch of sft_av, sft_ar, extract")
    sft_response: int = _flag(122, "tokens of a label in sft_av and sft_ar")
    document: int = _flag(512, "tokens of a document in extract")
    av_lora: int = _flag(0, "LoRA rank of the AV; 0 trains it whole")
    ar_lora: int = _flag(0, "LoRA rank of the AR; 0 trains it whole")
    dtype: str = _flag("float32", f"of compute and frozen weights: {', '.join(DTYPES)}")
    remat: str = _flag(
        "dots_with_no_batch_dims_saveable", f"what a block keeps for its backward pass: {', '.join(REMAT)}"
    )
    attention: str = _flag("xla", f"who computes it: xla, {', '.join(PLATFORMS)}")
    micro_batches: int = _flag(1, "parts of an RL batch whose gradients are summed")
    rollout_chunks: int = _flag(1, "parts in which a batch is sampled: at the same time on one CPU, else in turn")
    data: int = _flag(1, "mesh axis: copies of the model")
    fsdp: int = _flag(1, "mesh axis: weights cut by their width")
    tensor: int = _flag(1, "mesh axis: weights cut by heads, MLP and vocabulary")
    steps: int = _flag(5, "timed steps")
    warmup: int = _flag(1, "steps before them")
    peak_tflops: float = _flag(0.0, "peak of one device (0: measured by a large matrix product)")
    bandwidth_gbs: float = _flag(0.0, "memory bandwidth of one device (0: measured by adding to a large array)")
    seed: int = _flag(0, "of weights and tokens")
    interactive: bool = _flag(False, "warm up, print a line, then run one step for each line on standard input")

    @classmethod
    def read(cls, given: dict) -> "Settings":
        """Settings from flags as strings, over those of the preset, over the defaults; checked.

        Raises `InputError` naming the flag that is wrong."""
        preset = given.get("preset", "cpu")
        _one_of("--preset", preset, PRESETS)
        _one_of("What to measure", given["program"], PROGRAMS)
        values = {"program": given["program"]} | PRESETS[preset]
        for field in dataclasses.fields(cls)[1:]:
            if field.name not in given:
                continue
            try:
                values[field.name] = type(field.default)(given[field.name])
            except ValueError:
                kind = {int: "a whole number", float: "a number"}[type(field.default)]
                raise InputError(f"{_name(field.name)} must be {kind}, found {given[field.name]!r}.") from None
        settings = cls(**values)
        settings._check()
        return settings

    def _check(self) -> None:
        for name, choices in (("family", FAMILIES), ("dtype", DTYPES), ("remat", REMAT)):
            _one_of(_name(name), getattr(self, name), choices)
        zero = ("av_lora", "ar_lora", "kl", "peak_tflops", "bandwidth_gbs", "seed", "ar_prefix", "ar_suffix")
        for field in dataclasses.fields(self)[1:]:
            value, least = getattr(self, field.name), 2 if field.name == "response" else field.name not in zero
            if not isinstance(value, (str, bool)) and not least <= value < float("inf"):
                raise InputError(f"{_name(field.name)} must be at least {int(least)}, found {value}.")
        for whole, part in (("heads", "kv_heads"), ("activations", "micro_batches"), ("activations", "rollout_chunks")):
            if getattr(self, whole) % getattr(self, part):
                raise InputError(
                    f"{_name(part)} {getattr(self, part)} must divide {_name(whole)} {getattr(self, whole)}."
                )
        if self.ar_blocks > self.layers:
            raise InputError(f"--ar-blocks {self.ar_blocks} are more than --layers {self.layers}.")
        if self.head_dim % 2:
            raise InputError(f"--head-dim {self.head_dim} must be even.")

    @functools.cached_property
    def config(self) -> TransformerConfig:
        """The model; what no flag says (rope, windows, soft caps) is its family's default in `transformers`."""
        architecture = dict(
            model_type=self.family, vocab_size=self.vocab, hidden_size=self.width, num_hidden_layers=self.layers,
            num_attention_heads=self.heads, num_key_value_heads=self.kv_heads, head_dim=self.head_dim,
            intermediate_size=self.mlp_width, tie_word_embeddings=not self.untied_head,
        )  # fmt: skip
        config = model_config(architecture, f"A {self.family} of these sizes", self.dtype)
        config = with_kernel(config, self.attention)
        return dataclasses.replace(config, remat=None if self.remat == "none" else self.remat)

    @property
    def devices(self) -> int:
        return self.data * self.fsdp * self.tensor

    def verbalizer(self) -> Verbalizer:
        prompt = np.random.default_rng(self.seed).integers(0, self.vocab, self.prefix + self.suffix).tolist()
        return Verbalizer(
            Transformer(self.config), tuple(prompt[: self.prefix]), tuple(prompt[self.prefix :]), end=-1,
            injection_scale=10.0, lora=Lora(self.av_lora) if self.av_lora else None,
        )  # fmt: skip

    def reconstructor(self) -> Reconstructor:
        model = Transformer(self.config.truncated(self.ar_blocks))
        return Reconstructor(model, (0,) * self.ar_prefix, Lora(self.ar_lora) if self.ar_lora else None)


def _name(field: str) -> str:
    return "--" + field.replace("_", "-")


def _one_of(what: str, value: str, choices) -> None:
    if value not in choices:
        raise InputError(f"{what} must be one of {', '.join(choices)}; found {value!r}.")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `nla benchmark`; what is not given stays out of the namespace, so that a preset can fill it."""
    parser.add_argument("program", metavar="{" + ",".join(PROGRAMS) + "}", help="what to measure")
    parser.add_argument("--preset", default="cpu", help=f"shapes to start from: {', '.join(PRESETS)}")
    for field in dataclasses.fields(Settings)[1:]:
        more = {"action": argparse.BooleanOptionalAction} if isinstance(field.default, bool) else {"metavar": "X"}
        text = f"{field.metadata['help']} (default {field.default})"
        parser.add_argument(_name(field.name), default=argparse.SUPPRESS, help=text, **more)
