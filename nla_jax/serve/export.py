"""A whole text explained without a browser, as the page that "Save page" writes."""

import datetime
from collections.abc import Callable, Sequence
from typing import Any

from nla_jax.data.chats import Messages
from nla_jax.serve.models import Document, Served, confidence, explain, nearest, read_document
from nla_jax.serve.page import page


def exported(
    served: Sequence[Served], content: str | Messages, most: int, batch: int, progress: Callable[[int], Any]
) -> str:
    """The page with every token explained by every pair. `progress` is told how many explanations were made.

    Raises `InputError` for a text that cannot be read, or has more than `most` tokens."""
    return saved_page(served, read_document(served, content, most), batch, progress, content)


def saved_page(
    served: Sequence[Served],
    document: Document,
    batch: int,
    progress: Callable[[int], Any],
    content: str | Messages | None = None,
) -> str:
    """The same of a document that was read; `content` is what it was read from."""
    answers: list[dict[int, dict]] = [{} for _ in served]
    near: list[dict[int, dict]] = [{} for _ in served]
    sure: list[dict[int, list[dict]]] = [{} for _ in served]
    for number, one in enumerate(served):
        for start in range(0, len(document.tokens), batch):
            rows = range(start, min(start + batch, len(document.tokens)))
            found = explain(one, number, [(document, row) for row in rows], batch)
            answers[number] |= {answer["row"]: answer for answer in found}
            said = [(document, answer["row"]) for answer in found if answer["explanation"]]
            if one.training and said:
                near[number] |= {answer["row"]: answer for answer in nearest(one, number, said)}
            if one.claims:
                sure[number] |= {row: confidence(one, number, document, row)["confidence"] for row in rows}
            progress(len(rows))
    data = {
        "pairs": [one.about for one in served],
        "content": content and {"text" if isinstance(content, str) else "messages": content},
        "document": document.shown,
        "answers": answers,
        "nearest": near,
        "confidence": sure,
        "saved": datetime.datetime.now(datetime.UTC).isoformat(" ", "minutes")[:16],
    }
    return page(data)
