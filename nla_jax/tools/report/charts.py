"""Small inline SVG charts: lines, bars and histograms as plain strings.

Colours come from the page's style sheet: a series names a CSS class (`rl`, `warm`, `control`, ...), so that one SVG
serves the light and the dark page. Values that are missing or not finite leave a gap, they are never drawn.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from statistics import median

TEXT_HEIGHT = 12
HOVER_TARGETS = 60  # per line: enough to point at, few enough to keep the page small


def number(value: object) -> float | None:
    """`value` as a finite float, or None."""
    try:
        result = float(value)
    except (TypeError, ValueError):
        return None
    return result if math.isfinite(result) else None


def items(value: object) -> list:
    """The items of a list-like value; none of anything else."""
    return list(value) if isinstance(value, Iterable) and not isinstance(value, str | Mapping) else []


def numbers(values: object) -> list[float]:
    """The finite ones among `values`."""
    return [x for x in map(number, items(values)) if x is not None]


def short(value: float) -> str:
    """A number of about four significant digits with a true minus sign."""
    return f"{value:.4g}".replace("-", "−")


@dataclass(frozen=True)
class Series:
    """One line of a chart: points (x, y) with y None where there is a gap; `dots` makes the points visible."""

    name: str
    css: str
    points: Sequence[tuple[float, float | None]]
    dots: bool = False


@dataclass(frozen=True)
class Scale:
    """Maps the values lo..hi to the pixels start..stop, through `warp` (the identity or a logarithm)."""

    lo: float
    hi: float
    start: float
    stop: float
    warp: Callable[[float], float] = float

    def __call__(self, value: float) -> float:
        lo, hi = self.warp(self.lo), self.warp(self.hi)
        return self.start + (self.warp(value) - lo) / (hi - lo) * (self.stop - self.start)


def nice_range(values: Sequence[float], count: int) -> tuple[float, float, list[float]]:
    """Round limits around `values`, and about `count` round ticks between them."""
    lo, hi = min(values), max(values)
    if hi - lo <= 1e-9 * max(abs(lo), abs(hi), 1e-12):
        lo, hi = lo - (abs(lo) / 10 or 1), hi + (abs(hi) / 10 or 1)
    power = 10.0 ** math.floor(math.log10((hi - lo) / count))
    step = next(m * power for m in (1, 2, 2.5, 5, 10, 20) if (hi - lo) / count <= m * power)
    first, last = math.floor(lo / step + 1e-9), math.ceil(hi / step - 1e-9)
    return first * step, last * step, [i * step for i in range(first, last + 1)]


def log_ticks(hi: float) -> list[float]:
    """0, 1, 3, 10, 30, ... up to `hi`."""
    powers = range(math.ceil(math.log10(max(hi, 1))) + 1)
    return [0.0] + [m * 10.0**e for e in powers for m in (1, 3) if m * 10**e <= hi]


def svg(width: int, height: int, label: str, body: list[str], css: str = "") -> str:
    """The outer element; the label is what a screen reader says in place of the picture."""
    return (f'<svg class="{css}" viewBox="0 0 {width} {height}" width="100%" role="img" aria-label="{escape(label)}">'
            + "".join(body) + "</svg>")


def text(x: float, y: float, content: str, anchor: str = "start", css: str = "") -> str:
    return f'<text class="{css}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(content)}</text>'


def line(css: str, x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="{css}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"></line>'


def whisker(x1: float, y1: float, x2: float, y2: float, title: str = "") -> str:
    """An upright or level bar with a cap at both ends."""
    dx, dy = (5, 0) if x1 == x2 else (0, 5)
    strokes = [line("", x1, y1, x2, y2)] + [line("", x - dx, y - dy, x + dx, y + dy) for x, y in ((x1, y1), (x2, y2))]
    return f'<g class="whisker">{"".join(strokes)}<title>{escape(title)}</title></g>'


def responsive(draw: Callable[[int], str]) -> str:
    """The chart drawn twice, for a desk and for a phone: scaling one drawing down would make its text unreadable."""
    return f'<div class="wide">{draw(880)}</div><div class="narrow">{draw(340)}</div>'


def frame(x: Scale, y: Scale, x_ticks: Sequence[float], y_ticks: Sequence[float], x_name: str, y_name: str,
          y_format: Callable[[float], str] = short) -> list[str]:
    """Grid lines, tick labels and the axes' names; the y axis is named above itself, where it reads without tilting."""
    parts = []
    for value in y_ticks:
        parts.append(line("zero" if value == 0 else "grid", x.start, y(value), x.stop, y(value)))
        parts.append(text(x.start - 7, y(value) + 4, y_format(value), "end"))
    taken = -math.inf
    for value in x_ticks:
        label, at = short(value), x(value)
        if at - 4 * len(label) > taken:  # the labels of a logarithmic axis may run into each other
            parts.append(text(at, y.start + TEXT_HEIGHT + 6, label, "middle"))
            taken = at + 4 * len(label)
    parts.append(text(x.stop, y.start + 2 * TEXT_HEIGHT + 10, x_name, "end", "axis"))
    parts.append(text(0, TEXT_HEIGHT, y_name, css="axis"))
    return parts


def draw_line(series: Series, x: Scale, y: Scale, x_name: str) -> list[str]:
    """The path, and a hover title on its points; a line without dots has unseen ones at regular distances."""
    path, pen_down = [], False
    for at, value in series.points:
        if value is not None:
            # The empty stroke `h0` makes a point between two gaps visible as a dot.
            path.append(f"{'L' if pen_down else 'M'}{x(at):.1f},{y(value):.1f}" + ("" if pen_down else "h0"))
        pen_down = value is not None
    seen = [(at, value) for at, value in series.points if value is not None]
    stride = 1 if series.dots else math.ceil(len(seen) / HOVER_TARGETS) or 1
    circles = [f'<circle class="{"dot" if series.dots else "hover"}" cx="{x(at):.1f}" cy="{y(value):.1f}" r="4">'
               f"<title>{escape(f'{series.name}, {x_name} {short(at)}: {short(value)}')}</title></circle>"
               for at, value in seen[::stride]]
    return [f'<g class="{series.css}"><path class="line" d="{"".join(path)}"></path>', *circles, "</g>"]


def line_chart(series: Sequence[Series], width: int, height: int, label: str, x_name: str, y_name: str,
               include: Sequence[float] = (), log_x: bool = False,
               rules: Sequence[tuple[str, float]] = (), interval: tuple[str, float, float, float] | None = None) -> str:
    """Lines over a common x.

    `include` are values the y axis must reach, `rules` are named horizontal lines, `interval` is a titled vertical bar
    (title, x, low, high). With `log_x`, x stands at log(1 + x), so that 0 has a place.
    """
    finite = [value for s in series for _, value in s.points if value is not None]
    reach = [*finite, *include, *(value for _, value in rules), *(interval[2:] if interval else ())]
    lo, hi, y_ticks = nice_range(reach, 3 if height < 200 else 5)
    left = 14 + 7 * max(len(short(t)) for t in y_ticks)
    y = Scale(lo, hi, height - 38, 26)
    xs = [at for s in series for at, _ in s.points]
    x_lo, x_hi = min(xs), max(max(xs), min(xs) + 1)
    x = Scale(x_lo, x_hi, left, width - 14, math.log1p if log_x else float)
    x_ticks = log_ticks(x_hi) if log_x else nice_range([x_lo, x_hi], width // 100 + 1)[2]
    parts = frame(x, y, [t for t in x_ticks if x_lo <= t <= x_hi], y_ticks, x_name, y_name)
    for name, value in rules:
        parts.append(line("rule", x.start, y(value), x.stop, y(value)))
    for s in series:
        parts += draw_line(s, x, y, x_name)
    for name, value in rules:
        parts.append(text(x.stop - 4, y(value) + 15, name, "end", "halo"))
    if interval:
        title, at, low, high = interval
        parts.append(whisker(x(at), y(low), x(at), y(high), title))
    return svg(width, height, label, parts, "small" if height < 200 else "")


@dataclass(frozen=True)
class Bar:
    """One bar: a value or None, printed as `shown`; `interval` draws a whisker."""

    name: str
    css: str
    value: float | None
    shown: str
    interval: tuple[float, float] | None = None


def bar_chart(bars: Sequence[Bar], width: int, label: str, x_name: str, include: Sequence[float]) -> str:
    """Horizontal bars from zero to either side, each with its value printed at its end.

    Names stand beside the bars, or above them where the picture is narrow.
    """
    beside = width > 500
    row, names, top, room = (34, 104, 4, 56) if beside else (48, 0, 4, 56)
    reach = [0.0, *include]
    for bar in bars:
        reach += [x for x in (bar.value, *(bar.interval or ())) if x is not None]
    lo, hi = min(reach), max(reach)  # not widened to round limits: the bars need the width of a phone
    x_ticks = [t for t in nice_range(reach, 7 if beside else 4)[2] if lo <= t <= hi]
    bottom = top + row * len(bars)
    x = Scale(lo, hi, names + (room if lo < 0 else 0), width - room)
    parts = []
    for value in x_ticks:
        parts += [line("zero" if value == 0 else "grid", x(value), top, x(value), bottom),
                  text(x(value), bottom + TEXT_HEIGHT + 6, short(value), "middle")]
    parts.append(text(x.stop, bottom + 2 * TEXT_HEIGHT + 10, x_name, "end", "axis"))
    for i, bar in enumerate(bars):
        middle = top + row * (i + 1) - 17
        parts.append(text(0, middle + (4 if beside else -15), bar.name, css="name halo"))
        start = end = x(0)
        if bar.value is not None:
            start, end = sorted((x(0), x(bar.value)))
            parts.append(f'<g class="{bar.css}"><rect class="bar" x="{start:.1f}" y="{middle - 10:.1f}" '
                         f'width="{end - start:.1f}" height="20"><title>{escape(f"{bar.name}: {bar.shown}")}</title>'
                         "</rect></g>")
        if bar.interval:
            low, high = map(x, bar.interval)
            parts.append(whisker(low, middle, high, middle))
            start, end = min(start, low), max(end, high)
        negative = bar.value is not None and bar.value < 0
        parts.append(text(start - 7 if negative else end + 7, middle + 4, bar.shown, "end" if negative else "start",
                          "value"))
    return svg(width, bottom + 40, label, parts)


def histogram(groups: Sequence[tuple[str, str, Sequence[float]]], label: str, x_name: str, y_name: str,
              limits: tuple[float, float], bins: int = 36, width: int = 380, height: int = 250) -> str:
    """Overlaid outlines of groups (name, css, values) as shares of each group, a dashed line at each median.

    Values outside `limits` are counted in the outermost bins.
    """
    lo, hi = limits
    shares = []
    for _, _, values in groups:
        counts = [0] * bins
        for value in values:
            counts[min(bins - 1, max(0, math.floor((value - lo) / (hi - lo) * bins)))] += 1
        shares.append([count / len(values) for count in counts])
    _, top, y_ticks = nice_range([0.0, max(map(max, shares))], 4)
    y = Scale(0, top, height - 38, 26)
    x = Scale(lo, hi, 46, width - 14)
    x_ticks = [t for t in nice_range([lo, hi], 5)[2] if lo <= t <= hi]
    parts = frame(x, y, x_ticks, y_ticks, x_name, y_name, lambda share: f"{100 * share:.3g} %")
    for (name, css, values), heights in zip(groups, shares):
        edges = [x(lo + (hi - lo) * i / bins) for i in range(bins + 1)]
        steps = "".join(f"L{edges[i]:.1f},{y(h):.1f}L{edges[i + 1]:.1f},{y(h):.1f}" for i, h in enumerate(heights))
        middle = min(hi, max(lo, median(values)))
        outline = f"M{edges[0]:.1f},{y(0):.1f}{steps}L{edges[-1]:.1f},{y(0):.1f}Z"
        parts.append(f'<g class="{css}"><path class="area" d="{outline}">'
                     f"<title>{escape(f'{name}: median {short(median(values))}, n = {len(values)}')}</title></path>"
                     f"{line('median', x(middle), y(0), x(middle), y(top))}</g>")
    return svg(width, height, label, parts)
