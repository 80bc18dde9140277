"""MME: two questions on a picture, yes and no; perception and cognition in points.

Follows ``eval_tool/calculation.py`` of BradyFU/Awesome-Multimodal-Large-Language-Models (branch Evaluation,
``calculate_metrics``): in lower case, the text is yes or no, or its first *four* characters hold "yes" or else "no"
("not sure", "none", "snow" are no, "eyes" yes, "unknown" neither). A subtask has acc (questions right, in percent) plus
acc+ (pictures with both right, in percent), 200 at most; perception is the sum over ten, cognition over four.

The script reads one line for each question, so that an answer with a newline or tab in it breaks it; here answers
are values, and a break after the fourth character changes nothing. Other harnesses (`style`): ``"lmms"`` (lmms-eval)
strips, deletes full stops, and takes "y" and "n"; ``"vlmevalkit"`` wants "yes" or "no" as a word and not both.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

from vlmamba.errors import DataError
from vlmamba.evaluation.scorers.base import Headline, Score, rate, rates
from vlmamba.evaluation.scorers.checks import check_ids, check_lengths, check_one_of, check_style, check_texts
from vlmamba.evaluation.scorers.yes_no import read_yes_no_vlmevalkit

STYLES = ("official", "lmms", "vlmevalkit")
SUBTASKS = {
    "Perception": (
        *("existence", "count", "position", "color", "posters"),
        *("celebrity", "scene", "landmark", "artwork", "OCR"),
    ),
    "Cognition": ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning"),
}
OTHER = "other"


def mme_answer(text: str, style: str = "official") -> str:
    """What a text is read as: "yes", "no" or "other"."""
    check_style(style, STYLES)
    if style == "vlmevalkit":
        return read_yes_no_vlmevalkit(text) or OTHER
    text = text.lower()
    if style == "lmms":
        text = text.strip().replace(".", "")
        if len(text) == 1:
            return {"y": "yes", "n": "no"}.get(text, OTHER)
    start = text[:4]
    return "yes" if "yes" in start else "no" if "no" in start else OTHER


def mme(
    predictions: Sequence[str | None],
    labels: Sequence[str],
    categories: Sequence[str],
    images: Sequence[Hashable],
    *,
    style: str = "official",
    ids: Sequence[Hashable] | None = None,
) -> Score:
    """MME's points.

    Args:
        predictions: What was answered; None where there is no answer, which is wrong.
        labels: "yes" or "no" for each question, in any case.
        categories: The subtask of each question, such as ``code_reasoning``.
        images: The picture of each question, by any name; within a subtask each must have two questions.
        style: Whose reading of answers; see the head of this file.
        ids: For messages, and to find duplicates. LLaVA's question ids are shared by the two questions of a picture,
            so give (id, question).

    Returns:
        ``official``: for ``Perception`` and ``Cognition`` the ``total`` and the ``scores`` of its subtasks, in points;
        ``absent`` lists subtasks with no question, which a comparable total must not have. ``subtasks``: ``acc``,
        ``acc_plus`` (shares), ``score``, ``other`` and ``images`` of each. The headline is perception, None while
        subtasks are absent. `Score.groups` is (subtask, picture).

    Raises:
        DataError: Lists of different length, no question, duplicate ids, other labels or subtasks, a picture without
            exactly two questions.
        ConfigError: Unknown style.
    """
    check_style(style, STYLES)
    check_lengths(predictions=predictions, labels=labels, categories=categories, images=images, ids=ids)
    check_ids(ids)
    check_texts(predictions, ids)
    truth = [label.lower() if isinstance(label, str) else label for label in labels]
    check_one_of("label", truth, ("yes", "no"), ids)
    check_one_of("subtask", categories, [name for names in SUBTASKS.values() for name in names], ids)
    parsed = [OTHER if p is None else mme_answer(p, style) for p in predictions]
    correct = [answer == label for answer, label in zip(parsed, truth, strict=True)]
    groups = list(zip(categories, images, strict=True))
    pairs = _pairs(groups)
    subtasks = {
        name: _subtask(
            [at for at, category in enumerate(categories) if category == name], pairs, correct, parsed
        )
        for names in SUBTASKS.values()
        for name in names
        if name in categories
    }
    official = {kind: _total(names, subtasks) for kind, names in SUBTASKS.items()}
    perception = official["Perception"]
    metrics = {
        "overall": rate(sum(correct), len(correct)),
        "categories": rates(correct, categories),
        "missing": sum(p is None for p in predictions),
        "subtasks": subtasks,
        "official": official,
        "headline": {
            "name": "MME perception",
            "value": None if perception["absent"] else perception["total"],
            "unit": "points",
        },
        "style": style,
    }
    unread = sum(a == OTHER and p is not None for a, p in zip(parsed, predictions, strict=True))
    read = [None if a == OTHER and p is None else a for a, p in zip(parsed, predictions, strict=True)]
    return Score(metrics, correct, unread, read, groups, _perception(correct, categories, pairs))


def _perception(
    correct: Sequence[bool],
    categories: Sequence[str],
    pairs: dict[tuple[str, Hashable], list[int]],
) -> Headline:
    """Points from questions right and pictures with both right of each subtask, of so many pictures."""
    names = [name for name in SUBTASKS["Perception"] if name in categories]
    rows = [[0.0] * (3 * len(names)) for _ in correct]
    for (name, _), (one, two) in pairs.items():
        if name in names:
            right = correct[one] + correct[two]
            start = 3 * names.index(name)
            rows[one][start : start + 3] = [right, right == 2, 1.0]
    return Headline(rows, "points")


def _pairs(groups: Sequence[tuple[str, Hashable]]) -> dict[tuple[str, Hashable], list[int]]:
    pairs: dict[tuple[str, Hashable], list[int]] = {}
    for at, group in enumerate(groups):
        pairs.setdefault(group, []).append(at)
    odd = [(group, len(rows)) for group, rows in pairs.items() if len(rows) != 2]
    if odd:
        examples = ", ".join(f"{image!r} of {name} ({count})" for (name, image), count in odd[:3])
        raise DataError(
            f"{len(odd)} of {len(pairs)} pictures do not have exactly two questions, such as {examples}: MME scores "
            "pictures by pairs"
        )
    return pairs


def _subtask(
    rows: Sequence[int],
    pairs: dict[tuple[str, Hashable], list[int]],
    correct: Sequence[bool],
    parsed: Sequence[str],
) -> dict[str, Any]:
    inside = set(rows)
    both = [correct[first] and correct[second] for first, second in pairs.values() if first in inside]
    acc = sum(correct[at] for at in rows) / len(rows)
    acc_plus = sum(both) / len(both)
    other = sum(parsed[at] == OTHER for at in rows)
    return {
        "acc": acc,
        "acc_plus": acc_plus,
        "score": acc * 100 + acc_plus * 100,
        "other": other,
        "images": len(both),
    }


def _total(names: Sequence[str], subtasks: dict[str, dict[str, Any]]) -> dict[str, Any]:
    scores = {name: subtasks[name]["score"] for name in names if name in subtasks}
    total = 0.0
    for score in scores.values():
        total += score
    absent = [name for name in names if name not in subtasks]
    return {"total": total, "scores": scores, "absent": absent}
