"""Adversarial items for POPE and MME, Hateful Memes and sarcasm: answers that rules read differently."""

from __future__ import annotations

from typing import Any

from tests.evaluation.scorers.stress import Dice

YES_NO_TEXTS = (
    *("Yes", "No", "yes", "no", "YES", "NO", "nO", "Yes.", "No.", "no.", "yes,", "No,", "no!", "No!", "No;", "no:"),
    *("", " ", ".", ",", "Not", "not", "Nope", "none", "None", "nothing", "Noah", "know", "snow", "unknown", "eyes"),
    *("Yes, there is a dog.", "No, there is no dog.", "There isn't any", "cannot tell", "I do not know", "not sure"),
    *("It is unclear. no", "It is unclear, no", "There are no,yes", "no\nyes", "No\n", "yes\nno", "\nno", "no\tyes"),
    *("yes and no", "no and yes", "Yes/No", "yes no", " no", " yes", "no ", "  no", "a no", "the answer is no"),
    *("The answer is no.", "The answer: No", "(No)", "[yes]", "'no'", '"no"', "**No**", "no-one", "no one", "non"),
    *("y", "n", "Y", "N", "y.", "n.", "x", "ye", "yes1", "1 yes", "1,2 no", "no1", "1.no", "..no", ".no", "yes.no"),
    *("no\u00a0dog", "nо", "ｙｅｓ", "ＮＯ", "İno", "NoT", "nÖ", "yes\u200b", "not yes", "yes, not no", "Y e s", "n o"),
    *("There is not. yes", "There is not, yes", "I see.no", "No.yes", "Yes.No", "nonono", "yesyes", "No?", "no?"),
)  # fmt: skip


def yes_no_text(dice: Dice) -> str:
    text = dice.pick(YES_NO_TEXTS)
    if dice.chance(0.2):
        text = text + dice.pick((" ", ". ", ", ", "\n", "")) + dice.pick(YES_NO_TEXTS)
    return text


def pope_items(count: int = 900) -> list[dict[str, Any]]:
    """Questions of three splits in turn, ids starting again in each."""
    dice = Dice(2305)
    splits = ("adversarial", "popular", "random")
    return [
        {
            "question_id": number // 3 + 1,
            "split": splits[number % 3],
            "label": dice.pick(("yes", "no")),
            "text": YES_NO_TEXTS[number] if number < len(YES_NO_TEXTS) else yes_no_text(dice),
        }
        for number in range(count)
    ]


def mme_items(pictures: int = 22) -> list[dict[str, Any]]:
    """Two questions on each picture, fourteen subtasks of different size."""
    from vlmamba.evaluation.scorers.mme import SUBTASKS

    dice = Dice(2306)
    items = []
    for place, name in enumerate(name for names in SUBTASKS.values() for name in names):
        for picture in range(pictures + place % 5):
            for question in range(2):
                text = YES_NO_TEXTS[len(items) % len(YES_NO_TEXTS)] if picture < 11 else yes_no_text(dice)
                label = dice.pick(("Yes", "No"))
                if dice.chance(0.5):
                    text = label + dice.pick(("", ".", ", it is", " "))
                items.append(
                    {
                        "category": name,
                        "image": f"{picture:04d}.jpg",
                        "question": f"Is it {question}?  Please answer yes or no.",
                        "label": label,
                        "text": text.replace("\n", " ").replace("\t", " "),
                    }
                )
    return items


def score_items(count: int = 400) -> dict[str, list[dict[str, Any]]]:
    """Probabilities and labels, several sets: with ties, at the threshold, one-sided, tiny."""
    dice = Dice(2005)
    grid = (0.0, 0.25, 0.5, 0.5, 0.5000001, 0.4999999, 0.75, 1.0, 1e-12, 1 - 1e-12)
    sets = {
        "ties": [{"score": dice.pick(grid), "label": int(dice.chance(0.4))} for _ in range(count)],
        "smooth": [{"score": dice.unit(), "label": int(dice.chance(0.5))} for _ in range(count)],
        "hard": [{"score": float(dice.chance(0.5)), "label": int(dice.chance(0.5))} for _ in range(count)],
        "all the same": [{"score": 0.5, "label": int(dice.chance(0.5))} for _ in range(50)],
        "never positive": [{"score": dice.unit() / 2, "label": int(dice.chance(0.5))} for _ in range(50)],
        "always positive": [
            {"score": 0.5 + dice.unit() / 2, "label": int(dice.chance(0.5))} for _ in range(50)
        ],
        "perfect": [{"score": 0.1 + 0.8 * (n % 2), "label": n % 2} for n in range(20)],
        "inverted": [{"score": 0.9 - 0.8 * (n % 2), "label": n % 2} for n in range(20)],
        "two": [{"score": 0.5, "label": 1}, {"score": 0.5, "label": 0}],
        "skewed": [{"score": dice.pick(grid), "label": int(n == 17)} for n in range(60)],
    }
    return sets
