"""POPE: three layouts, both releases, labels joined by what is asked, POPE's own answer files."""

from __future__ import annotations

import re

import pytest

from vlmamba.errors import ConfigError, DataError, MissingFileError

SPLITS = ("random", "popular", "adversarial")
SUFFIX = "\nAnswer the question using a single word or phrase."


def labels(size=4, word="dog"):
    return [
        {
            "question_id": i + 1,
            "image": f"COCO_val2014_{i // 2:012d}.jpg",
            "text": f"Is there a {word} {i} in the image?",
            "label": "yes" if i % 2 == 0 else "no",
        }
        for i in range(size)
    ]


@pytest.fixture()
def official(files):
    for split in SPLITS:
        files.lines(f"pope/coco/coco_pope_{split}.json", labels())
    return files.root / "pope"


@pytest.fixture()
def llava(files, official):
    rows = [
        {**row, "text": row["text"] + SUFFIX, "category": split, "question_id": 100 * at + row["question_id"]}
        for at, split in enumerate(("adversarial", "popular", "random"))
        for row in labels()
    ]
    for row in rows:
        del row["label"]
    return files.lines("pope/llava_pope_test.jsonl", rows)


def answers(files, task, text=lambda s: s.answer):
    return files.lines(
        "answers.jsonl",
        [{"question_id": s.question_id, "prompt": s.text, "text": text(s)} for s in task.samples],
    )


def test_llavas_questions_with_labels(files, llava, load, score):
    task = load("pope", llava.parent)
    assert [s.question_id for s in task.samples[:2]] == [1, 2]
    first = task.samples[0]
    assert first.text == "Is there a dog 0 in the image?" + SUFFIX
    assert first.images == (llava.parent / "val2014/COCO_val2014_000000000000.jpg",)
    assert (first.answer, first.category) == ("yes", "adversarial")
    assert task.max_new_tokens == 128
    assert task.settings["release"] == "other"
    # a label file in another order changes nothing: nothing is joined by position
    files.lines("pope/coco/coco_pope_popular.json", labels()[::-1])
    task = load("pope", llava)
    result = score("pope", answers(files, task), llava)
    assert result["headline"] == {"name": "POPE mean F1", "value": 100.0, "unit": "%"}
    result = score("pope", answers(files, task, lambda s: "No"), llava)
    assert result["metrics"]["splits"]["random"]["accuracy"] == 0.5
    assert result["headline"]["value"] == 0.0


def test_label_files_alone(files, official, load, score):
    task = load("pope", official)
    assert task.samples[0].question_id == "random/1"
    assert len(task.samples) == 12
    assert task.samples[0].images[0] == official / "val2014/COCO_val2014_000000000000.jpg"
    one = load("pope", official / "coco/coco_pope_popular.json")
    assert [s.question_id for s in one.samples] == [1, 2, 3, 4]
    assert {s.category for s in one.samples} == {"popular"}
    assert (
        score("pope", answers(files, one), official / "coco/coco_pope_popular.json")["headline"]["value"]
        == 100
    )


def test_popes_own_answer_files(files, official, score):
    rows = [
        {"question": row["text"], "answer": "Yes, there is." if row["label"] == "yes" else "no"}
        for row in labels()
    ]
    for split in SPLITS:
        files.lines(f"out/pope_{split}_answers.json", rows)
    result = score("pope", files.root / "out", official)
    assert result["headline"]["value"] == 100
    assert result["metrics"]["official"]["random"]["Yes ratio"] == 0.5
    one = official / "coco/coco_pope_random.json"
    assert score("pope", files.root / "out/pope_random_answers.json", one)["counts"]["answered"] == 4
    with pytest.raises(DataError, match="one file a split, but the data have random, popular, adversarial"):
        score("pope", files.root / "out/pope_random_answers.json", official)
    short = files.lines("short.json", rows[:3])
    with pytest.raises(DataError, match="has 3 answers for 4 questions; they are paired by position"):
        score("pope", short, one)
    moved = files.lines("moved.json", [rows[1], rows[0], *rows[2:]])
    with pytest.raises(DataError, match=r"moved.json: 2 of 4 answers stand where another question is asked"):
        score("pope", moved, one)


def test_hugging_face(files, load, score, png):
    rows = [(split, row) for split in SPLITS for row in labels()]
    path = files.parquet(
        "hf/test-00000.parquet",
        {
            "id": [str(i) for i in range(len(rows))],
            "question_id": [str(row["question_id"]) for _, row in rows],
            "question": [row["text"] for _, row in rows],
            "answer": [row["label"] for _, row in rows],
            "image_source": [row["image"][:-4] for _, row in rows],
            "image": [{"bytes": png, "path": None} for _ in rows],
            "category": [split for split, _ in rows],
        },
    )
    task = load("pope", path)
    assert task.samples[4].question_id == "popular/1"
    assert task.samples[0].images == task.samples[1].images  # one picture, two questions
    assert task.samples[0].images[0].read() == png
    assert task.samples[0].text == "Is there a dog 0 in the image?" + SUFFIX
    assert score("pope", answers(files, task), path.parent)["headline"]["value"] == 100


def test_releases_are_told_apart_and_not_mixed(files, official, llava, load):
    with pytest.raises(
        DataError, match=r"is not the release 9000 of POPE: it has 4 random, 4 popular, 4 adversarial"
    ):
        load("pope_9000", official)
    with pytest.raises(DataError, match="2910 random, 3000 popular, 3000 adversarial"):
        load("pope_8910", official)
    for split, size in (("random", 2910), ("popular", 3000), ("adversarial", 3000)):
        files.lines(f"full/coco/coco_pope_{split}.json", labels(size))
    assert load("pope_8910", files.root / "full").settings["release"] == "8910"
    assert load("pope", files.root / "full").settings["release"] == "8910"
    files.lines("pope/coco/coco_pope_random.json", labels(word="cat"))
    with pytest.raises(
        DataError,
        match=r"llava_pope_test.jsonl: 4 question\(s\) of 12 have no label .* such as 201, 202, 203",
    ):
        load("pope", llava)


def test_likelihood(files, official, load, score):
    task = load("pope_likelihood", official)
    assert task.samples[0].options == ("Yes", "No")
    assert (task.method, task.reads) == ("likelihood", "record")
    rows = [
        {
            "question_id": s.question_id,
            "text": "Yes" if s.answer == "yes" else "No",
            "metadata": {"scores": [-0.1, -3.0] if s.answer == "yes" else [-3.0, -0.1]},
        }
        for s in task.samples
    ]
    path = files.lines("a.jsonl", rows)
    result = score("pope_likelihood", path, official)
    assert result["headline"]["value"] == 100
    assert result["metrics"]["official"]["final-AUCROC"] == 1.0
    del rows[1]["metadata"]
    with pytest.raises(DataError, match=r"'random/2' has no log-probabilities of its options"):
        score("pope_likelihood", files.lines("a.jsonl", rows), official)


def test_what_is_wrong_is_said(files, official, load, score):
    with pytest.raises(
        MissingFileError, match=r"Looked in playground/data/eval/pope, which does not exist .*coco_pope"
    ):
        load("pope")
    other = files.lines("gqa.jsonl", [{"question_id": "1", "image": "n1.jpg", "text": "Who?" + SUFFIX}])
    with pytest.raises(
        DataError, match=r"gqa.jsonl is no data file of POPE: JSON lines of 1 row.* with keys image"
    ):
        load("pope", other)
    twice = files.lines("coco_pope_random.json", [*labels(), labels()[0]])
    with pytest.raises(
        DataError, match=r"1 question\(s\) occur more than once in the data of POPE, such as 1"
    ):
        load("pope", twice)
    rows = labels()
    del rows[1]["label"], rows[2]["image"]
    with pytest.raises(
        DataError, match=r"2 of 4 rows of POPE are incomplete: .*:2 lacks label; .*:3 lacks image"
    ):
        load("pope", files.lines("coco_pope_random.json", rows))
    task = load("pope", official)
    good = answers(files, task).read_text().splitlines(keepends=True)

    def refused(name, lines, text, error=DataError, **options):
        path = files.text(name, "".join(lines))
        with pytest.raises(error, match=text):
            score("pope", path, official, **options)

    refused("none.jsonl", [], "none.jsonl holds no answer")
    refused(
        "few.jsonl", good[:-2], r"2 question\(s\) not answered .* such as 'adversarial/3', 'adversarial/4'"
    )
    refused("two.jsonl", [*good, good[0]], r"1 question\(s\) answered twice, such as 'random/1'")
    foreign = [re.sub(r'"(random|popular|adversarial)/', '"x', line) for line in good]
    refused(
        "foreign.jsonl",
        foreign,
        r"no answer is to a question of 'pope'; ids are such as 'x1', .* another task\?",
    )
    refused(
        "bad.jsonl",
        [good[0], "{nonsense\n", *good[1:]],
        r"bad.jsonl:2: not an answer: .* It is not in LLaVA's answer layout",
    )
    refused("cut.jsonl", [*good[:-1], good[-1][:20]], r"cut.jsonl: 1 question\(s\) not answered")
    refused("a.jsonl", good, "has no file for a server", ConfigError, submission="x.json")
    assert (
        score("pope", files.text("few.jsonl", "".join(good[:-2])), official, allow_missing=True)["counts"][
            "missing"
        ]
        == 2
    )
