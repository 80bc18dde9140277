"""ScienceQA: school questions with options, test split (Lu et al., NeurIPS 2022).

    scienceqa       all 4,241 questions, of which 2,017 have a picture; the headline is accuracy on those (SQA-I)
    scienceqa_img   only the questions with a picture
    scienceqa_lmms  questions with a picture, letters read as lmms-eval does

A question without a picture is asked without one. LLaVA's own file is asked word for word; without it prompts are
rendered as lmms-eval does: "Context: hint" where there is a hint, question, options, instruction.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlmamba.errors import DataError, MissingFileError
from vlmamba.evaluation import Sample, Score, Task
from vlmamba.evaluation import layouts as lay
from vlmamba.evaluation.scorers.scienceqa import scienceqa
from vlmamba.evaluation.task import Reader, Record, Reference, Scorer

LETTERS = "ABCDE"
LLAVA = "llava_test_CQM-A.json"
PROBLEMS, SPLITS = "problems.json", "pid_splits.json"
BENCHMARK = lay.Benchmark(
    "ScienceQA",
    "playground/data/eval/scienceqa",
    {
        LLAVA: f"LLaVA's questions, in its eval.zip, with {PROBLEMS} beside them",
        PROBLEMS: f"official problems, with {SPLITS}",
        "test*.parquet": "Hugging Face",
    },
    "https://github.com/lupantech/ScienceQA (data/scienceqa)",
    "lmms-lab-encoder/ScienceQA",
)
KEYS = ("question", "choices", "answer")
REFERENCES = (
    Reference("LLaVA-1.5-7B", 66.8, "LLaVA model zoo"),
    Reference("VL-Mamba 2.8B", 65.4, "Qiao et al. 2024"),
    Reference("MobileVLM-3B", 61.2, "Chu et al. 2023"),
    Reference("TinyLLaVA-3.1B", 69.1, "TinyLLaVA model zoo"),
)


def task(annotations: str | None = None, images: str | None = None, split: str = "test") -> Task:
    """All questions of the split.

    Args:
        annotations: LLaVA's questions, ``problems.json``, parquet files, or a folder of these.
        images: The folder with ``<pid>/image.png``; ``images/<split>`` beside the questions when left out.
        split: ``test``, ``val``, ``minitest``, ... (official files only).
    """
    return _task("scienceqa", annotations, images, split)


def scienceqa_img(annotations: str | None = None, images: str | None = None, split: str = "test") -> Task:
    """Questions with a picture."""
    return _task("scienceqa_img", annotations, images, split, pictured=True)


def scienceqa_lmms(annotations: str | None = None, images: str | None = None, split: str = "test") -> Task:
    """Questions with a picture, by lmms-eval's rules."""
    return _task("scienceqa_lmms", annotations, images, split, pictured=True, style="lmms")


def _task(
    name: str,
    annotations: str | None,
    images: str | None,
    split: str,
    pictured: bool = False,
    style: str = "llava",
) -> Task:
    place = lay.find_data(BENCHMARK, annotations)
    samples, prompt = (
        _read_stored(place, split) if lay.is_stored(place) else _read(Path(place), images, split)
    )
    if pictured:
        samples = [s for s in samples if s.metadata["problem"].get("image")]
    return Task(
        name=name,
        samples=samples,
        score=_scorer(style),
        max_new_tokens=1024,
        description="ScienceQA: school questions with options; accuracy on those with a picture.",
        reader=_reader(part=pictured),
        references=REFERENCES if style == "llava" else (),
        settings={"split": split, "prompt": prompt, "letters": style},
    )


def _read(path: Path, images: str | None, split: str) -> tuple[list[Sample], str]:
    document = lay.read_document(path)
    root = path.parent / "images" / split if images is None else Path(images)
    if document.kind == "array" and document.has("id", "conversations"):
        return _read_llava(document, root), f"word for word of {path.name}"
    if document.kind != "object":
        raise BENCHMARK.wrong(document)
    problems = _problems(document)
    return [
        _sample(pid, problems[pid], root, str(path)) for pid in _pids(path, problems, split)
    ], "context, question, options"


def _problems(document: lay.Document) -> dict[str, Any]:
    rows = document.value if document.kind == "object" else {}
    bad = [pid for pid, row in rows.items() if not isinstance(row, dict) or not set(KEYS) <= set(row)]
    if not rows or len(bad) == len(rows):
        raise BENCHMARK.wrong(document)
    if bad:
        raise lay.strange_ids(document.path, bad, f"of {len(rows)} lack {', '.join(KEYS)}")
    return rows


def _pids(path: Path, problems: Mapping[str, Any], split: str) -> list[str]:
    """Problems of the split: by the splits file, or by what the rows say."""
    file = path.with_name(SPLITS)
    if not file.is_file():
        pids = [pid for pid, row in problems.items() if row.get("split", split) == split]
        if not pids:
            raise DataError(f"{path} has no problem of the split {split!r}, and {SPLITS} is not beside it")
        return pids
    splits = lay.read_document(file).value
    if not isinstance(splits, dict) or split not in splits:
        raise DataError(f"{file} has no split {split!r}: it has {', '.join(splits)}")
    pids = [str(pid) for pid in splits[split]]
    unknown = [pid for pid in pids if pid not in problems]
    if unknown:
        raise lay.strange_ids(file, unknown, f"of the split {split} are not in {path}")
    return pids


def _read_llava(document: lay.Document, root: Path) -> list[Sample]:
    file = document.path.with_name(PROBLEMS)
    if not file.is_file():
        raise MissingFileError(
            f"{document.path} has the questions of ScienceQA, not the answers: {PROBLEMS} is not beside it. Get it "
            f"from {BENCHMARK.source}."
        )
    problems = _problems(lay.read_document(file))
    rows = lay.require_keys(document, ("id", "conversations"), BENCHMARK)
    lay.unique(rows, "id", BENCHMARK, document.path)
    unknown = [row["id"] for row in rows if str(row["id"]) not in problems]
    if unknown:
        raise lay.strange_ids(document.path, unknown, f"of {len(rows)} are not in {file}")
    samples = []
    for at, row in enumerate(rows):
        where, problem = document.where(at), problems[str(row["id"])]
        pictures = (lay.picture(root, row["image"], where),) if "image" in row else ()
        text = row["conversations"][0]["value"].replace("<image>", "").strip()
        samples.append(Sample(str(row["id"]), pictures, text, *_answer(problem, where), {"problem": problem}))
    return samples


def _answer(problem: Mapping[str, Any], where: str) -> tuple[str, str]:
    """The right letter and the subject."""
    answer, choices = problem["answer"], problem["choices"]
    if not isinstance(answer, int) or not 0 <= answer < len(choices) <= len(LETTERS):
        raise DataError(f"{where}: the answer {answer!r} is none of {len(choices)} choices")
    return LETTERS[answer], problem.get("subject") or ""


def _render(problem: Mapping[str, Any]) -> str:
    options = dict(zip(LETTERS, problem["choices"], strict=False))
    hint = f"Context: {problem['hint']}" if problem.get("hint") else ""
    return lay.multiple_choice(problem["question"], options, hint=hint)


def _sample(pid: str, problem: Mapping[str, Any], root: Path, where: str) -> Sample:
    place = f"{where}, problem {pid}"
    pictures = (lay.picture(root, f"{pid}/{problem['image']}", place),) if problem.get("image") else ()
    return Sample(pid, pictures, _render(problem), *_answer(problem, place), {"problem": problem})


def _read_stored(place: Path | str, split: str) -> tuple[list[Sample], str]:
    rows = lay.read_stored(place, BENCHMARK, config="ScienceQA-FULL", split=split, columns=(*KEYS, "image"))
    blank = rows.data.column("image").is_null().to_pylist()  # without reading the pictures
    samples = []
    for at, row in enumerate(lay.stored_rows(rows)):
        pictured = not blank[at]
        problem = {**row, "image": "image.png" if pictured else None}
        pictures = (lay.stored_picture(rows, at, str(at)),) if pictured else ()
        samples.append(
            Sample(
                str(at),
                pictures,
                _render(problem),
                *_answer(problem, f"{place}, row {at + 1}"),
                {"problem": problem},
            )
        )
    return samples, "context, question, options"


def _scorer(style: str) -> Scorer:
    def score(samples: Sequence[Sample], predictions: Sequence[str | None]) -> Score:
        problems = [s.metadata["problem"] for s in samples]
        return scienceqa(predictions, problems, style=style, ids=[s.question_id for s in samples])

    return score


def _reader(part: bool) -> Reader:
    """LLaVA's result file: an object whose "outputs" has the text for each problem (FAILED: not answered). Where only
    a part of the problems is asked, those of the others are left out.
    """

    def read(path: Path, samples: Sequence[Sample]) -> list[Record] | None:
        document = lay.read_own(path)
        if (
            document is None
            or document.kind != "object"
            or not isinstance(document.value.get("outputs"), dict)
        ):
            return None
        asked = {s.question_id for s in samples}
        outputs = document.value["outputs"].items()
        given = [(pid, text) for pid, text in outputs if text != "FAILED" and (pid in asked or not part)]
        return [lay.as_record(pid, text) for pid, text in given]

    return read
