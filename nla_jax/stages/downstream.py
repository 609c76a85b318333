"""What the subject makes of each reconstruction of an RL step: `rl.subject_kl`, a feature of the reward.

KL(subject || patched subject) of the next token, when the reconstruction, at the length of the activation, stands in its
place after block K: `nla_jax.patching` computes it, `nla_jax.objective:downstream` pays for it."""

import functools

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from nla_jax.autoencoder import Reconstructor
from nla_jax.data.rows import Rows
from nla_jax.joint_step import JointBatch
from nla_jax.models.sharding import batch_sharding, host_mesh, local_rows, place_local
from nla_jax.objective import SUBJECT_KL
from nla_jax.patching import effects
from nla_jax.study import Study
from nla_jax.subject import Subject


class Downstream:
    """Measures the texts of an RL step by the subject, between the rollout and the optimiser step.

    The AR as it is reads them (once more than in the step), and the subject reads on from what it rebuilds. The whole
    subject lies beside the training state, on other devices than CPUs its blocks after K twice (`Subject.rest`). Each
    host measures the rows of its own devices. `base`: the model beneath adapters. Raises `InputError` where the tokens of
    the data are not known."""

    def __init__(self, study: Study, subject: Subject, data: Rows, base: dict | None):
        self.study, self.subject, self.data, self.base = study, subject, data, base
        data.token_ids(np.arange(1))

    def __call__(self, batch: JointBatch, rows: Int[np.ndarray, "A"], reconstructor: dict) -> JointBatch:
        """The batch with the feature; `rows`: which of the data its activations are; `reconstructor`: the AR's
        parameters, as they are trained."""
        ar = self.study.reconstructor
        params, pieces = ar.assemble(reconstructor, self.base), self.study.config.rl.micro_batches
        recon = reconstructions(ar, params, batch.texts, batch.text_lengths, pieces)
        own, recon = local_rows(jax.device_put(recon, batch_sharding(self.study.mesh, recon.shape)))
        group = len(batch.valid) // len(rows)
        with jax.set_mesh(host_mesh(self.study.mesh)):
            found = self.divergence(rows[np.unique(own // group)], own, recon, group)
        placed = place_local(batch.valid.sharding, own, found, len(batch.valid))
        return batch.replace(features=batch.features | {SUBJECT_KL: placed})

    def divergence(
        self, rows: Int[np.ndarray, "a"], own: Int[np.ndarray, "b"], recon: Float[np.ndarray, "b D"], group: int
    ) -> Float[np.ndarray, "b"]:
        """KL(original || patched) of the subject's next token for each reconstruction, in nats; NaN where the AR has
        broken down, so that the step is skipped.

        `rows`: the activations on this host; `own`: which samples of the batch the reconstructions belong to. The
        samples of an activation are so many conditions of one patch, which share all tokens before it."""
        activation, sample = np.unique(own // group, return_inverse=True)[1], own % group
        usable = np.isfinite(recon).all(1) & recon.any(1)
        given = np.ones((group, len(rows), recon.shape[1]), np.float32)
        given[sample[usable], activation[usable]] = recon[usable]
        patches = {str(i): vectors for i, vectors in enumerate(given)}
        found = effects(self.subject, self.data.token_ids(rows), "last", patches)
        kl = np.stack([np.concatenate(found[name].kl) for name in patches]).astype(np.float32)
        return np.where(usable, kl[sample, activation], np.float32(np.nan))


@functools.partial(jax.jit, static_argnums=(0, 4))
def reconstructions(
    reconstructor: Reconstructor, params: dict, texts: Int[Array, "B T"], lengths: Int[Array, "B"], pieces: int
) -> Float[Array, "B D"]:
    """What the AR makes of the texts of a step (of several layers the last), read in as many `pieces` as the step has
    micro-batches."""
    parts = jax.tree.map(lambda x: x.reshape(pieces, -1, *x.shape[1:]), (texts, lengths))
    recon = jax.lax.map(lambda part: reconstructor.reconstruct(params, *part), parts)
    return recon.reshape(len(texts), -1)[:, -reconstructor.model.config.width :]
