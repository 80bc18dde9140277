"""The playground's benchmarks: questions on held-out scenes in the official file layouts of four benchmarks.

Called by ``make_data.py``; the pictures are those of ``heldout/images`` under the names that the benchmarks use.
Layout under ``benchmarks/``::

    vqav2/v2_OpenEnded_mscoco_val2014_questions.json, v2_mscoco_val2014_annotations.json, val2014/COCO_*.jpg
    gqa/testdev_balanced_questions.json, images/*.jpg
    pope/coco/coco_pope_{random,popular,adversarial}.json, val2014/COCO_*.jpg
    mmbench/mmbench_playground.tsv          pictures in base64, rotations as further rows that point to the first
    metadata.json                           what was written with which options
"""

from __future__ import annotations

import base64
import csv
import json
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.random import Generator
from phrases import CATEGORIES, NUMBERS, Question, an, ask
from scenes import COLOURS, PLACES, Scene

FORMAT = 1
STREAM = 14
VQA_QUESTIONS, GQA_QUESTIONS, POPE_IMAGES, MMBENCH_QUESTIONS = 200, 200, 20, 50
"""Sizes; fewer where there are fewer scenes."""
PER_SCENE = 5
POPE_PAIRS = 3
"""Questions with yes, and as many with no, on each picture of each split of POPE."""
ROTATION = 1_000_000
SINGLE = tuple(name for name in CATEGORIES if name != "compare")
GQA_TYPES = {
    "digit": ("query", "obj"),
    "colour": ("query", "attr"),
    "position": ("query", "rel"),
    "exists": ("verify", "obj"),
}
MMBENCH_ABILITIES = {
    "digit": ("ocr", "finegrained_perception (instance-level)"),
    "colour": ("attribute_recognition", "finegrained_perception (instance-level)"),
    "position": ("object_localization", "finegrained_perception (instance-level)"),
    "count": ("image_scene", "coarse_perception"),
    "exists": ("attribute_comparison", "finegrained_perception (cross-instance)"),
}
"""L3 and L2 names, as MMBench has them, of each kind of question."""


def make_benchmarks(root: Path, scenes: Sequence[Scene], seed: int) -> dict:
    """Write the four benchmarks.

    Args:
        root: The playground's data; ``heldout/images`` is there.
        scenes: The held-out scenes, in order.
        seed: As for the other data.

    Returns:
        What is in ``benchmarks/metadata.json``.
    """
    target = root / "benchmarks"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    pictures = [root / f"heldout/images/{index:06d}.jpg" for index in range(len(scenes))]
    makers = (_vqav2, _gqa, _pope, _mmbench)
    counts = {
        maker.__name__[1:]: maker(target, scenes, pictures, np.random.default_rng([seed, STREAM, at]))
        for at, maker in enumerate(makers)
    }
    metadata = {**_wanted(len(scenes), seed), "questions": counts}
    _write_json(target / "metadata.json", metadata)
    return metadata


def benchmarks_there(root: Path, scenes: int, seed: int) -> bool:
    """Whether these benchmarks were written already."""
    file = root / "benchmarks/metadata.json"
    found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    wanted = _wanted(scenes, seed)
    return {key: found.get(key) for key in wanted} == wanted


def _wanted(scenes: int, seed: int) -> dict:
    return {"format": FORMAT, "scenes": scenes, "seed": seed}


def _write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def _copy(picture: Path, to: Path) -> None:
    to.parent.mkdir(parents=True, exist_ok=True)
    if not to.is_file():
        shutil.copyfile(picture, to)


def _questions(
    scenes: Sequence[Scene], rng: Generator, total: int, categories: Sequence[str]
) -> list[tuple[int, Question]]:
    """Different questions with the index of their scene, kinds in turn, `PER_SCENE` on a picture at most."""
    found: dict[tuple, tuple[int, Question]] = {}
    for at in range(20 * total):
        index = int(rng.integers(max(1, min(len(scenes), total // PER_SCENE))))
        question = ask(categories[at % len(categories)], scenes[index], rng)
        if question is not None:
            found.setdefault((index, question.kind, str(question.slots)), (index, question))
        if len(found) == total:
            break
    return sorted(found.values(), key=lambda pair: pair[0])


def _annotators(question: Question, rng: Generator) -> list[str]:
    """Ten answers: most agree, some put a number otherwise or are less sure of a colour."""
    answer, others = question.answer, int(rng.integers(4))
    other = {"digit": f"number {answer}", "colour": f"dark {answer}", "position": f"at the {answer}"}.get(
        question.category
    )
    if question.category == "count":
        other = str(NUMBERS.index(answer))
    given = [answer] * 10 if other is None else [answer] * (10 - others) + [other] * others
    return [given[int(i)] for i in rng.permutation(10)]


def _vqav2(target: Path, scenes: Sequence[Scene], pictures: Sequence[Path], rng: Generator) -> int:
    head = {
        "info": {"description": "playground"},
        "license": {},
        "data_type": "mscoco",
        "data_subtype": "val2014",
    }
    questions, annotations = [], []
    for number, (index, question) in enumerate(_questions(scenes, rng, VQA_QUESTIONS, SINGLE)):
        ids = {"image_id": index + 1, "question_id": 1000 * (index + 1) + number}
        _copy(pictures[index], target / f"vqav2/val2014/COCO_val2014_{index + 1:012d}.jpg")
        questions.append({**ids, "question": question.text})
        answers = _annotators(question, rng)
        kind = {"exists": "yes/no", "count": "number", "digit": "number"}.get(question.category, "other")
        annotations.append(
            {
                **ids,
                "question_type": " ".join(question.text.lower().rstrip("?.").split()[:2]),
                "answer_type": kind,
                "multiple_choice_answer": question.answer,
                "answers": [
                    {"answer": answer, "answer_confidence": "yes", "answer_id": at + 1}
                    for at, answer in enumerate(answers)
                ],
            }
        )
    _write_json(
        target / "vqav2/v2_OpenEnded_mscoco_val2014_questions.json",
        {**head, "task_type": "Open-Ended", "questions": questions},
    )
    _write_json(target / "vqav2/v2_mscoco_val2014_annotations.json", {**head, "annotations": annotations})
    return len(questions)


def _program(question: Question, structural: str) -> list[dict]:
    """The question as GQA's programs have it: select, then filter, relate, query or exist."""
    ((slot, value),) = question.slots.items()
    select = {"operation": "select", "dependencies": [], "argument": "digit"}
    step = {"operation": f"filter {slot}", "dependencies": [0], "argument": value}
    last = (
        {"operation": "exist", "argument": "?"}
        if structural == "verify"
        else {"operation": "query", "argument": question.category}
    )
    return [select, step, {**last, "dependencies": [1]}]


def _gqa(target: Path, scenes: Sequence[Scene], pictures: Sequence[Path], rng: Generator) -> int:
    rows = {}
    for number, (index, question) in enumerate(_questions(scenes, rng, GQA_QUESTIONS, tuple(GQA_TYPES))):
        image, key = f"p{index:06d}", f"{20_000_000 + number:08d}"
        structural, semantic = GQA_TYPES[question.category]
        _copy(pictures[index], target / f"gqa/images/{image}.jpg")
        program = _program(question, structural)
        rows[key] = {
            "semantic": program,
            "entailed": [],
            "equivalent": [key],
            "question": question.text,
            "imageId": image,
            "isBalanced": True,
            "groups": {
                "global": None if structural == "verify" else question.category,
                "local": f"{question.category}-{image}",
            },
            "answer": question.answer,
            "semanticStr": "->".join(f"{step['operation']}: {step['argument']}" for step in program),
            "annotations": {"answer": {}, "question": {}, "fullAnswer": {}},
            "types": {"detailed": question.kind, "semantic": semantic, "structural": structural},
            "fullAnswer": f"The answer is {question.answer}.",
        }
    _write_json(target / "gqa/testdev_balanced_questions.json", rows)
    return len(rows)


def _objects(scene: Scene) -> list[str]:
    """What POPE may ask for, as its questions name it: digits by value, and by colour."""
    return sorted({an(str(d.value)) for d in scene.digits} | {f"a digit in {d.colour}" for d in scene.digits})


def _pope(target: Path, scenes: Sequence[Scene], pictures: Sequence[Path], rng: Generator) -> int:
    everything = [an(str(v)) for v in range(10)] + [f"a digit in {colour}" for colour in COLOURS]
    present = [_objects(scene) for scene in scenes]
    frequent = Counter(name for names in present for name in names)
    together = Counter((a, b) for names in present for a in names for b in names if a != b)
    chosen = [index for index, names in enumerate(present) if len(names) >= POPE_PAIRS][:POPE_IMAGES]
    splits: dict[str, list[dict]] = {"random": [], "popular": [], "adversarial": []}
    for index in chosen:
        names = present[index]
        absent = [name for name in everything if name not in names]
        shown = [names[int(i)] for i in rng.permutation(len(names))[:POPE_PAIRS]]
        near = {name: sum(together[name, other] for other in names) for name in absent}
        by_split = {
            "random": [absent[int(i)] for i in rng.permutation(len(absent))],
            "popular": sorted(absent, key=lambda name: (-frequent[name], name)),
            "adversarial": sorted(absent, key=lambda name: (-near[name], name)),
        }
        file = f"COCO_val2014_{index + 1:012d}.jpg"
        _copy(pictures[index], target / "pope/val2014" / file)
        for split, rows in splits.items():
            for yes, no in zip(shown, by_split[split], strict=False):
                for name, label in ((yes, "yes"), (no, "no")):
                    row = {"question_id": len(rows) + 1, "image": file, "text": f"Is there {name}?"}
                    rows.append({**row, "label": label})
    for split, rows in splits.items():
        path = target / f"pope/coco/coco_pope_{split}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return sum(map(len, splits.values()))


def _options(question: Question, rng: Generator) -> list[str]:
    """The answer among others of its kind, in random order."""
    kinds = {
        "digit": [str(v) for v in range(10)],
        "colour": list(COLOURS),
        "position": list(PLACES),
        "count": list(NUMBERS[1:]),
        "exists": ["yes", "no"],
    }
    others = [name for name in kinds[question.category] if name != question.answer]
    drawn = [question.answer] + [others[int(i)] for i in rng.permutation(len(others))[:3]]
    return [drawn[int(i)] for i in rng.permutation(len(drawn))]


def _mmbench(target: Path, scenes: Sequence[Scene], pictures: Sequence[Path], rng: Generator) -> int:
    rows = []
    for number, (index, question) in enumerate(_questions(scenes, rng, MMBENCH_QUESTIONS, SINGLE)):
        options, (category, ability) = _options(question, rng), MMBENCH_ABILITIES[question.category]
        for turn in range(len(options)):
            turned = options[turn:] + options[:turn]
            rows.append(
                {
                    "index": number + turn * ROTATION,
                    "question": question.text,
                    "hint": "",
                    **dict(zip("ABCD", [*turned, "", ""], strict=False)),
                    "answer": "ABCD"[turned.index(question.answer)],
                    "category": category,
                    "image": str(number)
                    if turn
                    else base64.b64encode(pictures[index].read_bytes()).decode("ascii"),
                    "source": "playground",
                    "l2-category": ability,
                    "comment": "",
                    "split": "dev",
                }
            )
    path = target / "mmbench/mmbench_playground.tsv"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t", lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted(rows, key=lambda row: row["index"]))
    return len(rows)
