"""Loss curves as SVG, drawn here so that a report needs no plotting package and follows the page's colours.

Colours and fonts come from the page's style sheet through the classes grid, tick, axis, raw and smooth.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from html import escape

WIDTH, HEIGHT = 440, 250
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 12, 36
MAX_POINTS = 240
LOG_RANGE = 12.0
"""Losses that span more than this factor are drawn on a logarithmic axis."""

Point = tuple[float, float]


def loss_chart(steps: Sequence[int], losses: Sequence[float], *, label: str) -> str:
    """A chart of one run: the loss as logged, faint, and smoothed.

    Args:
        steps: Step of each log line, ascending.
        losses: Loss of each, finite.
        label: What the chart shows, for screen readers.

    Returns:
        An ``<svg>`` element.
    """
    raw = list(zip(map(float, steps), map(float, losses), strict=True))
    smooth = smoothed(raw)
    low, high = min(y for _, y in raw), max(y for _, y in raw)
    logarithmic = low > 0 and high / low > LOG_RANGE
    y_ticks = log_ticks(low, high) if logarithmic else nice_ticks(0.0, max(high, 1e-9), 5)
    bottom, top = (min(low, y_ticks[0]), max(high, y_ticks[-1])) if logarithmic else (y_ticks[0], y_ticks[-1])
    first, last = raw[0][0], raw[-1][0]

    def x_of(x: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * ((x - first) / (last - first) if last > first else 0.5)

    def y_of(y: float) -> float:
        if logarithmic:
            share = math.log(y / bottom) / max(math.log(top / bottom), 1e-9)
        else:
            share = (y - bottom) / max(top - bottom, 1e-9)
        return TOP + (HEIGHT - TOP - BOTTOM) * (1 - share)

    parts = [f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">']
    for y in y_ticks:
        at = y_of(y)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text class="tick end" x="{LEFT - 7}" y="{at + 4:.1f}">{number(y)}</text>')
    for x in nice_ticks(first, last, 5):
        if first <= x <= last:
            parts.append(
                f'<text class="tick mid" x="{x_of(x):.1f}" y="{HEIGHT - BOTTOM + 17}">{number(x)}</text>'
            )
    base = HEIGHT - BOTTOM
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{base}" y2="{base}"/>')
    parts.append(f'<text class="tick mid" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 2}">step</text>')
    for name, series in (("raw", envelope(raw)), ("smooth", thinned(smooth))):
        points = " ".join(f"{x_of(x):.1f},{y_of(y):.1f}" for x, y in series)
        parts.append(f'<polyline class="{name}" points="{points}"/>')
    end_x, end_y = smooth[-1]
    parts.append(f'<circle class="dot" cx="{x_of(end_x):.1f}" cy="{y_of(end_y):.1f}" r="3.5"/></svg>')
    return "".join(parts)


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
    span = max(high - low, abs(high) * 1e-6, 1e-9)
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
