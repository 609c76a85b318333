"""Conversations: read from files, and as token ids with who speaks at each."""

import json
import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from nla_jax.runtime.errors import InputError, first_line
from nla_jax.runtime.user_input import is_whole

Messages = list[dict[str, str]]  # each with `role` and `content`


def read_chats(file: Path) -> list[tuple[str, Messages]]:
    """The conversations of a file with their ids: a JSON list of messages, an object with `messages`, or one of these a
    line. Raises `InputError` naming the line that is none."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file} cannot be read as text ({getattr(error, 'strerror', error)}).") from None
    try:
        found = [json.loads(text)]
    except json.JSONDecodeError:
        lines = [line for line in text.splitlines() if line.strip()]
        try:
            found = [json.loads(line) for line in lines]
        except json.JSONDecodeError as error:
            raise InputError(f"{file} is neither JSON nor JSON lines ({error}).") from None
    chats = []
    for i, entry in enumerate(found):
        messages = checked(entry.get("messages") if isinstance(entry, dict) else entry, f"{file}: conversation {i + 1}")
        named = entry.get("id") if isinstance(entry, dict) else None
        chats.append((str(named or (file.name if len(found) == 1 else f"{file.name}#{i + 1}")), messages))
    return chats


def checked(messages: Any, place: str) -> Messages:
    """A conversation. Raises `InputError`, naming `place`, for what is none."""
    whole = isinstance(messages, (list, tuple)) and messages
    if not whole or not all(
        isinstance(m, dict) and isinstance(m.get("content"), str) and m.get("role") and is_whole(m["content"])
        for m in messages
    ):
        raise InputError(f"{place} is {reprlib.repr(messages)}, expected messages with a role and a content.")
    return list(messages)


def rendered(tokenizer: PreTrainedTokenizerBase, messages: Messages, **options: Any) -> str:
    """A conversation's text by the tokenizer's chat template. Raises `InputError` where that fails."""
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except Exception as error:  # of the template, also a broken one
        raise InputError(
            f"The chat template of {tokenizer.name_or_path} cannot render a chat ({first_line(error)})."
        ) from None


def chat_tokens(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> tuple[list[int], list[str]]:
    """A conversation's token ids by the tokenizer's chat template, and for each who speaks there: "" for tokens of the
    template itself. Raises `InputError` where the tokenizer has no template, or it leaves out what is said."""
    if tokenizer.chat_template is None:
        raise InputError(f"The tokenizer of {tokenizer.name_or_path} has no chat template to read a chat with.")
    text = rendered(tokenizer, messages)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    roles, start = [""] * len(encoded.input_ids), 0
    for message in messages:
        said = message["content"].strip()
        start = text.find(said, start)
        if start < 0:
            raise InputError(f"The chat template leaves out or changes {said!r:.50}.")
        for i, (first, last) in enumerate(encoded.offset_mapping):
            if start <= first and last <= start + len(said) and first < last:
                roles[i] = message["role"]
        start += len(said)
    return list(encoded.input_ids), roles


def answer_tokens(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> list[int]:
    """The tokens with which the chat template begins the assistant's answer; none where the assistant spoke last, or the
    template knows no such beginning."""
    if messages[-1]["role"] == "assistant":
        return []
    said, begun = (rendered(tokenizer, messages, add_generation_prompt=begin) for begin in (False, True))
    more = begun.removeprefix(said) if begun.startswith(said) else ""
    return list(tokenizer(more, add_special_tokens=False).input_ids) if more else []


def spoken_positions(roles: Sequence[str], tokens: str | Sequence[int], place: str) -> list[int]:
    """Of the tokens of a conversation those at which somebody speaks: "last", "all", or the indices given (negative from
    its end). Raises `InputError`, naming the `place`, for an index at which nobody does."""
    spoken = [i for i, role in enumerate(roles) if role]
    if isinstance(tokens, str):
        return spoken if tokens == "all" else spoken[-1:]
    chosen = [i + len(roles) if i < 0 else i for i in tokens]
    if silent := [i for i, at in zip(tokens, chosen) if at not in spoken]:
        raise InputError(f"Position {silent[0]} of {place} is none at which somebody speaks.")
    return chosen
