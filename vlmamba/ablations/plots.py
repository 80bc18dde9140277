"""A table's plots: figures by row, figures against cost, losses."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlmamba.ablations.collect import RowResult
from vlmamba.ablations.table import Table
from vlmamba.errors import require
from vlmamba.evaluation.curves import smoothed, thinned

COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#000000",
    "#999999",
    "#7A5195",
    "#8C6D31",
)
"""Okabe and Ito's (Color Universal Design, 2008), which most colour-blind readers can tell apart, and two more."""
INK, GRID = "#333333", "#DDDDDD"


def draw_all(table: Table, results: Sequence[RowResult], folder: Path) -> list[tuple[str, Path]]:
    """Draw what the results have enough of.

    Returns:
        A caption and a PNG file for each plot.
    """
    folder.mkdir(parents=True, exist_ok=True)
    main = table.columns[0]
    shown = [r for r in results if main in r.figures]
    plots: list[tuple[str, Path]] = []
    if shown:
        plots.append(
            (f"{main} by row: mean with its 95 % interval, and each seed", _by_row(table, shown, folder))
        )
    costs = (
        ("tokens", "visual tokens of an image", lambda r: r.image_tokens),
        ("step", "seconds of a training step", lambda r: r.step_seconds),
        ("prefill", "milliseconds to read a prompt with one image", lambda r: r.speed.get("prefill_ms")),
    )
    for name, label, cost in costs:
        points = [(r, float(cost(r))) for r in shown if cost(r) is not None]
        if len({x for _, x in points}) > 1:
            plots.append(
                (f"{main} against {label}", _against(main, points, label, folder / f"{name}.png", results))
            )
    for stage in dict.fromkeys(name for r in results for name in r.logs):
        plots.append((f"loss of {stage}, smoothed; a line for each seed", _losses(results, stage, folder)))
    return plots


def _figure(width: float, height: float) -> tuple[Any, Any]:
    matplotlib: Any = require("matplotlib.figure", extra="eval", feature="plots of an ablation table")
    figure = matplotlib.Figure(figsize=(width, height), dpi=130, layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK, labelsize=9)
    axes.set_axisbelow(True)
    axes.grid(color=GRID, linewidth=0.7)
    return figure, axes


def _save(figure: Any, path: Path) -> Path:
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, format="png", metadata={"Software": None})
    temporary.replace(path)
    return path


def colour(results: Sequence[RowResult], result: RowResult) -> str:
    """The colour of a row in all plots."""
    return COLOURS[[r.row.name for r in results].index(result.row.name) % len(COLOURS)]


def _by_row(table: Table, results: Sequence[RowResult], folder: Path) -> Path:
    main = table.columns[0]
    figure, axes = _figure(6.6, 0.9 + 0.42 * len(results))
    for at, result in enumerate(results):
        found = result.figures[main]
        own = colour(results, result)
        mean = found.estimate.mean
        if found.estimate.low is not None and found.estimate.high is not None:
            axes.plot([found.estimate.low, found.estimate.high], [at, at], color=own, linewidth=2.2)
        axes.plot(found.values, [at] * len(found.values), "|", color=own, markersize=11, alpha=0.7)
        axes.plot([mean], [at], "o", color=own, markersize=6)
    axes.set_yticks(range(len(results)), [r.row.name for r in results])
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(f"{main} ({results[0].figures[main].unit})", color=INK, fontsize=9)
    return _save(figure, folder / "rows.png")


def _against(
    main: str, points: Sequence[tuple[RowResult, float]], label: str, path: Path, results: Sequence[RowResult]
) -> Path:
    figure, axes = _figure(6.6, 3.8)
    for result, x in points:
        found = result.figures[main].estimate
        own = colour(results, result)
        if found.low is not None and found.high is not None:
            axes.plot([x, x], [found.low, found.high], color=own, linewidth=1.4)
        axes.plot([x], [found.mean], "o", color=own, markersize=7, label=result.row.name)
    axes.set_xlabel(label, color=INK, fontsize=9)
    axes.set_ylabel(f"{main} ({points[0][0].figures[main].unit})", color=INK, fontsize=9)
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return _save(figure, path)


def _losses(results: Sequence[RowResult], stage: str, folder: Path) -> Path:
    figure, axes = _figure(6.6, 3.4)
    seen: set[tuple[float, ...]] = set()
    for result in results:
        first = True
        for run in result.logs.get(stage, ()):
            points = [(float(line["step"]), float(line["loss"])) for line in run.lines]
            key = tuple(y for _, y in points[:20])
            if key in seen:  # a stage that rows share is drawn once
                continue
            seen.add(key)
            line = thinned(smoothed(points))
            name = result.row.name if first else None
            axes.plot(
                *zip(*line, strict=True), color=colour(results, result), linewidth=1.3, alpha=0.85, label=name
            )
            first = False
    axes.set_xlabel("step", color=INK, fontsize=9)
    axes.set_ylabel("loss", color=INK, fontsize=9)
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return _save(figure, folder / f"loss_{stage.replace(' ', '_')}.png")
