"""What the `label` stage will ask for and what that costs, before it asks."""

import dataclasses

from nla_jax.io.folders import load_tokenizer
from nla_jax.io.hub import locate
from nla_jax.io.parquet import row_count
from nla_jax.labels.labeller import rows_of
from nla_jax.runtime.errors import InputError
from nla_jax.runtime.run import Run
from nla_jax.stages.label import cache_of, existing_labels, labeller_of, shards

SAMPLES = 500  # prompts that are tokenised; the others are counted by their characters
CHARS_PER_TOKEN = 4.0  # without a tokenizer


@dataclasses.dataclass(frozen=True)
class Cost:
    """What is still to be asked for. `counted_by`: how tokens were counted. Tokens are estimates; `tokens_out` is the
    most that the answers may have (None: the labeller has no such limit), and so is the price (None: not known)."""

    texts: int
    rows: int
    tokens_in: int
    tokens_out: int | None
    counted_by: str
    price: float | None

    def __str__(self) -> str:
        rest = f"of {self.rows:,} rows: the others have a label, or share one with another row"
        answers = "" if self.tokens_out is None else f", and at most {self.tokens_out:,} in the answers"
        price = "not known: set label.price_in and label.price_out (of a million tokens)"
        if self.tokens_out is None:
            price = "not known: this labeller names no longest answer"
        lines = {
            "texts": f"{self.texts:,} to ask for, {rest}",
            "tokens": f"about {self.tokens_in:,} sent{answers} ({self.counted_by})",
            "price": price if self.price is None else f"at most {self.price:,.2f}, as label.price_in and price_out say",
        }
        return "\n".join(f"{name:<10} {said}" for name, said in lines.items())


def cost(run: Run) -> Cost:
    """Counts the texts without an answer, and the tokens of what would be sent for them. Asks nobody, writes nothing."""
    run.require("extract")
    labeller, answers, files = labeller_of(run), cache_of(run).answers, shards(run)
    total = sum(map(row_count, files))
    count, spell = tokens_of(run)
    asked: set[str] = set()
    chars = sampled_chars = sampled_tokens = 0
    for file in files:
        if (run.workdir / "labels" / file.name).exists() or existing_labels(file) is not None:
            continue
        for row in rows_of(file):
            key = labeller.key(row)
            if key in answers or key in asked:
                continue
            prompt = labeller.prompt(row)
            if len(asked) % max(1, total // SAMPLES) == 0:
                sampled_chars, sampled_tokens = sampled_chars + len(prompt), sampled_tokens + count(prompt)
            asked.add(key)
            chars += len(prompt)
    tokens = round(chars * sampled_tokens / max(sampled_chars, 1))
    most = None if labeller.max_tokens is None else labeller.max_tokens * len(asked)
    c = run.config.label
    known = (c.price_in or c.price_out) and most is not None
    price = (tokens * c.price_in + most * c.price_out) / 1e6 if known else None
    return Cost(len(asked), total, tokens, most, spell, price)


def tokens_of(run: Run):
    """A function that counts the tokens of a text, and in words how it does."""
    try:
        tokenizer = load_tokenizer(locate(run.subject_folder))
    except InputError:
        return (lambda text: len(text) / CHARS_PER_TOKEN), f"{CHARS_PER_TOKEN:g} characters a token"
    by = "the subject's tokenizer; another model's cuts the text otherwise"
    return (lambda text: len(tokenizer(text, verbose=False).input_ids)), by
