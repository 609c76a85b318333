"""A corpus that is read in two seconds: the topics of Python's `help()`, which every installation has."""

from collections.abc import Iterator
from pydoc_data.topics import topics

PART_CHARS = 1000  # about as much as a small `extract.max_tokens` reads


def documents() -> Iterator[tuple[str, str]]:
    """(id, text) of about 500 parts of 79 topics; the parts of one topic are one document (`topic#2`)."""
    for topic, text in sorted(topics.items()):
        parts = [""]
        for paragraph in text.strip().split("\n\n"):
            if len(parts[-1]) > PART_CHARS:
                parts.append("")
            parts[-1] += paragraph + "\n\n"
        yield from ((topic if i == 1 else f"{topic}#{i}", part.strip()) for i, part in enumerate(parts, 1))
