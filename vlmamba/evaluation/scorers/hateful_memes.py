"""Hateful Memes: accuracy at a threshold, and area under the ROC curve.

The challenge's figures (D. Kiela et al., NeurIPS 2020; facebookresearch/mmf ``mmf/modules/metrics.py``, ``Accuracy``
and ``ROC_AUC``: the argmax of two classes, and scikit-learn's ``roc_auc_score``). The area needs a continuous score,
such as P(yes) / (P(yes) + P(no)); ties count half. With one class only it is not defined and None. The split belongs
to every figure: mmf's defaults are dev_unseen and test_unseen, papers mostly print dev_seen and test_seen.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from vlmamba.evaluation.scorers.base import Score, rate
from vlmamba.evaluation.scorers.checks import check_ids, check_lengths, check_numbers, check_one_of
from vlmamba.evaluation.scorers.ranking import auroc, binary_counts


def hateful_memes(
    scores: Sequence[float | None],
    labels: Sequence[int],
    *,
    predictions: Sequence[int | None] | None = None,
    threshold: float = 0.5,
    ids: Sequence[Hashable] | None = None,
) -> Score:
    """Accuracy and AUROC.

    Args:
        scores: How hateful each meme is, higher is more; None where there is no score, which is wrong.
        labels: 1 for hateful, 0 for not.
        predictions: 1, 0 or None for each meme, where the decision is another than the threshold's (read from
            generated text by `read_yes_no`); None is unparsable, and wrong.
        threshold: Hateful is a score *above* it.
        ids: For messages, and to find duplicates.

    Returns:
        ``official``: ``accuracy`` and ``auroc`` (shares); ``auroc_answered`` over the memes with a score where some
        have none, for then ``auroc`` is None. The headline is the AUROC in percent.

    Raises:
        DataError: Lists of different length, no meme, duplicate ids, other labels, scores that are no numbers.
    """
    check_lengths(scores=scores, labels=labels, predictions=predictions, ids=ids)
    check_ids(ids)
    check_numbers("score", scores, ids)
    check_one_of("label", labels, (0, 1), ids)
    if predictions is not None:
        check_one_of("prediction", predictions, (0, 1, None), ids)
        decisions = [None if p is None else bool(p) for p in predictions]
    else:
        decisions = [None if s is None else s > threshold for s in scores]
    correct = [d is not None and d == bool(label) for d, label in zip(decisions, labels, strict=True)]
    known = [(s, label) for s, label in zip(scores, labels, strict=True) if s is not None]
    area = auroc([s for s, _ in known], [label for _, label in known])
    complete = len(known) == len(scores)
    accuracy = sum(correct) / len(correct)
    counts = binary_counts([bool(d) for d in decisions], labels)
    metrics = {
        "overall": rate(sum(correct), len(correct)),
        "categories": {
            name: rate(
                sum(ok for ok, label in zip(correct, labels, strict=True) if label == kind),
                labels.count(kind),
            )
            for name, kind in (("hateful", 1), ("not hateful", 0))
        },
        "missing": sum(s is None for s in scores),
        "counts": counts._asdict(),
        "official": {
            "accuracy": accuracy,
            "auroc": area if complete else None,
            **({} if complete else {"auroc_answered": area}),
        },
        "threshold": None if predictions is not None else threshold,
        "headline": {
            "name": "Hateful Memes AUROC",
            "value": 100 * area if complete and area is not None else None,
            "unit": "%",
        },
    }
    unparsable = 0 if predictions is None else sum(p is None for p in predictions)
    return Score(metrics, correct, unparsable, [None if d is None else str(int(d)) for d in decisions])
