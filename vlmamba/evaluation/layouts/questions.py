"""From rows to samples: pictures, prompts, LLaVA's question files.

LLaVA-1.5 puts the picture first, a newline, the question, a newline and one of these instructions
(haotian-liu/LLaVA, docs/Evaluation.md).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vlmamba.errors import DataError, ImageError, MissingFileError
from vlmamba.evaluation.layouts.files import Benchmark, Document, require_keys
from vlmamba.evaluation.scorers import Score, rate
from vlmamba.evaluation.task import Prompt, Sample, Scorer

SHORT_ANSWER = "Answer the question using a single word or phrase."
UNANSWERABLE = "When the provided information is insufficient, respond with 'Unanswerable'."
LETTER = "Answer with the option's letter from the given choices directly."
LETTER_CN = "请直接回答选项字母。"

_OUTSIDE = re.compile(r"^/|^[A-Za-z]:|(^|/)\.\.(/|$)")


def with_suffix(question: str, suffix: str = SHORT_ANSWER) -> str:
    """A question and its instruction on a line of its own."""
    return f"{question}\n{suffix}"


def multiple_choice(
    question: str, options: Mapping[str, str], *, hint: str = "", suffix: str = LETTER
) -> str:
    """LLaVA's form of a question with options: hint, question, ``A. text`` lines, instruction."""
    lines = [hint] if hint else []
    lines += [question, *(f"{letter}. {text}" for letter, text in options.items()), suffix]
    return "\n".join(lines)


def picture(root: Path, name: str, where: str) -> Path:
    """The file of a picture named in a row; backslashes count as slashes.

    Names are checked, not the disk, and nothing heavy is imported: answers are scored where no picture is.

    Args:
        root: The image folder.
        name: As the row has it, relative to the folder.
        where: The row, for messages.

    Raises:
        ImageError: The name is no relative path, or leaves the folder.
    """
    slashed = name.replace("\\", "/") if isinstance(name, str) else ""
    if not slashed.strip() or "\0" in slashed or "://" in slashed:
        raise ImageError(f"{where}: image path {name!r} is not a path: give that of a file under {root}")
    if _OUTSIDE.search(slashed):
        raise ImageError(
            f"{where}: image path {name!r} leaves its root {root}. Write it relative to the root, or move the root up"
        )
    return _join(root, slashed)


@functools.lru_cache(maxsize=1024)
def _join(root: Path, name: str) -> Path:
    """Questions on the same picture stand together in most files."""
    return root / name


def llava_questions(
    document: Document,
    benchmark: Benchmark,
    images: Path,
    *,
    details: Callable[[Mapping[str, Any], str], Mapping[str, Any]] | None = None,
) -> list[Sample]:
    """Samples from LLaVA's question file: JSON lines with question_id, image and text, instruction included.

    Args:
        document: The file.
        benchmark: Whose.
        images: The image folder.
        details: From a row and its place to further fields of the sample (answer, category, metadata, ...).

    Raises:
        DataError: Rows are incomplete.
    """
    samples = []
    for at, row in enumerate(require_keys(document, ("question_id", "text"), benchmark)):
        where = document.where(at)
        names = row.get("image") or []
        names = [names] if isinstance(names, str) else names
        pictures = tuple(picture(images, name, where) for name in names)
        fields = {"category": str(row.get("category", "")), **(details(row, where) if details else {})}
        samples.append(Sample(row["question_id"], pictures, row["text"], **fields))
    return samples


def no_labels(metric: str, way: str, unit: str = "%") -> Scorer:
    """A scorer for splits whose answers only a server knows: no figure, and the way to one.

    Args:
        metric: What the server measures.
        way: What to do with the submission file.
        unit: Of the figure.
    """

    def score(samples: Sequence[Sample], predictions: Sequence[Any]) -> Score:
        if len(samples) != len(predictions):
            raise DataError(f"{len(predictions)} predictions for {len(samples)} questions")
        metrics = {
            "overall": rate(0, 0),
            "categories": {},
            "missing": sum(p is None for p in predictions),
            "headline": {"name": metric, "value": None, "unit": unit},
            "note": way,
        }
        return Score(metrics, (), 0)

    return score


def cannot_ask(missing: str) -> Prompt:
    """The prompt of a task whose questions are not there, though their answers are: answer files can be scored.

    Args:
        missing: What is missing and where to get it.
    """

    def prompt(sample: Sample) -> list[dict[str, Any]]:
        raise MissingFileError(f"question {sample.question_id!r} can be scored but not asked: {missing}")

    return prompt
