"""A pair that reads several layers: one slot for each, one text for all, and an AR that rebuilds them side by side."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import LOOP, SENTENCES, TINY, close, nla_main, one_sentence

import nla_jax as nla
from nla_jax.autoencoder import Injection, autoencoder, residual
from nla_jax.cli import main
from nla_jax.config import read
from nla_jax.data.rows import Rows, load_rows
from nla_jax.fve import joined, lengths, mse, normalise, row_fve, variance
from nla_jax.io.folders import read_config
from nla_jax.io.parquet import write_table
from nla_jax.labels.extractive import Extractive
from nla_jax.models.sharding import host_mesh, make_mesh
from nla_jax.models.transformer import Transformer, truncate
from nla_jax.models.views import with_layers
from nla_jax.pair import new_pair
from nla_jax.probes.evidence import evidence
from nla_jax.prompts import find_marker
from nla_jax.runtime.errors import InputError
from nla_jax.runtime.notes import note
from nla_jax.stages.extract import say_sinks
from nla_jax.steering import steer_along

TEMPLATE = "Explain these: {injection_char}, {injection_char}"
SEVERAL = (
    "--config.subject.layer=2",
    "--config.subject.earlier_layers=(0,)",
    f"--config.prompts.verbalizer_template={TEMPLATE}",
)
ADAPTED = (
    "--config.sft.av.lora.rank=4",
    "--config.sft.ar.lora.rank=4",
    "--config.rl.subject_kl=True",
    "--config.rl.reward=nla_jax.objective:downstream",
)


@pytest.fixture(scope="module")
def subject(subject_folder):
    return nla.load_subject(subject_folder, 2, earlier=(0,))


@pytest.fixture(scope="module")
def acts(subject):
    return nla.extract(subject, SENTENCES, positions=[-3, -1])


@pytest.fixture(scope="module")
def several(sidecar, subject_folder, tokenizer, pair):
    """A pair of the layers 0 and 2 that writes explanations, and whose head is not the identity."""
    facts = {"marker": find_marker(tokenizer, TEMPLATE), "verbalizer_template": TEMPLATE}
    new = new_pair(dataclasses.replace(sidecar, layer=2, earlier_layers=(0,), **facts), subject_folder)
    head = np.random.default_rng(1).normal(size=(TINY.width, 2 * TINY.width)).astype(np.float32)
    params = new.reconstructor_params | {"head": head}
    return dataclasses.replace(new, verbalizer_params=pair.verbalizer_params, reconstructor_params=params)


@pytest.mark.torch
def test_the_streams_are_those_of_torch(subject, acts, subject_folder):
    """After blocks 0 and 2 side by side, raw; `hidden_states[2 + 1]` would have the final norm, so the block is hooked."""
    import torch
    from transformers import AutoModelForCausalLM

    theirs, kept = AutoModelForCausalLM.from_pretrained(subject_folder, dtype=torch.float32), {}
    for block in (0, 2):
        keep = lambda _, __, out, block=block: kept.update({block: out[0] if isinstance(out, tuple) else out})
        theirs.model.layers[block].register_forward_hook(keep)
    assert acts.vectors.shape == (8, 2 * TINY.width) and acts.layers == subject.layers == (0, 2)
    for i, ids in enumerate(acts.token_ids):
        with torch.no_grad():
            theirs(torch.tensor([ids]))
        expected = np.concatenate([kept[block].reshape(len(ids), -1)[-1].numpy() for block in (0, 2)])
        np.testing.assert_allclose(acts.vectors[i], expected, rtol=0, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize(
    "changes, tolerance",
    [
        ({}, 1e-6),
        ({"remat": "nothing_saveable"}, 1e-6),
        ({"window": 3, "local": (True, False, True)}, 1e-6),
        ({"dtype": jnp.bfloat16}, 2e-2),
    ],
)
def test_streams_are_those_of_the_blocks_up_to_each(params, changes, tolerance):
    """By a model cut there, with parameters stacked and (as CPUs read them) apart."""
    config = dataclasses.replace(TINY, **changes)
    tokens = np.random.default_rng(0).integers(4, config.vocab_size, (3, 20)).astype(np.int32)
    whole = jax.tree.map(jnp.asarray, truncate(params, 3))
    for given in (whole, with_layers(whole)):
        found = np.split(residual(Transformer(config), given, tokens, (0, 1)), 3, axis=-1)
        for i, stream in enumerate(found):
            expected = np.asarray(residual(Transformer(config.truncated(i + 1)), truncate(params, i + 1), tokens))
            np.testing.assert_allclose(stream, expected, rtol=0, atol=tolerance * np.abs(expected).max())


def test_on_a_mesh_they_are_the_same(subject_folder, acts):
    many = nla.load_subject(subject_folder, 2, mesh=host_mesh(make_mesh(2, 2, 2)), earlier=(0,))
    found = nla.extract(many, SENTENCES, positions=[-3, -1]).vectors
    np.testing.assert_allclose(found, acts.vectors, rtol=0, atol=1e-5 * np.abs(acts.vectors).max())


def test_each_layer_counts_the_same(acts):
    """`joined` brings each layer to length sqrt(D), whatever its own; the score is then the mean of the layers'."""
    raw = acts.vectors.astype(np.float64) * np.repeat([1.0, 50.0], TINY.width)
    both = joined(raw, 2)
    for layer in np.split(both, 2, axis=1):
        np.testing.assert_allclose(np.linalg.norm(layer, axis=1), TINY.width**0.5, rtol=1e-12)
    np.testing.assert_allclose(normalise(both), both, rtol=1e-12)
    np.testing.assert_allclose(joined(acts.vectors.astype(np.float64), 2), both, rtol=1e-9)
    other = joined(np.random.default_rng(0).normal(size=both.shape), 2)
    halves = zip(np.split(other, 2, axis=1), np.split(both, 2, axis=1))
    np.testing.assert_allclose(mse(other, both), np.mean([mse(*half) for half in halves], axis=0), rtol=1e-9)
    assert joined(raw, 1) is raw


def test_each_slot_gets_the_activation_of_its_layer(several, acts):
    """The AV's states are those of a pair of one layer whose slots are given one by one, and the order counts."""
    vectors = joined(acts.vectors, 2)
    read = jax.jit(several.verbalizer.read_prompt)
    _, together = read(several.verbalizer_params, vectors)
    _, by_slot = read(several.verbalizer_params, vectors.reshape(-1, 2, TINY.width))
    _, turned = read(several.verbalizer_params, vectors.reshape(-1, 2, TINY.width)[:, ::-1])
    np.testing.assert_array_equal(together, by_slot)
    assert np.abs(np.asarray(together) - np.asarray(turned)).max() > 1e-2
    other = vectors.copy()
    other[:, : TINY.width] = other[::-1, : TINY.width]
    assert np.abs(np.asarray(read(several.verbalizer_params, other)[1]) - np.asarray(together)).max() > 1e-3


def test_the_head_rebuilds_the_layers_side_by_side(several, subject_folder, sidecar):
    """It begins as the identity of each; the AR's state is that of a pair of the last layer alone."""
    texts = ["a river", "the market opens"]
    one = new_pair(dataclasses.replace(sidecar, layer=2), subject_folder)
    fresh = several.reconstructor.init_params(several.reconstructor_params["backbone"])
    twice = dataclasses.replace(several, reconstructor_params=fresh).reconstruct(texts)
    np.testing.assert_allclose(twice, np.tile(one.reconstruct(texts), 2), rtol=1e-5, atol=1e-5)
    expected = one.reconstruct(texts) @ several.reconstructor_params["head"]
    np.testing.assert_allclose(several.reconstruct(texts), expected, rtol=1e-3, atol=1e-4)


def test_a_saved_pair_says_its_layers(several, acts, tmp_path):
    several.save(tmp_path / "pair")
    again = nla.load_pair(tmp_path / "pair")
    assert (
        again.sidecar.layers == (0, 2) and "the layers 0 and 2" in repr(again) and "after blocks 0 and 2" in repr(acts)
    )
    close(again.reconstructor_params, several.reconstructor_params, 0)
    assert again.verbalize(acts, 12, 0.0) == several.verbalize(acts, 12, 0.0) == again.verbalize(acts.vectors, 12, 0.0)
    texts = ["a river"] * len(acts)
    expected = mse(again.reconstruct(texts).astype(np.float64), joined(acts.vectors, 2))
    np.testing.assert_allclose(again.score(texts, acts)["mse"], expected, rtol=1e-6)
    acts.save(tmp_path / "acts.parquet")
    loaded = nla.Activations.load(tmp_path / "acts.parquet")
    assert loaded.layers == acts.layers and np.array_equal(loaded.vectors, acts.vectors)


def test_probes_and_claims_count_each_layer_the_same(several, subject, acts):
    """By the formula, from what the public functions give; of no rows nothing is said."""
    found = nla.probe(several, subject, acts, ["nla_jax.probes.fidelity:after_rl"], max_new_tokens=12)
    texts = several.verbalize(acts, 12, 0.0)
    recon, gold = several.reconstruct(texts).astype(np.float64), joined(acts.vectors, 2)
    scores = found["after_rl"].rows
    np.testing.assert_allclose(scores["fve_rl"], 1 - mse(recon, gold) / variance(gold), atol=1e-5)
    for i, layer in enumerate(("fve_layer_0", "fve_layer_2")):
        halves = (np.split(x, 2, axis=1)[i] for x in (recon, acts.vectors))
        np.testing.assert_allclose(scores[layer], row_fve(*halves), atol=1e-5)
    said = ["Prose. It ends: … the mill"] * len(acts)
    for one in evidence(several, Extractive(), acts.vectors, said, [[]] * len(acts), [[]] * len(acts)):
        shortened = Extractive().without(said[0], one.claim)
        errors = [several.score([text], acts.vectors[[one.row]])["mse"][0] for text in (shortened, said[0])]
        assert one.ablation == pytest.approx(np.log(errors[0] / errors[1]), abs=1e-4)
    assert several.verbalize(acts[:0]) == [] and lengths(acts.vectors[:0], 2).shape == (0, 2)


def test_activations_of_other_layers_are_refused(several, acts, subject_folder, pair, tmp_path):
    with pytest.raises(
        InputError, match=r"of layer 1, the pair reads the layers 0 and 2: load_subject\(…, 2, earlier="
    ) as e:
        several.explain(nla.extract(nla.load_subject(subject_folder, 1), SENTENCES))
    one_sentence(e)
    with pytest.raises(InputError, match="of the layers 0 and 2, the pair reads layer 1"):
        pair.explain(acts)
    with pytest.raises(InputError, match="the pair reads layer 1"):
        acts.show(pair)
    with pytest.raises(InputError, match="The pair reads the layers 0 and 2, the subject gives layer 2"):
        nla.steer(nla.load_subject(subject_folder, 2), several, SENTENCES[0], ("a", "b"))
    for earlier in ((2,), (1, 0), (0, 0), (-1,)):
        with pytest.raises(InputError, match="earlier is .* it must be blocks before 2") as e:
            nla.load_subject(subject_folder, 2, earlier=earlier)
        one_sentence(e)
    several.save(tmp_path / "pair")
    for file in (tmp_path / "pair").glob("*/nla_meta.yaml"):
        text = file.read_text().replace("earlier_layers:\n  - 0", "earlier_layers:\n  - 5")
        assert "- 5" in text
        file.write_text("\n".join(line for line in text.splitlines() if not line.startswith("#")))
    with pytest.raises(InputError, match=r"earlier_layers is \[5\], expected blocks before the layer 2"):
        nla.load_pair(tmp_path / "pair")
    with pytest.raises(InputError, match="has 1 slots for the activations of 2 layers"):
        ids = dataclasses.replace(several.prompts.ids(), slots=(0,))
        autoencoder(TINY, 2, ids, 1.0, (Injection(),), earlier=(0,))


def test_steering_moves_the_state_after_the_last_block(several, subject, subject_folder):
    """The step is the last layer's part of what the AR makes of the edit: as of a pair whose head gives that alone."""
    text = "The river turns north"
    kept = several.reconstructor_params | {"head": several.reconstructor_params["head"][:, TINY.width :]}
    reconstructor = dataclasses.replace(several.reconstructor, layers=1)
    facts = dataclasses.replace(several.sidecar, earlier_layers=())
    last = dataclasses.replace(several, reconstructor=reconstructor, reconstructor_params=kept, sidecar=facts)
    options = {"explanation": "about a river", "strengths": [0.5], "new_tokens": 3}
    both = nla.steer(subject, several, text, ("river", "market"), paraphrase="of a river", **options)
    alone = steer_along(
        nla.load_subject(subject_folder, 2),
        text,
        {"edit": np.subtract(*last.reconstruct(["about a market", "about a river"]))},
        strengths=[0.5],
        new_tokens=3,
    )
    kl = {row.direction: row.kl for row in both.rows if row.strength == 0.5}
    assert (
        kl["edit"] == pytest.approx(next(row.kl for row in alone if row.strength == 0.5), rel=1e-3) and kl["edit"] > 0
    )
    assert kl["no edit"] == pytest.approx(0, abs=1e-6)


def test_a_sink_at_one_layer_is_said(acts, tmp_path, capsys):
    vectors = acts.vectors.copy()
    vectors[3, : TINY.width] *= 100
    (tmp_path / "activations").mkdir()
    table = dataclasses.replace(acts, vectors=vectors).table()
    write_table(table, tmp_path / "activations/rl-00000-of-00001.parquet")
    rows = load_rows(tmp_path, "rl")
    np.testing.assert_allclose(np.linalg.norm(rows.vectors, axis=1), (2 * TINY.width) ** 0.5, rtol=1e-5)
    np.testing.assert_allclose(rows.vectors, joined(vectors, 2), rtol=1e-5, atol=1e-6)
    assert say_sinks([rows], (0, 2)) == 1 and "after blocks 0 and 2 are attention sinks" in capsys.readouterr().err
    some = Rows(rows.vectors[[1, 3]], rows.shards, np.array([1, 3]))
    expected = np.linalg.norm(vectors.reshape(-1, 2, TINY.width)[[1, 3]], axis=-1)
    np.testing.assert_allclose(some.lengths(2), expected, rtol=1e-6)


def test_settings_that_do_not_go_together_are_said():
    settings = {"subject": {"layer": 2, "earlier_layers": [0]}}
    assert read(settings, "here").subject.earlier_layers == (0,)
    assert read({"subject": {"earlier_layers": 1}}, "here").subject.earlier_layers == (1,)
    for wrong, words in (
        ({"subject": {"layer": 2, "earlier_layers": (2,)}}, "they must be blocks before subject.layer"),
        ({"subject": {"layer": 2, "earlier_layers": (1, 0)}}, "ascending order"),
        ({"subject": {"earlier_layers": ("0",)}}, "expected a tuple of whole numbers"),
        (settings | {"extract": {"source": {"rl": "rl.parquet"}}}, "names activations of one layer"),
    ):
        with pytest.raises(InputError, match=words) as e:
            read(wrong, "here")
        one_sentence(e)


@pytest.mark.slow
@pytest.mark.whole_run
@pytest.mark.parametrize("kind", [(), ADAPTED], ids=["whole models", "adapters, and the subject's KL in the reward"])
def test_a_study_of_two_layers(corpus, tmp_path, capsys, kind):
    """From extraction to a report and a pair that `nla explain` reads; resumed at a checkpoint it ends in the same bits."""
    workdir, probes = tmp_path / "run", "('nla_jax.probes.fidelity:after_rl', 'nla_jax.probes.patching:recovery')"
    more = (*SEVERAL, *kind, f"--config.evaluate.probes={probes}")
    assert nla_main("quickstart", workdir, corpus, *more) == 0
    rows, scores = load_rows(workdir, "heldout"), json.loads((workdir / "summary.json").read_text())
    assert rows.vectors.shape[1] == 2 * read_config(workdir / "subject").width
    apart = np.mean([variance(part) for part in np.split(np.asarray(rows.vectors, np.float64), 2, axis=1)])
    assert variance(np.asarray(rows.vectors, np.float64)) == pytest.approx(apart, rel=1e-9)
    assert {"fve_rl", "fve_layer_0", "fve_layer_2"} <= scores.keys()
    assert scores["patch_recovery_h"] == pytest.approx(1, abs=1e-3)
    assert "after blocks 0 and 2" in (workdir / "report.html").read_text()
    sidecar = nla.load_pair(workdir / "pair").sidecar
    assert sidecar.layers == (0, 2) and len(sidecar.provenance["activation_norm"]) == 2
    capsys.readouterr()
    subject = str(workdir / "subject")
    command = ["explain", "--pair", str(workdir / "pair"), "--subject", subject, "--text", SENTENCES[0], "--json"]
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out)["token"] == "."
    note.cache_clear()
    assert main(["export", "--workdir", str(workdir), "--out", str(tmp_path / "out")]) == 0
    assert "The datasets are not written" in capsys.readouterr().err and not (tmp_path / "out/datasets").exists()
    assert "after blocks 0 and 2" in (tmp_path / "out/README.md").read_text()
    assert nla.load_pair(tmp_path / "out").sidecar.layers == (0, 2)
    written = lambda: {str(file): file.read_bytes() for file in (workdir / "pair").rglob("*.safetensors")}
    before = written()
    for stage in LOOP[LOOP.index("rl") :]:
        (workdir / "stages" / f"{stage}.json").unlink(missing_ok=True)
    for step in sorted((workdir / "train/rl").glob("[0-9]*"))[1:]:
        step.rename(tmp_path / step.name)
    assert nla_main("rl", workdir, corpus, *more) == 0
    assert len(before) > 1 and written() == before
