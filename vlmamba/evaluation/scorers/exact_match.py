"""Normalised exact match.

The rule, for prediction and expected answer alike:

1. Unicode compatibility form (NFKC), so that full-width letters and digits are the plain ones;
2. case is folded, runs of white space become one space;
3. white space and the marks in `MARKS` are taken off both ends, again and again, but a full stop directly
   before a digit stays at the front (".5" is not "5");
4. the texts are equal.

Nothing inside an answer is touched, a sign or unit is part of it ("-5" and "5 %" are not "5"), articles stay,
and number words are not digits. Where a question has several accepted answers, one equal to the prediction
suffices. A prediction of which step 3 leaves nothing is unparsable and wrong.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Sequence

from vlmamba.evaluation.scorers.base import Score, rate

MARKS = ".,;:!?\"'`()[]{}<>*_~«»‹›“”„‟‘’‚‛…。，、！？：；"


def normalise(text: str) -> str:
    """A text in the form in which answers are compared; see the rule above."""
    text = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    text = text.rstrip(MARKS + " ")
    while text and text[0] in MARKS + " ":
        if text[0] == "." and text[1:2].isdigit():
            break
        text = text[1:]
    return text


def is_match(prediction: str, answer: str | Sequence[str]) -> bool:
    """Whether a prediction equals the answer, or one of several accepted answers."""
    given = normalise(prediction)
    accepted = [answer] if isinstance(answer, str) else answer
    return given != "" and any(given == normalise(a) for a in accepted)


def exact_match(
    predictions: Sequence[str | None],
    answers: Sequence[str | Sequence[str]],
    categories: Sequence[str] | None = None,
) -> Score:
    """Score answers by normalised exact match, overall and for each category.

    Args:
        predictions: What was answered; None where there is no answer, which counts as wrong.
        answers: The expected answer, or several accepted ones, for each question.
        categories: Kind of each question; without them there is the overall figure alone.

    Returns:
        Metrics ``{"overall": rate, "categories": {name: rate}}``, names in alphabetical order.

    Raises:
        ValueError: The lists differ in length.
    """
    lengths = {len(predictions), len(answers), len(predictions if categories is None else categories)}
    if len(lengths) > 1:
        raise ValueError(
            f"{len(predictions)} predictions, {len(answers)} answers and "
            f"{'no' if categories is None else len(categories)} categories do not belong together"
        )
    correct = [p is not None and is_match(p, a) for p, a in zip(predictions, answers, strict=True)]
    total = Counter(categories or ())
    right = Counter(c for c, ok in zip(categories or (), correct, strict=False) if ok)
    metrics = {
        "overall": rate(sum(correct), len(correct)),
        "categories": {name: rate(right[name], total[name]) for name in sorted(total)},
    }
    unparsable = sum(p is not None and normalise(p) == "" for p in predictions)
    return Score(metrics, correct, unparsable)
