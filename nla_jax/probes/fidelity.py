"""How much of an activation its explanation carries, and the controls that would show a cheat."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from nla_jax.fve import cosine, row_fve
from nla_jax.pair import Pair
from nla_jax.probes.probe import Context, probe

HEADLINE = "Explanations and controls"
OPENINGS = (10, 16)  # tokens


@probe(HEADLINE, labels={"fve_rl": "AV after RL"})
def after_rl(context: Context) -> dict[str, np.ndarray]:
    """The reconstructor reads the verbalizer's text after RL: the headline. Of a pair that reads several layers also the
    score of each by itself, as if it alone had been rebuilt."""
    recon, layers = context.recon("rl"), context.pair.sidecar.layers
    apart = zip(*(np.split(np.asarray(x), len(layers), axis=1) for x in (recon, context.vectors)))
    of_layers = {f"fve_layer_{layer}": row_fve(*one) for layer, one in zip(layers, apart)} if len(layers) > 1 else {}
    return {"fve_rl": row_fve(recon, context.vectors)} | of_layers


@probe(HEADLINE, needs=("pair", "warm"), labels={"fve_warm": "AV warm start"})
def warm_start(context: Context) -> dict[str, np.ndarray]:
    """The warm start's reconstructor reads the warm start's text."""
    return {"fve_warm": context.row_fve(context.texts("warm"), context.warm)}


@probe(HEADLINE, needs=("pair", "labels"), labels={"fve_gold_text": "Gold label text"})
def gold(context: Context) -> dict[str, np.ndarray]:
    """The reconstructor reads the label that the warm start learned from."""
    return {"fve_gold_text": context.row_fve(context.texts("labels"))}


@probe(HEADLINE, labels={"fve_shuffled": "Shuffled pairs"})
def shuffled(context: Context) -> dict[str, np.ndarray]:
    """The reconstructor reads the text of an activation of another document. This should score far lower."""
    texts = context.texts("rl")
    return {"fve_shuffled": context.row_fve([texts[i] for i in derangement(context.documents, context.seed)])}


@probe(HEADLINE, labels={"fve_empty": "Empty text"})
def empty(context: Context) -> dict[str, np.ndarray]:
    """The reconstructor reads no text at all. This should score far lower."""
    recon = context.pair.reconstruct([""] * 2)[[0] * len(context.vectors)]
    return {"fve_empty": row_fve(recon, context.vectors)}


@probe(HEADLINE, labels={"fve_no_injection": "No injection"})
def no_injection(context: Context) -> dict[str, np.ndarray]:
    """The reconstructor reads what the verbalizer writes when nothing is injected. This should score far lower."""
    return {"fve_no_injection": context.row_fve(context.texts("no_injection"))}


@probe("Other readings", labels={"fve_rl_temperature_1": "AV after RL, at temperature 1"})
def temperature_1(context: Context) -> dict[str, np.ndarray]:
    """The verbalizer's text is sampled at temperature 1."""
    return {"fve_rl_temperature_1": context.row_fve(context.texts("rl_temperature_1"))}


@probe("Other readings", needs=("pair", "warm", "labels"), labels={"fve_gold_text_warm": "Gold label text, warm AR"})
def gold_through_warm(context: Context) -> dict[str, np.ndarray]:
    """The warm start's reconstructor reads the label."""
    return {"fve_gold_text_warm": context.row_fve(context.texts("labels"), context.warm)}


@probe(
    "One reader for all",
    needs=("pair", "warm"),
    labels={"fve_rl_frozen": "AV after RL, AR before RL", "gap_frozen_critic": "what only the AR after RL reads"},
)
def frozen_critic(context: Context) -> dict[str, np.ndarray]:
    """The warm start's reconstructor, which RL has not trained, reads the text after RL; and by how much that after RL
    scores higher. What only the latter reads may be new habits of the text to which it has got used, or a code."""
    frozen = context.row_fve(context.texts("rl"), context.warm)
    return {"fve_rl_frozen": frozen, "gap_frozen_critic": context.row_fve(context.texts("rl")) - frozen}


@probe("Other readings", labels={"fve_rl_meannorm": "AV after RL, mean re-normalised (reads higher)"})
def meannorm(context: Context) -> dict[str, np.ndarray]:
    """FVE with another baseline, the normalised mean: what some publications report."""
    return {"fve_rl_meannorm": row_fve(context.recon("rl"), context.vectors, "meannorm")}


@probe("FVE by length of the explanation’s prefix", chart="curve", axis="tokens of the explanation")
def prefixes(context: Context) -> dict[str, np.ndarray]:
    """The reconstructor reads only the first tokens of each explanation. A curve that still rises at its end says that
    the last words carry information too."""
    limit = context.max_new_tokens
    texts = context.texts("rl")
    lengths = range(0, limit, max(1, limit // 8))
    return {str(n): context.row_fve(cut(context.pair, texts, n)) for n in lengths}


@probe("The opening alone", labels={f"fve_first_{n}": f"first {n} tokens" for n in OPENINGS})
def opening(context: Context) -> dict[str, np.ndarray]:
    """The reconstructor reads only the first 10 or 16 tokens of each explanation: what a reader gets who stops there."""
    texts = context.texts("rl")
    return {f"fve_first_{n}": context.row_fve(cut(context.pair, texts, n)) for n in OPENINGS}


@probe(
    "Score per activation",
    needs=("pair", "warm"),
    chart="histogram",
    unit="1 − mse of the row / variance",
    labels={"shuffled": "shuffled pairs", "warm": "warm start", "rl": "after RL"},
)
def per_activation(context: Context) -> dict[str, np.ndarray]:
    """The score of each row. Dashed lines are medians."""
    return {
        "shuffled": shuffled(context)["fve_shuffled"],
        "warm": warm_start(context)["fve_warm"],
        "rl": after_rl(context)["fve_rl"],
    }


@probe("Explanation length", chart="histogram", unit="tokens", labels={"mean_length": "after RL"})
def length(context: Context) -> dict[str, np.ndarray]:
    """Tokens of the explanation alone, without tags and end."""
    return {"mean_length": token_counts(context.pair, context.texts("rl"))}


@probe("Cosine", unit="cosine", labels={"cos_rl": "AV after RL"})
def similarity(context: Context) -> dict[str, np.ndarray]:
    """Cosine between activation and reconstruction. It is high for any text where activations share a direction."""
    return {"cos_rl": cosine(np.asarray(context.recon("rl"), np.float64), np.asarray(context.vectors, np.float64))}


@probe(
    "Responses that hold an explanation",
    needs=("pair", "warm"),
    unit="share",
    labels={"extraction_rate": "after RL", "extraction_rate_warm": "warm start"},
)
def extraction(context: Context) -> dict[str, np.ndarray]:
    """A response without an explanation, or cut at the length limit, counts as an empty text."""
    found = lambda name: np.array([text != "" for text in context.texts(name)], float)
    return {"extraction_rate": found("rl"), "extraction_rate_warm": found("warm")}


def token_counts(pair: Pair, texts: Sequence[str]) -> Float[np.ndarray, "n"]:
    """Tokens of each text."""
    return np.array(
        [len(ids) for ids in pair.prompts.tokenizer(list(texts), add_special_tokens=False).input_ids], float
    )


def derangement(documents: list[str], seed: int) -> np.ndarray:
    """A permutation that gives every row another row's place, and wherever it can, another document's."""
    order = np.random.default_rng(seed).permutation(len(documents))
    order = order[np.argsort(np.asarray(documents)[order], kind="stable")]  # documents in blocks
    most = np.unique(np.asarray(documents), return_counts=True)[1].max()
    target = np.empty(len(order), int)
    target[order] = np.roll(order, most if most < len(order) else 1)  # a shift by the largest block leaves every block
    return target


def cut(pair: Pair, texts: list[str], tokens: int) -> list[str]:
    """Each text's first `tokens` tokens."""
    tokenizer = pair.prompts.tokenizer
    return [tokenizer.decode(ids[:tokens]) for ids in tokenizer(texts, add_special_tokens=False).input_ids]
