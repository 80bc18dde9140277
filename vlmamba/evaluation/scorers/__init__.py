"""Scorers: pure functions over plain Python values, one benchmark a file. No torch, no files.

Each follows an official script, named at the head of its file with the function, and says where other harnesses
differ; what differs is to be had through ``style``. All return a `Score`: metrics that JSON can hold, one verdict
for each question (which paired comparisons need), and what each answer was read as. A question without an answer
(None) is counted, never dropped.
"""

from __future__ import annotations

from vlmamba.evaluation.scorers.base import Headline, Score, rate, rates, wilson_interval
from vlmamba.evaluation.scorers.exact_match import exact_match, is_match, normalise
from vlmamba.evaluation.scorers.gqa import gqa, gqa_prediction
from vlmamba.evaluation.scorers.hateful_memes import hateful_memes
from vlmamba.evaluation.scorers.mm_vet import mm_vet, mm_vet_submission
from vlmamba.evaluation.scorers.mmbench import mmbench, mmbench_letter
from vlmamba.evaluation.scorers.mme import mme, mme_answer
from vlmamba.evaluation.scorers.pope import pope, pope_answer, pope_likelihood
from vlmamba.evaluation.scorers.ranking import auroc, average_precision
from vlmamba.evaluation.scorers.sarcasm import sarcasm
from vlmamba.evaluation.scorers.scienceqa import scienceqa, scienceqa_letter
from vlmamba.evaluation.scorers.vqa import textvqa, textvqa_question, vizwiz, vqav2
from vlmamba.evaluation.scorers.vqa_text import normalise_m4c, normalise_vizwiz, normalise_vqa
from vlmamba.evaluation.scorers.yes_no import read_yes_no

__all__ = [
    "Headline",
    "Score",
    "auroc",
    "average_precision",
    "exact_match",
    "gqa",
    "gqa_prediction",
    "hateful_memes",
    "is_match",
    "mm_vet",
    "mm_vet_submission",
    "mmbench",
    "mmbench_letter",
    "mme",
    "mme_answer",
    "normalise",
    "normalise_m4c",
    "normalise_vizwiz",
    "normalise_vqa",
    "pope",
    "pope_answer",
    "pope_likelihood",
    "rate",
    "rates",
    "read_yes_no",
    "sarcasm",
    "scienceqa",
    "scienceqa_letter",
    "textvqa",
    "textvqa_question",
    "vizwiz",
    "vqav2",
    "wilson_interval",
]
