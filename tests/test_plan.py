"""The counters agree with XLA where XLA counts right, and the real programs compile for a TPU that is not there."""

import dataclasses
import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from nla_jax.cli import load_config, main
from nla_jax.config import Compute, Config, LoraSettings, Plan, Sft, Subject
from nla_jax.models.sharding import make_mesh
from nla_jax.runtime.errors import InputError
from nla_jax.tools import search as searching
from nla_jax.tools import topology
from nla_jax.tools.hlo import Machine, Program
from nla_jax.tools.plan import RL, plan, plan_program, programs_of, table
from nla_jax.tools.search import ranking, search
from nla_jax.tools.topology import (
    CHIPS,
    Chip,
    Slice,
    factorisations,
    mesh_over,
    present,
    slice_named,
)

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="the libtpu wheel is not installed"
)
LAYERS, WIDTH, MLP = 4, 512, 2048
CONFIG = str(Path(__file__).parent.parent / "configs/quickstart.py")
SMALL = {
    "model_type": "qwen2",
    "vocab_size": 1024,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "tie_word_embeddings": False,
}
PROGRAMS = ["extract", "sft_av", "sft_ar", "relayout", "rollout", "joint_step", "reconstruct"]


def small(layer: int = 1, dtype: str = "bfloat16", rank: int = 0, group: int = 2, **architecture) -> Config:
    """The quickstart at a test's sizes, with a subject that exists nowhere."""
    config = load_config(CONFIG, [])
    lora = LoraSettings(rank=rank)
    warm = {"batch": 8, "steps": 10, "lora": lora}
    return dataclasses.replace(
        config,
        compute=Compute(dtype=dtype, remat="nothing_saveable"),
        subject=Subject(path="nobody/small", layer=layer, architecture=SMALL | architecture),
        prompts=dataclasses.replace(config.prompts, max_new_tokens=16),
        corpus=dataclasses.replace(config.corpus, max_documents=800),
        extract=dataclasses.replace(config.extract, max_tokens=32),
        plan=Plan(prefix=8, suffix=4, text_prefix=2, text=6),
        sft=Sft(av=dataclasses.replace(config.sft.av, **warm), ar=dataclasses.replace(config.sft.ar, **warm)),
        rl=dataclasses.replace(config.rl, steps=10, activations=8, group=group),
    )


def layer(x, w):
    scores = jax.nn.softmax(jnp.einsum("btd,bsd->bts", x @ w["q"], x))
    x = x + jnp.einsum("bts,bsd->btd", scores, x)
    return x + jax.nn.silu(x @ w["up"]) @ w["down"]


def compiled(unrolled: bool, dtype, **sharding):
    """The gradient of a small model, its layers written out or scanned."""

    def loss(weights, x):
        if unrolled:
            for i in range(LAYERS):
                x = layer(x, jax.tree.map(lambda w: w[i], weights))
        else:
            x = jax.lax.scan(lambda x, w: (layer(x, w), None), x, weights)[0]
        return jnp.mean(x.astype(jnp.float32) ** 2)

    shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, dtype, **sharding)
    weights = {"q": shape(LAYERS, WIDTH, WIDTH), "up": shape(LAYERS, WIDTH, MLP), "down": shape(LAYERS, MLP, WIDTH)}
    return jax.jit(jax.grad(loss)).lower(weights, shape(8, 128, WIDTH)).compile()


def close(found: float, expected: float, tolerance: float = 0.02) -> None:
    assert abs(found / expected - 1) < tolerance, (found, expected)


def test_counts_are_xlas_where_nothing_loops():
    program = compiled(True, jnp.float32)
    counts, xla = Program(program.as_text()).counts, program.cost_analysis()
    close(counts.flops, xla["flops"])
    close(counts.bytes, xla["bytes accessed"])


def test_a_scanned_model_costs_its_layers():
    text = compiled(False, jnp.float32).as_text()
    program = Program(text)
    assert [loop.trips for loop in program.loops] == [LAYERS, LAYERS]
    close(sum(loop.trips * loop.body.flops for loop in program.loops), program.counts.flops)
    close(program.counts.flops, Program(compiled(True, jnp.float32).as_text()).counts.flops)


@needs_libtpu
def test_counts_on_a_tpu():
    """There XLA adds elementwise operations to the FLOPs, and counts on-chip memory and both halves of a copy as bytes:
    FLOPs agree where products dominate, bytes where nothing is kept on the chip."""
    device = slice_named("v5p:2x2x1").devices[0]
    sharding = NamedSharding(Mesh(np.array([device]), "x"), PartitionSpec())
    shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.bfloat16, sharding=sharding)
    product = jax.jit(jnp.matmul).lower(shape(16384, 8192), shape(8192, 8192)).compile()
    counts = Program(product.as_text()).counts
    close(counts.flops, product.cost_analysis()["flops"])
    close(counts.bytes, product.cost_analysis()["bytes accessed"])

    unrolled, scanned = (compiled(unrolled, jnp.bfloat16, sharding=sharding) for unrolled in (True, False))
    close(Program(unrolled.as_text()).counts.flops, unrolled.cost_analysis()["flops"], 0.04)
    close(Program(scanned.as_text()).counts.flops, Program(unrolled.as_text()).counts.flops)


NESTED = """HloModule nested, is_scheduled=true

%inner_body (a: (s32[], f32[64,64])) -> (s32[], f32[64,64]) {
  %a = (s32[], f32[64,64]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%a), index=0
  %x = f32[64,64]{1,0} get-tuple-element(%a), index=1
  %two = s32[] constant(2)
  %i.next = s32[] add(%i, %two)
  %y = f32[64,64]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %out = (s32[], f32[64,64]{1,0}) tuple(%i.next, %y)
}

%inner_condition (b: (s32[], f32[64,64])) -> pred[] {
  %b = (s32[], f32[64,64]{1,0}) parameter(0)
  %j = s32[] get-tuple-element(%b), index=0
  %bound = s32[] constant(9)
  ROOT %less = pred[] compare(%j, %bound), direction=LT
}

%outer_body (c: (s32[], f32[64,64])) -> (s32[], f32[64,64]) {
  %c = (s32[], f32[64,64]{1,0}) parameter(0)
  %k = s32[] get-tuple-element(%c), index=0
  %one = s32[] constant(1)
  %k.next = s32[] add(%k, %one)
  %z = f32[64,64]{1,0} get-tuple-element(%c), index=1
  %gathered = f32[64,64]{1,0} all-reduce(%z), replica_groups=[2,4]<=[8], to_apply=%sum
  %start = (f32[64,64]{1,0}, f32[256,64]{1,0}) all-gather-start(%z), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
  %pair = (s32[], f32[64,64]{1,0}) tuple(%one, %gathered)
  %inner = (s32[], f32[64,64]{1,0}) while(%pair), condition=%inner_condition, body=%inner_body
  %done = f32[256,64]{1,0} all-gather-done(%start)
  %w = f32[64,64]{1,0} get-tuple-element(%inner), index=1
  ROOT %out.1 = (s32[], f32[64,64]{1,0}) tuple(%k.next, %w)
}

%outer_condition (d: (s32[], f32[64,64])) -> pred[] {
  %d = (s32[], f32[64,64]{1,0}) parameter(0)
  %l = s32[] get-tuple-element(%d), index=0
  %bound.1 = s32[] constant(10)
  ROOT %less.1 = pred[] compare(%l, %bound.1), direction=LT
}

%sum (p: f32[], q: f32[]) -> f32[] {
  %p = f32[] parameter(0)
  %q = f32[] parameter(1)
  ROOT %r = f32[] add(%p, %q)
}

ENTRY %main (v: f32[64,64]) -> f32[64,64] {
  %v = f32[64,64]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %first = (s32[], f32[64,64]{1,0}) tuple(%zero, %v)
  %outer = (s32[], f32[64,64]{1,0}) while(%first), condition=%outer_condition, body=%outer_body, metadata={op_name="outer"}
  ROOT %result = f32[64,64]{1,0} get-tuple-element(%outer), index=1
}
"""


def test_nested_loops_multiply():
    """The inner loop counts 1, 3, 5, 7: four trips in each of the outer's ten."""
    array, product = 64 * 64 * 4, 2 * 64**3
    program = Program(NESTED)
    assert sorted(loop.trips for loop in program.loops) == [4, 10]
    assert program.counts.flops == 10 * 4 * product
    assert program.counts.collectives == {
        ("all-reduce", 4): 10 * 2 * 3 / 4 * array,
        ("all-gather", 4): 10 * 3 * array,
    }
    outer = next(loop for loop in program.loops if loop.name == "outer")
    assert {kind for kind, _ in outer.body.collectives} == {"all-reduce", "all-gather"}


def test_a_collective_hides_only_behind_what_stands_between_its_halves():
    array, product = 64 * 64 * 4, 2 * 64**3
    slow_links = Program(NESTED, Machine(flops=product, link=array)).counts  # a product takes 1 s, an array 1 s of link
    reduce, gather, products = 1.5, 3.0, 4.0
    assert slow_links.seconds == pytest.approx(10 * (reduce + max(gather, products)))
    assert slow_links.waiting == pytest.approx(10 * reduce)
    slower = Program(NESTED, Machine(flops=product, link=array / 2)).counts
    assert slower.waiting == pytest.approx(10 * (2 * reduce + 2 * gather - products))


FUSED = """%start (s: f32[8,64]) -> (f32[8,64], f32[64,64]) {
  %s = f32[8,64]{1,0} parameter(0)
  %g = f32[64,64]{1,0} all-gather(%s), channel_id=7, replica_groups=[1,8]<=[8], dimensions={0}, backend_config={"async_collective_fusion_config":{}}
  ROOT %t = (f32[8,64]{1,0}, f32[64,64]{1,0}) custom-call(%g), custom_call_target="AsyncCollectiveStart"
}

%step (s.1: f32[8,64], r.1: f32[64,64], x: f32[64,64]) -> (f32[64,64], f32[64,64]) {
  %s.1 = f32[8,64]{1,0} parameter(0)
  %r.1 = f32[64,64]{1,0} parameter(1)
  %x = f32[64,64]{1,0} parameter(2)
  %g.1 = f32[64,64]{1,0} all-gather(%s.1), channel_id=7, replica_groups=[1,8]<=[8], dimensions={0}, backend_config={"async_collective_fusion_config":{}}
  %y = f32[64,64]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %u = (f32[64,64]{1,0}, f32[64,64]{1,0}) tuple(%y, %g.1)
}

%done (r.2: f32[64,64]) -> f32[64,64] {
  %r.2 = f32[64,64]{1,0} parameter(0)
  %g.2 = f32[64,64]{1,0} all-gather(%r.2), channel_id=7, replica_groups=[1,8]<=[8], dimensions={0}, backend_config={"async_collective_fusion_config":{}}
  ROOT %d = f32[64,64]{1,0} custom-call(%g.2), custom_call_target="AsyncCollectiveDone"
}

%scatter (q: f32[64,64]) -> f32[8,64] {
  %q = f32[64,64]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %r = f32[64,64]{1,0} all-reduce(%q), channel_id=8, replica_groups=[1,8]<=[8], to_apply=%sum
  ROOT %part = f32[8,64]{1,0} dynamic-slice(%r, %zero, %zero), dynamic_slice_sizes={8,64}
}

ENTRY %main (a: f32[8,64], b: f32[64,64]) -> f32[8,64] {
  %a = f32[8,64]{1,0} parameter(0)
  %b = f32[64,64]{1,0} parameter(1)
  %first = (f32[8,64]{1,0}, f32[64,64]{1,0}) fusion(%a), kind=kCustom, output_to_operand_aliasing={{0}: (0, {})}, calls=%start
  %part.1 = f32[8,64]{1,0} get-tuple-element(%first), index=0
  %under.way = f32[64,64]{1,0} get-tuple-element(%first), index=1
  %beside = (f32[64,64]{1,0}, f32[64,64]{1,0}) fusion(%part.1, %under.way, %b), kind=kOutput, output_to_operand_aliasing={{1}: (1, {})}, calls=%step
  %under.way.1 = f32[64,64]{1,0} get-tuple-element(%beside), index=1
  %whole = f32[64,64]{1,0} fusion(%under.way.1), kind=kCustom, output_to_operand_aliasing={{}: (0, {})}, calls=%done
  ROOT %kept = f32[8,64]{1,0} fusion(%whole), kind=kCustom, calls=%scatter
}
"""


def test_collectives_that_the_tpu_compiler_writes_into_fusions():
    """The gather stands in three fusions and is one; it runs beside the product. The reduction keeps a part."""
    array, product = 64 * 64 * 4, 2 * 64**3
    counts = Program(FUSED, Machine(flops=product, link=array / 8)).counts
    assert counts.collectives == {("all-gather", 8): 7 / 8 * array, ("reduce-scatter", 8): 7 / 8 * array}
    assert counts.flops == product
    assert counts.seconds == pytest.approx(7 + 7) and counts.waiting == pytest.approx(6 + 7)


@pytest.mark.parametrize(
    "groups, size", [("{{0,1,2},{3,4,5}}", 3), ("[4,2]<=[8]", 2), ("mesh['a'=4,'b'=2,'c'=8] {'a','c':(1)2}", 8)]
)
def test_replica_groups(groups, size):
    text = NESTED.replace("[2,4]<=[8]", groups)
    assert ("all-reduce", size) in Program(text).counts.collectives


def test_an_update_in_place_costs_the_update():
    cache, row = jax.ShapeDtypeStruct((4096, 256), jnp.float32), jax.ShapeDtypeStruct((1, 256), jnp.float32)
    write = lambda cache, row, i: jax.lax.dynamic_update_slice(cache, row, (i, 0))
    text = jax.jit(write, donate_argnums=0).lower(cache, row, jnp.int32(3)).compile().as_text()
    assert Program(text).counts.bytes < 4 * 256 * 4


def test_bytes_as_laid_out():
    text = "ENTRY %e (p: f32[3,5]) -> f32[3,5] {\n  %p = f32[3,5]{1,0:T(8,128)} parameter(0)\n"
    text += "  %c = f32[3,5]{1,0:T(8,128)S(1)} copy(%p)\n  ROOT %d = f32[3,5]{0,1:T(2,4)} copy(%c)\n}\n"
    assert Program(text).counts.bytes == 4 * 8 * 128 + 4 * 4 * 6


def test_a_gpus_matrix_product():
    text = """ENTRY %e (p: f32[8,32], q: f32[32,16]) -> f32[8,16] {
  %p = f32[8,32]{1,0} parameter(0)
  %q = f32[32,16]{1,0} parameter(1)
  %gemm = (f32[8,16]{1,0}, s8[4096]{0}) custom-call(%p, %q), custom_call_target="__cublas$gemm", backend_config={"gemm_backend_config":{"alpha_real":1,"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"],"lhs_batch_dimensions":[]}}}
  ROOT %r = f32[8,16]{1,0} get-tuple-element(%gemm), index=0
}
"""
    assert Program(text).counts.flops == 2 * 8 * 32 * 16


# The plan of a config


@needs_libtpu
def test_every_program_on_a_real_topology():
    config, place = small(), slice_named("v5p:2x2x1")
    result = plan(config, place, mesh_over(place.devices, (1, 4, 1)))
    assert list(result["programs"]) == PROGRAMS
    for name, program in result["programs"].items():
        assert program["fits"] and program["memory_total"] < CHIPS["v5p"].memory, name
        assert program["projected_seconds"] > 0
    assert not result["programs"]["rollout"]["decode_loop"]["all_gather"]
    assert result["programs"]["rollout"]["decode_loop"]["trips"] == config.prompts.max_new_tokens - 1
    assert result["programs"]["relayout"]["collectives"]["all-gather"] > 0
    assert 0 < result["programs"]["joint_step"]["projected_mfu"] < 1
    assert result["programs"]["extract"]["runs"] == 50  # 16 documents at a time
    assert result["rl"]["projected_samples_per_second"] > 0
    hours = sum(p["runs"] * p["projected_seconds"] for p in result["programs"].values()) / 3600
    assert result["projected_hours"] == pytest.approx(hours)
    assert "all-gather inside decode loop: no" in table(result)
    json.dumps(result)


@needs_libtpu
@pytest.mark.parametrize("name, sizes", [("v5e:4x4", (1, 4, 4)), ("v5p:2x2x2", (2, 2, 2))])
def test_each_host_extracts_alone(name, sizes):
    """On a part of a slice as large as a host, which some compilers refuse inside a larger one."""
    place = slice_named(name)
    config = small(num_key_value_heads=4)
    result = plan(config, place, mesh_over(place.devices, sizes), ("extract",))["programs"]["extract"]
    hosts = len(place.devices) // 4
    assert result["fits"] and result["runs"] == -(-50 // hosts)
    assert result["projected_samples_per_second"] == pytest.approx(hosts * 16 / result["projected_seconds"])


@needs_libtpu
def test_what_does_not_fit_is_said():
    config = small(hidden_size=16384, intermediate_size=65536, num_attention_heads=128, num_hidden_layers=8)
    place = slice_named("v5e:2x2")
    result = plan(config, place, mesh_over(place.devices, (1, 4, 1)), ("sft_av",))
    assert not result["programs"]["sft_av"]["fits"]
    assert "| sft_av | no" in table(result)


def test_a_plan_for_this_machine_is_narrow_and_speaks_of_memory():
    """Nothing is sent between devices where there is one, and a CPU has no HBM."""
    config, place = small(), dataclasses.replace(present("float32"), devices=tuple(jax.devices()[:1]))
    result = plan(config, place, make_mesh(1, 1, 1), ("relayout", "sft_ar"))
    lines = table(result).splitlines()
    assert max(map(len, lines)) <= 140
    assert "memory GB" in lines[4] and "HBM" not in table(result) and "collectives" not in table(result)
    cells = [line.count("|") for line in lines if line.startswith("|")]
    assert len(cells) == 4 and len(set(cells)) == 1
    assert "sft_ar | yes" in table(result) and set(result["programs"]["sft_ar"]["seconds_by_bound"]) >= {"memory"}


def test_wrong_sizes_are_refused():
    devices = tuple(jax.devices()[:4])
    with pytest.raises(InputError, match="does not fit the 4 devices"):
        mesh_over(devices, (1, 3, 1))
    with pytest.raises(InputError, match=r"has 2 entries, which mesh axis tensor=4"):
        programs_of(small(), mesh_over(devices, (1, 1, 4)))
    with pytest.raises(InputError, match="no program 'x'"):
        plan(small(), HERE, mesh_over(devices, (1, 4, 1)), ("x",))
    with pytest.raises(InputError, match="layer 3 does not exist"):
        programs_of(small(layer=3), mesh_over(devices, (1, 4, 1)))


@needs_libtpu
def test_a_topology_that_there_is_not():
    with pytest.raises(InputError, match="no topology"):
        slice_named("v5p:3x5x7")


def test_without_the_compiler_one_sentence_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install"):
        slice_named("v5p:4x4x4")
    with pytest.raises(InputError, match="is no topology"):
        slice_named("h100:8")


@needs_libtpu
def test_a_compiler_of_another_version_is_named(monkeypatch):
    """XLA itself would say "async-update instruction should have 1 operands", or something as helpful."""

    def lower(*args, **kwargs):
        raise jax.errors.JaxRuntimeError("INTERNAL: cannot read this")

    place = slice_named("v5p:2x2x1")
    program, work = programs_of(small(), mesh_over(place.devices, (1, 4, 1)))["sft_ar"]
    program = dataclasses.replace(program, function=SimpleNamespace(lower=lower))
    with pytest.raises(jax.errors.JaxRuntimeError, match="cannot read this"):
        plan_program(program, work, place)
    monkeypatch.setattr(topology.importlib.metadata, "version", lambda name: "99.0")
    with pytest.raises(InputError, match=r"cannot read this.*asks for \(==.*pip install \"jax\[tpu\]"):
        plan_program(program, work, place)


def test_mesh_over():
    devices = tuple(jax.devices())
    assert dict(mesh_over(devices, (1, -1, 2)).shape) == {"data": 1, "fsdp": 4, "tensor": 2}
    assert sorted(factorisations(4)) == [(1, 1, 4), (1, 2, 2), (1, 4, 1), (2, 1, 2), (2, 2, 1), (4, 1, 1)]


@needs_libtpu
def test_links():
    """A ring has two ways to a neighbour's data, an open axis one; a group fills the longest axes first."""
    cube, flat = slice_named("v5p:4x4x4"), slice_named("v6e:4x4")
    assert [cube.links(n) for n in (2, 4, 16, 64)] == [2, 2, 4, 6]
    assert [flat.links(n) for n in (4, 16)] == [1, 2]
    assert slice_named("v5p:2x2x4").links(16) == 3  # no whole cube, no rings
    assert slice_named("v6e:16x16").links(256) == 4
    assert slice_named("v4:2x2x1").chip.flops == CHIPS["v4"].flops / 2  # two devices a chip


# Where there is no TPU and no compiler for one

HERE = Slice("8 × cpu", Chip(1e11, 1e9, 1e10, 1e10), (), tuple(jax.devices()))


def test_the_devices_present(monkeypatch):
    """Measured where no table has them; a known GPU has its published peaks and its own memory."""
    place = present("float32")
    assert place.devices == tuple(jax.devices()) and place.links(8) == 1
    assert place.chip.flops > 1e8 and place.chip.bandwidth > 1e7 and place.chip.memory > 1e8

    class Gpu:
        platform, device_kind = "gpu", "NVIDIA H200"
        memory_stats = lambda self: {"bytes_limit": 1000}

    monkeypatch.setattr(topology.jax, "devices", lambda: [Gpu(), Gpu()])
    place = present("bfloat16")
    assert (place.chip.flops, place.chip.memory, len(place.devices)) == (989e12, 1000, 2)


def test_model_flops_are_those_that_xla_counts():
    """On one device and unrolled nothing counts twice: the AR's forward pass of the plan against the compiled one."""
    config = small(layer=0, dtype="float32", num_hidden_layers=2)
    mesh = mesh_over(tuple(jax.devices()[:1]), (1, 1, 1))
    program, work = programs_of(config, mesh)["extract"]
    with jax.set_mesh(mesh):
        compiled = program.function.lower(*program.arguments).compile()
    unseen = 16 * 4 * 4 * 128 * 32 * 31 / 2  # the masked half of the scores, which the plain path computes
    close(Program(compiled.as_text()).counts.flops, work.flops + unseen)


def test_adapters_leave_the_base_out_of_the_state():
    mesh = mesh_over(tuple(jax.devices()[:4]), (1, 4, 1))
    whole, work = programs_of(small(), mesh)["joint_step"]
    adapters, less = programs_of(small(rank=2), mesh)["joint_step"]
    assert adapters.least_memory < whole.least_memory / 2 and less.flops < work.flops


def test_the_verb_on_devices_that_are_here(capsys, monkeypatch):
    monkeypatch.setattr(topology, "present", lambda dtype: HERE)
    flags = ["--config.prompts.max_new_tokens=8", "--config.rl.activations=2", "--config.rl.group=2"]
    command = [
        "plan",
        "--config",
        f"{CONFIG}:tiny",
        "--programs",
        "relayout,rollout",
        "--mesh",
        "1,2,1",
        "--json",
        *flags,
    ]
    assert main(command) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["mesh"] == {"data": 1, "fsdp": 2, "tensor": 1} and result["devices"] == "8 × cpu"
    assert result["programs"]["rollout"]["fits"] and result["programs"]["rollout"]["decode_loop"]["trips"] == 7


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--topology", "v5p"], "is no topology"),
        (["--config", "configs/none.py"], "no config file"),
        (["--config.rl.nothing=1"], "is not valid"),
        (["--subject", "x"], "Unknown argument"),
        (["--mesh", "1,99,1"], "needs 99 devices"),
    ],
)
def test_wrong_flags_are_one_sentence(capsys, monkeypatch, flags, said):
    monkeypatch.setattr(topology, "present", lambda dtype: HERE)
    assert main(["plan", "--config.compute.dtype=float32", *flags]) == 1
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1


# The search, with programs that nobody compiles


@pytest.fixture
def uncompiled(monkeypatch):
    """What `search` asks for, as (mesh, micro-batches), of programs of which a joint step fits from four micro-batches
    on, and takes as many hours as it has micro-batches, times the mesh's tensor axis."""
    asked, shapes = [], searching.programs_of

    def programs(config, mesh):
        named = lambda name: (name, config.rl.micro_batches)  # in place of the work
        return {name: (program, named(name)) for name, (program, _) in shapes(config, mesh).items()}

    def plan_program(program, named, place):
        name, micro = named
        sizes = tuple(program.mesh.shape.values())
        asked.append((sizes, micro))
        return {
            "fits": name != "joint_step" or micro >= 4,
            "memory": {},
            "memory_total": 1.0,
            "bound_by": "compute",
            "projected_hours": sizes[2] * micro,
            "projected_mfu": 0.5,
        }

    monkeypatch.setattr(searching, "programs_of", programs)
    monkeypatch.setattr(searching, "plan_program", plan_program)
    return asked


def slice_of(devices: int, memory: float = 1e9) -> Slice:
    return Slice(f"{devices} × cpu", Chip(1e11, memory, 1e10, 1e10), (), tuple(jax.devices()[:devices]))


def test_search_ranks_meshes_with_the_fewest_micro_batches_that_fit(uncompiled, tmp_path):
    plans = search(small(), slice_of(4), tmp_path / "plan.jsonl")
    found = [(tuple(p["mesh"].values()), p["micro_batches"]) for p in plans]
    assert {mesh for mesh, _ in found} == {(1, 4, 1), (2, 2, 1), (4, 1, 1), (1, 2, 2), (2, 1, 2)}  # 2 key/value heads
    assert all(micro == 4 for _, micro in found)
    assert [mesh[2] for mesh, _ in found] == [1, 1, 1, 2, 2]  # fastest first
    assert ranking(plans).count("| yes |") == 5


def test_search_finds_one_micro_batch_where_two_do_not_fit(uncompiled, monkeypatch, tmp_path):
    """Two have two sets of gradients."""
    monotone = searching.plan_program

    def plan_program(program, named, place):
        fits = named[1] == 1 and program.mesh.shape["tensor"] == 2
        return monotone(program, named, place) | ({"fits": True} if fits else {})

    monkeypatch.setattr(searching, "plan_program", plan_program)
    plans = search(small(), slice_of(4), tmp_path / "plan.jsonl")
    assert {(p["mesh"]["tensor"], p["micro_batches"]) for p in plans} == {(1, 4), (2, 1)}


def test_search_compiles_nothing_on_a_mesh_that_cannot_hold_the_arguments(uncompiled, tmp_path):
    programs = lambda sizes: programs_of(small(), mesh_over(HERE.devices[:2], sizes))
    least = {sizes: max(programs(sizes)[name][0].least_memory for name in RL) for sizes in factorisations(2)}
    largest = max(least, key=least.get)
    assert sorted(least.values())[1] < least[largest]
    search(small(), slice_of(2, memory=least[largest] - 1), tmp_path / "plan.jsonl")
    assert {mesh for mesh, _ in uncompiled} == least.keys() - {largest}


@pytest.mark.slow
def test_search_continues_where_it_was_stopped(uncompiled, tmp_path):
    file = tmp_path / "run/plan.jsonl"
    first, done = search(small(), slice_of(2), file), len(uncompiled)
    lines = file.read_text().splitlines()
    assert len(lines) == done

    uncompiled.clear()
    file.write_text("\n".join(lines[:4]) + '\n{"basis": "cut')  # killed while it wrote
    assert search(small(), slice_of(2), file) == first
    assert len(uncompiled) == done - 4
    uncompiled.clear()
    assert search(small(), slice_of(2), file) == first and not uncompiled

    search(small(group=4), slice_of(2), file)
    assert len(uncompiled) == done  # another study's programs are no results of this one


@pytest.mark.slow
@needs_libtpu
def test_a_real_search(tmp_path):
    plans = search(small(), slice_named("v5e:2x2"), tmp_path / "plan.jsonl")
    assert plans[0]["rl"]["fits"] and plans[0]["micro_batches"] == 1
