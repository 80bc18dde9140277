"""The playground's held-out questions, on scenes whose digit samples no training saw.

Written by ``python playground/make_data.py``. Short answers, scored by normalised exact match, overall and
for each kind of question.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vlmamba.errors import DataError, MissingFileError
from vlmamba.evaluation import Sample, Task
from vlmamba.evaluation.layouts import picture

HELDOUT = "playground/data/mini/heldout"
KEYS = ("question_id", "text", "answer", "category")


def task(annotations: str = f"{HELDOUT}/questions.jsonl", images: str | None = None) -> Task:
    """The task.

    Args:
        annotations: ``questions.jsonl``.
        images: The folder of the pictures; ``images`` beside the annotations when left out.
    """
    path = Path(annotations)
    if not path.is_file():
        raise MissingFileError(
            f"the playground's questions {path} are not there. Write them with: python "
            "playground/make_data.py"
        )
    root = Path(images) if images is not None else path.parent / "images"
    lines = path.read_text(encoding="utf-8").splitlines()
    samples = [
        _sample(line, root, f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip()
    ]
    return Task(
        name="playground",
        samples=samples,
        max_new_tokens=16,
        description="Held-out scenes of handwritten digits; short answers, normalised exact match.",
    )


def _sample(line: str, root: Path, where: str) -> Sample:
    try:
        row: Any = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where}: not JSON: {error}") from error
    lacking = [key for key in KEYS if not isinstance(row, dict) or key not in row]
    if lacking:
        raise DataError(f"{where}: a question needs {', '.join(KEYS)}; this line lacks {', '.join(lacking)}")
    named = row.get("image") or []
    names = [named] if isinstance(named, str) else named
    pictures = tuple(picture(root, name, where) for name in names)
    return Sample(row["question_id"], pictures, row["text"], row["answer"], row["category"])
