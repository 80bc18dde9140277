"""Answers in the benchmarks' own layouts: taken as the official scripts take them, and nothing else as an answer."""

from __future__ import annotations

import pytest

from vlmamba.errors import DataError

GQA = {str(n): {"question": "What?", "imageId": "1", "answer": "dog"} for n in range(4)}
PICTURES = [f"VizWiz_val_{n:08d}.jpg" for n in range(3)]
TEXTVQA = [
    {"image_id": "im", "question": f"What {n}?", "question_id": n, "answers": ["x"] * 10} for n in range(3)
]


@pytest.fixture()
def gqa(files):
    return files.json("gqa/testdev_balanced_questions.json", GQA)


@pytest.fixture()
def vizwiz(files):
    rows = [{"image": name, "question": "What?", "answers": [{"answer": "he's"}] * 10} for name in PICTURES]
    return files.json("vizwiz/val.json", rows)


def test_gqa_predictions_are_compared_as_they_are(files, gqa, score):
    texts = ["dog", "Dog", "dog.", "Dog.."]
    official = [{"questionId": str(n), "prediction": text} for n, text in enumerate(texts)]
    result = score("gqa", files.json("p.json", official), gqa)
    assert result["metrics"]["official"]["accuracy"] == 25.0  # what eval.py prints for this file
    answers = [{"question_id": str(n), "text": text} for n, text in enumerate(texts)]
    assert score("gqa", files.lines("a.jsonl", answers), gqa)["metrics"]["official"]["accuracy"] == 100.0


def test_vizwiz_uploads_do_not_pass_m4c_twice(files, vizwiz, score):
    # The rule leaves "he's" as it is; m4c would make "he 's" of it, which nobody said.
    upload = [{"image": name, "answer": "he's"} for name in PICTURES]
    assert score("vizwiz_val", files.json("u.json", upload), vizwiz)["headline"]["value"] == 100.0
    answers = [{"question_id": name.removesuffix(".jpg"), "text": "he's"} for name in PICTURES]
    assert score("vizwiz_val", files.lines("a.jsonl", answers), vizwiz)["headline"]["value"] == 0.0


@pytest.mark.parametrize("answer", [None, ["dog"], {"a": 1}])
def test_no_text_is_no_answer(files, gqa, score, answer):
    rows = [{"questionId": key, "prediction": "dog" if key != "2" else answer} for key in GQA]
    with pytest.raises(DataError, match=r"1 of 4 answers are no text, such as those to the questions '2'"):
        score("gqa", files.json("p.json", rows), gqa)


@pytest.mark.parametrize("key", [None, ["a"], 1.5])
def test_ids_are_texts_or_numbers(files, gqa, score, key):
    rows = [{"questionId": k if k != "1" else key, "prediction": "dog"} for k in GQA]
    with pytest.raises(
        DataError, match=r"1 of 4 rows are no answers, such as .*row 2: each needs questionId"
    ):
        score("gqa", files.json("p.json", rows), gqa)


def test_rows_must_be_objects(files, score):
    data = files.json("t/TextVQA_0.5.1_val.json", {"data": TEXTVQA})
    rows = [{"question_id": 0, "answer": "x"}, 5, {"question_id": ["a"], "answer": "x"}]
    with pytest.raises(DataError, match="2 of 3 rows are no answers"):
        score("textvqa", files.json("p.json", rows), data)


def test_question_in_messages_where_ids_are_not_unique(files, score):
    data = files.json("t/TextVQA_0.5.1_val.json", {"data": TEXTVQA})
    with pytest.raises(
        DataError, match=r"2 question\(s\) not answered .*'im' \('What 1\?'\), 'im' \('What 2"
    ):
        score("textvqa", files.json("p.json", [{"question_id": 0, "answer": "x"}]), data)
    with pytest.raises(DataError, match=r"a.jsonl, question 'im': no TextVQA question in the prompt 'q'"):
        score("textvqa", files.lines("a.jsonl", [{"question_id": "im", "prompt": "q", "text": "x"}]), data)


def test_one_line_of_another_layout_is_named(files, gqa, score):
    wrong = files.json("w.json", [{"question_id": 1, "answer": "x"}])
    with pytest.raises(
        DataError, match=r"holds no answer to 'gqa': a JSON array of 1 row.* answer, question_id"
    ):
        score("gqa", wrong, gqa, allow_missing=True)


def test_mmbench_index_that_is_no_number(files, score):
    rows = [
        {"index": 1, "question": "q", "A": "x", "B": "y", "answer": "A", "image": "QUJD" * 40},
    ]
    data = files.table("m/mmbench_dev_20230712.tsv", rows)
    answers = files.table("p.csv", [{"index": "first", "prediction": "A"}])
    with pytest.raises(DataError, match=r"1 question\(s\) have an index that is no number, such as 'first'"):
        score("mmbench", answers, data)


def test_scienceqa_outputs_for_other_problems(files, score):
    problems = {
        str(n): {
            "question": "q",
            "choices": ["x", "y"],
            "answer": 0,
            "image": "image.png" if n else None,
            "split": "test",
        }
        for n in range(2)
    }
    data = files.json("s/problems.json", problems)
    outputs = files.json("o.json", {"outputs": {"0": "A", "1": "A", "9": "B"}})
    with pytest.raises(DataError, match=r"1 question\(s\) not asked by scienceqa, such as '9'"):
        score("scienceqa", outputs, data)
    assert score("scienceqa_img", outputs, data)["counts"]["asked"] == 1


def test_mm_vet_answers_with_llavas_ids(files, score):
    row = {"imagename": "a.png", "question": "q", "answer": "a", "capability": ["rec"]}
    data = files.json("mm-vet/mm-vet.json", {"v1_0": row, "v1_1": row})
    answers = files.lines("a.jsonl", [{"question_id": n, "prompt": "q", "text": f"t{n}"} for n in range(2)])
    upload = files.root / "up.json"
    score("mm_vet", answers, data, submission=upload)
    assert upload.read_text() == '{\n  "v1_0": "t0",\n  "v1_1": "t1"\n}'
