"""The rollout: sampling explanations with a key/value cache inside one jitted program."""

import functools

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from nla_jax.autoencoder import Verbalizer
from nla_jax.models.transformer import empty_cache


@struct.dataclass
class Rollout:
    """`tokens [B, R]`: responses, B = A·G, padded with the end token. `logprobs [B, R]`: of the sampled tokens under
    softmax(logits / temperature). `mask [B, R]`: True up to and including the end token. `finished [B]`: False where the
    response was cut at R tokens."""

    tokens: Int[Array, "B R"]
    logprobs: Float[Array, "B R"]
    mask: Bool[Array, "B R"]
    finished: Bool[Array, "B"]


def sample_token(
    rng: Array, logits: Float[Array, "V"], temperature: float, top_k: int | None, top_p: float | None
) -> tuple[Int[Array, ""], Float[Array, ""]]:
    """One token of one row and its log-probability under softmax(logits / temperature); temperature 0 is greedy (the
    log-probability is then that of temperature 1). `top_k` and `top_p` restrict what can be drawn, in float32."""
    logp = jax.nn.log_softmax(logits.astype(jnp.float32) / (temperature or 1.0))
    if temperature == 0:
        token = jnp.argmax(logp)
        return token, logp[token]
    allowed = logp
    if top_k is not None:
        allowed = jnp.where(logp >= jax.lax.top_k(logp, top_k)[0][-1], allowed, -jnp.inf)
    if top_p is not None:
        ordered = jnp.sort(logp)[::-1]
        before = jnp.cumsum(jnp.exp(ordered)) - jnp.exp(ordered)  # the mass of all likelier tokens
        last = jnp.min(jnp.where(before < top_p, ordered, jnp.inf))
        allowed = jnp.where(logp >= last, allowed, -jnp.inf)
    # Inverse CDF: one uniform number a row, where the Gumbel trick draws one for every entry of the vocabulary.
    mass = jnp.cumsum(jnp.exp(allowed))
    token = jnp.searchsorted(mass, mass[-1] * (1 - jax.random.uniform(rng)), side="left")
    if allowed is not logp:  # rounding of the sum may name a token without mass
        token = jnp.where(allowed[token] > -jnp.inf, token, jnp.argmax(allowed))
    return token, logp[token]


@functools.partial(jax.jit, static_argnames=("verbalizer", "group", "max_new_tokens", "temperature", "top_k", "top_p"))
def rollout(
    verbalizer: Verbalizer,
    params: dict,
    vectors: Float[Array, "A D"],
    rng: Array,
    first_row: Int[Array, ""] | int = 0,
    *,
    group: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Rollout:
    """`group` responses for each activation, at most `max_new_tokens` tokens; the loop ends when every row has ended.

    Row i draws from `fold_in(rng, first_row + i)`: the text does not depend on how a batch is cut or sharded."""
    model = verbalizer.model
    past, first = verbalizer.read_prompt(params, vectors)
    B, R = len(vectors) * group, max_new_tokens
    keys = jax.vmap(jax.random.fold_in, (None, 0))(rng, first_row + jnp.arange(B))

    def sample(t, hidden):
        logits = model.apply({"params": params}, hidden, method="logits")
        draw = lambda key, row: sample_token(jax.random.fold_in(key, t), row, temperature, top_k, top_p)
        return jax.vmap(draw)(keys, logits)

    def write(state: Rollout, t, token, logp) -> Rollout:
        running = ~state.finished
        return Rollout(
            state.tokens.at[:, t].set(jnp.where(running, token, verbalizer.end)),
            state.logprobs.at[:, t].set(jnp.where(running, logp, 0)),
            state.mask.at[:, t].set(running),
            state.finished | (token == verbalizer.end),
        )

    def step(carry):
        t, state, cache = carry
        x = verbalizer.embed(params, jax.lax.dynamic_slice_in_dim(state.tokens, t - 1, 1, 1))
        hidden, cache = model.apply(
            {"params": params}, x, past, cache, verbalizer.prompt_length, t - 1, method="decode"
        )
        return t + 1, write(state, t, *sample(t, hidden[:, 0])), cache

    empty = Rollout(
        jnp.full((B, R), verbalizer.end, jnp.int32), jnp.zeros((B, R)), jnp.zeros((B, R), bool), jnp.zeros(B, bool)
    )
    state = write(empty, 0, *sample(0, jnp.repeat(first, group, axis=0)))
    cache = empty_cache(model.config, B, max(R - 1, 1))
    running = lambda carry: (carry[0] < R) & ~jnp.all(carry[1].finished)
    return jax.lax.while_loop(running, step, (jnp.int32(1), state, cache))[1]
