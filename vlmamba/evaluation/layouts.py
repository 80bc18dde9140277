"""Reading the files of benchmarks: where they lie, what is in them, whose answers they hold. No torch here.

Four parts: finding a benchmark's data and reading JSON, JSON lines and tables, with messages about wrong files; rows to
samples (LLaVA's question files, pictures, prompts: the picture first, a newline, the question, a newline and one of the
instructions, as in haotian-liu/LLaVA, docs/Evaluation.md); Hugging Face data sets (the hub, parquet files, folders of
``save_to_disk``), whose pictures stay undecoded until they are asked for; official answer layouts to records
(``{"question_id", "prompt", "text"}``) and files for servers.
"""

from __future__ import annotations

import csv
import functools
import io
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vlmamba.common.files import replace_text
from vlmamba.errors import DataError, ImageError, MissingFileError, require
from vlmamba.evaluation.records import Record
from vlmamba.evaluation.scorers import Score, rate
from vlmamba.evaluation.task import Prompt, Reader, Sample, Scorer, StoredImage

HUB = "hf"
"""What stands for a benchmark's data set on the hub where a path is asked for; also ``hf:owner/name``."""
LARGEST_CELL = 1 << 30
"""Characters in a cell of a table: MMBench keeps its pictures there."""


@dataclass(frozen=True)
class Benchmark:
    """Where a benchmark's files lie and come from.

    Attributes:
        title: Its name in messages.
        folder: Where they lie, under the current directory (LLaVA's layout).
        files: Names in the folder, or patterns, in the order of preference, each with what it is.
        source: Where they can be had.
        hub: Name of the data set on the Hugging Face hub.
    """

    title: str
    folder: str
    files: Mapping[str, str]
    source: str
    hub: str = ""

    @property
    def layouts(self) -> str:
        """The files in words."""
        return "; ".join(f"{name} ({what})" for name, what in self.files.items())

    def wrong(self, document: Document | Path, why: str = "") -> DataError:
        """The error about a file that is not one of the benchmark's."""
        found = document.summary if isinstance(document, Document) else ""
        path = document.path if isinstance(document, Document) else document
        reason = f": {why or found}" if why or found else ""
        extra = f" It holds {found}." if why and found else ""
        return DataError(
            f"{path} is no data file of {self.title}{reason}.{extra} Known files: {self.layouts}."
        )


def find_data(benchmark: Benchmark, annotations: str | Path | None) -> Path | str:
    """The file (or folder) with a benchmark's questions.

    Args:
        benchmark: What to look for.
        annotations: A file, a folder to look in, ``hf`` or ``hf:owner/name`` for the hub; None for the usual
            folder.

    Returns:
        The path; for the hub the text ``hf:owner/name``.

    Raises:
        MissingFileError: Nothing is there; the message says what was looked for and where to get it.
    """
    if annotations is not None and str(annotations).split(":")[0] == HUB:
        name = str(annotations).partition(":")[2] or benchmark.hub
        if not name:
            raise MissingFileError(f"{benchmark.title} has no known data set on the hub: give hf:owner/name")
        return f"{HUB}:{name}"
    folder = Path(benchmark.folder if annotations is None else annotations)
    if folder.is_file():
        return folder
    if folder.is_dir():
        for name in benchmark.files:
            found = sorted(folder.glob(name.rstrip("/")))
            if found:
                return found[0].parent if len(found) > 1 and name.endswith(".parquet") else found[0]
    state = "" if folder.is_dir() else f", which does not exist (under {Path.cwd()})"
    hub = f", or annotations hf (the hub's {benchmark.hub})" if benchmark.hub else ""
    raise MissingFileError(
        f"the data of {benchmark.title} are not there. Looked in {folder}{state} for: {benchmark.layouts}. Get "
        f"them from {benchmark.source}{hub}, or give the path of your file as annotations."
    )


@dataclass(frozen=True)
class Document:
    """What a file holds.

    Attributes:
        path: The file.
        kind: "object" or "array" (one JSON value), "lines" (JSON objects, one a line), or "table".
        value: A dict for "object", else a list; of dicts for "lines" and "table".
        lines: Line of each row of "lines".
    """

    path: Path
    kind: Literal["object", "array", "lines", "table"]
    value: Any
    lines: Sequence[int] = ()

    @property
    def rows(self) -> list[Any]:
        """The rows; none for an object."""
        return [] if self.kind == "object" else self.value

    @property
    def keys(self) -> set[str]:
        """Keys of an object, or of the first row."""
        first = self.value if self.kind == "object" else next(iter(self.value), None)
        return set(first) if isinstance(first, dict) else set()

    def has(self, *keys: str) -> bool:
        """Whether `keys` has all of these."""
        return set(keys) <= self.keys

    def where(self, index: int) -> str:
        """How a message names a row."""
        return f"{self.path}:{self.lines[index]}" if self.lines else f"{self.path}, row {index + 1}"

    @property
    def summary(self) -> str:
        """What it holds, in words."""
        kind = {
            "object": "one JSON object",
            "array": "a JSON array",
            "lines": "JSON lines",
            "table": "a table",
        }
        keys = sorted(self.keys)
        names = ", ".join(keys[:8]) + (", ..." if len(keys) > 8 else "")
        size = "" if self.kind == "object" else f" of {len(self.value)} row(s)"
        return f"{kind[self.kind]}{size} with keys {names or 'none'}"


def read_document(path: str | Path) -> Document:
    """Read JSON, JSON lines, ``.tsv``, ``.csv`` or ``.xlsx``, whatever the file's name says of the first two.

    Raises:
        MissingFileError: There is no such file.
        DataError: It is empty or not of these; the message has the line.
    """
    file = Path(path)
    if not file.is_file():
        raise MissingFileError(f"there is no file {file}.")
    if file.suffix == ".xlsx":
        return Document(file, "table", _sheet(file))
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 text (byte {error.start}): expected JSON or a table") from error
    if not text.strip():
        raise DataError(f"{file} is empty")
    if file.suffix in (".tsv", ".csv"):
        return Document(file, "table", list(_table(text, "\t" if file.suffix == ".tsv" else ",", file)))
    return _json(text, file)


def _json(text: str, file: Path) -> Document:
    start = len(text) - len(text.lstrip())
    try:
        value, end = json.JSONDecoder().raw_decode(text, start)
    except ValueError as error:
        line = text.count("\n", 0, getattr(error, "pos", 0)) + 1
        raise DataError(f"{file}:{line}: not JSON: {error}") from error
    whole = not text[end:].strip()
    if whole and isinstance(value, list):
        return Document(file, "array", value)
    if whole and isinstance(value, dict) and (file.suffix != ".jsonl" or "\n" in text[start:end]):
        return Document(file, "object", value)
    rows, numbers = [], []
    for number, content in enumerate(text.split("\n"), 1):
        if content.strip():
            try:
                row = json.loads(content)
            except ValueError as error:
                raise DataError(f"{file}:{number}: not JSON: {error}") from error
            if not isinstance(row, dict):
                raise DataError(f"{file}:{number}: expected a JSON object, found {content.strip()[:40]}")
            rows.append(row)
            numbers.append(number)
    return Document(file, "lines", rows, numbers)


def _table(text: str, delimiter: str, file: Path) -> Iterator[dict[str, str]]:
    limit = csv.field_size_limit(LARGEST_CELL)
    try:
        lines = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
        header = next(lines)
        for row in lines:
            if row and len(row) != len(header):
                raise DataError(
                    f"{file}:{lines.line_num}: {len(row)} cells under {len(header)} columns ({', '.join(header)})"
                )
            if row:
                yield dict(zip(header, row, strict=True))
    except csv.Error as error:
        raise DataError(f"{file}:{lines.line_num}: not a table: {error}") from error
    finally:
        csv.field_size_limit(limit)


def _sheet(file: Path) -> list[dict[str, str]]:
    openpyxl = require("openpyxl", extra="eval", feature=f"reading {file.name}")
    book = openpyxl.load_workbook(file, read_only=True, data_only=True)
    try:
        rows = [["" if cell is None else str(cell) for cell in row] for row in book.active.values]
    finally:
        book.close()
    if not rows:
        raise DataError(f"{file} is empty")
    return [dict(zip(rows[0], row, strict=True)) for row in rows[1:]]


def require_keys(document: Document, keys: Sequence[str], benchmark: Benchmark) -> list[dict[str, Any]]:
    """The rows of a file, each of which must be an object with these keys.

    Raises:
        DataError: There is no row, or some lack a key; the message counts them and names the first.
    """
    if not document.rows:
        raise benchmark.wrong(document)
    wanted = set(keys)
    bad = [
        (document.where(at), [key for key in keys if not isinstance(row, dict) or key not in row])
        for at, row in enumerate(document.rows)
        if not isinstance(row, dict) or not wanted <= row.keys()
    ]
    if len(bad) == len(document.rows):
        raise benchmark.wrong(document, f"its rows lack {', '.join(bad[0][1])}")
    if bad:
        examples = "; ".join(f"{where} lacks {', '.join(lacking)}" for where, lacking in bad[:3])
        raise DataError(
            f"{len(bad)} of {len(document.rows)} rows of {benchmark.title} are incomplete: {examples}"
        )
    return document.rows


def unique(
    rows: Sequence[Mapping[str, Any]], key: str, benchmark: Benchmark, path: str | Path
) -> dict[Any, Mapping[str, Any]]:
    """Rows by id.

    Raises:
        DataError: Some ids occur more than once; the message counts them and names the first.
    """
    found = {row[key]: row for row in rows}
    if len(found) < len(rows):
        double = [name for name, count in Counter(row[key] for row in rows).items() if count > 1]
        raise strange_ids(path, double, f"occur more than once in the data of {benchmark.title}")
    return found


def strange_ids(path: str | Path, ids: Sequence[Any], what: str) -> DataError:
    """The error about some ids: how many, and the first of them."""
    examples = ", ".join(repr(key) for key in ids[:3])
    return DataError(f"{path}: {len(ids)} question(s) {what}, such as {examples}")


SHORT_ANSWER = "Answer the question using a single word or phrase."
UNANSWERABLE = "When the provided information is insufficient, respond with 'Unanswerable'."
LETTER = "Answer with the option's letter from the given choices directly."
LETTER_CN = "请直接回答选项字母。"

_OUTSIDE = re.compile(r"^/|^[A-Za-z]:|(^|/)\.\.(/|$)")


def with_suffix(question: str, suffix: str = SHORT_ANSWER) -> str:
    """A question and its instruction on a line of its own."""
    return f"{question}\n{suffix}"


def multiple_choice(
    question: str, options: Mapping[str, str], *, hint: str = "", suffix: str = LETTER
) -> str:
    """LLaVA's form of a question with options: hint, question, ``A. text`` lines, instruction."""
    lines = [hint] if hint else []
    lines += [question, *(f"{letter}. {text}" for letter, text in options.items()), suffix]
    return "\n".join(lines)


def picture(root: Path, name: str, where: str) -> Path:
    """The file of a picture named in a row; backslashes count as slashes.

    Names are checked, not the disk, and nothing heavy is imported: answers are scored where no picture is.

    Args:
        root: The image folder.
        name: As the row has it, relative to the folder.
        where: The row, for messages.

    Raises:
        ImageError: The name is no relative path, or leaves the folder.
    """
    slashed = name.replace("\\", "/") if isinstance(name, str) else ""
    if not slashed.strip() or "\0" in slashed or "://" in slashed:
        raise ImageError(f"{where}: image path {name!r} is not a path: give that of a file under {root}")
    if _OUTSIDE.search(slashed):
        raise ImageError(
            f"{where}: image path {name!r} leaves its root {root}. Write it relative to the root, or move the root up"
        )
    return _join(root, slashed)


@functools.lru_cache(maxsize=1024)
def _join(root: Path, name: str) -> Path:
    """Questions on the same picture stand together in most files."""
    return root / name


def llava_questions(
    document: Document,
    benchmark: Benchmark,
    images: Path,
    *,
    details: Callable[[Mapping[str, Any], str], Mapping[str, Any]] | None = None,
) -> list[Sample]:
    """Samples from LLaVA's question file: JSON lines with question_id, image and text, instruction included.

    Args:
        document: The file.
        benchmark: Whose.
        images: The image folder.
        details: From a row and its place to further fields of the sample (answer, category, metadata, ...).

    Raises:
        DataError: Rows are incomplete.
    """
    samples = []
    for at, row in enumerate(require_keys(document, ("question_id", "text"), benchmark)):
        where = document.where(at)
        names = row.get("image") or []
        names = [names] if isinstance(names, str) else names
        pictures = tuple(picture(images, name, where) for name in names)
        fields = {"category": str(row.get("category", "")), **(details(row, where) if details else {})}
        samples.append(Sample(row["question_id"], pictures, row["text"], **fields))
    return samples


def no_labels(metric: str, way: str, unit: str = "%") -> Scorer:
    """A scorer for splits whose answers only a server knows: no figure, and the way to one.

    Args:
        metric: What the server measures.
        way: What to do with the submission file.
        unit: Of the figure.
    """

    def score(samples: Sequence[Sample], predictions: Sequence[Any]) -> Score:
        if len(samples) != len(predictions):
            raise DataError(f"{len(predictions)} predictions for {len(samples)} questions")
        metrics = {
            "overall": rate(0, 0),
            "categories": {},
            "missing": sum(p is None for p in predictions),
            "headline": {"name": metric, "value": None, "unit": unit},
            "note": way,
        }
        return Score(metrics, (), 0)

    return score


def cannot_ask(missing: str) -> Prompt:
    """The prompt of a task whose questions are not there, though their answers are: answer files can be scored.

    Args:
        missing: What is missing and where to get it.
    """

    def prompt(sample: Sample) -> list[dict[str, Any]]:
        raise MissingFileError(f"question {sample.question_id!r} can be scored but not asked: {missing}")

    return prompt


def is_stored(place: Path | str) -> bool:
    """Whether `find_data` found a Hugging Face data set."""
    if isinstance(place, str):
        return True
    if place.is_dir():
        return (place / "state.json").is_file() or any(place.glob("*.parquet"))
    return place.suffix == ".parquet"


def read_stored(
    place: Path | str, benchmark: Benchmark, *, config: str | None, split: str, columns: Sequence[str]
) -> Any:
    """Open a data set; its column ``image`` is not decoded.

    Args:
        place: What `find_data` found.
        benchmark: Whose data.
        config: Configuration on the hub.
        split: Split; in local folders the parquet files whose names begin with it, or all.
        columns: What it must have.

    Returns:
        A `datasets.Dataset`.

    Raises:
        MissingFileError: The hub or the files cannot be read.
        DataError: A column is missing.
    """
    datasets = require("datasets", extra="eval", feature=f"the Hugging Face layout of {benchmark.title}")
    if isinstance(place, str):
        name = place.removeprefix(f"{HUB}:")
        try:
            rows = datasets.load_dataset(name, config, split=split)
        except (OSError, ValueError) as error:
            raise MissingFileError(
                f"the data set {name} ({config}, {split}) cannot be read: {error}"
            ) from error
    elif (place / "state.json").is_file():
        rows = datasets.load_from_disk(str(place))
    else:
        files = [place] if place.is_file() else sorted(place.glob("*.parquet"))
        files = [f for f in files if f.name.startswith(split)] or files
        rows = datasets.load_dataset("parquet", data_files=[str(f) for f in files], split="train")
    lacking = [name for name in columns if name not in rows.column_names]
    if lacking:
        raise DataError(
            f"{place} is no data set of {benchmark.title}: it lacks the column(s) {', '.join(lacking)}; it has "
            f"{', '.join(rows.column_names)}"
        )
    if "image" in rows.column_names:
        rows = rows.cast_column("image", datasets.Image(decode=False))
    return rows


def stored_rows(rows: Any) -> list[dict[str, Any]]:
    """All rows without their pictures."""
    names = [name for name in rows.column_names if name != "image"]
    return rows.select_columns(names).to_list()


def stored_picture(rows: Any, index: int, name: str) -> StoredImage:
    """The picture of a row.

    Args:
        rows: A data set of `read_stored`.
        index: The row.
        name: Of the picture; rows that share a picture give the same.
    """

    def read() -> bytes:
        cell = rows[index]["image"]
        if cell is None:
            raise DataError(f"row {index} of the data set has no picture")
        return cell["bytes"] if cell.get("bytes") else Path(cell["path"]).read_bytes()

    return StoredImage(name, read)


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
