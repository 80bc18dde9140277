"""From answers to a task's result, without a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vlmamba.evaluation.task import Sample, Task


def score_records(
    task: Task, samples: Sequence[Sample], records: Mapping[tuple[str, str], Mapping[str, Any]]
) -> dict[str, Any]:
    """Score the answers that are there; a question without one counts as wrong and as missing.

    Args:
        task: Whose scorer.
        samples: The questions asked.
        records: Answers by `Sample.key`.

    Returns:
        ``{"task", "metrics", "counts"}``; counts are asked, answered, missing, unparsable and cut (ended by
        the limit on new tokens).
    """
    found = [records.get(sample.key) for sample in samples]
    score = task.score(samples, [None if r is None else str(r["text"]) for r in found])
    answered = sum(r is not None for r in found)
    counts = {
        "asked": len(samples),
        "answered": answered,
        "missing": len(samples) - answered,
        "unparsable": score.unparsable,
        "cut": sum(r is not None and bool((r.get("metadata") or {}).get("cut")) for r in found),
    }
    return {"task": task.name, "metrics": score.metrics, "counts": counts}
