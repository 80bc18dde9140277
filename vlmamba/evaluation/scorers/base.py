"""What every scorer returns, and shares of right answers with their intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, NamedTuple

from vlmamba.evaluation.scorers.ranking import BinaryCounts

Z95 = 1.959963984540054
"""The 97.5 % point of the standard normal distribution."""


def add(values: Iterable[float]) -> float:
    """Sum from left to right, rounding at each step.

    Official scripts add so. Python's own ``sum`` compensates from 3.12 on, and then differs in the last digit.
    """
    total = 0.0
    for value in values:
        total += value
    return total


def _split(sums: Sequence[float], size: int) -> list[Sequence[float]]:
    return [sums[at : at + size] for at in range(0, len(sums), size)]


def _share(sums: Sequence[float]) -> float | None:
    splits = _split(sums, 2)
    return 100 * add(right / n for right, n in splits) / len(splits) if all(n for _, n in splits) else None


def _f1(sums: Sequence[float]) -> float:
    splits = _split(sums, 4)
    return 100 * add(BinaryCounts(*counts).f1 for counts in splits) / len(splits)


def _points(sums: Sequence[float]) -> float | None:
    subtasks = _split(sums, 3)
    if not all(n for _, _, n in subtasks):
        return None
    return add(100 * right / (2 * n) + 100 * both / n for right, both, n in subtasks)


FORMULAS: dict[str, Callable[[Sequence[float]], float | None]] = {
    "share": _share,
    "f1": _f1,
    "points": _points,
}
"""From sums over questions to a headline in its unit, None where it is not defined.

``share``: the mean over splits of 100 times the first of two sums over the second. ``f1``: the mean over splits of 100
times the F1 of four counts (`BinaryCounts`). ``points``: MME's, from questions right, pictures with both right, and
pictures of each subtask.
"""


class Headline(NamedTuple):
    """A headline as a function of sums over questions, so that it can be had from any sample of them.

    Attributes:
        rows: What each question adds to the sums; all of the same length.
        formula: Which of `FORMULAS` makes the headline of the sums.
    """

    rows: Sequence[Sequence[float]]
    formula: str = "share"

    def value(self) -> float | None:
        """Of all questions."""
        return FORMULAS[self.formula]([add(column) for column in zip(*self.rows, strict=True)])

    @classmethod
    def share(cls, credits_: Sequence[float], inside: Sequence[bool] | None = None) -> Headline:
        """Mean credit in percent, over all questions or those `inside`."""
        counted = [True] * len(credits_) if inside is None else inside
        rows = [(float(c), 1.0) if flag else (0.0, 0.0) for c, flag in zip(credits_, counted, strict=True)]
        return cls(rows)


class Score(NamedTuple):
    """The outcome of scoring one task.

    Attributes:
        metrics: JSON-able; ``metrics["overall"]`` and each of ``metrics["categories"].values()`` are made by
            `rate`. Benchmark scorers add ``"headline"`` (the figure papers print: name, value, unit),
            ``"official"`` (what the official script prints, on its scale and with its rounding),
            ``"missing"`` (questions without an answer) and tables of their own.
        correct: One verdict for each question, in the order given: true or false, or a credit in 0..1 where
            the benchmark gives partial credit.
        unparsable: Answers from which no answer could be read.
        parsed: What each answer was read as, None where nothing was; empty when the scorer reads nothing.
        groups: Questions with the same value are resampled together (the two questions on a picture of MME,
            the rotations of a question of MMBench); empty when every question stands alone.
        headline: How the headline comes of the questions, where it is not the mean of `correct` in percent.
    """

    metrics: dict[str, Any]
    correct: Sequence[float]
    unparsable: int
    parsed: Sequence[str | None] = ()
    groups: Sequence[Hashable] = ()
    headline: Headline | None = None


def rate(correct: float, total: int) -> dict[str, Any]:
    """A share with its 95 % interval: ``{"accuracy", "correct", "total", "low", "high"}``.

    Shares lie in 0..1; of nothing they are None. `correct` may be a sum of partial credits: credits vary less
    than right and wrong with the same mean, so the interval is then on the wide side.
    """
    low, high = wilson_interval(min(correct, total), total) if total else (None, None)
    return {
        "accuracy": correct / total if total else None,
        "correct": correct,
        "total": total,
        "low": low,
        "high": high,
    }


def rates(correct: Sequence[float], names: Sequence[Hashable]) -> dict[str, dict[str, Any]]:
    """`rate` of each kind, names in alphabetical order; numbers count as names and sort by value."""
    kinds: dict[Any, list[float]] = {}
    for credit, name in zip(correct, names, strict=True):
        kinds.setdefault(name, []).append(credit)
    numbers = all(isinstance(name, int) for name in kinds)
    order = sorted(kinds) if numbers else sorted(kinds, key=str)
    return {str(name): rate(_count(kinds[name]), len(kinds[name])) for name in order}


def _count(credits_: Sequence[float]) -> float:
    if all(isinstance(c, bool) for c in credits_):
        return sum(credits_)
    return add(credits_)


def wilson_interval(correct: float, total: int, z: float = Z95) -> tuple[float, float]:
    """Wilson's score interval for a binomial share (E. B. Wilson, JASA 22, 1927, 209-212).

    Args:
        correct: Successes; a fraction where credit is partial.
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
