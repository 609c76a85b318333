"""The host's part of an RL step: what the AR reads of a rollout."""

import numpy as np
import pytest
from conftest import CONFIG, SENTENCES, TINY

from nla_jax.cli import load_config
from nla_jax.data.batches import pad_tokens
from nla_jax.data.rows import Rows
from nla_jax.models.sharding import make_mesh, place_batch
from nla_jax.prompts import RESPONSE
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
    responses = pair.prompts.tokenizer([RESPONSE.format(explanation=text) for text in texts], add_special_tokens=False)
    tokens, lengths = pad_tokens(responses.input_ids)
    mask = np.arange(tokens.shape[1]) < lengths[:, None]
    sampled = Rollout(tokens, np.zeros(tokens.shape, np.float32), mask, np.ones(4, bool))
    vectors = np.zeros((2, TINY.width), np.float32)
    reading = Reading(study, pair, Rows(vectors, ()))
    batch = reading.read(*place_batch(study.mesh, (vectors, sampled)), np.arange(2), 0)
    assert batch.texts.shape == (4, longest - missing) and np.all(batch.valid)
    assert reading.cut_share() == (0.25 if missing else 0)
    assert reading.cut_share() == 0  # of the next step
