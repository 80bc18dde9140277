"""Adversarial items for GQA and MM-Vet."""

from __future__ import annotations

from typing import Any

from tests.evaluation.scorers.stress import Dice

GQA_ANSWERS = (
    "yes",
    "no",
    "dog",
    "t-shirt",
    "DVD player",
    "left",
    "blue",
    "color",
    "stop sign",
    "u.s.",
    "men's",
)
GQA_FORMS = (
    *("{a}", "{A}", "{a}.", "{a}..", "{a}. ", " {a}", "the {a}", "{a}!", "{a},", "{a}\n", ".{a}", "{a}...", ""),
    *("{a} .", "{a}. .", "{a}.\u00a0", "{a}s", "a {a}.", "{a} {a}", "İ{a}", "{a}．", ".", "...", "{a}-", "'{a}'"),
)  # fmt: skip
GQA_TYPES = {
    "structural": ("query", "verify", "choose", "logical", "compare"),
    "semantic": ("attr", "cat", "global", "obj", "rel"),
    "detailed": ("existAttrC", "twoCommon", "Commonality", "relS", "verifyAttrCommon", "chooseCommonX"),
}
GQA_STEPS = (
    ("select", "dog (12)"),
    ("filter color", "blue"),
    ("exist", "?"),
    ("query", "name"),
    ("verify color", "exists"),
    ("choose name", "cat|dog"),
    ("choose color", "red|blue"),
    ("relate", "dog,left of,s (4)"),
    ("query", "color"),
    ("and", "existence"),
)


def gqa_text(dice: Dice, answer: str) -> str:
    return dice.pick(GQA_FORMS).format(a=answer, A=answer.title())


def gqa_items(count: int = 700) -> dict[str, Any]:
    """Questions (one in five unbalanced), choices, and a text for each."""
    dice = Dice(1902)
    ids = [f"{2000 + 7 * number:06d}" for number in range(count)]
    questions, choices, texts = {}, {}, {}
    for key in ids:
        answer = dice.pick(GQA_ANSWERS)
        program = [dice.pick(GQA_STEPS) for _ in range(1 + dice.number(6))]
        entailed = [dice.pick(ids) for _ in range(dice.number(4))] + ([key] if dice.chance(0.5) else [])
        questions[key] = {
            "semantic": [{"operation": o, "dependencies": [], "argument": a} for o, a in program],
            "entailed": entailed,
            "equivalent": [key],
            "question": " ".join(
                dice.some(("is", "the", "dog ", "blue?", "left\u00a0of"), 3 + dice.number(6))
            ),
            "imageId": f"n{dice.number(50)}",
            "isBalanced": dice.chance(0.8),
            "groups": {
                "global": dice.pick((None, "color", "animal", "clothing", "place")),
                "local": f"10q-{dice.number(9)}",
            },
            "answer": answer,
            "types": {name: dice.pick(values) for name, values in GQA_TYPES.items()},
            "fullAnswer": f"It is {answer}.",
        }
        choices[key] = {"valid": dice.some(GQA_ANSWERS, 5), "plausible": dice.some(GQA_ANSWERS, 3)}
        said = answer if dice.chance(0.55) else dice.pick(GQA_ANSWERS)
        texts[key] = said if dice.chance(0.5) else gqa_text(dice, said)
    return {"questions": questions, "choices": choices, "texts": texts}


CAPABILITIES = ("rec", "ocr", "know", "gen", "spat", "math")


def mm_vet_items(count: int = 218, runs: int = 5) -> dict[str, Any]:
    """Questions with capabilities, and the grades of five runs of a judge."""
    dice = Dice(2308)
    questions, grades = {}, {}
    for number in range(count):
        names = [name for name in CAPABILITIES if dice.chance(0.35)] or [dice.pick(CAPABILITIES)]
        questions[f"v1_{number}"] = {"capability": names, "question": "?", "answer": "x<AND>y"}
    for number in sorted(range(count), key=lambda n: n * 97 % count):
        base = dice.number(11)
        score = [min(10, max(0, base + dice.number(3) - 1)) / 10 for _ in range(runs)]
        grades[f"v1_{number}"] = {
            "model": ["judge"] * runs,
            "content": [str(s) for s in score],
            "score": score,
        }
    return {"questions": questions, "grades": grades}
