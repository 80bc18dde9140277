"""MME: two questions on a picture, yes and no; points for perception and cognition (Fu et al. 2023).

    mme       the official rule, 2,374 questions on 1,187 pictures
    mme_lmms  answers read as lmms-eval does

The two questions on a picture are scored together, and share an id in LLaVA's file: an answer is filed under id
and question. The headline is perception (2,000 points at most), which is what "MME" means in most papers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlmamba.errors import DataError, MissingFileError
from vlmamba.evaluation import Sample, Score, Task, image_first
from vlmamba.evaluation import layouts as lay
from vlmamba.evaluation.scorers.mme import SUBTASKS, mme
from vlmamba.evaluation.task import Record, Reference, Scorer

LLAVA = "llava_mme.jsonl"
RELEASE = "MME_Benchmark_release_version"
INSTRUCTION = "Please answer yes or no."
CATEGORIES = [name for names in SUBTASKS.values() for name in names]
SUFFIXES = (".jpg", ".png", ".jpeg", ".JPG", ".PNG")
BENCHMARK = lay.Benchmark(
    "MME",
    "playground/data/eval/MME",
    {
        LLAVA: f"LLaVA's questions, in its eval.zip, with {RELEASE}/ beside them",
        f"{RELEASE}/": "the official release",
        "existence/": "a folder of the official release",
        "existence.txt": "official answer files, which have questions and answers in them",
        "test*.parquet": "Hugging Face",
    },
    "https://github.com/BradyFU/Awesome-Multimodal-Large-Language-Models/tree/Evaluation",
    "lmms-lab-encoder/MME",
)
REFERENCES = (
    Reference("LLaVA-1.5-7B", 1510.7, "LLaVA model zoo"),
    Reference("VL-Mamba 2.8B", 1369.6, "Qiao et al. 2024"),
    Reference("MobileVLM-3B", 1288.9, "Chu et al. 2023"),
    Reference("TinyLLaVA-3.1B", 1464.9, "TinyLLaVA model zoo"),
)


def task(annotations: str | None = None, images: str | None = None) -> Task:
    """The official rule.

    Args:
        annotations: LLaVA's questions, the release's folder, a folder of answer files, or parquet files.
        images: The folder of the categories' folders; the release's when left out.
    """
    return _task("mme", annotations, images, "official", REFERENCES)


def mme_lmms(annotations: str | None = None, images: str | None = None) -> Task:
    """Lmms-eval's reading."""
    return _task("mme_lmms", annotations, images, "lmms")


def _task(
    name: str, annotations: str | None, images: str | None, style: str, references: tuple[Reference, ...] = ()
) -> Task:
    place = lay.find_data(BENCHMARK, annotations)
    samples = _read_stored(place) if lay.is_stored(place) else _read(Path(place), images)
    return Task(
        name=name,
        samples=samples,
        prompt=image_first if samples[0].images else lay.cannot_ask(f"{RELEASE}/ is not beside {place}"),
        score=_scorer(style),
        description="MME: two yes-or-no questions on each picture; points for perception and cognition.",
        submission=_submission,
        submission_suffix="",
        reader=_read_answers,
        references=references,
        settings={
            "prompt": "question without its own instruction, short-answer instruction",
            "reading": style,
        },
    )


def _read(path: Path, images: str | None) -> list[Sample]:
    if path.name == LLAVA or path.suffix == ".jsonl":
        return _read_llava(lay.read_document(path), images)
    folder = path if path.is_dir() else path.parent
    if path.is_dir() and path.name in CATEGORIES:
        folder = path.parent
    questions = _release(folder) if any((folder / name).is_dir() for name in CATEGORIES) else _sheets(folder)
    root = folder if images is None else Path(images)
    return [_sample(row, root if row["file"] else None) for row in questions]


def _release(folder: Path) -> list[dict[str, str]]:
    """Questions of the release: a text file for each picture, beside it or in ``questions_answers_YN``."""
    found = []
    for category in CATEGORIES:
        apart = folder / category / "questions_answers_YN"
        texts = sorted((apart if apart.is_dir() else folder / category).glob("*.txt"))
        pictures = folder / category / "images" if apart.is_dir() else folder / category
        names = {p.stem: p.name for p in pictures.glob("*") if p.suffix in SUFFIXES}
        inside = f"{category}/images/" if apart.is_dir() else f"{category}/"
        for text in texts:
            name = names.get(text.stem, f"{text.stem}.jpg")
            for number, line in enumerate(text.read_text(encoding="utf-8").split("\n"), 1):
                if line.strip():
                    question, label = _cells(line, 2, f"{text}:{number}")
                    found.append(
                        {
                            "category": category,
                            "file": inside + name,
                            "image": name,
                            "question": question,
                            "label": label,
                        }
                    )
    if not found:
        raise MissingFileError(f"{folder} holds no question of MME. Get the release from {BENCHMARK.source}.")
    return found


def _sheets(folder: Path) -> list[dict[str, str]]:
    """Questions and labels of official answer files: picture, question, label and answer in each line."""
    found = []
    for category, file in _category_files(folder).items():
        for number, line in enumerate(file.read_text(encoding="utf-8").split("\n"), 1):
            if line.strip():
                image, question, label = _cells(line, 3, f"{file}:{number}")[:3]
                found.append(
                    {"category": category, "file": "", "image": image, "question": question, "label": label}
                )
    return found


def _category_files(folder: Path) -> dict[str, Path]:
    files = {name: folder / f"{name}.txt" for name in CATEGORIES if (folder / f"{name}.txt").is_file()}
    if not files:
        raise BENCHMARK.wrong(folder, "a folder without a file or folder of MME's categories")
    return files


def _cells(line: str, least: int, where: str) -> list[str]:
    cells = line.strip().split("\t")
    cells[:3] = [cell.strip() for cell in cells[:3]]
    if len(cells) < least or cells[least - 1].lower() not in ("yes", "no"):
        raise DataError(
            f"{where}: expected {least} cells separated by tabs, the last of them Yes or No: {line[:60]!r}"
        )
    return cells


def _plain(question: str) -> str:
    """A question without an instruction, official or LLaVA's."""
    text = question.strip().removesuffix(lay.SHORT_ANSWER).rstrip()
    return text.removesuffix(INSTRUCTION).rstrip()


def _sample(row: Mapping[str, str], root: Path | None) -> Sample:
    category, image = row["category"], row["image"]
    where = f"MME, {category}, {image}"
    return Sample(
        f"{category}/{image}",
        () if root is None else (lay.picture(root, row["file"], where),),
        lay.with_suffix(_plain(row["question"])),
        row["label"].lower(),
        category,
        {"image": image, "question": row["question"], "label": row["label"]},
        group=(category, Path(image).stem),
    )


def _read_llava(document: lay.Document, images: str | None) -> list[Sample]:
    """LLaVA's questions with the labels of the release (or of official answer files) beside them."""
    folder = document.path.parent
    release = folder / RELEASE
    if not release.is_dir():
        raise MissingFileError(
            f"{document.path} has the questions of MME, not the answers: {release} is not there. Get it from "
            f"{BENCHMARK.source}."
        )
    rows = {(r["category"], Path(r["image"]).stem, _plain(r["question"])): r for r in _release(release)}
    missing = []

    def details(row: Mapping[str, Any], where: str) -> dict[str, Any]:
        category, _, file = str(row["question_id"]).partition("/")
        label = rows.get((category, Path(file).stem, _plain(row["text"])))
        if label is None:
            missing.append(row["question_id"])
            return {}
        return {
            "answer": label["label"].lower(),
            "category": category,
            "metadata": {"image": label["image"], "question": label["question"], "label": label["label"]},
            "group": (category, Path(file).stem),
        }

    samples = lay.llava_questions(
        document, BENCHMARK, release if images is None else Path(images), details=details
    )
    if missing:
        raise lay.strange_ids(document.path, missing, f"of {len(samples)} are not in {release}")
    return samples


def _read_stored(place: Path | str) -> list[Sample]:
    columns = ("question_id", "question", "answer", "category", "image")
    rows = lay.read_stored(place, BENCHMARK, config=None, split="test", columns=columns)
    return [
        Sample(
            row["question_id"],
            (lay.stored_picture(rows, at, row["question_id"]),),
            lay.with_suffix(_plain(row["question"])),
            row["answer"].lower(),
            row["category"],
            {"image": Path(row["question_id"]).name, "question": row["question"], "label": row["answer"]},
            group=(row["category"], Path(row["question_id"]).stem),
        )
        for at, row in enumerate(lay.stored_rows(rows))
    ]


def _scorer(style: str) -> Scorer:
    def score(samples: Sequence[Sample], predictions: Sequence[str | None]) -> Score:
        return mme(
            predictions,
            [s.answer for s in samples],
            [s.category for s in samples],
            [s.group for s in samples],
            style=style,
            ids=[s.key for s in samples],
        )

    return score


def _read_answers(path: Path, samples: Sequence[Sample]) -> list[Record] | None:
    """Official answer files: a folder with a text file for each category."""
    if not path.is_dir() or not any((path / f"{name}.txt").is_file() for name in CATEGORIES):
        return None
    asked = {(s.category, Path(s.metadata["image"]).stem, _plain(s.metadata["question"])): s for s in samples}
    records, strange = [], []
    for category, file in _category_files(path).items():
        for number, line in enumerate(file.read_text(encoding="utf-8").split("\n"), 1):
            if line.strip():
                cells = _cells(line, 3, f"{file}:{number}")
                if len(cells) != 4:
                    raise DataError(
                        f"{file}:{number}: {len(cells)} cells where picture, question, label and answer belong"
                    )
                sample = asked.get((category, Path(cells[0]).stem, _plain(cells[1])))
                if sample is None:
                    strange.append(f"{category}/{cells[0]}")
                    continue
                records.append(lay.as_record(sample.question_id, cells[3], sample.text))
    if strange:
        raise lay.strange_ids(path, strange, f"are not asked ({len(samples)} are)")
    return records


def _submission(samples: Sequence[Sample], predictions: Sequence[str | None], path: Path) -> Path:
    """The official answer folder: picture, question, label and answer in each line, the two of a picture together."""
    missing = [s.question_id for s, p in zip(samples, predictions, strict=True) if p is None]
    if missing:
        raise lay.strange_ids(path, missing, f"of {len(samples)} have no answer")
    path.mkdir(parents=True, exist_ok=True)
    order = {group: at for at, group in enumerate(dict.fromkeys(s.group for s in samples))}
    answered = sorted(zip(samples, predictions, strict=True), key=lambda pair: order[pair[0].group])
    for category in Counter(s.category for s in samples):
        lines = []
        for sample, text in answered:
            if sample.category == category:
                meta = sample.metadata
                lines.append("\t".join((meta["image"], meta["question"], meta["label"], _one_line(text))))
        (path / f"{category}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _one_line(text: str | None) -> str:
    """An answer without tabs and line breaks, which the official script cannot read; a full stop for none."""
    return (text or "").translate(str.maketrans("\t\n\r", "   ")).rstrip() or "."
