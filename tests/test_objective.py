"""The levers of the objective: rewards in closed form, what counts as copied, and what readers take away."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import close, joint_batch, one_sentence
from scipy.special import log_softmax

from nla_jax.joint_step import Frozen, JointStep
from nla_jax.labels.extractive import Extractive, without_last_words
from nla_jax.labels.labeller import LabelRow
from nla_jax.objective import (
    Scored,
    adamw,
    contrastive,
    copied,
    coverage,
    downstream,
    own_words,
    prefix_or_whole,
    short,
    truthful,
    within,
)
from nla_jax.runtime.errors import InputError
from nla_jax.runtime.user_code import resolve
from nla_jax.stages.sft import read_labels

LENGTHS = np.array([3, 5, 8, 2])
COSINES = np.array([[0.75, -0.2], [0.75, 0.7], [-0.9, -0.95], [0, 0]], np.float32)


@pytest.fixture
def scored() -> Scored:
    """Four responses of at most eight tokens to two activations; the last one has failed, after two tokens."""
    mse = np.array([0.5, 0.5, 3.8, 2.0], np.float32)
    return Scored(
        mse=jnp.asarray(mse),
        cosine=jnp.asarray(1 - mse / 2),
        valid=jnp.array([True, True, True, False]),
        mask=jnp.arange(8) < LENGTHS[:, None],
        logprobs=jnp.zeros((4, 8)),
        features={"copied": jnp.array([0.0, 0.4, 1.0, 0.0]), "subject_kl": jnp.array([0.0, 3.0, 9.0, 1.0])},
        cosines=jnp.asarray(COSINES),
        own=jnp.array([0, 0, 0, 1]),
    )


@pytest.mark.parametrize(
    "reward, expected",
    [
        (lambda s: short(s, 0.01), [-0.53, -0.55, -3.88, -2.08]),
        (lambda s: within(s, 4, 0.1), [-0.5, -0.6, -4.2, -2.4]),
        (lambda s: within(s, 9, 0.1), [-0.5, -0.5, -3.8, -2.0]),
        (lambda s: own_words(s, 0.5), [-0.5, -0.7, -4.3, -2.5]),
        (lambda s: downstream(s, 0.2, 4.0), [-0.5, -1.1, -4.6, -2.8]),
    ],
    ids=["a price of each token", "of those beyond four", "none is beyond nine", "a price of copying", "of nats"],
)
def test_a_price_is_taken_from_the_reconstruction(scored, reward, expected):
    """A failed response, which ended early and copied nothing, gets the highest price: failing saves none."""
    np.testing.assert_allclose(reward(scored), expected, rtol=1e-6)


@pytest.mark.parametrize(
    "reward, setting", [(own_words, "copied"), (downstream, "rl.subject_kl=True"), (truthful, "rl.truth=True")]
)
def test_a_reward_says_which_setting_gives_the_feature_that_it_reads(scored, reward, setting):
    with pytest.raises(InputError, match=f"reads the feature '.*'; set .*{setting}") as error:
        reward(dataclasses.replace(scored, features={}))
    one_sentence(error)


def test_contrast_pays_for_what_tells_an_activation_from_the_others(scored):
    found = np.asarray(contrastive(scored, weight=0.3, temperature=0.2))
    own = log_softmax(COSINES / 0.2, axis=1)[np.arange(4), [0, 0, 0, 1]]
    np.testing.assert_allclose(found, np.asarray(-scored.mse) + 0.3 * own, rtol=1e-5)
    assert found[0] > found[1] + 0.1 and found[3] == pytest.approx(-2 - 0.3 * np.log(2))


def test_a_reward_sees_all_activations_of_the_step_whatever_its_micro_batches(pair, vectors, params):
    """The cosines are those of the AR's own reading, with each activation of the whole step."""
    seen, batch, tx = {}, joint_batch(pair, vectors, 3, 5, 9), adamw(1, 0.0)

    def reward(s):
        seen[len(s.own)] = s.cosines.shape
        return jnp.take_along_axis(s.cosines, (s.own[:, None] + 1) % s.cosines.shape[1], 1)[:, 0]

    step = JointStep(pair.verbalizer, pair.reconstructor, tx, tx, reward=reward, kl_coefficient=0.0)
    state = jax.device_get(step.init(params, pair.reconstructor_params))
    whole, cut = (jax.jit(dataclasses.replace(step, micro_batches=n))(state, Frozen(None), batch)[2] for n in (1, 4))
    recon = jax.jit(pair.reconstructor.reconstruct)(pair.reconstructor_params, batch.texts, batch.text_lengths)
    neighbour = np.repeat(np.roll(vectors, -1, 0), 3, 0)
    cosine = np.sum(recon * neighbour, 1) / np.linalg.norm(recon, axis=1) / np.linalg.norm(neighbour, axis=1)
    np.testing.assert_allclose(whole["reward"], np.where(batch.valid, cosine, 0), atol=1e-5)
    close(cut, whole, 1e-5)
    assert seen == {12: (12, 4), 3: (3, 4)}


# What counts as copied

SOURCE = "The mesh axes are named by the user, and each parameter has a logical name for every one of its axes."


def plainly(text: str, source: str, span: int) -> float:
    """Coverage by trying every stretch of the text, however long."""
    covered = np.zeros(len(text), bool)
    for start, end in itertools.combinations(range(len(text) + 1), 2):
        if end - start >= span and text[start:end] in source:
            covered[start:end] = True
    return covered.mean()


@pytest.mark.parametrize(
    "text",
    [
        "a list: each parameter has a name for every one of them",
        "the user, and eaCH   parameter",
        "axes are axes are named axes are named by",
        "nothing of that",
        "user, and",
    ],
)
def test_copied_is_what_long_stretches_share_with_the_source(text):
    plain = " ".join(text.lower().split())
    for span in (6, 12):
        assert coverage(text, SOURCE, span) == pytest.approx(plainly(plain, SOURCE.lower(), span))


def test_copied_is_a_feature_of_each_text_and_its_row():
    quote = "each parameter has a logical name"
    texts = [quote, f"({quote})", f"It says {quote}.", quote, "", "short"]
    rows = [{"text": SOURCE}] * 3 + [{"text": "Another text, which says nothing of it."}] + [{"text": SOURCE}] * 2
    found = copied(texts, rows)["copied"]
    assert found.dtype == np.float32 and found.shape == (6,)
    assert found[0] == 1 and found[1] == pytest.approx(len(quote) / (len(quote) + 2)) and found[3:].tolist() == [0] * 3
    assert found[2] == pytest.approx((len(quote) + 1) / (len(quote) + 9))  # with the blank before it


# What readers take away


def test_texts_without_their_last_words():
    """A text that quotes none stays as it is."""
    (usual,) = Extractive().label([LabelRow("The river turns north at the old mill", "", 0, "", "")])
    none = "An opening. It ends at a line break"
    found = without_last_words([usual, none, "Prose. It ends after a comma: … a …\nb,"], np.random.default_rng(0))
    assert found == ["An opening. It ends early in a sentence", none, "Prose. It ends after a comma"]
    assert usual.startswith(f"{found[0]} with mill: … ")


def test_a_reader_of_prefixes_and_whole_texts_by_turns():
    """Samples of one activation are cut alike; about half of the activations are read whole."""
    texts = ["one two three four", "five six seven eight"]
    found = [prefix_or_whole(texts, np.random.default_rng([0, i])) for i in range(400)]
    cut = [read for read in found if read != texts]
    assert 120 < len(cut) < 240  # a prefix of all four words is the whole text
    assert all(len(a.split()) == len(b.split()) < 4 for a, b in cut)


def test_the_ar_of_the_warm_start_reads_labels_as_its_reader_does():
    """Each is cut at a place of its own, the same whenever it is read."""
    labels, reader = (
        ["one two three four five six seven eight"] * 40,
        resolve("nla_jax.objective:random_prefix", "test"),
    )
    found = read_labels(reader, 3, labels)
    assert all(labels[0].startswith(text) for text in found) and len(set(found)) > 5
    assert found == read_labels(reader, 3, labels) != read_labels(reader, 4, labels)
