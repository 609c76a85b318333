"""The page in a notebook: `pair.show(text)` and `acts.show()`. It is the one that `nla serve --export` writes."""

import dataclasses
import html
from pathlib import Path
from typing import Any

import numpy as np

from nla_jax.data.activations import Activations, after_blocks, in_words
from nla_jax.data.chats import Messages
from nla_jax.io.files import replacing
from nla_jax.pair import Pair
from nla_jax.runtime.errors import InputError
from nla_jax.runtime.metrics import Progress
from nla_jax.serve.export import saved_page
from nla_jax.serve.models import Document, Served, limit_of, read_document
from nla_jax.serve.page import page
from nla_jax.subject import Subject
from nla_jax.tools.explain import relative_norms, subject_of


@dataclasses.dataclass(frozen=True)
class Shown:
    """A page. A notebook displays it, in a frame that can reach neither the notebook nor the network."""

    html: str

    def __repr__(self) -> str:
        return (
            f"Shown(a page of {len(self.html):,} characters; a notebook displays it, and .save('page.html') writes it)"
        )

    def _repr_html_(self) -> str:
        allowed, style = "allow-scripts allow-downloads", "width: 100%; height: 46rem; border: 0"
        held = html.escape(self.html, quote=True)
        return f'<iframe sandbox="{allowed}" title="Activations in words" style="{style}" srcdoc="{held}"></iframe>'

    def save(self, path: str | Path) -> None:
        """Writes the page as a file that opens offline. Raises `InputError` where the file is there already."""
        if Path(path).exists():
            raise InputError(f"{path} exists; save under another name.")
        with replacing(Path(path)) as scratch:
            scratch.write_text(self.html, encoding="utf-8")


def of_text(pair: Pair, content: str | Messages, subject: Any, max_tokens: int, batch: int) -> Shown:
    """A text or a chat, every token explained by the pair. `subject`: a `Subject`, its folder or hub id, or None: what
    the pair's sidecar names."""
    if not isinstance(subject, Subject):
        subject = subject_of(pair, pair.folder or Path(), subject)
    served = Served(_name(pair), pair, subject, limit_of(pair))
    document = read_document([served], content, max_tokens)
    return _explained(served, document, batch, content)


def of_activations(acts: Activations, pair: Pair | None, batch: int) -> Shown:
    """Activations, token by token and coloured by norm; with a pair every one explained.

    Raises `InputError` where there are none, and for those of another layer than the pair's."""
    if not len(acts):
        raise InputError("There are no activations to show.")
    if pair is not None and acts.layers not in (None, pair.sidecar.layers):
        ours, theirs = in_words(pair.sidecar.layers), in_words(acts.layers)
        raise InputError(f"These are activations of {theirs}, the pair reads {ours}.")
    vectors, upto = np.asarray(acts.vectors), lambda row: acts.token_ids[row]
    layers = acts.layers or (pair.sidecar.layers if pair else ("unknown",))
    norms = relative_norms(vectors, pair, len(layers))
    decode = pair.prompts.tokenizer.decode if pair else None
    document = Document("activations", acts.tokens, _roles(acts), [vectors], [norms], upto, decode)
    if pair is not None:
        return _explained(Served(_name(pair), pair, None, limit_of(pair)), document, batch, None)
    silent = {
        "name": "Activations",
        "subject": "",
        "place": after_blocks(acts.layers) if acts.layers else "",
        "silent": True,
    }
    return Shown(page({"pairs": [silent], "document": document.shown, "saved": "in a notebook"}))


def _explained(served: Served, document: Document, batch: int, content: str | Messages | None) -> Shown:
    progress = Progress("explain", len(document.tokens))
    return Shown(saved_page([served], document, batch, progress.update, content))


def _name(pair: Pair) -> str:
    return pair.folder.name if pair.folder else "pair"


def _roles(acts: Activations) -> list[str]:
    """Who speaks at each token; of several documents also which one it is."""
    several = len(set(acts.doc_ids)) > 1
    of = lambda id, role: ", ".join([f"document {id}"] * several + [role] * bool(role))
    return [of(id, role) for id, role in zip(acts.doc_ids, acts.roles)]
