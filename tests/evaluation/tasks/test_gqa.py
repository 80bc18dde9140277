"""GQA: official questions alone, LLaVA's with the official ones, shards, the hub; predictions and their file."""

from __future__ import annotations

import json

import pytest

from vlmamba.errors import DataError, MissingFileError

SUFFIX = "\nAnswer the question using a single word or phrase."


def row(question, answer, structural="query", balanced=True, entailed=()):
    return {
        "semantic": [{"operation": "select", "dependencies": [], "argument": "dog (1)"}],
        "entailed": list(entailed),
        "equivalent": [],
        "question": question,
        "imageId": "n1",
        "isBalanced": balanced,
        "groups": {"global": "dog", "local": "x"},
        "answer": answer,
        "types": {"detailed": "d", "semantic": "obj", "structural": structural},
        "fullAnswer": answer,
    }


QUESTIONS = {
    "07": row("Who is it?", "dog"),
    "12": row("Is it red?", "yes", "verify"),
    "9": row("Is it blue?", "no", "verify"),
}


@pytest.fixture()
def official(files):
    return files.json("gqa/testdev_balanced_questions.json", QUESTIONS)


def predictions(files, name="p.json", **texts):
    given = {"07": "dog", "12": "yes", "9": "yes"} | texts
    return files.json(name, [{"questionId": k, "prediction": v} for k, v in given.items()])


def test_the_questions_file_is_all_that_is_needed(files, official, load, score):
    task = load("gqa", official.parent)
    assert [s.question_id for s in task.samples] == ["07", "12", "9"]
    assert task.samples[0].text == "Who is it?" + SUFFIX
    assert task.samples[0].images == (official.parent / "images/n1.jpg",)
    result = score("gqa", predictions(files), official)
    assert result["metrics"]["official"]["accuracy"] == pytest.approx(200 / 3)
    assert result["metrics"]["official"]["binary"] == 50.0
    assert "consistency" not in result["metrics"]["official"]
    raw = files.lines(
        "a.jsonl",
        [{"question_id": k, "text": t} for k, t in (("07", "Dog.."), ("12", "Yes"), ("9", "No, it"))],
    )
    assert score("gqa", raw, official)["metrics"]["overall"]["correct"] == 2
    # "a dog!" is right for lmms-eval without its punctuation only if the words agree
    loud = files.lines(
        "b.jsonl", [{"question_id": k, "text": t} for k, t in (("07", " dog!"), ("12", "Yes"), ("9", "no"))]
    )
    assert score("gqa", loud, official)["metrics"]["overall"]["correct"] == 2
    assert score("gqa_lmms", loud, official)["metrics"]["overall"]["correct"] == 3


def test_llavas_questions_take_answers_from_the_official_file(files, load, score):
    rows = [
        {"question_id": k, "image": "n1.jpg", "text": r["question"] + SUFFIX} for k, r in QUESTIONS.items()
    ]
    path = files.lines("gqa/llava_gqa_testdev_balanced.jsonl", rows[::-1])
    with pytest.raises(
        MissingFileError, match=r"has the questions of GQA, not the answers: testdev_balanced_questions\.json"
    ):
        load("gqa", path)
    files.json("gqa/data/questions1.2/testdev_balanced_questions.json", QUESTIONS)
    task = load("gqa", path.parent)
    assert [(s.question_id, s.answer) for s in task.samples] == [("9", "no"), ("12", "yes"), ("07", "dog")]
    assert task.samples[0].images[0] == path.parent / "data/images/n1.jpg"
    files.lines("gqa/llava_gqa_testdev_balanced.jsonl", [*rows, {**rows[0], "question_id": "77"}])
    with pytest.raises(DataError, match=r"1 question\(s\) of 4 are not in .*, such as '77'"):
        load("gqa", path)


def test_the_predictions_file_is_llavas(files, official, score):
    raw = files.lines("a.jsonl", [{"question_id": k, "text": f"{k} Dog.."} for k in QUESTIONS])
    score("gqa", raw, official, submission=files.root / "out.json")
    assert (files.root / "out.json").read_text() == (
        '[{"questionId": "07", "prediction": "07 dog"}, {"questionId": "12", "prediction": "12 dog"}, '
        '{"questionId": "9", "prediction": "9 dog"}]'
    )
    few = files.lines("b.jsonl", [{"question_id": "07", "text": "x"}])
    with pytest.raises(DataError, match=r"2 question\(s\) have no answer, and the official script"):
        score("gqa", few, official, submission=files.root / "out.json", allow_missing=True)


def test_an_all_tier_in_shards_gives_consistency_validity_plausibility(files, load, score):
    rows = {"1": row("Who?", "dog", entailed=["1", "2"]), "2": row("Is it?", "yes", "verify", balanced=False)}
    for at, key in enumerate(rows):
        files.json(f"gqa/val_all_questions/val_all_questions_{at}.json", {key: rows[key]})
    files.json("gqa/val_choices.json", {k: {"valid": ["dog", "yes"], "plausible": ["dog"]} for k in rows})
    task = load("gqa_val_all", files.root / "gqa")
    assert len(task.samples) == 2
    path = files.json(
        "p.json", [{"questionId": "1", "prediction": "dog"}, {"questionId": "2", "prediction": "no"}]
    )
    official = score("gqa_val_all", path, files.root / "gqa")["metrics"]["official"]
    assert (official["accuracy"], official["consistency"]) == (100.0, 0.0)
    assert (official["validity"], official["plausibility"]) == (100.0, 100.0)
    files.json("gqa/val_all_questions/val_all_questions_7.json", {"1": rows["1"]})
    with pytest.raises(DataError, match=r"val_all_questions_7\.json: 1 question\(s\) are in another shard"):
        load("gqa_val_all", files.root / "gqa")


def test_hugging_face_has_questions_and_pictures_apart(files, load, score, png):
    keys = list(QUESTIONS)
    path = files.parquet(
        "hf/testdev-0.parquet",
        {
            "id": keys,
            "imageId": ["n1"] * 3,
            "question": [r["question"] for r in QUESTIONS.values()],
            "answer": [r["answer"] for r in QUESTIONS.values()],
            "isBalanced": [True] * 3,
            "types": [r["types"] for r in QUESTIONS.values()],
            "groups": [r["groups"] for r in QUESTIONS.values()],
        },
    )
    files.parquet(
        "hf/images/testdev-0.parquet",
        {"id": ["n0", "n1"], "image": [{"bytes": b, "path": None} for b in (png[:-1], png)]},
    )
    task = load("gqa", path)
    assert task.samples[2].images[0].read() == png
    assert score("gqa", predictions(files), path)["metrics"]["overall"]["correct"] == 2


def test_what_is_wrong_is_said(files, official, load, score):
    with pytest.raises(
        MissingFileError, match=r"the data of GQA are not there. Looked in playground/data/eval/gqa"
    ):
        load("gqa")
    with pytest.raises(DataError, match=r"no data file of GQA: a questions file is one object of rows"):
        load("gqa", files.json("x.json", {"annotations": []}))
    broken = json.loads(official.read_text())
    del broken["9"]["answer"]
    with pytest.raises(
        DataError, match=r"1 question\(s\) of 3 lack question, imageId or answer, such as '9'"
    ):
        load("gqa", files.json("x.json", broken))
    pope = files.lines("p.jsonl", [{"question_id": 1, "text": "yes"}])
    with pytest.raises(
        DataError, match=r"no answer is to a question of 'gqa'; ids are such as '1', the task's such as '07'"
    ):
        score("gqa", pope, official)
