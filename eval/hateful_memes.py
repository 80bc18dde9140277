"""Hateful Memes: is picture and text together hateful? (Kiela et al., NeurIPS 2020)

    hateful_memes           P(Yes) against P(No) at the first position: AUROC and accuracy
    hateful_memes_generate  a generated yes or no: accuracy; without a continuous score there is no AUROC

The split belongs to every figure and is an option, ``test_seen`` when left out; mmf's defaults are dev_unseen and
test_unseen. LLaVA has no layout of its own for it; its question files with a key "label" are read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlmamba.errors import ConfigError, DataError
from vlmamba.evaluation import Sample, Score, Task
from vlmamba.evaluation import layouts as lay
from vlmamba.evaluation.scorers.hateful_memes import hateful_memes
from vlmamba.evaluation.scorers.yes_no import read_yes_no
from vlmamba.evaluation.task import Record, Reference

SPLITS = ("train", "dev_seen", "test_seen", "dev_unseen", "test_unseen")
OPTIONS = ("Yes", "No")
SOURCE = "https://hatefulmemeschallenge.com (archive hateful_memes)"
SERVER = "write the submission file (id,proba,label) and send it to the challenge"
REFERENCES = (
    Reference("VisualBERT COCO", 71.4, "Kiela et al. 2020, test"),
    Reference("ViLBERT CC", 70.0, "Kiela et al. 2020, test"),
    Reference("Text BERT", 65.1, "Kiela et al. 2020, test"),
)


def task(annotations: str | None = None, images: str | None = None, split: str = "test_seen") -> Task:
    """By likelihood.

    Args:
        annotations: A ``.jsonl`` of the data set, parquet files, or a folder with the split's.
        images: The folder that "img" is relative to; that of the file when left out.
        split: One of `SPLITS`.
    """
    return _task("hateful_memes", annotations, images, split)


def hateful_memes_generate(
    annotations: str | None = None, images: str | None = None, split: str = "test_seen"
) -> Task:
    """By generated text."""
    base = _task("hateful_memes_generate", annotations, images, split)
    return dataclasses.replace(
        base,
        samples=[dataclasses.replace(s, options=()) for s in base.samples],
        score=_score_texts if base.samples[0].answer is not None else base.score,
        method="generate",
        reads="text",
        reader=None,
        submission=None,
        references=(),
    )


def _task(name: str, annotations: str | None, images: str | None, split: str) -> Task:
    if split not in SPLITS:
        raise ConfigError(f"Hateful Memes has no split {split!r}; it has {', '.join(SPLITS)}")
    files = {f"{split}.jsonl": "official", f"{split}*.parquet": "Hugging Face"}
    benchmark = lay.Benchmark(
        "Hateful Memes", "playground/data/eval/hateful_memes", files, SOURCE, "neuralcatcher/hateful_memes"
    )
    place = lay.find_data(benchmark, annotations)
    samples = (
        _read_stored(place, benchmark, split)
        if lay.is_stored(place)
        else _read(Path(place), benchmark, images)
    )
    named = next((s for s in SPLITS if not isinstance(place, str) and place.stem.startswith(s)), split)
    labelled = samples[0].answer is not None
    return Task(
        name=name,
        samples=samples,
        score=_score
        if labelled
        else lay.no_labels("Hateful Memes AUROC", f"the split {named} has no labels: {SERVER}"),
        description=f"Hateful Memes, {named}: is picture and text together hateful?",
        method="likelihood",
        reads="record",
        submission=_submission,
        submission_suffix=".csv",
        reader=_read_answers,
        references=REFERENCES,
        settings={
            "split": named,
            "prompt": "yes-or-no question with the text of the meme, short-answer instruction",
        },
    )


def _question(text: str) -> str:
    """The question on a meme with this text."""
    return lay.with_suffix(
        f'The text on this meme is: "{text}"\nTaken together, are the picture and its text hateful?'
    )


def _make(key: Any, pictures: tuple[Any, ...], text: str, label: Any, where: str) -> Sample:
    if label not in (0, 1, None) or isinstance(label, bool):
        raise DataError(f"{where}: the label {label!r} is neither 0 nor 1")
    return Sample(
        key,
        pictures,
        text,
        label,
        "" if label is None else ("not hateful", "hateful")[label],
        options=OPTIONS,
    )


def _read(path: Path, benchmark: lay.Benchmark, images: str | None) -> list[Sample]:
    document = lay.read_document(path)
    root = path.parent if images is None else Path(images)
    if document.kind == "lines" and document.has("question_id", "image", "text"):

        def details(row: Mapping[str, Any], where: str) -> dict[str, Any]:
            made = _make(row["question_id"], (), "", row.get("label"), where)
            return {"answer": made.answer, "category": made.category, "options": OPTIONS}

        samples = lay.llava_questions(document, benchmark, root, details=details)
    else:
        if document.kind != "lines" or not document.has("id", "img", "text"):
            raise benchmark.wrong(document)
        rows = lay.require_keys(document, ("id", "img", "text"), benchmark)
        lay.unique(rows, "id", benchmark, path)
        samples = [
            _make(
                row["id"],
                (lay.picture(root, row["img"], document.where(at)),),
                _question(row["text"]),
                row.get("label"),
                document.where(at),
            )
            for at, row in enumerate(rows)
        ]
    _all_or_none(samples, path)
    return samples


def _all_or_none(samples: Sequence[Sample], place: Path | str) -> None:
    bare = [s.question_id for s in samples if s.answer is None]
    if bare and len(bare) < len(samples):
        raise lay.strange_ids(place, bare, f"of {len(samples)} have no label")


def _read_stored(place: Path | str, benchmark: lay.Benchmark, split: str) -> list[Sample]:
    rows = lay.read_stored(
        place, benchmark, config=None, split=split, columns=("id", "text", "label", "image")
    )
    samples = [
        _make(
            row["id"],
            (lay.stored_picture(rows, at, str(row["id"])),),
            _question(row["text"]),
            row["label"],
            f"row {at + 1}",
        )
        for at, row in enumerate(lay.stored_rows(rows))
    ]
    _all_or_none(samples, place)
    return samples


def _score(samples: Sequence[Sample], records: Sequence[Record | None]) -> Score:
    scores = [lay.option_probability(record) for record in records]
    return hateful_memes(scores, [s.answer for s in samples], ids=[s.question_id for s in samples])


def _score_texts(samples: Sequence[Sample], predictions: Sequence[str | None]) -> Score:
    """Accuracy of generated answers; what does not begin with yes or no is unparsable."""
    read = [None if p is None else {"yes": 1, "no": 0}.get(read_yes_no(p) or "") for p in predictions]
    answered = [None if p is None else 0.0 for p in predictions]
    labels = [s.answer for s in samples]
    score = hateful_memes(answered, labels, predictions=read, ids=[s.question_id for s in samples])
    metrics = dict(score.metrics)
    metrics["official"] = {"accuracy": metrics["official"]["accuracy"], "auroc": None}
    metrics["headline"] = {
        "name": "Hateful Memes accuracy",
        "value": 100 * metrics["overall"]["accuracy"],
        "unit": "%",
    }
    unread = sum(p is not None and r is None for p, r in zip(predictions, read, strict=True))
    return score._replace(metrics=metrics, unparsable=unread)


def _read_answers(path: Path, samples: Sequence[Sample]) -> list[Record] | None:
    """The challenge's table: id, proba (of hateful) and label."""
    if path.suffix != ".csv":
        return None
    document = lay.read_document(path)
    if not document.has("id", "proba"):
        raise DataError(f"{path} lacks the column 'id' or 'proba': it holds {document.summary}")
    ids = {str(s.question_id).lstrip("0") or "0": s.question_id for s in samples}
    records = []
    for at, row in enumerate(document.rows):
        try:
            chance = float(row["proba"])
        except ValueError:
            chance = -1.0
        if not 0 <= chance <= 1:
            raise DataError(f"{document.where(at)}: proba {row['proba']!r} is no probability")
        key = ids.get(row["id"].lstrip("0") or "0", row["id"])
        records.append(lay.as_record(key, OPTIONS[chance <= 0.5], scores=lay.log_odds(chance)))
    return records


def _submission(samples: Sequence[Sample], records: Sequence[Record | None], path: Path) -> Path:
    """The challenge's table."""
    missing = [s.question_id for s, r in zip(samples, records, strict=True) if r is None]
    if missing:
        raise lay.strange_ids(path, missing, f"of {len(samples)} have no answer")
    lines = ["id,proba,label"]
    for sample, record in zip(samples, records, strict=True):
        chance = lay.option_probability(record) or 0.0
        lines.append(f"{sample.question_id},{chance!r},{int(chance > 0.5)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
