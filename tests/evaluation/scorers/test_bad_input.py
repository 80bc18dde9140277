"""What scorers say when they are given the wrong thing, and what holds for all of them."""

from __future__ import annotations

import functools
import json
import subprocess
import sys

import pytest

from tests.evaluation.scorers import stress, stress_choice, stress_other, stress_yes_no
from vlmamba.errors import ConfigError, DataError
from vlmamba.evaluation import scorers
from vlmamba.evaluation.scorers.base import add, rate, rates

TEN = ["a"] * 10
PROBLEM = {"choices": ["x", "y"], "answer": 0}
OPTIONS = {"A": "x", "B": "y"}
GRADED = {"v1_0": {"capability": ["rec"]}, "v1_1": {"capability": ["ocr"]}}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: scorers.vqav2(["a", "b"], [TEN]),
            r"2 predictions, 1 lists of answers do not belong together",
        ),
        (lambda: scorers.vqav2([], []), r"nothing to score: 0 predictions, 0 lists of answers\. Check"),
        (
            lambda: scorers.vqav2(["a"], [TEN], answer_types=[]),
            r"1 predictions, 1 lists of answers, 0 answer types",
        ),
        (
            lambda: scorers.vqav2(["a"] * 3, [TEN] * 3, ids=[1, 2, 1]),
            r"1 of 2 question ids occur more than once: 1 \(2",
        ),
        (
            lambda: scorers.vqav2([7], [TEN], ids=[12]),
            r"prediction of question 12 is of type int \(7\): give a text",
        ),
        (lambda: scorers.vqav2(["a"], ["yes"]), r"the answers of item 1 are 'yes': give a list"),
        (lambda: scorers.vqav2(["a"], [[]]), r"the answers of item 1 are \[\].*write its submission file"),
        (lambda: scorers.vqav2(["a"], [None]), r"the answers of item 1 are None"),
        (
            lambda: scorers.vizwiz(["a"], [TEN], answerable=[2]),
            r"answerable flag of item 1 is 2\. It must be one of",
        ),
        (lambda: scorers.pope(["yes"], ["maybe"], ids=[4]), r"the label of question 4 is 'maybe'\."),
        (lambda: scorers.pope(["no"] * 2, ["no"] * 2, ["a", "a"], ids=[1, 1]), r"\('a', 1\) \(2 times\)"),
        (
            lambda: scorers.pope_likelihood([1.5], ["yes"]),
            r"the score of item 1 is 1.5: give a finite number from 0 to 1",
        ),
        (
            lambda: scorers.mme(["no"], ["No"], ["colour"], ["1"]),
            r"subtask of item 1 is 'colour'\. Did you mean 'color'",
        ),
        (
            lambda: scorers.mme(["no"], ["No"], ["color"], ["1"]),
            r"1 of 1 pictures do not have exactly two .* '1' of color \(1",
        ),
        (lambda: scorers.mmbench(["A"], [1_000_000], [OPTIONS], ["A"]), r"none of the 1 rows is a main row"),
        (
            lambda: scorers.mmbench(["A"], ["0"], [OPTIONS], ["A"]),
            r"the index of row 1 is '0': give the TSV's whole",
        ),
        (
            lambda: scorers.mmbench(["A"], [0], [OPTIONS], [""]),
            r"the answer of question 0 is ''\. It must be one of: 'A'",
        ),
        (
            lambda: scorers.mmbench(["A"] * 2, [3, 3], [OPTIONS] * 2, ["A"] * 2),
            r"occur more than once: 3 \(2 times\)",
        ),
        (
            lambda: scorers.scienceqa(["A"], [{"choices": ["x"], "answer": 1}]),
            r"item 1 has the answer 1 and 1 choices",
        ),
        (lambda: scorers.scienceqa(["A"], [{"answer": 1}], ids=["9"]), r"question '9' has the choices None"),
        (lambda: scorers.gqa({}, {}), r"nothing to score: 0 questions"),
        (
            lambda: scorers.gqa({"9": "a"}, {"1": {"answer": "a"}}),
            r"none of the 1 questions has a prediction, 1 predict",
        ),
        (
            lambda: scorers.gqa({}, {"1": {"answer": "a"}}),
            r"none of the 1 questions has a prediction, 0 predictions",
        ),
        (
            lambda: scorers.gqa({"1": "a", "9": "b"}, {"1": {"answer": "a"}}),
            r"1 of 2 predictions are for ids that are not among the 1 questions, such as '9'.*ignore_extra=True",
        ),
        (
            lambda: scorers.gqa({"1": "a"}, {"1": {"question": "q"}}),
            r"question '1' has no answer \(it has question\)",
        ),
        (
            lambda: scorers.gqa({"1": "a"}, {"1": {"answer": "a", "isBalanced": False}}),
            r"none of the 1 questions is bal",
        ),
        (
            lambda: scorers.gqa({"1": "a"}, {"1": {"answer": "a", "entailed": ["2"]}}, consistency=True),
            r"question '1' entails 1 question\(s\) that are not among those given, such as '2'",
        ),
        (
            lambda: scorers.gqa({"1": "a"}, {"1": {"answer": "a"}}, choices={}),
            r"question '1' is not in the choices file",
        ),
        (
            lambda: scorers.mm_vet({"v1_0": [1]}, GRADED),
            r"1 grades do not fit 2 questions: 1 questions without grade \(",
        ),
        (
            lambda: scorers.mm_vet({"v1_0": 1, "v1_1": 2}, GRADED),
            r"the grades of 'v1_1' are \[2\]: a grade is a number",
        ),
        (
            lambda: scorers.mm_vet({"v1_0": [1], "v1_1": [1, 0]}, GRADED),
            r"questions have 1 to 2 grades: say how many",
        ),
        (
            lambda: scorers.mm_vet({"v1_0": [1], "v1_1": [0]}, GRADED, runs=5),
            r"2 questions have fewer than 5 grades",
        ),
        (lambda: scorers.mm_vet({}, GRADED), r"nothing to score: 0 grades and 2 questions"),
        (lambda: scorers.mm_vet_submission({}), r"nothing to submit"),
        (
            lambda: scorers.mm_vet_submission({"x": "a"}),
            r"question id 'x' is neither a number nor of the form 'v1_7'",
        ),
        (
            lambda: scorers.mm_vet_submission({1: "a", "v1_1": "b"}),
            r"question 'v1_1' is answered more than once",
        ),
        (lambda: scorers.mm_vet_submission({1: None}), r"question 'v1_1' has no answer"),
        (
            lambda: scorers.hateful_memes([float("nan")], [1]),
            r"the score of item 1 is nan: give a finite number",
        ),
        (lambda: scorers.hateful_memes(["0.5"], [1]), r"the score of item 1 is '0.5'"),
        (
            lambda: scorers.hateful_memes([0.5], ["1"]),
            r"the label of item 1 is '1'\. It must be one of: 0, 1",
        ),
        (lambda: scorers.sarcasm([0.5], [1, 0]), r"1 scores, 2 labels do not belong together"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(DataError, match=message):
        call()


@pytest.mark.parametrize(
    "call",
    [
        lambda: scorers.vqav2(["a"], [TEN], style="lmm"),
        lambda: scorers.vizwiz(["a"], [TEN], style="lmm"),
        lambda: scorers.gqa({"1": "a"}, {"1": {"answer": "a"}}, style="lmm"),
        lambda: scorers.pope(["no"], ["no"], style="lmm"),
        lambda: scorers.mme(["no"] * 2, ["no"] * 2, ["color"] * 2, ["1"] * 2, style="lmm"),
        lambda: scorers.mmbench(["A"], [0], [OPTIONS], ["A"], style="lmm"),
        lambda: scorers.scienceqa(["A"], [PROBLEM], style="lmm"),
    ],
)
def test_unknown_style_is_named(call):
    with pytest.raises(ConfigError, match=r"unknown style 'lmm'\. Did you mean 'lmms'.*Known: "):
        call()


@functools.cache
def every_scorer(unanswered: bool):
    """A score of each benchmark on its stress set; the first question of each left out when `unanswered`."""

    def texts(items, key="text"):
        found = [item[key] for item in items]
        return [None, *found[1:]] if unanswered else found

    def column(items, key):
        return [item[key] for item in items]

    vqa, pope, mme = stress.vqa_items(60), stress_yes_no.pope_items(60), stress_yes_no.mme_items(3)
    rows, problems = stress_choice.mmbench_rows(20), stress_choice.scienceqa_items(60)
    gqa, scores = stress_other.gqa_items(60), stress_yes_no.score_items()["ties"]
    answers, probability = column(vqa, "answers"), texts(scores, "score")
    said = dict(zip(gqa["questions"], texts([{"text": t} for t in gqa["texts"].values()]), strict=True))
    labels, splits = column(pope, "label"), column(pope, "split")
    return {
        "vqav2": scorers.vqav2(texts(vqa, "prediction"), answers, answer_types=column(vqa, "answer_type")),
        "textvqa": scorers.textvqa(texts(vqa, "prediction"), answers),
        "vizwiz": scorers.vizwiz(texts(vqa, "prediction"), answers, answerable=column(vqa, "answerable")),
        "gqa": scorers.gqa(said, {k: v | {"isBalanced": True} for k, v in gqa["questions"].items()}),
        "pope": scorers.pope(texts(pope), labels, splits),
        "pope_likelihood": scorers.pope_likelihood(probability[:60], labels, splits),
        "mme": scorers.mme(texts(mme), *(column(mme, key) for key in ("label", "category", "image"))),
        "mmbench": scorers.mmbench(
            texts(rows), *(column(rows, key) for key in ("index", "options", "answer"))
        ),
        "scienceqa": scorers.scienceqa(texts([p | {"text": p["text"] or ""} for p in problems]), problems),
        "hateful_memes": scorers.hateful_memes(probability, column(scores, "label")),
        "sarcasm": scorers.sarcasm(probability, column(scores, "label")),
    }


NAMES = tuple(every_scorer(False))


@pytest.mark.parametrize("name", NAMES)
def test_every_score_has_the_common_shape(name):
    score = every_scorer(False)[name]
    assert json.loads(json.dumps(score.metrics, allow_nan=False)) == score.metrics
    overall = score.metrics["overall"]
    assert set(overall) == {"accuracy", "correct", "total", "low", "high"}
    assert overall["low"] <= overall["accuracy"] <= overall["high"]
    assert all(0 <= credit <= 1 for credit in score.correct)
    assert len(score.parsed) == len(score.correct)
    assert len(score.groups) in (0, len(score.correct))
    if name != "mmbench":  # there a question is all its rotations
        assert overall["accuracy"] == pytest.approx(sum(score.correct) / len(score.correct))
    assert set(score.metrics["headline"]) == {"name", "value", "unit"}
    assert score.metrics["missing"] == 0
    for rates_of in score.metrics["categories"].values():
        assert set(rates_of) == set(overall)


@pytest.mark.parametrize("name", NAMES)
def test_a_question_without_answer_is_wrong_and_counted(name):
    score = every_scorer(True)[name]
    assert score.metrics["missing"] == 1
    assert not score.correct[0]
    assert score.parsed[0] is None
    assert len(score.correct) == len(every_scorer(False)[name].correct)


def test_sums_run_from_left_to_right():
    third = [1 / 3] * 8 + [2 / 3] * 2
    expected = 0.0
    for value in third:
        expected += value
    assert add(third) == expected
    assert add([]) == 0.0


def test_rates_sort_numbers_by_value_and_take_partial_credit():
    table = rates([1, 0, 0.3, 0.6], [10, 9, 10, 2])
    assert list(table) == ["2", "9", "10"]
    assert table["10"]["accuracy"] == 0.65
    assert rates([True, False], ["b", "a"])["b"] == rate(1, 1)
    assert rate(0.1 + 0.2 + 0.7 + 3e-16, 1)["high"] == 1.0  # rounding may lift a sum above the count


def test_scorers_need_neither_torch_nor_numpy():
    code = (
        "import sys, vlmamba.evaluation.scorers as s; s.vqav2(['a'], [['a'] * 10]);"
        "print(sorted({'torch', 'numpy', 'PIL', 'pandas'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
