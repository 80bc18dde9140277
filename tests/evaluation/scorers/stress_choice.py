"""Adversarial items for MMBench and ScienceQA: answers in which a letter may or may not be read."""

from __future__ import annotations

from typing import Any

from tests.evaluation.scorers.stress import Dice

L3_OF_L2 = {
    "coarse_perception": ("image_scene", "image_style", "image_topic"),
    "finegrained_perception (instance-level)": ("ocr", "object_localization"),
    "finegrained_perception (cross-instance)": ("spatial_relationship",),
    "attribute_reasoning": ("function_reasoning", "physical_property_reasoning"),
    "relation_reasoning": ("social_relation",),
    "logic_reasoning": ("future_prediction", "structuralized_imagetext_understanding"),
}
OPTION_SETS = (
    ("red", "blue", "green", "yellow"),
    ("a cat", "a dog", "a catfish", "a bird"),
    ("1", "2", "12", "21"),
    ("A", "B", "C", "D"),
    ("yes", "no"),
    ("True", "False", "None"),
    ("İstanbul", "istanbul", "Ankara"),
    ("The man is left of the dog", "The man is right of the dog", "The man is on the dog", "nan"),
    ("0.5", "5", ".5"),
    ("一只猫", "一只狗", "一只鸟", "猫"),
)
LETTER_FORMS = (
    *("{X}", "{X}.", "({X})", "{X})", "{X}:", "{x}", "{X}. {text}", "({X}) {text}", " {X}", "{X} ", "{X},", "[{X}]"),
    *("{text}", "{TEXT}", "{text}.", "The answer is {X}.", "The answer is {X}", "the correct answer is {x}."),
    *("Answer is **{X}**. Because of {Y}", "The correct  answer is\n{X}", "Answer: {X}", "answer is{X}", "{X}{X}"),
    *("{X} or {Y}", "{X} and not {Y}", "Not {Y} but {X}", "{X}, {Y}", "A {text}", "A man stands there, so {X}"),
    *("A man stands there in the rain", "I think that it is a {text}", "{X} is the best option that there is"),
    *("It must be {X} for all the reasons that I gave above", "It must be one of them, and that is {X}"),
    *("Option {X}!", "#{X}", "*{X}*", "{{{X}}}", "{X};", "<{X}>", "'{X}'", "{X}?", "{X}-{text}", "{X}/{Y}"),
    *("Sorry, I can't help with images of people yet. {X}", "I can't process this file.", "Z", "z", "Z.", "E", "(E)"),
    *("I'm sorry, but without the image provided, {X}", "Cannot determine the answer", "cannot determine the answer"),
    *("Failed to obtain answer via API", "Failed to obtain answer via API. {X}", "", " ", "\n", "{X}\n", "{X}\n{text}"),
    *("The answer is not {X}. The answer is {Y}.", "The answer is a cat", "anſwer iſ {X}", "The answer is {X}\n"),
    *("{text} {text2}", "neither {text} nor {text2}", "{text} " + "and so on " * 20, "The answer is Q.", "{X}．"),
    *("{X}\u3002", "（{X}）", "选{X}", "答案是 {X}", "{X} {X} {X} {X} {X} {X}", "{X} x x x x", "x {X} x x x x"),
    *("{X} x x x", "The answer is {X}. So it is.", "the answer is {X}.", "The answer is {X}!"),
    *("The answer is {X}. The answer is {X}.",),
    *(":{X}", ":{X}.", "{X}).", "({X}).", "{X} :{Y}", "({X}) {Y}.", "{Y}. ({X})", "é {X}.", "{X}. ", "{X}. {Y}. "),
)  # fmt: skip


def letter_text(dice: Dice, options: dict[str, str], form: str | None = None) -> str:
    letters = sorted(options)
    x, y = dice.pick(letters), dice.pick("ABCDE")
    values = {"X": x, "x": x.lower(), "Y": y, "text": options[x], "TEXT": options[x].upper()}
    values["text2"] = options[dice.pick(letters)]
    return (form if form is not None else dice.pick(LETTER_FORMS)).format(**values)


def mmbench_rows(questions: int = 260) -> list[dict[str, Any]]:
    """Rows of a TSV: main rows and rotations, some questions answered well throughout, some rotations missing."""
    dice = Dice(2307)
    rows = []
    for question in range(questions):
        texts = OPTION_SETS[question % len(OPTION_SETS)]
        l2 = dice.pick(tuple(L3_OF_L2))
        l3, split = dice.pick(L3_OF_L2[l2]), dice.pick(("dev", "dev", "test"))
        right, skill = dice.number(len(texts)), dice.unit()
        for turn in range(len(texts)):
            if turn and dice.chance(0.03):
                continue
            shown = texts[turn:] + texts[:turn]
            options = dict(zip("ABCD", shown, strict=False))
            answer = "ABCD"[(right - turn) % len(texts)]
            form = LETTER_FORMS[len(rows)] if len(rows) < len(LETTER_FORMS) else None
            text = letter_text(dice, options, form)
            if form is None and dice.chance(0.5 + skill / 2):
                text = dice.pick(("{0}", "{0}.", "({0})", "Answer: {0}")).format(answer)
            rows.append(
                {
                    "index": turn * 1_000_000 + question,
                    "options": options,
                    "answer": answer,
                    "category": l3,
                    "l2": l2,
                    "split": split,
                    "text": text,
                }
            )
    return rows


def scienceqa_items(count: int = 700) -> list[dict[str, Any]]:
    """Problems with answers; some are missing, some prompts have no picture."""
    dice = Dice(2209)
    items = []
    for number in range(count):
        choices = list(OPTION_SETS[number % len(OPTION_SETS)][: 2 + dice.number(3)])
        options = dict(zip("ABCDE", choices, strict=False))
        answer = dice.number(len(choices))
        text = letter_text(dice, options, LETTER_FORMS[number] if number < len(LETTER_FORMS) else None)
        if number >= len(LETTER_FORMS) and dice.chance(0.6):
            letter = "ABCDE"[answer]
            text = dice.pick(("{0}", "{0}. x", "The answer is {0}.", "{0}.", "The answer is {0}")).format(
                letter
            )
        if dice.chance(0.04):
            text = dice.pick("ABCDE")
        items.append(
            {
                "id": str(number + 1),
                "choices": choices,
                "answer": answer,
                "image": "image.png" if dice.chance(0.5) else None,
                "hint": dice.pick(("", "Look at it.", "Read.")),
                "subject": dice.pick(("natural science", "social science", "language science")),
                "grade": f"grade{1 + dice.number(12)}",
                "topic": dice.pick(("biology", "physics", "geography", "units-and-measurement", "verbs")),
                "text": None if dice.chance(0.03) else text,
            }
        )
    return items
