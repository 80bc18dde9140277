"""MM-Vet: open answers, graded elsewhere.

Grades come from a language model as judge (the paper: gpt-4-0613, five runs). `mm_vet_submission` makes the file that
the authors' evaluator takes, `mm_vet` aggregates the grades file which ``mm-vet_evaluator.py`` (yuweihao/MM-Vet,
``export_result``) leaves; there is no score without grades. Other judges give figures several points apart: VLMEvalKit
takes gpt-4-turbo; lmms-eval gpt-4o and a chain of thought in the question, and without a key reports 0.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from vlmamba.errors import DataError
from vlmamba.evaluation.scorers.base import Score, add, rate, rates

_KEY = re.compile(r"v1_\d+", re.ASCII)


def mm_vet_submission(answers: Mapping[Any, str | None]) -> dict[str, str]:
    """The file for the evaluator: every answer under its key ``v1_0`` .. ``v1_217``.

    Args:
        answers: Texts by question id, as a number (LLaVA's file) or as ``v1_n``.

    Raises:
        DataError: An id has another form or comes twice, or a question has no answer: the evaluator needs all.
    """
    if not answers:
        raise DataError("nothing to submit: 0 answers. Check that the file of answers is not empty.")
    found: dict[str, str] = {}
    for question, text in answers.items():
        key = str(question) if _KEY.fullmatch(str(question)) else f"v1_{question}"
        if not _KEY.fullmatch(key):
            raise DataError(f"the MM-Vet question id {question!r} is neither a number nor of the form 'v1_7'")
        if key in found:
            raise DataError(f"question {key!r} is answered more than once: keep one answer")
        if not isinstance(text, str):
            raise DataError(
                f"question {key!r} has no answer ({text!r}): the evaluator needs a text for every question"
            )
        found[key] = text
    return found


def mm_vet(
    grades: Mapping[str, Any],
    questions: Mapping[str, Mapping[str, Any]],
    *,
    runs: int | None = None,
    digits: int = 1,
) -> Score:
    """Aggregate a judge's grades.

    Args:
        grades: By ``v1_n``: ``{"score": [one grade for each run], ...}``, or a list of grades, or one grade; in 0..1.
        questions: Rows of ``mm-vet.json`` by ``v1_n``; ``capability`` is a list, or a text with commas.
        runs: How many runs of the judge to average; left out, all (every question must then have as many).
        digits: Decimals of ``official``.

    Returns:
        ``official``: ``total``, ``std`` (over runs) and ``runs``, and each capability, and ``integrations`` by the
        exact set of capabilities (names sorted, joined by ``_``), times 100 and rounded as numpy does.
        `Score.correct` is the mean grade of each question, in the order of `questions`.

    Raises:
        DataError: Grades and questions are not for the same ids, a grade is missing or outside 0..1.
    """
    scores = _scores(grades, questions, runs)
    count = len(next(iter(scores.values())))
    sets = {key: _capabilities(key, row) for key, row in questions.items()}
    by_name: dict[str, list[float]] = {}
    by_set: dict[str, list[float]] = {}
    total = [0.0] * count
    for key, given in scores.items():  # in the grades file's order, as the evaluator adds
        for table, names in ((by_name, sets[key]), (by_set, ["_".join(sets[key])])):
            for name in names:
                sums = table.setdefault(name, [0.0] * count)
                for run, grade in enumerate(given):
                    sums[run] += grade
        for run, grade in enumerate(given):
            total[run] += grade
    sizes = Counter(name for names in sets.values() for name in names)
    set_sizes = Counter("_".join(names) for names in sets.values())
    shares = [value / len(questions) * 100 for value in total]
    correct = [add(scores[key]) / count for key in questions]
    official: dict[str, Any] = {name: _mean(by_name[name], n, digits) for name, n in sizes.most_common()}
    official |= {"total": _round(add(shares) / count, digits), "std": _round(_deviation(shares), digits)}
    official["runs"] = [_round(share, digits) for share in shares]
    official["integrations"] = {name: _mean(by_set[name], n, digits) for name, n in set_sizes.most_common()}
    pairs = [(credit, name) for credit, names in zip(correct, sets.values(), strict=True) for name in names]
    metrics = {
        "overall": rate(add(correct), len(correct)),
        "categories": rates([credit for credit, _ in pairs], [name for _, name in pairs]),
        "missing": 0,
        "official": official,
        "judge": sorted({m for g in grades.values() if isinstance(g, Mapping) for m in g.get("model", ())}),
        "headline": {"name": "MM-Vet total", "value": add(shares) / count, "unit": "%"},
    }
    return Score(metrics, correct, 0)


def _scores(
    grades: Mapping[str, Any], questions: Mapping[str, Mapping[str, Any]], runs: int | None
) -> dict[str, list[float]]:
    if not questions or not grades:
        raise DataError(f"nothing to score: {len(grades)} grades and {len(questions)} questions")
    absent = [key for key in questions if key not in grades]
    extra = [key for key in grades if key not in questions]
    if absent or extra:
        raise DataError(
            f"{len(grades)} grades do not fit {len(questions)} questions: {len(absent)} questions without grade"
            f"{_examples(absent)}, {len(extra)} grades for other ids{_examples(extra)}. Have every answer graded."
        )
    scores = {}
    for key, entry in grades.items():
        given = entry.get("score") if isinstance(entry, Mapping) else entry
        given = list(given) if isinstance(given, list | tuple) else [given]
        if (
            any(not isinstance(g, int | float) or isinstance(g, bool) or not 0 <= g <= 1 for g in given)
            or not given
        ):
            raise DataError(f"the grades of {key!r} are {given!r:.80}: a grade is a number from 0 to 1")
        scores[key] = [float(grade) for grade in given]
    lengths = {len(given) for given in scores.values()}
    if runs is None and len(lengths) > 1:
        raise DataError(
            f"questions have {min(lengths)} to {max(lengths)} grades: say how many runs to average"
        )
    runs = runs or max(lengths)
    short = [key for key, given in scores.items() if len(given) < runs]
    if short:
        raise DataError(f"{len(short)} questions have fewer than {runs} grades{_examples(short)}")
    return {key: given[:runs] for key, given in scores.items()}


def _examples(keys: Sequence[str]) -> str:
    return f" (such as {', '.join(repr(key) for key in keys[:3])})" if keys else ""


def _capabilities(key: str, row: Mapping[str, Any]) -> list[str]:
    given = row.get("capability")
    names = given.split(",") if isinstance(given, str) else given
    if not names:
        raise DataError(f"question {key!r} has no capability ({given!r}): give the rows of mm-vet.json")
    return sorted({name.strip() for name in names})


def _mean(sums: Sequence[float], size: int, digits: int) -> float:
    return _round(add(value / size * 100 for value in sums) / len(sums), digits)


def _deviation(values: Sequence[float]) -> float:
    mean = add(values) / len(values)
    return (add((value - mean) ** 2 for value in values) / len(values)) ** 0.5


def _round(value: float, digits: int) -> float:
    """Round as numpy does: scale, round to even, scale back."""
    return float(round(value * 10**digits) / 10**digits)
