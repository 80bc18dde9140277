"""ScienceQA: prompts word for word from LLaVA's file or rendered, text-only questions, both headlines."""

from __future__ import annotations

import pytest

from vlmamba.errors import DataError, MissingFileError

LETTER = "Answer with the option's letter from the given choices directly."


def problem(choices, answer, image=None, hint=""):
    return {
        "question": "Which one?",
        "choices": choices,
        "answer": answer,
        "hint": hint,
        "image": image,
        "subject": "natural science",
        "grade": "grade2",
        "topic": "biology",
        "split": "test",
    }


PROBLEMS = {
    "4": problem(["ice", "fire"], 1, "image.png", "It is hot."),
    "11": problem(["a", "b", "c"], 2),
    "5": problem(["x", "y"], 0, "image.png") | {"split": "train"},
}


@pytest.fixture()
def official(files):
    files.json("sqa/pid_splits.json", {"test": ["4", "11"], "train": ["5"]})
    return files.json("sqa/problems.json", PROBLEMS)


def test_official_problems(files, official, load, score):
    task = load("scienceqa", official.parent)
    assert [s.question_id for s in task.samples] == ["4", "11"]
    assert task.samples[0].text == f"Context: It is hot.\nWhich one?\nA. ice\nB. fire\n{LETTER}"
    assert task.samples[0].images == (official.parent / "images/test/4/image.png",)
    assert (task.samples[1].images, task.samples[1].answer) == ((), "C")
    assert [s.question_id for s in load("scienceqa_img", official).samples] == ["4"]
    assert [s.question_id for s in load("scienceqa", official, split="train").samples] == ["5"]
    answers = files.lines("a.jsonl", [{"question_id": "4", "text": "B"}, {"question_id": "11", "text": "A"}])
    result = score("scienceqa", answers, official)
    assert result["headline"] == {
        "name": "ScienceQA-IMG accuracy",
        "value": 100.0,
        "unit": "%",
    }
    assert result["metrics"]["official"]["acc"] == 50.0
    dotted = files.lines("b.jsonl", [{"question_id": "4", "text": "B."}])
    assert score("scienceqa_img", dotted, official)["headline"]["value"] == 0.0
    assert score("scienceqa_lmms", dotted, official)["headline"]["value"] == 100.0
    (official.parent / "pid_splits.json").unlink()
    assert [s.question_id for s in load("scienceqa", official).samples] == ["4", "11"]


def test_llavas_questions_are_asked_word_for_word(files, official, load, score):
    rows = [
        {
            "id": "11",
            "conversations": [{"from": "human", "value": "Its own words"}, {"from": "gpt", "value": "C"}],
        },
        {
            "id": "4",
            "image": "4/image.png",
            "conversations": [{"from": "human", "value": "<image>\nWith picture\n"}],
        },
    ]
    path = files.json("sqa/llava_test_CQM-A.json", rows)
    task = load("scienceqa", path.parent)
    assert [s.text for s in task.samples] == ["Its own words", "With picture"]
    assert task.samples[1].images == (path.parent / "images/test/4/image.png",)
    assert task.settings["prompt"] == "word for word of llava_test_CQM-A.json"
    outputs = {"acc": 1, "results": {}, "outputs": {"4": "B", "11": "FAILED"}}
    result = files.json("result.json", outputs)
    with pytest.raises(DataError, match=r"1 question\(s\) not answered .* such as '11'"):
        score("scienceqa", result, path)
    scored = score("scienceqa", result, path, allow_missing=True)
    assert (scored["counts"]["missing"], scored["headline"]["value"]) == (1, 100.0)
    files.json("sqa/llava_test_CQM-A.json", [*rows, {**rows[0], "id": "99"}])
    with pytest.raises(DataError, match=r"1 question\(s\) of 3 are not in .*problems\.json, such as '99'"):
        load("scienceqa", path)
    official.unlink()
    with pytest.raises(
        MissingFileError, match=r"the questions of ScienceQA, not the answers: problems\.json is not beside"
    ):
        load("scienceqa", path)


def test_hugging_face(files, load, score, png):
    rows = list(PROBLEMS.values())[:2]
    columns = {key: [row[key] for row in rows] for key in rows[0] if key != "image"}
    path = files.parquet("hf/test-0.parquet", {**columns, "image": [{"bytes": png, "path": None}, None]})
    task = load("scienceqa", path)
    assert task.samples[0].images[0].read() == png
    assert task.samples[1].images == ()
    answers = files.lines("a.jsonl", [{"question_id": s.question_id, "text": s.answer} for s in task.samples])
    assert score("scienceqa", answers, path)["metrics"]["img"]["total"] == 1


def test_what_is_wrong_is_said(files, official, load):
    with pytest.raises(MissingFileError, match=r"llava_test_CQM-A\.json \(LLaVA's questions"):
        load("scienceqa")
    with pytest.raises(DataError, match=r"pid_splits\.json has no split 'tset': it has test, train"):
        load("scienceqa", official, split="tset")
    files.json("sqa/pid_splits.json", {"test": ["4", "77"]})
    with pytest.raises(DataError, match=r"1 question\(s\) of the split test are not in .*, such as '77'"):
        load("scienceqa", official)
    with pytest.raises(DataError, match="no data file of ScienceQA"):
        load("scienceqa", files.json("x.json", {"a": {"b": 1}}))
    bad = {"4": {**PROBLEMS["4"], "answer": 2}}
    with pytest.raises(DataError, match="problem 4: the answer 2 is none of 2 choices"):
        load("scienceqa", files.json("y.json", bad))
