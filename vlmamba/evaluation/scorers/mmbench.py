"""MMBench: multiple choice, asked once for each rotation of the options.

Follows open-compass/VLMEvalKit: letters by ``can_infer`` (``vlmeval/utils/matching_util.py``), circular figures by
``mcq_circular_eval`` and ``report_acc`` (``vlmeval/dataset/utils/multiple_choice.py``) under its ``exact_matching``
policy. A question is a hit when the letter is right in *every* rotation; an answer from which no letter can be read
is wrong and counted as unparsable. There, such answers go to a language model as judge, and to a random option if
that fails; here never. (A guard against the article "A", active there only with the variable VERBOSE, is left out.)

``style="lmms"`` is lmms-eval's older reading (``tasks/mmbench/mmbench_evals.py``, ``can_infer``): letters A to E as
words with their punctuation, twelve decorations in turn, then the option's text whatever the answer's length. Its
``mmbench_en_dev_static`` guesses further (any letter anywhere), and is not offered.
"""

from __future__ import annotations

import re
import string
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from vlmamba.errors import DataError
from vlmamba.evaluation.scorers.base import Headline, Score, rate, rates
from vlmamba.evaluation.scorers.checks import check_ids, check_lengths, check_one_of, check_style, check_texts

ROTATION = 1_000_000
"""Row k * ROTATION + i is the k-th rotation of question i."""
STYLES = ("vlmevalkit", "lmms")
API_FAILED = "Failed to obtain answer via API"
REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
NONE_OF_THEM = "Z"
ABBREVIATIONS = {
    "coarse_perception": "CP",
    "finegrained_perception (instance-level)": "FP-S",
    "finegrained_perception (cross-instance)": "FP-C",
    "logic_reasoning": "LR",
    "relation_reasoning": "RR",
    "attribute_reasoning": "AR",
}
"""How the official report names the L2 abilities."""

_MARKS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_ANSWER_IS = re.compile(r"(?:correct\s+)?answer\s+is\s+\**([ABCD])\**", re.IGNORECASE)
_DECORATIONS = (
    *(("", "."), ("", ","), ("", ":"), ("", ")"), ("", ")."), ("(", ")"), ("(", ").")),
    *((":", ""), (":", ","), (":", "."), (":", ")"), (":", ").")),
)


def mmbench_letter(text: str, options: Mapping[str, Any], style: str = "vlmevalkit") -> str | None:
    """The letter of the option that an answer names.

    Args:
        text: The answer.
        options: Text of each option by its letter; None and "" are options that do not exist.
        style: Whose rules; see the head of this file.

    Returns:
        A letter, ``"Z"`` for a refusal, or None where nothing can be read (a judge's case elsewhere).
    """
    check_style(style, STYLES)
    present = {
        letter: str(option) for letter, option in options.items() if option is not None and option != ""
    }
    if style == "lmms":
        return _decorated_letter(text) or _named_option(text, present, longest=None)
    return _bare_letter(text, present) or _named_option(text, present, longest=2)


def _bare_letter(text: str, options: Mapping[str, str]) -> str | None:
    if API_FAILED in text:
        return None
    if any(refusal in text for refusal in REFUSALS):
        return NONE_OF_THEM
    words = text.translate(_MARKS).split()
    named = [letter for letter in options if letter in words]
    if len(named) == 1 and words.index(named[0]) > len(words) - 5:
        return named[0]
    if not named and NONE_OF_THEM in words:
        return NONE_OF_THEM
    found = _ANSWER_IS.search(text)
    letter = found.group(1).upper() if found else None
    return letter if letter in options else None


def _decorated_letter(text: str) -> str | None:
    if API_FAILED in text:
        return None
    words = text.split()
    named = [letter for letter in "ABCDE" if letter in words]
    if len(named) == 1 and not ("A" in words and len(words) > 3):
        return named[0]
    for before, after in _DECORATIONS:
        named = [letter for letter in "ABCDE" if before + letter + after in words]
        if len(named) == 1:
            return named[0]
    return None


def _named_option(text: str, options: Mapping[str, str], longest: int | None) -> str | None:
    """The one option whose text stands in the answer, unless the answer is `longest` times as long as all."""
    text = text.lower()
    if longest is not None and len(text) > longest * sum(len(option) for option in options.values()):
        return None
    named = [letter for letter, option in options.items() if option.lower() in text]
    return named[0] if len(named) == 1 else None


def mmbench(
    predictions: Sequence[str | None],
    indices: Sequence[int],
    options: Sequence[Mapping[str, Any]],
    answers: Sequence[str],
    *,
    categories: Sequence[str] | None = None,
    l2_categories: Sequence[str] | None = None,
    splits: Sequence[str] | None = None,
    style: str = "vlmevalkit",
) -> Score:
    """MMBench, circular and vanilla. Lists have one entry for each row of the TSV, rotations included.

    Args:
        predictions: What was answered; None where there is no answer, which is wrong.
        indices: The row's ``index``.
        options: The row's options by letter; absent ones left out, None or "".
        answers: The row's right letter.
        categories: The row's ``category`` (L3).
        l2_categories: The row's ``l2-category``.
        splits: The row's ``split``.
        style: Whose reading of letters; see the head of this file.

    Returns:
        `Score.correct` is by row, `Score.groups` the question of each row. ``overall`` and ``categories`` (L2, by full
        name), ``l3`` are circular rates over questions, ``vanilla_main`` and ``vanilla_all`` rates over the main rows
        and all rows. ``official``: for each split what ``report_acc`` tabulates (shares). ``circular``: counts of
        questions, rows, ``incomplete`` questions (fewer rows than options; without its rotations a question is
        vanilla) and ``orphans`` (rotations without main row, left out of circular figures as in the official code).

    Raises:
        DataError: Lists of different length, no row, duplicate indices, no main row, an answer that is no letter.
        ConfigError: Unknown style.
    """
    check_style(style, STYLES)
    named = {"categories": categories, "l2_categories": l2_categories, "splits": splits}
    check_lengths(
        predictions=predictions, indices=indices, lists_of_options=options, answers=answers, **named
    )
    check_ids(indices)
    check_texts(predictions, indices)
    check_one_of("answer", answers, tuple(string.ascii_uppercase), indices)
    _check_indices(indices)
    parsed = [
        None if p is None else mmbench_letter(p, o, style) for p, o in zip(predictions, options, strict=True)
    ]
    correct = [letter == answer for letter, answer in zip(parsed, answers, strict=True)]
    questions = [index % ROTATION for index in indices]
    rows: dict[int, list[int]] = {}
    for row, question in enumerate(questions):
        rows.setdefault(question, []).append(row)
    main = [row for row, index in enumerate(indices) if index < ROTATION]
    hits = [all(correct[row] for row in rows[indices[at]]) for at in main]
    columns = {name: [column[at] for at in main] for name, column in named.items() if column is not None}
    incomplete = sum(len(rows[indices[at]]) < _count(options[at]) for at in main)
    covered = sum(len(rows[indices[at]]) for at in main)
    metrics = {
        "overall": rate(sum(hits), len(hits)),
        "categories": rates(hits, columns["l2_categories"]) if "l2_categories" in columns else {},
        "l3": rates(hits, columns["categories"]) if "categories" in columns else {},
        "vanilla_main": rate(sum(correct[at] for at in main), len(main)),
        "vanilla_all": rate(sum(correct), len(correct)),
        "missing": sum(p is None for p in predictions),
        "circular": {
            "questions": len(main),
            "rows": len(correct),
            "incomplete": incomplete,
            "orphans": len(correct) - covered,
        },
        "official": _report(hits, columns),
        "headline": {"name": "MMBench circular accuracy", "value": 100 * sum(hits) / len(hits), "unit": "%"},
        "style": style,
    }
    unparsable = sum(letter is None and p is not None for letter, p in zip(parsed, predictions, strict=True))
    hit = dict(zip(main, hits, strict=True))
    headline = Headline.share(
        [hit.get(row, False) for row in range(len(indices))], [row in hit for row in range(len(indices))]
    )
    return Score(metrics, correct, unparsable, parsed, questions, headline)


def _check_indices(indices: Sequence[Hashable]) -> None:
    for position, index in enumerate(indices):
        if not isinstance(index, int) or index < 0:
            raise DataError(f"the index of row {position + 1} is {index!r}: give the TSV's whole number")
    if not any(isinstance(index, int) and index < ROTATION for index in indices):
        raise DataError(
            f"none of the {len(indices)} rows is a main row (index below {ROTATION}): circular figures are over these"
        )


def _count(options: Mapping[str, Any]) -> int:
    return sum(option is not None and option != "" for option in options.values())


def _report(hits: Sequence[bool], columns: Mapping[str, Sequence[str]]) -> dict[str, dict[str, float]]:
    """Shares by split: overall, L2 abilities by their short names, L3 abilities."""
    splits = columns.get("splits", ["none"] * len(hits))
    report: dict[str, dict[str, float]] = {}
    for split in sorted(set(splits)):
        inside = [at for at, name in enumerate(splits) if name == split]
        report[split] = {"Overall": sum(hits[at] for at in inside) / len(inside)}
        for level in ("l2_categories", "categories"):
            names = columns.get(level)
            for name in sorted({names[at] for at in inside}) if names else ():
                own = [hits[at] for at in inside if names[at] == name]  # type: ignore[index]
                report[split][ABBREVIATIONS.get(name, name)] = sum(own) / len(own)
    return report
