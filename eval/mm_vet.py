"""MM-Vet: open questions that need several abilities at once, graded by a language model (Yu et al. 2023).

    mm_vet   218 questions; the answers go to the authors' evaluator

Nothing is graded here, hence no figure comes from answers: ``--submission`` writes the file for the evaluator
(``mm-vet_evaluator.py``, or its page on the hub), and the grades file that it returns is scored with
``vlmamba eval score mm_vet --predictions grades.json``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlmamba.errors import DataError, MissingFileError
from vlmamba.evaluation import Sample, Score, Task
from vlmamba.evaluation import layouts as lay
from vlmamba.evaluation.records import read_records
from vlmamba.evaluation.scorers.mm_vet import mm_vet, mm_vet_submission
from vlmamba.evaluation.task import Record, Reference

OFFICIAL = "mm-vet.json"
BENCHMARK = lay.Benchmark(
    "MM-Vet",
    "playground/data/eval/mm-vet",
    {
        "llava-mm-vet.jsonl": f"LLaVA's questions, in its eval.zip, with {OFFICIAL} beside them",
        OFFICIAL: "official questions",
        f"mm-vet/{OFFICIAL}": "official questions",
        "test*.parquet": "Hugging Face",
    },
    "https://github.com/yuweihao/MM-Vet/releases/download/v1/mm-vet.zip",
    "lmms-lab-encoder/MMVet",
)
EVALUATOR = (
    "MM-Vet is graded by a language model: send the submission file to the authors' evaluator "
    "(https://github.com/yuweihao/MM-Vet), then score its grades file"
)
REFERENCES = (
    Reference("LLaVA-1.5-7B", 31.1, "LLaVA model zoo"),
    Reference("VL-Mamba 2.8B", 32.6, "Qiao et al. 2024"),
    Reference("TinyLLaVA-3.1B", 32.0, "TinyLLaVA model zoo"),
)


def task(annotations: str | None = None, images: str | None = None) -> Task:
    """The benchmark.

    Args:
        annotations: ``mm-vet.json``, LLaVA's questions, parquet files, or a folder of these.
        images: The folder of the pictures; ``images`` near the questions when left out.
    """
    place = lay.find_data(BENCHMARK, annotations)
    return Task(
        name="mm_vet",
        samples=_read_stored(place) if lay.is_stored(place) else _read(Path(place), images),
        score=_score,
        max_new_tokens=1024,
        description="MM-Vet: open questions that need several abilities, graded by a language model.",
        reads="record",
        submission=_submission,
        reader=_read_answers,
        references=REFERENCES,
        settings={"prompt": "the bare question", "judge": "none here: the authors' evaluator"},
    )


def _read(path: Path, images: str | None) -> list[Sample]:
    document = lay.read_document(path)
    if document.kind == "lines" and document.has("question_id", "image", "text"):
        near = (path.with_name(OFFICIAL), path.parent / "mm-vet" / OFFICIAL)
        file = next((f for f in near if f.is_file()), None)
        if file is None:
            raise MissingFileError(
                f"{path} has the questions of MM-Vet, not their abilities: {OFFICIAL} is not beside it. Get it from "
                f"{BENCHMARK.source}."
            )
        official = _questions(lay.read_document(file))
        unknown = [row["question_id"] for row in document.rows if _key(row["question_id"]) not in official]
        if unknown:
            raise lay.strange_ids(path, unknown, f"of {len(document.rows)} are not in {file}")

        def details(row: Mapping[str, Any], where: str) -> dict[str, Any]:
            return _fields(official[_key(row["question_id"])])

        return lay.llava_questions(document, BENCHMARK, _images(path, images), details=details)
    if document.kind != "object":
        raise BENCHMARK.wrong(document)
    root = _images(path, images)
    return [
        Sample(key, (lay.picture(root, row["imagename"], f"{path}, {key}"),), row["question"], **_fields(row))
        for key, row in _questions(document).items()
    ]


def _questions(document: lay.Document) -> dict[str, Any]:
    rows = document.value if document.kind == "object" else {}
    keys = {"imagename", "question", "answer", "capability"}
    bad = [key for key, row in rows.items() if not isinstance(row, dict) or not keys <= set(row)]
    if not rows or len(bad) == len(rows):
        raise BENCHMARK.wrong(document)
    if bad:
        raise lay.strange_ids(document.path, bad, f"of {len(rows)} lack {', '.join(sorted(keys))}")
    return rows


def _key(question_id: Any) -> str:
    text = str(question_id)
    return text if text.startswith("v1_") else f"v1_{text}"


def _images(path: Path, images: str | None) -> Path:
    near = path.parent / "images"
    return Path(images) if images is not None else near if near.is_dir() else path.parent / "mm-vet/images"


def _fields(row: Mapping[str, Any]) -> dict[str, Any]:
    named = row["capability"]
    names = [name.strip() for name in named.split(",")] if isinstance(named, str) else list(named)
    return {"answer": row["answer"], "category": ",".join(names), "metadata": {"capability": names}}


def _read_stored(place: Path | str) -> list[Sample]:
    columns = ("question_id", "question", "answer", "capability", "image")
    rows = lay.read_stored(place, BENCHMARK, config=None, split="test", columns=columns)
    return [
        Sample(
            row["question_id"],
            (lay.stored_picture(rows, at, str(row["question_id"])),),
            row["question"],
            **_fields(row),
        )
        for at, row in enumerate(lay.stored_rows(rows))
    ]


def _score(samples: Sequence[Sample], records: Sequence[Record | None]) -> Score:
    """The grades that records carry; without grades no figure."""
    graded = [r is not None and "grades" in (r.get("metadata") or {}) for r in records]
    if not any(graded):
        return lay.no_labels("MM-Vet total", EVALUATOR)(samples, records)
    missing = [s.question_id for s, there in zip(samples, graded, strict=True) if not there]
    if missing:
        raise lay.strange_ids("the grades", missing, f"of {len(samples)} have no grade")
    grades = {
        _key(s.question_id): r["metadata"]["grades"] for s, r in zip(samples, records, strict=True) if r
    }
    return mm_vet(grades, {_key(s.question_id): s.metadata for s in samples})


def _read_answers(path: Path, samples: Sequence[Sample]) -> list[Record] | None:
    """The evaluator's grades file (grades under "score") or a submission (texts), both by ``v1_n``; or LLaVA's answers,
    whose ids may be n where the questions' are ``v1_n``.
    """
    ids = {_key(s.question_id): s.question_id for s in samples}
    document = lay.read_own(path)
    if document is None and path.is_file():
        records = read_records(path)
        return [{**r, "question_id": ids.get(_key(r["question_id"]), r["question_id"])} for r in records]
    if document is None or document.kind != "object":
        return None
    strange = [key for key in document.value if key not in ids]
    if strange:
        raise lay.strange_ids(path, strange, f"are not among the {len(ids)} of MM-Vet asked")
    records = []
    for key, value in document.value.items():
        if isinstance(value, str):
            records.append(lay.as_record(ids[key], value))
        elif isinstance(value, dict) and "score" in value:
            records.append(lay.as_record(ids[key], "", grades=value))
        else:
            raise DataError(f"{path}, {key}: neither an answer (a text) nor grades ({{'score': [...]}})")
    return records


def _submission(samples: Sequence[Sample], records: Sequence[Record | None], path: Path) -> Path:
    """LLaVA's file: answers by ``v1_n``, indented by two."""
    answers = {s.question_id: None if r is None else r["text"] for s, r in zip(samples, records, strict=True)}
    return lay.write_json(path, mm_vet_submission(answers), indent=2)
