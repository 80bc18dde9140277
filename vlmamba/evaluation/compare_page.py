"""A comparison as one self-contained page: differences with their intervals, and the answers that changed."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

from vlmamba.evaluation.compare import (
    Comparison,
    Flip,
    headline_difference,
    points,
)
from vlmamba.evaluation.gallery import accepted
from vlmamba.evaluation.tables import figure, percent
from vlmamba.pages import write_page


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
        tasks=[
            (
                task,
                max(
                    (abs(edge) for row in task.rows for edge in (row.low, row.high, row.difference)),
                    default=0,
                )
                or 1,
                [
                    (name, len(found), _drawn(found, flips, seed))
                    for name, found in (
                        ("became right", [f for f in task.flips if f.change > 0]),
                        ("became wrong", [f for f in task.flips if f.change < 0]),
                    )
                ],
            )
            for task in comparison.tasks
        ],
        accepted=accepted,
        figure=figure,
        headline_difference=headline_difference,
        percent=percent,
        points=points,
    )


def _drawn(flips: Sequence[Flip], count: int, seed: int) -> Sequence[Flip]:
    """At most so many, at random, in their order."""
    if len(flips) <= count:
        return flips
    return [flips[at] for at in sorted(random.Random(seed).sample(range(len(flips)), count))]
