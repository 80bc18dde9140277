"""TextVQA: questions about text in pictures, validation split (Singh et al., CVPR 2019).

    textvqa       the question alone
    textvqa_ocr   with the OCR tokens of LLaVA's question file in the prompt: what LLaVA-1.5's 58.2 is

The two are different tasks: the same model is some ten points apart. An answer is filed under picture and
question in lower case, as the official evaluator does: LLaVA's question ids are picture ids and not unique.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlmamba.errors import DataError
from vlmamba.evaluation import Sample, Score, Task
from vlmamba.evaluation import layouts as lay
from vlmamba.evaluation.records import read_records
from vlmamba.evaluation.scorers.vqa import textvqa, textvqa_question
from vlmamba.evaluation.scorers.vqa_text import normalise_m4c
from vlmamba.evaluation.task import Record, Reference

ANNOTATIONS = "TextVQA_0.5.1_val.json"
LLAVA = "llava_textvqa_val_v051_ocr.jsonl"
OCR = "Reference OCR token: "
SOURCE = "https://textvqa.org/dataset (LLaVA's eval.zip: its docs/Evaluation.md)"
FOLDER = "playground/data/eval/textvqa"
HUB = "lmms-lab-encoder/textvqa"
PLAIN = lay.Benchmark(
    "TextVQA",
    FOLDER,
    {
        ANNOTATIONS: "official annotations",
        LLAVA: "LLaVA's questions, OCR tokens taken out",
        "validation*.parquet": "Hugging Face",
    },
    SOURCE,
    HUB,
)
WITH_OCR = lay.Benchmark(
    "TextVQA with OCR tokens",
    FOLDER,
    {
        LLAVA: f"LLaVA's questions, in its eval.zip, with {ANNOTATIONS} beside them",
        "validation*.parquet": "Hugging Face",
    },
    SOURCE,
    HUB,
)
KEYS = ("image_id", "question", "answers")
REFERENCES = (
    Reference("VL-Mamba 2.8B", 48.9, "Qiao et al. 2024"),
    Reference("MobileVLM-3B", 47.5, "Chu et al. 2023"),
    Reference("Cobra-3.5B", 46.0, "Zhao et al. 2024, v1"),
)
REFERENCES_OCR = (
    Reference("LLaVA-1.5-7B", 58.2, "LLaVA model zoo"),
    Reference("TinyLLaVA-3.1B", 59.1, "TinyLLaVA model zoo"),
)


def task(annotations: str | None = None, images: str | None = None) -> Task:
    """Without OCR tokens.

    Args:
        annotations: Official annotations, LLaVA's questions, parquet files, or a folder of these.
        images: The folder with ``<image_id>.jpg``; ``train_images`` beside the annotations when left out.
    """
    return _task("textvqa", PLAIN, annotations, images, REFERENCES)


def textvqa_ocr(annotations: str | None = None, images: str | None = None) -> Task:
    """With OCR tokens."""
    return _task("textvqa_ocr", WITH_OCR, annotations, images, REFERENCES_OCR)


def _task(
    name: str,
    benchmark: lay.Benchmark,
    annotations: str | None,
    images: str | None,
    references: tuple[Reference, ...],
) -> Task:
    ocr = benchmark is WITH_OCR
    place = lay.find_data(benchmark, annotations)
    samples = (
        _read_stored(place, benchmark, ocr)
        if lay.is_stored(place)
        else _read(Path(place), benchmark, ocr, images)
    )
    return Task(
        name=name,
        samples=samples,
        score=_score,
        description="TextVQA validation: questions about text in pictures, credit by ten annotators.",
        submission=_submission,
        reader=_read_answers,
        references=references,
        settings={
            "split": "val",
            "prompt": f"question, {'OCR tokens, ' if ocr else ''}short-answer instruction",
        },
    )


def _read(path: Path, benchmark: lay.Benchmark, ocr: bool, images: str | None) -> list[Sample]:
    document = lay.read_document(path)
    root = path.parent / "train_images" if images is None else Path(images)
    if document.kind == "lines" and document.has("question_id", "image", "text"):
        labels = _labels(lay.read_document(_beside(path)), benchmark)
        return _read_llava(document, labels, benchmark, ocr, root)
    if document.kind != "object" or "data" not in document.value:
        raise benchmark.wrong(document)
    if not ocr:
        return [
            Sample(
                key[0],
                (lay.picture(root, f"{key[0]}.jpg", f"{path}, question {key!r}"),),
                lay.with_suffix(row["question"]),
                row["answers"],
                metadata={"question": key[1], "official_id": row.get("question_id")},
            )
            for key, row in _labels(document, benchmark).items()
        ]
    questions = path.with_name(LLAVA)
    if not questions.is_file():
        raise DataError(
            f"{path} has no OCR tokens; {LLAVA} is not beside it. Take the task textvqa (another prompt and figure) "
            f"or get that file from {SOURCE}."
        )
    return _read(questions, benchmark, ocr, images)


def _beside(path: Path) -> Path:
    """The annotations of LLaVA's questions."""
    return path.with_name(ANNOTATIONS)


def _labels(document: lay.Document, benchmark: lay.Benchmark) -> dict[tuple[str, str], Mapping[str, Any]]:
    """Annotations by picture and question in lower case."""
    found = document.value.get("data") if document.kind == "object" else None
    if not isinstance(found, list):
        raise benchmark.wrong(document)
    rows = lay.require_keys(lay.Document(document.path, "array", found), KEYS, benchmark)
    keyed = [{**row, "key": (str(row["image_id"]), row["question"].lower())} for row in rows]
    return dict(lay.unique(keyed, "key", benchmark, document.path))


def _read_llava(
    document: lay.Document,
    labels: Mapping[tuple[str, str], Mapping[str, Any]],
    benchmark: lay.Benchmark,
    ocr: bool,
    root: Path,
) -> list[Sample]:
    """LLaVA's questions; without `ocr` the line of OCR tokens is left out."""
    missing, plain = [], {}

    def details(row: Mapping[str, Any], where: str) -> dict[str, Any]:
        try:
            key = (str(row["question_id"]), textvqa_question(row["text"]))
        except DataError as error:
            raise DataError(f"{where}: {error}") from error
        label = labels.get(key)
        if label is None:
            missing.append(key)
            return {}
        plain[row["question_id"], row["text"]] = lay.with_suffix(label["question"])
        return {
            "answer": label["answers"],
            "metadata": {"question": key[1], "official_id": label.get("question_id")},
        }

    samples = lay.llava_questions(document, benchmark, root, details=details)
    if missing:
        raise lay.strange_ids(
            document.path, missing, f"of {len(samples)} have no annotation (same picture and question)"
        )
    if ocr and not any(OCR in s.text for s in samples):
        raise DataError(
            f"no question of {document.path} has OCR tokens ('{OCR}...'): it is for the task textvqa"
        )
    if ocr:
        return samples
    return [
        Sample(s.question_id, s.images, plain[s.question_id, s.text], s.answer, metadata=s.metadata)
        for s in samples
    ]


def _read_stored(place: Path | str, benchmark: lay.Benchmark, ocr: bool) -> list[Sample]:
    columns = (*KEYS, "image", *(("ocr_tokens",) if ocr else ()))
    rows = lay.read_stored(place, benchmark, config=None, split="validation", columns=columns)
    samples = []
    for at, row in enumerate(lay.stored_rows(rows)):
        tokens = f"\n{OCR}{', '.join(row['ocr_tokens'])}" if ocr else ""
        samples.append(
            Sample(
                row["image_id"],
                (lay.stored_picture(rows, at, row["image_id"]),),
                lay.with_suffix(row["question"] + tokens),
                row["answers"],
                metadata={"question": row["question"].lower(), "official_id": row.get("question_id")},
            )
        )
    return samples


def _score(samples: Sequence[Sample], predictions: Sequence[str | None]) -> Score:
    ids = [(str(s.question_id), s.metadata["question"]) for s in samples]
    return textvqa(predictions, [s.answer for s in samples], ids=ids)


def _read_answers(path: Path, samples: Sequence[Sample]) -> list[Record] | None:
    """LLaVA's answers, whatever of OCR tokens their prompts have; or the server's array, by official id."""
    official = {s.metadata["official_id"]: s for s in samples}
    if (document := lay.read_own(path)) is not None:
        rows = lay.answer_rows(document, "question_id", "answer")
        if rows is None:
            return None
        strange = [row["question_id"] for row in rows if row["question_id"] not in official]
        if strange:
            raise lay.strange_ids(path, strange, "are not asked by TextVQA's validation split")
        return [
            lay.as_record(
                official[row["question_id"]].question_id, row["answer"], official[row["question_id"]].text
            )
            for row in rows
        ]
    if path.is_dir():
        return None
    text_of = {(str(s.question_id), s.metadata["question"]): s.text for s in samples}
    records = read_records(path)
    for record in records:
        if record.get("prompt"):
            try:
                key = (str(record["question_id"]), textvqa_question(record["prompt"]))
            except DataError as error:
                raise DataError(f"{path}, question {record['question_id']!r}: {error}") from error
            record["prompt"] = text_of.get(key, record["prompt"])
    return records


def _submission(samples: Sequence[Sample], predictions: Sequence[str | None], path: Path) -> Path:
    """The server's array, answers through the m4c processor."""
    missing = [s.question_id for s, p in zip(samples, predictions, strict=True) if p is None]
    if missing:
        raise lay.strange_ids(path, missing, f"of {len(samples)} have no answer")
    rows = [
        {"question_id": s.metadata["official_id"], "answer": normalise_m4c(p or "")}
        for s, p in zip(samples, predictions, strict=True)
    ]
    return lay.write_json(path, rows)
