"""Text and token ids on the host: the AV's prompt, explanation tags, and the AR's template."""

import dataclasses
import functools
import re
from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from nla_jax.autoencoder import PromptIds
from nla_jax.data.batches import pad_tokens
from nla_jax.data.chats import rendered
from nla_jax.runtime.errors import InputError

VERBALIZER_TEMPLATE = (
    "You are a meticulous AI researcher conducting an important investigation into activation vectors from a language "
    "model. Your overall task is to describe the semantic content of that activation vector.\n\nHere is the vector: "
    "<concept>{injection_char}</concept>\n\nPlease provide an explanation within <explanation> tags."
)
PROMPT_PARTS = {
    "prefix": "the AV's prompt before the marker",
    "suffix": "the AV's prompt from the marker on",
    "slots": "the AV's prompt",
    "end": "the end of a response",
    "text_prefix": "the beginning of the AR's input",
    "text_suffix": "the end of the AR's input",
}
RECONSTRUCTOR_TEMPLATE = "Summary of the following text: <text>{explanation}</text> <summary>"
RESPONSE = "<explanation>\n{explanation}\n</explanation>"
MARKERS = "㈎㈜㎡㊙㋿™~§¤¬|^"  # rare characters, tried in this order where no marker is named
READINGS = {  # how a response is read at inference; training accepts only what stands alone in its tags
    "tags": "what stands in the tags, or behind an opening one; nothing where there is none",
    "search": "what stands in the tags, or behind an opening one; the whole response where there is none",
    "whole": "the whole response",
}
THINKING = {  # what the chat template is told about thinking; it is left as it is where it is told nothing
    "off": {"enable_thinking": False},
    "on": {"enable_thinking": True},
    "template": {},
}
TAGGED = re.compile(r"<explanation>\s*(.*?)\s*(?:</explanation>|\Z)", re.DOTALL)
EXPLANATION = re.compile(r"\s*<explanation>\s*((?:(?!</?explanation>).)*?)\s*</explanation>\s*", re.DOTALL)


def chat_text(
    tokenizer: PreTrainedTokenizerBase, content: str, answer: str | None = None, thinking: str = "off"
) -> str:
    """The text of a conversation up to the model's turn (or with its `answer`), by the tokenizer's chat template
    (`thinking`: one of `THINKING`); a tokenizer without one gets its BOS, the content and a line break. Raises
    `InputError` where nothing ends an answer."""
    if tokenizer.chat_template is None:
        if tokenizer.eos_token is None:
            raise InputError(
                f"The tokenizer of {tokenizer.name_or_path} has neither a chat template nor an end token, so that no answer "
                f"would end; set eos_token in its tokenizer_config.json."
            )
        return (tokenizer.bos_token or "") + content + "\n" + ("" if answer is None else answer + tokenizer.eos_token)
    messages = [{"role": "user", "content": content}]
    if answer is not None:
        messages.append({"role": "assistant", "content": answer})
    return rendered(tokenizer, messages, add_generation_prompt=answer is None, **THINKING[thinking])


def read_response(text: str, reading: str) -> str:
    """What a response says, by one of `READINGS`."""
    if reading == "whole":
        return text.strip()
    if found := TAGGED.search(text):
        return found[1]
    return text.strip() if reading == "search" else ""


def plain_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Ids of finished texts, nothing added."""
    return tokenizer(list(texts), add_special_tokens=False, verbose=False).input_ids if texts else []


def end_of_turn(tokenizer: PreTrainedTokenizerBase, thinking: str = "off") -> int:
    """The token that ends an assistant's turn: the first one after its words in the chat template."""
    text = chat_text(tokenizer, "question", "answer", thinking)
    if "answer" not in text:
        raise InputError(f"The chat template of {tokenizer.name_or_path} leaves out what the model says; correct it.")
    tail = plain_ids(tokenizer, [text[text.rindex("answer") + len("answer") :]])[0]
    return tail[0] if tail and tokenizer.chat_template is not None else tokenizer.eos_token_id


@dataclasses.dataclass(frozen=True)
class Marker:
    """The placeholder of an activation in a prompt, as `nla_meta.yaml` records it: its token, and the tokens beside its
    first occurrence."""

    char: str
    id: int
    left: int
    right: int


def find_marker(tokenizer: PreTrainedTokenizerBase, template: str, char: str = "") -> Marker:
    """The marker `char` (or the first of `MARKERS` that works) with its neighbours in the prompt.

    Raises `InputError` where the character is not exactly one token there, or stands there where no slot is."""
    reasons = []
    for candidate in [char] if char else MARKERS:
        ids = plain_ids(tokenizer, [chat_text(tokenizer, template.replace("{injection_char}", candidate))])[0]
        places = [i for i, token in enumerate(ids) if candidate in tokenizer.decode([token])]
        alone = [i for i in places if tokenizer.decode([ids[i]]).strip() == candidate]
        slots = template.count("{injection_char}")
        inside = places and places[0] > 0 and places[-1] < len(ids) - 1
        if inside and len(alone) == len(places) == slots and len({ids[i] for i in places}) == 1:
            at = places[0]
            return Marker(candidate, ids[at], ids[at - 1], ids[at + 1])
        extra = len(places) > slots
        reasons.append(f"{candidate!r} {'stands there too often' if extra else 'is not one token of its own there'}")
    raise InputError(
        f"The AV's prompt has no usable injection marker: {'; '.join(reasons)}; set prompts.marker to a rare single-token "
        f"character."
    )


@dataclasses.dataclass(frozen=True)
class Prompts:
    """The templates of one pair with its live tokenizer. `special_tokens`: the AR's input begins with the BOS that the
    tokenizer adds. `thinking`, `reading`: of `THINKING`, `READINGS`.

    `recorded`: the ids with which the pair was trained. They are used whatever the live tokenizer would render: a chat
    template may write the date, or change with a version."""

    tokenizer: PreTrainedTokenizerBase
    marker: Marker
    verbalizer_template: str = VERBALIZER_TEMPLATE
    reconstructor_template: str = RECONSTRUCTOR_TEMPLATE
    special_tokens: bool = True
    thinking: str = "off"
    reading: str = "tags"
    recorded: PromptIds | None = None

    def verbalizer_prompt(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """`(prefix, suffix, slots)` under the live tokenizer: the ids before the first marker, those from it to the response, and where in the
        suffix the markers stand. As many markers must stand there as the template has slots, the first between its two
        neighbours. Raises `InputError` where that is not so."""
        content = self.verbalizer_template.replace("{injection_char}", self.marker.char)
        ids = plain_ids(self.tokenizer, [chat_text(self.tokenizer, content, thinking=self.thinking)])[0]
        m, slots = self.marker, self.verbalizer_template.count("{injection_char}")
        places = [i for i in range(1, len(ids) - 1) if ids[i] == m.id]
        if len(places) != slots or (ids[places[0] - 1], ids[places[0] + 1]) != (m.left, m.right):
            found = f"stands {len(places)} times"
            if len(places) == slots:
                found = f"stands between {ids[places[0] - 1]} and {ids[places[0] + 1]}"
            raise InputError(
                f"The marker {m.char!r} (token {m.id}, expected {slots} times, first between {m.left} and {m.right}) {found} in "
                f"the AV's prompt under this tokenizer; the sidecar belongs to another tokenizer or prompt."
            )
        first = places[0]
        return tuple(ids[:first]), tuple(ids[first:]), tuple(i - first for i in places)

    def ids(self) -> PromptIds:
        """The literal ids of both prompts: as recorded, else as the live tokenizer renders them."""
        return self.recorded or self._live

    @functools.cached_property
    def _live(self) -> PromptIds:
        end = end_of_turn(self.tokenizer, self.thinking)
        return PromptIds(*self.verbalizer_prompt(), end, self._live_prefix, tuple(self.suffix_ids()))

    def drift(self) -> str:
        """In what the live tokenizer would render other prompts than the recorded ones; "" where it would not.

        Raises `InputError` where the recorded ids spell another text than the templates: then the tokenizer is another
        pair's."""
        if self.recorded is None:
            return ""
        squashed = lambda text: "".join(text.split())
        spelt = self._spell(self.recorded.prefix + self.recorded.suffix)
        if squashed(self.verbalizer_template.replace("{injection_char}", self.marker.char)) not in squashed(spelt):
            raise InputError(
                f"The ids that the sidecar records for the AV's prompt read {spelt!r:.80} under this tokenizer, which is "
                f"not its template; the sidecar belongs to another tokenizer."
            )
        try:
            live = self._live
        except InputError as error:
            return str(error).rstrip(".")
        for name in PROMPT_PARTS:
            old, new = (np.ravel(getattr(ids, name)).tolist() for ids in (self.recorded, live))
            if old != new:
                same = next((i for i, (a, b) in enumerate(zip(old, new)) if a != b), min(len(old), len(new)))
                old, new = (self._spell(ids[same : same + 8]) for ids in (old, new))
                return f"{PROMPT_PARTS[name]} has {old!r} where the live tokenizer would have {new!r}"
        return ""

    def _spell(self, ids: Sequence[int]) -> str:
        known = [i for i in ids if 0 <= i < len(self.tokenizer)]
        return self.tokenizer.decode(known, clean_up_tokenization_spaces=False)

    def text_width(self, max_new_tokens: int) -> int:
        """The length of AR inputs: the template around a text of `max_new_tokens` tokens, rounded up to a multiple of
        8."""
        return -(-(len(self.reconstructor_ids([""])[0]) + max_new_tokens) // 8) * 8

    def response_ids(self, explanations: Sequence[str]) -> list[list[int]]:
        """What the AV is to write: each explanation in its tags, ended."""
        end = self.ids().end
        texts = [RESPONSE.replace("{explanation}", text) for text in explanations]
        return [ids + [end] for ids in plain_ids(self.tokenizer, texts)]

    def responses(self, tokens: np.ndarray, mask: np.ndarray) -> list[str]:
        """The text of each sampled response [B, R], whatever it holds."""
        rows = [row[real].tolist() for row, real in zip(tokens, mask)]
        return self.tokenizer.batch_decode(rows, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def explanations(self, responses: Sequence[str], finished: np.ndarray) -> list[str | None]:
        """The explanation in each response; None where it was cut, is empty, or is not alone in its tags."""
        matches = [EXPLANATION.fullmatch(text) if done else None for text, done in zip(responses, finished)]
        return [match[1] or None if match else None for match in matches]

    def read(self, responses: Sequence[str]) -> list[str]:
        """The text of each response, cut or not, as `reading` says (see `READINGS`); "" where it says nothing."""
        return [read_response(text, self.reading) for text in responses]

    @functools.cached_property
    def _live_prefix(self) -> tuple[int, ...]:
        """The ids with which every input of the AR begins, whatever the explanation: those of the template up to the
        last space before it, behind which tokens may merge with the explanation's first characters."""
        ids, whole = self._ids([self._head])[0], self._ids([self.reconstructor_template])[0]
        return tuple(ids) if whole[: len(ids)] == ids else ()

    @property
    def _head(self) -> str:
        return self.reconstructor_template.partition("{explanation}")[0].rpartition(" ")[0]

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        return (
            self.tokenizer(list(texts), add_special_tokens=self.special_tokens, verbose=False).input_ids
            if texts
            else []
        )

    def reconstructor_ids(self, explanations: Sequence[str], limit: int | None = None) -> list[list[int]]:
        """The AR's input: each explanation in its template, tokenised again, with BOS where the tokenizer adds one
        (unless `special_tokens` is off), beginning and ending as recorded. Where the ids outnumber `limit`, the
        explanation loses its last characters; the template stays whole."""
        prefix, suffix, recorded = list(self._live_prefix), self.suffix_ids(), self.recorded
        old = recorded and [list(recorded.text_prefix), list(recorded.text_suffix)]

        def finished(explanations):
            texts = [self.reconstructor_template.replace("{explanation}", text) for text in explanations]
            rows = self._ids(texts)
            for i, row in enumerate(rows):
                if row[: len(prefix)] != prefix:  # this tokenizer merges across the space: tokenise both sides apart
                    rows[i] = prefix + plain_ids(self.tokenizer, [texts[i][len(self._head) :]])[0]
            if old and old != [prefix, suffix]:
                rows = [old[0] + row[len(prefix) :] for row in rows]
                ends = lambda row: suffix and row[-len(suffix) :] == suffix
                rows = [row[: -len(suffix)] + old[1] if ends(row) else row for row in rows]
            return rows

        rows = finished(explanations)
        for i, row in enumerate(rows if limit else []):
            text = explanations[i]
            while len(row) > limit:
                if not text:
                    raise InputError(f"The AR's template alone has {len(row)} tokens, more than the limit of {limit}.")
                # By characters, not by ids: half a character decodes to a replacement that may need more ids than it
                # had.
                text = text[: -(len(row) - limit)]
                row = finished([text])[0]
            rows[i] = row
        return rows

    def reads_as(self, tokenizer: PreTrainedTokenizerBase) -> bool:
        """Whether another tokenizer would give the AR the same ids."""
        probe = ["The river turns, north.\n\n1. It's 2026 — naïve 漢字?"]
        ours, theirs = (dataclasses.replace(self, tokenizer=t, recorded=None) for t in (self.tokenizer, tokenizer))
        return ours.reconstructor_ids(probe) == theirs.reconstructor_ids(probe)

    def reconstructor_batch(self, explanations: Sequence[str], length: int) -> tuple[np.ndarray, np.ndarray]:
        """Those ids as `[B, length]` with their lengths."""
        return pad_tokens(self.reconstructor_ids(explanations, length), length)

    def suffix_ids(self) -> list[int]:
        """The template's suffix without its first token, which merges with the explanation's last character: what the
        AR's sidecar records so that a reader can check its own tokenisation."""
        return plain_ids(self.tokenizer, [self.reconstructor_template.split("{explanation}")[1]])[0][1:]
