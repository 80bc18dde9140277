"""A table's plots: figures by row, figures against cost, losses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from vlmamba.ablations.collect import Figure, RowResult
from vlmamba.ablations.table import Table
from vlmamba.pages.charts import Series, chart, smoothed, thinned

WIDTH = 620


class Plot(NamedTuple):
    """A chart, the name of its file, and what it shows."""

    name: str
    caption: str
    svg: str


def draw_all(table: Table, results: Sequence[RowResult]) -> list[Plot]:
    """Draw what the results have enough of; a row has the same colour in all plots."""
    main = table.columns[0]
    shown = [(at, r, r.figures[main]) for at, r in enumerate(results) if main in r.figures]
    plots: list[Plot] = []
    if shown:
        unit = f"{main} ({shown[0][2].unit})"
        plots.append(_by_row(main, unit, shown))
        costs: tuple[tuple[str, str, Callable[[RowResult], float | None]], ...] = (
            ("tokens", "visual tokens of an image", lambda r: r.image_tokens),
            ("step", "seconds of a training step", lambda r: r.step_seconds),
            ("prefill", "milliseconds to read a prompt with one image", lambda r: r.speed.get("prefill_ms")),
        )
        for name, label, cost in costs:
            points = [(at, r, f, float(x)) for at, r, f in shown if (x := cost(r)) is not None]
            if len({x for *_, x in points}) > 1:
                series = []
                for at, r, figure, x in points:
                    series += _interval(figure, r.row.name, at, partial(_at, x))
                caption = f"{main} against {label}"
                plots.append(Plot(name, caption, chart(series, label=caption, x=label, y=unit, width=WIDTH)))
    plots += [_losses(results, stage) for stage in dict.fromkeys(name for r in results for name in r.logs)]
    return plots


def _at(x: float, value: float) -> tuple[float, float]:
    return x, value


def _interval(
    figure: Figure, name: str, colour: int, place: Callable[[float], tuple[float, float]]
) -> list[Series]:
    """A mean, and its interval where there is one."""
    found = figure.estimate
    dot = Series([place(found.mean)], "dots", name, colour)
    if found.low is None or found.high is None:
        return [dot]
    return [Series([place(found.low), place(found.high)], "spans", colour=colour), dot]


def _by_row(main: str, unit: str, shown: Sequence[tuple[int, RowResult, Figure]]) -> Plot:
    series: list[Series] = []
    for row, (at, _, figure) in enumerate(shown):
        series += _interval(figure, "", at, lambda value, row=row: (value, float(row)))  # type: ignore[misc]
        series.append(Series([(value, float(row)) for value in figure.values], "marks", colour=at))
    caption = f"{main} by row: mean with its 95 % interval, and each seed"
    rows = [r.row.name for _, r, _ in shown]
    return Plot(
        "rows",
        caption,
        chart(series, label=caption, x=unit, rows=rows, width=WIDTH, height=60 + 30 * len(rows)),
    )


def _losses(results: Sequence[RowResult], stage: str) -> Plot:
    series: list[Series] = []
    seen: set[tuple[float, ...]] = set()
    for at, result in enumerate(results):
        name = result.row.name
        for run in result.logs.get(stage, ()):
            points = [(float(line["step"]), float(line["loss"])) for line in run.lines]
            key = tuple(y for _, y in points[:20])
            if key not in seen:  # a stage that rows share is drawn once
                seen.add(key)
                series.append(Series(thinned(smoothed(points)), "smooth", name, at))
                name = ""
    caption = f"loss of {stage}, smoothed; a line for each seed"
    return Plot(
        f"loss_{stage.replace(' ', '_')}",
        caption,
        chart(series, label=caption, x="step", y="loss", width=WIDTH),
    )
