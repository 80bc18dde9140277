"""MM-Vet (graded elsewhere), Hateful Memes and sarcasm (classes with probabilities)."""

from __future__ import annotations

import json
import math

import pytest

from vlmamba.errors import ConfigError, DataError, MissingFileError

MM_VET = {
    "v1_0": {
        "imagename": "v1_0.png",
        "question": "What is x?",
        "answer": "-1<OR>-5",
        "imagesource": "u",
        "capability": ["ocr", "math"],
    },
    "v1_1": {
        "imagename": "v1_1.png",
        "question": "Why?",
        "answer": "b",
        "imagesource": "u",
        "capability": ["rec"],
    },
}


def test_mm_vet_is_submitted_and_its_grades_are_scored(files, load, score):
    path = files.json("mm-vet/mm-vet.json", MM_VET)
    task = load("mm_vet", path.parent)
    assert (task.samples[0].question_id, task.samples[0].text) == ("v1_0", "What is x?")
    assert task.max_new_tokens == 1024
    answers = files.lines("a.jsonl", [{"question_id": k, "text": f"It is ä {k}"} for k in MM_VET])
    with pytest.raises(DataError, match="MM-Vet is graded by a language model: send the submission file"):
        score("mm_vet", answers, path)
    result = score("mm_vet", answers, path, submission=files.root / "s.json")
    assert result["headline"] == {"name": "MM-Vet total", "value": None, "unit": "%"}
    assert (
        files.root / "s.json"
    ).read_text() == '{\n  "v1_0": "It is \\u00e4 v1_0",\n  "v1_1": "It is \\u00e4 v1_1"\n}'
    again = score("mm_vet", files.root / "s.json", path, submission=files.root / "t.json")
    assert (files.root / "t.json").read_text() == (files.root / "s.json").read_text()
    assert again["counts"]["answered"] == 2
    grades = files.json("g.json", {"v1_0": {"score": [0.5, 0.7]}, "v1_1": {"score": [1.0, 1.0]}})
    graded = score("mm_vet", grades, path)
    assert graded["headline"]["value"] == pytest.approx(80.0)
    assert graded["metrics"]["official"]["rec"] == 100.0
    with pytest.raises(DataError, match=r"1 question\(s\) not answered .* such as 'v1_1'"):
        score("mm_vet", files.json("h.json", {"v1_0": {"score": [0.5]}}), path)
    with pytest.raises(
        DataError, match=r"1 question\(s\) are not among the 2 of MM-Vet asked, such as 'v1_9'"
    ):
        score("mm_vet", files.json("h.json", {"v1_9": {"score": [0.5]}}), path)


def test_mm_vet_llava_and_hugging_face(files, load, score, png):
    files.json("mm-vet/mm-vet.json", MM_VET)
    rows = [{"question_id": i, "image": f"v1_{i}.png", "text": MM_VET[f"v1_{i}"]["question"]} for i in (1, 0)]
    path = files.lines("mm-vet/llava-mm-vet.jsonl", rows)
    task = load("mm_vet", path.parent)
    assert [s.question_id for s in task.samples] == [1, 0]
    answers = files.lines("a.jsonl", [{"question_id": i, "text": "x"} for i in (0, 1)])
    score("mm_vet", answers, path, submission=files.root / "s.json")
    assert json.loads((files.root / "s.json").read_text()) == {"v1_0": "x", "v1_1": "x"}
    stored = files.parquet(
        "hf/test-0.parquet",
        {
            "question_id": list(MM_VET),
            "question": ["a", "b"],
            "answer": ["a", "b"],
            "capability": ["ocr, math", "rec"],
            "image": [{"bytes": png, "path": None}] * 2,
        },
    )
    assert load("mm_vet", stored).samples[0].metadata["capability"] == ["ocr", "math"]
    with pytest.raises(MissingFileError, match=r"mm-vet\.zip"):
        load("mm_vet")
    with pytest.raises(DataError, match="no data file of MM-Vet"):
        load("mm_vet", files.json("x.json", {"a": {"b": 1}}))


MEMES = [
    {"id": 1, "img": "img/01.png", "label": 1, "text": "look"},
    {"id": 2, "img": "img/02.png", "label": 0, "text": "at"},
    {"id": 3, "img": "img/03.png", "label": 1, "text": "this"},
]


def test_hateful_memes_by_likelihood_and_by_text(files, load, score):
    path = files.lines("memes/test_seen.jsonl", MEMES)
    task = load("hateful_memes", path.parent)
    assert (task.method, task.samples[0].options) == ("likelihood", ("Yes", "No"))
    assert task.samples[0].images == (path.parent / "img/01.png",)
    assert '"look"' in task.samples[0].text and task.settings["split"] == "test_seen"
    chances = {1: 0.9, 2: 0.4, 3: 0.3}
    rows = [
        {
            "question_id": k,
            "text": "Yes" if p > 0.5 else "No",
            "metadata": {"scores": [math.log(p), math.log(1 - p)]},
        }
        for k, p in chances.items()
    ]
    result = score("hateful_memes", files.lines("a.jsonl", rows), path, submission=files.root / "s.csv")
    assert result["metrics"]["official"] == {"accuracy": pytest.approx(2 / 3), "auroc": 0.5}
    assert result["headline"] == {"name": "Hateful Memes AUROC", "value": 50.0, "unit": "%"}
    lines = (files.root / "s.csv").read_text().splitlines()
    assert lines[0] == "id,proba,label" and lines[2].startswith("2,0.4") and lines[2].endswith(",0")
    assert (
        score("hateful_memes", files.root / "s.csv", path)["metrics"]["official"]
        == result["metrics"]["official"]
    )
    sure = files.text("c.csv", "id,proba,label\n01,1,1\n2,0,0\n3,1.0,1\n")
    assert score("hateful_memes", sure, path)["headline"]["value"] == 100.0
    texts = files.lines(
        "t.jsonl", [{"question_id": k, "text": t} for k, t in ((1, "Yes."), (2, "perhaps"), (3, "no"))]
    )
    written = score("hateful_memes_generate", texts, path)
    assert written["headline"] == {
        "name": "Hateful Memes accuracy",
        "value": pytest.approx(100 / 3),
        "unit": "%",
    }
    assert (written["counts"]["unparsable"], written["metrics"]["official"]["auroc"]) == (1, None)


def test_hateful_memes_splits_and_wrong_files(files, load, score, png):
    bare = [{k: v for k, v in row.items() if k != "label"} for row in MEMES]
    path = files.lines("memes/test_unseen.jsonl", bare)
    csv = files.text("c.csv", "id,proba\n1,0.5\n2,0.5\n3,0.5\n")
    with pytest.raises(DataError, match="the split test_unseen has no labels"):
        score("hateful_memes", csv, path.parent, options={"split": "test_unseen"})
    with pytest.raises(ConfigError, match="has no split 'test'; it has train, dev_seen"):
        load("hateful_memes", split="test")
    with pytest.raises(MissingFileError, match=r"dev_seen\.jsonl \(official\)"):
        load("hateful_memes", split="dev_seen")
    with pytest.raises(DataError, match=r"1 question\(s\) of 3 have no label, such as 2"):
        load("hateful_memes", files.lines("x.jsonl", [MEMES[0], bare[1], MEMES[2]]))
    with pytest.raises(DataError, match=r"x\.jsonl:1: the label 2 is neither 0 nor 1"):
        load("hateful_memes", files.lines("x.jsonl", [{**MEMES[0], "label": 2}]))
    with pytest.raises(DataError, match=r"row 1: proba '1\.5' is no probability"):
        score("hateful_memes", files.text("d.csv", "id,proba\n1,1.5\n"), files.lines("y.jsonl", MEMES))
    llava = [{"question_id": 5, "image": "a.png", "text": "Is it?", "label": 0}]
    assert load("hateful_memes", files.lines("l.jsonl", llava)).samples[0].answer == 0
    stored = files.parquet(
        "hf/test_seen-0.parquet",
        {"id": [1], "text": ["look"], "label": [1], "image": [{"bytes": png, "path": None}]},
    )
    assert load("hateful_memes", stored).samples[0].images[0].read() == png


TWEETS = "['8', 'what a day', 0, 1]\n['9', 'so irony here', 1, 1]\n['10', 'ironically fine', 1, 0]\n\n"


def test_sarcasm(files, load, score, png):
    path = files.text("sarcasm/text/test2.txt", TWEETS)
    task = load("sarcasm", files.root / "sarcasm")
    assert [(s.question_id, s.answer) for s in task.samples] == [
        ("8", 1),
        ("10", 0),
    ]  # people's label, not the hashtag's
    assert task.settings["dropped"] == 1  # the word, not the part of a word
    assert task.samples[0].images[0].name == "8.jpg"
    answers = files.lines(
        "a.jsonl", [{"question_id": "8", "text": "Yes"}, {"question_id": "10", "text": "it is yes"}]
    )
    result = score("sarcasm", answers, path)
    assert result["metrics"]["official"]["f1"] == 1.0
    assert result["counts"]["unparsable"] == 1
    assert result["metrics"]["missing"] == 0
    labels = files.text("l.csv", "id,label\n8,1\n10,0\n")
    assert score("sarcasm", labels, path)["metrics"]["official"]["accuracy"] == 1.0
    chances = files.text("p.csv", "id,proba\n8,0.5\n10,0.1\n")
    assert (
        score("sarcasm_likelihood", chances, path)["metrics"]["official"]["accuracy"] == 0.5
    )  # strictly above
    with pytest.raises(
        DataError, match=r"test2\.txt:2 is no line of the sarcasm data: expected \['id', 'text', label\]"
    ):
        load("sarcasm", files.text("sarcasm/text/test2.txt", "['8', 'x', 1]\n__import__('os')\n"))
    with pytest.raises(ConfigError, match="have no split 'val'; they have train, valid, test"):
        load("sarcasm", split="val")
    with pytest.raises(DataError, match=r"1 question\(s\) not asked by sarcasm, such as '9'"):
        extra = files.lines("b.jsonl", [{"question_id": k, "text": "no"} for k in ("8", "9", "10")])
        score("sarcasm", extra, files.text("s/test2.txt", TWEETS))
    stored = files.parquet(
        "hf/test-0.parquet",
        {"text": ["a", "b joke"], "label": [1, 0], "image": [{"bytes": png, "path": None}] * 2},
    )
    assert [s.answer for s in load("sarcasm", stored).samples] == [1]
    llava = files.lines("l.jsonl", [{"question_id": 5, "image": "a.png", "text": "Is it?", "label": 0}])
    assert load("sarcasm_likelihood", llava).samples[0].options == ("Yes", "No")
