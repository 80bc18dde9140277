"""VizWiz-VQA: questions that blind people asked about their own photographs (Gurari et al., CVPR 2018).

    vizwiz        test, as LLaVA-1.5 reports it: answers go to the server, nothing is scored here
    vizwiz_val    val, scored as the server scores LLaVA's upload (m4c processor, then the official rule)
    vizwiz_official  val, the official rule on the answer as the model wrote it
    vizwiz_lmms   val by lmms-eval's rule, m4c on both sides: much more lenient

Answers in the server's layout (image, answer) are ready for the server: they do not pass the m4c processor again.
The official script takes the annotators' answers as they are written, capitals and full stops included.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlmamba.evaluation import Sample, Score, Task
from vlmamba.evaluation import layouts as lay
from vlmamba.evaluation.scorers.vqa import vizwiz
from vlmamba.evaluation.scorers.vqa_text import normalise_m4c
from vlmamba.evaluation.task import Record, Reference, Scorer

INSTRUCTION = f"{lay.UNANSWERABLE}\n{lay.SHORT_ANSWER}"
TEST = {"llava_test.jsonl": "LLaVA's questions, in its eval.zip", "test.json": "official questions"}
VAL = {"val.json": "official annotations", "val*.parquet": "Hugging Face"}
SOURCE = "https://vizwiz.org/tasks-and-datasets/vqa (Annotations.zip, images)"
SERVER = "send the submission file to https://eval.ai/web/challenges/challenge-page/2185"
REFERENCES = (Reference("LLaVA-1.5-7B", 50.0, "LLaVA model zoo (test-dev)"),)
REFERENCES_VAL = (Reference("Cobra-3.5B", 52.0, "Zhao et al. 2024, v1 (val)"),)


def task(annotations: str | None = None, images: str | None = None) -> Task:
    """Test; a file with answers given here is scored.

    Args:
        annotations: LLaVA's questions, an official file, parquet files, or a folder of these.
        images: The folder of the pictures; ``test`` or ``val`` beside the questions when left out.
    """
    return _task("vizwiz", {**TEST, **VAL}, annotations, images, "llava", REFERENCES)


def vizwiz_val(annotations: str | None = None, images: str | None = None) -> Task:
    """Val, scored as LLaVA's upload is."""
    return _task("vizwiz_val", VAL, annotations, images, "llava", REFERENCES_VAL)


def vizwiz_official(annotations: str | None = None, images: str | None = None) -> Task:
    """Val, the official rule on the plain answer."""
    return _task("vizwiz_official", VAL, annotations, images, "official")


def vizwiz_lmms(annotations: str | None = None, images: str | None = None) -> Task:
    """Val, lmms-eval's rule."""
    return _task("vizwiz_lmms", VAL, annotations, images, "lmms")


def _task(
    name: str,
    files: Mapping[str, str],
    annotations: str | None,
    images: str | None,
    style: str,
    references: tuple[Reference, ...] = (),
) -> Task:
    benchmark = lay.Benchmark(
        "VizWiz", "playground/data/eval/vizwiz", files, SOURCE, "lmms-lab-encoder/VizWiz-VQA"
    )
    place = lay.find_data(benchmark, annotations)
    samples = (
        _read_stored(place, benchmark) if lay.is_stored(place) else _read(Path(place), benchmark, images)
    )
    labelled = all(s.answer for s in samples)
    return Task(
        name=name,
        samples=samples,
        score=_scorer(style)
        if labelled
        else lay.no_labels("VizWiz accuracy", f"this split of VizWiz has no public answers: {SERVER}"),
        description="VizWiz: questions of blind people about their photographs, credit by ten annotators.",
        reads="record",
        submission=_submission,
        reader=_read_answers,
        references=references,
        settings={
            "labelled": labelled,
            "prompt": "question, 'Unanswerable' and short-answer instructions",
            "scoring": style,
        },
    )


def _read(path: Path, benchmark: lay.Benchmark, images: str | None) -> list[Sample]:
    document = lay.read_document(path)
    if document.kind == "lines" and document.has("question_id", "image", "text"):
        root = path.parent / "test" if images is None else Path(images)

        def file_name(row: Mapping[str, Any], where: str) -> dict[str, Any]:
            return {"metadata": {"image": row["image"]}}

        return lay.llava_questions(document, benchmark, root, details=file_name)
    if document.kind != "array" or not document.has("image", "question"):
        raise benchmark.wrong(document)
    rows = lay.require_keys(document, ("image", "question"), benchmark)
    lay.unique(rows, "image", benchmark, path)
    labelled = [row["image"] for row in rows if "answers" in row]
    if labelled and len(labelled) < len(rows):
        bare = [row["image"] for row in rows if "answers" not in row]
        raise lay.strange_ids(path, bare, f"of {len(rows)} have no answers")
    split = next((name for name in ("train", "val", "test") if name in path.stem), "test")
    root = path.parent / split if images is None else Path(images)
    return [
        Sample(
            Path(row["image"]).stem,
            (lay.picture(root, row["image"], f"{path}, row {at + 1}"),),
            lay.with_suffix(row["question"], INSTRUCTION),
            [a["answer"] for a in row["answers"]] if "answers" in row else None,
            row.get("answer_type", ""),
            {"image": row["image"], "answerable": row.get("answerable")},
        )
        for at, row in enumerate(rows)
    ]


def _read_stored(place: Path | str, benchmark: lay.Benchmark) -> list[Sample]:
    rows = lay.read_stored(
        place, benchmark, config=None, split="val", columns=("question_id", "question", "answers", "image")
    )
    samples = []
    for at, row in enumerate(lay.stored_rows(rows)):
        stem = str(row["question_id"]).removesuffix(".jpg")
        samples.append(
            Sample(
                stem,
                (lay.stored_picture(rows, at, stem),),
                lay.with_suffix(row["question"], INSTRUCTION),
                list(row["answers"]) or None,
                row.get("category") or "",
                {"image": f"{stem}.jpg"},
            )
        )
    return samples


def _scorer(style: str) -> Scorer:
    def score(samples: Sequence[Sample], records: Sequence[Record | None]) -> Score:
        types = [s.category for s in samples]
        answerable: list[Any] = [s.metadata.get("answerable") for s in samples]
        uploaded = style == "llava" and any(map(lay.in_own_layout, records))
        return vizwiz(
            [None if r is None else r["text"] for r in records],
            [s.answer for s in samples],
            answer_types=types if all(types) else None,
            answerable=None if None in answerable else answerable,
            style="official" if uploaded else style,
            ids=[s.question_id for s in samples],
        )

    return score


def _read_answers(path: Path, samples: Sequence[Sample]) -> list[Record] | None:
    """The server's array of picture and answer."""
    found = lay.join_by_id("image", "answer")(path, samples)
    ids = {s.metadata["image"]: s.question_id for s in samples}
    return (
        None
        if found is None
        else [
            {**record, "question_id": ids.get(record["question_id"], record["question_id"])}
            for record in found
        ]
    )


def _submission(samples: Sequence[Sample], records: Sequence[Record | None], path: Path) -> Path:
    """LLaVA's array: picture and answer through the m4c processor, in the questions' order, all of them."""
    missing = [s.question_id for s, p in zip(samples, records, strict=True) if p is None]
    if missing:
        raise lay.strange_ids(path, missing, f"of {len(samples)} have no answer, and the server wants all")
    rows = [
        {
            "image": s.metadata["image"],
            "answer": r["text"] if lay.in_own_layout(r) else normalise_m4c(r["text"]),
        }
        for s, r in zip(samples, records, strict=True)
        if r is not None
    ]
    return lay.write_json(path, rows)
