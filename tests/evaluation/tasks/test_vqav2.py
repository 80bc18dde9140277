"""VQAv2: test-dev and val, three layouts, the server's file, official result files."""

from __future__ import annotations

import json

import pytest

from vlmamba.errors import DataError, ImageError, MissingFileError
from vlmamba.evaluation.task import Task

SUFFIX = "\nAnswer the question using a single word or phrase."
GOLD = {1: ["yes"] * 10, 2: ["2"] * 6 + ["two"] * 3 + ["3"], 3: ["red"] * 3 + ["dark red"] * 7}
TYPES = {1: "yes/no", 2: "number", 3: "other"}


def questions(subtype="val2014"):
    rows = [{"image_id": 42 + i, "question": f"What {i}?", "question_id": i} for i in (1, 2, 3)]
    return {
        "info": {},
        "task_type": "Open-Ended",
        "data_type": "mscoco",
        "data_subtype": subtype,
        "questions": rows,
    }


def annotations():
    rows = [
        {
            "question_type": "what",
            "multiple_choice_answer": gold[0],
            "answers": [
                {"answer": a, "answer_confidence": "yes", "answer_id": n + 1} for n, a in enumerate(gold)
            ],
            "image_id": 42 + i,
            "answer_type": TYPES[i],
            "question_id": i,
        }
        for i, gold in GOLD.items()
    ]
    return {"info": {}, "data_subtype": "val2014", "annotations": rows[::-1]}


@pytest.fixture()
def val(files):
    files.json("vqa/v2_OpenEnded_mscoco_val2014_questions.json", questions())
    files.json("vqa/v2_mscoco_val2014_annotations.json", annotations())
    return files.root / "vqa"


@pytest.fixture()
def testdev(files):
    rows = [
        {"question_id": i, "image": f"COCO_test2015_{i:012d}.jpg", "text": f"What {i}?" + SUFFIX}
        for i in (30, 10, 20, 40)
    ]
    files.lines("test/llava_vqav2_mscoco_test2015.jsonl", rows)
    return files.lines("test/llava_vqav2_mscoco_test-dev2015.jsonl", [rows[1], rows[2]])


RESULT = [
    {"question_id": 1, "answer": "Yes"},
    {"question_id": 2, "answer": "2"},
    {"question_id": 3, "answer": "red."},
]


def test_official_files_and_result_file(files, val, load, score):
    task = load("vqav2_val", val)
    assert [s.question_id for s in task.samples] == [1, 2, 3]  # the order of the questions
    assert task.samples[0].text == "What 1?" + SUFFIX
    assert task.samples[0].images == (val / "val2014/COCO_val2014_000000000043.jpg",)
    assert task.samples[1].answer == GOLD[2]
    path = files.json("result.json", RESULT)
    result = score("vqav2_val", path, val)
    # "Yes" against ten "yes" scores nothing: all agree, so nothing is normalised; three of ten give 0.9
    assert result["metrics"]["official"]["overall"] == round((0 + 100 + 90) / 3, 2)
    assert result["metrics"]["official"]["perAnswerType"] == {"number": 100.0, "other": 90.0, "yes/no": 0.0}
    assert score("vqav2_lmms", path, val)["metrics"]["overall"]["correct"] == pytest.approx(2.9)
    lines = files.lines("a.jsonl", [{"question_id": r["question_id"], "text": r["answer"]} for r in RESULT])
    assert score("vqav2_val", lines, val)["metrics"] == result["metrics"]
    for file in ("v2_mscoco_val2014_annotations.json", "v2_OpenEnded_mscoco_val2014_questions.json"):
        assert score("vqav2", path, val / file)["metrics"] == result["metrics"]
    assert result["task_settings"]["split"] == "val2014"
    assert "Cobra-3.5B" in {r["model"] for r in result["references"]}


def test_annotations_alone_are_enough_to_score_and_not_to_ask(files, load, score):
    path = files.json("only/v2_mscoco_val2014_annotations.json", annotations())
    assert score("vqav2_val", files.json("r.json", RESULT), path)["metrics"]["overall"][
        "correct"
    ] == pytest.approx(1.9)
    task = load("vqav2_val", path)
    with pytest.raises(MissingFileError, match=r"v2_OpenEnded_mscoco_val2014_questions\.json"):
        task.prompt(task.samples[0])


def test_test_dev_is_not_scored_but_submitted(files, testdev, load, score):
    task = load("vqav2", testdev.parent)
    assert [s.question_id for s in task.samples] == [10, 20]
    assert task.samples[0].images == (testdev.parent / "test2015/COCO_test2015_000000000010.jpg",)
    answers = files.lines(
        "a.jsonl", [{"question_id": 20, "text": "Two men's"}, {"question_id": 10, "text": "Yes."}]
    )
    with pytest.raises(
        DataError, match=r"VQAv2 test-dev2015 has no public answers: send the submission file to https"
    ):
        score("vqav2", answers, testdev)
    target = files.root / "upload/x.json"
    result = score("vqav2", answers, testdev, submission=target)
    assert result["headline"]["value"] is None
    assert result["submission"] == str(target)
    assert target.read_text() == (
        '[{"question_id": 30, "answer": ""}, {"question_id": 10, "answer": "yes"}, '
        '{"question_id": 20, "answer": "2 men \'s"}, {"question_id": 40, "answer": ""}]'
    )
    (testdev.parent / "llava_vqav2_mscoco_test2015.jsonl").unlink()
    with pytest.raises(
        MissingFileError,
        match=r"only files that cover all of test2015.*looked for llava_vqav2_mscoco_test2015",
    ):
        score("vqav2", answers, testdev, submission=target)


def test_official_test_questions(files, load, score):
    path = files.json("t/v2_OpenEnded_mscoco_test-dev2015_questions.json", questions("test-dev2015"))
    task = load("vqav2", path)
    assert task.samples[0].images[0].name == "COCO_test2015_000000000043.jpg"
    assert task.settings["split"] == "test-dev2015"
    files.json("t/v2_OpenEnded_mscoco_test2015_questions.json", questions("test2015"))
    written = score("vqav2", files.json("r.json", RESULT), path, submission=files.root / "s.json")[
        "submission"
    ]
    assert len(json.loads((files.root / "s.json").read_text())) == 3 and written.endswith("s.json")


def test_hugging_face(files, load, score, png):
    path = files.parquet(
        "hf/validation-00000.parquet",
        {
            "question_id": list(GOLD),
            "image_id": [7, 7, 8],
            "question": ["What?"] * 3,
            "question_type": ["what"] * 3,
            "answer_type": list(TYPES.values()),
            "multiple_choice_answer": ["x"] * 3,
            "answers": [
                [{"answer": a, "answer_confidence": "yes", "answer_id": 1} for a in g] for g in GOLD.values()
            ],
            "image": [{"bytes": png, "path": None}] * 3,
        },
    )
    task = load("vqav2_val", path.parent)
    assert task.samples[0].images == task.samples[1].images != task.samples[2].images
    assert score("vqav2_val", files.json("r.json", RESULT), path)["metrics"]["overall"][
        "correct"
    ] == pytest.approx(1.9)


def test_what_is_wrong_is_said(files, val, load, score):
    pope = files.lines(
        "pope.jsonl", [{"question_id": 1, "image": "v1.png", "text": "x", "category": "random"}]
    )
    with pytest.raises(
        DataError, match=r"no data file of VQAv2: its first picture is 'v1.png', not COCO_\*.jpg"
    ):
        load("vqav2", pope)
    with pytest.raises(DataError, match="no data file of VQAv2: a JSON array of 3 row"):
        load("vqav2", files.json("r.json", RESULT))
    few = annotations()
    few["annotations"] = few["annotations"][:1]
    files.json("vqa/v2_mscoco_val2014_annotations.json", few)
    with pytest.raises(
        DataError,
        match=r"2 question\(s\) lack their annotations \(3 questions, 1 annotations\), such as 1, 2",
    ):
        load("vqav2_val", val)
    double = questions()
    double["questions"].append(double["questions"][0])
    files.json("vqa/v2_OpenEnded_mscoco_val2014_questions.json", double)
    with pytest.raises(
        DataError, match=r"1 question\(s\) occur more than once in the data of VQAv2, such as 1"
    ):
        load("vqav2_val", val)
    bad = files.lines(
        "b/llava_vqav2_mscoco_test-dev2015.jsonl", [{"question_id": 1, "image": "COCO_/../../x", "text": "?"}]
    )
    with pytest.raises(ImageError, match=r"jsonl:1: image path 'COCO_/../../x' leaves its root"):
        load("vqav2", bad)
    empty = files.text("b/empty.jsonl", "\n")
    with pytest.raises(DataError, match=r"empty\.jsonl is empty"):
        load("vqav2", empty)


def test_null_answers_are_refused(files, val, score):
    rows = [{"question_id": i, "text": None if i == 2 else "x"} for i in GOLD]
    with pytest.raises(
        DataError, match=r"1 of 3 answers are no text, such as those to the questions 2 \(None\)"
    ):
        score("vqav2_val", files.lines("a.jsonl", rows), val)


def test_shards_of_llava_are_joined(files, val, score):
    rows = [{"question_id": r["question_id"], "text": r["answer"]} for r in RESULT]
    for k, part in enumerate((rows[:2], rows[2:])):
        files.lines(f"ck/2_{k}.jsonl", part)
    assert score("vqav2_val", files.root / "ck", val)["counts"]["answered"] == 3
    (files.root / "ck/2_1.jsonl").unlink()
    with pytest.raises(DataError, match=r"does not hold shards 0 to 1 of one run: 2_0.jsonl"):
        score("vqav2_val", files.root / "ck", val)


def test_tasks_are_tasks(val, load):
    assert isinstance(load("vqav2_playground", val), Task)
