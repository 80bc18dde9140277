"""The playground's scenes in the official layouts: every task over them with one who knows and one who does not."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from vlmamba.evaluation import load_task
from vlmamba.evaluation.predictions import score_predictions
from vlmamba.evaluation.task import first_questions, task_names

ROOT = Path(__file__).parents[3]
TASKS = ("vqav2", "gqa", "pope", "mmbench")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """What make_data.py writes, small."""
    pytest.importorskip("sklearn")
    sys.path.insert(0, str(ROOT / "playground"))
    try:
        import make_data
    finally:
        sys.path.remove(str(ROOT / "playground"))
    root = tmp_path_factory.mktemp("data") / "mini"
    options = make_data.Options(captions=2, conversations=2, heldout_scenes=24, heldout_questions=20, seed=3)
    make_data.make_data(options, root, quiet=True)
    return root, make_data, options


@pytest.fixture(scope="module")
def benchmarks(data):
    return data[0] / "benchmarks"


def _data(image):
    return image if isinstance(image, bytes) else image.read()


def knows(sample):
    if isinstance(sample.answer, list):
        return Counter(sample.answer).most_common(1)[0][0]
    return sample.answer


def wrong(sample):
    return {"yes": "no", "no": "yes"}.get(sample.answer, "zzz") if isinstance(sample.answer, str) else "zzz"


def answers(path, task, answer):
    rows = [{"question_id": s.question_id, "prompt": s.text, "text": answer(s)} for s in task.samples]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", TASKS)
def test_one_who_knows_gets_everything_right_and_one_who_does_not_nothing(name, benchmarks, tmp_path):
    spec, folder = f"{name}_playground", benchmarks / name
    task = load_task(spec, folder=ROOT / "eval", annotations=str(folder))
    assert len(task.samples) > 40
    assert task.references == ()  # published figures are about other questions
    for sample in task.samples:
        for image in sample.images:
            if isinstance(image, Path):
                assert image.is_file()
            else:
                assert _data(image)[:2] == b"\xff\xd8"
    right = answers(tmp_path / "right.jsonl", task, knows)
    result = score_predictions(spec, right, folder, folder=ROOT / "eval")
    assert result["headline"]["value"] == pytest.approx(100.0)
    assert result["counts"] == {
        "asked": len(task.samples),
        "answered": len(task.samples),
        "missing": 0,
        "unparsable": 0,
        "cut": 0,
    }
    bad = answers(tmp_path / "bad.jsonl", task, wrong)
    assert score_predictions(spec, bad, folder, folder=ROOT / "eval")["headline"]["value"] == 0.0


def test_questions_are_true_and_on_heldout_pictures(data, benchmarks):
    root, make_data, options = data
    scenes = make_data.heldout_scenes(options)
    heldout = {p.read_bytes() for p in (root / "heldout/images").glob("*.jpg")}
    assert all(p.read_bytes() in heldout for p in benchmarks.rglob("*.jpg"))
    for split in ("random", "popular", "adversarial"):
        rows = [json.loads(line) for line in (benchmarks / f"pope/coco/coco_pope_{split}.json").open()]
        labels = Counter(row["label"] for row in rows)
        assert labels["yes"] == labels["no"] > 0
        for row in rows:
            digits = scenes[int(row["image"][-16:-4]) - 1].digits
            thing = row["text"].removeprefix("Is there a").removesuffix("?").removeprefix("n").strip()
            shown = {str(d.value) for d in digits} | {f"digit in {d.colour}" for d in digits}
            assert (thing in shown) == (row["label"] == "yes"), row
    questions = json.loads((benchmarks / "gqa/testdev_balanced_questions.json").read_text())
    for row in questions.values():
        digits = scenes[int(row["imageId"][1:])].digits
        if row["types"]["detailed"] == "colour_of":
            assert row["answer"] in {d.colour for d in digits if str(d.value) in row["question"]}


def test_benchmarks_are_added_to_data_that_lack_them_and_nothing_else_changes(data):
    root, make_data, options = data
    before = {p: p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}
    (root / "benchmarks/metadata.json").unlink()
    (root / "benchmarks/gqa/testdev_balanced_questions.json").unlink()
    make_data.make_data(options, root, quiet=True)
    assert {p: p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()} == before
    mark = root / "benchmarks/mark"
    mark.touch()
    make_data.make_data(options, root, quiet=True)
    assert mark.exists()
    make_data.make_data(dataclasses.replace(options, heldout_questions=21), root, quiet=True)
    assert not mark.exists()


def test_scoring_by_the_command_line_imports_no_torch(benchmarks, tmp_path):
    files = {}
    for name in TASKS:
        task = load_task(f"{name}_playground", folder=ROOT / "eval", annotations=str(benchmarks / name))
        files[name] = str(answers(tmp_path / f"{name}.jsonl", task, knows))
    code = f"""
import contextlib, io, json, sys
from vlmamba.cli import main
from vlmamba.evaluation import load_task, task_names
for name, path in {files!r}.items():
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        data = {str(benchmarks)!r} + "/" + name
        words = ["eval", "score", name + "_playground", "--predictions", path, "--annotations", data]
        assert main(words) == 0
    result = json.loads(out.getvalue())
    assert abs(result["headline"]["value"] - 100) < 1e-9, result
assert main(["eval", "score", "popp", "--predictions", path]) == 2
assert "torch" not in sys.modules and "transformers" not in sys.modules
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "unknown task 'popp'. Did you mean 'pope'" in run.stderr


@pytest.mark.parametrize("name", [n for n in task_names(ROOT / "eval") if n != "playground"])
def test_missing_data_are_named_with_where_to_get_them(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    from vlmamba.errors import MissingFileError

    with pytest.raises(
        MissingFileError, match=r"are not there\. Looked in playground/data/.* for: .*Get them from"
    ):
        load_task(name, folder=ROOT / "eval")


def test_a_model_answers_them_from_real_files(benchmarks, tmp_path):
    from vlmamba.evaluation.runner import evaluate
    from vlmamba.testing import tiny_model

    model, processor = tiny_model()
    for name in ("pope", "mmbench"):
        task = load_task(f"{name}_playground", folder=ROOT / "eval", annotations=str(benchmarks / name))
        short = dataclasses.replace(task, max_new_tokens=2)
        result = evaluate(model, processor, short, tmp_path / f"{name}.jsonl", limit=2, progress=False)
        assert (
            result["counts"]["asked"] == result["counts"]["answered"] == len(first_questions(task.samples, 2))
        )


def test_pictures_of_the_table_are_pictures(benchmarks):
    import io

    task = load_task("mmbench_playground", folder=ROOT / "eval", annotations=str(benchmarks / "mmbench"))
    with Image.open(io.BytesIO(_data(task.samples[-1].images[0]))) as picture:
        assert picture.size == (96, 96)
