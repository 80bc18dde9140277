"""Paired bootstrap intervals: questions are drawn again, with what both runs earned on each.

B. Efron and R. J. Tibshirani, An Introduction to the Bootstrap, 1993, ch. 10 and 13.

Questions enter through sums, and what one adds takes few values; so the number of times that each value is drawn is
drawn at once (a multinomial), which is the same as drawing questions one by one, and fast for any number of them.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence

import numpy as np

from vlmamba.evaluation.scorers import Headline, Score

RESAMPLES = 10_000
LOW, HIGH = 2.5, 97.5
"""Percentiles of the interval."""


def paired_interval(
    differences: Sequence[float],
    groups: Sequence[Hashable] = (),
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[float, float]:
    """The 95 % percentile interval of a mean difference.

    Args:
        differences: Of each question.
        groups: Questions with the same value are drawn together; each by itself when empty.
        resamples: How many.
        seed: Of the draws.
    """
    totals = _resample(np.array([(d, 1.0) for d in differences]), groups, resamples, seed)
    low, high = np.percentile(totals[:, 0] / totals[:, 1], [LOW, HIGH])
    return float(low), float(high)


def headline_interval(
    first: Score,
    other: Score,
    groups: Sequence[Hashable] = (),
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[float, float] | None:
    """The 95 % percentile interval of the difference of two runs' headlines, in the headline's unit.

    Args:
        first: One run's score.
        other: The other's, on the same questions in the same order.
        groups: As in `paired_interval`.
        resamples: How many.
        seed: Of the draws.

    Returns:
        None where the headline is no function of sums over questions (an area under a curve), or has no value.
    """
    parts = [_parts(score) for score in (first, other)]
    if None in parts:
        return None
    (rows, value), (other_rows, other_value) = (part for part in parts if part is not None)
    totals = _resample(np.concatenate([rows, other_rows], axis=1), groups, resamples, seed)
    width = rows.shape[1]
    pairs = [(value(sums[:width]), other_value(sums[width:])) for sums in totals.tolist()]
    found = [b - a for a, b in pairs if a is not None and b is not None]
    low, high = np.percentile(found, [LOW, HIGH])
    return float(low), float(high)


def _parts(score: Score) -> tuple[np.ndarray, Callable[[Sequence[float]], float | None]] | None:
    """What each question adds, and the function from sums to the headline, if that gives the headline."""
    stated = score.metrics.get("headline", {}).get("value")
    if not score.correct or ("headline" in score.metrics and stated is None):
        return None
    headline = score.headline or Headline.share(score.correct)
    rows = np.array(headline.rows, dtype=float)
    value = headline.value(rows.sum(axis=0).tolist())
    if stated is not None and (value is None or not math.isclose(value, stated, rel_tol=1e-9, abs_tol=1e-9)):
        return None
    return rows, headline.value


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
