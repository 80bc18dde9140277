"""A comparison as one self-contained page: differences with their intervals, and the answers that changed."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlmamba.evaluation.compare import (
    Comparison,
    Difference,
    Flip,
    TaskComparison,
    headline_difference,
    points,
)
from vlmamba.evaluation.gallery import accepted
from vlmamba.evaluation.tables import figure, percent
from vlmamba.pages import embedded, write_page


def write_comparison(path: str | Path, comparison: Comparison, *, flips: int = 40, seed: int = 0) -> Path:
    """Write the page.

    Args:
        path: The HTML file.
        comparison: From `vlmamba.evaluation.compare.compare_runs`.
        flips: Changed answers to show of each task and direction, drawn at random where there are more.
        seed: Of the draw.

    Returns:
        The path.
    """
    return write_page(
        path,
        "compare.html",
        title=f"{', '.join(comparison.runs[1:])} against {comparison.runs[0]}",
        left_out=comparison.left_out,
        tasks=[_task(task, flips, seed) for task in comparison.tasks],
    )


def _task(task: TaskComparison, flips: int, seed: int) -> dict[str, Any]:
    reach = max((abs(edge) for row in task.rows for edge in (row.low, row.high, row.difference)), default=0.0)
    return {
        "name": task.task,
        "other": task.other,
        "headline": task.headline,
        "figures": [figure(value, task.unit) for value in (task.first_value, task.other_value)],
        "difference": headline_difference(task),
        "rows": [_row(row, max(reach, 1e-9)) for row in task.rows],
        "settings": task.settings,
        "changed": task.changed,
        "groups": [
            _flips("became right", [f for f in task.flips if f.change > 0], flips, seed),
            _flips("became wrong", [f for f in task.flips if f.change < 0], flips, seed),
        ],
    }


def _row(row: Difference, reach: float) -> dict[str, Any]:
    def place(share: float) -> float:
        return round(50 + 50 * share / reach, 2)

    return {
        "name": row.name,
        "questions": row.questions,
        "first": percent(row.first),
        "other": percent(row.other),
        "difference": points(row.difference),
        "interval": f"{points(row.low)} to {points(row.high)}",
        "sure": "up" if row.low > 0 else ("down" if row.high < 0 else ""),
        "gained": row.gained,
        "lost": row.lost,
        "bar": {"low": place(row.low), "high": place(row.high), "at": place(row.difference)},
    }


def _flips(name: str, flips: Sequence[Flip], count: int, seed: int) -> dict[str, Any]:
    shown = list(flips)
    if len(shown) > count:
        chosen = sorted(random.Random(seed).sample(range(len(shown)), count))
        shown = [shown[at] for at in chosen]
    return {
        "name": name,
        "total": len(flips),
        "cards": [
            {
                "images": [embedded(image) for image in flip.sample.images],
                "question": flip.sample.text,
                "expected": accepted(flip.sample.answer),
                "first": flip.first,
                "other": flip.other,
                "kind": flip.sample.category,
                "id": flip.sample.question_id,
                "change": f"{flip.change:+.2g}" if abs(flip.change) < 1 else "",
                "gain": flip.change > 0,
            }
            for flip in shown
        ],
    }
