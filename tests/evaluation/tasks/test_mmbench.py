"""MMBench: TSV with rotations and picture pointers, the hub, circular scores, the server's sheet."""

from __future__ import annotations

import base64

import pytest

from vlmamba.errors import DataError, ImageError, MissingFileError
from vlmamba.evaluation.task import first_questions

LETTER = "Answer with the option's letter from the given choices directly."


def rows(png, pointers=False):
    """Two questions, of three and two options, each with all its rotations."""
    picture = base64.b64encode(png * 3).decode()
    found = []
    for index, options, hint in (
        (241, ["None", 'a "dog"', "cat"], "A hint\nof two lines"),
        (252, ["yes", "no"], ""),
    ):
        for k in range(len(options)):
            turned = options[k:] + options[:k]
            cells = dict(zip("ABCD", [*turned, "", ""], strict=False))
            found.append(
                {
                    "index": index + k * 1_000_000,
                    "question": "What\tis it?",
                    "hint": hint,
                    **cells,
                    "answer": "ABCD"[turned.index(options[1])],
                    "category": "object_localization" if index == 241 else "image_scene",
                    "image": str(index) if pointers and k else picture,
                    "source": "s",
                    "l2-category": "coarse_perception",
                    "comment": "NaN",
                    "split": "dev",
                }
            )
    return sorted(found, key=lambda row: row["index"])


@pytest.fixture()
def tsv(files, png):
    return files.table("mmbench/mmbench_dev_20230712.tsv", rows(png))


def answer_rows(task, text=lambda s: s.answer):
    return [{"question_id": s.question_id, "prompt": "x", "text": text(s)} for s in task.samples]


def test_prompts_options_and_rotations(tsv, load, png):
    task = load("mmbench", tsv.parent)
    assert [s.question_id for s in task.samples] == [241, 252, 1000241, 1000252, 2000241]
    first = task.samples[0]
    assert first.text == f'A hint\nof two lines\nWhat\tis it?\nA. None\nB. a "dog"\nC. cat\n{LETTER}'
    assert task.samples[1].text == f"What\tis it?\nA. yes\nB. no\n{LETTER}"
    assert (first.group, task.samples[2].group) == (241, 241)
    assert first.images == task.samples[2].images
    assert first.images[0].read() == png * 3
    assert task.max_new_tokens == 1024
    assert (task.settings["rows"], task.settings["questions"]) == (5, 2)
    assert [s.question_id for s in first_questions(task.samples, 1)] == [241, 1000241, 2000241]
    assert load("mmbench_cn", tsv).samples[1].text.endswith("B. no\n请直接回答选项字母。")


def test_circular_scores_from_answers_and_sheets(files, tsv, load, score):
    task = load("mmbench", tsv)
    right = files.lines("a.jsonl", answer_rows(task))
    result = score("mmbench", right, tsv)
    assert result["headline"] == {
        "name": "MMBench circular accuracy",
        "value": 100.0,
        "unit": "%",
    }
    always_b = score("mmbench", files.lines("b.jsonl", answer_rows(task, lambda s: "B")), tsv)
    assert always_b["headline"]["value"] == 0.0
    assert always_b["metrics"]["vanilla_main"]["correct"] == 2
    assert always_b["metrics"]["vanilla_all"]["correct"] == 2
    by_text = files.lines("c.jsonl", answer_rows(task, lambda s: f"It is {s.metadata['options'][s.answer]}"))
    assert score("mmbench", by_text, tsv)["headline"]["value"] == 100.0
    sheet = files.table("p.tsv", [{"index": s.question_id, "prediction": s.answer} for s in task.samples])
    assert score("mmbench", sheet, tsv)["headline"]["value"] == 100.0
    with pytest.raises(DataError, match=r"p\.csv lacks the column 'index' or 'prediction'"):
        score("mmbench", files.table("p.csv", [{"id": 1, "prediction": "A"}]), tsv)


def test_the_sheet_for_the_server(files, tsv, load, score):
    openpyxl = pytest.importorskip("openpyxl")
    task = load("mmbench", tsv)
    path = files.lines("a.jsonl", answer_rows(task, lambda s: f"{s.answer}. it is"))
    written = score("mmbench", path, tsv, submission=files.root / "up/mine.xlsx")["submission"]
    cells = [list(row) for row in openpyxl.load_workbook(written).active.values]
    assert cells[0] == ["index", "question", "A", "B", "C", "D", "prediction", "answer", "split"]
    assert cells[1] == [241, "What\tis it?", "None", 'a "dog"', "cat", None, "B. it is", "B", "dev"]
    assert len(cells) == 6
    assert score("mmbench", written, tsv)["headline"]["value"] == 100.0
    few = files.lines("few.jsonl", answer_rows(task)[:2])
    with pytest.raises(
        DataError, match=r"3 question\(s\) of 5 have no answer, and the server wants every rotation"
    ):
        score("mmbench", few, tsv, submission=files.root / "x.xlsx", allow_missing=True)


def test_a_split_without_answers_is_submitted_only(files, png, score):
    openpyxl = pytest.importorskip("openpyxl")
    bare = [
        {k: v for k, v in row.items() if k not in ("answer", "comment", "l2-category")} for row in rows(png)
    ]
    path = files.table("mmbench/mmbench_test_en_20231003.tsv", bare)
    answers = files.lines("a.jsonl", [{"question_id": row["index"], "text": "A"} for row in bare])
    with pytest.raises(
        DataError, match=r"has no public answers: send the submission file to https://opencompass"
    ):
        score("mmbench_test", answers, path.parent)
    written = score("mmbench_test", answers, path, submission=files.root / "t.xlsx")["submission"]
    header = next(openpyxl.load_workbook(written).active.values)
    assert header == ("index", "question", "A", "B", "C", "D", "prediction", "split")


def test_pictures_by_pointer_to_the_main_row(files, png, load):
    task = load("mmbench", files.table("p/mmbench_dev_20230712.tsv", rows(png, pointers=True)))
    assert {s.images[0].read() for s in task.samples} == {png * 3}
    lost = rows(png)
    lost[2]["image"] = "999"
    with pytest.raises(ImageError, match=r"1 of 5 rows have no picture: .* such as the row\(s\) '1000241'"):
        load("mmbench", files.table("p/mmbench_dev_20230712.tsv", lost))


def test_hugging_face(files, png, load, score):
    source = rows(png)
    columns = {
        key: [str(row[key]) or "nan" for row in source] for key in source[0] if key not in ("image", "index")
    }
    columns["L2-category"] = columns.pop("l2-category")
    columns |= {
        "index": [row["index"] for row in source],
        "image": [{"bytes": png, "path": None}] * len(source),
    }
    path = files.parquet("hf/dev-0.parquet", columns)
    task = load("mmbench", path)
    assert task.samples[1].text == f"What\tis it?\nA. yes\nB. no\n{LETTER}"
    result = score("mmbench", files.lines("a.jsonl", answer_rows(task)), path)
    assert result["metrics"]["categories"]["coarse_perception"]["correct"] == 2


def test_what_is_wrong_is_said(files, png, tsv, load, score):
    with pytest.raises(MissingFileError, match=r"mmbench_dev_20230712\.tsv \(official, LLaVA's version\)"):
        load("mmbench")
    with pytest.raises(DataError, match="no data file of MMBench: one JSON object with keys a"):
        load("mmbench", files.json("a.json", {"a": 1}))
    with pytest.raises(DataError, match="its rows lack A, B"):
        load("mmbench", files.table("a.tsv", [{"index": 1, "question": "x"}]))
    with pytest.raises(DataError, match=r"a\.tsv:3: 2 cells under 3 columns \(index, question, A\)"):
        load("mmbench", files.text("a.tsv", "index\tquestion\tA\n1\tx\ty\n2\tx\n"))
    lone = rows(png)
    lone[1]["B"] = ""
    with pytest.raises(DataError, match=r"row 2: question 252 has 1 option\(s\), a choice needs two"):
        load("mmbench", files.table("a.tsv", lone))
    some = rows(png)
    some[0]["answer"] = ""
    with pytest.raises(DataError, match=r"1 question\(s\) of 5 have no answer, such as 241"):
        load("mmbench", files.table("a.tsv", some))
    twice = rows(png)
    with pytest.raises(DataError, match=r"asks 1 question\(s\) more than once"):
        load("mmbench", files.table("a.tsv", [*twice, twice[0]]))


def test_options_are_ranked_as_letters_or_as_texts(files, tsv, load, score):
    letters, texts = load("mmbench_likelihood", tsv), load("mmbench_texts", tsv)
    assert letters.samples[0].options == ("A", "B", "C")
    assert letters.samples[0].text == load("mmbench", tsv).samples[0].text
    assert texts.samples[2].options == ('a "dog"', "cat", "None")
    assert texts.samples[1].text == "What\tis it?\nAnswer the question using a single word or phrase."
    assert (letters.normalised, texts.normalised, texts.method) == (False, True, "likelihood")
    rows = [{"question_id": s.question_id, "text": s.metadata["options"][s.answer]} for s in texts.samples]
    assert score("mmbench_texts", files.lines("a.jsonl", rows), tsv)["headline"]["value"] == 100.0
    rows[4]["text"] = "None"
    assert score("mmbench_texts", files.lines("a.jsonl", rows), tsv)["headline"]["value"] == 50.0
    assert (
        score("mmbench_likelihood", files.lines("b.jsonl", answer_rows(letters)), tsv)["headline"]["value"]
        == 100.0
    )
