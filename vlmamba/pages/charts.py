"""The one chart of all pages, as SVG drawn here: it needs no plotting package and follows the page's colours.

Colours and fonts come from the page's style sheet (classes grid, tick, axis and the kinds of `Series`), or from
`STYLE` in a file of its own.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, Literal

from vlmamba.common.files import replace_text

LEFT, RIGHT, TOP, BOTTOM, LINE = 46, 14, 20, 36, 17
MAX_POINTS = 240
LOG_RANGE = 12.0
"""Lines whose values span more than this factor are drawn on a logarithmic axis."""
PALETTE = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7A5195", "#8C6D31", "#999999", "#B23A48",
)  # fmt: skip
"""After Okabe and Ito (Color Universal Design, 2008), which most colour-blind readers can tell apart."""
STYLE = (
    ".chart{background:#fff;font-family:sans-serif}.grid{stroke:#ddd}.axis{stroke:#666}"
    ".tick{fill:#333;font-size:12px}.end{text-anchor:end}.mid{text-anchor:middle}.raw{opacity:.3}.span{stroke-width:2}"
)

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """Something to draw.

    Attributes:
        points: For "spans" two points each, the ends of an interval.
        kind: "smooth" (a line), "raw" (a faint one), "dots", "marks" (one stroke for each point), "spans" or "bars".
        name: In the legend; not there when empty.
        colour: Place in `PALETTE`; that of the page when left out.
        notes: What each bar says when pointed at.
    """

    points: Sequence[Point]
    kind: Literal["smooth", "raw", "dots", "marks", "spans", "bars"] = "smooth"
    name: str = ""
    colour: int | None = None
    notes: Sequence[str] = ()


def chart(
    series: Sequence[Series],
    *,
    label: str,
    x: str = "",
    y: str = "",
    rows: Sequence[str] = (),
    width: int = 440,
    height: int = 250,
) -> str:
    """A chart.

    Args:
        series: What to draw, later ones over earlier ones.
        label: What the chart shows, for screen readers.
        x: Name of the horizontal axis.
        y: Name of the vertical axis.
        rows: Names on the vertical axis, the first at the top; points then have places in it as their y.
        width: In pixels of the drawing.
        height: Of the plot; the legend goes below.

    Returns:
        An ``<svg>`` element.
    """
    left = LEFT if not rows else min(220, 14 + 7 * max(map(len, rows)))
    across, down = _across(series, left, width - RIGHT), _down(series, rows, TOP, height - BOTTOM)
    names = [one for one in series if one.name]
    total, base = height + LINE * len(names), height - BOTTOM
    parts = [f'<svg class="chart" viewBox="0 0 {width} {total}" role="img" aria-label="{escape(label)}">']
    for value in down.ticks:
        at, name = down.of(value), rows[int(value)] if rows else number(value)
        parts.append(f'<line class="grid" x1="{left}" x2="{width - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(_text(name, left - 7, at + 4, "end"))
    for value in across.ticks:
        parts.append(_text(number(value), across.of(value), base + LINE, "mid"))
    parts.append(f'<line class="axis" x1="{left}" x2="{width - RIGHT}" y1="{base}" y2="{base}"/>')
    parts.append(_text(x, (left + width - RIGHT) / 2, height - 2, "mid"))
    if y:
        parts.append(_text(y, left, TOP - 8, "start"))
    parts += [_drawn(one, across, down, base) for one in series]
    for at, one in enumerate(names):
        middle = height + LINE * at + 8
        parts.append(f'<circle cx="{left}" cy="{middle}" r="4" {_colour(one, "fill")}/>')
        parts.append(_text(one.name, left + 10, middle + 4, "start"))
    return "".join([*parts, "</svg>"])


@dataclass(frozen=True)
class _Axis:
    """From values to pixels."""

    low: float
    high: float
    start: float
    end: float
    ticks: Sequence[float]
    logarithmic: bool = False

    def of(self, value: float) -> float:
        """The pixel of a value."""
        low, high = (math.log(self.low), math.log(self.high)) if self.logarithmic else (self.low, self.high)
        share = ((math.log(value) if self.logarithmic else value) - low) / max(high - low, 1e-12)
        return self.start + (self.end - self.start) * (share if self.high > self.low else 0.5)


def _has_lines(series: Sequence[Series]) -> bool:
    return any(one.kind in ("smooth", "raw") for one in series)


def _across(series: Sequence[Series], start: float, end: float) -> _Axis:
    values = [at for one in series for at, _ in one.points]
    low, high = min(values), max(values)
    if _has_lines(series):  # they begin and end at the edges
        return _Axis(low, high, start, end, [t for t in nice_ticks(low, high, 5) if low <= t <= high])
    ticks = nice_ticks(low, high, 5)
    pad = (ticks[-1] - ticks[0]) / 50 if any(one.kind == "bars" for one in series) else 0
    return _Axis(ticks[0] - pad, ticks[-1] + pad, start, end, ticks)


def _down(series: Sequence[Series], rows: Sequence[str], start: float, end: float) -> _Axis:
    if rows:
        return _Axis(-0.5, len(rows) - 0.5, start, end, range(len(rows)))
    values = [at for one in series for _, at in one.points]
    low, high = min(values), max(values)
    lines = _has_lines(series)
    if lines and low > 0 and high / low > LOG_RANGE:
        ticks = log_ticks(low, high)
        return _Axis(min(low, ticks[0]), max(high, ticks[-1]), end, start, ticks, logarithmic=True)
    ticks = nice_ticks(0.0 if lines or any(one.kind == "bars" for one in series) else low, high, 5)
    return _Axis(ticks[0], ticks[-1], end, start, ticks)


def _drawn(one: Series, across: _Axis, down: _Axis, base: float) -> str:
    places = [(across.of(a), down.of(b)) for a, b in one.points]
    if one.kind in ("smooth", "raw"):
        line = " ".join(f"{a:.1f},{b:.1f}" for a, b in places)
        return f'<polyline class="{one.kind}" points="{line}" fill="none" {_colour(one, "stroke")}/>'
    if one.kind == "dots":
        return "".join(
            f'<circle class="dot" cx="{a:.1f}" cy="{b:.1f}" r="3.5" {_colour(one, "fill")}/>'
            for a, b in places
        )
    if one.kind == "bars":
        wide = max(1.0, min((b - a for (a, _), (b, _) in itertools.pairwise(places)), default=20.0) - 2)
        notes = [f"<title>{escape(note)}</title>" for note in one.notes] or [""] * len(places)
        return "".join(
            f'<rect class="dot" x="{a - wide / 2:.1f}" y="{b:.1f}" width="{wide:.1f}" height="{base - b:.1f}" '
            f"{_colour(one, 'fill')}>{note}</rect>"
            for (a, b), note in zip(places, notes, strict=True)
        )
    reach = 5 if one.kind == "marks" else 0
    ends = (
        [(p, p) for p in places] if one.kind == "marks" else list(zip(places[::2], places[1::2], strict=True))
    )
    colour = _colour(one, "stroke")
    return "".join(
        f'<line class="span" x1="{a:.1f}" y1="{b - reach:.1f}" x2="{c:.1f}" y2="{d + reach:.1f}" {colour}/>'
        for (a, b), (c, d) in ends
    )


def _text(text: str, x: float, y: float, anchor: str) -> str:
    return f'<text class="tick {anchor}" x="{x:.1f}" y="{y:.1f}">{escape(text)}</text>' if text else ""


def _colour(one: Series, what: str) -> str:
    return "" if one.colour is None else f'style="{what}:{PALETTE[one.colour % len(PALETTE)]}"'


def write_chart(path: str | Path, svg: str) -> Path:
    """Write a chart as a file of its own."""
    inside = svg.removeprefix("<svg").replace(">", f"><style>{STYLE}</style>", 1)
    replace_text(path, f'<svg xmlns="http://www.w3.org/2000/svg"{inside}\n')
    return Path(path)


def loss_series(points: Sequence[Point], **how: Any) -> list[Series]:
    """A run's losses by step: as logged, faint, smoothed, and the last value."""
    smooth = smoothed(points)
    return [
        Series(envelope(points), "raw"),
        Series(thinned(smooth), "smooth", **how),
        Series(smooth[-1:], "dots"),
    ]


def smoothed(points: Sequence[Point]) -> list[Point]:
    """Mean over a centred window of about a twentieth of the points, cut off at the ends: it does not lag."""
    reach = min(50, len(points) // 40)
    sums = [0.0, *itertools.accumulate(y for _, y in points)]
    result = []
    for at, (x, _) in enumerate(points):
        start, end = max(0, at - reach), min(len(points), at + reach + 1)
        result.append((x, (sums[end] - sums[start]) / (end - start)))
    return result


def thinned(points: Sequence[Point]) -> list[Point]:
    """At most about `MAX_POINTS` points, evenly taken, the last among them."""
    stride = max(1, math.ceil(len(points) / MAX_POINTS))
    taken = list(points[::stride])
    return taken if taken[-1] == points[-1] else [*taken, points[-1]]


def envelope(points: Sequence[Point]) -> list[Point]:
    """Thinned so that peaks stay: of each run of points the lowest and the highest, in their order."""
    size = max(1, math.ceil(2 * len(points) / MAX_POINTS))
    if size <= 2:
        return list(points)
    result: list[Point] = []
    for start in range(0, len(points), size):
        part = points[start : start + size]
        ends = {min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])}
        result += sorted(ends)
    return result


def nice_ticks(low: float, high: float, count: int) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) from at most `low` to at least `high`."""
    if high - low <= abs(high) * 1e-6:  # one value
        high = low + (abs(low) / 10 or 1.0)
    span = high - low
    power = 10.0 ** math.floor(math.log10(span / count))
    step = next(m * power for m in (1, 2, 5, 10) if m * power * count >= span * 0.999999)
    start, end = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(start, max(end, start + 1) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten (powers alone over many decades) that enclose low to high."""
    decades = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
    factors = (1, 2, 5) if math.log10(high / low) < 2.5 else (1,)
    ticks = [m * 10.0**e for e in decades for m in factors]
    inside_from = max(t for t in ticks if t <= low * 1.0000001)
    inside_to = min(t for t in ticks if t >= high * 0.9999999)
    return [t for t in ticks if inside_from <= t <= inside_to]


def number(value: float) -> str:
    """A tick's label."""
    if value == 0:
        return "0"
    if abs(value) >= 10_000:
        return f"{value / 1000:g}k"
    return f"{value:g}" if abs(value) >= 1e-3 else f"{value:.0e}"
