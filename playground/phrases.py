"""The playground's language: captions of scenes, questions with short answers, and small talk about numbers.

Everything is drawn from a random generator, so a seed fixes every sentence.  ``answer_from_scene`` computes
an answer from a question's machine-readable form and the scene, never from the sentence.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from numpy.random import Generator
from scenes import COLOURS, PLACES, Scene

CATEGORIES = ("digit", "colour", "position", "count", "exists", "compare")
NUMBERS = ("zero", "one", "two", "three", "four")
SHORT_ANSWER = "Answer the question using a single word or phrase."
DESCRIBE = (
    "Describe the image.",
    "Describe this picture.",
    "What is in the image?",
    "What does the picture show?",
    "Give a short description of the image.",
    "Write a caption for this image.",
)
TEMPLATES: dict[str, tuple[str, ...]] = {
    "digit_at": (
        "What digit is at the {place}?",
        "Which digit is in the {place}?",
        "What is the digit at the {place}?",
    ),
    "digit_of": (
        "What is the {colour} digit?",
        "Which digit is {colour}?",
        "What digit is drawn in {colour}?",
    ),
    "colour_at": ("What colour is the digit at the {place}?", "Which colour does the {place} digit have?"),
    "colour_of": (
        "What colour is the {value}?",
        "Which colour is the {value} drawn in?",
        "What is the colour of the {value}?",
    ),
    "place_of_value": (
        "Where is the {value}?",
        "At which place is the {value}?",
        "Where can you see the {value}?",
    ),
    "place_of_colour": ("Where is the {colour} digit?", "At which place is the {colour} digit?"),
    "count": ("How many digits are there?", "How many digits are in the image?", "Count the digits."),
    "has_value": ("Is there a {value}?", "Does the image show a {value}?", "Do you see a {value}?"),
    "has_colour": ("Is there a digit in {colour}?", "Does the image show a digit in {colour}?"),
    "has_place": ("Is there a digit at the {place}?", "Do you see a digit at the {place}?"),
    "which_value": ("In which image is the {value}?", "Which image shows a {value}?"),
    "which_colour": ("In which image is a digit in {colour}?", "Which image shows a digit in {colour}?"),
    "which_more": ("Which image has more digits?", "In which image are there more digits?"),
}
KINDS: dict[str, tuple[str, ...]] = {
    "digit": ("digit_at", "digit_of"),
    "colour": ("colour_at", "colour_of"),
    "position": ("place_of_value", "place_of_colour"),
    "count": ("count",),
    "exists": ("has_value", "has_colour", "has_place"),
    "compare": ("which_value", "which_colour", "which_more"),
}


@dataclass(frozen=True)
class Question:
    """A question about one scene (two for ``compare``), its answer, and what it asks for in plain values."""

    category: str
    kind: str
    text: str
    answer: str
    slots: dict[str, str] = field(default_factory=dict)


def _pick(rng: Generator, options: Sequence[str]) -> str:
    return options[int(rng.integers(len(options)))]


def an(noun: str) -> str:
    """``noun`` with its indefinite article: ``an orange 4``, ``a red 4``."""
    return ("an " if noun[0] in "aeo8" else "a ") + noun


def _listed(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def caption(scene: Scene, rng: Generator) -> str:
    """One full description of a scene, in one of five styles; digits mostly in reading order."""
    digits = list(scene.digits)
    if rng.random() < 0.2:
        digits = [digits[int(i)] for i in rng.permutation(len(digits))]
    things = [an(f"{d.colour} {d.value}") + f" at the {d.place}" for d in digits]
    number = NUMBERS[len(digits)]
    noun = "digit" if len(digits) == 1 else "digits"
    style = int(rng.integers(5))
    if style == 0:
        text = _listed(things)
        return text[0].upper() + text[1:] + "."
    if style == 1:
        return f"The image shows {number} {noun}: {_listed(things)}."
    if style == 2:
        verb = "is" if len(digits) == 1 else "are"
        cells = " ".join(f"The digit at the {d.place} is {an(f'{d.colour} {d.value}')}." for d in digits)
        return f"There {verb} {number} {noun}. {cells}"
    if style == 3:
        return " ".join(f"{d.place.capitalize()}: {d.colour} {d.value}." for d in digits)
    return f"{number.capitalize()} {noun}: {_listed(things)}."


def answer_from_scene(kind: str, slots: dict[str, str], scenes: Sequence[Scene]) -> str:
    """The answer to a question in machine-readable form; an ambiguous question raises ValueError."""
    if kind.startswith("which_"):
        counts = [len(s.digits) if kind == "which_more" else len(_matching(slots, s)) for s in scenes]
        if len(counts) != 2 or counts[0] == counts[1]:
            raise ValueError(f"{kind} {slots}: no single image is meant, counts {counts}")
        return "first" if counts[0] > counts[1] else "second"
    (scene,) = scenes
    if kind == "count":
        return NUMBERS[len(scene.digits)]
    found = _matching(slots, scene)
    if kind.startswith("has_"):
        return "yes" if found else "no"
    if len(found) != 1:
        raise ValueError(f"{kind} {slots}: {len(found)} digits match, expected exactly one")
    digit = found[0]
    return {"digit": str(digit.value), "colour": digit.colour, "place": digit.place}[kind.split("_")[0]]


def _matching(slots: dict[str, str], scene: Scene) -> list:
    return [
        d
        for d in scene.digits
        if slots.get("value", str(d.value)) == str(d.value)
        and slots.get("colour", d.colour) == d.colour
        and slots.get("place", d.place) == d.place
    ]


def _slots_for(kind: str, scene: Scene, rng: Generator) -> dict[str, str] | None:
    """Slots that make ``kind`` a fair question on one scene, or None where there are none."""
    values = Counter(str(d.value) for d in scene.digits)
    colours = Counter(d.colour for d in scene.digits)
    places = Counter(d.place for d in scene.digits)
    slot, present, everything = {
        "value": ("value", values, [str(v) for v in range(10)]),
        "colour": ("colour", colours, list(COLOURS)),
        "place": ("place", places, list(PLACES)),
    }[_slot_name(kind)]
    if kind.startswith("has_"):
        absent = [name for name in everything if name not in present]
        if not absent:
            return None
        options = sorted(present) if rng.random() < 0.5 else absent
    else:
        options = sorted(name for name, count in present.items() if count == 1)
    return {slot: _pick(rng, options)} if options else None


def _slot_name(kind: str) -> str:
    return {
        "digit_at": "place",
        "digit_of": "colour",
        "colour_at": "place",
        "colour_of": "value",
        "place_of_value": "value",
        "place_of_colour": "colour",
        "which_value": "value",
        "which_colour": "colour",
    }.get(kind, kind.split("_")[-1])


def _ask(
    category: str, kind: str, slots: dict[str, str], scenes: Sequence[Scene], rng: Generator
) -> Question:
    text = _pick(rng, TEMPLATES[kind]).format(**slots)
    if slots.get("value") == "8":
        text = text.replace(" a 8", " an 8")
    return Question(category, kind, text, answer_from_scene(kind, slots, scenes), slots)


def ask(category: str, scene: Scene, rng: Generator) -> Question | None:
    """A question of a category about one scene; None where this scene allows none of the drawn kind."""
    kind = _pick(rng, KINDS[category])
    slots: dict[str, str] | None = {} if kind == "count" else _slots_for(kind, scene, rng)
    return None if slots is None else _ask(category, kind, slots, [scene], rng)


def ask_pair(first: Scene, second: Scene, rng: Generator) -> Question | None:
    """A ``compare`` question about two scenes, or None where the drawn kind does not tell them apart."""
    kind = _pick(rng, KINDS["compare"])
    if kind == "which_more":
        if len(first.digits) == len(second.digits):
            return None
        return _ask("compare", kind, {}, [first, second], rng)
    name = _slot_name(kind)
    sets = [{str(getattr(d, name)) for d in scene.digits} for scene in (first, second)]
    only = sorted(sets[0] - sets[1]) if rng.random() < 0.5 else sorted(sets[1] - sets[0])
    if not only:
        return None
    return _ask("compare", kind, {name: _pick(rng, only)}, [first, second], rng)


SHARES = {"digit": 0.32, "colour": 0.18, "position": 0.18, "count": 0.14, "exists": 0.18}


def dialogue(
    scene: Scene, rng: Generator, turns: int, shares: Mapping[str, float] = SHARES
) -> list[Question]:
    """Up to ``turns`` different questions about one scene; ``shares`` of the categories add up to one."""
    names, weights = list(shares), list(shares.values())
    asked: dict[tuple[str, str], Question] = {}
    for _ in range(6 * turns):
        question = ask(names[int(rng.choice(len(names), p=weights))], scene, rng)
        if question is not None:
            asked.setdefault((question.kind, str(question.slots)), question)
        if len(asked) == turns:
            break
    return list(asked.values())


def pair_dialogue(first: Scene, second: Scene, rng: Generator, turns: int) -> list[Question]:
    """Up to ``turns`` different ``compare`` questions about two scenes (none if they are too much alike)."""
    asked: dict[tuple[str, str], Question] = {}
    for _ in range(8 * turns):
        question = ask_pair(first, second, rng)
        if question is not None:
            asked.setdefault((question.kind, str(question.slots)), question)
        if len(asked) == turns:
            break
    return list(asked.values())


def small_talk(rng: Generator) -> tuple[str, str]:
    """A text-only question on the same vocabulary and its answer."""
    kind = int(rng.integers(6))
    a, b = int(rng.integers(10)), int(rng.integers(10))
    if kind == 0:
        a = int(rng.integers(10 - b))
        return f"What is {a} plus {b}?", str(a + b)
    if kind == 1:
        a, b = max(a, b), min(a, b)
        return f"What is {a} minus {b}?", str(a - b)
    if kind == 2:
        b = b if b != a else (a + 1) % 10
        return f"Which digit is larger, {a} or {b}?", str(max(a, b))
    if kind == 3:
        a = int(rng.integers(9))
        return f"Which digit comes after {a}?", str(a + 1)
    if kind == 4:
        pair = (("top", "bottom"), ("left", "right"), ("black", "white"), ("first", "second"), ("yes", "no"))
        one, other = pair[int(rng.integers(len(pair)))]
        one, other = (one, other) if rng.random() < 0.5 else (other, one)
        return f"What is the opposite of {one}?", other
    word = _pick(rng, list(COLOURS))
    if rng.random() < 0.5:
        return f"Is {word} a colour?", "yes"
    return f"Is {a} a colour?", "no"
