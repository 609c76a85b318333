"""Charts as strings of HTML and SVG, each drawn once and readable at every width.

Places are percentages of the plot, so a drawing stretches from a phone to a desktop while letters, dots and strokes
keep the size and the colour that the style sheet gives them. Paths cannot use percentages: they are drawn in an inner
SVG of 100 by 100 units, which stretches while its strokes do not. A value that is None or not finite is not drawn.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from statistics import median

Number = int | float
Interval = Sequence[Number | None]  # two ends
MOST_BINS = 36


def known(value: Number | None) -> bool:
    """Whether there is a number to draw or to write."""
    return value is not None and math.isfinite(value)


def short(value: Number) -> str:
    """A number of about four significant digits with a true minus sign."""
    text = f"{value:,.0f}".replace(",", "\u202f") if 1000 <= abs(value) < 1e7 else f"{value:.4g}"
    return text.replace("-", "−")


@dataclass(frozen=True)
class Axis:
    """Places values at percentages of the plot, from the left or, where it is upright, from the top."""

    name: str
    low: Number
    high: Number
    ticks: Sequence[Number]
    upright: bool

    def __call__(self, value: Number) -> float:
        place = 100 * (value - self.low) / (self.high - self.low)
        return round(100 - place if self.upright else place, 2)


def axis(name: str, values: Sequence[Number], count: int = 5, upright: bool = False, last: Number = math.nan) -> Axis:
    """An axis with about `count` round ticks and one at `last`. Upright it has round ends, level those of its data."""
    low, high = min(values), max(values)
    if high - low <= 1e-9 * max(abs(low), abs(high), 1e-12):
        low, high = low - (abs(low) / 10 or 1), high + (abs(high) / 10 or 1)
    power = 10.0 ** math.floor(math.log10((high - low) / count))
    step = next(m * power for m in (1, 2, 5, 10, 20) if (high - low) / count <= m * power)
    ticks = [i * step for i in range(math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9) + 1)]
    if upright:
        return Axis(name, ticks[0], ticks[-1], ticks, upright)
    if known(last):
        ticks = [tick for tick in ticks if last - tick > 0.12 * (high - low)] + [last]
    return Axis(name, low, high, [tick for tick in ticks if low <= tick <= high], upright)


def _straight(css: str, x1: Number | str, y1: Number | str, x2: Number | str, y2: Number | str) -> str:
    """A straight line between places such as "40%" or 13, in pixels."""
    return f'<line class="{css}" x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}"/>'


def _plot(label: str, keys: Sequence[tuple[str, str]], paths: str, marks: str, x: Axis, y: Axis) -> str:
    """`paths` (in hundredths of the plot) and `marks` with a legend of (name, css), grid lines, ticks and axes' names.

    `label` is what a screen reader says. The upright axis is named above itself, where it reads without tilting."""
    left = 12 + 7 * max(len(short(tick)) for tick in y.ticks)
    frame = f'<text class="axis" x="{-left}" y="-11">{escape(y.name)}</text>'
    frame += f'<text class="axis end" x="100%" y="100%" dy="34">{escape(x.name)}</text>'
    for tick in y.ticks:
        frame += _straight("zero" if tick == 0 else "grid", "0%", f"{y(tick)}%", "100%", f"{y(tick)}%")
        frame += f'<text class="end" x="-7" y="{y(tick)}%" dy="4">{short(tick)}</text>'
    for tick in x.ticks:
        frame += f'<text class="middle" x="{x(tick)}%" y="100%" dy="17">{short(tick)}</text>'
    legend = "".join(f'<span class="{css}">{escape(name)}</span>' for name, css in keys)
    return (
        (f'<div class="legend">{legend}</div>' if len(keys) > 1 else "")
        + f'<div class="plot" style="padding-left:{left}px"><svg role="img" aria-label="{escape(label)}">{frame}'
        f'<svg viewBox="0 0 100 100" preserveAspectRatio="none">{paths}</svg>{marks}</svg></div>'
    )


@dataclass(frozen=True)
class Line:
    """One line of a chart; `dots` makes its points visible, `band` holds the ends of an interval at each."""

    name: str
    css: str
    points: Sequence[tuple[Number, Number | None]]
    dots: bool = False
    band: Sequence[Interval] = ()


def with_running_mean(line: Line, window: int) -> list[Line]:
    """The line, faint, and the mean of the known values in a `window` around a point, eight times in each window."""
    values, half, means = [value for _, value in line.points], window // 2, []
    for i in range(0, len(values), half // 4 + 1):
        near = list(filter(known, values[max(0, i - half) : i + half + 1]))
        means.append((line.points[i][0], sum(near) / len(near) if near else None))
    return [Line(line.name, f"{line.css} faint", line.points), Line(line.name, line.css, means)] if half else [line]


def line_chart(label: str, lines: Sequence[Line], x: Axis, y: Axis) -> str:
    """Lines over a common x."""
    lines = [line for line in lines if any(known(value) for _, value in line.points)]
    strong = [(line.name, line.css) for line in lines if "faint" not in line.css]
    paths, dots = ("".join(draw(line, x, y) for line in lines) for draw in (_path, _dots))
    return _plot(label, strong, paths, dots, x, y)


def _path(line: Line, x: Axis, y: Axis) -> str:
    """The band and the line. A stroke of no length, `h0`, makes a point between two gaps visible."""
    ends = [(at, *end) for (at, _), end in zip(line.points, line.band) if all(map(known, end))]
    corners = [(at, low) for at, low, _ in ends] + [(at, high) for at, _, high in reversed(ends)]
    band = "L".join(f"{x(at)},{y(value)}" for at, value in corners)
    path, pen_down = "", False
    for at, value in line.points:
        if known(value):
            path += f"L{x(at)},{y(value)}" if pen_down else f"M{x(at)},{y(value)}h0"
        pen_down = known(value)
    band = f'<path class="band" d="M{band}Z"/>' if band else ""
    return f'<g class="{line.css}">{band}<path class="line" d="{path}"/></g>'


def _dots(line: Line, x: Axis, y: Axis) -> str:
    """Dots with a hover title."""
    dots = ""
    for at, value in line.points:
        if line.dots and known(value):
            title = escape(f"{line.name}, {x.name} {short(at)}: {short(value)}")
            dots += f'<circle class="{line.css}" cx="{x(at)}%" cy="{y(value)}%" r="4"><title>{title}</title></circle>'
    return dots


def bar_chart(label: str, bars: Sequence[tuple[str, str, Number, Interval, str]], x: Axis) -> str:
    """Bars (name, css, value, ends of the interval, value as text) from zero to either side, named above themselves."""
    rows, grid, ticks = "", "", f'<text class="end" x="100%" y="28">{escape(x.name)}</text>'
    for tick in x.ticks:
        grid += _straight("zero" if tick == 0 else "grid", f"{x(tick)}%", 0, f"{x(tick)}%", "100%")
        ticks += f'<text class="middle" x="{x(tick)}%" y="12">{short(tick)}</text>'
    for name, css, value, interval, said in bars:
        start, end = sorted((x(0), x(value)))
        marks = f'<rect class="bar" x="{start}%" y="6" width="{end - start:.2f}%" height="14"/>'
        if all(map(known, interval)):
            marks += _straight("whisker", f"{x(interval[0])}%", 13, f"{x(interval[1])}%", 13)
        rows += f"<p><span>{escape(name)}</span> <b>{escape(said)}</b></p>"
        rows += f'<svg aria-hidden="true" class="{css}">{grid}{marks}</svg>'
    rows += f'<svg aria-hidden="true">{ticks}</svg>'
    return f'<div class="bars" role="group" aria-label="{escape(label)}">{rows}</div>'


def histogram(label: str, groups: Sequence[tuple[str, str, Sequence[Number]]], unit: str) -> str:
    """Overlaid outlines of groups (name, css, values) as shares of each group, a dashed line at each median.

    Half a percent of far outliers on either side do not squeeze the rest: the outermost bins count them."""
    ordered = sorted(value for _, _, values in groups for value in values)
    low, high, count = ordered[len(ordered) // 200], ordered[-1 - len(ordered) // 200], MOST_BINS
    outside = sum(not low <= value <= high for value in ordered)
    if all(value == int(value) for value in ordered):
        # Bins of whole numbers have whole widths: else some would hold more numbers than their neighbours.
        width = math.ceil((high + 1 - low) / MOST_BINS)
        count = math.ceil((high + 1 - low) / width)
        high = low + count * width
    high = high if high > low else low + 1
    shares = []
    for _, _, values in groups:
        bins = [min(count - 1, max(0, math.floor((value - low) / (high - low) * count))) for value in values]
        shares.append([100 * bins.count(i) / len(bins) for i in range(count)])
    x, y = axis(unit, [low, high]), axis("% of rows", [0, max(map(max, shares))], 4, upright=True)
    areas, medians = "", ""
    for (name, css, values), heights in zip(groups, shares):
        steps = "".join(f"L{100 * i / count:.2f},{y(h)}H{100 * (i + 1) / count:.2f}" for i, h in enumerate(heights))
        said = escape(f"{name}: median {short(median(values))}, n = {len(values)}")
        areas += f'<path class="area {css}" d="M0,100{steps}V100Z"><title>{said}</title></path>'
        middle = f"{x(min(high, max(low, median(values))))}%"
        medians += _straight(f"median {css}", middle, "0%", middle, "100%")
    note = f'<p class="note">The outermost bins also count {outside} values further out.</p>' if outside else ""
    return _plot(label, [group[:2] for group in groups], areas, medians, x, y) + note
