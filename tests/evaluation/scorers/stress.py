"""Adversarial items for every scorer, made from the known traps; the same on every machine and Python version.

The expected values under ``golden/`` were made by running the official scripts on exactly these items; each file
names script, commit and Python, and carries the items' digest, so that a changed generator is noticed.
"""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path
from typing import Any

GOLDEN = Path(__file__).parent / "golden"


class Dice:
    """Draws that rest on ``random()`` alone, which is the same in every Python."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def chance(self, share: float) -> bool:
        return self._random.random() < share

    def number(self, below: int) -> int:
        return int(self._random.random() * below)

    def unit(self) -> float:
        return self._random.random()

    def pick(self, things):
        return things[self.number(len(things))]

    def some(self, things, count: int) -> list:
        return [self.pick(things) for _ in range(count)]


def digest(items: Any) -> str:
    text = json.dumps(items, ensure_ascii=True, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def golden(name: str, items: Any) -> dict[str, Any]:
    """Expected values of a benchmark, after a look whether they belong to these items."""
    data = json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))
    assert data["made_by"]["items"] == digest(items), f"golden/{name}.json was made from other items"
    return data


# ------------------------------------------------------------------------------------------------ VQA family
# Grouped by what they collide with after normalising (or just fail to).
VQA_FAMILIES = (
    ("yes", "Yes", "yes.", "YES", " yes ", "yes!", "Yes,", "yes\n", "\tyes", "yes yes", "yes\u00a0", "y"),
    ("no", "No", "no.", "none", "0", "zero", "None", "nO", "no!?", "ｎｏ", "not", "no one"),
    ("1,000", "1000", "1, 000", "1 000", "1,000.", "$1,000", "$1000", "1,0 00", "1,,000", "1.000", "1000.0"),
    ("2", "two", "Two", "2.", "2.0", "two.", "(2)", "2)", "two 2", "twenty two", "22", "the two", "١", "2,"),
    ("t-shirt", "t shirt", "tshirt", "T-Shirt", "t - shirt", "a t-shirt", "t- shirt", "t–shirt", "t-shirt."),
    ("red/blue", "red blue", "redblue", "red,blue", "red, blue", "red / blue", "red & blue", "red and blue"),
    ("dont", "don't", "don’t", "dont.", "DONT", "do n't", "do not", "don't know", "dont know"),
    ("hes", "he's", "he 's", "hes'", "HE'S", "hes.", "he’s"),
    ("ill", "i'll", "well", "its", "it's", "it 's", "lets", "let's", "Im", "i'm", "I'm", "Ive"),
    ("the", "a", "an", "", " ", ".", "the a", "an an", "-", "?", "the.", "a."),
    ("3.5", "3.5.", "3. 5", ".5", "5.", "3.", "3 .5", "3.five", "a.1", "3.٥", "5"),
    ("u.s.a.", "USA", "U.S.A", "usa", "u s a", "U.S.A.", "u.s.a..", "u. s. a."),
    ("men's", "mens", "men 's", "men", "one's", "1 's", "ones", "Men'S", "mens'"),
    ("what?x", "whatx", "what x", "what?", "what", "what ?x", "what? x", "what ? x"),
    ("10,5", "105", "10.5", "10 5", "10,5;red", "105red", "105 red", "10,5-red", "ten,5", "10,٥"),
    ("straße", "STRASSE", "strasse", "İstanbul", "istanbul", "i̇stanbul", "ΟΔΟΣ", "οδος", "οδοσ", "ﬁsh", "fish"),
    ("a\u2003b", "a b", "a\rb", "a\nb", "a\tb", "b", "a  b", "a\x0bb", "a\u200bb", "b\u3000"),
    ("4:30", "4:30.", "4 30", "430", "4:30pm", "4:30 pm", "@4:30", "at 4:30", "4.30"),
    ("." * 31 + "x", "." * 32 + "x", "." * 33 + "x", "." * 40 + "x", "x", "x" + "." * 33, "." * 34),
    ("un answerable", "unanswerable", "Unanswerable", "unanswerable.", "UNANSWERABLE", "unsuitable", "un-answerable"),
    ("somebody'd", "somebodyd", "ow's'at", "'ow's'at", "'ows'at", "yall'd've", "y'all'd've", "couldn'tve"),
    ("none", "nothing", "0", "None.", "nOne", "none none", "zero.", "0.0", "0."),
    ("rock'n'roll", "rock n roll", "rock'n'roll!", "rock`n`roll", "rock_n_roll", "rock \"n\" roll", "[rock]"),
    ("50%", "50 %", "50", "50 percent", "fifty", "#50", "50*", "~50", "50^", "50|"),
)  # fmt: skip
VQA_MARKS = ";/[]\"{}()=+\\_-><@`,?!.'"
VQA_ANSWER_TYPES = ("yes/no", "number", "other")
VQA_QUESTION_TYPES = ("is the", "how many", "what", "what color", "none of the above", "why")


def vqa_text(dice: Dice, family) -> str:
    text = dice.pick(family)
    if dice.chance(0.25):
        at = dice.number(len(text) + 1)
        mark = dice.pick(VQA_MARKS)
        pad = dice.pick(("", "", " "))
        text = text[:at] + dice.pick(("", pad)) + mark + pad + text[at:]
    if dice.chance(0.05):
        text = dice.pick(("the ", "a ", "An ", "one ", " ")) + text
    return text


def vqa_items(count: int = 900) -> list[dict[str, Any]]:
    """Prediction and ten answers, from one family mostly."""
    from vlmamba.evaluation.scorers.vqa_text import CONTRACTIONS

    dice = Dice(20150616)
    keys = tuple(CONTRACTIONS)
    items = []
    for number in range(count):
        family = dice.pick(VQA_FAMILIES)
        if number < len(keys):
            family = (keys[number], CONTRACTIONS[keys[number]], keys[number].replace("'", "\u2019"), "x")
        kinds = [vqa_text(dice, family) for _ in range(1 + dice.number(5))]
        if dice.chance(0.15):
            kinds = kinds[:1]  # all ten agree: nothing is normalised
        answers = dice.some(kinds, 10)
        prediction = dice.pick(kinds) if dice.chance(0.4) else vqa_text(dice, family)
        items.append(
            {
                "question_id": 1000 + number,
                "prediction": prediction,
                "answers": answers,
                "answer_type": dice.pick(VQA_ANSWER_TYPES),
                "question_type": dice.pick(VQA_QUESTION_TYPES),
                "answerable": int(dice.chance(0.7)),
            }
        )
    return items
