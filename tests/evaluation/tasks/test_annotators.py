"""TextVQA with and without OCR tokens, VizWiz: questions whose answers ten annotators gave."""

from __future__ import annotations

import json

import pytest

from vlmamba.errors import DataError, MissingFileError

SHORT = "Answer the question using a single word or phrase."
VIZWIZ = f"\nWhen the provided information is insufficient, respond with 'Unanswerable'.\n{SHORT}"


# TextVQA: two questions on one picture share LLaVA's question id.
TEXTVQA = [
    {"question": "What is the Brand?", "image_id": "im1", "answers": ["Nokia"] * 10, "question_id": 34602},
    {
        "question": "what time is it?",
        "image_id": "im1",
        "answers": ["10:10"] * 3 + ["ten"] * 7,
        "question_id": 34603,
    },
    {"question": "Who?", "image_id": "im2", "answers": ["men's"] * 10, "question_id": 34604},
]


@pytest.fixture()
def textvqa(files):
    files.json("textvqa/TextVQA_0.5.1_val.json", {"dataset_type": "val", "data": TEXTVQA})
    rows = [
        {
            "question_id": row["image_id"],
            "image": f"{row['image_id']}.jpg",
            "text": f"{row['question']}\nReference OCR token: NOKIA, a:b\n{SHORT}",
        }
        for row in TEXTVQA
    ]
    return files.lines("textvqa/llava_textvqa_val_v051_ocr.jsonl", rows)


def test_textvqa_asks_without_and_textvqa_ocr_with_tokens(textvqa, load):
    plain, ocr = load("textvqa", textvqa.parent), load("textvqa_ocr", textvqa.parent)
    assert plain.samples[0].text == f"What is the Brand?\n{SHORT}"
    assert ocr.samples[0].text == f"What is the Brand?\nReference OCR token: NOKIA, a:b\n{SHORT}"
    assert plain.samples[0].images == ocr.samples[0].images == (textvqa.parent / "train_images/im1.jpg",)
    assert load("textvqa", textvqa).samples[1].text == f"what time is it?\n{SHORT}"
    assert plain.references != ocr.references
    assert "OCR" in ocr.settings["prompt"] and "OCR" not in plain.settings["prompt"]


def test_textvqa_answers_are_filed_under_picture_and_question(files, textvqa, load, score):
    task = load("textvqa_ocr", textvqa)
    texts = ["nokia", "10:10", "Men's"]
    rows = [
        {"question_id": s.question_id, "prompt": s.text, "text": t}
        for s, t in zip(task.samples, texts, strict=True)
    ]
    path = files.lines("a.jsonl", rows[::-1])
    result = score("textvqa_ocr", path, textvqa)
    assert result["metrics"]["official"] == {"accuracy": round(100 * 2.9 / 3, 2)}
    assert (
        score("textvqa", path, textvqa.parent)["metrics"] == result["metrics"]
    )  # prompts differ, questions do not
    server = files.json(
        "s.json",
        [{"question_id": r["question_id"], "answer": t} for r, t in zip(TEXTVQA, texts, strict=True)],
    )
    assert score("textvqa", server, textvqa.parent)["metrics"] == result["metrics"]
    bare = files.lines("b.jsonl", [{"question_id": r["question_id"], "text": r["text"]} for r in rows])
    with pytest.raises(DataError, match=r'ids are not unique here, so each line needs "prompt"'):
        score("textvqa_ocr", bare, textvqa)
    score("textvqa_ocr", path, textvqa, submission=files.root / "up.json")
    assert (files.root / "up.json").read_text() == (
        '[{"question_id": 34602, "answer": "nokia"}, {"question_id": 34603, "answer": "10:10"}, '
        '{"question_id": 34604, "answer": "men \'s"}]'
    )


def test_textvqa_hugging_face(files, load, score, png):
    columns = {key: [row[key] for row in TEXTVQA] for key in TEXTVQA[0]}
    columns |= {"ocr_tokens": [["A", "b"], ["A", "b"], []], "image": [{"bytes": png, "path": None}] * 3}
    path = files.parquet("hf/validation-0.parquet", columns)
    assert (
        load("textvqa_ocr", path).samples[0].text == f"What is the Brand?\nReference OCR token: A, b\n{SHORT}"
    )
    task = load("textvqa", path)
    rows = [{"question_id": s.question_id, "prompt": s.text, "text": s.answer[0]} for s in task.samples]
    assert score("textvqa", files.lines("a.jsonl", rows), path)["counts"]["answered"] == 3


def test_textvqa_says_what_is_wrong(files, textvqa, load, score):
    with pytest.raises(MissingFileError, match=r"the data of TextVQA with OCR tokens are not there"):
        load("textvqa_ocr")
    alone = files.json("alone/TextVQA_0.5.1_val.json", {"data": TEXTVQA})
    with pytest.raises(
        DataError, match=r"has no OCR tokens; llava_textvqa_val_v051_ocr\.jsonl is not beside it"
    ):
        load("textvqa_ocr", alone)
    with pytest.raises(
        DataError, match=r"1 question\(s\) occur more than once in the data of TextVQA, such as \('im1'"
    ):
        load("textvqa", files.json("alone/TextVQA_0.5.1_val.json", {"data": [*TEXTVQA, TEXTVQA[0]]}))
    files.json("textvqa/TextVQA_0.5.1_val.json", {"data": TEXTVQA[:2]})
    with pytest.raises(
        DataError, match=r"1 question\(s\) of 3 have no annotation .* such as \('im2', 'who\?'\)"
    ):
        load("textvqa_ocr", textvqa)
    with pytest.raises(DataError, match=r"no data file of TextVQA: one JSON object with keys questions"):
        load("textvqa", files.json("x.json", {"questions": []}))


def vizwiz_rows(labelled=True):
    rows = [{"image": f"VizWiz_val_{i:08d}.jpg", "question": f"What {i}?"} for i in range(2)]
    if labelled:
        for row, answers, kind in zip(
            rows, (["Unanswerable"] * 10, ["can"] * 10), ("unanswerable", "other"), strict=True
        ):
            row["answers"] = [{"answer": a, "answer_confidence": "yes"} for a in answers]
            row |= {"answer_type": kind, "answerable": int(kind == "other")}
    return rows


def test_vizwiz_val_is_scored_by_three_rules(files, load, score):
    path = files.json("vizwiz/val.json", vizwiz_rows())
    task = load("vizwiz_val", path.parent)
    assert task.samples[0].text == "What 0?" + VIZWIZ
    assert task.samples[0].images == (path.parent / "val/VizWiz_val_00000000.jpg",)
    answers = files.json(
        "a.json",
        [
            {"image": "VizWiz_val_00000001.jpg", "answer": "A can."},
            {"image": "VizWiz_val_00000000.jpg", "answer": "Unanswerable"},
        ],
    )
    # annotators' "Unanswerable" is taken as written, the prediction in lower case
    assert score("vizwiz_val", answers, path)["headline"]["value"] == 50.0
    assert score("vizwiz_official", answers, path)["headline"]["value"] == 50.0
    assert score("vizwiz_lmms", answers, path)["headline"]["value"] == 100.0
    unanswerability = score("vizwiz_val", answers, path)["metrics"]["official"]["unanswerability"]
    assert unanswerability["f1_score"] == 100.0


def test_vizwiz_test_is_submitted(files, load, score):
    rows = [
        {"question_id": f"q{i}", "image": f"VizWiz_test_{i:08d}.jpg", "text": f"What {i}?{VIZWIZ}"}
        for i in (1, 0)
    ]
    path = files.lines("vizwiz/llava_test.jsonl", rows)
    assert load("vizwiz", path.parent).samples[0].images[0] == path.parent / "test/VizWiz_test_00000001.jpg"
    answers = files.lines(
        "a.jsonl", [{"question_id": "q0", "text": "Unanswerable."}, {"question_id": "q1", "text": "Two"}]
    )
    with pytest.raises(DataError, match="this split of VizWiz has no public answers"):
        score("vizwiz", answers, path)
    score("vizwiz", answers, path, submission=files.root / "up.json")
    assert (files.root / "up.json").read_text() == (
        '[{"image": "VizWiz_test_00000001.jpg", "answer": "2"}, '
        '{"image": "VizWiz_test_00000000.jpg", "answer": "unanswerable"}]'
    )
    few = files.lines("b.jsonl", [{"question_id": "q0", "text": "x"}])
    with pytest.raises(
        DataError, match=r"1 question\(s\) of 2 have no answer, and the server wants all, such as 'q1'"
    ):
        score("vizwiz", few, path, submission=files.root / "up.json", allow_missing=True)
    official = files.json("official/test.json", vizwiz_rows(labelled=False))
    assert load("vizwiz", official).samples[1].question_id == "VizWiz_val_00000001"


def test_vizwiz_hugging_face_and_wrong_files(files, load, score, png):
    path = files.parquet(
        "hf/val-0.parquet",
        {
            "question_id": ["VizWiz_val_00000000.jpg", "VizWiz_val_00000001.jpg"],
            "question": ["What 0?", "What 1?"],
            "answers": [["unanswerable"] * 10, ["can"] * 10],
            "category": ["unanswerable", "other"],
            "image": [{"bytes": png, "path": None}] * 2,
        },
    )
    task = load("vizwiz_val", path)
    rows = [{"question_id": s.question_id, "text": s.answer[0]} for s in task.samples]
    assert score("vizwiz_val", files.lines("a.jsonl", rows), path)["headline"]["value"] == 100.0
    some = vizwiz_rows()
    del some[1]["answers"]
    with pytest.raises(
        DataError, match=r"1 question\(s\) of 2 have no answers, such as 'VizWiz_val_00000001\.jpg'"
    ):
        load("vizwiz_val", files.json("v/val.json", some))
    with pytest.raises(DataError, match="no data file of VizWiz"):
        load("vizwiz", files.json("x.json", json.loads('{"a": 1}')))
