"""Predictions on disk: JSON lines in the layout of LLaVA's answer files, appended and synced, resumable.

A line is ``{"question_id", "prompt", "text", "model_id", "metadata"}``; ``prompt`` is the question without
image tokens or chat template. A line is filed under (question_id, prompt). A process killed while writing
leaves at most a cut last line, which readers skip and the writer removes.

Several processes write a file each (``NAME.part0.jsonl``, ...) beside ``NAME.jsonl``; `merge_parts` joins them.
"""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any

from vlmamba.common.files import locked, replace_text, write_errors
from vlmamba.errors import DataError, MissingFileError

Record = dict[str, Any]
REQUIRED = ("question_id", "text")


def record_key(record: Mapping[str, Any]) -> tuple[str, str]:
    """(question_id, prompt) of a line; files without prompts give an empty one."""
    return str(record["question_id"]), str(record.get("prompt", ""))


def read_records(path: str | Path) -> list[Record]:
    """All whole lines of a file; a cut last line is left out.

    Raises:
        MissingFileError: There is no such file.
        DataError: A line before the last is no answer; the message gives its number.
    """
    file = Path(path)
    if not file.is_file():
        raise MissingFileError(f"there is no predictions file {file}.")
    return [record for record, _ in _scan(file)]


def part_path(path: Path, rank: int) -> Path:
    """The file of one of several processes."""
    return path.with_name(f"{path.stem}.part{rank}{path.suffix}")


def part_paths(path: Path) -> list[Path]:
    """The files of processes that are there."""
    parts = (p for p in path.parent.glob(f"{glob.escape(path.stem)}.part*{glob.escape(path.suffix)}"))
    return sorted(p for p in parts if p.stem.removeprefix(f"{path.stem}.part").isdecimal())


def merge_parts(path: Path, order: Sequence[tuple[str, str]]) -> dict[tuple[str, str], Record]:
    """Join an answer file and the files of processes beside it, and put the answers in order.

    The whole is written under another name and renamed; nothing is lost whenever the process is killed.

    Args:
        path: The answer file, which need not exist.
        order: Keys in the order wanted; answers to other questions come last.

    Returns:
        The answers by key.

    Raises:
        DataError: A question has two different answers, or a line before a file's last is no answer.
    """
    parts = part_paths(path)
    before = list(_scan(path)) if path.is_file() else []
    records: dict[tuple[str, str], Record] = {}
    for record in [*(r for r, _ in before), *(r for part in parts for r, _ in _scan(part))]:
        first = records.setdefault(record_key(record), record)
        if first["text"] != record["text"]:
            raise DataError(
                f"{path} and the files of processes beside it answer question {record['question_id']!r} "
                f"twice, with {first['text']!r} and {record['text']!r}. Delete the file that does not belong"
            )
    place = {key: at for at, key in enumerate(order)}
    keys = sorted(records, key=lambda key: place.get(key, len(place)))
    if parts or keys != [record_key(r) for r, _ in before]:
        replace_text(path, "".join(_line(records[key]) for key in keys))
    for part in parts:
        part.unlink()
    return records


def remove_answers(path: Path) -> None:
    """Forget the answers: the file, those of processes beside it, and what they earned."""
    for file in [path, *part_paths(path), path.with_suffix(f".credits{path.suffix}")]:
        file.unlink(missing_ok=True)


def lock_answers(path: Path) -> AbstractContextManager[None]:
    """Hold an answer file for one evaluation; the system lets go of it when the process dies.

    Raises:
        DataError: Another process holds it.
    """
    return locked(path.with_name(f".{path.name}.lock"), busy=f"the answer file {path}", error=DataError)


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(dict(record), ensure_ascii=True) + "\n"


def _scan(file: Path) -> Iterator[tuple[Record, int]]:
    """Each whole record with the offset of the byte after it."""
    data = file.read_bytes()
    start, number = 0, 0
    while start < len(data):
        newline = data.find(b"\n", start)
        end = len(data) if newline < 0 else newline + 1
        line, number = data[start:end], number + 1
        if line.strip():
            record = _parse(line)
            if record is None:
                if not data[end:].strip(b"\0 \r\n\t"):
                    return
                raise DataError(
                    f"{file}:{number}: not an answer: expected one JSON object a line with "
                    f"{', '.join(REQUIRED)}, found {line[:80]!r}"
                )
            yield record, end
        start = end


def _parse(line: bytes) -> Record | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    if not isinstance(record, dict) or any(key not in record for key in REQUIRED):
        return None
    return record


class RecordFile:
    """An answer file that is continued: opened, its whole lines read, a cut last line removed.

    Args:
        path: The file; its folder is made when needed.

    Attributes:
        records: The lines that were there.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.records: list[Record] = []
        self._file = self.path.open("ab")
        end = 0
        try:
            for record, after in _scan(self.path):
                self.records.append(record)
                end = after
            self._file.truncate(end)
            if end and not _ends_line(self.path):
                self._file.write(b"\n")
                self._file.flush()
        except BaseException:
            self._file.close()
            raise

    def append(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Write lines; when this returns they are on the disk."""
        with write_errors(self.path):
            self._file.write("".join(map(_line, records)).encode("ascii"))
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> RecordFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _ends_line(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"
