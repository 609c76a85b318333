"""`nla steer`: what a subject says when the explanation of one of its activations is edited, beside controls."""

import argparse
import json
from pathlib import Path

from nla_jax.runtime.environment import import_transformers_alone
from nla_jax.runtime.errors import InputError
from nla_jax.verbs.conventions import add_conventions, given_conventions


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The pair, the text and its token, the edit, and what is shown."""
    parser.add_argument("text", nargs="?", help="the text that the subject reads and continues")
    parser.add_argument(
        "--chat",
        help="a conversation in its place, which the assistant answers: JSON of messages with role and content",
    )
    parser.add_argument(
        "--pair", required=True, help="folder with av/ and ar/, a run's working folder, a hub id, or quickstart"
    )
    parser.add_argument("--subject", help="the subject's folder or hub id (default: what the pair's sidecar names)")
    parser.add_argument(
        "--token", type=int, help="index of the token that is steered (default: the last, of a chat the last said)"
    )
    parser.add_argument(
        "--edit", required=True, metavar="OLD=>NEW", help='what changes in the explanation: "rabbit=>mouse"'
    )
    parser.add_argument("--explanation", help="an explanation of your own (default: the pair's, greedy)")
    parser.add_argument(
        "--paraphrase",
        help="a control: the explanation in other words (default: in lower case, without punctuation)",
    )
    parser.add_argument(
        "--strength",
        default="0.25,0.5,1",
        help="lengths of the step, in lengths of the activation (default 0.25,0.5,1)",
    )
    parser.add_argument("--words", help="words whose probability is shown, such as mouse,rabbit (default: the edit's)")
    parser.add_argument("--new-tokens", type=int, default=20, help="where a continuation is cut (default 20)")
    parser.add_argument("--dtype", help="dtype of weights and computation (default: that of the files)")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    add_conventions(parser)


def run(arguments: argparse.Namespace) -> None:
    """Prints the explanation, its edit, and what the subject says along each direction at each strength."""
    old, arrow, new = arguments.edit.partition("=>")
    if not arrow or not old:
        raise InputError(f'--edit must be OLD=>NEW, such as "rabbit=>mouse"; found {arguments.edit!r}.')
    strengths = given_strengths(arguments.strength)
    words = [word.strip() for word in (arguments.words.split(",") if arguments.words is not None else (new, old))]
    if arguments.words is not None and not all(words):
        raise InputError(f"--words must be words such as mouse,rabbit; found {arguments.words!r}.")
    if not arguments.injection:  # which may be a function of the user's
        import_transformers_alone()
    text = given_text(arguments.text, arguments.chat)
    from nla_jax.io.pairs import place_of
    from nla_jax.pair import load_pair
    from nla_jax.runtime.compiler import enable_compile_cache
    from nla_jax.steering import first_tokens, steer
    from nla_jax.tools.explain import subject_of

    enable_compile_cache()
    conventions = given_conventions(arguments)
    pair = load_pair(arguments.pair, dtype=arguments.dtype, base=arguments.subject, conventions=conventions)
    subject = subject_of(pair, place_of(arguments.pair), arguments.subject, arguments.dtype)
    words = [word for word in dict.fromkeys(words) if word]
    for word in words:
        first_tokens(subject.tokenizer, word)
    found = steer(
        subject,
        pair,
        text,
        (old, new),
        token=arguments.token,
        explanation=arguments.explanation,
        paraphrase=arguments.paraphrase,
        strengths=strengths,
        new_tokens=arguments.new_tokens,
    )
    rows = [
        {
            "direction": row.direction,
            "strength": row.strength,
            "kl": row.kl,
            "probabilities": {word: found.probability(word, row) for word in words},
            "continuation": row.continuation,
        }
        for row in found.rows
    ]
    names = ("position", "token", "explanation", "edited", "paraphrase", "unrelated")
    facts = {name: getattr(found, name) for name in names}
    print(json.dumps(facts | {"rows": rows}, ensure_ascii=False) if arguments.json else spelt(facts, rows))


def given_text(text: str | None, chat: str | None) -> str | list[dict[str, str]]:
    """The text, or the messages of a file. Raises `InputError` where there is none, or more than one."""
    if (text is None) == (chat is None):
        raise InputError("Give a text to steer or --chat FILE, one of them.")
    if chat is None:
        if not text.strip():
            raise InputError("There is no text to steer; give one with words.")
        return text
    from nla_jax.data.chats import read_chats

    found = read_chats(Path(chat))
    if len(found) != 1:
        raise InputError(f"{chat} holds {len(found)} conversations; one is steered at a time, so give a file with one.")
    return found[0][1]


def given_strengths(given: str) -> list[float]:
    """Numbers between commas. Raises `InputError` for anything else."""
    try:
        return [float(part) for part in given.split(",")]
    except ValueError:
        raise InputError(f"--strength must be numbers such as 0.25,0.5,1; found {given!r}.") from None


def spelt(facts: dict, rows: list[dict]) -> str:
    """The results as people read them."""
    words = list(rows[0]["probabilities"])
    titles = "".join(f"{f'p({word})':>{_width(word)}}" for word in words)
    lines = [
        f"[{facts['position']}] {facts['token']!r}",
        f"    explanation: {facts['explanation']}",
        f"    edited:      {facts['edited']}",
        f"    paraphrase:  {facts['paraphrase']}",
        f"    unrelated:   {facts['unrelated']}",
        "",
        f"{'direction':<18}{'strength':>9}{'KL':>9}{titles}  continuation",
    ]
    for row in rows:
        of = "".join(f"{row['probabilities'][word]:>{_width(word)}.4f}" for word in words)
        lines.append(f"{row['direction']:<18}{row['strength']:>9g}{row['kl']:>9.4f}{of}  {row['continuation']!r}")
    return "\n".join(lines)


def _width(word: str) -> int:
    return max(len(word) + 5, 9)
