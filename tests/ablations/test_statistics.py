import math

import numpy as np
import pytest
from scipy import stats

from vlmamba.ablations.statistics import difference, estimate, holm


def test_one_seed_is_the_interval_of_questions():
    credits_ = [1.0] * 80 + [0.0] * 20
    found = estimate([80.0], [credits_])
    error = 100 * math.sqrt(np.var(credits_, ddof=1) / 100)
    reach = stats.t.ppf(0.975, 99) * error
    assert found.mean == pytest.approx(80)
    assert (found.low, found.high) == (pytest.approx(80 - reach), pytest.approx(80 + reach))
    assert found.seed_error is None


def test_values_without_credits_are_the_interval_of_seeds():
    found = estimate([70.0, 72.0, 74.0])
    reach = stats.t.ppf(0.975, 2) * 2 / math.sqrt(3)
    assert (found.low, found.high) == (pytest.approx(72 - reach), pytest.approx(72 + reach))
    assert found.question_error is None


def test_one_value_alone_has_no_interval():
    found = estimate([70.0])
    assert (found.mean, found.low, found.high, found.p) == (70.0, None, None, None)


def test_questions_about_one_picture_stand_or_fall_together():
    credits_ = np.repeat([1.0, 0.0, 1.0, 1.0, 0.0] * 8, 5)
    alone = estimate([100 * credits_.mean()], [credits_])
    grouped = estimate([100 * credits_.mean()], [credits_], [i // 5 for i in range(200)])
    assert grouped.question_error == pytest.approx(alone.question_error * math.sqrt(5), rel=0.02)


def test_a_figure_that_is_no_mean_of_credits_knows_of_seeds_only():
    found = estimate([50.0, 60.0], [[1, 0, 1, 1], [1, 1, 1, 1]])  # an F1, say
    assert found.question_error is None
    assert found.seed_error == pytest.approx(5.0)


def test_intervals_hold_what_they_promise():
    """Of simulated tables with known means, seeds and questions varying, 95 % of the intervals hold the truth."""
    rng = np.random.default_rng(0)
    held = total = 0
    for _ in range(400):
        hard = rng.normal(0, 1.2, 300)  # of questions
        seeds = rng.normal(1.5, 0.25, (3, 1))
        credits_ = (rng.random((3, 300)) < 1 / (1 + np.exp(-(seeds + hard)))).astype(float)
        found = estimate(100 * credits_.mean(1), credits_)
        grid = rng.normal(0, 1, 20_000)
        truth = 100 * np.mean(1 / (1 + np.exp(-(1.5 + 0.25 * grid + 1.2 * rng.permutation(grid)))))
        held += found.low <= truth <= found.high
        total += 1
    assert (
        0.93 <= held / total <= 0.995
    )  # wider than promised: what seeds and questions share is counted twice


def test_differences_are_paired_by_question():
    rng = np.random.default_rng(1)
    base = (rng.random(1000) < 0.8).astype(float)
    better = base.copy()
    better[np.flatnonzero(base == 0)[:30]] = 1.0
    found = difference([100 * better.mean()], [100 * base.mean()], [better], [base])
    alone = estimate([100 * better.mean()], [better])
    assert found.mean == pytest.approx(3.0)
    assert found.low > 0 and found.p < 1e-6
    assert found.question_error < alone.question_error / 2


def test_equal_rows_do_not_differ():
    credits_ = [[1.0, 0.0, 1.0, 1.0]]
    found = difference([75.0], [75.0], credits_, credits_)
    assert (found.mean, found.p) == (0.0, 1.0)


def test_holm():
    assert holm([0.01, 0.04, None, 0.02]) == [True, True, False, True]
    assert holm([0.03, 0.04]) == [False, False]
    assert holm([0.02, 0.2]) == [True, False]
    assert holm([]) == []


def test_points_and_f1_of_one_seed_are_no_means_of_credits():
    credits_ = [1.0, 1.0, 0.0, 1.0]
    for value in (1369.6, 70.0, 0.7):
        found = estimate([value], [credits_])
        assert (found.low, found.question_error) == (None, None)
    assert estimate([0.75], [credits_]).question_error == pytest.approx(0.25)
    assert estimate([66.67], [[1.0, 1.0, 0.0]]).question_error is not None  # rounded, as official scorers do


def test_questions_about_one_picture_alone_say_nothing_about_others():
    found = estimate([75.0], [[1.0, 1.0, 0.0, 1.0]], ["cat.jpg"] * 4)
    assert (found.mean, found.low, found.p) == (75.0, None, None)


def test_rows_of_other_numbers_of_seeds():
    """Welch's test, where questions are not known."""
    own, base = [70.0, 72.0, 74.0], [60.0, 61.0]
    found = difference(own, base)
    theirs = stats.ttest_ind(own, base, equal_var=False)
    assert found.p == pytest.approx(theirs.pvalue)
    assert (found.low, found.high) == pytest.approx(tuple(theirs.confidence_interval(0.95)))


def test_the_same_models_measured_twice_are_paired_by_seed():
    own, base = [70.0, 80.0, 90.0], [69.0, 79.2, 88.9]
    theirs = stats.ttest_rel(own, base)
    assert difference(own, base, same_models=True).p == pytest.approx(theirs.pvalue)
    assert difference(own, base).p > 0.5
