"""Figures of two-way decisions: counts and what is made of them, area under the ROC curve, average precision."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple


class BinaryCounts(NamedTuple):
    """A table of predicted and true, positive and negative.

    `f1`, `precision` and `recall` are 0 where their denominator is: official scripts either do the same or divide
    by zero.
    """

    tp: float
    fp: float
    tn: float
    fn: float

    @property
    def precision(self) -> float:
        """True positives among those predicted positive."""
        return self.tp / (self.tp + self.fp) if self.tp + self.fp else 0.0

    @property
    def recall(self) -> float:
        """True positives among those that are positive."""
        return self.tp / (self.tp + self.fn) if self.tp + self.fn else 0.0

    @property
    def f1(self) -> float:
        """Harmonic mean of precision and recall."""
        both = self.precision + self.recall
        return 2 * self.precision * self.recall / both if both else 0.0


def binary_counts(predicted: Sequence[Any], labels: Sequence[Any]) -> BinaryCounts:
    """Count decisions; anything true is positive."""
    table = [[0, 0], [0, 0]]
    for guess, label in zip(predicted, labels, strict=True):
        table[bool(label)][bool(guess)] += 1
    return BinaryCounts(tp=table[1][1], fp=table[0][1], tn=table[0][0], fn=table[1][0])


def auroc(scores: Sequence[float], labels: Sequence[Any]) -> float | None:
    """Area under the ROC curve: the chance that a positive outranks a negative, ties counting half.

    Exact: twice the area is a whole number, divided once. None with one class only, where it is not defined.
    """
    positives = sum(bool(label) for label in labels)
    negatives = len(labels) - positives
    if not positives or not negatives:
        return None
    twice, below = 0, 0
    for up, down in _ties(scores, labels, reverse=False):
        twice += up * (2 * below + down)
        below += down
    return twice / (2 * positives * negatives)


def average_precision(scores: Sequence[float], labels: Sequence[Any]) -> float | None:
    """Mean of the precision at each threshold, weighted with the gain in recall (no interpolation).

    None without a positive label.
    """
    positives = sum(bool(label) for label in labels)
    if not positives:
        return None
    area, hits, seen = 0.0, 0, 0
    for up, down in _ties(scores, labels, reverse=True):
        hits += up
        seen += up + down
        area += up / positives * (hits / seen)
    return area


def _ties(scores: Sequence[float], labels: Sequence[Any], *, reverse: bool) -> Iterator[tuple[int, int]]:
    """Positives and negatives at each distinct score, in the order of the scores."""
    ranked = sorted(zip(scores, labels, strict=True), key=lambda pair: pair[0], reverse=reverse)
    for _, tied in groupby(ranked, key=lambda pair: pair[0]):
        flags = [bool(label) for _, label in tied]
        yield sum(flags), len(flags) - sum(flags)
