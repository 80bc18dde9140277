from __future__ import annotations

import json
from pathlib import Path

import pytest

from vlmamba.errors import ConfigError, DataError, MissingFileError
from vlmamba.evaluation.cli import evaluate_checkpoint, score_predictions
from vlmamba.evaluation.conversations import pick_conversations
from vlmamba.evaluation.report import write_report
from vlmamba.evaluation.tables import format_results
from vlmamba.evaluation.task import load_task
from vlmamba.testing import tiny_model

ROOT = Path(__file__).parents[2]


@pytest.fixture()
def folder(tmp_path, heldout):
    """A folder of tasks whose playground reads the small held-out set."""
    source = (ROOT / "eval/playground.py").read_text(encoding="utf-8")
    source = source.replace('"playground/data/mini/heldout"', repr(str(heldout.parent)))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/playground.py").write_text(source, encoding="utf-8")
    return tmp_path / "tasks"


@pytest.fixture()
def checkpoint(tmp_path):
    model, processor = tiny_model()
    model.save_pretrained(tmp_path / "run/export")
    processor.save_pretrained(tmp_path / "run/export")
    return tmp_path / "run"


def test_a_checkpoint_is_asked_scored_and_reported(checkpoint, folder, tmp_path):
    options = {"shuffle_images": True, "conversations": 2, "progress": False, "folder": folder}
    results = evaluate_checkpoint(checkpoint, ["playground"], **options)
    output = checkpoint / "eval"
    assert json.loads((output / "results.json").read_text()) == results
    result = results["tasks"]["playground"]
    assert result["counts"]["asked"] == result["shuffled"]["counts"]["answered"] == 10
    assert results["model"]["connector"] == "mlp"
    assert [len(talk["turns"]) for talk in results["conversations"]] == [2, 2]
    again = evaluate_checkpoint(checkpoint, "playground", **options)
    assert again["tasks"]["playground"]["counts"]["resumed"] == 10
    assert again["tasks"]["playground"]["metrics"] == result["metrics"]
    fresh = evaluate_checkpoint(checkpoint, "playground", fresh=True, **options)
    assert fresh["tasks"]["playground"]["counts"]["resumed"] == 0
    table = format_results(results)
    assert "pictures shuffled" in table
    assert "asked 10, answered 10, missing 0" in table
    page = write_report(tmp_path / "report.html", title="t", results=output).read_text(encoding="utf-8")
    assert page.count("data:image/") > 10


def test_unknown_tasks_and_checkpoints(checkpoint, folder, tmp_path):
    with pytest.raises(ConfigError, match=r"unknown task 'playgruond'\. Did you mean 'playground'"):
        evaluate_checkpoint(checkpoint, "playgruond", folder=folder)
    with pytest.raises(ConfigError, match="no task given"):
        evaluate_checkpoint(checkpoint, " ,", folder=folder)
    with pytest.raises(MissingFileError, match="no exported model at"):
        evaluate_checkpoint(tmp_path / "none", "playground", folder=folder)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_results_that_cannot_be_written(checkpoint, folder, tmp_path):
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file/below", "/proc/nothing"):
        with pytest.raises(
            ConfigError, match=r"results cannot be written to .*Choose another folder \(--output\)"
        ):
            evaluate_checkpoint(checkpoint, "playground", place, folder=folder, progress=False)


def test_answers_of_other_weights_are_not_mixed(checkpoint, folder, tmp_path):
    how = {"folder": folder, "progress": False}
    evaluate_checkpoint(checkpoint, "playground", tmp_path / "out", limit=2, **how)
    before = (tmp_path / "out/results.json").read_bytes()
    model, processor = tiny_model(seed=1)
    model.save_pretrained(tmp_path / "other/export")
    processor.save_pretrained(tmp_path / "other/export")
    with pytest.raises(DataError, match=r"holds 2 answer\(s\) given by another model.*--fresh"):
        evaluate_checkpoint(tmp_path / "other", "playground", tmp_path / "out", limit=2, **how)
    assert (tmp_path / "out/results.json").read_bytes() == before
    evaluate_checkpoint(tmp_path / "other", "playground", tmp_path / "out", limit=2, fresh=True, **how)


def test_answer_files_of_any_model_are_scored(folder, heldout, tmp_path):
    rows = [{"question_id": str(i), "text": f"{i}."} for i in range(8)]
    rows += [{"question_id": 8, "text": "second"}, {"question_id": 9, "text": "second"}]
    path = write(tmp_path / "p.jsonl", rows)
    for questions in (None, heldout):
        result = score_predictions("playground", path, questions, folder=folder)
        assert result["metrics"]["overall"]["correct"] == 9
        assert result["counts"] == {"asked": 10, "answered": 10, "missing": 0, "unparsable": 0, "cut": 0}
    few = write(tmp_path / "few.jsonl", rows[:4])
    with pytest.raises(
        DataError,
        match=r"6 question\(s\) not answered \(--allow-missing .*\), such as '4', '5', '6'; the file has 4",
    ):
        score_predictions("playground", few, folder=folder)
    result = score_predictions("playground", few, folder=folder, allow_missing=True)
    assert result["metrics"]["overall"]["correct"] == 4
    assert result["metrics"]["overall"]["total"] == 10
    assert result["counts"]["missing"] == 6


@pytest.mark.parametrize(
    ("extra", "text"),
    [
        (
            {"question_id": 3, "text": "x"},
            r"1 question\(s\) answered twice, such as '3'; the file has 11 answers",
        ),
        ({"question_id": 77, "text": "x"}, r"1 question\(s\) not asked by playground, such as '77'"),
    ],
)
def test_wrong_answer_files_are_refused(folder, tmp_path, extra, text):
    rows = [{"question_id": i, "text": "x"} for i in range(10)]
    with pytest.raises(DataError, match=text):
        score_predictions("playground", write(tmp_path / "p.jsonl", [*rows, extra]), folder=folder)
    with pytest.raises(DataError, match="holds no answer"):
        score_predictions("playground", write(tmp_path / "e.jsonl", []), folder=folder)


def test_conversations_are_about_one_set_of_pictures(folder):
    task = load_task("playground", folder=folder)
    talks = pick_conversations(task, 3)
    assert len(talks) == 3
    assert all(len({s.images for s in talk}) == 1 and len(talk) == 2 for talk in talks)
    assert pick_conversations(task, 0) == []
