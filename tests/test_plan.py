"""The counters agree with XLA where XLA counts right, and the real programs compile for a TPU that is not there."""

import argparse
import dataclasses
import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from nla_jax import plan as planning
from nla_jax.errors import InputError
from nla_jax.hlo import Machine, Program
from nla_jax.models.transformer import TransformerConfig
from nla_jax.plan import CHIPS, Study, forward_flops, mesh_over, plan, slice_named, table

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="the libtpu wheel is not installed"
)
LAYERS, WIDTH, MLP = 4, 512, 2048
SMALL = TransformerConfig(
    vocab_size=1024, width=256, layers=3, heads=4, kv_heads=2, head_dim=128, mlp_width=512, tied_head=False,
    dtype=jnp.bfloat16, remat="nothing_saveable",
)  # fmt: skip
STUDY = Study(
    SMALL, layer=1, activations=8, group=2, prefix=8, suffix=4, response=16, text=24, sft_batch=8, extract_batch=8,
    extract_tokens=32, rl_steps=10,
)  # fmt: skip


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


def test_model_flops_are_those_of_a_dense_model():
    """2 FLOPs a parameter and token where there is no attention to speak of."""
    config = dataclasses.replace(SMALL, tied_head=True)
    weights = config.layers * (256 * 128 * (4 + 2 + 2 + 4) + 3 * 256 * 512)
    assert forward_flops(config, 7, 0, 0) == 2 * 7 * weights
    assert forward_flops(config, 0, 0, 5) == 2 * 5 * 256 * 1024


@needs_libtpu
def test_every_program_on_a_real_topology():
    result = plan(STUDY, "v5p:2x2x1", (1, 4, 1))
    assert list(result["programs"]) == ["extract", "sft_av", "sft_ar", "relayout", "rollout", "train_step"]
    for name, program in result["programs"].items():
        assert program["fits"] and program["memory_total"] < CHIPS["v5p"].memory, name
        assert program["projected_seconds"] > 0
    assert not result["programs"]["rollout"]["decode_loop"]["all_gather"]
    assert result["programs"]["rollout"]["decode_loop"]["trips"] == STUDY.response - 1
    assert result["programs"]["relayout"]["collectives"]["all-gather"] > 0
    assert 0 < result["programs"]["train_step"]["projected_mfu"] < 1
    assert result["rl"]["projected_samples_per_second"] > 0
    assert "all-gather inside decode loop: no" in table(result)
    json.dumps(result)


@needs_libtpu
def test_what_does_not_fit_is_said():
    huge = dataclasses.replace(SMALL, width=16384, mlp_width=65536, heads=128, layers=8)
    result = plan(dataclasses.replace(STUDY, model=huge), "v5e:2x2", (1, 4, 1), ("sft_av",))
    assert not result["programs"]["sft_av"]["fits"]
    assert "| sft_av | no" in table(result)


@needs_libtpu
def test_wrong_sizes_are_refused():
    with pytest.raises(InputError, match="does not fit the 4 devices"):
        plan(STUDY, "v5p:2x2x1", (1, 3, 1))
    with pytest.raises(InputError, match=r"has 2 entries, which mesh axis tensor=4"):
        plan(STUDY, "v5p:2x2x1", (1, 1, 4))
    with pytest.raises(InputError, match="no program 'x'"):
        plan(STUDY, "v5p:2x2x1", (1, 4, 1), ("x",))
    with pytest.raises(InputError, match="no topology"):
        slice_named("v5p:3x5x7")


def test_without_the_compiler_one_sentence_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(planning.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install"):
        slice_named("v5p:4x4x4")
    with pytest.raises(InputError, match="is no topology"):
        slice_named("h100:8")


def test_mesh_over():
    devices = tuple(jax.devices())
    assert dict(mesh_over(devices, (1, -1, 2)).shape) == {"data": 1, "fsdp": 4, "tensor": 2}


@needs_libtpu
def test_links():
    """A ring has two ways to a neighbour's data, an open axis one; a group fills the longest axes first."""
    cube, flat = slice_named("v5p:4x4x4"), slice_named("v6e:4x4")
    assert [cube.links(n) for n in (2, 4, 16, 64)] == [2, 2, 4, 6]
    assert [flat.links(n) for n in (4, 16)] == [1, 2]
    assert slice_named("v5p:2x2x4").links(16) == 3  # no whole cube, no rings
    assert slice_named("v6e:16x16").links(256) == 4
    assert slice_named("v4:2x2x1").chip.flops == CHIPS["v4"].flops / 2  # two devices a chip


@needs_libtpu
def test_the_verb(tmp_path, capsys):
    config = {
        "model_type": "qwen2", "vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2, "hidden_act": "silu", "max_position_embeddings": 64,
        "rms_norm_eps": 1e-6, "rope_theta": 1e4, "tie_word_embeddings": True,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    parser = argparse.ArgumentParser()
    planning.add_arguments(parser)
    flags = f"--subject {tmp_path} --layer 0 --topology v5p:2x2x1 --programs extract --extract-batch 8 --json".split()
    planning.main(parser.parse_args(flags))
    result = json.loads(capsys.readouterr().out)
    assert result["mesh"] == {"data": 1, "fsdp": 4, "tensor": 1}
    assert result["programs"]["extract"]["fits"]
