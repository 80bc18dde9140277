"""GQA: compositional questions on Visual Genome pictures (Hudson and Manning, CVPR 2019).

    gqa             testdev_balanced, 12,578 questions, as LLaVA-1.5 reports it
    gqa_val         val_balanced
    gqa_val_all     every question of val: also consistency, and with the choices file validity and plausibility
    gqa_lmms        testdev_balanced, answers compared as lmms-eval does
    gqa_playground  held-out scenes of the playground in the official layout

A text becomes a prediction as LLaVA converts it. Predictions in the official layout (questionId, prediction) are
compared as they are, as the official script does: "Dog." is wrong there.
Nothing but the questions file is needed: scene graphs, choices and the official script's other files are not.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlmamba.errors import MissingFileError
from vlmamba.evaluation import Sample, Score, Task
from vlmamba.evaluation import layouts as lay
from vlmamba.evaluation.scorers.gqa import gqa, gqa_prediction
from vlmamba.evaluation.task import Record, Reference, Scorer

LLAVA = "llava_gqa_testdev_balanced.jsonl"
FOLDERS = ("", "data", "data/questions1.2", "questions", "data/questions")
"""Where LLaVA's users keep the official questions, under the folder of LLaVA's file."""
SOURCE = "https://cs.stanford.edu/people/dorarad/gqa/download.html (questions1.2.zip, images.zip)"
REFERENCES = (
    Reference("LLaVA-1.5-7B", 62.0, "LLaVA model zoo"),
    Reference("VL-Mamba 2.8B", 56.2, "Qiao et al. 2024"),
    Reference("MobileVLM-3B", 59.0, "Chu et al. 2023"),
    Reference("TinyLLaVA-3.1B", 62.0, "TinyLLaVA model zoo"),
    Reference("Cobra-3.5B", 58.5, "Zhao et al. 2024, v1"),
)


def task(annotations: str | None = None, images: str | None = None) -> Task:
    """Testdev_balanced.

    Args:
        annotations: LLaVA's questions, official questions, parquet files, or a folder of these.
        images: The folder with ``<imageId>.jpg``; ``images`` near the questions when left out.
    """
    return _task("gqa", "testdev_balanced", annotations, images, REFERENCES)


def gqa_val(annotations: str | None = None, images: str | None = None) -> Task:
    """Val_balanced."""
    return _task("gqa_val", "val_balanced", annotations, images)


def gqa_val_all(
    annotations: str | None = None, images: str | None = None, choices: str | None = None
) -> Task:
    """All questions of val; consistency, and with ``val_choices.json`` (or `choices`) validity and plausibility."""
    return _task("gqa_val_all", "val_all", annotations, images, choices=choices)


def gqa_lmms(annotations: str | None = None, images: str | None = None) -> Task:
    """Testdev_balanced by lmms-eval's comparison."""
    return _task("gqa_lmms", "testdev_balanced", annotations, images, style="lmms")


def gqa_playground(
    annotations: str = "playground/data/mini/benchmarks/gqa", images: str | None = None
) -> Task:
    """The playground's scenes; ``python playground/make_data.py`` writes them."""
    task = _task("gqa_playground", "testdev_balanced", annotations, images)
    return dataclasses.replace(
        task, description="GQA's layout: questions on the playground's scenes, exact match."
    )


def _task(
    name: str,
    tier: str,
    annotations: str | None,
    images: str | None,
    references: tuple[Reference, ...] = (),
    style: str = "llava",
    choices: str | None = None,
) -> Task:
    files = (
        {LLAVA: "LLaVA's questions, in its eval.zip, with the official ones in data/"}
        if tier.startswith("testdev")
        else {}
    )
    for folder in FOLDERS:
        files[f"{folder}/{tier}_questions.json".lstrip("/")] = "official questions"
        files[f"{folder}/{tier}_questions".lstrip("/")] = "folder of official shards"
    benchmark = lay.Benchmark(
        "GQA",
        "playground/data/eval/gqa",
        {**files, "testdev*.parquet": "Hugging Face"},
        SOURCE,
        "lmms-lab-encoder/GQA",
    )
    place = lay.find_data(benchmark, annotations)
    samples = _read(place, benchmark, tier, images)
    beside = (
        None
        if isinstance(place, str)
        else _near(Path(place), f"{tier.removesuffix('_all').removesuffix('_balanced')}_choices.json")
    )
    valid = choices or beside
    return Task(
        name=name,
        samples=samples,
        score=_scorer(style, lay.read_document(valid).value if valid else None),
        description=f"GQA {tier}: compositional questions on real pictures, exact match.",
        reads="record",
        submission=_submission,
        reader=lay.join_by_id("questionId", "prediction"),
        references=references,
        settings={
            "tier": tier,
            "prompt": "question, short-answer instruction",
            "comparison": style,
            **({"choices": str(valid)} if valid else {}),
        },
    )


def _near(place: Path, name: str) -> Path | None:
    """A file beside the questions, or in the folders LLaVA's users keep the official files in."""
    return next((place.parent / f / name for f in FOLDERS if (place.parent / f / name).is_file()), None)


def _read(place: Path | str, benchmark: lay.Benchmark, tier: str, images: str | None) -> list[Sample]:
    if lay.is_stored(place):
        return _read_stored(place, benchmark)
    path = Path(place)
    if path.is_dir():
        return _official(_shards(path, benchmark), _images(path, images), path)
    document = lay.read_document(path)
    if document.kind == "lines" and document.has("question_id", "image", "text"):
        return _read_llava(document, benchmark, tier, images)
    if document.kind == "object":
        return _official(_questions(document, benchmark), _images(path, images), path)
    raise benchmark.wrong(document)


def _questions(document: lay.Document, benchmark: lay.Benchmark) -> dict[str, Any]:
    rows = list(document.value.values()) if document.kind == "object" else []
    bad = [
        key
        for key, row in document.value.items()
        if not isinstance(row, dict) or not {"question", "imageId", "answer"} <= set(row)
    ]
    if not rows or len(bad) == len(rows):
        raise benchmark.wrong(
            document, "a questions file is one object of rows with question, imageId and answer, by id"
        )
    if bad:
        raise lay.strange_ids(document.path, bad, f"of {len(rows)} lack question, imageId or answer")
    return document.value


def _shards(folder: Path, benchmark: lay.Benchmark) -> dict[str, Any]:
    """An "all" tier: a folder of files, merged."""
    files = sorted(folder.glob("*.json"))
    merged: dict[str, Any] = {}
    for file in files:
        rows = _questions(lay.read_document(file), benchmark)
        double = [key for key in rows if key in merged]
        if double:
            raise lay.strange_ids(file, double, "are in another shard, too")
        merged |= rows
    if not merged:
        raise MissingFileError(
            f"{folder} holds no shard {folder.name}_*.json of GQA. Get them from {SOURCE}."
        )
    return merged


def _images(place: Path, images: str | None) -> Path:
    if images is not None:
        return Path(images)
    folder = place if place.is_dir() else place.parent
    near = (
        folder / "images",
        folder / "data/images",
        folder.parent / "images",
        folder.parent / "data/images",
    )
    return next((path for path in near if path.is_dir()), near[1] if (folder / LLAVA).is_file() else near[0])


def _official(questions: Mapping[str, Any], root: Path, where: Path) -> list[Sample]:
    return [
        Sample(
            key,
            (lay.picture(root, f"{row['imageId']}.jpg", f"{where}, question {key!r}"),),
            lay.with_suffix(row["question"]),
            row["answer"],
            (row.get("types") or {}).get("structural") or "",
            {"row": row},
        )
        for key, row in questions.items()
    ]


def _read_llava(
    document: lay.Document, benchmark: lay.Benchmark, tier: str, images: str | None
) -> list[Sample]:
    """LLaVA's questions, with the answers of the official file."""
    name = f"{tier}_questions.json"
    found = _near(document.path, name)
    if found is None:
        raise MissingFileError(
            f"{document.path} has the questions of GQA, not the answers: {name} is not in "
            f"{', '.join(str(document.path.parent / f) for f in FOLDERS[:3])}. Get it from {SOURCE}."
        )
    official = _questions(lay.read_document(found), benchmark)
    unknown = [row.get("question_id") for row in document.rows if str(row.get("question_id")) not in official]
    if unknown:
        raise lay.strange_ids(document.path, unknown, f"of {len(document.rows)} are not in {found}")

    def details(row: Mapping[str, Any], where: str) -> Mapping[str, Any]:
        label = official[str(row["question_id"])]
        kind = (label.get("types") or {}).get("structural") or ""
        return {"answer": label["answer"], "category": kind, "metadata": {"row": label}}

    return lay.llava_questions(document, benchmark, _images(document.path, images), details=details)


def _read_stored(place: Path | str, benchmark: lay.Benchmark) -> list[Sample]:
    """The hub's two tables, questions and pictures; a local one with both is read as it is."""
    columns = ("id", "imageId", "question", "answer")
    rows = lay.read_stored(
        place, benchmark, config="testdev_balanced_instructions", split="testdev", columns=columns
    )
    if "image" in rows.column_names:
        pictures, at_of = rows, None
    else:
        where = (
            place
            if isinstance(place, str)
            else Path(place).parent / "images"
            if Path(place).is_file()
            else Path(place) / "images"
        )
        pictures = lay.read_stored(
            where, benchmark, config="testdev_balanced_images", split="testdev", columns=("id", "image")
        )
        at_of = {row["id"]: at for at, row in enumerate(lay.stored_rows(pictures))}
    return [
        Sample(
            row["id"],
            (lay.stored_picture(pictures, at if at_of is None else at_of[row["imageId"]], row["imageId"]),),
            lay.with_suffix(row["question"]),
            row["answer"],
            (row.get("types") or {}).get("structural") or "",
            {"row": row},
        )
        for at, row in enumerate(lay.stored_rows(rows))
    ]


def _scorer(style: str, choices: Any) -> Scorer:
    def score(samples: Sequence[Sample], records: Sequence[Record | None]) -> Score:
        questions = {str(s.question_id): s.metadata["row"] for s in samples}
        entailed = {key for row in questions.values() for key in row.get("entailed") or ()}
        whole = any(not row.get("isBalanced", True) for row in questions.values()) and entailed <= set(
            questions
        )
        given = {
            str(s.question_id): None if r is None else r["text"]
            for s, r in zip(samples, records, strict=True)
        }
        converted = style == "llava" and any(map(lay.in_own_layout, records))
        how = "raw" if converted else style
        return gqa(given, questions, choices=choices, consistency=whole, style=how)

    return score


def _submission(samples: Sequence[Sample], records: Sequence[Record | None], path: Path) -> Path:
    """The predictions file of the official script, as LLaVA's converter writes it."""
    missing = [s.question_id for s, r in zip(samples, records, strict=True) if r is None]
    if missing:
        raise lay.strange_ids(
            path, missing, "have no answer, and the official script takes no file without them"
        )
    rows = [
        {
            "questionId": str(s.question_id),
            "prediction": r["text"] if lay.in_own_layout(r) else gqa_prediction(r["text"]),
        }
        for s, r in zip(samples, records, strict=True)
        if r is not None
    ]
    return lay.write_json(path, rows)
