from __future__ import annotations

import json
from pathlib import Path

import pytest

from vlmamba.evaluation import Sample, Task
from vlmamba.testing import write_images

WORDS = ("red", "blue", "green", "two", "seven")


@pytest.fixture()
def task(tmp_path: Path) -> Task:
    """Eleven questions: on one picture, on two, on none."""
    names = write_images(tmp_path / "images", 6)
    pictures = [tmp_path / "images" / name for name in names]
    samples = []
    for i in range(11):
        images = {0: (), 1: (pictures[i % 5],)}.get(
            i % 4, (pictures[i % 6],) if i % 4 == 2 else tuple(pictures[i % 3 :: 3])
        )
        text = "Where is the seven?" + " How many digits are there?" * (i % 3)
        samples.append(Sample(i, images, text, WORDS[i % 5], ("colour", "count")[i % 2]))
    return Task("tiny", samples, max_new_tokens=6)


@pytest.fixture()
def heldout(tmp_path: Path) -> Path:
    """Questions as the playground writes them; returns ``questions.jsonl``."""
    folder = tmp_path / "heldout"
    names = write_images(folder / "images", 4)
    rows = [
        {
            "question_id": i,
            "image": names[i % 4],
            "text": f"What is digit {i}?",
            "answer": str(i),
            "category": "digit",
        }
        for i in range(8)
    ]
    rows.append(
        {"question_id": 8, "image": names[:2], "text": "Which?", "answer": "first", "category": "compare"}
    )
    rows.append(
        {"question_id": 9, "image": names[2:], "text": "Which?", "answer": "second", "category": "compare"}
    )
    path = folder / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
