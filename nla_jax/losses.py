"""The losses: of tokens under a language model, with statistics per token, and of the two warm starts.

`TokenLoss` works through the tokens chunk by chunk, so that logits `[tokens, vocabulary]` never exist as a whole. Where
a gradient is wanted, each chunk makes its part of it while its logits are there, so that none is computed twice.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Shaped

from nla_jax.autoencoder import Reconstructor, Verbalizer
from nla_jax.data.batches import TextBatch
from nla_jax.fve import mse, variance
from nla_jax.models.sharding import on_each_device
from nla_jax.models.transformer import Transformer, output_head

# Up to this many chunks the head's gradient is summed in its own dtype (bfloat16: 0.5 % error); beyond it in float32
# (bfloat16 would lose 8 to 15 % over 600 chunks).
FEW_CHUNKS = 32


@struct.dataclass
class TokenStatistics:
    """Of each token, `[*B]`."""

    logprob: Array  # log π(token)
    entropy: Array  # of π
    kl: Array  # KL(π ‖ reference) over the whole vocabulary; 0 without a reference


@dataclasses.dataclass(frozen=True)
class TokenLoss:
    """The sum over all tokens of `loss(statistics [n], *data [n]) -> [n]`, under softmax(logits / temperature).

    Only the returned sum has a gradient, not the statistics. Put constant factors (1/N, say) into `data`: scaling the
    sum afterwards would rescale a gradient of the head's size. The KL is exact (a sum over the vocabulary): its
    gradient has no sampling noise, and nothing in it can overflow as the k3 estimator does."""

    model: Transformer
    loss: Callable[..., Float[Array, "n"]]
    temperature: float = 1.0
    chunk: int = 512  # tokens at a time, at most

    def __call__(
        self,
        params: dict,
        hidden: Float[Array, "B R D"],
        targets: Int[Array, "B R"],
        *data: Shaped[Array, "B R"],
        reference: tuple[dict, Float[Array, "B R D"]] | None = None,
    ) -> tuple[Float[Array, ""], TokenStatistics]:
        """The sum, and the statistics of `targets [B, R]`, predicted from `hidden`, the states before the final norm.

        `data` are constants of each token. `reference`: another model's parameters and its states at the same tokens,
        constants too. Each device works on the rows that it holds."""
        other_params, other_hidden = reference or (None, None)
        heads = tuple(params and output_head(params, self.model.config) for params in (params, other_params))
        totals, tokens = on_each_device(self._of_rows, heads, hidden, targets, data, other_hidden)
        return totals.sum(), tokens

    def _log_softmax(self, head: dict, hidden: Float[Array, "n D"]) -> Float[Array, "n V"]:
        return jax.nn.log_softmax(self.model.apply({"params": head}, hidden, method="logits") / self.temperature)

    def _of_chunk(self, head, hidden, other_head, constants) -> tuple[Float[Array, ""], TokenStatistics]:
        """The sum and the statistics of one chunk of tokens; `real` marks those that are no padding."""
        targets, data, other_hidden, real = constants
        logp = self._log_softmax(head, hidden)
        p = jnp.exp(logp)
        chosen = jnp.take_along_axis(logp, targets[:, None], -1)[:, 0]
        kl = jnp.zeros_like(chosen)
        if other_head is not None:
            kl = jnp.sum(p * (logp - self._log_softmax(other_head, other_hidden)), -1)
        tokens = TokenStatistics(chosen, -jnp.sum(p * logp, -1), kl)
        return jnp.sum(jnp.where(real, self.loss(tokens, *data), 0)), tokens

    def _scan(self, of_chunk: Callable, carry, hidden, constants):
        """`of_chunk(carry, hidden, constants) -> (carry, (sum, *rest))` over the chunks of all tokens.

        Returns the last carry, the total `[1]`, and the rest as rows `[b, R, ...]` again."""
        shape = constants[0].shape
        n = shape[0] * shape[1]
        c = -(-n // (-(-n // self.chunk) * 8)) * 8  # equal chunks; a multiple of 8, to which a GPU would pad

        def chunks(x):  # [b, R, ...] -> [bR/c, c, ...]
            x = x.reshape(n, *x.shape[2:])
            return jnp.pad(x, ((0, -n % c), *[(0, 0)] * (x.ndim - 1))).reshape(-1, c, *x.shape[1:])

        xs = jax.tree.map(chunks, (hidden, (*constants, jnp.ones(shape, bool))))
        carry, (sums, *rest) = jax.lax.scan(lambda carry, x: of_chunk(carry, *x), carry, xs)
        rows = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:n].reshape(*shape, *x.shape[2:]), rest)
        return carry, sums.sum()[None], *rows

    def _of_rows(self, heads, hidden, *constants):
        """The total `[1]` and the statistics `[b, R]` of one device's rows, with a gradient for head and hidden."""

        @jax.custom_vjp
        def of_rows(trained, other_head, constants):
            head, hidden = trained
            plain = lambda _, hidden, constants: (None, self._of_chunk(head, hidden, other_head, constants))
            return self._scan(plain, None, hidden, constants)[1:]

        def forward(trained, other_head, constants):
            head, hidden = trained

            def with_gradient(d_head, hidden, constants):
                value = jax.value_and_grad(self._of_chunk, (0, 1), has_aux=True)
                (part, tokens), (more, d_hidden) = value(head, hidden, other_head, constants)
                return jax.tree.map(jnp.add, d_head, more), (part, tokens, d_hidden)

            few = constants[0].size <= FEW_CHUNKS * self.chunk
            zeros = jax.tree.map(lambda x: jnp.zeros_like(x, None if few else jnp.float32), head)
            d_head, total, tokens, d_hidden = self._scan(with_gradient, zeros, hidden, constants)
            return (total, tokens), (jax.tree.map(lambda g, x: g.astype(x.dtype), d_head, head), d_hidden)

        def backward(gradient, d_result):
            (d_total,), _ = d_result
            return jax.tree.map(lambda g: (d_total * g).astype(g.dtype), gradient), None, None

        of_rows.defvjp(forward, backward)
        return of_rows((heads[0], hidden), heads[1], constants)


def masked_mean(x: Float[Array, "*B"], mask: Bool[Array, "*B"]) -> Float[Array, ""]:
    """The mean of x where `mask` is True; 0 where it never is."""
    return jnp.sum(jnp.where(mask, x, 0)) / jnp.maximum(mask.sum(), 1)


# Losses of `SupervisedStep`: (params, batch, base) -> (scalar, metrics). `base`: the frozen model beneath an adapter.


def cross_entropy(
    model: Transformer,
    params: dict,
    hidden: Float[Array, "B R D"],
    targets: Int[Array, "B R"],
    mask: Bool[Array, "B R"],
) -> Float[Array, ""]:
    """Mean cross-entropy of `targets` in nats per token where `mask` is True."""
    weights = mask / jnp.maximum(mask.sum(), 1)
    loss = TokenLoss(model, lambda tokens, weight: -weight * tokens.logprob)
    return loss(params, hidden, targets, weights)[0]


def language_model_loss(model: Transformer) -> Callable:
    """Mean cross-entropy in nats per token of a plain language model on `TextBatch` rows."""

    def loss(params, batch: TextBatch, base=None):
        (hidden,), _ = model.apply({"params": params}, [model.apply({"params": params}, batch.tokens, method="embed")])
        return cross_entropy(model, params, hidden[:, :-1], batch.tokens[:, 1:], batch.mask[:, 1:]), {}

    return loss


def verbalizer_loss(verbalizer: Verbalizer) -> Callable:
    """Mean cross-entropy in nats per token of the labels' text, given the activations."""

    def loss(params, batch: TextBatch, base=None):
        params = verbalizer.assemble(params, base)
        hidden = verbalizer.read_responses(params, batch.vectors, batch.tokens)
        return cross_entropy(verbalizer.model, params, hidden, batch.tokens, batch.mask), {}

    return loss


def reconstructor_loss(reconstructor: Reconstructor) -> Callable:
    """Mean normalised mse of the activations rebuilt from the labels' text."""

    def loss(params, batch: TextBatch, base=None):
        prediction = reconstructor.reconstruct(reconstructor.assemble(params, base), batch.tokens, batch.lengths)
        error = mse(prediction, batch.vectors).mean()
        return error, {"fve": 1 - error / variance(batch.vectors)}

    return loss
