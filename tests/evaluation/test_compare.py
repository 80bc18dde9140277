from __future__ import annotations

import json
import random

import numpy as np
import pytest

from vlmamba.cli import main
from vlmamba.common.files import replace_json
from vlmamba.errors import ConfigError, DataError, MissingFileError
from vlmamba.evaluation.bootstrap import difference_interval
from vlmamba.evaluation.cli import reload_task
from vlmamba.evaluation.compare import compare_runs, format_comparison
from vlmamba.evaluation.compare_page import write_comparison
from vlmamba.evaluation.gallery import pick_answers
from vlmamba.evaluation.records import append_records
from vlmamba.evaluation.scoring import read_credits, score_records
from vlmamba.evaluation.task import Sample, StoredImage, Task, first_questions, load_task

TASK = """
from vlmamba.evaluation import Sample, Score, Task
from vlmamba.evaluation.scorers import exact_match
from pathlib import Path

def task(annotations):
    root = Path(annotations).parent / "images"
    samples = [
        Sample(i, (root / f"{i % 4:04d}.png",), f"What is digit {i}? <&>", str(i), ("even", "odd")[i % 2], group=i // 2)
        for i in range(40)
    ]
    return Task("digits", samples)

def secret(annotations):
    return Task("secret", task(annotations).samples, score=lambda s, a: Score({"overall": {
        "accuracy": None, "correct": 0, "total": 0, "low": None, "high": None},
        "headline": {"name": "x", "value": None, "unit": "%"}}, (), 0))
"""


@pytest.fixture()
def tasks(tmp_path, heldout):
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "digits.py").write_text(TASK)
    return folder, str(heldout)


def write_run(folder, tasks, answers, *, name="digits", **settings):
    """What an evaluation leaves, without a model."""
    tasks_folder, heldout = tasks
    task = load_task(
        f"digits:{'task' if name == 'digits' else name}", folder=tasks_folder, annotations=heldout
    )
    records = {
        s.key: {"question_id": s.question_id, "prompt": s.text, "text": text}
        for s, text in zip(task.samples, answers, strict=True)
        if text is not None
    }
    append_records(folder / "eval" / f"{task.name}.jsonl", records.values())
    path = folder / "eval/results.json"
    results = json.loads(path.read_text()) if path.exists() else {"tasks": {}}
    results["tasks"][task.name] = {
        **score_records(
            task,
            first_questions(task.samples, settings.get("limit")),
            records,
            folder / "eval" / f"{task.name}.jsonl",
        ),
        "spec": f"digits:{'task' if name == 'digits' else name}",
        "folder": str(tasks_folder),
        "options": {"annotations": heldout},
        "predictions": f"{task.name}.jsonl",
        "settings": {"data": task.fingerprint, "model": folder.name, "dtype": "float32", **settings},
    }
    replace_json(path, results)
    return folder


RIGHT = [str(i) for i in range(40)]
WRONG_EVEN = [str(i) if i % 2 else "none" for i in range(40)]


def test_differences_flips_and_their_page(tmp_path, tasks):
    first = write_run(tmp_path / "a", tasks, WRONG_EVEN)
    other = write_run(tmp_path / "b", tasks, ["wrong", *RIGHT[1:39], "wrong"])
    comparison = compare_runs([first, other])
    (task,) = comparison.tasks
    assert (task.first_value, task.other_value, task.changed) == (50.0, 95.0, 21)
    rows = {row.name: row for row in task.rows}
    assert list(rows) == ["overall", "even", "odd"]
    assert (rows["even"].gained, rows["even"].lost, rows["odd"].lost) == (19, 0, 1)
    assert rows["even"].difference == pytest.approx(0.95)
    assert rows["overall"].difference == pytest.approx(0.45)
    assert rows["overall"].low < 0.45 < rows["overall"].high
    assert rows["overall"].low > 0
    assert rows["odd"].low < rows["odd"].difference < 0 <= rows["odd"].high
    assert task.settings == {"model": ("a", "b")}
    assert [f.sample.question_id for f in task.flips if f.change < 0] == [39]
    text = format_comparison(comparison)
    assert "overall" in text
    low, high = task.interval
    assert 0 < low < 45 < high
    assert task.interval == pytest.approx((100 * rows["overall"].low, 100 * rows["overall"].high))
    assert f"50.0 % -> 95.0 % (+45.00, 95 % interval {low:+.2f} to {high:+.2f})" in text
    page = write_comparison(tmp_path / "c.html", comparison, flips=5).read_text()
    assert "5 of 19 shown" in page
    assert "1 of 1 shown" in page
    assert page.count("data:image/png") == 6
    assert "What is digit 39? &lt;&amp;&gt;" in page
    assert "<script" not in page


def test_a_run_equals_itself(tmp_path, tasks):
    run = write_run(tmp_path / "a", tasks, WRONG_EVEN)
    comparison = compare_runs([run, run, run / "eval"])
    assert comparison.runs[1] == f"{run} (2)"
    for task in comparison.tasks:
        assert all((r.difference, r.low, r.high, r.gained, r.lost) == (0, 0, 0, 0, 0) for r in task.rows)
        assert not task.flips
        assert not task.changed


def test_the_command(tmp_path, tasks, capsys):
    runs = [
        str(write_run(tmp_path / name, tasks, texts)) for name, texts in (("a", RIGHT), ("b", WRONG_EVEN))
    ]
    assert main(["eval", "compare", *runs, "--output", str(tmp_path / "c.html"), "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["tasks"][0]["rows"][0]["difference"] == -0.5
    assert figures["tasks"][0]["flips"] == {"gained": [], "lost": list(range(0, 40, 2))}
    assert main(["eval", "compare", *runs, "--output", str(tmp_path / "c.html")]) == 0
    assert "-50.00" in capsys.readouterr().out


def test_runs_that_cannot_be_compared(tmp_path, tasks):
    a = write_run(tmp_path / "a", tasks, RIGHT)
    with pytest.raises(ConfigError, match="at least two runs, got 1"):
        compare_runs([a])
    with pytest.raises(MissingFileError, match=r"no results in .*none: neither .*results.json"):
        compare_runs([a, tmp_path / "none"])
    secret = write_run(tmp_path / "s", tasks, RIGHT, name="secret")
    with pytest.raises(ConfigError, match=r"no common task at all: .*a has digits; .*s has secret"):
        compare_runs([a, secret])
    few = write_run(tmp_path / "few", tasks, [*RIGHT[:10], *[None] * 30], limit=10)
    with pytest.raises(DataError, match=r"different numbers of questions \(.*a: 40, .*few: 10\).*--common"):
        compare_runs([a, few])
    assert compare_runs([a, few], common=True).tasks[0].rows[0].questions == 10
    other = write_run(tmp_path / "other", tasks, RIGHT, data="feed")
    with pytest.raises(DataError, match=r"were asked other questions \(data \w+ and feed\)"):
        compare_runs([a, other])
    with pytest.raises(DataError, match=r"have changed since they were asked: the data had fingerprint feed"):
        compare_runs([other, other])


def test_answers_that_only_a_server_can_judge_are_counted(tmp_path, tasks):
    runs = [write_run(tmp_path / n, tasks, t, name="secret") for n, t in (("a", RIGHT), ("b", WRONG_EVEN))]
    (task,) = compare_runs(runs).tasks
    assert (task.rows, task.flips, task.changed) == ([], [], 20)
    assert "only the benchmark's server knows" in format_comparison(compare_runs(runs))


def paired_interval(differences, groups=(), **options):
    zero = [(0.0, 1.0)] * len(differences)
    low, high = difference_interval(zero, [(float(d), 1.0) for d in differences], groups=groups, **options)
    return low / 100, high / 100


def plain_bootstrap(differences, groups, resamples, seed):
    """Groups drawn one by one."""
    rng = np.random.default_rng(seed)
    members = {}
    for difference, group in zip(differences, groups, strict=True):
        members.setdefault(group, []).append(difference)
    sets = list(members.values())
    means = []
    for _ in range(resamples):
        drawn = [d for at in rng.integers(0, len(sets), len(sets)) for d in sets[at]]
        means.append(np.mean(drawn))
    return np.percentile(means, [2.5, 97.5])


def test_intervals_equal_those_of_drawing_groups_one_by_one():
    rng = random.Random(0)
    groups = [rng.randrange(60) for _ in range(200)]
    shift = {group: rng.choice((-1, 0, 0, 1)) for group in set(groups)}
    differences = [shift[group] if rng.random() < 0.8 else 0.3 for group in groups]
    low, high = paired_interval(differences, groups)
    assert [low, high] == pytest.approx(plain_bootstrap(differences, groups, 4000, 1), abs=0.012)
    narrow = paired_interval(differences)
    assert narrow[1] - narrow[0] < 0.8 * (high - low)  # what belongs together varies together


def test_intervals_cover_the_truth():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        differences = rng.choice([-1, 0, 1], p=[0.1, 0.7, 0.2], size=300)
        low, high = paired_interval(differences.tolist(), resamples=1000)
        covered += low <= 0.1 <= high
    assert covered >= 180


def test_nothing_is_scored_twice(tmp_path, tasks):
    first, other = write_run(tmp_path / "a", tasks, WRONG_EVEN), write_run(tmp_path / "b", tasks, RIGHT)
    file = tasks[0] / "digits.py"
    file.write_text(
        file.read_text().replace(
            'Task("digits", samples)', 'Task("digits", samples, score=lambda s, a: 1 / 0)'
        )
    )
    (task,) = compare_runs([first, other]).tasks
    assert [row.difference for row in task.rows] == [0.5, 1.0, 0.0]
    assert (
        len(
            pick_answers(
                reload_task(json.loads((first / "eval/results.json").read_text())["tasks"]["digits"]),
                first / "eval/digits.jsonl",
            )
        )
        == 12
    )
    credits_ = first / "eval/digits.credits.jsonl"
    row = json.loads(credits_.read_text().splitlines()[3])
    assert row == {
        "question_id": 3,
        "prompt": "What is digit 3? <&>",
        "category": "odd",
        "group": 1,
        "credit": True,
        "adds": [1.0, 1.0],
    }
    credits_.write_text(credits_.read_text()[:-20])
    with pytest.raises(DataError, match=r"digits.credits.jsonl:40 is no question's credit"):
        compare_runs([first, other])
    credits_.unlink()
    with pytest.raises(MissingFileError, match=r"evaluate once more into .*asks nothing again"):
        compare_runs([first, other])


def test_questions_about_the_same_pictures_are_drawn_together(tmp_path):
    (a, b), named = (tmp_path / "a.png", tmp_path / "b.png"), StoredImage("x", lambda: b"")
    samples = [
        Sample(at, images, "?", "yes", group=group)
        for at, (images, group) in enumerate(
            [
                ((a,), None),
                ((b,), None),
                ((a,), None),
                ((), None),
                ((), None),
                ((a,), "g"),
                ((b, a), "g"),
                ((named,), None),
                ((named,), None),
            ]
        )
    ]
    task = Task("t", samples)
    score_records(task, samples, {}, tmp_path / "t.jsonl")
    assert [c.group for c in read_credits(tmp_path / "t.jsonl").values()] == [0, 1, 0, 2, 3, 4, 4, 5, 5]
