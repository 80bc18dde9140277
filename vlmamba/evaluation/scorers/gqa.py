"""GQA: accuracy and the official companions of it.

Follows the official ``eval.py`` of the data set (D. A. Hudson and C. D. Manning, CVPR 2019; gqadataset.org), which is
string equality with the stored answer, over balanced questions. Text becomes a prediction in the harness: LLaVA's
``scripts/convert_gqa_for_eval.py`` takes every trailing full stop off and lower-cases, nothing else ("dog. " stays
as it is and is wrong). Elsewhere (`style`):

* ``"raw"``: predictions are compared as they are, as the official script does;
* ``"lmms"``: lmms-eval strips the prediction, and lower-cases and rids of ASCII punctuation both sides;
* ``"prismatic"``: TRI-ML/vlm-evaluation rids the prediction of ASCII punctuation and lower-cases it, not the answer,
  so that "t-shirt" fails;
* ``"vlmevalkit"``: strips and lower-cases both sides, so that "Dog." fails.

The unmodified script loads scene graphs and choices, which the test-dev split does not have; here the questions are
enough. Grounding needs attention maps and is not computed.
"""

from __future__ import annotations

import string
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vlmamba.errors import DataError
from vlmamba.evaluation.scorers.base import Headline, Score, add, rate, rates
from vlmamba.evaluation.scorers.checks import check_style, check_texts

NO_STEP = ("exist", "query: name", "choose name")
"""Program entries with one of these are the final query, and no reasoning step."""
COMMON = ("color", "material", "shape")
"""Valid answers to what two things have in common."""
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)

_BY_STYLE: Mapping[str, tuple[Callable[[str], str], Callable[[str], str]]] = {
    "llava": (lambda text: gqa_prediction(text), str),
    "raw": (str, str),
    "lmms": (
        lambda text: text.strip().lower().translate(_NO_PUNCTUATION),
        lambda text: text.lower().translate(_NO_PUNCTUATION),
    ),
    "prismatic": (lambda text: text.translate(_NO_PUNCTUATION).lower(), str),
    "vlmevalkit": (lambda text: text.strip().lower(), lambda text: text.strip().lower()),
}


def gqa_prediction(text: str) -> str:
    """A model's text as LLaVA writes it into the predictions file."""
    return text.rstrip(".").lower()


def gqa(
    predictions: Mapping[str, str | None],
    questions: Mapping[str, Mapping[str, Any]],
    *,
    choices: Mapping[str, Mapping[str, Sequence[str]]] | None = None,
    consistency: bool = False,
    style: str = "llava",
    ignore_extra: bool = False,
) -> Score:
    """GQA's metrics.

    Args:
        predictions: The model's text for each question id; a question without one (or with None) is missing
            and wrong.
        questions: Rows of the official questions file by id. Of a row ``answer`` is needed; ``isBalanced``
            (true when left out), ``question``, ``types``, ``groups``, ``semantic`` and ``entailed`` are used.
        choices: The file ``<tier>_choices.json``; with it validity and plausibility are given.
        consistency: Also give consistency: `questions` must hold the entailed questions, too (an "all" tier).
        style: How text becomes a prediction; see the head of this file.
        ignore_extra: Leave out predictions for ids that are not asked; else they are an error.

    Returns:
        `Score.correct` is over all of `questions`, in their order; metrics are over balanced ones. ``official``:
        ``accuracy``, ``binary``, ``open``, ``distribution`` (lower is better; None where no question has a
        group), and ``validity``, ``plausibility``, ``consistency`` where asked, in percent, unrounded (the script
        prints two decimals), and ``accuracyPer...`` tables of percent. ``structural`` (also ``categories``),
        ``semantic``, ``detailed``, ``steps`` and ``words`` are tables of rates.

    Raises:
        DataError: No question, no prediction for any of them, predictions for other ids, a row without answer,
            choices or entailed questions that are needed and not there.
        ConfigError: Unknown style.
    """
    check_style(style, tuple(_BY_STYLE))
    _check(predictions, questions, ignore_extra)
    prepare, prepare_answer = _BY_STYLE[style]
    given = {key: predictions.get(key) for key in questions}
    parsed = {key: None if text is None else prepare(text) for key, text in given.items()}
    gold = {key: prepare_answer(row["answer"]) for key, row in questions.items()}
    right = {key: parsed[key] == gold[key] for key in questions}
    balanced = {key: row for key, row in questions.items() if row.get("isBalanced", True)}
    if not balanced:
        raise DataError(
            f"none of the {len(questions)} questions is balanced: GQA's accuracy is over balanced ones"
        )
    metrics = _accuracy(balanced, right)
    official = metrics["official"]
    official["distribution"] = _distribution(balanced, parsed, gold)
    if choices is not None:
        for kind, name in (("valid", "validity"), ("plausible", "plausibility")):
            official[name] = 100 * _mean(
                [_belongs(parsed[k], k, row, choices, kind) for k, row in balanced.items()]
            )
    if consistency:
        official["consistency"] = 100 * _consistency(balanced, right)
    metrics["missing"] = sum(given[key] is None for key in balanced)
    metrics["headline"] = {"name": "GQA accuracy", "value": official["accuracy"], "unit": "%"}
    metrics["style"] = style
    unparsable = sum(parsed[key] == "" for key in balanced)
    headline = Headline.share(list(right.values()), [key in balanced for key in questions])
    return Score(metrics, list(right.values()), unparsable, list(parsed.values()), headline=headline)


def _check(
    predictions: Mapping[str, str | None], questions: Mapping[str, Mapping[str, Any]], ignore_extra: bool
) -> None:
    if not questions:
        raise DataError("nothing to score: 0 questions. Check the questions file.")
    check_texts(list(predictions.values()), list(predictions))
    extra = [key for key in predictions if key not in questions]
    if len(extra) == len(predictions):
        raise DataError(
            f"none of the {len(questions)} questions has a prediction, {len(predictions)} predictions are for other "
            f"ids{_examples(extra)}: these answers belong to another split (ids of GQA are texts, not numbers)"
        )
    if extra and not ignore_extra:
        raise DataError(
            f"{len(extra)} of {len(predictions)} predictions are for ids that are not among the {len(questions)} "
            f"questions{_examples(extra)}: another split, or pass ignore_extra=True to leave them out"
        )
    for key, row in questions.items():
        if not isinstance(row.get("answer"), str):
            raise DataError(
                f"question {key!r} has no answer (it has {', '.join(row)}): a test split is scored by its server, "
                "write its submission file instead"
            )


def _examples(keys: Sequence[str]) -> str:
    return f", such as {', '.join(repr(key) for key in keys[:3])}" if keys else ""


def _accuracy(balanced: Mapping[str, Mapping[str, Any]], right: Mapping[str, bool]) -> dict[str, Any]:
    verdicts = [right[key] for key in balanced]
    rows = list(balanced.values())
    structural = [row.get("types", {}).get("structural") for row in rows]
    tables = {
        "structural": structural,
        "semantic": [row.get("types", {}).get("semantic") for row in rows],
        "detailed": [row.get("types", {}).get("detailed") for row in rows],
        "steps": [_steps(row["semantic"]) if "semantic" in row else None for row in rows],
        "words": [len(row["question"].split()) if "question" in row else None for row in rows],
    }
    found = {name: _rates(verdicts, column) for name, column in tables.items()}
    kinds = [None if kind is None else "open" if kind == "query" else "binary" for kind in structural]
    by_kind = _rates(verdicts, kinds)
    names = {"Structural": "StructuralType", "Semantic": "SemanticType", "Steps": "Steps", "Words": "Length"}
    official: dict[str, Any] = {name: _percent(by_kind.get(name)) for name in ("binary", "open")}
    official["accuracy"] = _mean(verdicts) * 100
    for table, name in names.items():
        column = found[table.lower()]
        official[f"accuracyPer{name}"] = {kind: _percent(value) for kind, value in column.items()}
    overall = rate(sum(verdicts), len(verdicts))
    return {"overall": overall, "categories": found["structural"], "official": official} | found | by_kind


def _rates(verdicts: Sequence[bool], names: Sequence[Any]) -> dict[str, dict[str, Any]]:
    pairs = [(ok, name) for ok, name in zip(verdicts, names, strict=True) if name is not None]
    return rates([ok for ok, _ in pairs], [name for _, name in pairs])


def _percent(value: Mapping[str, Any] | None) -> float:
    return value["accuracy"] * 100 if value else 0.0


def _mean(values: Sequence[float]) -> float:
    return add(values) / len(values) if values else 0.0


def _steps(program: Sequence[Mapping[str, Any]]) -> int:
    entries = (f"{entry['operation']}: {entry['argument']}" for entry in program)
    return sum(not any(mark in entry for mark in NO_STEP) for entry in entries)


def _distribution(
    balanced: Mapping[str, Mapping[str, Any]], parsed: Mapping[str, str | None], gold: Mapping[str, str]
) -> float | None:
    expected: dict[str, Counter[str]] = defaultdict(Counter)
    observed: dict[str, Counter[str | None]] = defaultdict(Counter)
    for key, row in balanced.items():
        group = (row.get("groups") or {}).get("global")
        if group is not None:
            expected[group][gold[key]] += 1
            observed[group][parsed[key]] += 1
    weighted, total = 0.0, 0
    for group, counts in expected.items():
        chi_square = add(
            float(observed[group][answer] - count) ** 2 / count for answer, count in counts.items()
        )
        size = sum(counts.values())
        weighted += chi_square * size
        total += size
    return weighted / total / 100 if total else None


def _belongs(
    prediction: str | None,
    key: str,
    row: Mapping[str, Any],
    choices: Mapping[str, Mapping[str, Sequence[str]]],
    kind: str,
) -> bool:
    if key not in choices:
        raise DataError(
            f"question {key!r} is not in the choices file ({len(choices)} questions): of another tier?"
        )
    common = "Common" in row["types"]["detailed"]
    return prediction in (COMMON if common else choices[key][kind])


def _consistency(balanced: Mapping[str, Mapping[str, Any]], right: Mapping[str, bool]) -> float:
    shares = []
    for key, row in balanced.items():
        entailed = [other for other in row["entailed"] if other != key]
        absent = [other for other in entailed if other not in right]
        if absent:
            raise DataError(
                f"question {key!r} entails {len(absent)} question(s) that are not among those given"
                f"{_examples(absent)}: consistency needs the file of all questions, not of the balanced ones"
            )
        if right[key] and entailed:
            shares.append(_mean([right[other] for other in entailed]))
    return _mean(shares)
