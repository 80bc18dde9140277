"""VQAv2: open questions on COCO pictures, ten annotators' answers each (Goyal et al., CVPR 2017).

    vqav2           test-dev, as LLaVA-1.5 reports it: answers go to the server, nothing is scored here
    vqav2_test      the whole of test2015 (test-dev and test-standard)
    vqav2_val       val2014, scored here by the official rule (Prismatic and Cobra report this split)
    vqav2_lmms      val2014 by lmms-eval's rule, which normalises always and comes out higher
    vqav2_playground  held-out scenes of the playground in the official layout

The file for the server is LLaVA's: answers through the m4c processor, every question of test2015, "" where
nothing was asked; the server takes no file with fewer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlmamba.errors import MissingFileError
from vlmamba.evaluation import Sample, Task, image_first
from vlmamba.evaluation import layouts as lay
from vlmamba.evaluation.scorers.vqa import vqav2
from vlmamba.evaluation.scorers.vqa_text import normalise_m4c
from vlmamba.evaluation.task import Reference, Scorer, Submission

TEST2015 = "llava_vqav2_mscoco_test2015.jsonl"
TESTDEV = {
    "llava_vqav2_mscoco_test-dev2015.jsonl": "LLaVA's questions, in its eval.zip",
    "v2_OpenEnded_mscoco_test-dev2015_questions.json": "official questions",
}
TEST = {
    TEST2015: "LLaVA's questions, in its eval.zip",
    "v2_OpenEnded_mscoco_test2015_questions.json": "official questions",
}
VAL = {
    "v2_OpenEnded_mscoco_val2014_questions.json": "official questions, with the annotations beside them",
    "v2_mscoco_val2014_annotations.json": "official annotations",
    "validation*.parquet": "Hugging Face",
}
SOURCE = "https://visualqa.org/download.html (LLaVA's eval.zip: its docs/Evaluation.md)"
SERVER = "send the submission file to https://eval.ai/web/challenges/challenge-page/830"
REFERENCES = {
    "test-dev": (
        Reference("LLaVA-1.5-7B", 78.5, "LLaVA model zoo"),
        Reference("VL-Mamba 2.8B", 76.6, "Qiao et al. 2024"),
        Reference("TinyLLaVA-3.1B", 79.9, "TinyLLaVA model zoo"),
    ),
    "val": (Reference("Cobra-3.5B", 75.9, "Zhao et al. 2024, v1"),),
}


def task(annotations: str | None = None, images: str | None = None) -> Task:
    """Test-dev; a file with annotations given here is scored.

    Args:
        annotations: LLaVA's questions, official questions or annotations, parquet files, or a folder of these.
        images: The folder with ``COCO_test2015_*.jpg``; ``test2015`` beside the questions when left out.
    """
    return _task("vqav2", {**TESTDEV, **VAL}, annotations, images)


def vqav2_test(annotations: str | None = None, images: str | None = None) -> Task:
    """Both halves of test2015."""
    return _task("vqav2_test", TEST, annotations, images)


def vqav2_val(annotations: str | None = None, images: str | None = None) -> Task:
    """Val2014, scored by the official rule."""
    return _task("vqav2_val", VAL, annotations, images)


def vqav2_lmms(annotations: str | None = None, images: str | None = None) -> Task:
    """Val2014, scored as lmms-eval does."""
    return _task("vqav2_lmms", VAL, annotations, images, style="lmms")


def vqav2_playground(
    annotations: str = "playground/data/mini/benchmarks/vqav2", images: str | None = None
) -> Task:
    """The playground's scenes; ``python playground/make_data.py`` writes them."""
    return _task("vqav2_playground", VAL, annotations, images, pictures="the playground's scenes")


def _task(
    name: str,
    files: dict[str, str],
    annotations: str | None,
    images: str | None,
    style: str = "official",
    *,
    pictures: str = "COCO pictures",
) -> Task:
    benchmark = lay.Benchmark("VQAv2", "playground/data/eval/vqav2", files, SOURCE, "lmms-lab-encoder/VQAv2")
    place = lay.find_data(benchmark, annotations)
    samples, split = _read(place, benchmark, images)
    labelled = samples[0].answer is not None
    return Task(
        name=name,
        samples=samples,
        prompt=image_first
        if samples[0].text
        else lay.cannot_ask(f"v2_OpenEnded_mscoco_{split}_questions.json is not beside {place}"),
        score=_scorer(style)
        if labelled
        else lay.no_labels("VQA accuracy", f"VQAv2 {split} has no public answers: {SERVER}"),
        description=f"VQAv2 {split}: open questions on {pictures}, credit by ten annotators.",
        submission=_submission(Path(benchmark.folder) if isinstance(place, str) else place),
        reader=lay.join_by_id("question_id", "answer"),
        references=REFERENCES.get("val" if "val" in split else "test-dev", ())
        if name != "vqav2_playground"
        else (),
        settings={"split": split, "prompt": "question, short-answer instruction", "scoring": style},
    )


def _read(place: Path | str, benchmark: lay.Benchmark, images: str | None) -> tuple[list[Sample], str]:
    """Samples and the name of the split."""
    if lay.is_stored(place):
        return _read_stored(place, benchmark), "val2014"
    document = lay.read_document(place)
    if document.kind == "lines" and document.has("question_id", "image", "text"):
        if not str(document.rows[0]["image"]).startswith("COCO_"):
            raise benchmark.wrong(
                document, f"its first picture is {document.rows[0]['image']!r}, not COCO_*.jpg"
            )
        root = document.path.parent / "test2015" if images is None else Path(images)
        split = "test2015" if "test2015" in document.path.name else "test-dev2015"
        return lay.llava_questions(document, benchmark, root), split
    if document.kind == "object" and document.has("questions"):
        beside = document.path.name.replace("OpenEnded_", "").replace("_questions", "_annotations")
        labels = document.path.with_name(beside)
        found = lay.read_document(labels).value if labels.is_file() and beside != document.path.name else None
        return _read_official(document.value, found, benchmark, document, images)
    if document.kind == "object" and document.has("annotations"):
        beside = document.path.name.replace("v2_mscoco", "v2_OpenEnded_mscoco").replace(
            "_annotations", "_questions"
        )
        questions = document.path.with_name(beside)
        found = (
            lay.read_document(questions).value
            if questions.is_file() and beside != document.path.name
            else None
        )
        return _read_official(found, document.value, benchmark, document, images)
    raise benchmark.wrong(document)


def _read_official(
    questions: Any, labels: Any, benchmark: lay.Benchmark, document: lay.Document, images: str | None
) -> tuple[list[Sample], str]:
    """Samples of the official files; without the questions they can be scored, not asked."""
    given = questions if labels is None else labels
    subtype = str(given.get("data_subtype", "val2014")).replace("test-dev2015", "test2015")
    answers = (
        _by_id(labels["annotations"], ("question_id", "image_id", "answers"), benchmark, document)
        if labels
        else {}
    )
    asked = (
        _by_id(questions["questions"], ("question_id", "image_id", "question"), benchmark, document)
        if questions
        else answers
    )
    _same_ids(benchmark, document.path, questions=asked, annotations=answers) if labels else None
    root = document.path.parent / subtype if images is None else Path(images)
    samples = []
    for key, row in asked.items():
        label = answers.get(key, {})
        file = lay.picture(root, f"COCO_{subtype}_{int(row['image_id']):012d}.jpg", str(document.path))
        samples.append(
            Sample(
                key,
                (file,),
                lay.with_suffix(row["question"]) if "question" in row else "",
                [a["answer"] for a in label["answers"]] if label else None,
                label.get("answer_type", ""),
                {"question_type": label["question_type"]} if "question_type" in label else {},
            )
        )
    return samples, str(given.get("data_subtype", "val2014"))


def _by_id(
    rows: Any, keys: Sequence[str], benchmark: lay.Benchmark, document: lay.Document
) -> dict[Any, Any]:
    found = lay.require_keys(lay.Document(document.path, "array", rows), keys, benchmark)
    return lay.unique(found, "question_id", benchmark, document.path)


def _read_stored(place: Path | str, benchmark: lay.Benchmark) -> list[Sample]:
    columns = ("question_id", "image_id", "question", "answers", "image")
    rows = lay.read_stored(place, benchmark, config=None, split="validation", columns=columns)
    return [
        Sample(
            row["question_id"],
            (lay.stored_picture(rows, at, str(row["image_id"])),),
            lay.with_suffix(row["question"]),
            [a["answer"] for a in row["answers"]] if row["answers"] else None,
            row.get("answer_type") or "",
            {"question_type": row["question_type"]} if row.get("question_type") else {},
        )
        for at, row in enumerate(lay.stored_rows(rows))
    ]


def _scorer(style: str) -> Scorer:
    def score(samples: Sequence[Sample], predictions: Sequence[str | None]) -> Any:
        types = [s.category for s in samples]
        kinds = [s.metadata.get("question_type", "") for s in samples]
        return vqav2(
            predictions,
            [s.answer for s in samples],
            answer_types=types if all(types) else None,
            question_types=kinds if all(kinds) else None,
            style=style,
            ids=[s.question_id for s in samples],
        )

    return score


def _submission(place: Path) -> Submission:
    def write(samples: Sequence[Sample], predictions: Sequence[str | None], path: Path) -> Path:
        given = {s.question_id: p for s, p in zip(samples, predictions, strict=True) if p is not None}
        ids = [s.question_id for s in samples]
        if samples[0].answer is None:
            folder = place if place.is_dir() else place.parent
            ids = _all_of_test2015(folder, given)
        rows = [{"question_id": i, "answer": normalise_m4c(given[i]) if i in given else ""} for i in ids]
        return lay.write_json(path, rows)

    return write


def _all_of_test2015(folder: Path, given: dict[Any, str]) -> list[Any]:
    """Every id of test2015: the server takes no file with fewer."""
    for name in TEST:
        if (folder / name).is_file():
            document = lay.read_document(folder / name)
            rows = document.value["questions"] if document.kind == "object" else document.rows
            ids = [row["question_id"] for row in rows]
            strange = sorted(set(given) - set(ids), key=str)
            if not strange:
                return ids
            raise lay.strange_ids(folder / name, strange, "are answered but not in this list of test2015")
    raise MissingFileError(
        f"VQAv2's server takes only files that cover all of test2015, and the list of its questions is not there: "
        f"looked for {' and '.join(TEST)} in {folder}. Get it from {SOURCE}."
    )


def _same_ids(benchmark: lay.Benchmark, path: str | Path, **tables: Mapping[Any, Any]) -> None:
    """Two tables of a benchmark must be about the same questions.

    Raises:
        DataError: They are not; the message counts what is missing where and names the first.
    """
    (first, one), (second, other) = tables.items()
    for name, given, wanted in ((first, one, other), (second, other, one)):
        missing = [key for key in wanted if key not in given]
        if missing:
            raise lay.strange_ids(
                path, missing, f"lack their {name} ({len(one)} {first}, {len(other)} {second})"
            )
