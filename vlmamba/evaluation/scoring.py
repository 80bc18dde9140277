"""From answers to a task's result, without a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vlmamba.errors import DataError
from vlmamba.evaluation.scorers import Score
from vlmamba.evaluation.task import Sample, Task

Records = Mapping[tuple[str, str], Mapping[str, Any]]
"""Answers by `Sample.key`."""


def given_answers(task: Task, samples: Sequence[Sample], records: Records) -> list[Any]:
    """What `Task.score` and `Task.submission` are given: the text or record of each answer, None without one."""
    found = [records.get(sample.key) for sample in samples]
    if task.reads == "record":
        return [None if r is None else dict(r) for r in found]
    return [None if r is None else str(r["text"]) for r in found]


def score_answers(task: Task, samples: Sequence[Sample], records: Records) -> Score:
    """Score the answers that are there; a question without one counts as wrong and as missing."""
    score = task.score(samples, given_answers(task, samples, records))
    if score.correct and len(score.correct) != len(samples):
        raise DataError(
            f"the scorer of {task.name!r} gave {len(score.correct)} verdicts on {len(samples)} questions"
        )
    return score


def score_records(task: Task, samples: Sequence[Sample], records: Records) -> dict[str, Any]:
    """A task's result.

    Args:
        task: Whose scorer.
        samples: The questions asked.
        records: Answers by `Sample.key`; a question without one counts as wrong and as missing.

    Returns:
        ``{"task", "headline", "metrics", "counts", "references", "task_settings"}``. The headline is
        ``{"name", "value", "unit"}``, its value None where it cannot be had; counts are asked, answered,
        missing, unparsable and cut (ended by the limit on new tokens); references are published figures in
        the headline's unit.
    """
    score = score_answers(task, samples, records)
    found = [record for sample in samples if (record := records.get(sample.key)) is not None]
    counts = {
        "asked": len(samples),
        "answered": len(found),
        "missing": len(samples) - len(found),
        "unparsable": score.unparsable,
        "cut": sum(bool((record.get("metadata") or {}).get("cut")) for record in found),
    }
    return {
        "task": task.name,
        "headline": headline(task, score.metrics),
        "metrics": score.metrics,
        "counts": counts,
        "references": [reference._asdict() for reference in task.references],
        "task_settings": dict(task.settings),
    }


def headline(task: Task, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The one figure to show: the scorer's own, else the share at `Task.headline` in percent."""
    if "headline" in metrics:
        return dict(metrics["headline"])
    value: Any = metrics
    for key in task.headline.split("."):
        if not isinstance(value, Mapping) or key not in value:
            raise DataError(f"the metrics of {task.name!r} have no {task.headline!r}: no {key!r} there")
        value = value[key]
    name = task.headline.rpartition(".")[2].replace("_", " ")
    return {"name": name, "value": None if value is None else 100 * value, "unit": "%"}
