"""The page's style sheet and script, from the files in browser/. Nothing is loaded: the fonts are the reader's own, and
the script makes no requests."""

from pathlib import Path

BROWSER = Path(__file__).parent / "browser"


def _text(name: str) -> str:
    return (BROWSER / name).read_text(encoding="utf-8")


LOOK = _text("look.css")  # colours, and tokens coloured by a value: of the report, and of the page of `nla serve`
CSS = LOOK + _text("page.css")
SCRIPT = '"use strict";\n' + _text("page.js")
