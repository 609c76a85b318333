"""Pieces of HTML and numbers in words, which every section of the page uses."""

import math
from collections.abc import Sequence
from html import escape
from typing import Any

from .charts import Interval, Number, known

MISSING = "–"


def written(value: Any, unit: str = "") -> str:
    """A figure or a fact. A share is cut, not rounded, to a tenth of a percent: only all of them are 100 %."""
    if isinstance(value, str | int) and not unit:
        return str(value)
    if not known(value):
        return MISSING
    text = f"{math.floor(round(1000 * value, 6)) / 10:.1f} %" if unit == "share" else f"{value:.{_places(value)}f}"
    return text.replace("-", "−")


def interval(ends: Interval, unit: str = "") -> str:
    """Two ends, rounded outwards: rounding must not make the interval look narrower than it is."""
    if not all(map(known, ends)):
        return MISSING
    scale, places, sign = (100, 1, " %") if unit == "share" else (1, _places(*ends), "")
    low, high = (round(end * scale * 10**places, 6) for end in ends)
    low, high = math.floor(low) / 10**places, math.ceil(high) / 10**places
    return f"{low:.{places}f} to {high:.{places}f}{sign}".replace("-", "−")


def _places(*values: Number) -> int:
    """Three decimals from 0.01 to 10; else those, seven at most, that give the largest three significant digits."""
    size = max(map(abs, values))
    return 3 if size == 0 or 0.01 <= size < 10 else min(7, max(0, 2 - math.floor(math.log10(size))))


def breakable(name: str) -> str:
    """A long id, escaped, that may be broken after each separator."""
    return escape(name).replace("/", "/<wbr>").replace(".", ".<wbr>").replace("_", "_<wbr>")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of plain text; the first cell of a row is its heading."""
    top = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    cells = [(name, "".join(f"<td>{escape(cell)}</td>" for cell in rest)) for name, *rest in rows]
    body = "".join(f'<tr><th scope="row">{escape(name)}</th>{rest}</tr>' for name, rest in cells)
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def figure(title: str, chart: str, caption: str = "") -> str:
    """A chart with its title; chart and caption are HTML."""
    return f"<figure><h3>{escape(title)}</h3>{chart}<figcaption>{caption}</figcaption></figure>"
