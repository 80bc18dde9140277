"""MMBench: multiple choice, each question asked once for every rotation of its options (Liu et al. 2023).

    mmbench             dev, English (mmbench_dev_20230712.tsv), as LLaVA-1.5 reports it
    mmbench_cn          dev, Chinese
    mmbench_test        test, English: answers are not public
    mmbench_lmms        dev, English, letters read as lmms-eval's older rules do
    mmbench_likelihood  dev, English, the letter with the largest log-probability after the same prompt
    mmbench_texts       dev, English, the option's text with the largest mean log-probability of a token, after
                        the question without its options: another protocol, for models that know no letters
    mmbench_playground, mmbench_playground_texts
                        held-out scenes of the playground in the official layout

The headline is circular accuracy, without a judge: an answer that names no option is wrong, and counted. Empty
cells are options that do not exist; a cell "None" or "nan" is an option with this text (pandas, and with it LLaVA and
VLMEvalKit, drop such options).
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vlmamba.errors import DataError, ImageError, require
from vlmamba.evaluation import Sample, Score, Task, image_first
from vlmamba.evaluation import layouts as lay
from vlmamba.evaluation.scorers.mmbench import mmbench
from vlmamba.evaluation.task import ImageRef, Record, Reference, Scorer, StoredImage

LETTERS = "ABCD"
ROTATION = 1_000_000
POINTER = 64
"""Longest text in a cell ``image`` that is the index of another row rather than a picture."""
DROPPED = ("hint", "category", "source", "image", "comment", "l2-category")
"""Columns that LLaVA's submission leaves out."""
DEV = {
    "mmbench_dev_20230712.tsv": "official, LLaVA's version",
    "MMBench_DEV_EN*.tsv": "VLMEvalKit's",
    "en/dev*.parquet": "Hugging Face",
    "dev*.parquet": "Hugging Face",
}
CN = {
    "mmbench_dev_cn_20231003.tsv": "official, LLaVA's version",
    "MMBench_DEV_CN*.tsv": "VLMEvalKit's",
    "cn/dev*.parquet": "Hugging Face",
}
TEST = {
    "mmbench_test_*.tsv": "official",
    "MMBench_TEST_EN*.tsv": "VLMEvalKit's",
    "en/test*.parquet": "Hugging Face",
}
SOURCE = "https://download.openmmlab.com/mmclassification/datasets/mmbench/"
SERVER = "send the submission file to https://opencompass.org.cn/leaderboard-multimodal"
REFERENCES = (
    Reference("LLaVA-1.5-7B", 64.3, "LLaVA model zoo"),
    Reference("VL-Mamba 2.8B", 57.0, "Qiao et al. 2024"),
    Reference("MobileVLM-3B", 59.6, "Chu et al. 2023"),
    Reference("TinyLLaVA-3.1B", 66.9, "TinyLLaVA model zoo"),
)
REFERENCES_CN = (Reference("LLaVA-1.5-7B", 58.3, "LLaVA model zoo"),)


def task(annotations: str | None = None) -> Task:
    """Dev, English.

    Args:
        annotations: A TSV, parquet files, or a folder of these.
    """
    return _task("mmbench", DEV, annotations, references=REFERENCES)


def mmbench_cn(annotations: str | None = None) -> Task:
    """Dev, Chinese."""
    return _task("mmbench_cn", CN, annotations, suffix=lay.LETTER_CN, config="cn", references=REFERENCES_CN)


def mmbench_test(annotations: str | None = None) -> Task:
    """Test, English."""
    return _task("mmbench_test", TEST, annotations, split="test")


def mmbench_lmms(annotations: str | None = None) -> Task:
    """Dev, English, letters by lmms-eval's rules."""
    return _task("mmbench_lmms", DEV, annotations, style="lmms")


def mmbench_likelihood(annotations: str | None = None) -> Task:
    """Dev, English, letters ranked by likelihood."""
    base = _task("mmbench_likelihood", DEV, annotations)
    samples = [dataclasses.replace(s, options=tuple(s.metadata["options"])) for s in base.samples]
    return dataclasses.replace(base, samples=samples, method="likelihood", submission=None)


def mmbench_texts(annotations: str | None = None) -> Task:
    """Dev, English, texts of the options ranked by likelihood."""
    return _by_texts(_task("mmbench_texts", DEV, annotations))


def mmbench_playground_texts(annotations: str = "playground/data/mini/benchmarks/mmbench") -> Task:
    """The playground's scenes, texts of the options ranked by likelihood."""
    return _by_texts(dataclasses.replace(mmbench_playground(annotations), name="mmbench_playground_texts"))


def mmbench_playground(annotations: str = "playground/data/mini/benchmarks/mmbench") -> Task:
    """The playground's scenes; ``python playground/make_data.py`` writes them."""
    return _task("mmbench_playground", {"mmbench_playground.tsv": "the playground's"}, annotations)


def _task(
    name: str,
    files: Mapping[str, str],
    annotations: str | None,
    *,
    suffix: str = lay.LETTER,
    style: str = "vlmevalkit",
    config: str = "en",
    split: str = "dev",
    references: tuple[Reference, ...] = (),
) -> Task:
    benchmark = lay.Benchmark(
        "MMBench", "playground/data/eval/mmbench", files, SOURCE, "lmms-lab-encoder/MMBench"
    )
    place = lay.find_data(benchmark, annotations)
    rows, images = _read(place, benchmark, config, split)
    samples = [_sample(row, images(at), suffix, f"{place}, row {at + 1}") for at, row in enumerate(rows)]
    labelled = all(s.answer for s in samples)
    if not labelled and any(s.answer for s in samples):
        raise lay.strange_ids(
            place, [s.question_id for s in samples if not s.answer], f"of {len(samples)} have no answer"
        )
    return Task(
        name=name,
        samples=samples,
        prompt=image_first if samples[0].images else lay.cannot_ask(f"{place} has no column 'image'"),
        score=_scorer(style)
        if labelled
        else lay.no_labels(
            "MMBench circular accuracy", f"this split of MMBench has no public answers: {SERVER}"
        ),
        max_new_tokens=1024,
        description="MMBench: multiple choice, right only if right in every rotation of the options.",
        submission=_submission,
        submission_suffix=".xlsx",
        reader=_read_answers,
        references=references,
        settings={
            "prompt": f"hint, question, options, {suffix!r}",
            "letters": style,
            "judge": "none",
            "rows": len(samples),
            "questions": len({s.group for s in samples}),
        },
    )


Images = Callable[[int], "tuple[ImageRef, ...]"]


def _read(
    place: Path | str, benchmark: lay.Benchmark, config: str, split: str
) -> tuple[Sequence[Mapping[str, str]], Images]:
    """Rows, and the picture of each by its place."""
    if not lay.is_stored(place):
        document = lay.read_document(place)
        if document.kind != "table":
            raise benchmark.wrong(document)
        rows = lay.require_keys(document, ("index", "question", "A", "B"), benchmark)
        return rows, _pictures(rows, document)
    columns = ("index", "question", "hint", "A", "B", "image")
    stored = lay.read_stored(place, benchmark, config=config, split=split, columns=columns)
    found = [_without_nan(row) for row in lay.stored_rows(stored)]
    return found, lambda at: (lay.stored_picture(stored, at, str(int(found[at]["index"]) % ROTATION)),)


def _without_nan(row: Mapping[str, Any]) -> dict[str, str]:
    """The hub writes empty cells as the text "nan", and the L2 column with a capital."""
    found = {key: "" if value is None or str(value) == "nan" else str(value) for key, value in row.items()}
    if "L2-category" in found:
        found["l2-category"] = found.pop("L2-category")
    return found


def _pictures(rows: Sequence[Mapping[str, str]], document: lay.Document) -> Images:
    """Pictures of a TSV: base64, or in a rotated row the index of the row that has it."""
    if not document.has("image"):
        return lambda at: ()
    by_index = {row["index"]: row["image"] for row in rows}
    lost = [
        row["index"]
        for row in rows
        if len(row["image"]) <= POINTER and len(by_index.get(row["image"], "")) <= POINTER
    ]
    if lost:
        examples = ", ".join(repr(index) for index in lost[:3])
        raise ImageError(
            f"{document.path}: {len(lost)} of {len(rows)} rows have no picture: their cell 'image' is neither base64 "
            f"nor the index of a row that has one, such as the row(s) {examples}"
        )

    def find(at: int) -> tuple[ImageRef, ...]:
        text, name = rows[at]["image"], rows[at]["index"]
        if len(text) <= POINTER:
            name, text = text, by_index[text]

        def read() -> bytes:
            try:
                return base64.b64decode(text, validate=True)
            except binascii.Error as error:
                raise ImageError(
                    f"{document.path}: the picture of row {name} is not base64: {error}"
                ) from error

        return (StoredImage(str(int(name) % ROTATION), read),)

    return find


def _sample(row: Mapping[str, Any], images: tuple[ImageRef, ...], suffix: str, where: str) -> Sample:
    try:
        index = int(float(row["index"]))
    except ValueError as error:
        raise DataError(f"{where}: the index {row['index']!r} is no number") from error
    options = {letter: row[letter] for letter in LETTERS if row.get(letter)}
    if len(options) < 2:
        raise DataError(f"{where}: question {index} has {len(options)} option(s), a choice needs two")
    return Sample(
        index,
        images,
        lay.multiple_choice(row["question"], options, hint=row.get("hint", ""), suffix=suffix),
        row.get("answer") or None,
        row.get("category", ""),
        {"options": options, "row": {key: value for key, value in row.items() if key != "image"}},
        group=index % ROTATION,
    )


def _by_texts(base: Task) -> Task:
    """The same questions without options, which are ranked instead."""
    samples = []
    for sample in base.samples:
        row, options = sample.metadata["row"], tuple(sample.metadata["options"].values())
        question = "\n".join(part for part in (row.get("hint", ""), row["question"]) if part)
        samples.append(dataclasses.replace(sample, text=lay.with_suffix(question), options=options))
    return dataclasses.replace(
        base,
        samples=samples,
        score=_score_texts if samples[0].answer else base.score,
        method="likelihood",
        normalised=True,
        submission=None,
        settings={
            **base.settings,
            "prompt": "hint, question, short-answer instruction",
            "letters": "text ranked first",
        },
    )


def _score_texts(samples: Sequence[Sample], predictions: Sequence[str | None]) -> Score:
    letters = [{text: letter for letter, text in s.metadata["options"].items()} for s in samples]
    given = [None if p is None else named.get(p, p) for p, named in zip(predictions, letters, strict=True)]
    return _scorer("vlmevalkit")(samples, given)


def _scorer(style: str) -> Scorer:
    def score(samples: Sequence[Sample], predictions: Sequence[str | None]) -> Score:
        columns = {
            name: [s.metadata["row"].get(key, "") for s in samples]
            for name, key in (
                ("categories", "category"),
                ("l2_categories", "l2-category"),
                ("splits", "split"),
            )
        }
        return mmbench(
            predictions,
            [int(s.question_id) for s in samples],
            [s.metadata["options"] for s in samples],
            [s.answer for s in samples],
            style=style,
            **{name: column for name, column in columns.items() if all(column)},
        )

    return score


def _submission(samples: Sequence[Sample], predictions: Sequence[str | None], path: Path) -> Path:
    """LLaVA's sheet: the TSV without `DROPPED`, the answer as seventh column, one row for each row asked."""
    missing = [s.question_id for s, p in zip(samples, predictions, strict=True) if p is None]
    if missing:
        raise lay.strange_ids(
            path, missing, f"of {len(samples)} have no answer, and the server wants every rotation"
        )
    columns = [name for name in samples[0].metadata["row"] if name not in DROPPED]
    header = [*columns[:6], "prediction", *columns[6:]]
    rows = []
    for sample, text in zip(samples, predictions, strict=True):
        cells: list[Any] = [sample.metadata["row"][name] or None for name in columns]
        if columns[0] == "index":
            cells[0] = sample.question_id
        rows.append([*cells[:6], text, *cells[6:]])
    return _write_sheet(path, header, rows)


def _read_answers(path: Path, samples: Sequence[Sample]) -> list[Record] | None:
    """The server's sheet, or a TSV: columns index and prediction."""
    records = _read_table_answers(path, "index", "prediction")
    if records is None:
        return None
    bad = []
    for record in records:
        try:
            record["question_id"] = int(float(record["question_id"]))
        except (ValueError, OverflowError):
            bad.append(record["question_id"])
    if bad:
        raise lay.strange_ids(path, bad, "have an index that is no number")
    return records


def _read_table_answers(path: Path, id_key: str, text_key: str) -> list[Record] | None:
    """Answers in a table (TSV, CSV, XLSX) with a column of ids and one of answers; None for other files."""
    if path.suffix not in (".tsv", ".csv", ".xlsx"):
        return None
    document = lay.read_document(path)
    if not document.has(id_key, text_key):
        raise DataError(f"{path} lacks the column {id_key!r} or {text_key!r}: it holds {document.summary}")
    return [lay.as_record(row[id_key], row[text_key]) for row in document.rows]


def _write_sheet(path: Path, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> Path:
    """Write an ``.xlsx`` with one sheet."""
    openpyxl = require("openpyxl", extra="eval", feature=f"writing {path.name}")
    path.parent.mkdir(parents=True, exist_ok=True)
    book = openpyxl.Workbook(write_only=True)
    sheet = book.create_sheet("Sheet1")
    for row in (header, *rows):
        sheet.append(list(row))
    book.save(path)
    return path
