"""Sarcasm in tweets with a picture (Cai, Cai and Wan, ACL 2019).

    sarcasm             a generated yes or no
    sarcasm_likelihood  P(Yes) against P(No) at the first position

A line of the data set is a Python list; the last element is the label (people's, where the hashtag's is there, too).
Lines with one of `GIVEAWAYS` as a word are dropped, as the authors do: 29,040 lines of train become 19,816. LLaVA has
no layout of its own for it; its question files with a key "label" are read.
"""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlmamba.errors import ConfigError, DataError
from vlmamba.evaluation import Sample, Score, Task
from vlmamba.evaluation import layouts as lay
from vlmamba.evaluation.scorers.sarcasm import sarcasm
from vlmamba.evaluation.scorers.yes_no import read_yes_no
from vlmamba.evaluation.task import Record, Reference

FILES = {"train": "train.txt", "valid": "valid2.txt", "test": "test2.txt"}
GIVEAWAYS = {
    *("exgag", "sarcasm", "sarcastic", "reposting", "<url>", "joke", "humour", "humor"),
    *("jokes", "irony", "ironic"),
}
"""Words that give the label away (data-of-multimodal-sarcasm-detection, codes/loadData.py)."""
OPTIONS = ("Yes", "No")
SOURCE = "https://github.com/headacheboy/data-of-multimodal-sarcasm-detection (text/, and its pictures)"
REFERENCES = (Reference("Hierarchical fusion", 80.2, "Cai et al. 2019"),)


def task(annotations: str | None = None, images: str | None = None, split: str = "test") -> Task:
    """By generated text.

    Args:
        annotations: ``test2.txt``, parquet files, or a folder with the split's.
        images: The folder with ``<id>.jpg``; ``dataset_image`` near the file when left out.
        split: ``train``, ``valid`` or ``test``.
    """
    return _task("sarcasm", annotations, images, split)


def sarcasm_likelihood(
    annotations: str | None = None, images: str | None = None, split: str = "test"
) -> Task:
    """By likelihood."""
    base = _task("sarcasm_likelihood", annotations, images, split)
    return dataclasses.replace(
        base,
        samples=[dataclasses.replace(s, options=OPTIONS) for s in base.samples],
        score=_score_likelihood,
        method="likelihood",
        reads="record",
        reader=_read_probabilities,
    )


def _task(name: str, annotations: str | None, images: str | None, split: str) -> Task:
    if split not in FILES:
        raise ConfigError(f"the sarcasm data have no split {split!r}; they have {', '.join(FILES)}")
    known = {
        FILES[split]: "official",
        f"text/{FILES[split]}": "official",
        f"{split}*.parquet": "Hugging Face",
    }
    hub = "quaeast/multimodal_sarcasm_detection"
    benchmark = lay.Benchmark("the sarcasm data", "playground/data/eval/sarcasm", known, SOURCE, hub)
    place = lay.find_data(benchmark, annotations)
    samples, dropped = (
        _read_stored(place, benchmark, split)
        if lay.is_stored(place)
        else _read(Path(place), benchmark, images)
    )
    return Task(
        name=name,
        samples=samples,
        score=_score,
        description="Tweets with a picture: is it sarcasm? F1 of the sarcastic.",
        reader=_read_labels,
        references=REFERENCES,
        settings={
            "split": split,
            "dropped": dropped,
            "prompt": "yes-or-no question with the tweet, short-answer instruction",
        },
    )


def _question(text: str) -> str:
    """The question on a tweet."""
    return lay.with_suffix(f'A tweet with this picture says: "{text}"\nIs the tweet sarcastic?')


def _make(key: Any, pictures: tuple[Any, ...], text: str, label: Any, where: str) -> Sample:
    if label not in (0, 1) or isinstance(label, bool):
        raise DataError(f"{where}: the label {label!r} is neither 0 nor 1")
    return Sample(key, pictures, text, label, ("not sarcastic", "sarcastic")[label])


def _read(path: Path, benchmark: lay.Benchmark, images: str | None) -> tuple[list[Sample], int]:
    if path.suffix != ".txt":
        return _read_llava(path, benchmark, images), 0
    near = (path.parent / "dataset_image", path.parent.parent / "dataset_image")
    root = Path(images) if images is not None else next((p for p in near if p.is_dir()), near[0])
    samples, dropped = [], 0
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        key, text, label = _parse(line, where, benchmark)
        if GIVEAWAYS & set(text.split()):
            dropped += 1
            continue
        samples.append(_make(key, (lay.picture(root, f"{key}.jpg", where),), _question(text), label, where))
    return samples, dropped


def _parse(line: str, where: str, benchmark: lay.Benchmark) -> tuple[str, str, Any]:
    """Id, text and label of a line, which is a Python list."""
    try:
        row = ast.literal_eval(line.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        row = None
    if (
        not isinstance(row, list)
        or len(row) not in (3, 4)
        or not all(isinstance(cell, str) for cell in row[:2])
    ):
        raise DataError(
            f"{where} is no line of {benchmark.title}: expected ['id', 'text', label], found {line.strip()[:60]!r}"
        )
    return row[0], row[1], row[-1]


def _read_llava(path: Path, benchmark: lay.Benchmark, images: str | None) -> list[Sample]:
    document = lay.read_document(path)
    if document.kind != "lines" or not document.has("question_id", "image", "text", "label"):
        raise benchmark.wrong(document)

    def details(row: Mapping[str, Any], where: str) -> dict[str, Any]:
        made = _make(row["question_id"], (), "", row.get("label"), where)
        return {"answer": made.answer, "category": made.category}

    return lay.llava_questions(
        document, benchmark, path.parent if images is None else Path(images), details=details
    )


def _read_stored(place: Path | str, benchmark: lay.Benchmark, split: str) -> tuple[list[Sample], int]:
    rows = lay.read_stored(place, benchmark, config=None, split=split, columns=("text", "label", "image"))
    samples, found = [], lay.stored_rows(rows)
    for at, row in enumerate(found):
        if not GIVEAWAYS & set(row["text"].split()):
            key = row.get("id", str(at))
            image = lay.stored_picture(rows, at, str(key))
            samples.append(_make(key, (image,), _question(row["text"]), row["label"], f"row {at + 1}"))
    return samples, len(found) - len(samples)


def _score(samples: Sequence[Sample], predictions: Sequence[str | None]) -> Score:
    """Generated answers; what does not begin with yes or no is unparsable and wrong."""
    read = [None if p is None else {"yes": 1.0, "no": 0.0}.get(read_yes_no(p) or "") for p in predictions]
    score = sarcasm(read, [s.answer for s in samples], ids=[s.question_id for s in samples])
    missing = sum(p is None for p in predictions)
    metrics = {**score.metrics, "missing": missing}
    return score._replace(metrics=metrics, unparsable=sum(r is None for r in read) - missing)


def _score_likelihood(samples: Sequence[Sample], records: Sequence[Record | None]) -> Score:
    scores = [lay.option_probability(record) for record in records]
    return sarcasm(scores, [s.answer for s in samples], ids=[s.question_id for s in samples])


def _table(path: Path, column: str) -> list[tuple[str, float]] | None:
    if path.suffix not in (".csv", ".tsv"):
        return None
    document = lay.read_document(path)
    if not document.has("id", column):
        raise DataError(f"{path} lacks the column 'id' or {column!r}: it holds {document.summary}")
    found = []
    for at, row in enumerate(document.rows):
        try:
            value = float(row[column])
        except ValueError:
            value = -1.0
        if not 0 <= value <= 1:
            raise DataError(f"{document.where(at)}: {column} {row[column]!r} is not in 0..1")
        found.append((row["id"], value))
    return found


def _read_labels(path: Path, samples: Sequence[Sample]) -> list[Record] | None:
    """A table of a classifier's decisions: id and label."""
    rows = _table(path, "label")
    return (
        None if rows is None else [lay.as_record(key, "yes" if value > 0.5 else "no") for key, value in rows]
    )


def _read_probabilities(path: Path, samples: Sequence[Sample]) -> list[Record] | None:
    """A table of a classifier's probabilities: id and proba."""
    rows = _table(path, "proba")
    if rows is None:
        return None
    return [lay.as_record(key, OPTIONS[value <= 0.5], scores=lay.log_odds(value)) for key, value in rows]
