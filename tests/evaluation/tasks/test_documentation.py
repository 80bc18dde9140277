"""docs/evaluation.md names every task there is and none other, and its example works."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from vlmamba.errors import DataError
from vlmamba.evaluation import load_task, task_names

ROOT = Path(__file__).parents[3]
TEXT = (ROOT / "docs/evaluation.md").read_text(encoding="utf-8")


def test_the_table_has_every_task():
    table = TEXT.split("## Tasks")[1].split("### Where")[0]
    cells = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    named = [name for cell in cells for name in re.findall(r"`(\w+)`", cell)]
    assert sorted(named) == sorted(task_names(ROOT / "eval"))


def test_the_example_works(files):
    code = re.search(r"```python\n(.*?)```", TEXT, re.DOTALL)[1]
    files.text("eval/mine.py", code)
    rows = [
        {"id": i, "image": f"{i}.png", "question": "What?", "answer": "red", "kind": kind}
        for i, kind in enumerate(("easy", "hard", "hard"))
    ]
    path = files.lines("questions.jsonl", rows)
    task = load_task("mine_hard", folder=files.root / "eval", annotations=str(path))
    assert [s.question_id for s in task.samples] == [1, 2]
    assert task.samples[0].text == "What?\nAnswer the question using a single word or phrase."
    assert task.score(task.samples, ["Red.", "blue"]).correct == [True, False]
    del rows[1]["answer"]
    with pytest.raises(DataError, match=r"1 of 3 rows of Mine are incomplete: .*:2 lacks answer"):
        load_task("mine", folder=files.root / "eval", annotations=str(files.lines("questions.jsonl", rows)))
