"""The page as one string: the files of browser/ in one HTML file, which loads nothing.

The page that is saved, or exported without a browser, is the same file with what was computed inside."""

import base64
import hashlib
import json
import re
from pathlib import Path
from typing import Any

from nla_jax.tools.report.style import LOOK

BROWSER = Path(__file__).parent / "browser"
# In this order; another panel is another file in browser/panels/.
PANELS = ("explanation", "alternatives", "patch", "steer", "nearest", "neighbours")
PLACE = re.compile(r"\{\{(\w+)\}\}")


def _text(name: str) -> str:
    return (BROWSER / name).read_text(encoding="utf-8")


def _digest(content: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"


STYLE = LOOK + _text("page.css")
_FILES = (
    "state.js",
    "ask.js",
    "strip.js",
    "reading.js",
    "demand.js",
    "claims.js",
    *(f"panels/{name}.js" for name in PANELS),
    "keep.js",
    "start.js",
)
SCRIPT = '"use strict";\n' + "".join(f"\n// {name}\n{_text(name)}" for name in _FILES)
# Our one script and our one style sheet, by their hashes; requests to the server that the page came from, and to no other.
POLICY = (
    f"default-src 'none'; script-src {_digest(SCRIPT)}; style-src {_digest(STYLE)}; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'"
)


def page(data: dict[str, Any]) -> str:
    """The whole page. `data`: the pairs, and of a saved page what was read and computed (browser/state.js says its
    form)."""
    held = json.dumps(data, ensure_ascii=False).replace("<", "\\u003c")  # no text of it can end the element
    parts = {"POLICY": POLICY, "STYLE": STYLE, "DATA": held, "SCRIPT": SCRIPT}
    return PLACE.sub(lambda place: parts[place[1]], _text("page.html"))
