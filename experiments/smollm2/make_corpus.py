"""Makes the corpus of the SmolLM2 study: half documents, half chats, which the subject itself answers.

    pip install --no-deps gensim==4.4.0        # for the texts among its test data; nothing of it is run
    python experiments/smollm2/make_corpus.py --model path/to/smollm2 --out path/to/corpus.jsonl

Documents: documentation of Python packages (`python_docs`), articles of Wikipedia, and news of an Australian station
(the last two come with gensim). For each document one question about it is asked, and the model's answer is sampled. A
chat has its document's id, so that both fall into the same split. Questions and answers are a function of `--seed`.
"""

import argparse
import bz2
import hashlib
import html
import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from nla_jax.data.corpus import document_of, load_corpus
from nla_jax.io.files import replacing
from nla_jax.labels.local import Local
from nla_jax.runtime.metrics import Progress

WIKI = "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
NEWS = "lee_background.cor"
PART = 1200  # characters of an article's part, at least
EXCERPT = 500  # characters of a document that a question quotes
QUESTIONS = (
    "What is this text about?\n\n{text}",
    "Summarise this in two sentences.\n\n{text}",
    "Explain this to a beginner, in your own words:\n\n{text}",
    "What should I know about {name}?",
    "Give me three facts about {name}.",
    "Write a short story in which {name} plays a part.",
    "Who would need to read about {name}, and why?",
    "Continue this text:\n\n{text}",
    "Write three questions that this text answers.\n\n{text}",
    "Rewrite this as a letter to a friend.\n\n{text}",
)
MARKUP = [  # of a wiki page: what is taken out, or what of it stays
    (r"<!--.*?-->|<ref[^>]*/>|<ref.*?</ref>", ""),
    *[(r"\{\{[^{}]*\}\}|\{\|[^{}]*?\|\}", "")] * 6,  # templates and tables, from the innermost
    (r"\[\[(File|Image|Category):[^\[\]]*(\[\[[^\[\]]*\]\][^\[\]]*)*\]\]", ""),
    (r"\[\[(?:[^\[\]|]*\|)?([^\[\]]*)\]\]|\[https?://\S+ ([^\]]*)\]", r"\1\2"),
    (r"<[^>]+>|'{2,}", ""),
    (r"(?m)^[|!*#:;{}].*$", ""),
    (r"(?m)^=+\s*(.*?)\s*=+\s*$", r"\1"),
    (r"\n{3,}", "\n\n"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="the subject's folder")
    parser.add_argument("--out", type=Path, required=True, help="a new .jsonl file")
    parser.add_argument("--documents", type=int, default=1300, help="documents, and as many chats (default 1300)")
    parser.add_argument("--max-new-tokens", type=int, default=120, help="of an answer (default 120)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data-dir", type=Path, default=Path.home() / "tensorflow_datasets", help="for python_docs")
    arguments = parser.parse_args()
    if arguments.out.exists():
        raise SystemExit(f"{arguments.out} exists; give --out another name, or remove it first.")
    texts = choose(arguments.documents, arguments.seed, arguments.data_dir)
    questions = [question(id, text, arguments.seed) for id, text in texts]
    answers = answer(arguments.model, questions, arguments.max_new_tokens, arguments.seed)
    entries = list(enumerate(zip(texts, questions, answers)))
    with replacing(arguments.out) as scratch, open(scratch, "w", encoding="utf-8") as file:
        for i in np.random.default_rng(arguments.seed).permutation(len(entries)):  # the first of them are of every kind
            number, ((id, text), asked, said) = entries[i]
            turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
            for entry in ({"id": id, "text": text}, {"id": f"{document_of(id)}#{10_000 + number}", "messages": turns}):
                file.write(json.dumps(entry, ensure_ascii=False) + "\n")


def choose(count: int, seed: int, data_dir: Path) -> list[tuple[str, str]]:
    """`count` documents: two fifths of Python, two fifths of the encyclopedia, the rest news."""
    python = [(found.id, found.text) for found in load_corpus("python_docs", data_dir=data_dir, min_chars=600)]
    folder = gensim_data()
    wiki = list(articles(bz2.decompress((folder / WIKI).read_bytes()).decode("utf-8")))
    lines = (folder / NEWS).read_text(encoding="utf-8", errors="replace").splitlines()
    news = [(f"news/{i}", line.strip()) for i, line in enumerate(lines) if len(line) > 400]
    rng, fifth = np.random.default_rng(seed), count // 5
    pick = lambda texts, n: [texts[i] for i in rng.permutation(len(texts))[:n]]
    few = pick(news, count - 4 * fifth)
    return pick(python, 2 * fifth) + pick(wiki, count - 2 * fifth - len(few)) + few


def gensim_data() -> Path:
    """The folder of gensim's test data."""
    found = importlib.util.find_spec("gensim")
    if found is None:
        raise SystemExit("gensim is not installed, whose test data hold the texts: pip install --no-deps gensim==4.4.0")
    return Path(found.submodule_search_locations[0]) / "test/test_data"


def articles(dump: str) -> Iterator[tuple[str, str]]:
    """The articles of a wiki dump without their markup, in parts `wiki/TITLE#1`, `#2`, …"""
    for title, text in re.findall(r"<title>(.*?)</title>.*?<text[^>]*>(.*?)</text>", dump, re.DOTALL):
        text = html.unescape(text)
        for pattern, kept in MARKUP:
            text = re.sub(pattern, kept, text, flags=re.DOTALL)
        part, number = "", 0
        for paragraph in text.strip().split("\n\n"):
            part = f"{part}\n\n{paragraph}".strip()
            if len(part) >= PART:
                number += 1
                yield f"wiki/{title}#{number}", part
                part = ""


def question(id: str, text: str, seed: int) -> str:
    """What a user asks about a document."""
    name = document_of(id).rpartition("/")[2]
    if name.isdigit():  # news have no title
        name = " ".join(text.split()[:6])
    digest = hashlib.blake2b(f"{seed}:{id}".encode(), digest_size=8).digest()
    excerpt = text[:EXCERPT].rpartition(" ")[0]
    return QUESTIONS[int.from_bytes(digest, "big") % len(QUESTIONS)].format(text=excerpt, name=name)


def answer(folder: Path, questions: list[str], limit: int, seed: int) -> list[str]:
    """The model's answers, sampled; those that do not end at the limit stay cut."""
    model = Local(str(folder), max_tokens=limit, seed=seed, dtype="float32")
    order = sorted(range(len(questions)), key=lambda i: len(questions[i]))  # so that parts are of similar length
    said, progress = [""] * len(questions), Progress("answers", len(questions))
    for start in range(0, len(order), model.rows):
        part = order[start : start + model.rows]
        for i, (text, _) in zip(part, model.answers([questions[i] for i in part])):
            said[i] = text.strip() or "…"
        progress.update(len(part))
    return said


if __name__ == "__main__":
    main()
