"""POPE: is there such an object in the picture? (Li et al., EMNLP 2023)

    pope              whatever release is there; LLaVA's questions, or the label files alone
    pope_8910         the release of commit e3e39262, which LLaVA-1.5 used: 2,910 random, 3,000 + 3,000
    pope_9000         the later release: 3,000 in each split, some questions worded anew
    pope_likelihood   P(Yes) against P(No) at the first position (Prismatic, Cobra)
    pope_playground   held-out scenes of the playground in the official layout

Ids start again in every label file, so with several splits a question is called ``random/1``; LLaVA's question
file counts through, and its ids are kept. Labels are joined by split, picture and question, never by position.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vlmamba.errors import DataError, MissingFileError
from vlmamba.evaluation import Sample, Score, Task
from vlmamba.evaluation import layouts as lay
from vlmamba.evaluation.scorers.pope import pope
from vlmamba.evaluation.scorers.pope import pope_likelihood as likelihood_figures
from vlmamba.evaluation.task import Record, Reference

SPLITS = ("random", "popular", "adversarial")
BENCHMARK = lay.Benchmark(
    "POPE",
    "playground/data/eval/pope",
    {
        "llava_pope_test.jsonl": "LLaVA's questions, in its eval.zip, with the label files in coco/",
        "coco/": "the folder of the label files coco_pope_*.json",
        "coco_pope_*.json": "official label files",
        "test*.parquet": "Hugging Face",
    },
    "https://github.com/AoiDragon/POPE (output/coco; commit e3e39262 for LLaVA's numbers)",
    "lmms-lab-encoder/POPE",
)
LABEL_KEYS = ("question_id", "image", "text", "label")
RELEASES = {
    "8910": {"random": 2910, "popular": 3000, "adversarial": 3000},
    "9000": dict.fromkeys(SPLITS, 3000),
}
REFERENCES = (
    Reference("LLaVA-1.5-7B", 85.9, "LLaVA model zoo"),
    Reference("VL-Mamba 2.8B", 84.4, "Qiao et al. 2024"),
    Reference("MobileVLM-3B", 84.9, "Chu et al. 2023"),
)
REFERENCES_LIKELIHOOD = (Reference("Cobra-3.5B", 88.0, "Zhao et al. 2024, v1"),)


def task(annotations: str | None = None, images: str | None = None) -> Task:
    """POPE, answers generated.

    Args:
        annotations: LLaVA's questions, one label file, a folder of them, or parquet files.
        images: The folder with ``COCO_val2014_*.jpg``; ``val2014`` beside the questions when left out.
    """
    return _task("pope", annotations, images)


def pope_8910(annotations: str | None = None, images: str | None = None) -> Task:
    """The release of LLaVA-1.5's numbers; another one is refused."""
    return _task("pope_8910", annotations, images, release="8910")


def pope_9000(annotations: str | None = None, images: str | None = None) -> Task:
    """The later release; another one is refused."""
    return _task("pope_9000", annotations, images, release="9000")


def pope_likelihood(annotations: str | None = None, images: str | None = None) -> Task:
    """POPE by likelihood of Yes and No."""
    base = _task("pope_likelihood", annotations, images)
    return dataclasses.replace(
        base,
        samples=[dataclasses.replace(s, options=("Yes", "No")) for s in base.samples],
        score=_score_likelihood,
        method="likelihood",
        reads="record",
        reader=None,
        references=REFERENCES_LIKELIHOOD,
    )


def pope_playground(
    annotations: str = "playground/data/mini/benchmarks/pope", images: str | None = None
) -> Task:
    """The playground's scenes; ``python playground/make_data.py`` writes them."""
    base = _task("pope_playground", annotations, images)
    return dataclasses.replace(base, references=(), settings={**base.settings, "release": "playground"})


def _task(name: str, annotations: str | None, images: str | None, release: str | None = None) -> Task:
    place = lay.find_data(BENCHMARK, annotations)
    samples = _read(place, images)
    counts = dict(Counter(s.category for s in samples))
    found = next((key for key, sizes in RELEASES.items() if counts == sizes), "other")
    if release is not None and found != release:
        raise DataError(
            f"{place} is not the release {release} of POPE: it has {_sizes(counts)}, the release "
            f"{_sizes(RELEASES[release])}. Mixed releases pair answers with other questions' labels"
        )
    return Task(
        name=name,
        samples=samples,
        score=_score,
        description="POPE: is there such an object in the picture? Mean F1 over three kinds of absent objects.",
        reader=_read_answers,
        references=REFERENCES,
        settings={"release": found, "questions": counts, "prompt": "question, short-answer instruction"},
    )


def _sizes(counts: dict[str, int]) -> str:
    return ", ".join(f"{counts.get(name, 0)} {name}" for name in SPLITS)


def _read(place: Path | str, images: str | None) -> list[Sample]:
    if lay.is_stored(place):
        return _read_stored(place)
    path = Path(place)
    if path.is_dir():
        return _read_labels(_label_files(path), images)
    document = lay.read_document(path)
    if document.kind == "lines" and document.has(*LABEL_KEYS):
        return _read_labels([path], images)
    if document.kind == "lines" and document.has("question_id", "image", "text", "category"):
        return _read_llava(document, images)
    raise BENCHMARK.wrong(document)


def _label_files(folder: Path) -> list[Path]:
    files = [file for name in SPLITS for file in sorted(folder.glob(f"*pope_{name}.json"))]
    if not files:
        raise MissingFileError(
            f"{folder} has no label file coco_pope_*.json of POPE. Get them from {BENCHMARK.source}."
        )
    return files


def _split_of(path: Path) -> str:
    return next((name for name in SPLITS if name in path.name), path.stem)


def _labels(path: Path) -> list[dict[str, Any]]:
    document = lay.read_document(path)
    rows = lay.require_keys(document, LABEL_KEYS, BENCHMARK)
    lay.unique(rows, "question_id", BENCHMARK, path)
    return rows


def _read_labels(files: Sequence[Path], images: str | None) -> list[Sample]:
    """Samples of the label files alone."""
    folder = files[0].parent
    root = (
        (folder.parent if folder.name == "coco" else folder) / "val2014" if images is None else Path(images)
    )
    samples = []
    for file in files:
        split = _split_of(file)
        for row in _labels(file):
            key = f"{split}/{row['question_id']}" if len(files) > 1 else row["question_id"]
            image = lay.picture(root, row["image"], f"{file}, question {row['question_id']!r}")
            samples.append(Sample(key, (image,), lay.with_suffix(row["text"]), row["label"], split))
    return samples


def _read_llava(document: lay.Document, images: str | None) -> list[Sample]:
    """LLaVA's questions with the labels of the files in ``coco/`` beside them."""
    folder = document.path.parent
    files = _label_files(folder / "coco" if (folder / "coco").is_dir() else folder)
    labels = {
        (_split_of(file), row["image"], row["text"]): row["label"] for file in files for row in _labels(file)
    }
    missing, counts = [], Counter(_split_of(file) for file in files for _ in _labels(file))

    def details(row: Any, where: str) -> dict[str, Any]:
        question = row["text"].removesuffix(f"\n{lay.SHORT_ANSWER}")
        label = labels.get((row["category"], row["image"], question))
        if label is None:
            missing.append(row["question_id"])
        return {"answer": label, "category": row["category"]}

    root = folder / "val2014" if images is None else Path(images)
    samples = lay.llava_questions(document, BENCHMARK, root, details=details)
    if missing:
        raise lay.strange_ids(
            document.path,
            missing,
            f"of {len(samples)} have no label in {files[0].parent} (same split, picture and question), which has "
            f"{_sizes(counts)}: the files are of different releases",
        )
    return samples


def _read_stored(place: Path | str) -> list[Sample]:
    columns = ("question_id", "question", "answer", "image", "category")
    rows = lay.read_stored(place, BENCHMARK, config=None, split="test", columns=columns)
    return [
        Sample(
            f"{row['category']}/{row['question_id']}",
            (lay.stored_picture(rows, at, str(row.get("image_source") or at)),),
            lay.with_suffix(row["question"]),
            row["answer"],
            row["category"],
        )
        for at, row in enumerate(lay.stored_rows(rows))
    ]


def _score(samples: Sequence[Sample], predictions: Sequence[str | None]) -> Score:
    return pope(predictions, *_labels_of(samples), ids=[s.question_id for s in samples])


def _score_likelihood(samples: Sequence[Sample], records: Sequence[Record | None]) -> Score:
    scores = [lay.option_probability(record) for record in records]
    return likelihood_figures(scores, *_labels_of(samples), ids=[s.question_id for s in samples])


def _labels_of(samples: Sequence[Sample]) -> tuple[list[str], list[str]]:
    return [s.answer for s in samples], [s.category for s in samples]


def _read_answers(path: Path, samples: Sequence[Sample]) -> list[Record] | None:
    """POPE's own answer files, lines of ``{"question", "answer"}`` in the order of a label file: one file for
    data of one split, a folder with one for each of several.
    """
    splits = list(dict.fromkeys(s.category for s in samples))
    if path.is_dir():
        files = {name: sorted(f for f in path.glob("*.json*") if name in f.name) for name in splits}
        wrong = [name for name, found in files.items() if len(found) != 1]
        if wrong:
            raise DataError(
                f"{path} must hold one answer file for each split; {wrong[0]!r} has {len(files[wrong[0]])}"
            )
        pairs = [(found[0], [s for s in samples if s.category == name]) for name, found in files.items()]
    else:
        pairs = [(path, list(samples))]
    records: list[Record] = []
    for file, asked in pairs:
        document = lay.read_own(file)
        if document is None or document.kind == "object" or not document.has("answer"):
            return None
        if len(splits) > 1 and file == path:
            raise DataError(
                f"{path} is in POPE's own layout, one file a split, but the data have {', '.join(splits)}: give a "
                "folder with one answer file for each, or the label file of one split as annotations"
            )
        records += _join_by_position(document, asked, "answer", question=_same_question)
    return records


def _same_question(row: Any, sample: Sample) -> bool:
    given = row.get("question", sample.text)
    return isinstance(given, str) and sample.text in (given, lay.with_suffix(given))


def _join_by_position(
    document: lay.Document,
    samples: Sequence[Sample],
    text_key: str,
    *,
    question: Callable[[Any, Sample], bool],
) -> list[Record]:
    """Answers in the order of the questions, as some official scripts pair them.

    Args:
        document: The answers.
        samples: The questions, in their order.
        text_key: Key of the answer.
        question: Whether a row may belong to a sample (its question is the same, or it has none).

    Raises:
        DataError: Other numbers, or a row that belongs to another question.
    """
    if len(document.rows) != len(samples):
        raise DataError(
            f"{document.path} has {len(document.rows)} answers for {len(samples)} questions; they are paired by "
            "position, so that none may be left out (are they of the other release?)"
        )
    strange = [
        at for at, (row, s) in enumerate(zip(document.rows, samples, strict=True)) if not question(row, s)
    ]
    if strange:
        raise DataError(
            f"{document.path}: {len(strange)} of {len(samples)} answers stand where another question is asked, "
            f"such as {document.where(strange[0])}, where question {samples[strange[0]].question_id!r} is "
            f"{samples[strange[0]].text!r} (are they of another release?)"
        )
    return [
        lay.as_record(s.question_id, row[text_key], s.text)
        for row, s in zip(document.rows, samples, strict=True)
    ]
