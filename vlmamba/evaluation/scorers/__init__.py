"""Scorers: pure functions over plain Python values, one benchmark a file. No torch, no files.

Each follows an official script, named at the head of its file with the function, and says where other harnesses
differ; what differs is to be had through ``style``. All return a `Score`: metrics that JSON can hold, one verdict
for each question (which paired comparisons need), and what each answer was read as. A question without an answer
(None) is counted, never dropped.
"""

from __future__ import annotations

from vlmamba.evaluation.scorers.base import Score, rate, rates, wilson_interval
from vlmamba.evaluation.scorers.exact_match import exact_match, is_match, normalise
from vlmamba.evaluation.scorers.ranking import auroc, average_precision
from vlmamba.evaluation.scorers.vqa import textvqa, textvqa_question, vizwiz, vqav2
from vlmamba.evaluation.scorers.vqa_text import normalise_m4c, normalise_vizwiz, normalise_vqa

__all__ = [
    "Score",
    "auroc",
    "average_precision",
    "exact_match",
    "is_match",
    "normalise",
    "normalise_m4c",
    "normalise_vizwiz",
    "normalise_vqa",
    "rate",
    "rates",
    "textvqa",
    "textvqa_question",
    "vizwiz",
    "vqav2",
    "wilson_interval",
]
