"""What every scorer returns, and shares of right answers with their intervals."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

Z95 = 1.959963984540054
"""The 97.5 % point of the standard normal distribution."""


class Score(NamedTuple):
    """The outcome of scoring one task.

    Attributes:
        metrics: JSON-able; ``metrics["overall"]`` and each of ``metrics["categories"].values()`` are made by
            `rate`.
        correct: One verdict for each question, in the order given.
        unparsable: Answers from which no answer could be read; they count as wrong.
    """

    metrics: dict[str, Any]
    correct: list[bool]
    unparsable: int


def rate(correct: int, total: int) -> dict[str, Any]:
    """A share with its 95 % interval: ``{"accuracy", "correct", "total", "low", "high"}``.

    Shares lie in 0..1; of nothing they are None.
    """
    low, high = wilson_interval(correct, total) if total else (None, None)
    return {
        "accuracy": correct / total if total else None,
        "correct": correct,
        "total": total,
        "low": low,
        "high": high,
    }


def wilson_interval(correct: int, total: int, z: float = Z95) -> tuple[float, float]:
    """Wilson's score interval for a binomial share (E. B. Wilson, JASA 22, 1927, 209-212).

    Args:
        correct: Successes.
        total: Trials, at least one.
        z: Normal quantile; the default gives a 95 % interval.

    Returns:
        Lower and upper end, within 0..1.
    """
    if not 0 <= correct <= total or total < 1:
        raise ValueError(f"{correct} of {total} is not a share")
    share = correct / total
    scale = 1 + z * z / total
    centre = (share + z * z / (2 * total)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    low = 0.0 if correct == 0 else max(0.0, centre - half)
    high = 1.0 if correct == total else min(1.0, centre + half)
    return low, high
