"""Golden values of what answers are read as, row by row, and of the figures made of them."""

from __future__ import annotations

import pytest

from vlmamba.evaluation import scorers
from vlmamba.evaluation.scorers import (
    gqa_prediction,
    mme_answer,
    pope_answer,
)


# ---------------------------------------------------------------------------------------------- POPE and MME
@pytest.mark.parametrize(
    ("text", "official", "lmms", "kit"),
    [
        ("Yes", "yes", "yes", "yes"),
        ("no", "no", "no", "no"),
        ("No.", "no", None, "no"),
        ("NO", "yes", "no", "no"),
        ("not", "no", None, None),
        ("Not", "yes", None, None),
        ("", "yes", None, None),
        ("Nope", "yes", None, None),
        ("no!", "yes", None, "no"),
        ("No;", "yes", None, "no"),
        ("No,", "no", None, "no"),
        ("No\nreally", "yes", None, "no"),
        ("There isn't any", "yes", None, None),
        ("cannot tell", "yes", None, None),
        ("It is unclear. no", "yes", None, "no"),
        ("It is unclear, no", "no", None, "no"),
        ("There are no,yes", "yes", None, None),
        ("There are no dogs.", "no", None, "no"),
        ("Yes, there is no doubt", "no", None, None),
        (".no", "yes", None, "no"),
        (" no ", "no", "no", "no"),
        ("no\u00a0dog", "yes", None, "no"),
        ("yes.", "yes", None, "yes"),
    ],
)
def test_pope_reading(text, official, lmms, kit):
    assert [pope_answer(text, style) for style in ("official", "lmms", "vlmevalkit")] == [official, lmms, kit]


def test_pope_figures():
    score = scorers.pope(
        ["yes", "yes", "no", "no", "Yes", "no"],
        ["yes", "no", "no", "yes", "Yes", "No"],
        ["a", "a", "a", "a", "b", "b"],
    )
    half = {"tp": 1, "fp": 1, "tn": 1, "fn": 1, "unread": 0}
    shares = dict.fromkeys(("accuracy", "precision", "recall", "f1", "yes_ratio"), 0.5)
    assert score.metrics["splits"]["a"] == half | shares
    assert score.metrics["mean"] == {"f1": 0.75, "accuracy": 0.75}
    assert score.metrics["pooled"]["accuracy"] == pytest.approx(4 / 6)
    assert score.metrics["headline"]["value"] == 75.0


def test_pope_without_a_yes_is_zero_not_a_crash():
    table = scorers.pope(["no", "no"], ["yes", "no"]).metrics["pooled"]
    assert [table[key] for key in ("precision", "recall", "f1", "yes_ratio")] == [0, 0, 0, 0]


def test_missing_pope_answer_is_wrong_whatever_the_label():
    score = scorers.pope([None, None, "yes"], ["yes", "no", "yes"])
    assert score.correct == [False, False, True]
    assert score.metrics["pooled"] | {} == score.metrics["splits"]["all"]
    assert (score.metrics["missing"], score.unparsable) == (2, 0)
    assert {k: score.metrics["pooled"][k] for k in ("tp", "fp", "tn", "fn", "unread")} == {
        **{"tp": 1, "fp": 0, "tn": 0, "fn": 1},
        "unread": 2,
    }


def test_pope_from_likelihoods():
    score = scorers.pope_likelihood([0.9, 0.5, 0.2, 0.6], ["yes", "yes", "no", "no"], ["a", "a", "b", "b"])
    assert score.parsed == ["yes", "yes", "no", "yes"]
    assert score.metrics["official"] == {
        "final-Accuracy": 0.75,
        "final-AUCROC": 0.75,
        "final-AUCPR": pytest.approx(5 / 6),
    }
    assert score.metrics["splits"]["a"]["auroc"] is None  # one class only
    assert scorers.pope_likelihood([0.9, None], ["yes", "no"]).metrics["pooled"]["auroc"] is None


@pytest.mark.parametrize(
    ("text", "official", "lmms", "kit"),
    [
        ("Yes", "yes", "yes", "yes"),
        ("NO", "no", "no", "no"),
        ("not sure", "no", "no", "other"),
        ("none", "no", "no", "other"),
        ("know", "no", "no", "other"),
        ("snow", "no", "no", "other"),
        ("unknown", "other", "other", "other"),
        ("eyes", "yes", "yes", "other"),
        ("Noah", "no", "no", "other"),
        ("y", "other", "yes", "other"),
        ("n.", "other", "no", "other"),
        ("", "other", "other", "other"),
        ("  yes", "other", "yes", "yes"),
        (" yes", "yes", "yes", "yes"),
        ("y.e.s", "other", "yes", "yes"),
        ("Yes and no", "yes", "yes", "other"),
        ("I say no", "other", "other", "no"),
        ("noyes", "no", "no", "other"),
        ("ayes", "yes", "yes", "other"),
    ],
)
def test_mme_reading(text, official, lmms, kit):
    assert [mme_answer(text, style) for style in ("official", "lmms", "vlmevalkit")] == [official, lmms, kit]


def test_mme_points():
    score = scorers.mme(
        ["yes", "no", "yes", "yes", "maybe", None],
        ["Yes", "No", "Yes", "No", "Yes", "No"],
        ["color"] * 4 + ["OCR"] * 2,
        ["1.jpg", "1.jpg", "2.jpg", "2.jpg", "1.jpg", "1.jpg"],
    )
    assert score.metrics["subtasks"]["color"] == {
        "acc": 0.75,
        "acc_plus": 0.5,
        "score": 125.0,
        "other": 0,
        "images": 2,
    }
    assert score.metrics["subtasks"]["OCR"] == {"acc": 0, "acc_plus": 0, "score": 0, "other": 2, "images": 1}
    perception = score.metrics["official"]["Perception"]
    assert perception["total"] == 125.0 and len(perception["absent"]) == 8
    assert score.metrics["headline"]["value"] is None  # subtasks are absent
    assert (score.unparsable, score.metrics["missing"]) == (1, 1)
    assert score.parsed[-2:] == ["other", None]
    assert score.groups[0] == score.groups[1] != score.groups[4]


# ------------------------------------------------------------------------------------------------------ GQA
@pytest.mark.parametrize(
    ("text", "answer", "llava", "raw", "lmms", "prismatic", "kit"),
    [
        ("dog", "dog", 1, 1, 1, 1, 1),
        ("Dog", "dog", 1, 0, 1, 1, 1),
        ("Dog.", "dog", 1, 0, 1, 1, 0),
        ("dog...", "dog", 1, 0, 1, 1, 0),
        ("dog. ", "dog", 0, 0, 1, 0, 0),
        (" dog", "dog", 0, 0, 1, 0, 1),
        ("the dog", "dog", 0, 0, 0, 0, 0),
        ("t-shirt", "t-shirt", 1, 1, 1, 0, 1),
        ("DVD player", "DVD player", 0, 1, 1, 0, 1),
        ("dog!", "dog", 0, 0, 1, 1, 0),
        ("", "dog", 0, 0, 0, 0, 0),
    ],
)
def test_gqa_match(text, answer, llava, raw, lmms, prismatic, kit):
    styles = {"llava": llava, "raw": raw, "lmms": lmms, "prismatic": prismatic, "vlmevalkit": kit}
    found = {
        style: int(scorers.gqa({"1": text}, {"1": {"answer": answer}}, style=style).correct[0])
        for style in styles
    }
    assert found == styles
    assert gqa_prediction("U.S...") == "u.s"


def gqa_row(answer, structural="query", group=None, **more):
    types = {"structural": structural, "semantic": "obj", "detailed": "x"}
    return {
        "answer": answer,
        "types": types,
        "groups": {"global": group},
        "question": "is it",
        "semantic": [],
        **more,
    }


def test_gqa_distribution_consistency_validity():
    questions = {
        "1": gqa_row("red", group="color", entailed=["1", "2", "4"]),
        "2": gqa_row("red", "verify", group="color", entailed=["1"]),
        "3": gqa_row("blue", group="color", entailed=[]),
        "4": gqa_row("yes", "verify", isBalanced=False, entailed=[]),
        "5": gqa_row("color", "choose", entailed=["5"])
        | {"types": {"structural": "choose", "detailed": "twoCommon"}},
    }
    choices = {key: {"valid": ["red", "blue"], "plausible": ["red"]} for key in questions}
    said = {"1": "red", "2": "blue", "3": "green", "4": "yes", "5": "material"}
    score = scorers.gqa(said, questions, choices=choices, consistency=True)
    official = score.metrics["official"]
    assert score.correct == [True, False, False, True, False]  # the unbalanced one is not in the figures
    assert (official["accuracy"], official["open"], official["binary"]) == (25.0, 50.0, 0.0)
    # gold red 2, blue 1; said red 1, blue 1, green 1 (outside): (1-2)^2/2 + (1-1)^2/1 = 0.5
    assert official["distribution"] == 0.5 / 100
    assert (
        official["consistency"] == 50.0
    )  # question 1 is right; of 2 and 4 one is right; itself does not count
    assert official["validity"] == 75.0  # red, blue, and "material" for a question on what is common
    assert official["plausibility"] == 50.0
    assert score.metrics["semantic"]["obj"]["total"] == 3
    assert score.metrics["words"]["2"]["total"] == 4
    alone = scorers.gqa({"1": "x"}, {"1": {"answer": "x"}}).metrics["official"]
    assert alone["distribution"] is None and alone["accuracyPerLength"] == {}


def test_gqa_reasoning_steps_leave_out_the_query():
    steps = [("select", "dog"), ("query", "name"), ("exist", "?"), ("choose name", "a|b"), ("query", "color")]
    program = [{"operation": name, "argument": argument} for name, argument in steps]
    score = scorers.gqa({"1": "x", "2": None}, {"1": gqa_row("x", semantic=program), "2": gqa_row("y")})
    assert {name: row["total"] for name, row in score.metrics["steps"].items()} == {"0": 1, "2": 1}
    assert score.metrics["missing"] == 1


# ------------------------------------------------------------------- MM-Vet, Hateful Memes, sarcasm, yes or no
def test_mm_vet_submission_and_grades():
    assert scorers.mm_vet_submission({0: "a", "v1_1": "", "2": "c"}) == {"v1_0": "a", "v1_1": "", "v1_2": "c"}
    questions = {
        "v1_0": {"capability": ["rec", "ocr"]},
        "v1_1": {"capability": "ocr, rec"},
        "v1_2": {"capability": ["math"]},
    }
    score = scorers.mm_vet({"v1_0": [1.0, 0.5], "v1_1": {"score": [0.0, 0.5]}, "v1_2": [1, 1]}, questions)
    assert score.correct == [0.75, 0.25, 1.0]
    official = score.metrics["official"]
    assert official["integrations"] == {"ocr_rec": 50.0, "math": 100.0}
    assert (official["total"], official["std"], official["runs"]) == (66.7, 0.0, [66.7, 66.7])
    assert scorers.mm_vet({"v1_2": 0.4}, {"v1_2": questions["v1_2"]}).metrics["official"]["math"] == 40.0


def test_area_under_the_curve_counts_ties_half():
    assert scorers.auroc([0.1, 0.4, 0.35, 0.8], [0, 0, 1, 1]) == 0.75
    assert scorers.auroc([0.5, 0.5], [0, 1]) == 0.5
    assert scorers.auroc([0.5, 0.7], [1, 1]) is None
    assert scorers.average_precision([0.1, 0.4, 0.35, 0.8], [0, 0, 1, 1]) == pytest.approx(5 / 6)
    assert scorers.average_precision([0.5], [0]) is None


def test_hateful_memes():
    score = scorers.hateful_memes([0.5, 0.6, 0.4, 0.9], [1, 1, 0, 0])
    assert score.correct == [False, True, True, False]  # 0.5 is not above 0.5
    assert score.metrics["official"] == {"accuracy": 0.5, "auroc": 0.5}
    part = scorers.hateful_memes([None, 0.6, 0.4], [1, 1, 0])
    assert part.metrics["official"] == {
        "accuracy": pytest.approx(2 / 3),
        "auroc": None,
        "auroc_answered": 1.0,
    }
    assert (part.metrics["missing"], part.metrics["headline"]["value"]) == (1, None)
    read = scorers.hateful_memes([0.1, 0.9], [1, 1], predictions=[1, None])
    assert read.correct == [True, False] and read.unparsable == 1
    assert read.metrics["official"]["auroc"] is None


def test_sarcasm():
    score = scorers.sarcasm([0.5, 0.51, 0, 1, None, None], [1, 1, 0, 0, 1, 0])
    assert score.correct == [False, True, True, False, False, False]
    official = score.metrics["official"]
    assert [official[key] for key in ("precision", "recall", "f1")] == [
        0.5,
        pytest.approx(1 / 3),
        pytest.approx(0.4),
    ]
    assert official["macro_recall"] == pytest.approx(1 / 3)
    nothing = scorers.sarcasm([0, 0], [0, 0]).metrics["official"]
    assert [nothing[key] for key in ("accuracy", "precision", "recall", "f1", "macro_f1")] == [
        1,
        0,
        0,
        0,
        0.5,
    ]


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("Yes, it is.", "yes"),
        ("NO", "no"),
        ("**no**", "no"),
        ("Nope", None),
        ("It is not", None),
        ("", None),
        ("yes_no", "yes"),
    ],
)
def test_yes_or_no_without_an_official_rule(text, read):
    assert scorers.read_yes_no(text) == read
