from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import vlmamba
from vlmamba.errors import ConfigError, DataError, ImageError, MissingFileError
from vlmamba.evaluation import Sample, Task, image_first, load_task, task_names
from vlmamba.evaluation.cli import reload_task

ROOT = Path(__file__).parents[2]
SOURCE = """
from vlmamba.evaluation import Sample, Task

def task(annotations: str = "x", size: int = 1) -> Task:
    return Task("own", [Sample(i, (), annotations) for i in range(size)])

def hard() -> Task:
    return Task("hard", [Sample(0, (), "?")])

def wrong():
    return 3
"""


@pytest.fixture()
def folder(tmp_path):
    (tmp_path / "own.py").write_text(SOURCE)
    (tmp_path / "broken.py").write_text("def task(:\n")
    return tmp_path


def test_by_name_by_path_and_by_function(folder):
    assert task_names(folder) == ["broken", "own"]
    assert load_task("own", folder=folder).name == "own"
    assert load_task(str(folder / "own.py")).name == "own"
    assert load_task("own:hard", folder=folder).name == "hard"
    assert len(load_task("own", folder=folder, size=3, annotations=None).samples) == 3
    assert not any(name.startswith(("own", "eval.")) for name in sys.modules)


@pytest.mark.parametrize(
    ("spec", "options", "error", "text"),
    [
        ("owm", {}, ConfigError, r"unknown task 'owm'\. Did you mean 'own'\? Found in .*: broken, own\."),
        ("Own", {}, ConfigError, "unknown task 'Own'"),
        ("none.py", {}, MissingFileError, r"there is no task file none\.py"),
        ("own:harder", {}, ConfigError, "has no task 'harder'. Did you mean 'hard'"),
        ("own:wrong", {}, ConfigError, "own.py:wrong returned int, not a vlmamba.evaluation.Task"),
        ("own", {"annotation": "y"}, ConfigError, "has no option 'annotation'. Did you mean 'annotations'"),
        ("broken", {}, ConfigError, r"broken\.py:1: "),
    ],
)
def test_what_cannot_be_loaded(folder, spec, options, error, text):
    with pytest.raises(error, match=text):
        load_task(spec, folder=folder, **options)


def test_pictures_come_first_or_where_the_text_says():
    image, nl = {"type": "image"}, {"type": "text", "text": "\n"}

    def content(text, pictures):
        return image_first(Sample(0, (b"x",) * pictures, text))[0]["content"]

    assert content("Why?", 1) == [image, {"type": "text", "text": "\nWhy?"}]
    assert content("Why?", 2) == [image, nl, image, {"type": "text", "text": "\nWhy?"}]
    assert content("Why? <image>", 1) == [{"type": "text", "text": "Why? "}, image]
    assert content("<image>", 0) == [{"type": "text", "text": "<image>"}]
    with pytest.raises(DataError, match=r"question 0 has 2 picture\(s\) but 1 <image> in its text"):
        content("<image> why?", 2)


def test_empty_tasks_and_double_questions_are_refused():
    with pytest.raises(DataError, match="task 'a' has no question"):
        Task("a", [])
    twice = [Sample(1, (), "x"), Sample("1", (), "x"), Sample(1, (), "y")]
    with pytest.raises(DataError, match=r"asks 1 question\(s\) more than once .* such as '1'"):
        Task("a", twice)


def test_the_fingerprint_follows_the_content():
    samples = [Sample(0, (Path("a.png"),), "x", "y", "k"), Sample(1, (), "x")]
    same = Task("a", [Sample(0, (Path("elsewhere/a.png"),), "x", "y", "k"), Sample(1, (), "x")]).fingerprint
    assert Task("a", samples).fingerprint == same
    assert Task("a", [samples[0], Sample(1, (), "z")]).fingerprint != same


def test_the_playground_task(heldout):
    task = load_task("playground", folder=ROOT / "eval", annotations=str(heldout))
    assert len(task.samples) == 10
    assert task.samples[0] == Sample(
        0, (heldout.parent / "images/0000.png",), "What is digit 0?", "0", "digit"
    )
    assert len(task.samples[8].images) == 2


def test_the_playground_task_names_what_is_wrong(heldout):
    def load(path):
        return load_task("playground", folder=ROOT / "eval", annotations=str(path))

    with pytest.raises(MissingFileError, match=r"Write them with: python playground/make_data\.py"):
        load(heldout.parent / "none.jsonl")
    heldout.write_text('{"question_id": 1, "text": "?"}\n')
    with pytest.raises(DataError, match=r"questions\.jsonl:1: .* this line lacks answer, category"):
        load(heldout)
    heldout.write_text(
        '{"question_id": 1, "text": "?", "answer": "", "category": "", "image": "../../x.png"}\n'
    )
    with pytest.raises(
        ImageError, match=r"questions\.jsonl:1: image path '\.\./\.\./x\.png' leaves its root"
    ):
        load(heldout)


def test_tasks_and_scorers_need_no_torch():
    modules = "sys, vlmamba.evaluation, vlmamba.evaluation.cli, vlmamba.evaluation.report"
    code = f"import {modules}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_training_and_data_do_not_import_evaluation():
    package = Path(vlmamba.__file__).parent
    for part in ("training", "data", "models", "ssm"):
        for file in (package / part).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
                names += [f"{node.module}"] if isinstance(node, ast.ImportFrom) else []
                assert not any(name.startswith("vlmamba.evaluation") for name in names), file


def test_a_results_file_runs_no_code(tmp_path, monkeypatch):
    """`report` and `compare` make tasks again from results.json, which may be anybody's."""
    monkeypatch.chdir(tmp_path)
    ran = tmp_path / "ran"
    code = f"""
from pathlib import Path
from vlmamba.evaluation import Sample, Task
Path({str(ran)!r}).write_text("ran")

def task() -> Task:
    return Task("x", [Sample("1", (), "?")])
"""
    for place in ("elsewhere/x.py", "runs/a/eval/x.py", "sent.py"):
        Path(place).parent.mkdir(parents=True, exist_ok=True)
        Path(place).write_text(code)
    for spec, folder in (
        ("elsewhere/x.py", "eval"),
        (str(tmp_path / "elsewhere/x.py:task"), "eval"),
        ("x", "elsewhere"),
        ("x", "runs/a/eval"),
        ("./sent.py", "eval"),
        ("package_of_nobody.module:task", "eval"),
    ):
        with pytest.raises(ConfigError, match="a name that was read from a file imports nothing"):
            reload_task({"spec": spec, "folder": folder})
    assert not ran.exists()
    monkeypatch.setenv("VLMAMBA_PLUGINS", "elsewhere/x.py")
    reload_task({"spec": "x", "folder": "elsewhere"})
    assert ran.exists()
