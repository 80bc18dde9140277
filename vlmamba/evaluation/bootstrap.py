"""Paired bootstrap intervals: questions are drawn again, with what both runs earned on each.

B. Efron and R. J. Tibshirani, An Introduction to the Bootstrap, 1993, ch. 10 and 13.

Questions enter through sums, and what one adds takes few values; so the number of times that each value is drawn is
drawn at once (a multinomial), which is the same as drawing questions one by one, and fast for any number of them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence

import numpy as np

from vlmamba.evaluation.scorers.base import FORMULAS

RESAMPLES = 10_000
LOW, HIGH = 2.5, 97.5
"""Percentiles of the interval."""


def difference_interval(
    first: Sequence[Sequence[float]],
    other: Sequence[Sequence[float]],
    formula: str = "share",
    groups: Sequence[Hashable] = (),
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[float, float]:
    """The 95 % percentile interval of the difference of two runs' figures.

    Args:
        first: What each question adds to one run's sums.
        other: The same of the other run, for the same questions in the same order.
        formula: From sums to the figure (`vlmamba.evaluation.scorers.base.FORMULAS`).
        groups: Questions with the same value are drawn together; each by itself when empty.
        resamples: How many.
        seed: Of the draws.
    """
    value, width = FORMULAS[formula], len(first[0])
    totals = _resample(np.concatenate([first, other], axis=1), groups, resamples, seed)
    pairs = [(value(sums[:width]), value(sums[width:])) for sums in totals.tolist()]
    found = [b - a for a, b in pairs if a is not None and b is not None]
    low, high = np.percentile(found, [LOW, HIGH])
    return float(low), float(high)


def _resample(rows: np.ndarray, groups: Sequence[Hashable], resamples: int, seed: int) -> np.ndarray:
    """Sums over resampled questions: (questions, columns) to (resamples, columns)."""
    if groups:
        place: dict[Hashable, int] = defaultdict(lambda: len(place))
        sums = np.zeros((len(set(groups)), rows.shape[1]))
        np.add.at(sums, [place[group] for group in groups], rows)
        rows = sums
    values, times = np.unique(np.round(rows, 9), axis=0, return_counts=True)
    draws = np.random.default_rng(seed).multinomial(times.sum(), times / times.sum(), size=resamples)
    return np.asarray(draws @ values)
