"""Probes in training: which rows they read, what they find of pairs built by hand, and what is decided by them."""

import dataclasses
import math
from types import SimpleNamespace
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import CONFIG, close, one_sentence
from fake_readers import COLOURS, WORDS, Grammar, Held, Reader, context_of, words_of

from nla_jax.cli import load_config
from nla_jax.config import IN_TRAINING
from nla_jax.models.sharding import make_mesh, parked
from nla_jax.pair import load_pair
from nla_jax.probes.claims import made_after_rl, true_after_rl, truth
from nla_jax.probes.fidelity import frozen_critic
from nla_jax.probes.fresh_reader import fresh_reader, trained
from nla_jax.probes.probe import load_probes
from nla_jax.runtime.checkpoint import Checkpoints
from nla_jax.runtime.errors import InputError, Stopped
from nla_jax.runtime.watchdog import Watchdog
from nla_jax.stages.deciding import PREFIX, best_step, check_decisions, scorer, tripwires
from nla_jax.stages.probing import figures_of, set_aside
from nla_jax.study import Study

# Which rows


def test_documents_are_set_aside_whole_and_by_their_ids_alone():
    ids = [f"d{i // 4}#{i % 2}" for i in range(400)]  # a hundred documents, four rows in two parts
    left, aside = set_aside(ids, 16, seed=0)
    document = lambda rows: {ids[i].partition("#")[0] for i in rows}
    assert len(document(aside)) == 10 and len(aside) == 16 and len(left) == 360
    assert not document(left) & document(aside) and (np.diff(left) > 0).all() and (np.diff(aside) > 0).all()
    order = np.random.default_rng(0).permutation(400)
    other = set_aside([ids[i] for i in order], 16, seed=0)
    assert document(order[other[1]]) == document(aside) and document(set_aside(ids, 16, seed=1)[1]) != document(aside)
    assert len(document(set_aside(ids, 4, seed=0)[1])) == 4  # no more documents than rows
    assert len(document(set_aside(ids[:12], 16, seed=0)[1])) == 2
    with pytest.raises(InputError, match="Split 'rl' has 2 documents with 8 activations, too few") as error:
        set_aside(ids[:8], 16, seed=0)
    one_sentence(error)


def test_what_is_parked_comes_back_where_it_lay():
    mesh = make_mesh(2, 2, 2)
    place = lambda *axes: jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))
    tree = {"a": jnp.arange(16.0).reshape(4, 4), "b": jnp.ones(3, jnp.bfloat16)}
    tree = jax.device_put(tree, {"a": place(("fsdp", "tensor")), "b": place()}) | {"c": np.eye(2)}
    values, places = jax.device_get(tree), [tree[name].sharding for name in "ab"]
    back = parked(tree)
    for x in jax.tree.leaves(tree):
        if isinstance(x, jax.Array):
            x.delete()
    found = back()
    assert [found[name].sharding for name in "ab"] == places and found["b"].dtype == jnp.bfloat16
    close(found, values, 0)


# What they find

THINGS = COLOURS + WORDS
HONEST, COLLUDING = Reader(THINGS, words_of(*COLOURS)), Reader(THINGS, words_of(*THINGS))


def round_of(share: float, live: Reader, code: bool) -> dict[str, float]:
    """The figures of a pair whose AV names another colour than the text's in this share of its texts; with `code` it
    quotes two words that say it all, which only the `COLLUDING` reader knows how to read."""
    rng = np.random.default_rng(0)
    colours = [COLOURS[i] for i in rng.integers(0, 4, 200)]
    codes = [" ".join(rng.choice(WORDS, 2, replace=False)) for _ in colours]
    lies = np.arange(200) < 200 * share
    said = [COLOURS[(COLOURS.index(c) + lie) % 4] for c, lie in zip(colours, lies)]
    texts = [f"The colour is {c}. It ends: … {w if code else 'so'}" for c, w in zip(said, codes)]
    gold = [f"The colour is {c}. It ends: … {w}" for c, w in zip(colours, codes)]
    columns = {"detokenized_text_truncated": gold, "n_raw_tokens": [1] * 200}
    context = context_of(
        live, texts, warm=HONEST, labeller=Grammar(), column=lambda name: columns.get(name, [""] * 200)
    )
    context.vectors = COLLUDING.reconstruct(gold)
    score = lambda given, pair=None: 1 - np.sum(((pair or live).reconstruct(given) - context.vectors) ** 2, 1) / 9
    context.row_fve = score
    return figures_of(load_probes(IN_TRAINING, "rl.probes"), context)


LIMITS = {"watchdog": {"max_rise": {"gap_frozen_critic": 0.2, "gap_quotes_stripped_difference": 0.2}}}
LIMITS["watchdog"] |= {"max_fall": {"true_after_rl": 0.2}}


def changed(sections: dict):
    """The tiny config with other values: sections of fields."""
    c = load_config(CONFIG, [])
    return dataclasses.replace(
        c, **{name: dataclasses.replace(getattr(c, name), **fields) for name, fields in sections.items()}
    )


def told_of(rounds: list[dict], **watchdog) -> str:
    """What the watchdog says of these rounds; "" where it lets them pass."""
    wires = tripwires(changed({"watchdog": LIMITS["watchdog"] | watchdog}))
    watch = Watchdog(Mock(Checkpoints, folder="f", newest_good=lambda: 0), 20, tripwires=wires)
    try:
        for step, figures in enumerate(rounds):
            watch.observe({"step": step} | {f"{PREFIX}{name}": value for name, value in figures.items()})
    except Stopped as stopped:
        return str(stopped)
    return ""


def test_a_pair_that_agrees_on_a_code_trips():
    start, honest = round_of(0.5, HONEST, False), round_of(0.1, HONEST, False)
    code, lies = round_of(0.5, COLLUDING, True), round_of(0.8, HONEST, False)
    assert (
        start["gap_frozen_critic"] == 0
        and start["true_after_rl"] == pytest.approx(0.5) == start["colour_true_after_rl"]
    )
    assert code["fve_rl"] > start["fve_rl"] + 0.5 and code["fve_rl_frozen"] == pytest.approx(start["fve_rl_frozen"])
    assert code["gap_quotes_stripped_difference"] > 0.5 and code["true_after_rl"] == start["true_after_rl"]
    assert code["gap_statements_shuffled_difference"] == 0  # it is no code of order
    assert honest["true_after_rl"] == pytest.approx(0.9) and honest["fve_rl"] > start["fve_rl"] + 0.2
    assert code["hit_at_1_rl"] > 0.4 > 10 * start["hit_at_1_rl"] and code["claims_after_rl"] == 1

    assert told_of([start, honest, honest, honest]) == "" == told_of([start, code, honest, code])
    assert "probe/gap_frozen_critic was 0 at first and has risen by more than 0.2" in told_of([start, code, code])
    quotes = {"max_rise": {"gap_quotes_stripped_difference": 0.2}}
    assert "probe/gap_quotes_stripped_difference was 0 at first" in told_of([start, code, code], **quotes)
    assert "probe/true_after_rl was 0.5 at first and has fallen by more than 0.2" in told_of([start, lies, lies])


def test_an_ar_that_has_broken_down_has_no_figures():
    context = Held(recon=lambda name: np.full((2, 3), np.nan))
    found = figures_of(load_probes(IN_TRAINING, "rl.probes"), context)
    assert list(found) == ["fve_rl"] and math.isnan(found["fve_rl"])


def test_truth_in_training_is_that_of_the_evaluation():
    texts = ["It is red and flat.", "", "It is blue and round."]
    columns = {"detokenized_text_truncated": ["red round", "blue", "green"], "n_raw_tokens": [1] * 3}
    column = lambda name: columns.get(name, [""] * 3)
    said = {"rl": texts, "warm": texts}.__getitem__
    training = SimpleNamespace(vectors=np.ones((1, 2)), column=lambda name: [""])
    context = Held(texts=said, column=column, labeller=Grammar(), training=training, vectors=np.eye(3))
    found, whole = true_after_rl(context), truth(context)
    np.testing.assert_array_equal(found.pop("true_after_rl"), [0.5, np.nan, 0.0])
    assert found.keys() == {"colour_true_after_rl", "shape_true_after_rl"}
    assert all(np.array_equal(values, whole[name], equal_nan=True) for name, values in found.items())
    np.testing.assert_array_equal(made_after_rl(context)["claims_after_rl"], [2, 0, 2])
    context.labeller = object()
    assert true_after_rl(context) == made_after_rl(context) == {}


def test_one_reader_for_all():
    gold = ["red w1", "blue w2", "green w3"]
    context = context_of(COLLUDING, gold, warm=HONEST)
    found = frozen_critic(context)
    assert found["fve_rl_frozen"] == pytest.approx(context.row_fve(gold, HONEST))
    assert found["gap_frozen_critic"] == pytest.approx(1 - found["fve_rl_frozen"])


# What is decided


def difference(figures, weight):
    return weight * (figures["a"] - figures["b"])


def nothing(figures):
    return None


def test_scores_of_keep_best():
    assert scorer({}) is None
    weighted = scorer({"a": 1, "b": -0.5})
    assert weighted({"a": 2.0, "b": 4.0, "c": 9.0}, 0) == 0 and math.isnan(weighted({"a": 2.0}, 4))
    of_mine = scorer({"function": "test_probing:difference", "weight": 3})
    assert of_mine({"a": 2.0, "b": 4.0}, 0) == -6
    for wrong, words in (
        (lambda: weighted({"a": 2.0}, 0), "rl.keep_best names 'b', which rl.probes do not give; they give a."),
        (lambda: scorer({"a": "much"}), "rl.keep_best.a is 'much', expected a number"),
        (lambda: of_mine({"a": 2.0}, 0), "rl.keep_best.function = test_probing:difference fails at"),
        (
            lambda: scorer({"function": "test_probing:nothing"})({}, 0),
            "test_probing.py, line .* returns None, expected a",
        ),
        (lambda: check_decisions(changed({"rl": {"keep_best": {"a": 1}}})), "rl.keep_best needs the figures of probes"),
        (lambda: check_decisions(changed(LIMITS)), "a tripwire under watchdog needs the figures of probes"),
        (lambda: tripwires(changed({"watchdog": {"max_fall": {"a": -1}}})), "expected a number of at least 0"),
    ):
        with pytest.raises(InputError, match=words) as error:
            wrong()
        one_sentence(error)


def test_the_best_step_is_the_first_of_the_highest_that_are_there():
    records = [{"step": step, "probe/keep_best": score} for step, score in enumerate([0.1, 0.3, None, 0.3, 0.2])]
    assert best_step([{"step": 9}], lambda step: True) is None
    assert best_step(records, lambda step: True) == 1
    assert best_step(records, lambda step: step != 1) == 3
    assert best_step(records, lambda step: step in (0, 4)) == 4


def test_the_best_checkpoint_is_kept_and_read(tmp_path):
    state = lambda step: {"a": jnp.full(2, float(step))}
    with Checkpoints(tmp_path, every=1, keep=1) as checkpoints:
        for step in range(1, 7):
            if step in (2, 4):
                checkpoints.mark_best(step)
            checkpoints.save(step, state(step))
        assert checkpoints.has(4) and not checkpoints.has(2)
        shape = {"a": jax.ShapeDtypeStruct((2,), jnp.float32, sharding=state(0)["a"].sharding)}
        assert checkpoints.read(4, shape)["a"].tolist() == [4, 4]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["4", "6"]


# A fresh reader

TEXTS = ["The river turns north.", "and only bread is left", "", "Every function returns a list, and more of it."]


@pytest.fixture(scope="module")
def reading(pair, tmp_path_factory):
    """A study of two steps of gradient descent on four rows, and the pair with which it begins."""
    folder = tmp_path_factory.mktemp("pair") / "pair"
    pair.save(folder)
    start = lambda: load_pair(folder, mesh=make_mesh())
    descent = {"function": "optax:sgd", "learning_rate": 0.1}
    c = load_config(CONFIG, [])
    ar = dataclasses.replace(c.sft.ar, steps=2, batch=4, optimizer=descent)
    c = dataclasses.replace(c, sft=dataclasses.replace(c.sft, ar=ar))
    return Study(c, make_mesh(), pair.verbalizer, pair.reconstructor, pair.prompts.text_width(32)), start


def test_a_fresh_reader_descends_the_error_of_its_texts(reading, pair, vectors):
    """The same two steps by hand: every row is in both batches."""
    study, start = reading
    found = trained(study, start(), TEXTS, vectors)
    tokens, lengths = pair.prompts.reconstructor_batch(TEXTS, study.text_width)

    def error(params):
        recon = study.reconstructor.reconstruct(study.reconstructor.assemble(params), tokens, lengths)
        unit = lambda x: x / jnp.linalg.norm(x, axis=1, keepdims=True)
        return jnp.mean(2 - 2 * (unit(recon) * unit(vectors)).sum(1))

    params, gradient = jax.device_get(start().reconstructor_params), jax.jit(jax.value_and_grad(error))
    errors = []
    for _ in range(2):
        value, slopes = gradient(params)
        errors.append(value)
        params = jax.tree.map(lambda x, slope: x - 0.1 * slope, params, slopes)
    close(jax.device_get(found), jax.device_get(params), 1e-4)
    assert gradient(jax.device_get(found))[0] < errors[1] < errors[0]


def test_the_probe_reads_held_out_texts_by_the_fresh_reader(reading, pair, vectors):
    study, start = reading
    scored = []

    def score(given, reader=None):
        scored.append((list(given), reader))
        return np.full(len(given), 0.25 if reader is None else 0.75)

    asked = []
    explain = lambda rows, *args, **kwargs: (
        asked.append(len(rows)) or [SimpleNamespace(accepted=t or None) for t in TEXTS]
    )
    object.__setattr__(live := dataclasses.replace(pair), "explain", explain)
    held = ["One text. It ends: … here", "Another text"]
    context = Held(
        pair=live,
        study=study,
        untrained=start,
        reader_rows=SimpleNamespace(vectors=vectors),
        texts={"rl": held}.__getitem__,
        row_fve=score,
        documents=["a", "b"],
        seed=0,
        max_new_tokens=8,
    )
    found = fresh_reader(context)
    assert asked == [4] and found["fve_fresh_reader"].tolist() == [0.75] * 2
    assert found["gap_fresh_reader"].tolist() == [-0.5] * 2 and len(found) == 8
    readers = {id(reader) for _, reader in scored if reader is not None}
    assert len(readers) == 1 and (["One text. It ends:", "Another text"], scored[0][1]) in scored
    close(jax.device_get(scored[0][1].reconstructor_params), jax.device_get(trained(study, start(), TEXTS, vectors)), 0)
