from __future__ import annotations

import pytest

from vlmamba.evaluation.scorers import exact_match, is_match, normalise, rate, wilson_interval


@pytest.mark.parametrize(
    ("prediction", "answer", "right"),
    [
        ("yes", "Yes", True),
        (" Yes.\n", "yes", True),
        ("“Top  left”!", "top left", True),
        ("top left", "topleft", False),
        ("top-left", "top left", False),
        ("(7)", "7", True),
        ("７", "7", True),
        ("7.", "7", True),
        (".5", "5", False),
        (". .5", ".5", True),
        ("-5", "5", False),
        ("5 %", "5", False),
        ("1,000", "1000", False),
        ("the red", "red", False),
        ("two", "2", False),
        ("STRASSE", "straße", True),
        ("**red**", "red", True),
        ("it's", "its", False),
        ("", "", False),
        ("...", "...", False),
        ("U.S.A.", "u.s.a", True),
        ("red", ["blue", "Red"], True),
        ("red", [], False),
        ("\u00a0blue\u3000", "blue", True),
    ],
)
def test_golden_triples(prediction, answer, right):
    assert is_match(prediction, answer) is right


@pytest.mark.parametrize("text", ["Yes.", " “.5” ", "((a) b)", "...", "７！", "-", "a  b\tc"])
def test_normalising_twice_changes_nothing(text):
    assert normalise(normalise(text)) == normalise(text)


def test_rates_by_category_count_missing_answers_as_wrong():
    score = exact_match(["a", None, "?!", "b"], ["a", "b", "c", ["x", "B"]], ["k", "k", "l", "l"])
    assert score.correct == [True, False, False, True]
    assert score.unparsable == 1
    assert score.metrics["overall"] == rate(2, 4)
    assert score.metrics["categories"] == {"k": rate(1, 2), "l": rate(1, 2)}
    assert exact_match(["a"], ["a"]).metrics["categories"] == {}


def test_lists_of_different_length_are_refused():
    with pytest.raises(ValueError, match="2 predictions, 1 answers and no categories"):
        exact_match(["a", "b"], ["a"])


# Reference values: scipy.stats.binomtest(k, n).proportion_ci(method="wilson").
@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),
    [
        (0, 10, 0.0000000000, 0.2775327999),
        (10, 10, 0.7224672001, 1.0000000000),
        (93, 100, 0.8625048526, 0.9656807389),
        (1, 3, 0.0614919447, 0.7923403992),
    ],
)
def test_wilson_interval(correct, total, low, high):
    assert wilson_interval(correct, total) == pytest.approx((low, high), abs=1e-9)


def test_rate_of_nothing():
    assert rate(0, 0) == {"accuracy": None, "correct": 0, "total": 0, "low": None, "high": None}
    with pytest.raises(ValueError, match="3 of 2"):
        wilson_interval(3, 2)
