"""From answers to a task's result, without a model, and what each question earned, in a file beside the answers.

``NAME.credits.jsonl`` has a line for each question asked: ``{"question_id", "prompt", "category", "group", "credit",
"adds"}``. Questions of the same group are scored together or are about the same pictures, so they stand or fall
together; credit is in 0..1, None where only a server knows; ``adds`` is what the question adds to the sums of the
headline's formula (`vlmamba.evaluation.scorers.base.FORMULAS`), which the result names. Whoever reads an evaluation
reads this file; nothing is scored twice.
"""

from __future__ import annotations

import json
import math
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vlmamba.common.files import replace_text
from vlmamba.errors import DataError, MissingFileError
from vlmamba.evaluation.records import record_key
from vlmamba.evaluation.scorers import Headline, Score
from vlmamba.evaluation.task import Sample, StoredImage, Task

Records = Mapping[tuple[str, str], Mapping[str, Any]]
"""Answers by `Sample.key`."""


class Credit(NamedTuple):
    """What a question earned."""

    category: str
    group: int
    credit: float | None
    adds: Sequence[float]


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


def score_records(
    task: Task, samples: Sequence[Sample], records: Records, answers: Path | None = None
) -> dict[str, Any]:
    """A task's result.

    Args:
        task: Whose scorer.
        samples: The questions asked.
        records: Answers by `Sample.key`; a question without one counts as wrong and as missing.
        answers: Their file, to write what each question earned beside.

    Returns:
        ``{"task", "headline", "formula", "metrics", "counts", "references", "task_settings"}``. The headline is
        ``{"name", "value", "unit"}``, its value None where it cannot be had; the formula makes it of sums over
        questions, None where it is no such function; counts are asked, answered, missing, unparsable and cut (by the
        limit on new tokens); references are published figures in the headline's unit.
    """
    score = score_answers(task, samples, records)
    main = headline(task, score.metrics)
    sums = score.headline or Headline.share(score.correct)
    stated, summed = main["value"], sums.value() if score.correct else None
    known = stated is not None and summed is not None and math.isclose(stated, summed, abs_tol=1e-9)
    if answers is not None:
        _write_credits(credits_path(answers), samples, score, sums.rows if known else ())
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
        "headline": main,
        "formula": sums.formula if known else None,
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


def credits_path(answers: Path) -> Path:
    """The file of what each question earned, beside its answer file."""
    return answers.with_suffix(f".credits{answers.suffix}")


def _write_credits(
    path: Path, samples: Sequence[Sample], score: Score, adds: Sequence[Sequence[float]]
) -> None:
    numbers: dict[Hashable, int] = {}
    lines = []
    for at, sample in enumerate(samples):
        group = ("scored", score.groups[at]) if score.groups else _group(sample)
        row = {
            "question_id": sample.question_id,
            "prompt": sample.text,
            "category": str(sample.category),
            "group": numbers.setdefault(group, len(numbers)),
            "credit": score.correct[at] if score.correct else None,
            "adds": list(adds[at]) if adds else [],
        }
        lines.append(json.dumps(row))
    replace_text(path, "\n".join(lines) + "\n")


def _group(sample: Sample) -> Hashable:
    """Questions that stand or fall together: scored together, or about the same pictures."""
    if sample.group is not None:
        return ("group", sample.group)
    images = sample.images
    named = bool(images) and all(isinstance(image, Path | StoredImage) for image in images)
    return images if named else ("question", *sample.key)


def read_credits(answers: Path) -> dict[tuple[str, str], Credit]:
    """What each question asked earned, by `Sample.key`, in the order of the task.

    Args:
        answers: The answer file of an evaluation.

    Raises:
        MissingFileError: It was not scored, or by a version that left no such file.
        DataError: The file is damaged.
    """
    path = credits_path(answers)
    if not path.is_file():
        raise MissingFileError(
            f"there is no {path} beside the answers: evaluate once more into {path.parent} (vlmamba eval), which asks "
            "nothing again and writes it"
        )
    found = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            row = json.loads(line)
            found[record_key(row)] = Credit(row["category"], row["group"], row["credit"], row["adds"])
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise DataError(f"{path}:{number} is no question's credit: {line[:80]!r}") from error
    return found
