"""Every mesh computes the same, and the decode loop gathers no weights."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import TINY, close, one_sentence, random_params

import nla_jax.pair
from nla_jax.config import Config, Prompts, Rl, Subject
from nla_jax.fve import fve
from nla_jax.joint_step import JointBatch, SupervisedStep
from nla_jax.models.lora import Lora
from nla_jax.models.sharding import (
    DECODE,
    TRAIN,
    make_mesh,
    place_batch,
    placed,
    relayout,
    shardings,
    state_shapes,
)
from nla_jax.models.transformer import Transformer, abstract_params
from nla_jax.objective import muon
from nla_jax.pair import Pair, new_pair
from nla_jax.runtime.compiler import compilations, first_state
from nla_jax.sampling import decoding_layout, rollout
from nla_jax.stages.heldout import explained, fve_of
from nla_jax.study import Study

A, G, R, T = 8, 2, 4, 8
STEPS = 3
COLLECTIVES = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
MESHES = [(1, 1, 1), (8, 1, 1), (1, 8, 1), (2, 2, 2)]


def centred(rewards):
    """An advantage without a division by the spread of near-equal rewards, which would be noise."""
    return rewards - rewards.mean(1, keepdims=True)


# Well-conditioned, so that float32's rounding stays rounding: with Adam's usual eps a gradient of nearly 0 moves its
# weight by ± the learning rate.
OPTIMIZER = {"function": "nla_jax.objective:adamw", "lr": 1e-3, "warmup": 1, "eps": 1e-4}
CONFIG = Config(
    subject=Subject(layer=1),
    prompts=Prompts(max_new_tokens=R),
    rl=Rl(
        steps=STEPS,
        activations=A,
        group=G,
        reward="nla_jax.objective:contrastive",  # which reads the activations on all devices
        advantage="test_sharding:centred",
        kl_coefficient=0.1,
        av_optimizer=OPTIMIZER,
        ar_optimizer=OPTIMIZER,
    ),
)


@pytest.fixture(scope="module")
def study(verbalizer, reconstructor):
    """The study of the tiny pair on a mesh of these sizes."""
    return functools.cache(lambda *sizes: Study(CONFIG, make_mesh(*sizes), verbalizer, reconstructor, T))


def moments(state) -> jax.Array:
    """Adam's first moments of the AV's query projections."""
    leaves = jax.tree_util.tree_leaves_with_path(state.models["verbalizer"].opt)
    names = {jax.tree_util.keystr(path): x for path, x in leaves}
    (found,) = [x for name, x in names.items() if ".mu[" in name and "['q']['kernel']" in name]
    return found


@pytest.fixture(scope="module")
def train(study, params, pair):
    """Three rollouts and joint steps on a mesh, as `nla_jax/stages/rl.py` makes them, with made-up texts.

    Returns of every step the sampled tokens, metrics and scores; the trained parameters; how many programs each joint
    step compiled; and what the programs were called with."""

    @functools.cache
    def train(*sizes):
        s, rng, history, compiles = study(*sizes), np.random.default_rng(0), [], []
        with jax.set_mesh(s.mesh):
            state = s.init(*jax.tree.map(np.array, (params, pair.reconstructor_params)))  # copies: they are consumed
            for array in (state.models["verbalizer"].params["blocks"]["q"]["kernel"], moments(state)):
                assert array.sharding.shard_shape(array.shape) == (3, 32 // (sizes[1] * sizes[2]), 4, 8)
            frozen, to_decoding, step = s.frozen(random_params(TINY, 7), None), s.decoding(None), s.joint_program
            for i in range(STEPS):
                vectors = place_batch(s.mesh, rng.normal(size=(A, TINY.width)).astype(np.float32))
                sampler = to_decoding(state.models["verbalizer"].params)
                key = jax.random.fold_in(jax.random.key(0), i)
                (sampled,) = s.sample(sampler, [vectors], key)
                made_up = {
                    "valid": rng.random(A * G) < 0.8,
                    "texts": rng.integers(4, TINY.vocab_size, (A * G, T)).astype(np.int32),
                    "text_lengths": rng.integers(1, T + 1, A * G).astype(np.int32),
                }
                batch = JointBatch(
                    vectors=vectors,
                    responses=sampled.tokens,
                    response_mask=sampled.mask,
                    sampler_logprobs=sampled.logprobs,
                    finished=sampled.finished,
                    **place_batch(s.mesh, made_up),
                )
                arguments = {
                    "relayout": (state.models["verbalizer"].params,),
                    "rollout": (sampler, vectors, key),
                    "joint_step": (state, frozen, batch),
                }
                called = jax.tree.map(described, arguments)
                tokens = np.asarray(sampled.tokens)
                with compilations() as compiled:
                    state, metrics, samples = step(state, frozen, batch)
                compiles.append(len(compiled))
                history.append((tokens, jax.device_get(metrics), jax.device_get(samples)))
            trained = jax.device_get({name: model.params for name, model in state.models.items()})
        return history, trained, compiles, called

    return train


def described(x) -> tuple:
    """What a program knows of an argument before it runs: shape, dtype, and the shape of each device's part."""
    return x.shape, str(x.dtype), x.sharding.shard_shape(x.shape)


@pytest.mark.parametrize("sizes", MESHES[1:], ids=lambda s: "x".join(map(str, s)))
def test_meshes_agree(train, sizes):
    expected, params, *_ = train(1, 1, 1)
    history, found, compiles, _ = train(*sizes)
    for (tokens, metrics, samples), (expected_tokens, expected_metrics, expected_samples) in zip(
        history, expected, strict=True
    ):
        assert np.array_equal(tokens, expected_tokens)
        assert max(metrics.pop(f"logprob_gap_{name}") for name in ("max", "p99", "mean")) < 1e-4
        close(metrics, {name: expected_metrics[name] for name in metrics}, 1e-5)
        close(samples, expected_samples, 1e-5)
    close(found, params, 1e-5)
    assert compiles == [1, 0, 0]


@pytest.mark.parametrize("sizes", MESHES, ids=lambda s: "x".join(map(str, s)))
def test_what_is_planned_is_what_is_executed(study, train, sizes):
    """The shapes, dtypes and places that a study's programs announce are those of the arrays that training passes."""
    programs, called = study(*sizes).programs(), train(*sizes)[3]
    planned = {name: programs[name].arguments for name in called}
    verbalizer, *arrays, first_row = planned["rollout"]
    assert (verbalizer, first_row) == (study(*sizes).verbalizer, 0)
    planned["rollout"] = tuple(arrays)
    for name, arguments in planned.items():
        assert jax.tree.map(described, arguments) == called[name], name


MASKED = lambda params: jax.tree.map(lambda x: x.ndim > 2, params)
OTHERS = {  # their states are not shaped like the parameters, or only in part
    "adafactor": optax.adafactor(1e-2, min_dim_size_to_factor=8),
    "masked": optax.chain(optax.masked(optax.trace(0.9), MASKED), optax.sgd(1e-2)),
    "partition": optax.partition(
        {"still": optax.set_to_zero(), "moving": optax.adam(1e-2, eps=1e-4)},
        lambda params: {name: "still" if name == "embedding" else "moving" for name in params},
    ),
    "muon": muon(2, 1e-2, adam_share=1.0, eps=1e-4),
    "novograd": optax.novograd(1e-2, eps=1e-4),
}


@pytest.mark.parametrize("name", OTHERS)
def test_optimizers_of_any_state_train_on_meshes(params, name):
    """Two steps on 2 x 2 x 2 devices equal those without a mesh, and the state lies where it is planned to."""
    model, ids = Transformer(TINY), np.random.default_rng(0).integers(5, TINY.vocab_size, (8, 12))
    logits = lambda params, batch: model.apply({"params": params}, batch, method="next_token_logits")
    loss = lambda params, batch, base: (jnp.mean(logits(params, batch) ** 2), {})
    step, mesh = SupervisedStep("model", loss, OTHERS[name]), make_mesh(2, 2, 2)
    expected, plan = step.init(params), placed(mesh, state_shapes(step.init, abstract_params(TINY)))
    with jax.set_mesh(mesh):
        state = first_state(step, mesh, abstract_params(TINY), params)
        assert jax.tree.map(described, state) == jax.tree.map(described, plan)
        for _ in range(2):
            state, _ = jax.jit(step)(state, place_batch(mesh, ids))
    for _ in range(2):
        expected, _ = jax.jit(step)(expected, ids)
    close(jax.device_get(state), jax.device_get(expected), 1e-4)
    assert not np.array_equal(expected.models["model"].params["blocks"]["q"]["kernel"], params["blocks"]["q"]["kernel"])


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


@pytest.mark.parametrize("sizes, found", [((1, 8, 1), set()), ((2, 2, 2), {"all-reduce"})])
def test_the_studys_rollout_gathers_nothing(study, sizes, found):
    program = study(*sizes).programs()["rollout"]
    with jax.set_mesh(program.mesh):
        assert collectives(program.function.lower(*program.arguments, **program.options).compile()) == found


@pytest.mark.parametrize("rules", [DECODE, TRAIN], ids=["decode", "train"])
def test_the_decode_loop_communicates_nothing(verbalizer, params, vectors, rules):
    """Under the decoding layout. Under the training layout (the control) every token waits for other devices."""
    found = collectives_in_loops(make_mesh(1, 8, 1), verbalizer, params, vectors, rules)
    assert bool(found) == (rules is TRAIN), found


@pytest.mark.parametrize("options", [{}, {"temperature": 0.0}], ids=["plain", "greedy"])
def test_a_decode_loop_over_tensor_gathers_nothing(verbalizer, params, vectors, options):
    """Devices that share a row add up what each made of its weights, and never show each other logits or weights."""
    assert collectives_in_loops(make_mesh(2, 2, 2), verbalizer, params, vectors, **options) == {"all-reduce"}


@pytest.fixture(params=["whole", "adapters"])
def any_pair(request, pair, subject_folder, sidecar) -> Pair:
    """A pair that writes texts; one of adapters on one frozen base."""
    if request.param == "whole":
        return pair
    made = new_pair(sidecar, subject_folder, adapters=(Lora(4, 6.0), Lora(3, 5.0)))
    rng = np.random.default_rng(0)
    lively = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32) * 0.2, made.verbalizer_params)
    return dataclasses.replace(made, verbalizer_params=lively, base=pair.verbalizer_params)


def test_a_pair_decodes_from_a_copy_made_once(any_pair, monkeypatch):
    """Texts and held-out FVE on a mesh are those of one device, and the copy serves all batches."""
    programs, copies = [], []
    vectors = np.random.default_rng(3).normal(size=(66, TINY.width)).astype(np.float32)  # more than a batch
    texts = any_pair.verbalize(vectors, 12)
    accepted = [found.accepted or "" for found in any_pair.explain(vectors, 12)]  # what training would read
    expected = fve(any_pair.reconstruct(accepted), vectors)
    assert len({text for text in texts if text}) > 3

    def compiled_once(verbalizer, *args, **options):
        """The program of the first call for all calls: it takes no arguments that lie elsewhere."""
        programs.append(programs[0] if programs else rollout.lower(verbalizer, *args, **options).compile())
        return programs[-1](*args)

    monkeypatch.setattr(nla_jax.pair, "rollout", compiled_once)

    def counted(*args):
        """`decoding_layout`, whose copies are counted."""
        copy = decoding_layout(*args)
        return lambda params: copies.append(params) or copy(params)

    monkeypatch.setattr(nla_jax.pair, "decoding_layout", counted)
    mesh = make_mesh(2, 2, 2)
    av, ar = any_pair.verbalizer.abstract_params(), any_pair.reconstructor.abstract_params()
    place = lambda params, boxed: jax.device_put(params, shardings(mesh, boxed))
    with jax.set_mesh(mesh):
        placed = dataclasses.replace(
            any_pair,
            verbalizer_params=place(any_pair.verbalizer_params, av),
            reconstructor_params=place(any_pair.reconstructor_params, ar),
            base=any_pair.base and place(any_pair.base, abstract_params(TINY)),
            mesh=mesh,
        )
    config = Config(prompts=Prompts(max_new_tokens=12), rl=Rl(heldout_temperature=1.0))
    assert placed.verbalize(vectors, 12) == texts
    assert fve_of(placed, explained(config, placed, vectors), vectors) == pytest.approx(expected, abs=1e-5)
    assert len(copies) == 1 and len(programs) == 4 and collectives(programs[0]) == {"all-reduce"}


@pytest.mark.parametrize("tied", [False, True])
def test_a_vocabulary_that_does_not_divide_is_padded_for_decoding(verbalizer, vectors, tied):
    """Only there: training, checkpoints and saved models keep the tokenizer's size. What is sampled stays the same."""
    config = dataclasses.replace(TINY, vocab_size=317, tied_head=tied)
    verbalizer = dataclasses.replace(verbalizer, model=Transformer(config))
    params, mesh = random_params(config), make_mesh(1, 4, 2)
    options = {"group": 4, "max_new_tokens": 12}
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
