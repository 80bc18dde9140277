"""Twitter sarcasm (Cai, Cai and Wan, ACL 2019): accuracy, precision, recall, F1.

Follows ``codes/main.py`` of headacheboy/data-of-multimodal-sarcasm-detection (``getScore``, ``getF1``): sarcastic
is a probability *above* 0.5, figures are of that class, and all three are 0 as soon as one denominator is. Later
papers print macro averages over both classes; they are given beside, under that name.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from vlmamba.evaluation.scorers.base import Headline, Score, rate
from vlmamba.evaluation.scorers.checks import check_ids, check_lengths, check_numbers, check_one_of
from vlmamba.evaluation.scorers.ranking import binary_counts


def sarcasm(
    scores: Sequence[float | None],
    labels: Sequence[int],
    *,
    threshold: float = 0.5,
    ids: Sequence[Hashable] | None = None,
) -> Score:
    """Accuracy, and precision, recall and F1, binary and macro.

    Args:
        scores: The probability of sarcasm, or 0 and 1; None where nothing was answered or read, which is wrong.
        labels: 1 for sarcastic, 0 for not (in the data set's files the *last* element of a line).
        threshold: Sarcastic is a score above it.
        ids: For messages, and to find duplicates.

    Returns:
        ``official``: ``accuracy``, ``precision``, ``recall``, ``f1`` of the sarcastic (shares), and
        ``macro_precision``, ``macro_recall``, ``macro_f1``. A tweet without score is a false negative if sarcastic;
        else it counts against accuracy and the other class's recall. The headline is the F1 in percent.

    Raises:
        DataError: Lists of different length, no tweet, duplicate ids, other labels, scores that are no numbers.
    """
    check_lengths(scores=scores, labels=labels, ids=ids)
    check_ids(ids)
    check_numbers("score", scores, ids)
    check_one_of("label", labels, (0, 1), ids)
    decisions = [None if s is None else s > threshold for s in scores]
    correct = [d is not None and d == bool(label) for d, label in zip(decisions, labels, strict=True)]
    positive = binary_counts([d is True for d in decisions], labels)
    negative = binary_counts([d is False for d in decisions], [not label for label in labels])
    classes = (positive, negative)
    official = {
        "accuracy": sum(correct) / len(correct),
        "precision": positive.precision,
        "recall": positive.recall,
        "f1": positive.f1,
        "macro_precision": sum(c.precision for c in classes) / 2,
        "macro_recall": sum(c.recall for c in classes) / 2,
        "macro_f1": sum(c.f1 for c in classes) / 2,
    }
    metrics = {
        "overall": rate(sum(correct), len(correct)),
        "categories": {
            name: rate(
                sum(ok for ok, label in zip(correct, labels, strict=True) if label == kind),
                labels.count(kind),
            )
            for name, kind in (("not sarcastic", 0), ("sarcastic", 1))
        },
        "missing": sum(s is None for s in scores),
        "counts": positive._asdict(),
        "official": official,
        "headline": {"name": "Sarcasm F1", "value": 100 * official["f1"], "unit": "%"},
    }
    rows = [binary_counts([d is True], [label]) for d, label in zip(decisions, labels, strict=True)]
    headline = Headline(rows, "f1")
    read = [None if d is None else str(int(d)) for d in decisions]
    return Score(metrics, correct, 0, read, headline=headline)
