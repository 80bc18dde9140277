"""Several questions about one picture in one conversation, for reports."""

from __future__ import annotations

from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from vlmamba.errors import DataError
from vlmamba.evaluation.records import Record
from vlmamba.evaluation.scoring import score_answers
from vlmamba.evaluation.task import Sample, StoredImage, Task

HALF = 0.5
"""Credit from which an answer is shown as right."""


def hold_conversations(model: Any, processor: Any, task: Task, count: int) -> list[dict[str, Any]]:
    """Hold up to `count` conversations about pictures of a task whose answers are written.

    Returns:
        ``{"task", "question_ids", "turns"}`` of each; a turn is ``{"question", "expected", "given", "right"}``.
    """
    from vlmamba.evaluation.runner import check_images, converse

    talks = []
    for samples in pick_conversations(task, count) if task.method == "generate" else []:
        check_images(samples)
        replies = converse(model, processor, samples, max_new_tokens=task.max_new_tokens)
        right = _verdicts(task, samples, [reply.text for reply in replies])
        turns = [
            {"question": s.text, "expected": s.answer, "given": reply.text, "right": ok}
            for s, reply, ok in zip(samples, replies, right, strict=True)
        ]
        talks.append({"task": task.name, "question_ids": [s.question_id for s in samples], "turns": turns})
    return talks


def _verdicts(task: Task, samples: list[Sample], texts: list[str]) -> list[bool | None]:
    """Whether each answer earns half of its credit or more; None where a few answers cannot be scored."""
    records: dict[tuple[str, str], Record] = {
        s.key: {"question_id": s.question_id, "prompt": s.text, "text": text}
        for s, text in zip(samples, texts, strict=True)
    }
    try:
        correct = score_answers(task, samples, records).correct
    except DataError:  # a scorer that wants all questions of a group
        correct = ()
    return [credit >= HALF for credit in correct] or [None] * len(samples)


def pick_conversations(task: Task, count: int, *, longest: int = 4) -> list[list[Sample]]:
    """Questions that share their pictures, spread over the task: different kinds first, at least two in a
    group.
    """
    groups: dict[tuple[Any, ...], list[Sample]] = defaultdict(list)
    for sample in task.samples:
        if sample.images and all(isinstance(image, Path | StoredImage) for image in sample.images):
            groups[sample.images].append(sample)
    chosen = []
    for members in groups.values():
        nth: Counter[str] = Counter()
        ranked = []
        for at, sample in enumerate(members):
            ranked.append((nth[sample.category], at, sample))
            nth[sample.category] += 1
        if len(members) > 1:
            chosen.append([sample for _, _, sample in sorted(ranked, key=lambda r: r[:2])[:longest]])
    chosen.sort(key=len, reverse=True)
    best = [talk for talk in chosen if len(talk) == len(chosen[0])] if chosen else []
    pool = best if len(best) >= count else chosen
    step = max(1, len(pool) // max(1, count))
    return pool[::step][: max(0, count)]
