"""`nla benchmark`: FLOPs against XLA's count, every program at a tiny shape, and what it says of wrong input."""

import dataclasses
import functools
import json
import math
import sys
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import pytest
from conftest import one_sentence

from nla_jax.autoencoder import residual
from nla_jax.cli import load_config, main
from nla_jax.data.batches import TextBatch
from nla_jax.losses import TokenLoss, reconstructor_loss, verbalizer_loss
from nla_jax.models.families import FAMILIES
from nla_jax.models.lora import Lora
from nla_jax.models.sharding import make_mesh
from nla_jax.models.transformer import Transformer, TransformerConfig, abstract_params
from nla_jax.runtime.errors import InputError
from nla_jax.sampling import rollout
from nla_jax.study import Study
from nla_jax.subject import subject_config
from nla_jax.tools import flops
from nla_jax.tools.benchmark import measure
from nla_jax.tools.benchmark.measure import Timing
from nla_jax.tools.benchmark.programs import BENCHMARKS, random_arrays
from nla_jax.tools.flops import parameters, work_of

CONFIG = str(Path(__file__).parent.parent / "configs/benchmark.py")
TINY = {
    "subject.architecture.vocab_size": 320,
    "subject.architecture.hidden_size": 32,
    "subject.architecture.num_hidden_layers": 2,
    "subject.architecture.num_attention_heads": 4,
    "subject.architecture.num_key_value_heads": 2,
    "subject.architecture.head_dim": 8,
    "subject.architecture.intermediate_size": 48,
    "subject.layer": 0,
    "plan.prefix": 6,
    "plan.suffix": 3,
    "plan.text_prefix": 2,
    "plan.text": 5,
    "prompts.max_new_tokens": 4,
    "rl.activations": 4,
    "rl.group": 2,
    "sft.av.batch": 4,
    "sft.ar.batch": 4,
    "extract.max_tokens": 16,
}
# One wide layer: norms, softmax and rope, which the formulas leave out, are a small part of what XLA counts.
WIDE = {
    "subject.architecture.vocab_size": 1500,
    "subject.architecture.hidden_size": 192,
    "subject.architecture.num_hidden_layers": 1,
    "subject.architecture.num_attention_heads": 6,
    "subject.architecture.num_key_value_heads": 3,
    "subject.architecture.head_dim": 32,
    "subject.architecture.intermediate_size": 640,
    "subject.layer": 0,
    "plan.prefix": 11,
    "plan.suffix": 5,
    "prompts.max_new_tokens": 8,
    "rl.activations": 3,
    "rl.group": 4,
    "sft.av.batch": 5,
    "sft.ar.batch": 5,
    "compute.remat": "",
}


def words(fields: dict) -> list[str]:
    """Fields of a config as flags."""
    return [f"--config.{name}={value}" for name, value in fields.items()]


def study(fields: dict, config: str = CONFIG) -> Study:
    """The benchmark's study with these fields, on as many devices as its mesh has."""
    config = load_config(config, words(fields))
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    return Study.of_shapes(config, mesh, subject_config(config, mesh))


def run(capsys, program: str, fields: dict | None = None, *flags: str) -> dict:
    """The JSON of one benchmark."""
    timing = ["--steps=2", "--peak-tflops=0.1", "--bandwidth-gbs=10"]
    assert main(["benchmark", program, "--config", CONFIG, *timing, *words(TINY | (fields or {})), *flags]) == 0
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
    assert tuple(report["seconds"]["phases"]) == PROGRAMS[program] and tuple(PROGRAMS) == tuple(BENCHMARKS)
    assert all(math.isfinite(x) and x >= 0 for x in numbers(report))
    assert report["samples_per_second"] > 0 and report["peak_memory_bytes"] > 0 and report["compile_seconds"] > 0
    assert report["programs_compiled_while_timed"] == 0
    assert set(report["bound"]) == set(PROGRAMS[program])
    decodes = program in ("rl", "rollout")
    assert ("decode" in report) == decodes
    if decodes:
        assert report["decode"]["steps"] == TINY["prompts.max_new_tokens"] - 1


def test_phases_add_up(capsys):
    """At a shape whose step is long enough to time."""
    larger = {
        "subject.architecture.hidden_size": 128,
        "subject.architecture.intermediate_size": 512,
        "plan.prefix": 40,
        "prompts.max_new_tokens": 24,
        "rl.group": 8,
        "rl.rollout_chunks": 2,
    }
    report = run(capsys, "rl", larger)
    assert 0 <= report["unaccounted"] < 0.05
    assert report["decode"]["steps"] == 2 * 23 and report["decode"]["rows"] == 16
    assert report["decode"]["seconds_per_step"] > 0 and report["decode"]["bandwidth_fraction"] > 0


@pytest.mark.whole_run
@pytest.mark.parametrize(
    "fields",
    [
        {
            "sft.av.lora.rank": 2,
            "sft.ar.lora.rank": 3,
            "compute.dtype": "bfloat16",
            "compute.remat": "nothing_saveable",
            "rl.micro_batches": 2,
            "rl.kl_coefficient": 0.0,
        },
        {"sft.av.lora.rank": 2, "mesh.fsdp": 2, "mesh.tensor": 2, "rl.rollout_chunks": 2},
    ],
    ids=["both adapters", "AV adapter on a mesh"],
)
def test_rl_with_adapters_and_on_a_mesh(capsys, fields):
    report = run(capsys, "rl", fields)
    assert all(math.isfinite(x) for x in numbers(report))
    assert report["device"]["count"] == fields.get("mesh.fsdp", 1) * fields.get("mesh.tensor", 1)


def test_variants_are_real_models():
    """The shapes of a variant, changed by single fields, and the number of its weights."""
    changed = {"subject.architecture.num_hidden_layers": 3, "subject.layer": 1, "sft.av.lora.rank": 16}
    few = study(changed, f"{CONFIG}:qwen2_5_7b")
    model = few.verbalizer.model.config
    assert (model.width, model.layers, few.reconstructor.model.config.layers) == (3584, 3, 2)
    assert few.verbalizer.lora.rank == 16 and model.dtype == "bfloat16"
    for variant, least, most in (("qwen2_5_7b", 7.6e9, 7.7e9), ("smollm2", 134.4e6, 134.6e6)):
        whole = study({}, f"{CONFIG}:{variant}").verbalizer.model.config
        trained = nn.unbox(abstract_params(whole))
        assert least < parameters(trained) < most
        heads = 1 if whole.tied_head else 2
        matrices = whole.layers * flops.block_params(whole) + heads * whole.vocab_size * whole.width
        assert abs(matrices / parameters(trained) - 1) < 1e-3


def test_random_arrays_are_as_the_program_asks():
    """Shapes, dtypes and places are the program's own; norms scale by about one, other weights are small."""
    state, frozen, _ = study(TINY | {"mesh.fsdp": 2, "compute.dtype": "bfloat16"}).programs()["joint_step"].arguments
    for shapes in (state.models["verbalizer"].params, frozen.reference):
        made = random_arrays(shapes, 0)
        for (path, shape), x in zip(jax.tree_util.tree_leaves_with_path(shapes), jax.tree.leaves(made), strict=True):
            assert (x.shape, x.dtype, x.sharding) == (shape.shape, shape.dtype, shape.sharding)
            x = np.asarray(x, np.float32)
            assert abs(x.mean() - (path[-1].key == "scale")) < 0.02 and 0.005 < x.std() < 0.04


# FLOPs


def xla_flops(function, *args) -> float:
    """XLA's count for a compiled program; it counts a loop's body once."""
    return jax.jit(function).lower(*args).compile().cost_analysis()["flops"]


def near(counted: float, formula: float) -> None:
    assert abs(counted / formula - 1) < 0.04, (counted, formula)


def ones(boxed) -> dict:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), nn.unbox(boxed))


def unseen(c: TransformerConfig, *lengths: tuple[int, int]) -> float:
    """FLOPs of the masked half of the score matrices, which the plain path computes: rows × tokens a row."""
    return 4 * c.heads * c.head_dim * c.layers * sum(rows * t * (t - 1) / 2 for rows, t in lengths)


def unused(c: TransformerConfig, prefix: int) -> float:
    """FLOPs that end in the prefix's last residual stream, which nothing reads: XLA leaves them out."""
    matrices = flops.block_params(c) - 2 * c.width * c.kv_heads * c.head_dim
    return prefix * 2 * (matrices + c.heads * c.head_dim * prefix * 2)


def first_layer(c: TransformerConfig, tokens: int) -> float:
    """FLOPs of the gradients of q, k and v's input in the first layer, which no adapter's gradient needs."""
    return 2 * tokens * c.width * (c.heads + 2 * c.kv_heads) * c.head_dim


@functools.cache
def wide(**ranks: int) -> Study:
    """The study of one wide layer, with adapters of these ranks."""
    return study(WIDE | {f"sft.{name}.lora.rank": rank for name, rank in ranks.items()})


BATCH, PREFIX, SUFFIX, R, A, G = 5, 11, 5, 8, 3, 4  # of `WIDE`


def text_batch(width: int, length: int) -> TextBatch:
    return TextBatch(
        np.zeros((BATCH, length), np.int32), np.full(BATCH, length, np.int32), np.ones((BATCH, width), np.float32)
    )


def test_forward_flops():
    c = wide().verbalizer.model.config
    tokens = np.zeros((4, 16), np.int32)
    counted = xla_flops(lambda p: residual(Transformer(c), p, tokens), ones(abstract_params(c, truncated=True)))
    near(counted, flops.blocks(c, [(4, 16, 0)]).forward + unseen(c, (4, 16)))


@pytest.mark.parametrize("rank", [0, 16])
def test_verbalizer_training_flops(rank):
    s = wide(av=rank)
    model, c = s.verbalizer, s.verbalizer.model.config
    loss = verbalizer_loss(model)
    counted = xla_flops(
        jax.grad(lambda p, base: loss(p, text_batch(c.width, R), base)[0]),
        ones(model.abstract_params()),
        ones(abstract_params(c)),
    )
    expected = flops.verbalizer_flops(model, BATCH, 1, R)
    assert work_of(s)["sft_av"].flops == expected.training
    masked = 3 * unseen(c, (1, PREFIX), (BATCH, SUFFIX), (BATCH, R - 1)) - (2 if rank else 3) * unused(c, PREFIX)
    masked -= first_layer(c, PREFIX + BATCH * (SUFFIX + R - 1)) if rank else 0
    again = flops.head(c, BATCH * R).forward  # the logits, which the backward pass computes once more
    near(counted, expected.training + masked + again)


@pytest.mark.parametrize("rank", [0, 16])
def test_reconstructor_training_flops(rank):
    s = wide(ar=rank)
    model, c, length = s.reconstructor, s.verbalizer.model.config, s.text_width
    loss = reconstructor_loss(model)
    counted = xla_flops(
        jax.grad(lambda p, base: loss(p, text_batch(c.width, length), base)[0]),
        ones(model.abstract_params()),
        ones(abstract_params(c)),
    )
    expected = flops.reconstructor_flops(model, BATCH, length)
    assert work_of(s)["sft_ar"].flops == expected.training
    prefix = len(model.prefix)
    rest = length - prefix
    masked = 3 * unseen(c, (1, prefix), (BATCH, rest))  # here XLA keeps what ends in the prefix's last state
    masked -= first_layer(c, prefix + BATCH * rest) if rank else 0
    near(counted, expected.training + masked)


def test_policy_forward_flops():
    model, c = wide().verbalizer, wide().verbalizer.model.config
    vectors, responses = np.ones((A, c.width), np.float32), np.zeros((A * G, R), np.int32)

    def forward(params):
        hidden = model.read_responses(params, vectors, responses)
        return TokenLoss(model.model, lambda tokens: tokens.logprob)(params, hidden, responses)

    expected = flops.verbalizer_flops(model, A, G, R).forward
    masked = unseen(c, (1, PREFIX), (A, SUFFIX), (A * G, R - 1)) - unused(c, PREFIX)
    near(xla_flops(forward, ones(model.abstract_params())), expected + masked)


def test_rollout_flops():
    """With two response tokens the loop runs once, as XLA counts it."""
    s = study(WIDE | {"prompts.max_new_tokens": 2})
    model, c, vectors = (
        s.verbalizer,
        s.verbalizer.model.config,
        np.ones((A, s.verbalizer.model.config.width), np.float32),
    )
    counted = xla_flops(
        lambda p: rollout(model, p, vectors, jax.random.key(0), group=G, max_new_tokens=2),
        ones(model.abstract_params()),
    )
    expected = flops.verbalizer_flops(model, A, G, 2).forward
    assert work_of(s)["rollout"].flops == expected
    near(counted, expected + unseen(c, (1, PREFIX), (A, SUFFIX)) - unused(c, PREFIX))


def test_decode_bytes_are_those_of_the_arrays():
    s = study(WIDE | {"subject.architecture.num_hidden_layers": 3, "sft.av.lora.rank": 4})
    c = s.verbalizer.model.config
    params = ones(abstract_params(c))
    adapter = ones(s.verbalizer.lora.abstract_params(c))
    matrices = [x for path, x in jax.tree_util.tree_leaves_with_path(params["blocks"]) if path[-1].key == "kernel"]
    expected = 4 * (parameters((matrices, adapter)) + c.vocab_size * c.width)
    cache = 2 * 4 * c.layers * c.kv_heads * c.head_dim
    positions = PREFIX + A * (SUFFIX + G * R / 2)
    found = flops.decode_bytes(s.verbalizer, A, G, R, copies=2)
    assert found == {"weights": 2 * expected, "cache": cache * positions}


def test_visible_pairs():
    """Against the mask itself, with and without a window."""
    for window in (None, 1, 5, 100):
        query, key = np.arange(3, 12)[:, None], np.arange(12)
        mask = (key <= query) & (True if window is None else query - key < window)
        assert flops.visible_pairs(9, 3, window) == mask.sum()


def test_an_adapter_costs_what_it_adds():
    lora = Lora(4, targets=("q", "down"))
    config = dataclasses.replace(wide().verbalizer.model.config, layers=3)
    assert 3 * flops.adapter_params(config, lora) == parameters(ones(lora.abstract_params(config)))


SOME = ("llama", "gemma3_text")  # the plainest and the one with everything


@pytest.mark.parametrize(
    "family", [name if name in SOME else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
)
def test_every_family_is_measured(capsys, family):
    """With its defaults: windows, soft caps, norms. What the model holds is what its family's entry says."""
    fields = {"subject.architecture.model_type": family}
    report = run(capsys, "sft_ar", fields, "--steps=1")
    assert all(math.isfinite(x) and x >= 0 for x in numbers(report))
    config = study(TINY | fields).verbalizer.model.config
    assert (config.family, config.width, config.head_dim, config.kv_heads) == (family, 32, 8, 2)
    assert config.qk_norm == (family in ("qwen3", "gemma3_text")) and bool(config.post_norms) == ("gemma" in family)


# Input


@pytest.mark.parametrize(
    "given, said",
    [
        (["rlx"], "rollout"),
        (["rl", "--config.rl.group=many"], "rl.group"),
        (["rl", "--config.subject.architecture.hidden_size=0"], "hidden_size"),
        (["rl", "--config.rl.kl_coefficient=nan"], "rl.kl_coefficient"),
        (["rl", "--config.compute.dtype=float8"], "compute.dtype"),
        (["rl", "--config.compute.remat=everything"], "compute.remat"),
        (["rl", "--config.subject.architecture.model_type=gpt2"], "gpt2"),
        (["rl", "--config", f"{CONFIG}:70b"], "no variant '70b'"),
        (["rl", "--config.subject.architecture.num_key_value_heads=3"], "num_key_value_heads"),
        (["rl", "--config.rl.micro_batches=3"], "rl.micro_batches"),
        (["rl", "--config.rl.rollout_chunks=5"], "rl.rollout_chunks"),
        (["rl", "--config.subject.layer=8"], "subject.layer"),
        (["rollout", "--config.prompts.max_new_tokens=1"], "prompts.max_new_tokens"),
        (["rl", "--config.subject.architecture.head_dim=7"], "head_dim"),
        (["rl", "--config.mesh.fsdp=64"], "devices"),
        (["rl", "--config.mesh.tensor=4"], "does not divide"),
        (["rl", "--steps=0"], "--steps"),
        (["rl", "--peak-tflops=nan"], "--peak-tflops"),
        (["rl", "--config.rl.gruop=3"], "rl.gruop"),
        (["rl", "--widht=3"], "--widht"),
    ],
    ids=lambda x: x[-1] if isinstance(x, list) else "",
)
def test_wrong_input_is_one_sentence(capsys, given, said):
    assert main(["benchmark", "--config", CONFIG, *words(TINY), *given]) == 1
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1 and err.rstrip().endswith((".", "?", "--help`."))


def test_out_of_memory_is_one_sentence():
    huge = {"subject.architecture.vocab_size": 2**24, "subject.architecture.hidden_size": 2**23}
    with pytest.raises(InputError, match="ran out of memory") as error:
        measure.run("rollout", study(TINY | huge), Timing())
    one_sentence(error)


def test_interactive_runs_a_step_a_line(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", iter(["\n", "\n"]))
    assert main(["benchmark", "sft_av", "--config", CONFIG, *words(TINY), "--interactive"]) == 0
    ready, *steps = map(json.loads, capsys.readouterr().out.splitlines())
    assert ready["ready"] and ready["compile_seconds"] > 0 and len(steps) == 2
    assert ready["shapes"]["width"] == 32 and ready["shapes"]["av_batch"] == 4
    for step in steps:
        assert step.keys() == {"seconds", "phases", "samples_per_second", "peak_memory_bytes", "metrics"}
        assert sum(step["phases"].values()) <= step["seconds"]


def test_responses_have_full_length(capsys, monkeypatch):
    """The end token never comes, and the AR reads every sampled token."""
    monkeypatch.setattr(sys, "stdin", iter(["\n"]))
    assert main(["benchmark", "rl", "--config", CONFIG, *words(TINY), "--interactive"]) == 0
    metrics = json.loads(capsys.readouterr().out.splitlines()[-1])["metrics"]
    assert metrics["length"] == TINY["prompts.max_new_tokens"] and metrics["extraction_rate"] == 1
