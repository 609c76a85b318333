"""The joint training step, the supervised steps, and their states. Each is one pure function, jitted by its caller.

`joint_step` takes one rollout and makes one optimiser step on each model:

    reconstructor   L_AR = mean_i mse_i                      mse_i = |p̂_i - ĝ_i|² / d = 2(1 - cos)
    reward          r_i = reward(mse_i), or -2 where the response was cut or holds no explanation
    advantage       a_i = (r_i - mean_group r) / std_group r
    verbalizer      L_AV = -mean_tokens a_i log π(y_it) + β mean_tokens KL(π ‖ π_warm)

The AR's forward pass gives both its own loss and the AV's reward. There is exactly one optimiser step per rollout, so the
data is on-policy and no pass for old log-probabilities is needed; the difference between the sampler's log-probabilities
and this step's is measured instead. Deviation from the paper's reference: the KL is exact, not a sampled estimate.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from nla_jax.autoencoder import Reconstructor, Verbalizer, normalise, normalised_mse
from nla_jax.losses import masked_mean, token_loss
from nla_jax.objective import FAILED_REWARD, group_normalised, negative_mse
from nla_jax.runtime.errors import InputError


@struct.dataclass
class TrainState:
    """All that joint training changes. Frozen weights are a separate argument (`Frozen`), never checkpointed."""

    step: Int[Array, ""]
    rng: Array
    verbalizer: dict
    reconstructor: dict
    verbalizer_opt: Any
    reconstructor_opt: Any


@struct.dataclass
class Frozen:
    """What joint training reads but never changes: the warm-started AV's parameters (`reference`, of the KL), and the
    model beneath LoRA adapters (`base`; None where both models are trained whole)."""

    reference: dict
    base: dict | None = None


@struct.dataclass
class ModelState:
    """One model under supervised training."""

    step: Int[Array, ""]
    params: dict
    opt: Any


@struct.dataclass
class JointBatch:
    """One rollout after the host has read it. B = A·G; an activation's G samples stand in a row."""

    vectors: Float[Array, "A D"]
    responses: Int[Array, "B R"]
    response_mask: Bool[Array, "B R"]
    sampler_logprobs: Float[Array, "B R"]
    texts: Int[Array, "B T"]  # the extracted explanations in the AR's template, re-tokenised, right-padded
    text_lengths: Int[Array, "B"]
    valid: Bool[Array, "B"]  # the response ended in time and holds an explanation


@dataclasses.dataclass(frozen=True)
class JointStep:
    """What one joint step is made of; every function can be replaced without editing this package."""

    verbalizer: Verbalizer
    reconstructor: Reconstructor
    verbalizer_tx: optax.GradientTransformation
    reconstructor_tx: optax.GradientTransformation
    reward: Callable = negative_mse
    advantage: Callable = group_normalised
    kl_coefficient: float = 0.01
    temperature: float = 1.0
    micro_batches: int = 1
    __name__ = "joint_step"  # of the compiled program, in profiles

    def init(self, rng: Array, verbalizer: dict, reconstructor: dict) -> TrainState:
        """The state before the first step."""
        opts = self.verbalizer_tx.init(verbalizer), self.reconstructor_tx.init(reconstructor)
        return TrainState(jnp.int32(0), rng, verbalizer, reconstructor, *opts)

    def __call__(self, state: TrainState, frozen: Frozen, batch: JointBatch) -> tuple[TrainState, dict]:
        """One optimiser step on each model. Returns the new state and scalar metrics; a step with a non-finite gradient changes nothing but `step`, and says so in `skipped`."""
        totals = {"tokens": batch.response_mask.sum(), "texts": jnp.maximum(batch.valid.sum(), 1)}
        grads, samples = self._accumulate(state, frozen, batch, totals)

        norms = [optax.tree.norm(grad) for grad in grads]
        finite = jnp.isfinite(norms[0]) & jnp.isfinite(norms[1])
        keep = lambda new, old: jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)

        def update(tx, grad, opt, params):
            updates, new_opt = tx.update(grad, opt, params)
            return keep(optax.apply_updates(params, updates), params), keep(new_opt, opt)

        verbalizer, verbalizer_opt = update(self.verbalizer_tx, grads[0], state.verbalizer_opt, state.verbalizer)
        reconstructor, reconstructor_opt = update(
            self.reconstructor_tx, grads[1], state.reconstructor_opt, state.reconstructor
        )
        new = state.replace(
            step=state.step + 1, verbalizer=verbalizer, verbalizer_opt=verbalizer_opt,
            reconstructor=reconstructor, reconstructor_opt=reconstructor_opt,
        )  # fmt: skip
        metrics = self._metrics(batch, samples)
        return new, metrics | {"av_grad_norm": norms[0], "ar_grad_norm": norms[1], "skipped": ~finite}

    def _accumulate(self, state, frozen, batch, totals):
        """Gradients `(AV, AR)` and per-sample results, summed over micro-batches that keep groups whole."""
        n = self.micro_batches
        split = jax.tree.map(lambda x: x.reshape(n, len(x) // n, *x.shape[1:]), batch)
        zeros = jax.tree.map(jnp.zeros_like, (state.verbalizer, state.reconstructor))

        def one(total, part):
            grads, samples = self._gradients(state, frozen, part, totals)
            return jax.tree.map(jnp.add, total, grads), samples

        if n == 1:
            return self._gradients(state, frozen, batch, totals)
        grads, samples = jax.lax.scan(one, zeros, split)
        return grads, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), samples)

    def _gradients(self, state: TrainState, frozen: Frozen, batch: JointBatch, totals: dict):
        A, B = len(batch.vectors), len(batch.responses)
        gold = jnp.repeat(batch.vectors, B // A, axis=0)

        def reconstruction_loss(params):
            whole = self.reconstructor.assemble(params, frozen.base)
            prediction = self.reconstructor.reconstruct(whole, batch.texts, batch.text_lengths)
            mse = normalised_mse(prediction, gold)
            return jnp.sum(jnp.where(batch.valid, mse, 0)) / totals["texts"], mse

        ar_grads, mse = jax.grad(reconstruction_loss, has_aux=True)(state.reconstructor)

        reward = _shaped("reward", self.reward(mse, batch.response_mask.sum(1)), (B,))
        reward = jnp.where(batch.valid, reward, FAILED_REWARD)
        advantage = _shaped("advantage", self.advantage(reward.reshape(A, B // A)), (A, B // A)).reshape(B, 1)
        weights = batch.response_mask / totals["tokens"]

        anchor = None
        if self.kl_coefficient:
            reference = self.verbalizer.assemble(frozen.reference, frozen.base)
            anchor = reference, self.verbalizer.read_responses(reference, batch.vectors, batch.responses)

        def objective(tokens, weight, weighted_advantage):
            return -weighted_advantage * tokens.logprob + self.kl_coefficient * weight * tokens.kl

        def policy_loss(params):
            whole = self.verbalizer.assemble(params, frozen.base)
            hidden = self.verbalizer.read_responses(whole, batch.vectors, batch.responses)
            return token_loss(
                self.verbalizer.model, whole, hidden, batch.responses, objective, weights, weights * advantage,
                temperature=self.temperature, reference=anchor,
            )  # fmt: skip

        av_grads, tokens = jax.grad(policy_loss, has_aux=True)(state.verbalizer)
        return (av_grads, ar_grads), {"mse": mse, "reward": reward, "tokens": tokens}

    def _metrics(self, batch: JointBatch, samples: dict) -> dict:
        gold = normalise(batch.vectors)
        variance = jnp.mean((gold - gold.mean(0)) ** 2)
        gap = jnp.abs(samples["tokens"].logprob - batch.sampler_logprobs)
        return {
            "reward": samples["reward"].mean(),
            "fve": 1 - samples["mse"].mean() / variance,
            "mse": samples["mse"].mean(),
            "kl": masked_mean(samples["tokens"].kl, batch.response_mask),
            "entropy": masked_mean(samples["tokens"].entropy, batch.response_mask),
            "length": batch.response_mask.sum(1).mean(),
            "extraction_rate": batch.valid.mean(),
            "identical_texts": identical_share(batch.texts, batch.valid, len(batch.vectors)),
            "logprob_gap_mean": masked_mean(gap, batch.response_mask),
            "logprob_gap_max": jnp.max(jnp.where(batch.response_mask, gap, 0)),
        }


def _shaped(name: str, x: Array, shape: tuple[int, ...]) -> Array:
    """x. Raises `InputError` where a function of the user's gave another shape, which might be broadcast unnoticed."""
    if jnp.shape(x) != shape:
        raise InputError(f"The {name} function gives an array of shape {jnp.shape(x)}, expected {shape}.")
    return x


def identical_share(texts: Int[Array, "B T"], valid: Bool[Array, "B"], groups: int) -> Float[Array, ""]:
    """The share of the valid texts that another valid text of the same group equals, token by token."""
    texts, valid = texts.reshape(groups, -1, texts.shape[1]), valid.reshape(groups, -1)
    equal = jnp.all(texts[:, :, None] == texts[:, None], -1) & valid[:, None] & ~jnp.eye(valid.shape[1], dtype=bool)
    return jnp.sum(equal.any(-1) & valid) / jnp.maximum(valid.sum(), 1)


@dataclasses.dataclass(frozen=True)
class SupervisedStep:
    """One optimiser step on `loss(params, batch, base) -> (scalar, metrics)`: pretraining and both warm starts. `base` is the
    frozen model beneath a LoRA adapter, None where the model is trained whole."""

    loss: Callable
    tx: optax.GradientTransformation
    __name__ = "supervised_step"  # of the compiled program, in profiles

    def init(self, params: dict) -> ModelState:
        return ModelState(jnp.int32(0), params, self.tx.init(params))

    def __call__(self, state: ModelState, batch: Any, base: dict | None = None) -> tuple[ModelState, dict]:
        (loss, metrics), grads = jax.value_and_grad(self.loss, has_aux=True)(state.params, batch, base)
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(norm)
        updates, opt = self.tx.update(grads, state.opt, state.params)
        new = state.replace(params=optax.apply_updates(state.params, updates), opt=opt)
        kept = jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, state)
        return kept.replace(step=state.step + 1), metrics | {"loss": loss, "grad_norm": norm, "skipped": ~finite}


# What XLA's compilers are told about training steps, by platform.
COMPILER_OPTIONS = {
    # On one device: Eigen's matrix products instead of YNNPACK's, XLA's default. They are faster where there are many rows (and
    # slower in the rollout). An experimental option of XLA's.
    "cpu": {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE"},
    # XLA would join the products of prompts and of responses, which read the same weights, by copies of all their rows. And near
    # the limit of memory it computes again what `remat` did not name: slices and casts of weights, up to four times each, which
    # saves hardly any (experiments/benchmark/LOG.md).
    "gpu": {"xla_gpu_dot_merger_threshold_mb": 0, "xla_disable_hlo_passes": "rematerialization"},
}


def jit_step(step: JointStep | SupervisedStep, mesh: Mesh) -> Callable:
    """The compiled `step` for the devices of `mesh`; the state that it is given is consumed."""
    platform = mesh.devices.flat[0].platform
    options = None if platform == "cpu" and mesh.size > 1 else COMPILER_OPTIONS.get(platform)
    if options and not compiler_knows(options, mesh):
        options = None
    return jax.jit(step, donate_argnums=0, compiler_options=options)


def compiler_knows(options: dict, mesh: Mesh) -> bool:
    """Whether the compiler for these devices takes these options: of one that it does not know it says so in an error, and compiles
    nothing."""
    try:
        jax.jit(lambda: 0, out_shardings=NamedSharding(mesh, PartitionSpec()), compiler_options=options).lower().compile()
        return True
    except jax.errors.JaxRuntimeError:
        return False


@struct.dataclass
class TextBatch:
    """Right-padded rows of token ids; `lengths` counts the real tokens. `vectors` belong to the rows (where any)."""

    tokens: Int[Array, "B T"]
    lengths: Int[Array, "B"]
    vectors: Float[Array, "B D"] | None = None

    @property
    def mask(self) -> Bool[Array, "B T"]:
        return jnp.arange(self.tokens.shape[1]) < self.lengths[:, None]


def cross_entropy(model, params, hidden, targets, mask):
    """Mean cross-entropy in nats per token where `mask` is True."""
    weights = mask / jnp.maximum(mask.sum(), 1)
    return token_loss(model, params, hidden, targets, lambda tokens, weight: -weight * tokens.logprob, weights)[0]


def language_model_loss(model):
    """Mean cross-entropy in nats per token of a plain language model on `TextBatch` rows."""

    def loss(params, batch: TextBatch, base=None):
        (hidden,), _ = model.apply({"params": params}, [model.apply({"params": params}, batch.tokens, method="embed")])
        return cross_entropy(model, params, hidden[:, :-1], batch.tokens[:, 1:], batch.mask[:, 1:]), {}

    return loss


def verbalizer_loss(verbalizer: Verbalizer):
    """Mean cross-entropy in nats per token of the labels' text, given the activations."""

    def loss(params, batch: TextBatch, base=None):
        whole = verbalizer.assemble(params, base)
        hidden = verbalizer.read_responses(whole, batch.vectors, batch.tokens)
        return cross_entropy(verbalizer.model, whole, hidden, batch.tokens, batch.mask), {}

    return loss


def reconstructor_loss(reconstructor: Reconstructor):
    """Mean normalised mse of the activations rebuilt from the labels' text."""

    def loss(params, batch: TextBatch, base=None):
        prediction = reconstructor.reconstruct(reconstructor.assemble(params, base), batch.tokens, batch.lengths)
        mse = normalised_mse(prediction, batch.vectors)
        gold = normalise(batch.vectors)
        return mse.mean(), {"fve": 1 - mse.mean() / jnp.mean((gold - gold.mean(0)) ** 2)}

    return loss
