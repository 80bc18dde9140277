"""Intervals of the tasks' own headlines."""

from __future__ import annotations

import itertools
import random
import time

import numpy as np
import pytest

from vlmamba.evaluation import Sample, Task, scorers
from vlmamba.evaluation.bootstrap import difference_interval
from vlmamba.evaluation.scorers import Headline, Score
from vlmamba.evaluation.scorers.mme import SUBTASKS
from vlmamba.evaluation.scoring import score_records

SPLITS = ["random", "popular", "adversarial"]


def from_sums(score):
    """The headline as the sums over all questions give it."""
    return score.headline.value()


def headline_interval(first, other, groups=(), **options):
    sums = [score.headline or Headline.share(score.correct) for score in (first, other)]
    assert sums[0].formula == sums[1].formula
    return difference_interval(sums[0].rows, sums[1].rows, sums[0].formula, groups, **options)


def formula(score, path="overall.accuracy"):
    """What a result says of its headline's formula."""
    task = Task(
        "x", [Sample(at, (), "") for at in range(3)], score=lambda samples, answers: score, headline=path
    )
    return score_records(task, task.samples, {})["formula"]


def pope(answers, style="official"):
    labels = ["yes", "no"] * (len(answers) // 2)
    splits = [SPLITS[at // 2 % 3] for at in range(len(answers))]
    return scorers.pope(answers, labels, splits, style=style)


def mme(answers, categories):
    count = len(answers) // 2
    return scorers.mme(
        answers,
        ["yes", "no"] * count,
        [categories[at // 2 % len(categories)] for at in range(2 * count)],
        [at // 2 for at in range(2 * count)],
    )


def sarcasm(decisions):
    return scorers.sarcasm(decisions, [1, 0] * (len(decisions) // 2))


@pytest.mark.parametrize("style", ["official", "lmms", "vlmevalkit"])
def test_pope_is_the_mean_f1(style):
    draw = random.Random(3)
    score = pope([draw.choice(["yes", "no", "well", "Not", None]) for _ in range(300)], style)
    assert from_sums(score) == pytest.approx(score.metrics["headline"]["value"], abs=1e-9)


def test_headlines_come_from_their_sums():
    draw = random.Random(4)
    scores = [
        mme(
            [draw.choice(["yes", "no", "maybe"]) for _ in range(400)],
            [*SUBTASKS["Perception"], "code_reasoning"],
        ),
        sarcasm([draw.choice([0.2, 0.7, None]) for _ in range(60)]),
        scorers.pope_likelihood([draw.random() for _ in range(60)], ["yes", "no"] * 30, SPLITS * 20),
        scorers.scienceqa(
            ["A", "B", None, "C"],
            [{"choices": ["x", "y"], "answer": 0, "image": im} for im in ("i", None, "i", "i")],
        ),
        scorers.mmbench(
            ["A", "B", "A", "A"],
            [0, 1_000_000, 1, 1_000_001],
            [{"A": "x", "B": "y"}] * 4,
            ["A", "B", "A", "B"],
        ),
        scorers.gqa(
            {"1": "dog", "2": "cat", "3": "dog"},
            {n: {"answer": "dog", "isBalanced": n != "2"} for n in ("1", "2", "3")},
        ),
    ]
    for score in scores:
        assert from_sums(score) == pytest.approx(score.metrics["headline"]["value"], abs=1e-9)


def test_f1_of_two_tweets_by_hand():
    # Tweets: one sarcastic, one not. Run a says yes to both, run b only to the first. Of two drawn with replacement
    # (4 equally likely draws): both first -> 100, 100; mixed (2 of 4) -> a 66.7, b 100; both second -> 0, 0.
    first, other = sarcasm([1.0, 1.0]), sarcasm([1.0, 0.0])
    low, high = headline_interval(first, other)
    assert (low, high) == pytest.approx((0.0, 100 / 3))
    assert headline_interval(first, first) == (0.0, 0.0)


def test_interval_equals_all_resamples():
    # Every one of the 4^4 resamples of four pictures, scored from scratch by the scorer, against the multinomial one.
    answers = [["yes", "no", "yes", "yes", "no", "no", "yes", "no"], ["yes", "no"] * 3 + ["no", "no"]]
    one = [score_one_subtask(given) for given in answers]

    def drawn(given, pictures):
        return score_one_subtask([given[2 * p + q] for p in pictures for q in (0, 1)])

    differences = [
        points(drawn(answers[1], chosen)) - points(drawn(answers[0], chosen))
        for chosen in itertools.product(range(4), repeat=4)
    ]
    exact = np.percentile(differences, [2.5, 97.5])
    interval = headline_interval(*one, one[0].groups, resamples=20_000)
    assert interval == pytest.approx(exact, abs=1e-9)
    assert one[0].metrics["headline"]["value"] is None  # nine of the ten subtasks are absent


def score_one_subtask(answers):
    return mme(answers, ["count"])


def points(score):
    return score.metrics["official"]["Perception"]["total"]


def test_no_formula_for_an_area_another_figure_or_nothing():
    assert formula(scorers.hateful_memes([0.1, 0.7, 0.6], [0, 1, 0])) is None
    headline = {"name": "x", "value": None, "unit": "%"}
    assert formula(Score({"headline": headline}, (), 0)) is None
    metrics = {"overall": {"accuracy": 2 / 3}, "other": {"share": 0.5}}
    assert formula(Score(metrics, [1, 1, 0], 0)) == "share"
    assert formula(Score(metrics, [1, 1, 0], 0), "other.share") is None


def test_mean_credit_is_the_default():
    a = Score({}, [0.0, 0.3, 1.0, 1.0], 0)
    b = Score({}, [0.3, 0.6, 1.0, 1.0], 0)
    low, high = headline_interval(a, b)
    assert 0.0 <= low < 15.0 < high <= 30.0
    assert Headline.share([1, 0], [False, False]).value() is None


def test_ten_thousand_questions_take_seconds():
    draw = random.Random(5)
    first, other = (pope([draw.choice(["yes", "no"]) for _ in range(10_000)]) for _ in range(2))
    start = time.process_time()
    low, high = headline_interval(first, other)
    assert time.process_time() - start < 5
    width = high - low
    assert 1.5 < width < 6  # two independent coins: the difference of F1 has a deviation near 1 point
