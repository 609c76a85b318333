"""Steering by an edited explanation: what the subject says when its activation is moved along AR(edited) - AR(original).

    found = nla.steer(subject, pair, "The hungry rabbit saw the", ("rabbit", "mouse"))
    for row in found.rows:
        print(row.direction, row.strength, row.kl, found.probability("mouse", row), row.continuation)

h' = h + strength · ‖h‖ · Δ / ‖Δ‖ at one token after block K. Beside the edit stand controls of the same size: an edit that
changes nothing (Δ = 0), a paraphrase, an unrelated edit, and a random direction. A claim about the edit needs all four.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Float, Int
from numpy.typing import ArrayLike
from transformers import PreTrainedTokenizerBase

from nla_jax.data.activations import in_words
from nla_jax.data.chats import Messages, answer_tokens, chat_tokens, checked, spoken_positions
from nla_jax.pair import Pair
from nla_jax.patching import patch
from nla_jax.runtime.errors import InputError
from nla_jax.runtime.user_input import is_finite, of_ordinary_length, real_array, text_list, token_limit, whole_number
from nla_jax.sampling import respond_edited
from nla_jax.subject import Subject, activations_at, extract

STRENGTHS = (0.25, 0.5, 1.0)  # lengths of the step, in lengths of the activation
OTHER = "The train to the coast leaves at noon."  # the text whose explanation is the unrelated edit
EDIT, NOTHING, PARAPHRASE = "edit", "no edit", "paraphrase"
UNRELATED, RANDOM = "unrelated edit", "random direction"
UNSTEERED = "unsteered"
MULTIPLE = 64  # texts are padded to a multiple of it, so that few programs are compiled


@dataclasses.dataclass(frozen=True)
class Steered:
    """What the subject says when its activation is moved along a direction."""

    direction: str
    strength: float  # length of the step, in lengths of the activation
    kl: float  # KL(unsteered || steered) of the token after the text, nats
    logprobs: Float[np.ndarray, "V"]  # of the token after the text
    continuation: str  # of the text, greedy


@dataclasses.dataclass(frozen=True)
class Said:
    """What the subject says after a text when a given state stands in place of its activation at one token."""

    kl: float  # KL(first state || this one) of the token after the text, nats
    logprobs: Float[np.ndarray, "V"]  # of the token after the text
    continuation: str  # of the text, greedy


@dataclasses.dataclass(frozen=True)
class Steering:
    """An edit of an explanation, and what it does. `rows[0]` is the unsteered subject."""

    position: int
    token: str
    explanation: str
    edited: str
    paraphrase: str
    unrelated: str
    rows: list[Steered]
    tokenizer: PreTrainedTokenizerBase = dataclasses.field(repr=False)

    def probability(self, word: str, row: Steered) -> float:
        """How probable it is that a word comes after the text: that of its first token, with or without a blank."""
        return float(np.exp(row.logprobs[first_tokens(self.tokenizer, word)]).sum())


def steer(
    subject: Subject,
    pair: Pair,
    text: str | Messages,
    edit: Sequence[str],
    *,
    token: int | None = None,
    explanation: str | None = None,
    paraphrase: str | None = None,
    **options,
) -> Steering:
    """Edits the explanation of one activation, and steers the subject by the difference that the AR makes of it.

    `text`: a text, or a conversation (messages with role and content), which the assistant answers or goes on with.
    `edit` (old, new): every `old` in the explanation becomes `new`. `token`: the index of the activation's token in the
    text, negative from the end (default: the last one, in a conversation the last that somebody says). `explanation`: of
    your own; None asks the AV, greedily. The whole text is read whatever the `token`; KL, probabilities and the greedy
    continuation are of what follows it. `options`: `strengths` and `new_tokens` of `steer_along`.

    The controls: "no edit" (AR(original) - AR(original) = 0, which changes nothing), "paraphrase" (the AR's reading of
    the original in other words, `paraphrase`, minus that of the original; by default it is in lower case and without
    punctuation), "unrelated edit" (likewise with the pair's explanation of `OTHER`) and "random direction". All steps of
    a strength have one length. For directions of your own see `steer_along`.

    Raises `InputError` where the explanation does not contain `old`, the AV says nothing, the text has no such token, and
    for a pair of another layer."""
    if subject.layers != pair.sidecar.layers:
        ours, theirs = in_words(pair.sidecar.layers), in_words(subject.layers)
        earlier = f", earlier={pair.sidecar.earlier_layers}" if pair.sidecar.earlier_layers else ""
        raise InputError(
            f"The pair reads {ours}, the subject gives {theirs}: load_subject(…, {pair.sidecar.layer}{earlier})."
        )
    ids, position = read(subject, text, token)
    acts = activations_at(subject, [ids], [[position]], ["0"])
    if explanation is None and not (explanation := pair.explain(acts, temperature=0.0)[0].text):
        raise InputError(f"The pair says nothing of the token {acts.tokens[0]!r}; give an explanation of your own.")
    edited = edited_text(explanation, edit)
    paraphrase = normalised(explanation) if paraphrase is None else text_list("a paraphrase is one of", [paraphrase])[0]
    unrelated = pair.explain(extract(subject, [OTHER]), temperature=0.0)[0].text or OTHER
    along = directions(pair, explanation, edited, paraphrase, unrelated)
    rows = steer_along(subject, text, along, token=token, **options)
    return Steering(position, acts.tokens[0], explanation, edited, paraphrase, unrelated, rows, subject.tokenizer)


def read(subject: Subject, text: str | Messages, token: int | None) -> tuple[list[int], int]:
    """The token ids of a text or conversation, and the index (from 0) of the `token` that is steered.

    Raises `InputError` for an empty text, an index that it does not have, and in a conversation one at which nobody
    speaks."""
    if token is not None:
        token = whole_number("token", token, -(1 << 31))
    if isinstance(text, str):
        acts = extract(subject, [text], -1 if token is None else [token, -1])
        return acts.token_ids[-1], int(acts.positions[0])
    messages = checked(text, "The conversation")
    ids, roles = chat_tokens(subject.tokenizer, messages)
    if not any(roles):
        raise InputError("In the conversation nobody says anything.")
    (position,) = spoken_positions(roles, "last" if token is None else [token], "the conversation")
    return [*ids, *answer_tokens(subject.tokenizer, messages)], position


def edited_text(explanation: str, edit: Sequence[str]) -> str:
    """The explanation with every old part replaced by the new one. Raises `InputError` where it has none."""
    parts = list(edit) if isinstance(edit, (tuple, list)) else []
    if len(parts) != 2 or not all(isinstance(part, str) for part in parts) or not parts[0]:
        raise InputError(f"An edit is a pair of texts, the old one not empty; found {edit!r:.60}.")
    old, new = parts
    if not isinstance(explanation, str):
        raise InputError(f"An explanation is a text; found {explanation!r:.60}.")
    if old not in explanation:
        raise InputError(
            f"The explanation does not contain {old!r}, so that edit changes nothing; it says {explanation!r}."
        )
    return explanation.replace(old, new)


def normalised(text: str) -> str:
    """Letters and digits of the text in lower case, with a blank in place of all else."""
    return " ".join(re.sub(r"[\W_]+", " ", text.lower()).split())


def directions(
    pair: Pair, original: str, edited: str, paraphrase: str, unrelated: str, seed: int = 0
) -> dict[str, np.ndarray]:
    """Δ [D] of an edited explanation and of its controls, after block K; the random one depends on `seed`."""
    of = pair.reconstruct([original, edited, paraphrase, unrelated])[:, -pair.sidecar.d_model :]
    return {
        EDIT: of[1] - of[0],
        NOTHING: of[0] - of[0],
        PARAPHRASE: of[2] - of[0],
        UNRELATED: of[3] - of[0],
        RANDOM: np.random.default_rng(seed).normal(size=of.shape[1]).astype(np.float32),
    }


def steer_along(
    subject: Subject,
    text: str | Messages,
    along: Mapping[str, ArrayLike],
    *,
    token: int | None = None,
    strengths: Sequence[float] = STRENGTHS,
    new_tokens: int = 20,
) -> list[Steered]:
    """The subject's expectation after `text` (or a conversation) and its greedy continuation of at most `new_tokens`,
    unsteered and with the activation at `token` moved along each direction `[D]` of `along` (of any length; zero moves
    nothing), by each of the `strengths`, in lengths of the activation.

    Raises `InputError` for directions of another width or not finite, and for a subject on several devices."""
    if not isinstance(along, Mapping):
        raise InputError(f"along must be a mapping of names to directions; found {along!r:.50}.")
    strengths, new_tokens = _strengths(strengths), token_limit("new_tokens", new_tokens)
    ids, position = read(subject, text, token)
    h = activations_at(subject, [ids], [[position]], ["0"]).vectors[0, -subject.model.config.width :]
    return steer_tokens(subject, ids, position, h, along, strengths, new_tokens)


def steer_tokens(
    subject: Subject,
    ids: Sequence[int],
    position: int,
    h: Float[np.ndarray, "D"],
    along: Mapping[str, ArrayLike],
    strengths: Sequence[float],
    new_tokens: int,
) -> list[Steered]:
    """`steer_along` for a text of token ids, whose activation at `position` is `h`."""
    plan = {(UNSTEERED, 0.0): h}
    for name, given in along.items():
        plan |= {(name, strength): moved(h, given, strength) for strength in strengths}
    said = said_with(subject, ids, position, np.stack(list(plan.values())), new_tokens)
    return [Steered(*key, of.kl, of.logprobs, of.continuation) for key, of in zip(plan, said)]


def said_with(
    subject: Subject, ids: Sequence[int], position: int, states: Float[np.ndarray, "C D"], new_tokens: int
) -> list[Said]:
    """What the subject says after a text of token ids with each of some states after block K at one `position`, in place
    of its activation there. The first state is what the others are compared with.

    Raises `InputError` for a subject on several devices."""
    if subject.mesh is not None:
        raise InputError("Steering runs on one device; load the subject without a mesh.")
    patches = {str(i): state[None] for i, state in enumerate(states)}
    found = patch(subject, [ids], [position], patches, rescale=False, batch=1)
    logprobs = [rows[0][-1] for rows in found.values()]
    continued = _continued(subject, ids, position, states, new_tokens)
    return [Said(_kl(logprobs[0], own), own, text) for own, text in zip(logprobs, continued)]


def moved(h: Float[np.ndarray, "D"], along: ArrayLike, strength: float) -> Float[np.ndarray, "D"]:
    """h + strength · ‖h‖ · Δ / ‖Δ‖; h itself where Δ is zero. Raises `InputError` for a direction of another width."""
    given = real_array(along)
    delta = np.empty(0) if given is None else given.astype(np.float64)
    if delta.shape != h.shape or not np.isfinite(delta).all():
        raise InputError(f"A direction must hold {len(h)} finite numbers; found shape {list(delta.shape)}.")
    if not delta.any():
        return h
    delta = of_ordinary_length(delta)
    length = np.linalg.norm(delta)
    return (h + strength * np.linalg.norm(h.astype(np.float64)) * delta / length).astype(np.float32)


def first_tokens(tokenizer: PreTrainedTokenizerBase, word: str) -> list[int]:
    """The tokens with which a word may begin: alone, and after a blank. Raises `InputError` for one that has none."""
    starts = [tokenizer(text, add_special_tokens=False).input_ids[:1] for text in (word.strip(), f" {word.strip()}")]
    if not (found := sorted({ids[0] for ids in starts if ids and tokenizer.decode(ids).strip()})):
        raise InputError(f"The word {word!r} has no token of its own; give one with letters.")
    return found


def _strengths(given: Any) -> list[float]:
    try:
        found = [] if isinstance(given, (str, bytes)) else list(given)
    except TypeError:
        found = [given]
    if not found or not all(map(is_finite, found)):
        raise InputError(f"strengths are finite numbers such as 0.25, 0.5, 1; found {given!r:.60}.")
    return list(dict.fromkeys(map(float, found)))


def _kl(p: Float[np.ndarray, "V"], q: Float[np.ndarray, "V"]) -> float:
    """KL(p || q) of two rows of log-probabilities."""
    p, q = p.astype(np.float64), q.astype(np.float64)
    return float(np.sum(np.exp(p) * (p - q)))


def _continued(
    subject: Subject, ids: Sequence[int], position: int, states: Float[np.ndarray, "C D"], limit: int
) -> list[str]:
    """The greedy continuation of a text with each of some states after block K at one position."""
    whole, padding = subject.whole, -len(ids) % MULTIPLE
    count = len(states)
    sampled = respond_edited(
        whole.model,
        whole.weights,
        np.tile(np.pad(np.asarray(ids, np.int32), (padding, 0)), (count, 1)),
        np.full(count, len(ids), np.int32),
        Partial(_placed, subject.layer, padding + position, states),
        end=subject.tokenizer.eos_token_id if subject.tokenizer.eos_token_id is not None else -1,
        max_new_tokens=limit,
    )
    tokens, mask = jax.device_get((sampled.tokens, sampled.mask))
    return [subject.tokenizer.decode(row[real], skip_special_tokens=True) for row, real in zip(tokens, mask)]


def _placed(
    layer: int | Int[Array, ""],
    column: int | Int[Array, ""],
    states: Float[Array, "C D"],
    parts: list[Array],
    block: Int[Array, ""],
) -> list[Array]:
    """The stream after a block; after block `layer` the `states` stand in one column."""
    (x,) = parts
    return [jnp.where(block == layer, x.at[:, column].set(states.astype(x.dtype)), x)]
