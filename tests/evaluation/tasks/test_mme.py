"""MME: the release, LLaVA's questions with it, official answer folders, the hub; pairs stay together."""

from __future__ import annotations

import pytest

from vlmamba.errors import DataError, MissingFileError
from vlmamba.evaluation.task import first_questions

SUFFIX = "\nAnswer the question using a single word or phrase."
QUESTIONS = {
    "one": "Is it a dog? Please answer yes or no.\tYes",
    "two": "Is it a cat?  Please answer yes or no.\tNo",
}


@pytest.fixture()
def release(files):
    root = "MME/MME_Benchmark_release_version"
    text = "\n".join(QUESTIONS.values()) + "\n"
    for name in ("0002", "0001"):
        files.text(f"{root}/existence/{name}.txt", text)
        files.text(f"{root}/existence/{name}.jpg", "x")
    files.text(f"{root}/artwork/questions_answers_YN/7.txt", text)
    files.text(f"{root}/artwork/images/7.png", "x")
    return files.root / root


def test_the_release(release, load):
    task = load("mme", release.parent)
    assert len(task.samples) == 6
    first, second = task.samples[:2]
    assert first.question_id == second.question_id == "existence/0001.jpg"
    assert (first.text, second.text) == ("Is it a dog?" + SUFFIX, "Is it a cat?" + SUFFIX)
    assert first.images == (release / "existence/0001.jpg",)
    assert (first.answer, second.answer) == ("yes", "no")
    art = task.samples[4]
    assert (art.category, art.images) == ("artwork", (release / "artwork/images/7.png",))
    assert len(first_questions(task.samples, 3)) == 4
    assert len(load("mme", release).samples) == 6


def rows_of(task, text):
    return [{"question_id": s.question_id, "prompt": s.text, "text": text(s)} for s in task.samples]


def test_scores_and_the_official_answer_folder(files, release, load, score):
    task = load("mme", release)
    answers = files.lines("a.jsonl", rows_of(task, lambda s: "Yes" if s.answer == "yes" else "none\tof it"))
    result = score("mme", answers, release, submission=files.root / "results")
    scores = result["metrics"]["official"]["Perception"]["scores"]
    assert scores == {"existence": 200.0, "artwork": 200.0}
    assert result["headline"]["value"] is None  # eight of ten subtasks are absent
    assert (files.root / "results/existence.txt").read_text() == (
        "0001.jpg\tIs it a dog? Please answer yes or no.\tYes\tYes\n"
        "0001.jpg\tIs it a cat?  Please answer yes or no.\tNo\tnone of it\n"
        "0002.jpg\tIs it a dog? Please answer yes or no.\tYes\tYes\n"
        "0002.jpg\tIs it a cat?  Please answer yes or no.\tNo\tnone of it\n"
    )
    assert score("mme", files.root / "results", release)["metrics"] == result["metrics"]
    alone = score("mme", files.root / "results", files.root / "results")
    assert alone["metrics"]["subtasks"] == result["metrics"]["subtasks"]
    with pytest.raises(
        MissingFileError, match="can be scored but not asked: MME_Benchmark_release_version/ is not beside"
    ):
        task = load("mme", files.root / "results")
        task.prompt(task.samples[0])
    bare = files.lines(
        "b.jsonl",
        [{"question_id": r["question_id"], "text": "yes"} for r in rows_of(load("mme", release), str)],
    )
    with pytest.raises(
        DataError, match=r'each line needs "prompt" with the question as it was asked, such as .Is it a dog'
    ):
        score("mme", bare, release)


def test_llavas_questions_with_the_release(files, release, load, score):
    rows = [
        {
            "question_id": f"{place}",
            "image": f"{place}",
            "text": q.split("\t")[0].replace("Please answer yes or no.", "").rstrip() + SUFFIX,
            "category": place.split("/")[0],
        }
        for place in ("existence/0001.jpg", "existence/0002.jpg", "artwork/7.png")
        for q in QUESTIONS.values()
    ]
    path = files.lines("MME/llava_mme.jsonl", rows)
    task = load("mme", path.parent)
    assert [s.answer for s in task.samples] == ["yes", "no"] * 3
    answers = files.lines("a.jsonl", rows_of(task, lambda s: s.answer))
    result = score("mme", answers, path, submission=files.root / "out")
    assert result["metrics"]["overall"]["correct"] == 6
    assert "\tIs it a cat?  Please answer yes or no.\tNo\t" in (files.root / "out/artwork.txt").read_text()
    rows[0]["text"] = "Is it a bird?" + SUFFIX
    with pytest.raises(DataError, match=r"1 question\(s\) of 6 are not in .*, such as 'existence/0001\.jpg'"):
        load("mme", files.lines("MME/llava_mme.jsonl", rows))


def test_hugging_face(files, load, score, png):
    path = files.parquet(
        "hf/test-0.parquet",
        {
            "question_id": ["existence/0001.jpg"] * 2,
            "question": [q.split("\t")[0] for q in QUESTIONS.values()],
            "answer": ["Yes", "No"],
            "category": ["existence"] * 2,
            "image": [{"bytes": png, "path": None}] * 2,
        },
    )
    task = load("mme", path)
    assert task.samples[0].text == "Is it a dog?" + SUFFIX
    assert (
        score("mme", files.lines("a.jsonl", rows_of(task, lambda s: s.answer)), path)["metrics"]["overall"][
            "correct"
        ]
        == 2
    )
    y = files.lines("b.jsonl", rows_of(task, lambda s: s.answer[0]))
    assert score("mme", y, path)["counts"]["unparsable"] == 2
    assert score("mme_lmms", y, path)["metrics"]["overall"]["correct"] == 2


def test_what_is_wrong_is_said(files, release, load, score):
    with pytest.raises(MissingFileError, match=r"llava_mme\.jsonl \(LLaVA's questions"):
        load("mme")
    files.text("MME/MME_Benchmark_release_version/existence/0001.txt", "Is it?\tPerhaps\n")
    with pytest.raises(
        DataError, match=r"0001\.txt:1: expected 2 cells separated by tabs, the last of them Yes or No"
    ):
        load("mme", release)
    files.text("MME/MME_Benchmark_release_version/existence/0001.txt", "Is it?\tYes\n")
    task = load("mme", release)
    with pytest.raises(DataError, match=r"exactly two|two questions"):
        score("mme", files.lines("a.jsonl", rows_of(task, lambda s: "yes")), release)
    files.text("r/existence.txt", "0009.jpg\tIs it?\tYes\tyes\n")
    with pytest.raises(
        DataError, match=r"1 question\(s\) are not asked \(5 are\), such as 'existence/0009\.jpg'"
    ):
        score("mme", files.root / "r", release)
