"""Labels from an instruct model in a Hugging Face folder, sampled by this package on this machine's devices."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from nla_jax.io.folders import load_params, load_tokenizer, read_config
from nla_jax.io.hub import fingerprint, locate
from nla_jax.labels.asking import Asking, Question, read_answer
from nla_jax.labels.labeller import Label, NoLabel
from nla_jax.models.transformer import Transformer
from nla_jax.prompts import chat_text, end_of_turn, plain_ids
from nla_jax.runtime.errors import InputError
from nla_jax.runtime.user_input import padded_rows, similar_lengths, whole_number
from nla_jax.sampling import respond

STEP = 128  # prompts are padded to a multiple of it, so that few programs are compiled


@dataclasses.dataclass
class Local(Asking):
    """`model`: a folder or hub id, of any family that this package runs. It computes in `dtype` on the first device.

    `temperature`: 0 is greedy. A text draws from a random number that depends on `seed` and on the text alone, so that
    its label does not depend on the texts beside it (but for rounding). `rows`: texts that are sampled together."""

    temperature: float = 0.7
    seed: int = 0
    dtype: str = "bfloat16"
    rows: int = 32

    batch: ClassVar[int] = 256
    connects: ClassVar[tuple[str, ...]] = ("rows",)

    def __post_init__(self):
        super().__post_init__()
        self.rows = whole_number("label.settings.rows", self.rows, 1)
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise InputError(f"label.settings.dtype is {self.dtype!r}; it must be float32, bfloat16 or float16.")

    def ready(self) -> None:
        """Raises `InputError` where there is no such model, or no tokenizer."""
        read_config(self.folder)
        _ = self.tokenizer

    @functools.cached_property
    def folder(self) -> Path:
        """Where the model lies."""
        return locate(self.model)

    @functools.cached_property
    def version(self) -> str:
        """A hash of the model's config and weights."""
        return fingerprint(self.folder)

    @functools.cached_property
    def tokenizer(self):
        """The model's own."""
        return load_tokenizer(self.folder)

    @functools.cached_property
    def weights(self) -> tuple[Transformer, dict]:
        """The model with its parameters, loaded when the first label is asked for."""
        config = read_config(self.folder, jnp.dtype(self.dtype))
        return Transformer(config), load_params(self.folder, config, dtype=jnp.dtype(self.dtype))

    def replies(self, questions: Sequence[Question]) -> list[Label]:
        """The answer to each question. No tool can be forced: the model is asked for the JSON of its arguments."""
        answers = self.answers([_with_form(question) for question in questions])
        return [read_answer(text) if ended else NoLabel("cut") for text, ended in answers]

    def answers(self, prompts: Sequence[str]) -> list[tuple[str, bool]]:
        """What the model answers to each prompt, and whether the answer ended within `max_tokens`. Prompts of similar
        length are sampled together."""
        ids = plain_ids(self.tokenizer, [chat_text(self.tokenizer, prompt) for prompt in prompts])
        answers = [("", False)] * len(ids)
        for part in similar_lengths(list(map(len, ids)), self.rows):
            for i, answer in zip(part, self._sample([ids[i] for i in part])):
                answers[i] = answer
        return answers

    def _sample(self, prompts: list[list[int]]) -> list[tuple[str, bool]]:
        model, params = self.weights
        count = padded_rows(len(prompts), self.rows, jax.sharding.get_mesh())
        filled = prompts + prompts[:1] * (count - len(prompts))
        width = -(-max(map(len, filled)) // STEP) * STEP
        tokens = np.zeros((count, width), np.int32)
        for target, ids in zip(tokens, filled):
            target[width - len(ids) :] = ids
        lengths = np.array(list(map(len, filled)), np.int32)
        sampled = respond(
            model,
            params,
            tokens,
            lengths,
            _keys(filled, self.seed),
            end=end_of_turn(self.tokenizer),
            max_new_tokens=self.max_tokens,
            temperature=float(self.temperature),
        )
        found, mask, finished = jax.device_get((sampled.tokens, sampled.mask, sampled.finished))
        texts = [
            self.tokenizer.decode(row[real], skip_special_tokens=True, clean_up_tokenization_spaces=False)
            for row, real in zip(found, mask)
        ]
        return list(zip(texts[: len(prompts)], finished.tolist()))


def _with_form(question: Question) -> str:
    """The prompt; with the form of the answer where a tool is to be called."""
    if question.tool is None:
        return question.prompt
    schema = json.dumps(question.tool.schema)
    return f"{question.prompt}\n\nAnswer with one JSON object that fits this schema, and nothing else:\n{schema}"


def _keys(prompts: list[list[int]], seed: int) -> jax.Array:
    """A random key for each prompt, of its ids and the seed alone."""
    digests = [hashlib.blake2b(repr((seed, ids)).encode(), digest_size=4).digest() for ids in prompts]
    numbers = np.array([int.from_bytes(digest, "big") for digest in digests], np.uint32)
    return jax.vmap(jax.random.key)(numbers)
