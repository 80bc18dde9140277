"""ScienceQA: multiple choice over text and pictures; IMG is the part with a picture.

Letters follow LLaVA's ``llava/eval/eval_science_qa.py``: the whole text is a letter A to E; or it begins with one, a
full stop *and a space*; or "The answer is X" with some character behind it occurs exactly once. Nothing is stripped,
case counts: "A.", "(A)", "a" and " A" are wrong. A letter beyond the choices is wrong. The table by subject, context
and grade is lupantech/ScienceQA ``tools/evaluate_acc.py`` (``get_scores``).

LLaVA counts as IMG the answers whose *stored prompt* has ``<image>``, so that a missing answer leaves the denominator;
here the problem's picture decides and the denominator stays (2,017 of the test split). Both are given; they agree when
nothing is missing. ``style="lmms"`` is lmms-eval's ``sqa_process_results``: the stripped text equals the letter in any
case, or begins with it in upper case and a full stop.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from vlmamba.errors import DataError
from vlmamba.evaluation.scorers.base import Headline, Score, rate, rates
from vlmamba.evaluation.scorers.checks import check_ids, check_lengths, check_style, check_texts, place

OPTIONS = "ABCDE"
STYLES = ("llava", "lmms")
_THE_ANSWER_IS = re.compile(r"The answer is ([A-Z]).")
_SUBJECTS = {"natural": "natural science", "social": "social science", "language": "language science"}
_GRADES = {
    "grade_1_6": [f"grade{n}" for n in range(1, 7)],
    "grade_7_12": [f"grade{n}" for n in range(7, 13)],
}


def scienceqa_letter(text: str, style: str = "llava") -> str | None:
    """The letter that an answer gives, or None; it may be one that the question does not have."""
    check_style(style, STYLES)
    if style == "lmms":
        text = text.strip()
        if len(text) == 1 and text.upper() in OPTIONS:
            return text.upper()
        return text[0] if len(text) >= 2 and text[0].isupper() and text[1] == "." else None
    if len(text) == 1 and text in OPTIONS:
        return text
    if len(text) >= 3 and text[0] in OPTIONS and text[1:3] == ". ":
        return text[0]
    found = _THE_ANSWER_IS.findall(text)
    return found[0] if len(found) == 1 else None


def scienceqa(
    predictions: Sequence[str | None],
    problems: Sequence[Mapping[str, Any]],
    *,
    multimodal: Sequence[bool] | None = None,
    style: str = "llava",
    ids: Sequence[Hashable] | None = None,
) -> Score:
    """ScienceQA accuracy.

    Args:
        predictions: What was answered; None where there is no answer, which is wrong.
        problems: Rows of ``problems.json`` (or of the Hugging Face set): ``choices`` and ``answer`` (an index) are
            needed; ``image``, ``hint``, ``subject``, ``grade`` and ``topic`` make the tables. ``image`` counts as
            there when it is neither None nor "".
        multimodal: Whether the prompt stored with each answer has ``<image>`` (LLaVA's rule for IMG). Left out: the
            question was answered and has a picture.
        style: Whose reading of letters; see the head of this file.
        ids: For messages, and to find duplicates.

    Returns:
        ``img`` is the rate over problems with a picture, and the headline; ``categories`` is by subject, ``context``,
        ``grade`` and ``topic`` are tables of rates. ``official``: LLaVA's ``acc``, ``correct``, ``count`` and
        ``img_acc`` (percent, unrounded; None where no prompt has a picture), and ScienceQA's ``acc_...`` as it prints
        them (text with two decimals, -1 where there is no such problem).

    Raises:
        DataError: Lists of different length, no question, duplicate ids, a row without choices or with an answer that
            is none of them.
        ConfigError: Unknown style.
    """
    check_style(style, STYLES)
    check_lengths(predictions=predictions, problems=problems, multimodal=multimodal, ids=ids)
    check_ids(ids)
    check_texts(predictions, ids)
    _check(problems, ids)
    parsed = [None if p is None else scienceqa_letter(p, style) for p in predictions]
    correct = [letter == OPTIONS[row["answer"]] for letter, row in zip(parsed, problems, strict=True)]
    pictured = [_there(row, "image") for row in problems]
    if multimodal is None:
        multimodal = [seen and p is not None for seen, p in zip(pictured, predictions, strict=True)]
    shown = [ok for ok, flag in zip(correct, multimodal, strict=True) if flag]
    img = [ok for ok, flag in zip(correct, pictured, strict=True) if flag]
    metrics = {
        "overall": rate(sum(correct), len(correct)),
        "categories": _rates(correct, problems, "subject"),
        "img": rate(sum(img), len(img)),
        "context": rates(correct, [_context(row) for row in problems]),
        "grade": _rates(correct, problems, "grade"),
        "topic": _rates(correct, problems, "topic"),
        "missing": sum(p is None for p in predictions),
        "official": {
            "acc": sum(correct) / len(correct) * 100,
            "correct": sum(correct),
            "count": len(correct),
            "img_acc": sum(shown) / len(shown) * 100 if shown else None,
            **_table(correct, problems),
        },
        "headline": {
            "name": "ScienceQA-IMG accuracy",
            "value": 100 * sum(img) / len(img) if img else None,
            "unit": "%",
        },
        "style": style,
    }
    unread = [letter is None and p is not None for letter, p in zip(parsed, predictions, strict=True)]
    return Score(metrics, correct, sum(unread), parsed, headline=Headline.share(correct, pictured))


def _check(problems: Sequence[Mapping[str, Any]], ids: Sequence[Hashable] | None) -> None:
    for index, row in enumerate(problems):
        choices, answer = row.get("choices"), row.get("answer")
        if not isinstance(choices, list | tuple) or not 1 <= len(choices) <= len(OPTIONS):
            raise DataError(
                f"{place(ids, index)} has the choices {choices!r:.80}: give a list of 1 to {len(OPTIONS)}"
            )
        if not isinstance(answer, int) or not 0 <= answer < len(choices):
            raise DataError(
                f"{place(ids, index)} has the answer {answer!r} and {len(choices)} choices: the answer is the index "
                "of the right one, from 0"
            )


def _there(row: Mapping[str, Any], key: str) -> bool:
    value = row.get(key)
    return value is not None and not (isinstance(value, str) and value == "")


def _context(row: Mapping[str, Any]) -> str:
    text, image = _there(row, "hint"), _there(row, "image")
    return "text and image" if text and image else "text" if text else "image" if image else "none"


def _rates(
    correct: Sequence[bool], problems: Sequence[Mapping[str, Any]], key: str
) -> dict[str, dict[str, Any]]:
    pairs = [(ok, row[key]) for ok, row in zip(correct, problems, strict=True) if row.get(key) is not None]
    return rates([ok for ok, _ in pairs], [name for _, name in pairs])


def _table(correct: Sequence[bool], problems: Sequence[Mapping[str, Any]]) -> dict[str, str | int]:
    """The columns of the paper's table: subjects, contexts, grades, all; then topics."""

    def share(flags: list[bool]) -> str | int:
        inside = [ok for ok, flag in zip(correct, flags, strict=True) if flag]
        return f"{sum(inside) / len(inside) * 100:.2f}" if inside else -1

    text = [_there(row, "hint") for row in problems]
    image = [_there(row, "image") for row in problems]
    table = {
        f"acc_{key}": share([row.get("subject") == name for row in problems])
        for key, name in _SUBJECTS.items()
    }
    table["acc_has_text"] = share(text)
    table["acc_has_image"] = share(image)
    table["acc_no_context"] = share([not t and not i for t, i in zip(text, image, strict=True)])
    for key, names in _GRADES.items():
        table[f"acc_{key}"] = share([row.get("grade") in names for row in problems])
    table["acc_average"] = share([True] * len(problems))
    for topic in sorted({row["topic"] for row in problems if row.get("topic") is not None}):
        table[f"acc_{topic}"] = share([row.get("topic") == topic for row in problems])
    return table
