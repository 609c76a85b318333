"""Every mesh computes the same, and the decode loop gathers no weights."""

import dataclasses
import functools
import re

import jax
import numpy as np
import pytest
from conftest import TINY, close, one_sentence, random_params
from nla_jax.stages.train import heldout_fve

import nla_jax.pair
from nla_jax.fve import fve
from nla_jax.joint_step import Frozen, JointBatch, JointStep
from nla_jax.models.lora import Lora
from nla_jax.models.sharding import (
    DECODE,
    TRAIN,
    make_mesh,
    place_batch,
    relayout,
    shardings,
)
from nla_jax.models.transformer import Transformer, abstract_params
from nla_jax.objective import adamw
from nla_jax.pair import Pair, new_pair
from nla_jax.runtime.compiler import compilations
from nla_jax.sampling import decoding_layout, rollout

A, G, R, T = 8, 2, 4, 8
STEPS = 3
COLLECTIVES = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"


@pytest.fixture(scope="module")
def joint(verbalizer, reconstructor) -> JointStep:
    """Well-conditioned, so that float32's rounding stays rounding: with Adam's usual eps a gradient of nearly 0 moves its
    weight by ± the learning rate, and near-equal rewards over their own spread are noise."""
    optimizer = adamw(STEPS, 1e-3, warmup=1, eps=1e-4)
    centred = lambda rewards: rewards - rewards.mean(1, keepdims=True)
    return JointStep(verbalizer, reconstructor, optimizer, optimizer, advantage=centred, kl_coefficient=0.1)


@pytest.fixture(scope="module")
def train(joint, params, pair):
    """Three rollouts and joint steps on a mesh, as `nla_jax/stages/train.py` makes them: `(history, params, compiles)`."""

    @functools.cache
    def train(*sizes):
        mesh = make_mesh(*sizes)
        boxed = joint.verbalizer.abstract_params(), joint.reconstructor.abstract_params()
        layout = shardings(mesh, jax.eval_shape(joint.init, jax.random.key(0), *boxed))
        rng, history = np.random.default_rng(0), []
        with jax.set_mesh(mesh):
            state = jax.jit(joint.init, out_shardings=layout)(jax.random.key(0), params, pair.reconstructor_params)
            for name, array in (("q", state.verbalizer["blocks"]["q"]["kernel"]), ("mu", state.verbalizer_opt)):
                array = array if name == "q" else array[1][0].mu["blocks"]["q"]["kernel"]
                assert array.sharding.shard_shape(array.shape) == (3, 32 // (sizes[1] * sizes[2]), 4, 8)
            reference = jax.device_put(random_params(TINY, 7), shardings(mesh, boxed[0]))
            decoding, step = relayout(mesh, boxed[0], TINY.dtype, DECODE), jax.jit(joint, donate_argnums=0)
            compiles = []
            for i in range(STEPS):
                vectors = rng.normal(size=(A, TINY.width)).astype(np.float32)
                sampled = jax.device_get(
                    rollout(
                        joint.verbalizer, decoding(state.verbalizer), place_batch(mesh, vectors),
                        jax.random.fold_in(state.rng, i), group=G, max_new_tokens=R,
                    )
                )  # fmt: skip
                batch = JointBatch(
                    vectors=vectors, responses=sampled.tokens, response_mask=sampled.mask,
                    sampler_logprobs=sampled.logprobs, valid=rng.random(A * G) < 0.8,
                    texts=rng.integers(4, TINY.vocab_size, (A * G, T)).astype(np.int32),
                    text_lengths=rng.integers(1, T + 1, A * G).astype(np.int32),
                )  # fmt: skip
                placed = place_batch(mesh, batch)
                with compilations() as compiled:
                    state, metrics = step(state, Frozen(reference), placed)
                compiles.append(len(compiled))
                history.append((sampled.tokens, jax.device_get(metrics)))
            return history, jax.device_get((state.verbalizer, state.reconstructor)), compiles

    return train


@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 8, 1), (2, 2, 2)], ids=lambda s: "x".join(map(str, s)))
def test_meshes_agree(train, sizes):
    expected, params, _ = train(1, 1, 1)
    history, found, compiles = train(*sizes)
    for (tokens, metrics), (expected_tokens, expected_metrics) in zip(history, expected, strict=True):
        assert np.array_equal(tokens, expected_tokens)
        assert max(metrics.pop("logprob_gap_max"), metrics.pop("logprob_gap_mean")) < 1e-4
        close(metrics, {name: expected_metrics[name] for name in metrics}, 1e-5)
    close(found, params, 1e-5)
    assert compiles == [1, 0, 0]


def while_bodies(text: str) -> str:
    """The HLO of all loop bodies and of every computation that they call."""
    computations = dict(re.findall(r"^(?:ENTRY )?%?([\w.\-]+) \(.*?\{\n(.*?)^\}", text, re.M | re.S))
    todo, seen = re.findall(r"body=%?([\w.\-]+)", text), set()
    while todo:
        name = todo.pop()
        if name not in seen:
            seen.add(name)
            todo += re.findall(r"(?:body|condition|calls|to_apply)=%?([\w.\-]+)", computations[name])
    assert seen
    return "\n".join(computations[name] for name in seen)


def collectives_in_loops(mesh, verbalizer, params, vectors, rules=DECODE, **options) -> set[str]:
    """The kinds of collectives in the loops of a rollout whose parameters lie by `rules`."""
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, shardings(mesh, verbalizer.abstract_params(), rules))
        batch = place_batch(mesh, np.repeat(vectors, 2, 0))
        program = rollout.lower(verbalizer, placed, batch, jax.random.key(0), group=G, max_new_tokens=R, **options)
        return collectives(program.compile())


def collectives(program) -> set[str]:
    """The kinds of collectives in the loops of a compiled program."""
    return set(re.findall(COLLECTIVES, while_bodies(program.as_text())))


@pytest.mark.parametrize("rules", [DECODE, TRAIN], ids=["decode", "train"])
def test_the_decode_loop_communicates_nothing(verbalizer, params, vectors, rules):
    """Under the decoding layout. Under the training layout (the control) every token waits for other devices."""
    found = collectives_in_loops(make_mesh(1, 8, 1), verbalizer, params, vectors, rules)
    assert bool(found) == (rules is TRAIN), found


@pytest.mark.parametrize(
    "options", [{}, dict(top_k=5, top_p=0.9), dict(temperature=0.0)], ids=["plain", "top", "greedy"]
)
def test_a_decode_loop_over_tensor_gathers_nothing(verbalizer, params, vectors, options):
    """Devices that share a row add up what each made of its weights, and never show each other logits or weights."""
    assert collectives_in_loops(make_mesh(2, 2, 2), verbalizer, params, vectors, **options) == {"all-reduce"}


@pytest.fixture(params=["whole", "adapters"])
def any_pair(request, pair, subject_folder, sidecar) -> Pair:
    """A pair that writes texts; one of adapters on one frozen base."""
    if request.param == "whole":
        return pair
    made = new_pair(sidecar, subject_folder, av_lora=Lora(4, 6.0), ar_lora=Lora(3, 5.0))
    rng = np.random.default_rng(0)
    lively = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32) * 0.2, made.verbalizer_params)
    return dataclasses.replace(made, verbalizer_params=lively, base=pair.verbalizer_params)


def test_a_pair_decodes_from_a_copy_made_once(any_pair, monkeypatch):
    """Texts and held-out FVE on a mesh are those of one device, and the copy serves all batches."""
    programs, copies = [], []
    vectors = np.random.default_rng(3).normal(size=(66, TINY.width)).astype(np.float32)  # more than a batch
    texts = any_pair.verbalize(vectors, 12)
    expected = fve(any_pair.reconstruct(texts), vectors)
    assert len({text for text in texts if text}) > 3

    def compiled_once(verbalizer, *args, **options):
        """The program of the first call for all calls: it takes no arguments that lie elsewhere."""
        programs.append(programs[0] if programs else rollout.lower(verbalizer, *args, **options).compile())
        return programs[-1](*args)

    monkeypatch.setattr(nla_jax.pair, "rollout", compiled_once)
    mesh = make_mesh(2, 2, 2)
    av, ar = any_pair.verbalizer.abstract_params(), any_pair.reconstructor.abstract_params()
    place = lambda params, boxed: jax.device_put(params, shardings(mesh, boxed))
    base = any_pair.base and place(any_pair.base, abstract_params(TINY))
    with jax.set_mesh(mesh):
        placed = dataclasses.replace(
            any_pair, verbalizer_params=place(any_pair.verbalizer_params, av),
            reconstructor_params=place(any_pair.reconstructor_params, ar), base=base,
        )  # fmt: skip
        assert placed.verbalize(vectors, 12) == texts
        to_decoding = decoding_layout(mesh, any_pair.verbalizer, base)
        counted = lambda params: copies.append(params) or to_decoding(params)
        assert heldout_fve(placed, vectors, 12, 1.0, counted) == pytest.approx(expected, abs=1e-5)
    assert len(copies) == 1 and len(programs) == 4 and collectives(programs[0]) == {"all-reduce"}


@pytest.mark.parametrize("tied", [False, True])
def test_a_vocabulary_that_does_not_divide_is_padded_for_decoding(verbalizer, vectors, tied):
    """Only there: training, checkpoints and saved models keep the tokenizer's size. What is sampled stays the same."""
    config = dataclasses.replace(TINY, vocab_size=317, tied_head=tied)
    verbalizer = dataclasses.replace(verbalizer, model=Transformer(config))
    params, mesh = random_params(config), make_mesh(1, 4, 2)
    options = dict(group=4, max_new_tokens=12, top_p=0.95)
    expected = jax.device_get(rollout(verbalizer, params, vectors, jax.random.key(3), **options))
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, shardings(mesh, verbalizer.abstract_params()))
        decoding = relayout(mesh, verbalizer.abstract_params(), TINY.dtype, DECODE)(placed)
        found = jax.device_get(rollout(verbalizer, decoding, vectors, jax.random.key(3), **options))
    assert placed["embedding"].shape == (317, 32) and decoding["embedding"].shape == (318, 32)
    assert np.array_equal(found.tokens, expected.tokens) and found.tokens.max() < 317
    close(found.logprobs, expected.logprobs, 1e-5)


def test_sizes_that_do_not_divide_are_refused(verbalizer):
    with pytest.raises(ValueError, match=r"\['k'\].* has 2 entries.*tensor=4 ") as error:
        shardings(make_mesh(1, 1, 4), verbalizer.abstract_params(), DECODE)
    one_sentence(error)
    with pytest.raises(ValueError, match=r"has 32 entries.*fsdp=5 x tensor=1 "):
        shardings(make_mesh(1, 5, 1), verbalizer.abstract_params())


def test_mesh_sizes():
    assert dict(make_mesh(-1, 2, 2).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert make_mesh(1, 1, 1).size == 1
    for sizes in ((3, 3, 1), (-1, -1, 1), (0, 1, 1), (-1, 16, 1)):
        with pytest.raises(ValueError, match="mesh"):
            make_mesh(*sizes)


def test_relayout_casts_and_replicates_over_fsdp(verbalizer, params):
    mesh = make_mesh(1, 4, 2)
    boxed = verbalizer.abstract_params()
    placed = jax.device_put(params, shardings(mesh, boxed))
    out = relayout(mesh, boxed, np.dtype("bfloat16"), DECODE)(placed)
    shape = lambda x: x.sharding.shard_shape(x.shape)
    assert shape(placed["blocks"]["up"]["kernel"]) == (3, 4, 48)
    assert shape(out["blocks"]["up"]["kernel"]) == (3, 32, 24)
    kept = lambda path: path[-1].key == "scale"  # what norms multiply by before they cast
    dtypes = {kept(path): x.dtype for path, x in jax.tree_util.tree_leaves_with_path(out)}
    assert dtypes == {True: np.float32, False: np.dtype("bfloat16")}


@pytest.mark.parametrize("sizes, moved", [((8, 1, 1), set()), ((2, 2, 2), {"all-to-all"})])
def test_an_embedding_is_looked_up_where_the_table_lies(model, params, sizes, moved):
    """Copies of the table look up their own rows; where its width is cut, what was found goes to the rows' devices."""
    mesh = make_mesh(*sizes)
    place = shardings(mesh, abstract_params(TINY))
    tokens = np.arange(16 * 4, dtype=np.int32).reshape(16, 4)
    with jax.set_mesh(mesh):
        embed = jax.jit(lambda params, tokens: model.apply({"params": params}, tokens, method="embed"))
        text = embed.lower(jax.device_put(params, place), place_batch(mesh, tokens)).compile().as_text()
    found = re.findall(rf"= \(?(\w+)\[\S*.*? ({COLLECTIVES})\(", text)
    assert {kind for dtype, kind in found if dtype == "f32"} == moved and (moved or not found), found


def test_batches_that_do_not_divide_are_replicated():
    mesh = make_mesh(2, 2, 2)
    placed = place_batch(mesh, {"even": np.arange(8), "odd": np.arange(7), "scalar": np.float32(1)})
    shape = lambda x: x.sharding.shard_shape(x.shape)
    assert (shape(placed["even"]), shape(placed["odd"]), shape(placed["scalar"])) == ((1,), (7,), ())
    assert np.array_equal(placed["even"], np.arange(8))
