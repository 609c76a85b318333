"""What it takes to ask a model, before it is asked: questions, tokens, price."""

import dataclasses
from collections.abc import Callable

from nla_jax.runtime.errors import InputError

CHARS_PER_TOKEN = 4.0  # without a tokenizer


@dataclasses.dataclass(frozen=True)
class Cost:
    """What is still to be asked for. `what`: "texts" or "questions"; `rest`: of how many, and why not the others.
    `counted_by`: how tokens were counted. Tokens are estimates; `tokens_out` is the most that the answers may have
    (None: there is no such limit), and so is the price (None: not known). `section` of the config holds the prices."""

    what: str
    texts: int
    rest: str
    tokens_in: int
    tokens_out: int | None
    counted_by: str
    price: float | None
    section: str

    def __str__(self) -> str:
        answers = "" if self.tokens_out is None else f", and at most {self.tokens_out:,} in the answers"
        price = f"not known: set {self.section}.price_in and {self.section}.price_out (of a million tokens)"
        if self.tokens_out is None:
            price = "not known: this labeller names no longest answer"
        known = f"as {self.section}.price_in and price_out say"
        lines = {
            self.what: f"{self.texts:,} to ask for, {self.rest}",
            "tokens": f"about {self.tokens_in:,} sent{answers} ({self.counted_by})",
            "price": price if self.price is None else f"at most {self.price:,.2f}, {known}",
        }
        return "\n".join(f"{name:<10} {said}" for name, said in lines.items())


class Tokens:
    """The tokens of many prompts: of every `every`-th one they are counted, of the others estimated by its length."""

    def __init__(self, count: Callable[[str], float], every: int):
        self.count, self.every = count, every
        self.prompts = self.chars = self.sampled_chars = self.sampled_tokens = 0

    def add(self, prompt: str) -> None:
        """Counts one more prompt."""
        if self.prompts % self.every == 0:
            self.sampled_chars += len(prompt)
            self.sampled_tokens += self.count(prompt)
        self.prompts += 1
        self.chars += len(prompt)

    @property
    def total(self) -> int:
        """The tokens of all prompts, about."""
        return round(self.chars * self.sampled_tokens / max(self.sampled_chars, 1))


def price(tokens_in: int, tokens_out: int | None, price_in: float, price_out: float) -> float | None:
    """What these tokens cost at most, at prices of a million; None where that is not known."""
    known = (price_in or price_out) and tokens_out is not None
    return (tokens_in * price_in + tokens_out * price_out) / 1e6 if known else None


def counter(load_tokenizer: Callable[[], Callable]) -> tuple[Callable[[str], float], str]:
    """A function that counts the tokens of a text by the subject's tokenizer, and in words how it does; by characters
    where `load_tokenizer` raises `InputError`."""
    try:
        tokenizer = load_tokenizer()
    except InputError:
        return (lambda text: len(text) / CHARS_PER_TOKEN), f"{CHARS_PER_TOKEN:g} characters a token"
    by = "the subject's tokenizer; another model's cuts the text otherwise"
    return (lambda text: len(tokenizer(text, verbose=False).input_ids)), by
