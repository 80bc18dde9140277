"""Scorers: pure functions over plain Python values, one metric family a file. No torch, no files."""

from __future__ import annotations

from vlmamba.evaluation.scorers.base import Score, rate, wilson_interval
from vlmamba.evaluation.scorers.exact_match import exact_match, is_match, normalise

__all__ = ["Score", "exact_match", "is_match", "normalise", "rate", "wilson_interval"]
