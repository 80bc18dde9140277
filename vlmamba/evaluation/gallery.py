"""Which answers a report shows, and pictures as text in a page."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmamba.errors import DataError
from vlmamba.evaluation.conversations import HALF
from vlmamba.evaluation.records import read_records, record_key
from vlmamba.evaluation.scoring import read_credits
from vlmamba.evaluation.task import ImageRef, Sample, Task


@dataclass(frozen=True)
class Shown:
    """One answer in the gallery."""

    images: Sequence[ImageRef]
    question: str
    expected: str
    given: str
    right: bool | None
    """None where only a server knows."""
    category: str = ""
    question_id: str = ""


@dataclass(frozen=True)
class Turn:
    """A question and its answer in a conversation; `right` is None where nothing was expected."""

    question: str
    given: str
    expected: str = ""
    right: bool | None = None


@dataclass(frozen=True)
class Talk:
    """Several turns about the same pictures."""

    images: Sequence[ImageRef]
    turns: Sequence[Turn]


def pick_answers(
    task: Task, predictions: str | Path, *, per_category: int = 6, wrong: int = 3, seed: int = 0
) -> list[Shown]:
    """Answers of every kind of question, wrong ones among them, drawn at random.

    Args:
        task: The task that was asked.
        predictions: Its answer file.
        per_category: Answers of each kind; fewer where there are fewer.
        wrong: How many of these are wrong ones, if there are that many (more if too few are right).
        seed: Of the draw.

    Returns:
        By kind in alphabetical order; in each the wrong ones first.

    Raises:
        MissingFileError: There is no answer file.
        DataError: It answers none of the task's questions.
    """
    records = {record_key(record): record for record in read_records(predictions)}
    samples = [sample for sample in task.samples if sample.key in records]
    if not samples:
        raise DataError(f"{predictions} answers none of the questions of {task.name!r}")
    texts = [str(records[sample.key]["text"]) for sample in samples]
    credits_ = read_credits(Path(predictions))
    right = {key: c.credit >= HALF for key, c in credits_.items() if c.credit is not None}
    groups: dict[str, dict[bool | None, list[tuple[Sample, str]]]] = defaultdict(lambda: defaultdict(list))
    for sample, text in zip(samples, texts, strict=True):
        groups[sample.category][right.get(sample.key)].append((sample, text))
    rng = random.Random(seed)
    chosen: list[tuple[Sample, str, bool | None]] = []
    for category in sorted(groups):
        bad, good, unknown = (groups[category][verdict] for verdict in (False, True, None))
        number = max(min(wrong, len(bad)), min(len(bad), per_category - len(good)))
        number_good = min(len(good), per_category - number)
        shares = ((False, bad, number), (True, good, number_good), (None, unknown, per_category))
        for ok, pool, count in shares:
            chosen += [(sample, text, ok) for sample, text in rng.sample(pool, min(count, len(pool)))]
    return [
        Shown(s.images, s.text, accepted(s.answer), text, ok, s.category, str(s.question_id))
        for s, text, ok in chosen
    ]


def read_talks(results: Mapping[str, Any], tasks: Mapping[str, Task]) -> list[Talk]:
    """The conversations of a result, with the pictures of their questions."""
    talks = []
    for talk in results.get("conversations", []):
        by_id = {str(s.question_id): s for s in tasks[talk["task"]].samples}
        images = by_id[str(talk["question_ids"][0])].images
        turns = [Turn(t["question"], t["given"], accepted(t["expected"]), t["right"]) for t in talk["turns"]]
        talks.append(Talk(images, turns))
    return talks


def accepted(answer: Any) -> str:
    """An expected answer as text; several accepted ones with "or" between them."""
    if isinstance(answer, list | tuple):
        return " or ".join(dict.fromkeys(map(str, answer)))
    return "" if answer is None else str(answer)


def common_suffix(questions: Sequence[str]) -> str:
    """An instruction ("Answer with ...") that closes questions as their last line, if it is always the same
    one.
    """
    lasts = {q.rpartition("\n")[2] for q in questions if "\n" in q}
    return lasts.pop() if len(lasts) == 1 else ""
