"""The default labeller of the warm start: two short formulaic statements about the end of a text.

    A parameter list. It ends late in a sentence with array: … given array

An activation holds mostly the last words, and what may come next. A topic is left out: a linear probe does not read one
from an activation, and a verbalizer that is asked for it makes one up.

The last word is what an activation holds best, so it is named before the words that lead to it. A verbalizer writes from
left to right: without that it would have to guess these words first, and then end on one that fits them. Of a word of
several tokens the activation holds the last best: where the text ends within one, that is named before the word.

    Prose. It ends late in a sentence with -mend of recommend: … we recommend

Line breaks and blanks at the end are written as signs, behind the last words: the reconstructor reads there.

    A parameter list. It ends at a line break with Args:: … task. Args:⏎␣

The last words end the label, with no quotation mark behind them. A reconstructor whose template ends with the explanation
then reads at the very token at which the subject stood, and is good before it is trained (docs/labels.md has figures).

No model and no network: a run needs no API key, and a small verbalizer can learn to write such labels. What is written
by a formula can be read by it, and checked against the text: `claims` and `true`.
"""

import re
from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np

from nla_jax.labels.labeller import Claim, LabelRow

TAIL_CHARS = 20
TAIL_WORDS = 2
ENDING = (12, 80)  # words and characters of a text's end with which a claim about its last words is compared
BREAK, BLANKS = "⏎", "␣"  # how a label writes a line break, and blanks that nothing but blanks follows
NO_WORDS = {BREAK, BLANKS, "\ufffd"}  # characters that count as blanks in last words
WINDOW = 2000  # characters before the end that a label may depend on

TAGS = re.compile(r"</?explanation>", re.IGNORECASE)

SECTIONS = {
    "A parameter list": "parameters, args, arguments, other parameters, keyword arguments",
    "An attribute list": "attributes",
    "A method list": "methods",
    "A result description": "returns, return, yields",
    "A list of errors": "raises, warns",
    "Notes": "notes",
    "A note": "note",
    "A warning": "warning, warnings",
    "Cross-references": "see also",
    "A list of references": "references",
    "An example section": "examples, example, usage",
    "Installation notes": "installation",
    "A list of changes": "changelog",
}
SECTIONS = {name: kind for kind, names in SECTIONS.items() for name in names.split(", ")}
SECTION = re.compile(
    rf"^[ \t#*]*({'|'.join(sorted(SECTIONS, key=len, reverse=True))})(?:::?[ \t]*$|[ \t]*\n[ \t]*[-=~]{{3,}}|\s*$)",
    re.IGNORECASE | re.MULTILINE,
)
FIELDS = {
    "param": "A parameter list",
    "type": "A parameter list",
    "return": "A result description",
    "rtype": "A result description",
    "raise": "A list of errors",
}
FIELD = re.compile(rf"^\s*:({'|'.join(FIELDS)})")
PARAMETER = re.compile(r"^\s*[`*]*\w+[`*]* ?(\(.*\)|: \w|--? )", re.MULTILINE)

LINE_KINDS = [  # what the last line shows by itself, most telling first
    (re.compile(r"^\s*(>>>|\.\.\. |In \[\d+\]:)"), "An interactive session"),
    (re.compile(r"^\s*(\$|pip |git |cd |sudo )\s*\S"), "A shell command"),
    (re.compile(r"^\s*(@\w|(async )?def \w|class \w+[(:]|import \w+( as \w+)?$|from [\w.]+ import)"), "Code"),
    (re.compile(r"^\s*[\w.\[\]]+(, [\w.]+)* = \S|[{}]\s*$|\);$|^\s*[\w.]+\([^)]*\)?$"), "Code"),
    (re.compile(r"^\s*#{1,6} "), "A heading"),
    (re.compile(r"^\s*\.\. *(versionadded|versionchanged|deprecated)"), "A version note"),
    (re.compile(r"^\s*\.\. |^\s*:\w+:"), "A markup directive"),
    (re.compile(r"\|.*\||^\s*[+|][-=+]{3,}|^\s*={3,} +=|\S\t+\S"), "A table"),
    (re.compile(r"https?://\S*$"), "A link"),
    (re.compile(r"^\s*[-*•+] "), "A list item"),
    (re.compile(r"^\s*\(?(\d+|[a-z])[.)] "), "A numbered item"),
    (re.compile(r"\\(frac|sum|int|mathbb|alpha|beta|left|cdot|sqrt)|\$[^$]*$"), "A formula"),
]
CODE = {"A code block", "Code", "An interactive session", "A shell command"}
LICENSE = re.compile(r"copyright|licen[sc]e|warrant|liab|redistribut", re.IGNORECASE)

PUNCTUATION = {
    ",": "after a comma",
    ";": "after a semicolon",
    ":": "after a colon",
    "(": "after an opening bracket",
    "[": "after an opening bracket",
    "{": "after an opening bracket",
    ")": "after a closing bracket",
    "]": "after a closing bracket",
    "}": "after a closing bracket",
    "=": "after an equals sign",
    "-": "after a hyphen",
    "_": "after an underscore",
    "/": "after a slash",
    "`": "at a code quote",
    '"': "at a quotation mark",
    "'": "at a quotation mark",
}


BLANK = "A blank start. Nothing stands before this place."
PASSAGES = {*SECTIONS.values(), *FIELDS.values(), *CODE, *(name for _, name in LINE_KINDS)}
PASSAGES |= {"License text", "An indented passage", "An opening", "An introduction", "Prose", "A blank start"}
POSITIONS = frozenset(PUNCTUATION.values()) | {
    "at a paragraph break",
    "at a line break",
    "after a number",
    "after a dot",
    "at a sentence end",
    "inside a quotation",
    "inside quoted code",
    "inside brackets",
    "after a symbol",
    "early in a line",
    "late in a line",
    "starting a sentence",
    "early in a sentence",
    "late in a sentence",
}
one_of = lambda words: "|".join(map(re.escape, sorted(words, key=len, reverse=True)))
CLAIMS = {  # what a label says, by the words around it
    "passage": re.compile(rf"^\s*({one_of(PASSAGES)})(?=\.|$)"),
    "position": re.compile(rf"\bIt ends ({one_of(POSITIONS)})(?= with |:|$)"),
    "last token": re.compile(r" with -(\S+) of (?=\S+: …)"),
    "last words": re.compile(rf": … (.*[^\s{BREAK}{BLANKS}])", re.DOTALL),
}
LAST = ("last words", "last word")  # claims about how the text ends
# The last word, and the token it ends with, where they are named before the last words.
NAMED = re.compile(rf"(\bIt ends(?: (?:{one_of(POSITIONS)}))?) with (?:-\S+ of )?\S+?(?=: …)")


class Extractive:
    """One label for each row, made of its text alone, which may end within a word.

    The kind of passage, what stands at its end grammatically, the last word (within one, the token that it ends with
    before it), and the last words verbatim: about 70 characters, one line, without control characters or explanation
    tags."""

    reads: ClassVar[tuple[str, ...]] = ("text", "token")
    patterns: ClassVar[Mapping[str, re.Pattern]] = CLAIMS

    def label(self, rows: Sequence[LabelRow]) -> list[str]:
        """See the class."""
        return [label_one(row.text, row.token) for row in rows]

    def claims(self, text: str) -> list[Claim]:
        """What a text says that is written as labels are: by this labeller, or by a verbalizer that learned from it.

        Kinds: passage, position, last token, last words, last word. What it cannot read it leaves out."""
        return with_last_word(
            [Claim(name, found[1]) for name, pattern in self.patterns.items() if (found := pattern.search(text))]
        )

    def true(self, claim: Claim, row: LabelRow) -> bool:
        """Whether a claim holds for the text of a row.

        Kind of passage and position: the labeller finds the same there. Last word or words: the text ends with
        these whole words. Last token: these characters are the row's token, or where that is not known, the text ends
        with them."""
        return holds(claim, describe(row.text, row.token))

    def without(self, text: str, claim: Claim) -> str:
        """The text without what makes it claim so."""
        return without(text, claim, self.patterns)


WORDS_FIRST = CLAIMS | {  # as CLAIMS, of a text that begins with the last word
    "passage": re.compile(rf"(?:^|(?<=\. ))({one_of(PASSAGES)})(?=\. (?:It ends|Nothing)|\.?$)"),
    "last token": re.compile(r"^-(\S+) of (?=\S+\. )"),
}
# The last word, and the token it ends with, where a text begins with them.
NAMED_FIRST = re.compile(
    rf"^(?!(?:{one_of(PASSAGES)})\. It ends)(?:-\S+ of )?\S+\. (?=(?:{one_of(PASSAGES)})\.|It ends)"
)


class WordsFirst(Extractive):
    """The same with the last word (within one, the token that it ends with) before everything else: a text whose first
    tokens say most.

        -mend of recommend. Prose. It ends late in a sentence: … we recommend"""

    patterns: ClassVar[Mapping[str, re.Pattern]] = WORDS_FIRST

    def label(self, rows: Sequence[LabelRow]) -> list[str]:
        """See the class."""
        return [label_one(row.text, row.token, first=True) for row in rows]

    def without(self, text: str, claim: Claim) -> str:
        """The text without what makes it claim so; the last word goes at both places."""
        if claim.kind == "last token":
            return self.patterns[claim.kind].sub("", text)
        return super().without(NAMED_FIRST.sub("", text) if claim.kind in LAST else text, claim)


def without_last_words(texts: list[str], rng: np.random.Generator) -> list[str]:
    """A reader for `rl.reader`: the texts up to the ellipsis before the last words, and without the last word where it is
    named before them or at the beginning, so that quoting these there earns nothing. A verbalizer that is trained long
    enough quotes them behind another sign (experiments/levers)."""
    return [re.sub(r":? ?….*", "", NAMED_FIRST.sub("", NAMED.sub(r"\1", text)), flags=re.DOTALL) for text in texts]


def holds(claim: Claim, found: Mapping[str, str | None]) -> bool:
    """Whether a claim agrees with what `describe` has found in a text."""
    if claim.kind == "last token":
        token = found["last token"]
        return claim.value == token if token else (found["ending"] or "").endswith(claim.value)
    if claim.kind in LAST:
        return any(f" {found[end] or ''}".endswith(f" {claim.value}") for end in ("last words", "ending"))
    return found[claim.kind] == claim.value


def without(text: str, claim: Claim, patterns: Mapping[str, re.Pattern]) -> str:
    """The text without the words of a claim, which the pattern of its kind finds, and without marks that belong to them.

    The last words go with their ellipsis, and with "It ends" where nothing else is said of the end. Of the last word
    only that goes, unless it is the only one. Where it is named before them, that goes too."""
    if claim.kind == "last token":
        return patterns[claim.kind].sub(" with ", text)
    text = NAMED.sub(r"\1", text) if claim.kind in LAST else text
    found = patterns[LAST[0] if claim.kind == LAST[1] else claim.kind].search(text)
    if found is None:
        return text
    start, end = found.span(1)
    if claim.kind == LAST[1] and claim.value != found[1]:
        return text[: end - len(claim.value)].rstrip() + text[end:]
    before, after = text[:start].rstrip(), text[end:]
    if claim.kind in LAST:
        after = after.lstrip(BREAK + BLANKS)
        before = re.sub(r"( *It ends)?:? …$", "", before)
    if before[-1:] in ("", "."):
        after = after.lstrip(".")
    return f"{before}{after}".lstrip()


def with_last_word(claims: list[Claim]) -> list[Claim]:
    """The claims, and of the last words the very last as a claim of its own: it is the first that a verbalizer learns."""
    return claims + [Claim(LAST[1], claim.value.split()[-1]) for claim in claims if claim.kind == LAST[0]]


def label_one(text: str, token: str = "", first: bool = False) -> str:
    """The label of one text, whose last token is `token`; without it, no ending within a word is named. `first`: the last
    word is named before everything else."""
    of = describe(text, token)
    if not of["last words"]:
        return BLANK
    word = of["last words"].split()[-1]
    named, end = ending_within(word, token) + word, f": … {of['last words']}{breaks(TAGS.sub('', text))}"
    return f"{named}. {statements(of)}{end}" if first else f"{statements(of)} with {named}{end}"


def ending_within(word: str, token: str) -> str:
    """Of a token that goes on with a word: `-mend of `. Else nothing: it is the word, begins it, or has no letter or
    digit."""
    within = word != token and word.endswith(token) and any(map(str.isalnum, token))
    return f"-{token} of " if within else ""


def breaks(text: str) -> str:
    """The signs for the line breaks (two at most) and the blanks behind them with which a text ends."""
    end = text[len(text.rstrip()) :]
    return BREAK * min(2, end.count("\n")) + BLANKS * (not end.endswith("\n") and end != "")


def statements(of: Mapping[str, str | None]) -> str:
    """The two statements about a text that `describe` has read."""
    return f"{of['passage']}. It ends {of['position']}"


def describe(text: str, token: str = "") -> dict[str, str | None]:
    """What a label says of a text whose last token is `token`, by the kinds of claims, and the text's `ending`, of which a
    claim may name more than a label does; None where there is nothing to say."""
    fenced = text.count("```") % 2 == 1
    opening = len(text) <= WINDOW
    text = TAGS.sub(" ", text[-WINDOW:])
    tail = last_words(text)
    if not tail:
        return {"passage": "A blank start", "position": None, "last token": token, "last words": None, "ending": None}
    passage = "A code block" if fenced else kind(text, opening)
    where, ending = position(text, passage in CODE), last_words(text, *ENDING)
    return {"passage": passage, "position": where, "last token": token, "last words": tail, "ending": ending}


def last_words(text: str, words: int = TAIL_WORDS, characters: int = TAIL_CHARS) -> str:
    """The last words of the text on one line, as many as have at most `characters` together; of an endless word, its
    end."""
    line = "".join(c if c.isprintable() and c not in NO_WORDS else " " for c in text.rstrip()[-4 * characters :])
    line = " ".join(line.replace('"', "'").split())[-characters - 1 :]
    whole = line if len(line) <= characters else line.partition(" ")[2] or line[1:]
    return " ".join(whole.split(" ")[-words:])


def kind(text: str, opening: bool) -> str:
    """What kind of passage the text ends in; `opening` says that the text begins with its document."""
    line = text.rstrip("\n").rpartition("\n")[2]
    if field := FIELD.match(line):
        return FIELDS[field[1]]
    for pattern, name in LINE_KINDS:
        if pattern.search(line):
            return name
    if len({word.lower() for word in LICENSE.findall(text[-500:])}) >= 2:
        return "License text"
    if section := open_section(text, line):
        return SECTIONS[section]
    if line.startswith(("    ", "\t")):
        return "A parameter list" if PARAMETER.search("\n".join(text.splitlines()[-4:])) else "An indented passage"
    if opening and "\n\n" not in text.strip():
        return "An opening" if len(text) < 200 else "An introduction"
    return "Prose"


def open_section(text: str, line: str) -> str | None:
    """The name of the section that `line`, the last one, stands in; `Args:` reaches as far as its indented lines."""
    headings = list(SECTION.finditer(text))
    if not headings:
        return None
    heading = headings[-1]
    by_indent = heading[0].rstrip().endswith(":") and "\n" in text[heading.end() :].rstrip()
    return None if by_indent and indent(line) <= indent(heading[0]) else heading[1].lower()


def indent(line: str) -> int:
    """How many blanks begin the line."""
    return len(line) - len(line.lstrip())


def position(text: str, code: bool) -> str:
    """What stands at the end grammatically, in `code` or else in prose: a hint at what comes next."""
    text = text.rstrip(" \t")
    if text.endswith("\n"):
        return "at a paragraph break" if text.endswith("\n\n") else "at a line break"
    line = text.rpartition("\n" if code else "\n\n")[2][-300:]
    last = line[-1:]
    if last in PUNCTUATION:
        return PUNCTUATION[last]
    if last.isdigit():
        return "after a number"
    if last in ".!?":
        return "after a dot" if code else "at a sentence end"
    if line.count('"') % 2:
        return "inside a quotation"
    if line.count("`") % 2:
        return "inside quoted code"
    if line.count("(") > line.count(")"):
        return "inside brackets"
    if not last.isalpha():
        return "after a symbol"
    if code:
        return "early in a line" if len(line.split()) <= 3 else "late in a line"
    words = len(re.split(r"[.!?:]\s|\n\s*[-*]\s", line)[-1].split())
    return "starting a sentence" if words <= 2 else "early in a sentence" if words <= 8 else "late in a sentence"
