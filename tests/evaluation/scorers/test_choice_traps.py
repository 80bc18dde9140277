"""Golden values of multiple choice: which letter an answer gives, row by row, and the figures made of it."""

from __future__ import annotations

import pytest

from vlmamba.evaluation import scorers
from vlmamba.evaluation.scorers import mmbench_letter, scienceqa_letter

# -------------------------------------------------------------------------------------------------- MMBench
FOUR = {"A": "cat", "B": "dog", "C": "a red bird", "D": "fish"}


@pytest.mark.parametrize(
    ("text", "kit", "lmms"),
    [
        ("B", "B", "B"),
        ("b", None, None),
        ("B.", "B", "B"),
        ("(B)", "B", "B"),
        ("Answer: B", "B", "B"),
        ("#B!", "B", None),
        ("B, C", None, "C"),
        ("A or B", None, None),
        ("dog", "B", "B"),
        ("a DOG", "B", "B"),
        ("cat and dog", None, None),
        ("hotdog", "B", "B"),
        ("B one two three", "B", "B"),
        ("B one two three four", None, "B"),  # not among the last four words
        ("zero one two three B", "B", "B"),
        ("I think it is a dog because the picture shows one of them", None, "B"),  # too long to match texts
        ("A man is there, B", None, None),
        ("A man walks by", "A", None),  # the article, not the letter
        ("The answer is C because of A", "C", None),  # two letters, so the phrase decides
        ("the correct answer is **d**, not A or B", "D", None),
        ("the answer is a dog", "A", "B"),  # the article again
        ("Z", "Z", None),
        ("E", None, "E"),
        ("Cannot determine the answer. B", "Z", "B"),
        ("Failed to obtain answer via API", None, None),
        ("Failed to obtain answer via API: dog", "B", "B"),
        ("", None, None),
        ("The answer is Q. A, B", None, "B"),
    ],
)
def test_mmbench_letter(text, kit, lmms):
    assert mmbench_letter(text, FOUR) == kit
    assert mmbench_letter(text, FOUR, "lmms") == lmms


@pytest.mark.parametrize("absent", [None, ""])
def test_absent_options_are_no_letters(absent):
    options = {"A": "yes", "B": "no", "C": absent, "D": absent}
    assert mmbench_letter("C", options) is None
    assert mmbench_letter("C or B", options) == "B"
    assert mmbench_letter("nothing", {"A": "None", "B": "nan"}) is None
    assert mmbench_letter("None", {"A": "None", "B": "nan"}) == "A"
    assert mmbench_letter("12", {"A": 12, "B": 3}) == "A"


def test_mmbench_circular_and_vanilla():
    two = [{"A": "x", "B": "y"}, {"A": "y", "B": "x"}]
    score = scorers.mmbench(
        ["A", "B", "A", "A", "B", "?", "A"],
        [0, 1_000_000, 1, 1_000_001, 2, 1_000_003, 4],
        [*two, *two, two[0], two[1], two[0]],
        ["A", "B", "A", "B", "B", "A", "B"],
        categories=["c1", "c1", "c2", "c2", "c1", "c1", "c2"],
        l2_categories=["logic_reasoning"] * 7,
        splits=["dev", "dev", "dev", "dev", "test", "test", "test"],
    )
    assert score.correct == [True, True, True, False, True, False, False]
    assert score.groups == [0, 0, 1, 1, 2, 3, 4]
    assert score.metrics["circular"] == {"questions": 4, "rows": 7, "incomplete": 2, "orphans": 1}
    assert score.metrics["overall"]["accuracy"] == 0.5
    assert score.metrics["vanilla_main"]["accuracy"] == 0.75
    assert score.metrics["vanilla_all"]["correct"] == 4
    assert score.metrics["official"] == {
        "dev": {"Overall": 0.5, "LR": 0.5, "c1": 1.0, "c2": 0.0},
        "test": {"Overall": 0.5, "LR": 0.5, "c1": 1.0, "c2": 0.0},
    }
    assert score.metrics["l3"]["c1"]["accuracy"] == 1.0
    assert (score.unparsable, score.metrics["missing"]) == (1, 0)


# ------------------------------------------------------------------------------------------------ ScienceQA
@pytest.mark.parametrize(
    ("text", "llava", "lmms"),
    [
        ("A", "A", "A"),
        ("a", None, "A"),
        (" A", None, "A"),
        ("A.", None, "A"),
        ("A. ", "A", "A"),
        ("A. cat", "A", "A"),
        ("A.cat", None, "A"),
        ("(A)", None, None),
        ("F", None, None),
        ("F. cat", None, "F"),
        ("The answer is B.", "B", None),
        ("The answer is B", None, None),
        ("The answer is B\n", None, None),
        ("The answer is B!", "B", None),
        ("The answer is Boston.", "B", None),
        ("the answer is B.", None, None),
        ("The answer is A. The answer is B.", None, None),
        ("So: The answer is E. ", "E", None),
        ("The answer is Z.", "Z", None),
        ("", None, None),
        ("AB", None, None),
        ("FAILED", None, None),
    ],
)
def test_scienceqa_letter(text, llava, lmms):
    assert scienceqa_letter(text) == llava
    assert scienceqa_letter(text, "lmms") == lmms


def test_scienceqa_tables():
    rows = [
        {
            "choices": ["a", "b"],
            "answer": 0,
            "image": "image.png",
            "hint": "h",
            "subject": "natural science",
            "grade": "grade6",
        },
        {
            "choices": ["a", "b"],
            "answer": 1,
            "image": "image.png",
            "hint": "",
            "subject": "social science",
            "grade": "grade7",
        },
        {
            "choices": ["a", "b"],
            "answer": 1,
            "image": None,
            "hint": "h",
            "subject": "language science",
            "grade": "grade1",
        },
        {
            "choices": ["a", "b"],
            "answer": 0,
            "image": "",
            "hint": None,
            "subject": "language science",
            "grade": "grade12",
        },
    ]
    score = scorers.scienceqa(["A", None, "C", "A. a"], rows)
    assert score.correct == [True, False, False, True]
    assert score.parsed == ["A", None, "C", "A"]  # C is beyond the choices
    official = score.metrics["official"]
    assert (official["acc"], official["img_acc"], score.metrics["img"]["accuracy"]) == (50.0, 100.0, 0.5)
    assert score.metrics["headline"]["value"] == 50.0
    columns = (
        "natural",
        "social",
        "language",
        "has_text",
        "has_image",
        "no_context",
        "grade_1_6",
        "grade_7_12",
        "average",
    )
    assert [official[f"acc_{name}"] for name in columns] == [
        *("100.00", "0.00", "50.00", "50.00", "50.00", "100.00", "50.00", "50.00", "50.00")
    ]
    assert {k: v["total"] for k, v in score.metrics["context"].items()} == {
        **{"image": 1, "none": 1, "text": 1},
        "text and image": 1,
    }
    stored = scorers.scienceqa(["A", None, "C", "A. a"], rows, multimodal=[True, False, True, False])
    assert stored.metrics["official"]["img_acc"] == 50.0
    assert scorers.scienceqa(["A"], rows[2:3]).metrics["official"]["acc_natural"] == -1
