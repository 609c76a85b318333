"""The host's part of an RL step: what the AR reads of a rollout."""

import dataclasses

import numpy as np
import pyarrow as pa
import pytest
from conftest import CONFIG, SENTENCES, TINY

import nla_jax as nla
from nla_jax.cli import load_config
from nla_jax.data.batches import pad_tokens
from nla_jax.data.rows import Rows
from nla_jax.io.parquet import write_table
from nla_jax.labels.labeller import label_rows, make_labeller
from nla_jax.models.sharding import make_mesh, place_batch
from nla_jax.prompts import RESPONSE
from nla_jax.runtime.errors import InputError
from nla_jax.sampling import Rollout
from nla_jax.stages.reading import Reading
from nla_jax.study import Study


@pytest.mark.parametrize("missing", [0, 3])
def test_texts_that_the_ar_cannot_read_whole_are_counted(pair, missing):
    """Of four texts the longest has `missing` tokens more than the AR's input."""
    texts = [*SENTENCES[:3], SENTENCES[3] * 2]
    longest = max(map(len, pair.prompts.reconstructor_ids(texts)))
    config = load_config(CONFIG, ["--config.rl.activations=2", "--config.rl.group=2"])
    study = Study(config, make_mesh(1, 1, 1), pair.verbalizer, pair.reconstructor, longest - missing)
    vectors, sampled = np.zeros((2, TINY.width), np.float32), written(pair, texts)
    reading = Reading(study, pair, Rows(vectors, ()))
    batch = reading.read(*place_batch(study.mesh, (vectors, sampled)), np.arange(2), 0)
    assert batch.texts.shape == (4, longest - missing) and np.all(batch.valid)
    assert reading.cut_share() == (0.25 if missing else 0)
    assert reading.cut_share() == 0  # of the next step


@pytest.mark.parametrize("labeller", ["extractive:Extractive", "behaviour:Behaviour"])
def test_truth_is_the_share_of_claims_that_the_runs_labeller_finds_true(pair, subject_folder, tmp_path, labeller):
    """Each text is checked against its own row; one without claims earns nothing."""
    acts = nla.extract(nla.load_subject(subject_folder, 1), SENTENCES[:4])
    acts.save(file := tmp_path / "rl-00000-of-00001.parquet")
    settings = {"subject": str(subject_folder)} if "behaviour" in labeller else {}
    config = load_config(CONFIG, ["--config.rl.activations=2", "--config.rl.group=2", "--config.rl.truth=True"])
    label = dataclasses.replace(config.label, labeller=f"nla_jax.labels.{labeller}", settings=settings)
    study = Study(dataclasses.replace(config, label=label), make_mesh(1, 1, 1), pair.verbalizer, pair.reconstructor, 64)
    checker, at = make_labeller(label.labeller, settings).labeller, np.array([3, 1])
    data = Rows(acts.vectors, (file,))
    rows = label_rows(data.column)
    own, other = checker.label([rows[3], rows[1]])
    texts = [own, other, "Nothing of that kind", other]
    reading = Reading(study, pair, data)
    batch = reading.read(*place_batch(study.mesh, (acts.vectors[at], written(pair, texts))), at, 0)
    held = [checker.true(claim, rows[3]) for claim in checker.claims(other)]
    assert held and sum(held) < len(held)
    assert np.asarray(batch.features["truth"]).tolist() == pytest.approx([1, np.mean(held), 0, 1])
    assert study.feature_shapes["truth"].shape == (4,)


def test_truth_is_not_asked_of_rows_without_texts(pair, tmp_path):
    config = load_config(CONFIG, ["--config.rl.truth=True"])
    study = Study(config, make_mesh(1, 1, 1), pair.verbalizer, pair.reconstructor, 64)
    vectors = np.ones((2, TINY.width), np.float32)
    columns = {"activation_vector": vectors.tolist(), "doc_id": ["a", "b"], "n_raw_tokens": [1, 1]}
    write_table(pa.table(columns), file := tmp_path / "rl-00000-of-00001.parquet")
    with pytest.raises(InputError, match="rl.truth checks claims against the texts of activations; these"):
        Reading(study, pair, Rows(vectors, (file,)))


def written(pair, texts: list[str]) -> Rollout:
    """Responses that hold these explanations, all of them finished."""
    responses = pair.prompts.tokenizer([RESPONSE.format(explanation=text) for text in texts], add_special_tokens=False)
    tokens, lengths = pad_tokens(responses.input_ids)
    mask = np.arange(tokens.shape[1]) < lengths[:, None]
    return Rollout(tokens, np.zeros(tokens.shape, np.float32), mask, np.ones(len(texts), bool))
