"""Finding and reading a benchmark's files; what is wrong with them, in words."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vlmamba.errors import DataError, MissingFileError, require

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


def same_ids(benchmark: Benchmark, path: str | Path, **tables: Mapping[Any, Any]) -> None:
    """Two tables of a benchmark must be about the same questions.

    Raises:
        DataError: They are not; the message counts what is missing where and names the first.
    """
    (first, one), (second, other) = tables.items()
    for name, given, wanted in ((first, one, other), (second, other, one)):
        missing = [key for key in wanted if key not in given]
        if missing:
            raise strange_ids(path, missing, f"lack their {name} ({len(one)} {first}, {len(other)} {second})")


def strange_ids(path: str | Path, ids: Sequence[Any], what: str) -> DataError:
    """The error about some ids: how many, and the first of them."""
    examples = ", ".join(repr(key) for key in ids[:3])
    return DataError(f"{path}: {len(ids)} question(s) {what}, such as {examples}")
