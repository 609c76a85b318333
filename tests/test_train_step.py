"""The joint step against a loss written plainly, its parts, and what it does with bad input."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import TINY, close, joint_batch, one_sentence, random_params
from test_transformer import full_states

from nla_jax.cli import load_config
from nla_jax.fve import mse, normalise
from nla_jax.joint_step import (
    Frozen,
    JointBatch,
    JointStep,
    identical_share,
    masked_quantile,
)
from nla_jax.losses import TokenLoss
from nla_jax.models.lora import Lora
from nla_jax.models.transformer import Transformer
from nla_jax.objective import Scored, adamw, group_normalised, muon, negative_log_mse, negative_mse
from nla_jax.runtime import compiler
from nla_jax.runtime.compiler import COMPILER_OPTIONS, UNOPTIMIZED, compilations, compiler_knows, jit_step, known
from nla_jax.runtime.errors import InputError
from nla_jax.sampling import rollout
from nla_jax.study import make_optimizer
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
    return jax.device_get(joint.init(params, pair.reconstructor_params))


@pytest.fixture(scope="module")
def result(step, state, reference, batch):
    return jax.device_get(step(state, Frozen(reference), batch))


def gradients(state):
    return tuple(state.models[name].opt[0].trace for name in ("verbalizer", "reconstructor"))


def parameters(state):
    return tuple(state.models[name].params for name in ("verbalizer", "reconstructor"))


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
    expected, values = naive(*parameters(state), reference, batch)
    new, metrics, samples = result
    for name in ("mse", "reward"):
        np.testing.assert_allclose(samples[name], values[name], rtol=1e-5)
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
    av, _ = parameters(state)
    close(parameters(new)[0], jax.tree.map(lambda p, g: p - 0.02 * g, av, expected[0]), 1e-5)


def test_micro_batches_equal_one_batch(joint, state, reference, batch, result):
    cut = jax.jit(dataclasses.replace(joint, micro_batches=4))(state, Frozen(reference), batch)
    close(cut, result, 2e-5)


def test_failed_rows_teach_the_verbalizer_but_not_the_reconstructor(step, state, reference, batch, result):
    rng = np.random.default_rng(1)
    failed = ~batch.valid
    others = np.where(failed[:, None], rng.integers(4, TINY.vocab_size, (B, T)), batch.texts).astype(np.int32)
    others[:, 0] = batch.texts[:, 0]  # the AR's prefix
    new, *_ = step(state, Frozen(reference), batch.replace(texts=others))
    close(gradients(new), gradients(result[0]), 1e-6)  # their texts are not read, by reward or AR
    masked = batch.replace(response_mask=batch.response_mask & batch.valid[:, None])
    new, *_ = step(state, Frozen(reference), masked)
    assert np.abs(gradients(new)[0]["head"] - gradients(result[0])[0]["head"]).max() > 1e-4  # their tokens count
    new, metrics, _ = step(state, Frozen(reference), batch.replace(valid=np.zeros(B, bool)))
    assert metrics["reward"] == -2 and metrics["ar_grad_norm"] == 0 and not metrics["skipped"]
    close(parameters(new)[1], parameters(state)[1], 0)


def test_nan_skips_the_step(step, state, reference, batch):
    broken = batch.vectors.copy()
    broken[2, 3] = np.nan
    new, metrics, _ = step(state, Frozen(reference), batch.replace(vectors=broken))
    assert metrics["skipped"]
    close(new.replace(step=0), state.replace(step=0), 0)
    assert new.step == state.step + 1


def test_reward_and_advantage_are_replaceable_and_kl_can_be_off(joint, state, reference, batch):
    """Reward by length alone, advantage the reward itself; without KL the reference is not read."""
    other = dataclasses.replace(
        joint, reward=lambda s: jnp.where(s.valid, s.length, -2.0), advantage=lambda r: r, kl_coefficient=0.0
    )
    nowhere = jax.tree.map(lambda x: np.full_like(x, np.nan), reference)
    new, metrics, _ = jax.jit(other)(state, Frozen(nowhere), batch)
    lengths = batch.response_mask.sum(1)
    np.testing.assert_allclose(metrics["reward"], np.where(batch.valid, lengths, -2).mean(), rtol=1e-6)
    assert metrics["kl"] == 0 and not metrics["skipped"] and metrics["av_grad_norm"] > 0
    for wrong in (dict(reward=lambda s: s.mse.mean()), dict(advantage=lambda rewards: rewards.reshape(-1))):
        with pytest.raises(InputError, match="gives an array of shape"):
            jax.eval_shape(dataclasses.replace(joint, **wrong), state, Frozen(reference), batch)


def test_a_reward_reads_texts_and_decides_about_failures(joint, state, reference, batch):
    """By a feature, the sampler's log-probs and validity; what it gives to a failed response is what that one gets."""
    seen = {}

    def reward(s):
        seen.update(shapes=(s.mse.shape, s.mask.shape, s.logprobs.shape), failed=s.mse)
        return jnp.where(s.valid, s.features["overlap"] + s.entropy, -7.0)

    features = {"overlap": np.arange(B, dtype=np.float32)}
    step = dataclasses.replace(joint, reward=reward, micro_batches=2)
    _, metrics, samples = jax.jit(step)(state, Frozen(reference), batch.replace(features=features))
    lengths = batch.response_mask.sum(1)
    entropy = -np.sum(batch.sampler_logprobs * batch.response_mask, 1) / lengths
    np.testing.assert_allclose(samples["reward"], np.where(batch.valid, features["overlap"] + entropy, -7), rtol=1e-5)
    assert seen["shapes"] == ((B // 2,), (B // 2, R), (B // 2, R)) and metrics["feature/overlap"] == (B - 1) / 2


@pytest.mark.parametrize(("reward", "failed"), [(negative_mse, -2.0), (negative_log_mse, -np.log(2))])
def test_a_failed_response_counts_as_an_uncorrelated_one(reward, failed):
    """Below every reconstruction that points the right way, whatever the AR makes of the empty text."""
    mse, valid = jnp.array([0.1, 1.99, 0.3]), jnp.array([True, True, False])
    nothing = jnp.zeros((3, 2))
    got = reward(Scored(jnp.where(valid, mse, 2.0), 1 - mse / 2, valid, nothing > 0, nothing, {}, nothing, valid))
    assert got[2] == pytest.approx(failed) and got[2] < got[1] < got[0]


def test_a_model_whose_update_is_not_finite_is_skipped_alone(joint, state, reference, batch, result):
    """A finite gradient with an infinite learning rate: the AV stays, the AR steps."""
    wild = dataclasses.replace(joint, verbalizer_tx=optax.chain(optax.trace(0.0), optax.scale(np.inf)))
    new, metrics, _ = jax.jit(wild)(state, Frozen(reference), batch)
    assert metrics["av_skipped"] and not metrics["ar_skipped"] and metrics["skipped"]
    close(parameters(new)[0], parameters(state)[0], 0)
    close(parameters(new)[1], parameters(result[0])[1], 1e-6)
    assert np.isfinite(metrics["av_grad_norm"])


def test_metrics_of_a_batch_that_was_counted(result, batch):
    """Shares and quantiles against NumPy."""
    _, metrics, samples = result
    assert metrics["truncated"] == pytest.approx(1 - batch.finished.mean())
    groups = samples["reward"].reshape(A, G)
    assert metrics["groups_without_advantage"] == pytest.approx((np.ptp(groups, 1) < 1e-6).mean())
    assert metrics["av_update_norm"] == pytest.approx(0.02 * metrics["av_grad_norm"], rel=1e-5)
    assert "av_lr" not in metrics  # plain optax tells no learning rate


def test_the_quantile_of_the_gap_is_numpys(joint, step, state, reference, batch):
    statistics = jax.jit(joint)(state, Frozen(reference), batch.replace(sampler_logprobs=np.zeros((B, R), np.float32)))
    rng = np.random.default_rng(3)
    gaps = rng.exponential(size=(B, R)).astype(np.float32)
    mask = batch.response_mask
    got = float(masked_quantile(jnp.where(mask, gaps, 0), mask, 0.9))
    assert got == pytest.approx(np.quantile(gaps[mask], 0.9, method="inverted_cdf"))
    assert np.isfinite(statistics[1]["logprob_gap_p99"])


def test_the_learning_rate_is_logged(joint, state, reference, batch):
    tx = make_optimizer({"function": "nla_jax.objective:adamw", "lr": 1e-3, "warmup": 4}, 10, "rl.av_optimizer")
    new = dataclasses.replace(joint, verbalizer_tx=tx)
    fresh = new.init(*parameters(state))
    _, metrics, _ = jax.jit(new)(fresh, Frozen(reference), batch)
    assert metrics["av_lr"] == pytest.approx(1e-3 / 5) and "ar_lr" not in metrics


def test_adamw_is_optaxs(params):
    """Bit for bit, operation by operation (a compiler may round two programs differently)."""
    schedule = optax.warmup_cosine_decay_schedule(1e-3 / 6, 1e-3, 5, 20, 1e-4)
    plain = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.99, weight_decay=0.1))
    ours = adamw(20, 1e-3, 1e-4, 5, b2=0.99, weight_decay=0.1)
    trained, states = [params, params], [plain.init(params), ours.init(params)]
    for i in range(8):
        grads = random_params(TINY, seed=10 + i)
        for j, tx in enumerate((plain, ours)):
            change, states[j] = tx.update(grads, states[j], trained[j])
            trained[j] = optax.apply_updates(trained[j], change)
    close(trained[1], trained[0], 0)


def orthogonalised(matrix, steps=5):
    """Newton-Schulz iterations of Muon's quintic, in float64."""
    x = np.asarray(matrix, np.float64)
    x = x if x.shape[0] <= x.shape[1] else x.T
    x = x / np.linalg.norm(x)
    for _ in range(steps):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x if x.shape == matrix.shape else x.T


# Of each matrix: how many of the axes behind the layer are its inputs.
MATRICES = {"q": 1, "k": 1, "v": 1, "o": 2, "gate": 1, "up": 1, "down": 1}


@pytest.mark.parametrize("trained", ["whole", "adapter", "reconstructor"])
def test_muon_turns_each_layers_matrices_and_adam_the_rest(params, trained):
    tree = {"whole": params, "adapter": Lora(3).init_params(jax.random.key(0), TINY)}
    tree["reconstructor"] = {"backbone": {"blocks": params["blocks"]}, "head": np.eye(TINY.width, dtype=np.float32)}
    tree = tree[trained]
    rng = np.random.default_rng(0)
    grads = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), tree)
    ours, others = muon(9, 0.02, clip=1e9, adam_share=0.15), adamw(9, 0.003, clip=1e9)
    change, _ = ours.update(grads, ours.init(tree), tree)
    adams, _ = others.update(grads, others.init(tree), tree)
    turned = set()
    for (path, found), grad, adam in zip(
        jax.tree_util.tree_leaves_with_path(change), *map(jax.tree.leaves, (grads, adams))
    ):
        *_, name, kind = ("", *(part.key for part in path))
        if kind not in ("kernel", "lora_a", "lora_b"):
            np.testing.assert_allclose(found, adam, rtol=1e-5)
            continue
        turned.add(name)
        inputs = np.prod(grad.shape[1 : 1 + (1 if kind == "lora_b" else MATRICES[name])])
        for layer in range(len(grad)):
            expected = orthogonalised(grad[layer].reshape(inputs, -1))
            expected *= -0.02 * max(1, expected.shape[1] / expected.shape[0]) ** 0.5
            np.testing.assert_allclose(np.reshape(found[layer], expected.shape), expected, atol=2e-5)
    assert turned == set(MATRICES)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -0.1}, "lr is -0.1; it must be at least 0"),
        ({"beta": 1.0}, "beta is 1.0; it must be at least 0 and below 1"),
        ({"adam_share": -1.0}, "adam_share is -1.0; it must be at least 0"),
    ],
)
def test_muon_refuses_numbers_that_it_cannot_use(settings, message):
    with pytest.raises(InputError, match=f"Muon's {message}") as error:
        muon(**{"steps": 5, "lr": 0.01} | settings)
    one_sentence(error)


def test_kl_vanishes_at_the_reference(step, state, batch, result):
    _, metrics, _ = step(state, Frozen(parameters(state)[0]), batch)
    assert abs(metrics["kl"]) < 1e-6 < 0.01 < result[1]["kl"]


def test_logprob_gap_vanishes_after_a_rollout(joint, step, state, reference, batch):
    sampled = rollout(
        joint.verbalizer,
        parameters(state)[0],
        batch.vectors,
        jax.random.key(0),
        group=G,
        max_new_tokens=R,
        temperature=0.8,
    )
    mine = batch.replace(responses=sampled.tokens, response_mask=sampled.mask, sampler_logprobs=sampled.logprobs)
    _, metrics, _ = step(state, Frozen(reference), mine)
    assert metrics["logprob_gap_mean"] <= metrics["logprob_gap_p99"] <= metrics["logprob_gap_max"] < 1e-4
    _, metrics, _ = step(state, Frozen(reference), mine.replace(sampler_logprobs=sampled.logprobs - 0.5 * sampled.mask))
    gaps = [metrics[f"logprob_gap_{name}"] for name in ("mean", "p99", "max")]
    np.testing.assert_allclose(gaps, 0.5, atol=1e-4)


def test_compiles_once(step, state, reference, batch, result):
    now = jax.device_put(state)
    with compilations() as compiled:
        for i in range(3):
            now, *_ = step(now, Frozen(reference), batch.replace(vectors=batch.vectors + i))
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
            of_tokens = TokenLoss(model, weighted, temperature=0.7, chunk=chunk)
            total, s = of_tokens(params, hidden, targets, *weights, reference=(reference, other))
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
        of_tokens = TokenLoss(model, lambda tokens: -tokens.logprob, chunk=chunk)
        loss = lambda params: of_tokens(params, hidden.astype(dtype), targets)[0]
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
    assert (
        float(identical_share(texts, np.zeros(12, bool), 3)) == 0
    )  # failed texts, all empty, are another metric's matter


def test_group_normalised_closed_form():
    rewards = np.array([[1.0, 3.0], [-2.0, -2.0], [0.0, -4.0]], np.float32)
    np.testing.assert_allclose(group_normalised(rewards), [[-1, 1], [0, 0], [1, -1]], atol=2e-4)


def test_mse_is_twice_one_minus_cosine():
    a, b = np.random.default_rng(3).normal(size=(2, 6, 50))
    cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    np.testing.assert_allclose(mse(1e4 * a, b / 100), 2 - 2 * cosine, rtol=1e-5)
    np.testing.assert_allclose(mse(np.stack([a[0], a[0]]), np.stack([a[0], -a[0]])), [0, 4], atol=1e-5)
    assert np.isfinite(jax.grad(lambda x: mse(x, b[0]))(np.zeros(50))).all()


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
    wanted = UNOPTIMIZED["cpu"]
    assert "xla_backend_optimization_level" in known(wanted, mesh), "its gain is lost where its name has changed"
    assert known(wanted | {"xla_cpu_no_such_option": "1"}, mesh) == known(wanted, mesh)
    assert not compiler_knows({"xla_cpu_no_such_option": "1"}, mesh)
    assert not compiler_knows(dict.fromkeys(COMPILER_OPTIONS["cpu"], "NO_SUCH_VALUE"), mesh)


def test_a_step_on_cpus_is_compiled_once_and_begins_without_what_others_freed(monkeypatch):
    given_back = []
    monkeypatch.setattr(compiler, "give_memory_back", lambda: given_back.append(None))
    mesh = mesh_over(jax.devices()[:1], (1, 1, 1))
    step = jit_step(lambda state, x: (state + x.sum(), 2 * x), mesh)
    with compilations() as compiled:
        state, _ = step(jnp.float32(0), np.ones(4, np.float32))
        state, twice = step(state, np.full(4, 2, np.float32))
    assert (float(state), twice.tolist()) == (12, [4] * 4)
    assert len(compiled) <= 2, "of which one is the first number's"  # jnp.float32(0)
    assert len(given_back) == 2


def test_a_program_that_is_not_optimized_computes_the_same():
    mesh = mesh_over(jax.devices()[:1], (1, 1, 1))
    step = lambda state, x: (jnp.tanh(state @ x), x.sum())
    x = np.random.default_rng(0).normal(size=(8, 8)).astype(np.float32)
    plain, quick = (jit_step(step, mesh, optimized)(jnp.eye(8), x) for optimized in (True, False))
    close(quick, plain, 1e-6)
    close(jit_step(step, mesh, False, runs=1000)(jnp.eye(8), x), plain, 1e-6)
    assert load_config("configs/quickstart.py", []).compute.optimize  # tiny alone goes without
    assert not load_config("configs/quickstart.py:tiny", []).compute.optimize
