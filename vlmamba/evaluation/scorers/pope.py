"""POPE: is there an object or not.

Follows RUCAIBox/POPE ``evaluate.py`` and LLaVA's ``llava/eval/eval_pope.py`` (``eval_pope``), which is the same:
of the text before the first full stop, commas deleted, split at single spaces, a word ``No``, ``not`` or ``no``
means no and *everything else yes* ("NO", "Nope", "no!", "There isn't any", nothing at all). Positive is yes. Where
the script divides by zero (nothing said yes), figures are 0 here.

What papers print differs: LLaVA the unweighted mean of three F1, TinyLLaVA of three accuracies, Prismatic and Cobra
accuracy from likelihoods (`pope_likelihood`); all are given, by name. Other harnesses (`style`):

* ``"lmms"``: lmms-eval compares the stripped, lower-cased text with "yes" and "no"; other answers are neither true nor
  false positives and raise recall; its yes-ratio is that of the labels.
* ``"vlmevalkit"``: "yes" or "no" as a word, and not both; the rest is unknown and wrong, and counts as not found in
  recall. Its "Overall" is F1.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

from vlmamba.evaluation.scorers.base import Headline, Score, add, rate, rates
from vlmamba.evaluation.scorers.checks import (
    check_ids,
    check_lengths,
    check_numbers,
    check_one_of,
    check_style,
    check_texts,
)
from vlmamba.evaluation.scorers.ranking import BinaryCounts, auroc, average_precision
from vlmamba.evaluation.scorers.yes_no import read_yes_no_vlmevalkit

STYLES = ("official", "lmms", "vlmevalkit")


def pope_answer(text: str, style: str = "official") -> str | None:
    """What a text is read as: "yes", "no", or None (which the official rule never gives)."""
    check_style(style, STYLES)
    if style == "lmms":
        text = text.lower().strip()
        return text if text in ("yes", "no") else None
    if style == "vlmevalkit":
        return read_yes_no_vlmevalkit(text)
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if "No" in words or "not" in words or "no" in words else "yes"


def pope(
    predictions: Sequence[str | None],
    labels: Sequence[str],
    splits: Sequence[str] | None = None,
    *,
    style: str = "official",
    ids: Sequence[Hashable] | None = None,
) -> Score:
    """POPE's figures for each split, their means, and over all questions.

    Args:
        predictions: What was answered; None where there is no answer, which is wrong and neither yes nor no.
        labels: "yes" or "no" for each question, in any case.
        splits: ``random``, ``popular`` or ``adversarial`` for each question; left out, all are one split.
        style: Whose reading of answers; see the head of this file.
        ids: For messages, and to find duplicates within a split (in POPE's files ids start again in each).

    Returns:
        ``splits`` and ``pooled``: ``tp fp tn fn unread accuracy precision recall f1 yes_ratio`` (shares);
        ``mean``: ``f1`` and ``accuracy``, unweighted over splits. ``official`` is ``splits`` under the names the script
        prints. The headline is the mean F1.

    Raises:
        DataError: Lists of different length, no question, duplicate ids, other labels.
        ConfigError: Unknown style.
    """
    check_style(style, STYLES)
    check_lengths(predictions=predictions, labels=labels, splits=splits, ids=ids)
    names = ["all"] * len(labels) if splits is None else list(splits)
    check_ids(None if ids is None else list(zip(names, ids, strict=True)))
    check_texts(predictions, ids)
    truth = [label.lower() if isinstance(label, str) else label for label in labels]
    check_one_of("label", truth, ("yes", "no"), ids)
    parsed = [None if p is None else pope_answer(p, style) for p in predictions]
    correct = [answer == label for answer, label in zip(parsed, truth, strict=True)]
    tables = {
        name: _figures([(a, t) for a, t, n in zip(parsed, truth, names, strict=True) if n == name], style)
        for name in sorted(set(names))
    }
    mean = {key: add(t[key] for t in tables.values()) / len(tables) for key in ("f1", "accuracy")}
    metrics = {
        "overall": rate(sum(correct), len(correct)),
        "categories": {} if splits is None else rates(correct, names),
        "missing": sum(p is None for p in predictions),
        "splits": tables,
        "mean": mean,
        "pooled": _figures(list(zip(parsed, truth, strict=True)), style),
        "official": {
            name: {_PRINTED[k]: v for k, v in t.items() if k in _PRINTED} for name, t in tables.items()
        },
        "headline": {"name": "POPE mean F1", "value": 100 * mean["f1"], "unit": "%"},
        "style": style,
    }
    unparsable = sum(a is None and p is not None for a, p in zip(parsed, predictions, strict=True))
    return Score(metrics, correct, unparsable, parsed, headline=_mean_f1(parsed, truth, names, style))


def _mean_f1(
    parsed: Sequence[str | None], truth: Sequence[str], names: Sequence[str], style: str
) -> Headline:
    """The mean F1 from four counts of each split."""
    first = {name: 4 * at for at, name in enumerate(sorted(set(names)))}
    rows = []
    for answer, label, name in zip(parsed, truth, names, strict=True):
        row = [0.0] * (4 * len(first))
        row[first[name] : first[name] + 4] = _counts([(answer, label)], style)
        rows.append(row)
    return Headline(rows, "f1")


_PRINTED = {
    "tp": "TP",
    "fp": "FP",
    "tn": "TN",
    "fn": "FN",
    "accuracy": "Accuracy",
    "precision": "Precision",
    "recall": "Recall",
    "f1": "F1 score",
    "yes_ratio": "Yes ratio",
}


def _counts(pairs: Sequence[tuple[str | None, str]], style: str) -> BinaryCounts:
    tp = sum(answer == "yes" == label for answer, label in pairs)
    fp = sum(answer == "yes" != label for answer, label in pairs)
    tn = sum(answer == "no" == label for answer, label in pairs)
    unread_yes = sum(answer is None and label == "yes" for answer, label in pairs)
    said_no = sum(answer == "no" != label for answer, label in pairs)
    return BinaryCounts(tp, fp, tn, said_no if style == "lmms" else said_no + unread_yes)


def _figures(pairs: Sequence[tuple[str | None, str]], style: str) -> dict[str, Any]:
    """Figures of (read answer, label) pairs."""
    counts = _counts(pairs, style)
    lmms = style == "lmms"
    yes = sum(label == "yes" for _, label in pairs) if lmms else counts.tp + counts.fp
    return {
        **counts._asdict(),
        "unread": sum(answer is None for answer, _ in pairs),
        "accuracy": (counts.tp + counts.tn) / len(pairs),
        "precision": counts.precision,
        "recall": counts.recall,
        "f1": counts.f1,
        "yes_ratio": yes / len(pairs),
    }


def pope_likelihood(
    scores: Sequence[float | None],
    labels: Sequence[str],
    splits: Sequence[str] | None = None,
    *,
    ids: Sequence[Hashable] | None = None,
) -> Score:
    """POPE from likelihoods, as TRI-ML/vlm-evaluation ``harnesses/pope.py`` scores it (Prismatic, Cobra).

    Args:
        scores: P(Yes) / (P(Yes) + P(No)) of each question; None where it was not asked, which is wrong and leaves
            the areas undefined. A tie is yes.
        labels: "yes" or "no" for each question, in any case.
        splits: As in `pope`.
        ids: As in `pope`.

    Returns:
        ``splits``: ``accuracy``, ``auroc`` and ``average_precision`` of each; ``official``: ``final-Accuracy``, the
        unweighted mean of the splits, and ``final-AUCROC`` and ``final-AUCPR`` over all questions. The headline is the
        mean accuracy.

    Raises:
        DataError: Lists of different length, no question, duplicate ids, other labels, a score outside 0..1.
    """
    check_lengths(scores=scores, labels=labels, splits=splits, ids=ids)
    names = ["all"] * len(labels) if splits is None else list(splits)
    check_ids(None if ids is None else list(zip(names, ids, strict=True)))
    check_numbers("score", scores, ids, low=0.0, high=1.0)
    truth = [label.lower() if isinstance(label, str) else label for label in labels]
    check_one_of("label", truth, ("yes", "no"), ids)
    parsed = [None if s is None else "yes" if s >= 1 - s else "no" for s in scores]
    correct = [answer == label for answer, label in zip(parsed, truth, strict=True)]
    tables = {
        name: _areas(
            [(s, t, c) for s, t, c, n in zip(scores, truth, correct, names, strict=True) if n == name]
        )
        for name in sorted(set(names))
    }
    pooled = _areas(list(zip(scores, truth, correct, strict=True)))
    mean = add(t["accuracy"] for t in tables.values()) / len(tables)
    metrics = {
        "overall": rate(sum(correct), len(correct)),
        "categories": {} if splits is None else rates(correct, names),
        "missing": sum(s is None for s in scores),
        "splits": tables,
        "mean": {"accuracy": mean},
        "pooled": pooled,
        "official": {
            "final-Accuracy": mean,
            "final-AUCROC": pooled["auroc"],
            "final-AUCPR": pooled["average_precision"],
        },
        "headline": {"name": "POPE mean accuracy (likelihood)", "value": 100 * mean, "unit": "%"},
    }
    return Score(metrics, correct, 0, parsed, headline=_mean_accuracy(correct, names))


def _mean_accuracy(correct: Sequence[bool], names: Sequence[str]) -> Headline:
    """The mean accuracy from right and asked of each split."""
    splits = sorted(set(names))
    return Headline(
        [
            [float(flag) for split in splits for flag in (ok and name == split, name == split)]
            for ok, name in zip(correct, names, strict=True)
        ]
    )


def _areas(rows: Sequence[tuple[float | None, str, bool]]) -> dict[str, Any]:
    scores = [score for score, _, _ in rows if score is not None]
    truth = [label == "yes" for _, label, _ in rows]
    complete = len(scores) == len(rows)
    return {
        "accuracy": sum(ok for _, _, ok in rows) / len(rows),
        "auroc": auroc(scores, truth) if complete else None,
        "average_precision": average_precision(scores, truth) if complete else None,
    }
