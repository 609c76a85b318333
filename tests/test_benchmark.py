"""`nla benchmark`: FLOPs against XLA's count, every program at a tiny shape, and what it says of wrong input."""

import argparse
import dataclasses
import json
import math
import sys

import flax.linen as nn
import jax
import numpy as np
import pytest
from conftest import one_sentence

from nla_jax.autoencoder import residual
from nla_jax.cli import main
from nla_jax.data.batches import TextBatch
from nla_jax.losses import reconstructor_loss, token_loss, verbalizer_loss
from nla_jax.models.families import FAMILIES
from nla_jax.models.lora import Lora
from nla_jax.models.transformer import Transformer, abstract_params
from nla_jax.runtime.errors import InputError
from nla_jax.sampling import rollout
from nla_jax.tools import flops
from nla_jax.tools.benchmark import measure
from nla_jax.tools.benchmark.programs import count
from nla_jax.tools.benchmark.settings import PROGRAMS as VERBS
from nla_jax.tools.benchmark.settings import Settings, add_arguments

TINY = {
    "vocab": 320, "width": 32, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 8, "mlp_width": 48, "ar_blocks": 1,
    "prefix": 6, "suffix": 3, "response": 4, "ar_prefix": 2, "ar_suffix": 3, "activations": 4, "group": 2, "batch": 4,
    "sft_response": 5, "document": 16, "steps": 2, "peak_tflops": 0.1, "bandwidth_gbs": 10,
}  # fmt: skip
# One wide layer: norms, softmax and rope, which the formulas leave out, are a small part of what XLA counts.
WIDE = Settings(
    "rl", vocab=1500, width=192, layers=1, heads=6, kv_heads=3, head_dim=32, mlp_width=640, ar_blocks=1, prefix=11,
    suffix=5, response=8, activations=3, group=4, batch=5, sft_response=8, remat="none",
)  # fmt: skip


def run(capsys, program: str, **flags) -> dict:
    """The JSON of one benchmark."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    words = [f"--{name.replace('_', '-')}={value}" for name, value in (TINY | flags).items()]
    measure.run(parser.parse_args([program, *words]))
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert f"{program} on" in err and "peak memory" in err
    for name in report["seconds"]["phases"]:
        assert f"  {name} " in err
    return report


def numbers(tree):
    if isinstance(tree, dict):
        for value in tree.values():
            yield from numbers(value)
    elif isinstance(tree, (int, float)):
        yield tree


PROGRAMS = {
    "rl": ("rollout", "host", "train"),
    "rollout": ("relayout", "rollout"),
    "sft_av": ("host", "train"),
    "sft_ar": ("host", "train"),
    "extract": ("host", "forward"),
    "load": ("load",),
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_program_gives_finite_figures(capsys, program):
    report = run(capsys, program)
    assert tuple(report["seconds"]["phases"]) == PROGRAMS[program] and tuple(PROGRAMS) == VERBS
    assert all(math.isfinite(x) and x >= 0 for x in numbers(report))
    assert report["samples_per_second"] > 0 and report["peak_memory_bytes"] > 0 and report["compile_seconds"] > 0
    assert report["programs_compiled_while_timed"] == 0
    assert set(report["bound"]) == set(PROGRAMS[program])
    decodes = program in ("rl", "rollout")
    assert ("decode" in report) == decodes
    if decodes:
        assert report["decode"]["steps"] == TINY["response"] - 1


def test_phases_add_up(capsys):
    """At a shape whose step is long enough to time."""
    report = run(capsys, "rl", width=128, mlp_width=512, layers=2, response=24, prefix=40, group=8, rollout_chunks=2)
    assert 0 <= report["unaccounted"] < 0.05
    assert report["decode"]["steps"] == 2 * 23 and report["decode"]["rows"] == 16
    assert report["decode"]["seconds_per_step"] > 0 and report["decode"]["bandwidth_fraction"] > 0


@pytest.mark.parametrize(
    "flags",
    [
        {"av_lora": 2, "ar_lora": 3, "dtype": "bfloat16", "remat": "nothing_saveable", "micro_batches": 2, "kl": 0},
        {"av_lora": 2, "fsdp": 2, "tensor": 2, "rollout_chunks": 2},
    ],
    ids=["both adapters", "AV adapter on a mesh"],
)
def test_rl_with_adapters_and_on_a_mesh(capsys, flags):
    report = run(capsys, "rl", **flags)
    assert all(math.isfinite(x) for x in numbers(report))
    assert report["device"]["count"] == flags.get("fsdp", 1) * flags.get("tensor", 1)


def test_presets_fill_what_is_not_given():
    s = Settings.read({"program": "rl", "preset": "qwen2.5-7b", "layers": "3", "ar_blocks": "2", "av_lora": "16"})
    assert (s.width, s.layers, s.ar_blocks, s.av_lora, s.dtype) == (3584, 3, 2, 16, "bfloat16")
    whole = Settings.read({"program": "rl", "preset": "qwen2.5-7b"})
    trained = nn.unbox(abstract_params(whole.config))
    assert 7.6e9 < count(trained) < 7.7e9
    matrices = whole.layers * flops.block_params(whole.config) + 2 * whole.vocab * whole.width
    assert abs(matrices / count(trained) - 1) < 1e-3


# FLOPs


def xla_flops(function, *args) -> float:
    """XLA's count for a compiled program; it counts a loop's body once."""
    return jax.jit(function).lower(*args).compile().cost_analysis()["flops"]


def near(counted: float, formula: float) -> None:
    assert abs(counted / formula - 1) < 0.04, (counted, formula)


def ones(boxed) -> dict:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), nn.unbox(boxed))


def unseen(s: Settings, *lengths: tuple[int, int]) -> float:
    """FLOPs of the masked half of the score matrices, which the plain path computes: rows × tokens a row."""
    c = s.config
    return 4 * c.heads * c.head_dim * c.layers * sum(rows * t * (t - 1) / 2 for rows, t in lengths)


def unused(s: Settings, prefix: int) -> float:
    """FLOPs of a forward pass that end in the prefix's last residual stream, which nothing reads: XLA leaves them out."""
    c = s.config
    matrices = flops.block_params(c) - 2 * c.width * c.kv_heads * c.head_dim
    return prefix * 2 * (matrices + c.heads * c.head_dim * prefix * 2)


def first_layer(s: Settings, tokens: int) -> float:
    """FLOPs of the gradients of q, k and v's input in the first layer, which no adapter's gradient needs."""
    return 2 * tokens * s.width * (s.heads + 2 * s.kv_heads) * s.head_dim


def text_batch(s: Settings, length: int) -> TextBatch:
    return TextBatch(
        np.zeros((s.batch, length), np.int32),
        np.full(s.batch, length, np.int32),
        np.ones((s.batch, s.width), np.float32),
    )


def test_forward_flops():
    c = WIDE.config
    tokens = np.zeros((4, 16), np.int32)
    counted = xla_flops(lambda p: residual(Transformer(c), p, tokens), ones(abstract_params(c, truncated=True)))
    near(counted, flops.blocks(c, [(4, 16, 0)]).forward + unseen(WIDE, (4, 16)))


@pytest.mark.parametrize("rank", [0, 16])
def test_verbalizer_training_flops(rank):
    s = dataclasses.replace(WIDE, av_lora=rank)
    model, t = s.verbalizer(), s.sft_response
    loss = verbalizer_loss(model)
    counted = xla_flops(
        jax.grad(lambda p, base: loss(p, text_batch(s, t), base)[0]), ones(model.abstract_params()),
        ones(abstract_params(s.config)),
    )  # fmt: skip
    expected = flops.verbalizer_flops(model, s.batch, 1, t)
    masked = 3 * unseen(s, (1, s.prefix), (s.batch, s.suffix), (s.batch, t - 1)) - (2 if rank else 3) * unused(
        s, s.prefix
    )
    masked -= first_layer(s, s.prefix + s.batch * (s.suffix + t - 1)) if rank else 0
    again = flops.head(s.config, s.batch * t).forward  # the logits, which the backward pass computes once more
    near(counted, expected.training + masked + again)


@pytest.mark.parametrize("rank", [0, 16])
def test_reconstructor_training_flops(rank):
    s = dataclasses.replace(WIDE, ar_lora=rank)
    model, length = s.reconstructor(), s.ar_prefix + s.sft_response + s.ar_suffix
    loss = reconstructor_loss(model)
    counted = xla_flops(
        jax.grad(lambda p, base: loss(p, text_batch(s, length), base)[0]), ones(model.abstract_params()),
        ones(abstract_params(s.config)),
    )  # fmt: skip
    expected = flops.reconstructor_flops(model, s.batch, length)
    rest = length - s.ar_prefix
    masked = 3 * unseen(s, (1, s.ar_prefix), (s.batch, rest))  # here XLA keeps what ends in the prefix's last state
    masked -= first_layer(s, s.ar_prefix + s.batch * rest) if rank else 0
    near(counted, expected.training + masked)


def test_policy_forward_flops():
    model, rows = WIDE.verbalizer(), WIDE.activations * WIDE.group
    vectors, responses = np.ones((WIDE.activations, WIDE.width), np.float32), np.zeros((rows, WIDE.response), np.int32)

    def forward(params):
        hidden = model.read_responses(params, vectors, responses)
        return token_loss(model.model, params, hidden, responses, lambda tokens: tokens.logprob)

    expected = flops.verbalizer_flops(model, WIDE.activations, WIDE.group, WIDE.response).forward
    masked = unseen(WIDE, (1, WIDE.prefix), (WIDE.activations, WIDE.suffix), (rows, WIDE.response - 1)) - unused(
        WIDE, WIDE.prefix
    )
    near(xla_flops(forward, ones(model.abstract_params())), expected + masked)


def test_rollout_flops():
    """With two response tokens the loop runs once, as XLA counts it."""
    s = dataclasses.replace(WIDE, response=2)
    model, vectors = s.verbalizer(), np.ones((s.activations, s.width), np.float32)
    counted = xla_flops(
        lambda p: rollout(model, p, vectors, jax.random.key(0), group=s.group, max_new_tokens=2),
        ones(model.abstract_params()),
    )
    expected = flops.verbalizer_flops(model, s.activations, s.group, 2).forward
    near(counted, expected + unseen(s, (1, s.prefix), (s.activations, s.suffix)) - unused(s, s.prefix))


def test_decode_bytes_are_those_of_the_arrays():
    s = dataclasses.replace(WIDE, layers=3, av_lora=4)
    params = ones(abstract_params(s.config))
    adapter = ones(s.verbalizer().lora.abstract_params(s.config))
    matrices = [x for path, x in jax.tree_util.tree_leaves_with_path(params["blocks"]) if path[-1].key == "kernel"]
    expected = 4 * (count((matrices, adapter)) + s.vocab * s.width)
    cache = 2 * 4 * s.layers * s.kv_heads * s.head_dim
    positions = s.prefix + s.activations * (s.suffix + s.group * s.response / 2)
    found = flops.decode_bytes(s.verbalizer(), s.activations, s.group, s.response, copies=2)
    assert found == {"weights": 2 * expected, "cache": cache * positions}


def test_visible_pairs():
    """Against the mask itself, with and without a window."""
    for window in (None, 1, 5, 100):
        query, key = np.arange(3, 12)[:, None], np.arange(12)
        mask = (key <= query) & (True if window is None else query - key < window)
        assert flops.visible_pairs(9, 3, window) == mask.sum()


def test_an_adapter_costs_what_it_stands_beside():
    lora = Lora(4, targets=("q", "down"))
    config = dataclasses.replace(WIDE, layers=3).config
    assert 3 * flops.adapter_params(config, lora) == count(ones(lora.abstract_params(config)))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_measured(capsys, family):
    """With its defaults: windows, soft caps, norms. What the model holds is what its family's entry says."""
    report = run(capsys, "sft_ar", family=family, steps=1)
    assert all(math.isfinite(x) and x >= 0 for x in numbers(report))
    config = Settings.read({"program": "sft_ar"} | TINY | {"family": family}).config
    assert (config.family, config.width, config.head_dim, config.kv_heads) == (family, 32, 8, 2)
    assert config.qk_norm == (family in ("qwen3", "gemma3_text")) and bool(config.post_norms) == ("gemma" in family)


# Input


@pytest.mark.parametrize(
    "flags, said",
    [
        ({"program": "rlx"}, "rollout"),
        ({"width": "many"}, "--width"),
        ({"width": "0"}, "--width"),
        ({"kl": "nan"}, "--kl"),
        ({"dtype": "float8"}, "--dtype"),
        ({"remat": "everything"}, "--remat"),
        ({"family": "gpt2"}, "--family"),
        ({"preset": "70b"}, "--preset"),
        ({"kv_heads": "3"}, "--kv-heads"),
        ({"micro_batches": "3"}, "--micro-batches"),
        ({"rollout_chunks": "5"}, "--rollout-chunks"),
        ({"ar_blocks": "9"}, "--ar-blocks"),
        ({"response": "1"}, "--response"),
        ({"head_dim": "7"}, "--head-dim"),
        ({"fsdp": "64"}, "devices"),
        ({"tensor": "4"}, "does not divide"),
    ],
)
def test_wrong_flags_are_one_sentence(flags, said):
    with pytest.raises(InputError, match=said) as error:
        measure.run(argparse.Namespace(**{"program": "rollout"} | TINY | flags))
    one_sentence(error)


@pytest.mark.parametrize("flag", ["--width=many", "--widht=3"])
def test_the_command_says_what_is_wrong(capsys, flag):
    assert main(["benchmark", "rl", flag]) == 1
    err = capsys.readouterr().err
    assert flag.split("=")[0] in err and err.count("\n") == 1


def test_out_of_memory_is_one_sentence():
    with pytest.raises(InputError, match="ran out of memory") as error:
        measure.run(argparse.Namespace(**TINY | {"program": "rollout", "vocab": 2**30, "width": 2**17}))
    one_sentence(error)


def test_interactive_runs_a_step_a_line(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", iter(["\n", "\n"]))
    measure.run(argparse.Namespace(**TINY | {"program": "sft_av", "interactive": True}))
    ready, *steps = map(json.loads, capsys.readouterr().out.splitlines())
    assert ready["ready"] and ready["compile_seconds"] > 0 and len(steps) == 2
    for step in steps:
        assert step.keys() == {"seconds", "phases", "samples_per_second", "peak_memory_bytes", "metrics"}
        assert sum(step["phases"].values()) <= step["seconds"]
