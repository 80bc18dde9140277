"""Means over seeds and questions, with intervals that know of both.

A figure varies because another seed would have trained another model, and because other questions might have been
asked. With credits x[s, q] of seed s on question q, the mean's standard error is sqrt(a + b): a is the variance of the
seeds' means over their number, b the variance of the questions' means (over pictures, since questions about one
picture stand or fall together) over theirs (E. Miller, Adding Error Bars to Evals, arXiv 2411.00640, sections 2 to
4). Degrees of freedom are Satterthwaite's (1946): few seeds make wide intervals. Differences of two rows are
paired by question; seeds are independent, or paired too where both rows measure the same trained models.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlmamba.errors import require

LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean (or a difference of two), in the unit of what it was made of.

    Attributes:
        low, high: The 95 % interval; None where there is nothing to estimate it from.
        seed_error, question_error: Parts of the standard error.
        p: Of the hypothesis that it is zero; None where there is no interval.
    """

    mean: float
    low: float | None
    high: float | None
    seed_error: float | None
    question_error: float | None
    p: float | None


def estimate(
    values: Sequence[float],
    credits_: Sequence[Sequence[float]] = (),
    groups: Sequence[Hashable] = (),
) -> Estimate:
    """Mean of a row.

    Args:
        values: The figure of each seed.
        credits_: Credit of each question for each seed, where the figure is their mean or that in percent; where it
            is not, the interval knows of seeds only.
        groups: Questions of equal value belong together; every one alone when empty.
    """
    return _combine([np.asarray(values, float)], _question_means(values, credits_), groups)


def difference(
    values: Sequence[float],
    base: Sequence[float],
    credits_: Sequence[Sequence[float]] = (),
    base_credits: Sequence[Sequence[float]] = (),
    groups: Sequence[Hashable] = (),
    *,
    same_models: bool = False,
) -> Estimate:
    """Mean of a row less that of another; see `estimate`.

    Args:
        values, base: The figures of each seed.
        credits_, base_credits: Of each question for each seed.
        groups: Questions of equal value belong together.
        same_models: Both rows have measured the same trained models, seed by seed, so they are paired by seed, too.
    """
    own, other = _question_means(values, credits_), _question_means(base, base_credits)
    paired = None if own is None or other is None or own.shape != other.shape else own - other
    seeds = [np.asarray(values, float), np.asarray(base, float)]
    return _combine([seeds[0] - seeds[1]] if same_models else seeds, paired, groups)


def holm(p: Sequence[float | None], level: float = 1 - LEVEL) -> list[bool]:
    """Which hypotheses are rejected when all of them together may err with a probability of `level` (Holm 1979)."""
    known = sorted((value, at) for at, value in enumerate(p) if value is not None)
    rejected = [False] * len(p)
    for rank, (value, at) in enumerate(known):
        if value > level / (len(known) - rank):
            break
        rejected[at] = True
    return rejected


def _question_means(values: Sequence[float], credits_: Sequence[Sequence[float]]) -> np.ndarray | None:
    """Mean credit of each question over seeds, in the unit of the values."""
    if not len(credits_) or not len(credits_[0]):
        return None
    table = np.asarray(credits_, float)
    # The figure is the mean credit, or that in percent. Where it is neither (F1, points), there is no credit of a
    # question to resample.
    for scale in (100.0, 1.0):
        if np.allclose(table.mean(1) * scale, values, rtol=0, atol=1e-4 * scale):  # papers' scorers round
            return table.mean(0) * scale
    return None


def _combine(
    seeds: Sequence[np.ndarray], questions: np.ndarray | None, groups: Sequence[Hashable]
) -> Estimate:
    stats: Any = require("scipy.stats", extra="eval", feature="intervals of an ablation table")
    mean = float(seeds[0].mean() - (seeds[1].mean() if len(seeds) > 1 else 0.0))
    parts: list[tuple[float, float]] = []  # variance of the mean, degrees of freedom
    for values in seeds:
        if len(values) > 1:
            parts.append((float(values.var(ddof=1)) / len(values), len(values) - 1.0))
    seed_error = float(np.sqrt(sum(v for v, _ in parts))) if parts else None
    question_error = None
    if questions is not None:
        variance, count = _clustered(questions, groups)
        if count > 1:
            question_error = float(np.sqrt(variance))
            parts.append((variance, count - 1.0))
    total = sum(v for v, _ in parts)
    if not parts:
        return Estimate(mean, None, None, seed_error, question_error, None)
    if total == 0:
        return Estimate(mean, mean, mean, seed_error, question_error, float(mean == 0))
    freedom = total**2 / sum(v**2 / f for v, f in parts if v > 0)
    error = float(np.sqrt(total))
    reach = float(stats.t.ppf(0.5 + LEVEL / 2, freedom)) * error
    p = float(2 * stats.t.sf(abs(mean) / error, freedom))
    return Estimate(mean, mean - reach, mean + reach, seed_error, question_error, p)


def _clustered(questions: np.ndarray, groups: Sequence[Hashable]) -> tuple[float, int]:
    """Variance of the mean over questions that come in groups, and the number of groups."""
    keys = list(groups) if len(groups) else list(range(len(questions)))
    index: dict[Hashable, int] = {}
    at = np.array([index.setdefault(key, len(index)) for key in keys])
    sums = np.bincount(at, weights=questions - questions.mean())
    count = len(index)
    if count < 2:
        return 0.0, count
    return float((sums**2).sum() / len(questions) ** 2 * count / (count - 1)), count
