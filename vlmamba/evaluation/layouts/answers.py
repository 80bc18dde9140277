"""Answer files of the benchmarks' own layouts, and the files their servers want.

A record is ``{"question_id", "prompt", "text"}``, as `vlmamba.evaluation.records` has it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vlmamba.common.files import replace_text
from vlmamba.errors import DataError, require
from vlmamba.evaluation.layouts.files import Document, read_document
from vlmamba.evaluation.records import Record
from vlmamba.evaluation.task import Reader, Sample

OWN = "official"
"""What ``metadata["layout"]`` of an answer says that stood in a file of the benchmark's own layout."""


def as_record(question_id: Any, text: Any, prompt: str = "", **metadata: Any) -> Record:
    """A record; a number is the text that it is printed as, and what else is no text stays for the reader to
    refuse.
    """
    written = str(text) if isinstance(text, int | float) else text
    record = {"question_id": question_id, "prompt": prompt, "text": written}
    return {**record, "metadata": metadata} if metadata else record


def read_own(path: Path) -> Document | None:
    """An answer file, unless it is a folder or in LLaVA's layout (whose last line may have been cut)."""
    if path.is_dir():
        return None
    if path.suffix != ".xlsx":
        with path.open(encoding="utf-8-sig", errors="replace") as file:
            first = next((line for line in file if line.strip()), "")
        if first.lstrip().startswith("{") and '"question_id"' in first and '"text"' in first:
            return None
    return read_document(path)


def join_by_id(id_key: str, text_key: str) -> Reader:
    """A reader of JSON arrays or lines of ``{id_key: ..., text_key: ...}``."""

    def read(path: Path, samples: Sequence[Sample]) -> list[Record] | None:
        rows = answer_rows(read_own(path), id_key, text_key)
        own = {"layout": OWN}
        return None if rows is None else [as_record(row[id_key], row[text_key], **own) for row in rows]

    return read


def answer_rows(document: Document | None, id_key: str, text_key: str) -> list[dict[str, Any]] | None:
    """The rows ``{id_key: ..., text_key: ...}`` of an answer file; None where it is of another layout.

    Raises:
        DataError: Some rows lack a key, or have an id that is neither text nor whole number.
    """
    if document is None or document.kind == "object" or not document.has(id_key, text_key):
        return None
    bad = [
        document.where(at)
        for at, row in enumerate(document.rows)
        if not isinstance(row, dict) or text_key not in row or not isinstance(row.get(id_key), str | int)
    ]
    if bad:
        raise DataError(
            f"{len(bad)} of {len(document.rows)} rows are no answers, such as {', '.join(bad[:3])}: each needs "
            f"{id_key} (a text or whole number) and {text_key}"
        )
    return document.rows


def in_own_layout(record: Record | None) -> bool:
    """Whether an answer came in the benchmark's own layout, ready for the official script."""
    return record is not None and (record.get("metadata") or {}).get("layout") == OWN


def join_by_position(
    document: Document, samples: Sequence[Sample], text_key: str, *, question: Callable[[Any, Sample], bool]
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
        as_record(s.question_id, row[text_key], s.text) for row, s in zip(document.rows, samples, strict=True)
    ]


def read_table_answers(path: Path, id_key: str, text_key: str) -> list[Record] | None:
    """Answers in a table (TSV, CSV, XLSX) with a column of ids and one of answers; None for other files."""
    if path.suffix not in (".tsv", ".csv", ".xlsx"):
        return None
    document = read_document(path)
    if not document.has(id_key, text_key):
        raise DataError(f"{path} lacks the column {id_key!r} or {text_key!r}: it holds {document.summary}")
    return [as_record(row[id_key], row[text_key]) for row in document.rows]


def option_probability(record: Mapping[str, Any] | None, at: int = 0) -> float | None:
    """Probability of one of a question's options: the softmax of their log-probabilities.

    Args:
        record: An answer with ``metadata["scores"]``; None where there is none.
        at: Which option.

    Raises:
        DataError: The answer has no log-probabilities.
    """
    if record is None:
        return None
    scores = (record.get("metadata") or {}).get("scores")
    if not scores or len(scores) <= at or any(s != s or s == math.inf for s in scores):
        raise DataError(
            f"the answer to question {record.get('question_id')!r} has no log-probabilities of its options "
            "(metadata.scores): score a task that reads answers as text, or answers given by likelihood"
        )
    top = max(scores)
    weights = [math.exp(s - top) if s > -math.inf else 0.0 for s in scores]
    return weights[at] / math.fsum(weights)


def log_odds(probability: float) -> list[float]:
    """Log-probabilities of "yes" and "no" from a probability (the inverse of `option_probability`)."""
    return [
        math.log(probability) if probability > 0 else -math.inf,
        math.log1p(-probability) if probability < 1 else -math.inf,
    ]


def write_json(path: Path, value: Any, indent: int | None = None) -> Path:
    """Write JSON as Python's ``json.dump`` does, without a final newline: so the servers' files look."""
    replace_text(path, json.dumps(value, indent=indent))
    return path


def write_sheet(path: Path, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> Path:
    """Write an ``.xlsx`` with one sheet."""
    openpyxl = require("openpyxl", extra="eval", feature=f"writing {path.name}")
    path.parent.mkdir(parents=True, exist_ok=True)
    book = openpyxl.Workbook(write_only=True)
    sheet = book.create_sheet("Sheet1")
    for row in (header, *rows):
        sheet.append(list(row))
    book.save(path)
    return path
