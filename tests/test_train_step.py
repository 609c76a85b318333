"""The joint step against a loss written plainly, its parts, and what it does with bad input."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import TINY, close, joint_batch, random_params
from test_transformer import full_states

from nla_jax.autoencoder import normalise, normalised_mse
from nla_jax.joint_step import (
    COMPILER_OPTIONS,
    Frozen,
    JointBatch,
    JointStep,
    compiler_knows,
    identical_share,
)
from nla_jax.losses import token_loss
from nla_jax.models.transformer import Transformer
from nla_jax.objective import group_normalised
from nla_jax.runtime.errors import InputError
from nla_jax.sampling import rollout
from nla_jax.tools.benchmark.measure import compilations
from nla_jax.tools.topology import mesh_over

A, G, R, T = 4, 3, 5, 9
B = A * G
KL = 0.3
KEEP_GRADIENT = optax.chain(optax.trace(0.0), optax.scale(-0.02))  # its state is the last gradient


@pytest.fixture(scope="module")
def batch(pair, vectors) -> JointBatch:
    return joint_batch(pair, vectors, G, R, T)


@pytest.fixture(scope="module")
def joint(verbalizer, reconstructor) -> JointStep:
    return JointStep(verbalizer, reconstructor, KEEP_GRADIENT, KEEP_GRADIENT, kl_coefficient=KL, temperature=0.8)


@pytest.fixture(scope="module")
def step(joint):
    return jax.jit(joint)


@pytest.fixture(scope="module")
def reference():
    return random_params(TINY, seed=7)


@pytest.fixture(scope="module")
def state(joint, params, pair):
    return jax.device_get(joint.init(jnp.zeros((), jnp.uint32), params, pair.reconstructor_params))


@pytest.fixture(scope="module")
def result(step, state, reference, batch):
    return jax.device_get(step(state, Frozen(reference), batch))


def gradients(state):
    return state.verbalizer_opt[0].trace, state.reconstructor_opt[0].trace


def naive_losses(joint, policy, ar, reference, batch):
    """REINFORCE with full-sequence forwards and whole logits, and the AR's mean loss."""
    temperature = joint.temperature

    def logp(params):
        hidden = full_states(joint.verbalizer, params, batch.vectors, batch.responses)
        logits = joint.verbalizer.model.apply({"params": params}, hidden, method="logits")
        return jax.nn.log_softmax(logits / temperature)

    unit = lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True)
    guess = joint.reconstructor.reconstruct(ar, batch.texts, batch.text_lengths)
    mse = 2 - 2 * jnp.sum(unit(guess) * unit(jnp.repeat(batch.vectors, G, 0)), -1)
    reward = jax.lax.stop_gradient(jnp.where(batch.valid, -mse, -2.0)).reshape(A, G)
    advantage = ((reward - reward.mean(1, keepdims=True)) / (reward.std(1, keepdims=True) + 1e-4)).reshape(B)
    new, old = logp(policy), jax.lax.stop_gradient(logp(reference))
    chosen = jnp.take_along_axis(new, batch.responses[..., None], -1)[..., 0]
    kl = jnp.sum(jnp.exp(new) * (new - old), -1)
    mask = batch.response_mask
    av_loss = jnp.sum(mask * (-advantage[:, None] * chosen + KL * kl)) / mask.sum()
    ar_loss = jnp.sum(batch.valid * mse) / batch.valid.sum()
    return av_loss + ar_loss, {"mse": mse, "reward": reward.reshape(B), "kl": jnp.sum(mask * kl) / mask.sum()}


def test_gradients_equal_a_plainly_written_loss(joint, state, reference, batch, result):
    naive = jax.jit(jax.grad(functools.partial(naive_losses, joint), (0, 1), has_aux=True))
    expected, values = naive(state.verbalizer, state.reconstructor, reference, batch)
    new, metrics = result
    close(gradients(new), expected, 2e-5)
    for name in ("mse", "reward", "kl"):
        np.testing.assert_allclose(metrics[name], values[name].mean(), rtol=1e-5)
    gold = normalise(batch.vectors)
    variance = jnp.mean((gold - gold.mean(0)) ** 2)
    np.testing.assert_allclose(metrics["fve"], 1 - values["mse"].mean() / variance, rtol=1e-5)
    np.testing.assert_allclose(metrics["length"], batch.response_mask.sum(1).mean(), rtol=1e-6)
    np.testing.assert_allclose(metrics["extraction_rate"], batch.valid.mean(), rtol=1e-6)
    np.testing.assert_allclose(metrics["av_grad_norm"], optax.tree.norm(expected[0]), rtol=1e-4)
    assert not metrics["skipped"] and new.step == 1
    close(new.verbalizer, jax.tree.map(lambda p, g: p - 0.02 * g, state.verbalizer, expected[0]), 1e-5)


def test_micro_batches_equal_one_batch(joint, state, reference, batch, result):
    cut = jax.jit(dataclasses.replace(joint, micro_batches=4))(state, Frozen(reference), batch)
    close(cut, result, 2e-5)


def test_failed_rows_teach_the_verbalizer_but_not_the_reconstructor(step, state, reference, batch, result):
    rng = np.random.default_rng(1)
    failed = ~batch.valid
    others = np.where(failed[:, None], rng.integers(4, TINY.vocab_size, (B, T)), batch.texts).astype(np.int32)
    others[:, 0] = batch.texts[:, 0]  # the AR's prefix
    new, _ = step(state, Frozen(reference), batch.replace(texts=others))
    close(gradients(new), gradients(result[0]), 1e-6)  # their texts are not read, by reward or AR
    masked = batch.replace(response_mask=batch.response_mask & batch.valid[:, None])
    new, _ = step(state, Frozen(reference), masked)
    assert np.abs(gradients(new)[0]["head"] - gradients(result[0])[0]["head"]).max() > 1e-4  # their tokens count
    new, metrics = step(state, Frozen(reference), batch.replace(valid=np.zeros(B, bool)))
    assert metrics["reward"] == -2 and metrics["ar_grad_norm"] == 0 and not metrics["skipped"]
    close(new.reconstructor, state.reconstructor, 0)


def test_nan_skips_the_step(step, state, reference, batch):
    broken = batch.vectors.copy()
    broken[2, 3] = np.nan
    new, metrics = step(state, Frozen(reference), batch.replace(vectors=broken))
    assert metrics["skipped"]
    close(new.replace(step=0), state.replace(step=0), 0)
    assert new.step == state.step + 1


def test_reward_and_advantage_are_replaceable_and_kl_can_be_off(joint, state, reference, batch):
    """Reward by length alone, advantage the reward itself; without KL the reference is not read."""
    other = dataclasses.replace(
        joint, reward=lambda mse, length: length.astype(jnp.float32), advantage=lambda r: r, kl_coefficient=0.0
    )
    nowhere = jax.tree.map(lambda x: np.full_like(x, np.nan), reference)
    new, metrics = jax.jit(other)(state, Frozen(nowhere), batch)
    lengths = batch.response_mask.sum(1)
    np.testing.assert_allclose(metrics["reward"], np.where(batch.valid, lengths, -2).mean(), rtol=1e-6)
    assert metrics["kl"] == 0 and not metrics["skipped"] and metrics["av_grad_norm"] > 0
    for wrong in (dict(reward=lambda mse, length: mse.mean()), dict(advantage=lambda rewards: rewards.reshape(-1))):
        with pytest.raises(InputError, match="function gives an array of shape"):
            jax.eval_shape(dataclasses.replace(joint, **wrong), state, Frozen(reference), batch)


def test_kl_vanishes_at_the_reference(step, state, batch, result):
    _, metrics = step(state, Frozen(state.verbalizer), batch)
    assert abs(metrics["kl"]) < 1e-6 < 0.01 < result[1]["kl"]


def test_logprob_gap_vanishes_after_a_rollout(joint, step, state, reference, batch):
    sampled = rollout(
        joint.verbalizer, state.verbalizer, batch.vectors, jax.random.key(0), group=G, max_new_tokens=R, temperature=0.8
    )
    mine = batch.replace(responses=sampled.tokens, response_mask=sampled.mask, sampler_logprobs=sampled.logprobs)
    _, metrics = step(state, Frozen(reference), mine)
    assert metrics["logprob_gap_mean"] <= metrics["logprob_gap_max"] < 1e-4
    _, metrics = step(state, Frozen(reference), mine.replace(sampler_logprobs=sampled.logprobs - 0.5 * sampled.mask))
    np.testing.assert_allclose([metrics["logprob_gap_mean"], metrics["logprob_gap_max"]], 0.5, atol=1e-4)


def test_compiles_once(step, state, reference, batch, result):
    now = jax.device_put(state)
    with compilations() as compiled:
        for i in range(3):
            now, _ = step(now, Frozen(reference), batch.replace(vectors=batch.vectors + i))
    assert not compiled and now.step == 3  # `result` has compiled it


# Parts


def test_token_loss_in_chunks_equals_whole_logits(model, params, reference):
    rng = np.random.default_rng(2)
    hidden, other = rng.normal(size=(2, 3, 5, TINY.width)).astype(np.float32)
    targets = rng.integers(0, TINY.vocab_size, (3, 5))
    weights = rng.normal(size=(3, 3, 5)).astype(np.float32)
    params = {name: params[name] for name in ("embedding", "blocks", "final_norm", "head")}
    weighted = lambda s, a, b, c: a * s.logprob + b * s.entropy + c * s.kl

    def run(chunk):
        def loss(params, hidden):
            total, s = token_loss(
                model, params, hidden, targets, weighted, *weights, temperature=0.7, reference=(reference, other),
                chunk=chunk,
            )  # fmt: skip
            return 3 * total, (total, s)

        return jax.jit(jax.grad(loss, (0, 1), has_aux=True))(params, hidden)

    def plain(params, hidden):
        new, old = (
            jax.nn.log_softmax(model.apply({"params": p}, h, method="logits") / 0.7)
            for p, h in ((params, hidden), (reference, other))
        )
        chosen = jnp.take_along_axis(new, targets[..., None], -1)[..., 0]
        entropy, kl = -jnp.sum(jnp.exp(new) * new, -1), jnp.sum(jnp.exp(new) * (new - old), -1)
        return 3 * jnp.sum(weights * jnp.stack([chosen, entropy, kl]))

    whole = run(2048)
    close(run(4), whole, 1e-5)  # 15 tokens: the last chunk is not full
    close(whole[0], jax.jit(jax.grad(plain, (0, 1)))(params, hidden), 1e-5)
    close(3 * whole[1][0], plain(params, hidden), 1e-5)

    def log_softmax(params, hidden):
        x = hidden.astype(np.float64)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + TINY.norm_eps) * params["final_norm"]["scale"]
        logits = x @ params["head"].astype(np.float64) / 0.7
        return logits - np.log(np.exp(logits).sum(-1, keepdims=True))

    logp, base, statistics = log_softmax(params, hidden), log_softmax(reference, other), whole[1][1]
    np.testing.assert_allclose(statistics.logprob, np.take_along_axis(logp, targets[..., None], -1)[..., 0], rtol=1e-4)
    np.testing.assert_allclose(statistics.entropy, -(np.exp(logp) * logp).sum(-1), rtol=1e-4)
    np.testing.assert_allclose(statistics.kl, (np.exp(logp) * (logp - base)).sum(-1), rtol=1e-4)


def test_the_heads_gradient_adds_up_over_many_chunks_in_bfloat16(params):
    """Of 300 chunks that all pull the same way, as frequent tokens do."""
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(1, 2400, TINY.width)).astype(np.float32) + 1
    targets = np.minimum(rng.zipf(1.3, (1, 2400)), TINY.vocab_size) - 1
    params = {name: params[name] for name in ("final_norm", "head")}

    def gradient(dtype, chunk):
        model = Transformer(dataclasses.replace(TINY, dtype=dtype))
        loss = lambda params: token_loss(
            model, params, hidden.astype(dtype), targets, lambda tokens: -tokens.logprob, chunk=chunk
        )[0]
        return jax.jit(jax.grad(loss))(params)["head"]

    exact, many = gradient(jnp.float32, 2400), gradient(jnp.bfloat16, 8)
    assert np.linalg.norm(many - exact) < 0.01 * np.linalg.norm(exact)


def test_identical_share_equals_a_count():
    rng = np.random.default_rng(0)
    texts, valid = rng.integers(0, 2, (12, 2)), rng.random(12) < 0.7
    same = 0
    for i in np.flatnonzero(valid):
        group = [j for j in range(i // 4 * 4, i // 4 * 4 + 4) if j != i and valid[j]]
        same += any((texts[i] == texts[j]).all() for j in group)
    assert 0 < same < valid.sum()
    assert float(identical_share(texts, valid, 3)) == pytest.approx(same / valid.sum())
    assert float(identical_share(texts, np.zeros(12, bool), 3)) == 0  # failed texts, all empty, are another metric's matter


def test_group_normalised_closed_form():
    rewards = np.array([[1.0, 3.0], [-2.0, -2.0], [0.0, -4.0]], np.float32)
    np.testing.assert_allclose(group_normalised(rewards), [[-1, 1], [0, 0], [1, -1]], atol=2e-4)


def test_normalised_mse_is_twice_one_minus_cosine():
    a, b = np.random.default_rng(3).normal(size=(2, 6, 50))
    cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    np.testing.assert_allclose(normalised_mse(1e4 * a, b / 100), 2 - 2 * cosine, rtol=1e-5)
    np.testing.assert_allclose(normalised_mse(np.stack([a[0], a[0]]), np.stack([a[0], -a[0]])), [0, 4], atol=1e-5)
    assert np.isfinite(jax.grad(lambda x: normalised_mse(x, b[0]))(np.zeros(50))).all()


def test_reconstructor_reads_the_last_real_token(reconstructor, pair, batch):
    read = jax.jit(reconstructor.reconstruct)
    params, tokens, lengths = pair.reconstructor_params, batch.texts, batch.text_lengths
    base = read(params, tokens, lengths)
    padding = np.arange(T) >= lengths[:, None]
    close(read(params, np.where(padding, 5, tokens), lengths), base, 1e-6)
    last = np.arange(T) == lengths[:, None] - 1
    changed = read(params, np.where(last, tokens % 300 + 7, tokens), lengths)
    assert (np.abs(changed - base).max(1) > 1e-2).all()


def test_a_compiler_without_the_option_does_without_it():
    mesh = mesh_over(jax.devices()[:1], (1, 1, 1))
    for options in COMPILER_OPTIONS.values():  # all compilers read the same list of options
        assert compiler_knows(options, mesh), "its gain is lost where its name has changed"
    assert not compiler_knows({"xla_cpu_no_such_option": "1"}, mesh)
    assert not compiler_knows(dict.fromkeys(COMPILER_OPTIONS["cpu"], "NO_SUCH_VALUE"), mesh)
