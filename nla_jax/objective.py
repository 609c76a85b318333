"""The objective's parts, as values: what a config names by import path. Write your own in any file.

| part | signature | config |
|---|---|---|
| reward | `(Scored) -> [B]` | `rl.reward` |
| advantage | `([A, G]) -> [A, G]` | `rl.advantage` |
| reader | `(texts, rng) -> texts` | `rl.reader` |
| features | `(texts, rows) -> {name: [B]}` | `rl.features` |
| optimizer | `(**settings) -> optax.GradientTransformation` | `*.optimizer.function` |

Rewards and advantages run inside the compiled step, on the samples of one micro-batch. Readers and features run on the
host, between the rollout and the step.
"""

import functools
import math
import re
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
from flax import struct
from jaxtyping import Array, Float, Int

from nla_jax.runtime.errors import InputError

UNCORRELATED = 2.0  # the mse of a cosine of 0: what a failed response counts as
TRUTH, SUBJECT_KL = "truth", "subject_kl"  # the features that `rl.truth` and `rl.subject_kl` measure


@struct.dataclass
class Scored:
    """What a reward may read. B responses, the G samples of an activation in a row.

    A response is `valid` if it ended in time and holds an explanation. One that failed is trained on too, so a reward
    decides what it is worth; its `mse` and `cosine` are those of an uncorrelated reconstruction (2 and 0), whatever the
    AR made of it."""

    mse: Array  # [B], of the reconstruction, 2(1 - cos), in [0, 4]
    cosine: Array  # [B]
    valid: Array  # [B], bool
    mask: Array  # [B, R], which tokens of a response are real, the end token included
    logprobs: Array  # [B, R], of the sampled tokens, as the sampler drew them
    features: dict[str, Array]  # [B] each: what `rl.features` computed on the host, by name
    cosines: Array  # [B, A], with every activation of the step, whatever its micro-batches; 0 where it failed
    own: Array  # [B], which of these activations is its own

    @property
    def length(self) -> Int[Array, "B"]:
        """Tokens of each response: tags, explanation and end."""
        return self.mask.sum(1)

    @property
    def entropy(self) -> Float[Array, "B"]:
        """Nats per token of each response, estimated from the tokens that were drawn: minus their mean
        log-probability."""
        return -jnp.sum(self.logprobs * self.mask, 1) / jnp.maximum(self.length, 1)

    def feature(self, name: str, given_by: str) -> Array:
        """The feature `name` `[B]`. Raises `InputError` that names the setting which gives it, where it is not there."""
        if name not in self.features:
            raise InputError(f"This reward reads the feature {name!r}; set {given_by}.")
        return self.features[name]


# Rewards


def negative_mse(s: Scored) -> Float[Array, "B"]:
    """-mse = -2(1 - cos), the paper's reward; a failed response gets -2."""
    return jnp.where(s.valid, -s.mse, -UNCORRELATED)


def negative_log_mse(s: Scored) -> Float[Array, "B"]:
    """-log mse: converges faster, writes worse, may collapse at small batches. A failed response gets -log 2."""
    return jnp.where(s.valid, -jnp.log(s.mse + 1e-6), -np.log(UNCORRELATED))


def truthful(s: Scored, weight: float = 0.2) -> Float[Array, "B"]:
    """-mse + `weight` · truth: pays for claims that hold, which the reconstruction alone does not.

    An explanation whose claims are all true earns as much as by an mse that is lower by `weight`. The feature `truth`
    (`rl.truth`) is the share of its claims that hold, by the run's labeller. A failed response gets -2."""
    return jnp.where(s.valid, -s.mse + weight * s.feature(TRUTH, "rl.truth=True"), -UNCORRELATED)


PRICE = 0.01  # of a token
ALLOWED = 24  # tokens of a response that cost nothing: tags and end take about 8


def short(s: Scored, price: float = PRICE) -> Float[Array, "B"]:
    """-mse - `price` · tokens: each token has to be worth its price in mse. A failed response gets -2 less the price of
    the longest one.

    Others' pairs, of texts of 127 tokens: a price of .001 gave FVE .592 at 92 tokens, .006 gave .482 at 32 (.585
    without one)."""
    return _priced(s, price * s.length, price * s.mask.shape[1])


def within(s: Scored, allowed: int = ALLOWED, price: float = 2 * PRICE) -> Float[Array, "B"]:
    """-mse - `price` · tokens beyond `allowed`: a hinge, which leaves texts alone that are short enough. A failed
    response gets -2 less the price of the longest one."""
    longest = max(0, s.mask.shape[1] - allowed)
    return _priced(s, price * jnp.maximum(s.length - allowed, 0), price * longest)


def own_words(s: Scored, price: float = 0.5) -> Float[Array, "B"]:
    """-mse - `price` · copied: what is copied from the text has to be worth it.

    The feature `copied` (below) is the share of a text's characters that its source holds too. It looks at no quotation
    mark: a quotation that is moved into brackets costs the same. A failed response gets -2 - `price`."""
    return _priced(s, price * s.feature("copied", "rl.features=nla_jax.objective:copied"), price)


def contrastive(s: Scored, weight: float = 0.1, temperature: float = 0.1) -> Float[Array, "B"]:
    """-mse + `weight` · log p, where p is the share of the own activation in a softmax over the cosines of the
    reconstruction with all activations of the step, divided by `temperature` (InfoNCE, van den Oord et al. 2018).

    What tells an activation from the others pays, what they all have in common does not. A failed response gets -2, and
    of log p the chance level, one of A."""
    logp = jax.nn.log_softmax(s.cosines / temperature)
    own = jnp.take_along_axis(logp, s.own[:, None], 1)[:, 0]
    return _priced(s, -weight * own, weight * math.log(s.cosines.shape[1]))


def downstream(s: Scored, weight: float = 0.1, most: float = 5.0) -> Float[Array, "B"]:
    """-mse - `weight` · KL(subject || patched subject): what the subject expects next has to survive as well.

    The feature `subject_kl` (`rl.subject_kl`) is that of the next token when the reconstruction, as long as the
    activation, stands in its place after block K: what Braun et al. (2024) train sparse autoencoders on, here as a reward.
    A few texts have many nats: from `most` on they count the same, which a failed response pays too."""
    return _priced(s, weight * jnp.minimum(s.feature(SUBJECT_KL, "rl.subject_kl=True"), most), weight * most)


def _priced(s: Scored, price: Float[Array, "B"], of_failed: float) -> Float[Array, "B"]:
    """-mse - price; -2 - `of_failed` for a failed response."""
    return jnp.where(s.valid, -s.mse - price, -UNCORRELATED - of_failed)


# Advantages


def group_normalised(rewards: Float[Array, "A G"]) -> Float[Array, "A G"]:
    """GRPO: (r - mean_G r) / (std_G r + eps)."""
    centred = rewards - rewards.mean(1, keepdims=True)
    return centred / (rewards.std(1, keepdims=True) + 1e-4)


# Readers: what the AR reads of the explanations of one activation. `rng` depends on seed, step and activation only.


def whole(texts: list[str], rng: np.random.Generator) -> list[str]:
    """The explanations as they are."""
    return texts


def random_prefix(texts: list[str], rng: np.random.Generator) -> list[str]:
    """Each text cut after the same random share of its words: what matters has to come first."""
    share = rng.uniform()
    return [" ".join(words[: max(1, round(share * len(words)))]) for words in map(str.split, texts)]


def prefix_or_whole(texts: list[str], rng: np.random.Generator) -> list[str]:
    """The texts of every second activation, on average, cut as by `random_prefix`; the others whole, as they are read
    after training."""
    return random_prefix(texts, rng) if rng.random() < 0.5 else texts


def without_quotes(texts: list[str], rng: np.random.Generator) -> list[str]:
    """The texts without what stands in double quotes: copying the context earns nothing."""
    return [re.sub(r'"[^"]*"', '""', text) for text in texts]


# Features: what a reward may read of the texts themselves


def copied(texts: list[str], rows: list[dict], span: int = 12) -> dict[str, Float[np.ndarray, "B"]]:
    """`copied`: the share of each text's characters that lie in a stretch of `span` or more characters which the text of
    its row holds too; 0 for an empty text. Single words are shorter than that, and turns of phrase.

    Upper and lower case, and one blank or many, make no difference. `own_words` prices it."""
    return {"copied": np.array([coverage(text, row["text"], span) for text, row in zip(texts, rows)], np.float32)}


def coverage(text: str, source: str, span: int = 12) -> float:
    """The share of the characters of `text` that lie in stretches of `span` or more characters of `source`."""
    text, stretches = _plain(text), _stretches(source, span)
    covered = np.zeros(len(text), bool)
    for start in range(len(text) - span + 1):
        if text[start : start + span] in stretches:
            covered[start : start + span] = True
    return float(covered.mean()) if text else 0.0


@functools.lru_cache(maxsize=256)  # the samples of an activation share their source
def _stretches(source: str, span: int) -> frozenset[str]:
    """Every stretch of `span` characters."""
    source = _plain(source)
    return frozenset(source[start : start + span] for start in range(len(source) - span + 1))


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


# Optimizers

ADAMW = {"b1": 0.9, "b2": 0.99, "eps": 1e-8, "weight_decay": 0.0}  # what `adamw` has where nothing else is said


def adamw(
    steps: int,
    lr: float,
    final_lr: float | None = None,
    warmup: int = 0,
    clip: float = 1.0,
    **settings: float,
) -> optax.GradientTransformation:
    """AdamW after clipping to global norm `clip`: linear warm-up over `warmup` steps, then a cosine from `lr` to
    `final_lr` at step `steps` (constant where `final_lr` is None).

    `settings`: b1 (0.9), b2 (0.99), eps (1e-8) and weight_decay (0) of `optax.adamw`. The learning rate of each step is
    part of the state, so that training can log it. Raises `InputError` for a number that no AdamW can use."""
    settings = ADAMW | settings
    _check("AdamW", {"lr": lr, "final_lr": final_lr or 0.0, "warmup": warmup, "clip": clip} | settings)
    at = _schedule(steps, lr, final_lr, warmup)
    return optax.chain(optax.clip_by_global_norm(clip), optax.adamw(at, **settings), shown(at))


def muon(
    steps: int,
    lr: float,
    final_lr: float | None = None,
    warmup: int = 0,
    clip: float = 1.0,
    adam_share: float = 0.3,
    beta: float = 0.95,
    ns_steps: int = 5,
    **settings: float,
) -> optax.GradientTransformation:
    """Muon for the matrices of the blocks and of adapters, each layer's by itself; AdamW at `adam_share` times the
    learning rate for everything else. Clipping and the course of `lr` are those of `adamw`.

    `beta`: Muon's momentum. `ns_steps`: its Newton-Schulz iterations. `settings`: those of `adamw`; weight decay is of
    both. The learning rate that is logged is Muon's. Raises `InputError` for a number that it cannot use. Source:
    `optax.contrib.muon` (which by itself takes parameters of two axes for matrices: here norms, embedding and heads)."""
    settings = ADAMW | settings
    numbers = {"lr": lr, "final_lr": final_lr or 0.0, "warmup": warmup, "clip": clip, "adam_share": adam_share}
    _check("Muon", numbers | {"beta": beta, "ns_steps": ns_steps} | settings)
    at = _schedule(steps, lr, final_lr, warmup)
    decay = settings["weight_decay"]
    parts = {
        "matrices": optax.contrib.muon(
            at, ns_steps=ns_steps, beta=beta, weight_decay=decay, muon_weight_dimension_numbers=_each(_axes)
        ),
        "others": optax.adamw(lambda step: at(step) * adam_share, **settings),
    }
    parted = optax.partition(parts, _each(lambda path: "matrices" if _axes(path) else "others"))
    return optax.chain(optax.clip_by_global_norm(clip), parted, shown(at))


def _each(of: Callable) -> Callable:
    """A function of a tree of parameters: `of(path)` of each, the path as names."""
    names = lambda path: tuple(part.key for part in path)
    return lambda params: jax.tree_util.tree_map_with_path(lambda path, _: of(names(path)), params)


def _axes(path: tuple[str, ...]) -> optax.contrib.MuonDimensionNumbers | None:
    """Inputs and outputs of a block's matrix, whose first axis is the layer; None for what is no such matrix."""
    if path[-1] not in ("kernel", "lora_a", "lora_b"):
        return None
    heads_in, heads_out = path[-2] == "o" and path[-1] != "lora_b", path[-2] in ("q", "k", "v") and path[-1] != "lora_a"
    inputs = (1, 2) if heads_in else (1,)
    outputs = tuple(range(1 + len(inputs), 2 + len(inputs) + heads_out))
    return optax.contrib.MuonDimensionNumbers(inputs, outputs)


def _check(who: str, numbers: dict) -> None:
    for name, value in numbers.items():
        highest = 1.0 if name in ("b1", "b2", "beta") else math.inf
        if isinstance(value, (int, float)) and not 0 <= value < highest:
            raise InputError(f"{who}'s {name} is {value}; it must be at least 0{' and below 1' * (highest == 1)}.")


def _schedule(steps: int, lr: float, final_lr: float | None, warmup: int) -> optax.Schedule:
    if final_lr is None:
        return optax.linear_schedule(lr / (warmup + 1), lr, warmup)
    return optax.warmup_cosine_decay_schedule(lr / (warmup + 1), lr, warmup, max(steps, warmup + 1), final_lr)


class LearningRate(NamedTuple):
    """The state of `shown`: steps made, and the learning rate of the last one."""

    count: Int[Array, ""]
    learning_rate: Float[Array, ""]


def shown(schedule: optax.Schedule) -> optax.GradientTransformation:
    """Changes no update; keeps the learning rate of each step in its state, where the metrics find it."""
    at = lambda count: jnp.asarray(schedule(count), jnp.float32)
    return optax.GradientTransformation(
        lambda params: LearningRate(jnp.int32(0), at(0)),
        lambda updates, state, params=None: (updates, LearningRate(state.count + 1, at(state.count))),
    )
