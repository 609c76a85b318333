"""A whole text explained without a browser, as the page that "Save page" writes."""

import datetime
from collections.abc import Callable, Sequence
from typing import Any

from nla_jax.data.chats import Messages
from nla_jax.serve.models import Served, explain, read_document
from nla_jax.serve.page import page


def exported(
    served: Sequence[Served], content: str | Messages, most: int, batch: int, progress: Callable[[int], Any]
) -> str:
    """The page with every token explained by every pair. `progress` is told how many explanations were made.

    Raises `InputError` for a text that cannot be read, or has more than `most` tokens."""
    document = read_document(served, content, most)
    answers: list[dict[int, dict]] = [{} for _ in served]
    for number, one in enumerate(served):
        for start in range(0, len(document.tokens), batch):
            rows = range(start, min(start + batch, len(document.tokens)))
            answers[number] |= {a["row"]: a for a in explain(one, number, [(document, row) for row in rows], batch)}
            progress(len(rows))
    data = {
        "pairs": [one.about for one in served],
        "tokens": most,
        "content": {"text": content} if isinstance(content, str) else {"messages": content},
        "document": document.shown,
        "answers": answers,
        "saved": datetime.datetime.now(datetime.UTC).isoformat(" ", "minutes")[:16],
    }
    return page(data)
