"""Golden values of the VQA family, row by row, worked out by hand from the rules."""

from __future__ import annotations

import pytest

from vlmamba.errors import DataError
from vlmamba.evaluation.scorers import (
    normalise_m4c,
    normalise_vizwiz,
    normalise_vqa,
    textvqa,
    textvqa_question,
    vizwiz,
    vqav2,
)
from vlmamba.evaluation.scorers.vqa import round_half_up
from vlmamba.evaluation.scorers.vqa_text import CONTRACTIONS, VIZWIZ_CONTRACTIONS


@pytest.mark.parametrize(
    ("text", "official", "m4c"),
    [
        ("Yes.", "yes", "yes"),
        ("1,000", "1000", "1000"),
        ("1, 2", "1 2", "1 2"),
        ("10,5", "105", "105"),
        ("$1,000", "$1000", "$1000"),
        ("red,blue", "red blue", "redblue"),
        ("red, blue", "red blue", "red blue"),
        ("1,5;b", "15b", "15 b"),  # a comma between digits deletes every mark; m4c has no commas left
        ("t-shirt", "t shirt", "t shirt"),
        ("t - shirt", "t shirt", "t shirt"),
        ("t- shirt", "t shirt", "t shirt"),
        ("a-b c- d", "ab c d", "ab c d"),  # one "- " deletes all of them
        ("red/blue", "red blue", "red blue"),
        ("red / blue", "red blue", "red blue"),
        ("what?x", "what x", "whatx"),
        ("what? x", "what x", "what x"),
        ("5.", "5", "5"),
        ("3.5", "3.5", "3.5"),
        (".5", ".5", ".5"),
        ("a.1", "a.1", "a.1"),
        ("1.a", "1a", "1a"),
        ("U.S.A.", "usa", "usa"),
        ("3.٥", "3٥", "3.٥"),  # Python 2 knows no digits but 0-9
        ("1,٥", "1 ٥", "1٥"),
        ("." * 32 + "x", "x", "x"),
        ("." * 34 + "x", "..x", "..x"),  # 32 at most
        ("the", "", ""),
        ("The an A", "", ""),
        ("none", "0", "0"),
        ("Ten", "10", "10"),
        ("twenty one", "twenty 1", "twenty 1"),
        ("eleven", "eleven", "eleven"),
        ("one's", "one's", "1 's"),
        ("men's", "men's", "men 's"),
        ("it's", "it's", "it 's"),
        ("MEN'S", "men's", "men 's"),
        ("hes", "he's", "he's"),
        ("he's", "he's", "he 's"),
        ("dont", "don't", "don't"),
        ("Im", "im", "im"),  # keys with a capital never match
        ("Id've", "id've", "id've"),
        ("let's", "let's", "let 's"),
        ("lets", "lets", "lets"),
        ("its", "its", "its"),
        ("somebody'd", "somebodyd", "somebodyd"),
        ("ow's'at", "'ow's'at", "ow 's'at"),
        ("4:30 pm", "4:30 pm", "4:30 pm"),
        ("50%", "50%", "50%"),
        ("#1 & *2*", "#1 & *2*", "#1 & *2*"),
        ("rock'n'roll", "rock'n'roll", "rock'n'roll"),
        ("a\nb", "b", "b"),
        ("x\u00a0y", "x y", "x y"),
        ("x\u200by", "x\u200by", "x\u200by"),
        ("don’t", "don’t", "don’t"),
        ("ΟΔΟΣ", "οδοσ", "οδος"),  # Python 2 lowers letter by letter
        ("İ", "i", "i\u0307"),
        ('say "hi"', "say hi", "say hi"),
        ("[red]", "red", "red"),
        ("a_b", "b", "b"),
        ("x@y<z>w", "x y z w", "x y z w"),
        ("back\\slash", "back slash", "back slash"),
        ("", "", ""),
    ],
)
def test_normalisers(text, official, m4c):
    assert normalise_vqa(text) == official
    assert normalise_m4c(text) == m4c


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("dont", "don’t"),
        ("cant", "can't"),
        ("couldnt", "couldn't"),
        ("wheres", "where's"),
        ("couldn'tve", "couldn’t’ve"),
    ],
)
def test_vizwiz_contracts_with_typographic_apostrophes(text, expected):
    assert normalise_vizwiz(text) == expected
    assert len(CONTRACTIONS) == len(VIZWIZ_CONTRACTIONS) == 120
    assert len(set(CONTRACTIONS.values())) == 98


@pytest.mark.parametrize(("same", "credit"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (9, 1.0)])
def test_each_annotator_is_left_out_in_turn(same, credit):
    answers = ["cat"] * same + ["dog"] * (9 - same) + ["cow"]
    assert vqav2(["cat"], [answers]).correct == pytest.approx([credit])


@pytest.mark.parametrize(
    ("prediction", "answers", "official", "lmms"),
    [
        ("Yes", ["yes"] * 10, 0, 1),  # all agree: nothing is normalised
        ("yes.", ["yes"] * 10, 0, 1),
        (" yes\n", ["yes"] * 10, 1, 1),  # but ends are stripped
        ("yes", [" yes", "yes\n"] * 5, 1, 1),  # all agree after stripping
        ("Yes", ["yes"] * 9 + ["no"], 1, 1),
        ("Yes", ["yes"] * 9 + ["yes."], 1, 1),  # not all agree, so normalised
        ("2", ["two"] * 10, 0, 1),
        ("two", ["two"] * 10, 1, 1),
        ("the", ["a"] * 5 + ["an"] * 5, 1, 1),  # both normalise to nothing
        ("1,,000", ["1000"] * 9 + ["x"], 0, 1),  # lmms-eval's comma rule takes several
        (None, ["the"] * 5 + ["a"] * 5, 0, 0),
    ],
)
def test_unanimous_answers_are_compared_as_they_are(prediction, answers, official, lmms):
    assert vqav2([prediction], [answers]).correct == [official]
    assert vqav2([prediction], [answers], style="lmms").correct == [lmms]


def test_vqav2_tables_and_counts():
    yes, no = ["yes"] * 10, ["no"] * 7 + ["yes"] * 3
    score = vqav2(
        ["yes", "Yes", None, "the"],
        [yes, no, yes, yes],
        answer_types=["yes/no", "other", "yes/no", "other"],
        question_types=["is", "what", "is", "is"],
    )
    assert score.correct == [1.0, pytest.approx(0.9), 0.0, 0.0]
    assert score.parsed == ["yes", "yes", None, "the"]
    assert score.metrics["official"] == {
        "overall": 47.5,
        "perAnswerType": {"other": 45.0, "yes/no": 50.0},
        "perQuestionType": {"is": 33.33, "what": 90.0},
    }
    assert score.metrics["missing"] == 1
    assert score.metrics["categories"]["yes/no"]["accuracy"] == 0.5
    assert list(score.metrics["question_types"]) == ["is", "what"]
    assert score.metrics["headline"] == {"name": "VQA accuracy", "value": pytest.approx(47.5), "unit": "%"}


@pytest.mark.parametrize(
    ("value", "expected"), [(53.125, 53.13), (0.125, 0.13), (2.675, 2.67), (1.005, 1.0), (90.0, 90.0)]
)
def test_halves_are_rounded_away_from_zero_as_python_2_does(value, expected):
    assert round_half_up(value, 2) == expected


@pytest.mark.parametrize(
    ("prediction", "answers", "official", "llava", "lmms"),
    [
        ("Unanswerable.", ["unanswerable"] * 10, 1, 1, 1),
        ("yes", ["Yes"] * 10, 0, 0, 1),  # annotators' answers are not normalised
        ("Yes", ["yes"] * 10, 1, 1, 1),
        ("dog", ["dog."] * 10, 0, 0, 1),
        ("dont know", ["don't know"] * 10, 0, 1, 1),  # the API's own contraction never matches, m4c's does
        ("men's", ["men's"] * 10, 1, 0, 1),  # m4c takes it apart
        ("two", ["2"] * 10, 1, 1, 1),
        ("2", ["two"] * 10, 0, 0, 1),
        ("red,blue", ["red blue"] * 10, 1, 0, 0),
    ],
)
def test_vizwiz_compares_with_raw_answers(prediction, answers, official, llava, lmms):
    styles = {"official": official, "llava": llava, "lmms": lmms}
    found = {style: vizwiz([prediction], [answers], style=style).correct[0] for style in styles}
    assert found == styles


def test_vizwiz_unanswerable():
    answers = [["cat"] * 10] * 4
    predictions = ["Unanswerable", "cat", "un-answerable", "the unanswerable!"]
    score = vizwiz(predictions, answers, answerable=[0, 1, 0, 1])
    # read as unanswerable: first and last; of the two that are, the first
    assert score.metrics["official"]["unanswerability"] == {"average_precision": 50.0, "f1_score": 50.0}
    given = vizwiz(predictions, answers, answerable=[0, 1, 0, 1], answerable_scores=[0.1, 0.9, 0.2, 0.8])
    assert given.metrics["official"]["unanswerability"] == {"average_precision": 100.0, "f1_score": 100.0}
    none = vizwiz(predictions, answers, answerable=[1, 1, 1, 1])
    assert none.metrics["official"]["unanswerability"] == {"average_precision": None, "f1_score": None}


@pytest.mark.parametrize(
    ("prompt", "question"),
    [
        ("What IS it?\nReference OCR token: a, b\nAnswer the question.", "what is it?"),
        ("Reference OCR token: a, b\nWhat IS it?\nAnswer the question.", "what is it?"),
        ("What is it?\nAnswer the question.", "what is it?"),
        ("OCR tokens: x, y. Question: What\nis it? Short answer:", "what\nis it?"),
    ],
)
def test_question_of_a_stored_textvqa_prompt(prompt, question):
    assert textvqa_question(prompt) == question


@pytest.mark.parametrize(
    "prompt", ["What is it?", "a\nb\nc", "OCR tokens: x. Short answer:", "a\nReference OCR token: b\nc\nd"]
)
def test_other_textvqa_prompts_are_refused(prompt):
    with pytest.raises(DataError, match="no TextVQA question in the prompt"):
        textvqa_question(prompt)


def test_textvqa_wants_ten_answers():
    with pytest.raises(DataError, match="question 'q1' has 9 answers, not 10"):
        textvqa(["a", "b"], [["a"] * 10, ["b"] * 9], ids=["q0", "q1"])
