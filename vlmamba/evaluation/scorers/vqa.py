"""VQAv2, TextVQA and VizWiz: ten annotators' answers, each left out in turn.

The credit of an answer is the mean over the annotators of min(1, others who gave it / 3); with ten of them 0.3, 0.6
and 0.9 for an answer that one, two or three gave (not 1/3 and 2/3).

* `vqav2`: GT-Vision-Lab/VQA ``vqaEval.py`` (``VQAEval.evaluate``, Python 2, whose ``round`` takes halves away from
  zero). When all ten annotators agree *nothing* is normalised, not even case. ``style="lmms"`` is lmms-eval's
  ``vqav2_process_results``, which normalises always. Prismatic (TRI-ML/vlm-evaluation) normalises the prediction
  in full but of the annotators' answers the punctuation only. LLaVA uploads `normalise_m4c` of its answers.
* `textvqa`: facebookresearch/mmf ``m4c_evaluators.py`` (``TextVQAAccuracyEvaluator``), as LLaVA's
  ``eval_textvqa.py`` calls it; lmms-eval agrees.
* `vizwiz`: the VizWiz API's ``vqaEval.py``. The prediction is normalised, the annotators' answers are taken as
  written. ``style="llava"`` passes the answer through `normalise_m4c` first, as LLaVA's upload does;
  ``style="lmms"`` is lmms-eval's rule, m4c on both sides, which is much more lenient.
"""

from __future__ import annotations

import functools
import re
import statistics
from collections.abc import Callable, Hashable, Mapping, Sequence
from decimal import ROUND_HALF_UP, Decimal
from typing import Any

from vlmamba.errors import DataError
from vlmamba.evaluation.scorers.base import Score, add, rate, rates
from vlmamba.evaluation.scorers.checks import (
    check_ids,
    check_lengths,
    check_one_of,
    check_style,
    check_texts,
    place,
)
from vlmamba.evaluation.scorers.ranking import average_precision, binary_counts
from vlmamba.evaluation.scorers.vqa_text import (
    clean,
    normalise_m4c,
    normalise_vizwiz,
    normalise_vqa,
    normalise_vqa_lmms,
)

ANNOTATORS = 10
"""How many answers TextVQA has for each question; its evaluator asserts it."""
UNANSWERABLE = "unanswerable"
Normaliser = Callable[[str], str]


@functools.lru_cache(maxsize=4096)
def _credit(matches: tuple[bool, ...]) -> float:
    return add(_shares(matches)) / len(matches)


@functools.lru_cache(maxsize=4096)
def _credit_lmms(matches: tuple[bool, ...]) -> float:
    return float(statistics.mean(_shares(matches)))


def _shares(matches: tuple[bool, ...]) -> list[float]:
    same = sum(matches)
    return [min(1, float(same - match) / 3) for match in matches]


def vqav2(
    predictions: Sequence[str | None],
    answers: Sequence[Sequence[str]],
    *,
    answer_types: Sequence[str] | None = None,
    question_types: Sequence[str] | None = None,
    style: str = "official",
    ids: Sequence[Hashable] | None = None,
) -> Score:
    """VQAv2 accuracy.

    Args:
        predictions: What was answered, as the model wrote it; None where there is no answer (no credit).
        answers: The annotators' answers to each question, in the file's order.
        answer_types: ``yes/no``, ``number`` or ``other`` for each question.
        question_types: The file's question prefix for each question.
        style: ``"official"``, or ``"lmms"`` for lmms-eval's rule.
        ids: For messages, and to find duplicates.

    Returns:
        ``official``: ``overall``, ``perAnswerType`` and ``perQuestionType`` in percent as the script rounds them;
        ``categories`` by answer type, ``question_types`` by question type; `Score.parsed` holds the texts
        that were compared.

    Raises:
        DataError: Lists of different length, no question, duplicate ids, a question without answers.
        ConfigError: Unknown style.
    """
    check_style(style, ("official", "lmms"))
    _check(predictions, answers, ids, {"answer_types": answer_types, "question_types": question_types})
    official = style == "official"
    normalise = functools.cache(normalise_vqa if official else normalise_vqa_lmms)
    credit = _credit if official else _credit_lmms
    tidy = functools.cache(clean)
    correct, parsed = [], []
    for prediction, given in zip(predictions, answers, strict=True):
        same = official and len({tidy(answer) for answer in set(given)}) == 1
        prepare = tidy if same else normalise
        text = None if prediction is None else prepare(prediction)
        accepted = {answer for answer in set(given) if prepare(answer) == text}
        parsed.append(text)
        correct.append(0.0 if text is None else credit(tuple([answer in accepted for answer in given])))
    rounded = round_half_up if official else round
    metrics = _metrics(correct, predictions, answer_types, rounded)
    metrics["question_types"] = {} if question_types is None else rates(correct, question_types)
    metrics["official"]["perQuestionType"] = _percent_by(correct, question_types, rounded)
    return _score(metrics, correct, parsed, "VQA accuracy", style)


def textvqa(
    predictions: Sequence[str | None],
    answers: Sequence[Sequence[str]],
    *,
    ids: Sequence[Hashable] | None = None,
) -> Score:
    """TextVQA accuracy (m4c).

    Args:
        predictions: What was answered; None where there is no answer (no credit).
        answers: Ten answers for each question.
        ids: For messages, and to find duplicates; question ids of LLaVA's file are image ids and not unique,
            so give (image id, question).

    Returns:
        ``official``: ``accuracy`` in percent with two decimals.

    Raises:
        DataError: Lists of different length, no question, duplicate ids, other than ten answers.
    """
    _check(predictions, answers, ids, {}, annotators=ANNOTATORS)
    correct, parsed = _compare(predictions, answers, normalise_m4c, normalise_m4c)
    metrics = _metrics(correct, predictions, None, round)
    metrics["official"] = {"accuracy": metrics["official"]["overall"]}
    return _score(metrics, correct, parsed, "TextVQA accuracy", "m4c")


def vizwiz(
    predictions: Sequence[str | None],
    answers: Sequence[Sequence[str]],
    *,
    answer_types: Sequence[str] | None = None,
    answerable: Sequence[int] | None = None,
    answerable_scores: Sequence[float] | None = None,
    style: str = "official",
    ids: Sequence[Hashable] | None = None,
) -> Score:
    """VizWiz-VQA accuracy, and how well unanswerable questions are told.

    Args:
        predictions: What was answered; None where there is no answer (no credit).
        answers: The annotators' answers to each question (ten in the data set).
        answer_types: ``unanswerable``, ``other``, ``yes/no`` or ``number`` for each question.
        answerable: 1 or 0 for each question; with it average precision and F1 of *un*answerable are given.
        answerable_scores: The API's ``answerable`` field of a submission, in 0..1. Left out, it is 0 where the
            normalised answer is "unanswerable" and 1 elsewhere, as TRI-ML/vlm-evaluation does.
        style: ``"official"``, ``"llava"`` or ``"lmms"``; see the head of this file.
        ids: For messages, and to find duplicates.

    Returns:
        ``official``: ``overall`` and ``perAnswerType`` in percent with two decimals, and with `answerable` also
        ``unanswerability`` (``average_precision``, ``f1_score``), None where no question is unanswerable.

    Raises:
        DataError: Lists of different length, no question, duplicate ids, a question without answers.
        ConfigError: Unknown style.
    """
    check_style(style, ("official", "llava", "lmms"))
    columns = {"answer_types": answer_types, "answerable": answerable, "answerable_scores": answerable_scores}
    _check(predictions, answers, ids, columns)
    prepare = {
        "official": normalise_vizwiz,
        "llava": lambda text: normalise_vizwiz(normalise_m4c(text)),
        "lmms": normalise_m4c,
    }[style]
    lenient = style == "lmms"
    correct, parsed = _compare(
        predictions, answers, prepare, normalise_m4c if lenient else str, _credit_lmms if lenient else _credit
    )
    metrics = _metrics(correct, predictions, answer_types, round)
    if answerable is not None:
        check_one_of("answerable flag", answerable, (0, 1), ids)
        scores = answerable_scores
        if scores is None:
            scores = [float(text != UNANSWERABLE) for text in parsed]
        metrics["official"]["unanswerability"] = _unanswerability(scores, answerable)
    return _score(metrics, correct, parsed, "VizWiz accuracy", style)


def textvqa_question(prompt: str) -> str:
    """The question, in lower case, out of the prompt that LLaVA stored with an answer.

    Together with the image id it is the key of an annotation (LLaVA ``eval_textvqa.py``, ``prompt_processor``).

    Raises:
        DataError: The prompt has none of the known forms.
    """
    lines = prompt.split("\n")
    if prompt.startswith("OCR tokens: "):
        found = re.search(r"Question: (.*?) Short answer:", prompt, re.DOTALL)
        if found:
            return found.group(1).lower()
    elif "Reference OCR token: " in prompt and len(lines) == 3:
        return lines[1 if prompt.startswith("Reference OCR token:") else 0].lower()
    elif len(lines) == 2:
        return lines[0].lower()
    raise DataError(
        f"no TextVQA question in the prompt {prompt!r:.120}: expected the question, 'Reference OCR token: ...' and "
        f"the instruction on three lines, or question and instruction on two; this has {len(lines)} line(s)"
    )


def round_half_up(value: float, digits: int) -> float:
    """Round halves away from zero, as Python 2 does; `value` is taken as the exact binary number that it is."""
    return float(Decimal(value).quantize(Decimal(1).scaleb(-digits), ROUND_HALF_UP))


def _compare(
    predictions: Sequence[str | None],
    answers: Sequence[Sequence[str]],
    prepare: Normaliser,
    prepare_answer: Normaliser,
    credit: Callable[[tuple[bool, ...]], float] = _credit,
) -> tuple[list[float], list[str | None]]:
    prepare, prepare_answer = functools.cache(prepare), functools.cache(prepare_answer)
    parsed = [None if p is None else prepare(p) for p in predictions]
    correct = [
        0.0 if text is None else credit(tuple([prepare_answer(answer) == text for answer in given]))
        for text, given in zip(parsed, answers, strict=True)
    ]
    return correct, parsed


def _metrics(
    correct: Sequence[float],
    predictions: Sequence[str | None],
    answer_types: Sequence[str] | None,
    rounded: Callable[[float, int], float],
) -> dict[str, Any]:
    overall = add(correct)
    return {
        "overall": rate(overall, len(correct)),
        "categories": {} if answer_types is None else rates(correct, answer_types),
        "missing": sum(p is None for p in predictions),
        "official": {
            "overall": rounded(100 * overall / len(correct), 2),
            "perAnswerType": _percent_by(correct, answer_types, rounded),
        },
    }


def _percent_by(
    correct: Sequence[float], names: Sequence[str] | None, rounded: Callable[[float, int], float]
) -> dict[str, float]:
    kinds: dict[str, list[float]] = {}
    for credit, name in zip(correct, names or (), strict=False):
        kinds.setdefault(name, []).append(credit)
    return {name: rounded(100 * add(kinds[name]) / len(kinds[name]), 2) for name in sorted(kinds)}


def _score(
    metrics: dict[str, Any], correct: list[float], parsed: list[str | None], name: str, style: str
) -> Score:
    value = 100 * metrics["overall"]["accuracy"]
    metrics["headline"] = {"name": name, "value": value, "unit": "%"}
    metrics["style"] = style
    return Score(metrics, correct, sum(text == "" for text in parsed), parsed)


def _unanswerability(scores: Sequence[float], answerable: Sequence[int]) -> dict[str, float | None]:
    unanswerable = [1 - flag for flag in answerable]
    opposite = [1.0 - score for score in scores]
    precision = average_precision(opposite, unanswerable)
    counts = binary_counts([score > 0.5 for score in opposite], unanswerable)
    return {
        "average_precision": None if precision is None else round(100 * precision, 2),
        "f1_score": None if precision is None else round(100 * counts.f1, 2),
    }


def _check(
    predictions: Sequence[str | None],
    answers: Sequence[Sequence[str]],
    ids: Sequence[Hashable] | None,
    columns: Mapping[str, Sequence[Any] | None],
    annotators: int | None = None,
) -> None:
    check_lengths(predictions=predictions, lists_of_answers=answers, ids=ids, **columns)
    check_ids(ids)
    check_texts(predictions, ids)
    for index, given in enumerate(answers):
        if isinstance(given, str) or not given or not all(isinstance(answer, str) for answer in given):
            raise DataError(
                f"the answers of {place(ids, index)} are {given!r:.80}: give a list of the annotators' texts. A "
                "test split has none; write its submission file instead."
            )
        if annotators is not None and len(given) != annotators:
            raise DataError(f"{place(ids, index)} has {len(given)} answers, not {annotators}")
