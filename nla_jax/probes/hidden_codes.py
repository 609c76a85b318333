"""Does the AR read what the text says, or a code in its form? The text is rewritten without a judge, and read again.

A rewrite that takes away only form (order, case, punctuation) should cost little, and no more after RL than before. One
that takes away content (quotes) shows how much of the score that content carries. Two ARs read the same rewrites of the
same texts, the one after RL and the one of the warm start: where only the former loses, RL has made it read form.

A quote is what stands in quotation marks, and what stands behind an ellipsis at the end of the text (`It ends: … of the
given array`), which is how the labels of this package quote the last words.
"""

import re
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float

from nla_jax.pair import Pair
from nla_jax.probes.fidelity import derangement
from nla_jax.probes.probe import Context, probe
from nla_jax.steering import normalised

QUOTE = re.compile(r'"[^"\n]+"|“[^”\n]+”|(?<!\S)…\s[^\n]*\S(?=\s*\Z)')
STATEMENT = re.compile(r"(?<=[.!?;])\s+|\n+")  # what lies between two statements
LEAST = 0.01  # an FVE at or below this has no share that could be kept

READ_AS = {  # what the rewrites are called in charts
    "words_shuffled": "words shuffled",
    "statements_shuffled": "statements shuffled",
    "quotes_stripped": "quotes taken out",
    "quotes_only": "quotes only",
    "quotes_swapped": "quotes of another document",
    "normalised": "no capitals, no punctuation",
}
TRIPWIRE = ("statements_shuffled", "quotes_stripped")
LIVE = {f"fve_{name}": f"{text}, AR after RL" for name, text in READ_AS.items()}
WARM = {f"fve_{name}_warm": f"{text}, warm AR" for name, text in READ_AS.items()}
KEPT = {f"retention_{name}": f"{text}, AR after RL" for name, text in READ_AS.items()}
KEPT_WARM = {f"retention_{name}_warm": f"{text}, warm AR" for name, text in READ_AS.items()}
GAPS = {
    f"gap_{name}_{who}": f"{READ_AS[name]}: {label}"
    for name in TRIPWIRE
    for who, label in {"live": "AR after RL", "warm": "warm AR", "difference": "difference"}.items()
}
TITLE, SHARE = "Rewritten texts", "share of the FVE of the text as it is"


@probe(TITLE, labels=LIVE)
def rewrites(context: Context) -> dict[str, np.ndarray]:
    """The reconstructor after RL reads the texts after RL, rewritten. Order, case and punctuation should matter little."""
    return {f"fve_{name}": values for name, values in scores(context).items()}


@probe(TITLE, needs=("pair", "warm"), labels=WARM)
def warm_rewrites(context: Context) -> dict[str, np.ndarray]:
    """The warm start's reconstructor reads the same rewrites."""
    return {f"fve_{name}_warm": values for name, values in scores(context, context.warm).items()}


@probe("Retention of rewritten texts", unit=SHARE, labels=KEPT)
def retention(context: Context) -> dict[str, np.ndarray]:
    """FVE of the rewritten texts by that of the texts as they are, a ratio of means. 1: the rewrite took nothing that
    the reconstructor reads; 0: it took everything. Not shown where the texts explain nothing."""
    return {f"retention_{name}": values for name, values in kept(context).items()}


@probe("Retention of rewritten texts", needs=("pair", "warm"), unit=SHARE, labels=KEPT_WARM)
def warm_retention(context: Context) -> dict[str, np.ndarray]:
    """The same for the warm start's reconstructor."""
    return {f"retention_{name}_warm": values for name, values in kept(context, context.warm).items()}


@probe("Does RL teach form?", needs=("pair", "warm"), unit="FVE lost by the rewrite", labels=GAPS)
def surface_form(context: Context) -> dict[str, np.ndarray]:
    """FVE lost when statements change places, or quotes are taken out: by the reconstructor after RL, by the warm start's,
    and the difference. A difference far above 0 says that RL made the reconstructor read form that it did not read
    before."""
    found = {}
    for name in TRIPWIRE:
        rewritten = rewrite(name, context)
        live, warm = (gap(context, rewritten, pair) for pair in (context.pair, context.warm))
        for who, values in (("live", live), ("warm", warm), ("difference", live - warm)):
            found[f"gap_{name}_{who}"] = values
    return found


def scores(context: Context, pair: Pair | None = None) -> dict[str, Float[np.ndarray, "n"]]:
    """Of each rewrite the score of each row, read by one AR (default: the one after RL)."""
    return {name: context.row_fve(rewrite(name, context), pair or context.pair) for name in READ_AS}


def kept(context: Context, pair: Pair | None = None) -> dict[str, Float[np.ndarray, "n"]]:
    """Of each rewrite a value for each row whose mean is FVE(rewrite) / FVE(original); {} where the latter is about 0."""
    original = context.row_fve(context.texts("rl"), pair or context.pair).mean()
    return {name: values / original for name, values in scores(context, pair).items()} if original > LEAST else {}


def gap(context: Context, rewritten: Sequence[str], pair: Pair) -> Float[np.ndarray, "n"]:
    """The score of each row's text minus that of its rewrite, read by one AR."""
    return context.row_fve(context.texts("rl"), pair) - context.row_fve(rewritten, pair)


# The rewrites


def rewrite(name: str, context: Context) -> list[str]:
    """The texts after RL in one of the rewrites of `READ_AS`. The same seed gives the same texts."""
    texts, seed = context.texts("rl"), context.seed
    if name == "quotes_swapped":
        return swap_quotes(texts, context.documents, seed)
    if name in ("words_shuffled", "statements_shuffled"):
        parts = str.split if name == "words_shuffled" else statements
        return [shuffled(parts(text), np.random.default_rng((seed, i))) for i, text in enumerate(texts)]
    change: Callable[[str], str] = {
        "quotes_stripped": strip_quotes,
        "quotes_only": only_quotes,
        "normalised": normalised,
    }[name]
    return [change(text) for text in texts]


def shuffled(parts: Sequence[str], rng: np.random.Generator) -> str:
    """The parts in another order, with a blank between them."""
    order = rng.permutation(len(parts))
    if (order == np.arange(len(parts))).all():
        order = np.roll(order, 1)  # of two statements every other draw would change nothing
    return " ".join(parts[i] for i in order)


def statements(text: str) -> list[str]:
    """The text cut behind sentence ends, semicolons and at line breaks, but never within a quote."""
    hidden = QUOTE.sub(lambda found: "x" * len(found[0]), text)  # as long as the text
    ends = [0, *(edge for found in STATEMENT.finditer(hidden) for edge in found.span()), len(text)]
    parts = [text[start:stop].strip() for start, stop in zip(ends[::2], ends[1::2])]
    return [part for part in parts if part]


def strip_quotes(text: str) -> str:
    """The text without its quotes and their marks."""
    return " ".join(QUOTE.sub(" ", text).split())


def only_quotes(text: str) -> str:
    """The quotes of the text with their marks, and nothing else; "" where it has none."""
    return " ".join(QUOTE.findall(text))


def swap_quotes(texts: Sequence[str], documents: Sequence[str], seed: int) -> list[str]:
    """Each text with the quotes of another row: of another document wherever that is possible.

    A quote in marks is replaced by one in marks, the last words by last words. Where the other row has fewer they
    repeat; where it has none of a kind, the quote is taken out. A text without quotes stays as it is."""
    quoting, found = [i for i, text in enumerate(texts) if QUOTE.search(text)], list(texts)
    if not quoting:
        return found
    for i, other in zip(quoting, derangement([documents[i] for i in quoting], seed)):
        given: dict[bool, list[str]] = {True: [], False: []}
        for quote in QUOTE.findall(texts[quoting[other]]):
            given[quote.startswith("…")].append(quote)
        used = {True: 0, False: 0}

        def another(quote: re.Match) -> str:
            kind = quote[0].startswith("…")
            used[kind] += 1
            return given[kind][(used[kind] - 1) % len(given[kind])] if given[kind] else ""

        found[i] = " ".join(QUOTE.sub(another, texts[i]).split())
    return found
