"""The joint step and the supervised step: pure functions of (state, batch), jitted by their callers.

`JointStep` takes one rollout and makes one optimiser step on each model:

    reconstructor   L_AR = mean_i mse_i                      mse_i = |p̂_i - ĝ_i|² / d = 2(1 - cos)
    reward          r_i = reward(mse_i, ...)                 it also decides what a failed response gets (-mse: -2)
    advantage       a_i = (r_i - mean_group r) / std_group r
    verbalizer      L_AV = -mean_tokens a_i log π(y_it) + β mean_tokens KL(π ‖ π_warm)

The AR's forward pass gives both its own loss and the AV's reward. There is exactly one optimiser step per rollout, so
the data is on-policy and no pass for old log-probabilities is needed; the difference between the sampler's
log-probabilities and this step's is measured instead. Deviation from the paper's reference: the KL is exact, not a
sampled estimate.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from nla_jax.autoencoder import Reconstructor, Verbalizer
from nla_jax.fve import mse, normalise, variance
from nla_jax.losses import TokenLoss, TokenStatistics, masked_mean
from nla_jax.objective import UNCORRELATED, Scored, group_normalised, negative_mse
from nla_jax.runtime.errors import InputError


@struct.dataclass
class ModelState:
    """One model under training: its parameters and its optimiser's state."""

    params: dict
    opt: Any


@struct.dataclass
class TrainState:
    """All that training changes: the number of steps made, and the models by name.

    Frozen weights are a separate argument (`Frozen`) and never in a checkpoint."""

    step: Array  # int32
    models: dict[str, ModelState]


@struct.dataclass
class Frozen:
    """What joint training reads but never changes.

    `reference`: the warm-started AV, of the KL (None where its coefficient is 0). `base`: the model beneath LoRA
    adapters (None where both models are trained whole)."""

    reference: dict | None
    base: dict | None = None


@struct.dataclass
class JointBatch:
    """One rollout after the host has read it. B = A·G; an activation's G samples stand in a row."""

    vectors: Array  # [A, D]
    responses: Array  # [B, R]
    response_mask: Array  # [B, R]
    sampler_logprobs: Array  # [B, R]
    finished: Array  # [B], the response ended in time
    texts: Array  # [B, T], what the AR reads: explanations in its template, re-tokenised, right-padded
    text_lengths: Array  # [B]
    valid: Array  # [B], it also holds an explanation
    features: dict[str, Array] = struct.field(default_factory=dict)  # [B] each


def init_model(tx: optax.GradientTransformation, params: dict) -> ModelState:
    """A model before its first step."""
    return ModelState(params, tx.init(params))


def update(tx: optax.GradientTransformation, grads: dict, model: ModelState) -> tuple[ModelState, dict]:
    """One optimiser step. Where the gradient or the update is not finite, the model stays as it is, and `skipped` says
    so.

    Metrics: the global norms of gradient and update, and the learning rate where the optimiser tells it."""
    updates, opt = tx.update(grads, model.opt, model.params)
    norms = {"grad_norm": optax.tree.norm(grads), "update_norm": optax.tree.norm(updates)}
    finite = jnp.isfinite(norms["grad_norm"]) & jnp.isfinite(norms["update_norm"])
    new = ModelState(optax.apply_updates(model.params, updates), opt)
    kept = jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, model)
    return kept, norms | learning_rate(opt) | {"skipped": ~finite}


def learning_rate(opt: Any) -> dict[str, Array]:
    """`{"lr": ...}` from the state of an optimiser that has it (`objective.shown`, `optax.inject_hyperparams`), else
    `{}`."""
    tells = lambda x: hasattr(x, "learning_rate") or "learning_rate" in getattr(x, "hyperparams", {})
    found = [x for x in jax.tree.leaves(opt, is_leaf=tells) if tells(x)]
    if not found:
        return {}
    return {
        "lr": found[0].learning_rate if hasattr(found[0], "learning_rate") else found[0].hyperparams["learning_rate"]
    }


@dataclasses.dataclass(frozen=True)
class JointStep:
    """What one joint step is made of; every function can be replaced without editing this package."""

    verbalizer: Verbalizer
    reconstructor: Reconstructor
    verbalizer_tx: optax.GradientTransformation
    reconstructor_tx: optax.GradientTransformation
    reward: Callable[[Scored], Float[Array, "B"]] = negative_mse
    advantage: Callable[[Float[Array, "A G"]], Float[Array, "A G"]] = group_normalised
    kl_coefficient: float = 0.01
    temperature: float = 1.0
    micro_batches: int = 1
    __name__ = "joint_step"  # of the compiled program, in profiles

    def init(self, verbalizer: dict, reconstructor: dict) -> TrainState:
        """The state before the first step."""
        models = {
            "verbalizer": init_model(self.verbalizer_tx, verbalizer),
            "reconstructor": init_model(self.reconstructor_tx, reconstructor),
        }
        return TrainState(jnp.int32(0), models)

    def __call__(self, state: TrainState, frozen: Frozen, batch: JointBatch) -> tuple[TrainState, dict, dict]:
        """One optimiser step on each model.

        Returns the new state, scalar metrics, and `mse` and `reward` of each sample `[B]`. A model whose gradient is
        not finite skips its step."""
        grads, samples = self._accumulate(state, frozen, batch)
        av, of_av = update(self.verbalizer_tx, grads["verbalizer"], state.models["verbalizer"])
        ar, of_ar = update(self.reconstructor_tx, grads["reconstructor"], state.models["reconstructor"])
        metrics = self._metrics(batch, samples)
        metrics |= {f"av_{name}": x for name, x in of_av.items()} | {f"ar_{name}": x for name, x in of_ar.items()}
        metrics["skipped"] = of_av["skipped"] | of_ar["skipped"]
        new = TrainState(state.step + 1, {"verbalizer": av, "reconstructor": ar})
        return new, metrics, {name: samples[name] for name in ("mse", "reward")}

    def _accumulate(self, state: TrainState, frozen: Frozen, batch: JointBatch) -> tuple[dict, dict]:
        """Gradients by model and results per sample, summed over micro-batches that keep groups whole."""
        counts = {"tokens": batch.response_mask.sum(), "texts": jnp.maximum(batch.valid.sum(), 1)}
        of_step = counts | {"vectors": batch.vectors}
        params, n = {name: model.params for name, model in state.models.items()}, self.micro_batches
        places = jnp.arange(len(batch.vectors))
        if n == 1:
            return self._gradients(params, frozen, batch, places, of_step)

        def one(total, part):
            grads, samples = self._gradients(params, frozen, *part, of_step)
            return jax.tree.map(jnp.add, total, grads), samples

        parts = jax.tree.map(lambda x: x.reshape(n, len(x) // n, *x.shape[1:]), (batch, places))
        grads, samples = jax.lax.scan(one, jax.tree.map(jnp.zeros_like, params), parts)
        return grads, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), samples)

    def _gradients(
        self, params: dict, frozen: Frozen, batch: JointBatch, places: Int[Array, "A"], of_step: dict
    ) -> tuple[dict, dict]:
        """The objective on one micro-batch; its activations stand at `places` among those of the whole batch.

        `of_step`: the activations of the whole batch, and how many tokens and texts it has."""
        A, B = len(batch.vectors), len(batch.responses)
        gold = jnp.repeat(batch.vectors, B // A, axis=0)

        def reconstruction_loss(params):
            whole = self.reconstructor.assemble(params, frozen.base)
            recon = self.reconstructor.reconstruct(whole, batch.texts, batch.text_lengths)
            errors = mse(recon, gold)
            return jnp.sum(jnp.where(batch.valid, errors, 0)) / of_step["texts"], (errors, recon)

        ar_grads, (errors, recon) = jax.grad(reconstruction_loss, has_aux=True)(params["reconstructor"])

        units = normalise(recon, 1.0), normalise(of_step["vectors"], 1.0)
        cosines = jnp.einsum("BD,AD->BA", *units, precision="highest")  # never in bfloat16
        scored = self._scored(batch, errors, cosines, jnp.repeat(places, B // A))
        reward, advantage = judge(self.reward, self.advantage, scored, A)
        weights = batch.response_mask / of_step["tokens"]
        anchor = None
        if self.kl_coefficient:
            reference = self.verbalizer.assemble(frozen.reference, frozen.base)
            anchor = reference, self.verbalizer.read_responses(reference, batch.vectors, batch.responses)

        def objective(tokens: TokenStatistics, weight, weighted_advantage):
            return -weighted_advantage * tokens.logprob + self.kl_coefficient * weight * tokens.kl

        def policy_loss(params):
            whole = self.verbalizer.assemble(params, frozen.base)
            hidden = self.verbalizer.read_responses(whole, batch.vectors, batch.responses)
            loss = TokenLoss(self.verbalizer.model, objective, self.temperature)
            return loss(whole, hidden, batch.responses, weights, weights * advantage, reference=anchor)

        av_grads, tokens = jax.grad(policy_loss, has_aux=True)(params["verbalizer"])
        return {"verbalizer": av_grads, "reconstructor": ar_grads}, {"mse": errors, "reward": reward, "tokens": tokens}

    def _scored(
        self, batch: JointBatch, errors: Float[Array, "B"], cosines: Float[Array, "B A"], own: Int[Array, "B"]
    ) -> Scored:
        return Scored(
            mse=jnp.where(batch.valid, errors, UNCORRELATED),
            cosine=jnp.where(batch.valid, 1 - errors / 2, 0),
            valid=batch.valid,
            mask=batch.response_mask,
            logprobs=batch.sampler_logprobs,
            features=batch.features,
            cosines=jnp.where(batch.valid[:, None], cosines, 0),
            own=own,
        )

    def _metrics(self, batch: JointBatch, samples: dict) -> dict:
        mask, groups = batch.response_mask, len(batch.vectors)
        gap = jnp.where(mask, jnp.abs(samples["tokens"].logprob - batch.sampler_logprobs), 0)
        rewards = samples["reward"].reshape(groups, -1)
        return {
            "reward": samples["reward"].mean(),
            "fve": 1 - samples["mse"].mean() / variance(batch.vectors),
            "mse": samples["mse"].mean(),
            "kl": masked_mean(samples["tokens"].kl, mask),
            "entropy": masked_mean(samples["tokens"].entropy, mask),
            "length": mask.sum(1).mean(),
            "extraction_rate": batch.valid.mean(),
            "truncated": 1 - batch.finished.mean(),
            "identical_texts": identical_share(batch.texts, batch.valid, groups),
            "groups_without_advantage": (jnp.ptp(rewards, 1) < 1e-6).mean(),
            "logprob_gap_mean": gap.sum() / jnp.maximum(mask.sum(), 1),
            "logprob_gap_p99": masked_quantile(gap, mask, 0.99),
            "logprob_gap_max": gap.max(),
        } | {f"feature/{name}": jnp.mean(x) for name, x in batch.features.items()}


def judge(
    reward: Callable[[Scored], Array], advantage: Callable[[Array], Array], scored: Scored, groups: int
) -> tuple[Float[Array, "B"], Float[Array, "B 1"]]:
    """Reward and advantage of each response. Raises `InputError` where one of the functions gives another shape."""
    B = len(scored.mse)
    rewards = _shaped(reward, reward(scored), (B,))
    advantages = _shaped(advantage, advantage(rewards.reshape(groups, -1)), (groups, B // groups))
    return rewards, advantages.reshape(B, 1)


def _shaped(function: Callable, x: Array, shape: tuple[int, ...]) -> Float[Array, "..."]:
    """x, float32. Raises `InputError` for another shape than expected, which might be broadcast unnoticed."""
    if jnp.shape(x) != shape:
        raise InputError(f"{function} gives an array of shape {jnp.shape(x)}, expected {shape}.")
    return jnp.asarray(x, jnp.float32)


def masked_quantile(x: Float[Array, "*B"], mask: Bool[Array, "*B"], q: float) -> Float[Array, ""]:
    """The q-quantile of x where `mask` is True (x is 0 elsewhere): that of all entries from the masked share on."""
    rank = jnp.int32(jnp.ceil(q * mask.sum())) + mask.size - mask.sum() - 1
    return jnp.sort(x.reshape(-1))[jnp.maximum(rank, 0)]


def identical_share(texts: Int[Array, "B T"], valid: Bool[Array, "B"], groups: int) -> Float[Array, ""]:
    """The share of the valid texts that another valid text of the same group equals, token by token."""
    texts, valid = texts.reshape(groups, -1, texts.shape[1]), valid.reshape(groups, -1)
    equal = jnp.all(texts[:, :, None] == texts[:, None], -1) & valid[:, None] & ~jnp.eye(valid.shape[1], dtype=bool)
    return jnp.sum(equal.any(-1) & valid) / jnp.maximum(valid.sum(), 1)


@dataclasses.dataclass(frozen=True)
class SupervisedStep:
    """One optimiser step of the model `name` on `loss(params, batch, base) -> (scalar, metrics)`: pretraining, warm
    starts.

    `base` is the frozen model beneath a LoRA adapter, None where the model is trained whole."""

    name: str
    loss: Callable
    tx: optax.GradientTransformation
    __name__ = "supervised_step"  # of the compiled program, in profiles

    def init(self, params: dict) -> TrainState:
        """The state before the first step."""
        return TrainState(jnp.int32(0), {self.name: init_model(self.tx, params)})

    def __call__(self, state: TrainState, batch: Any, base: dict | None = None) -> tuple[TrainState, dict]:
        """One step. Returns the new state and scalar metrics."""
        model = state.models[self.name]
        (loss, metrics), grads = jax.value_and_grad(self.loss, has_aux=True)(model.params, batch, base)
        model, of_update = update(self.tx, grads, model)
        return TrainState(state.step + 1, {self.name: model}), metrics | {"loss": loss} | of_update
