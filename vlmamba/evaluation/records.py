"""Predictions on disk: JSON lines in the layout of LLaVA's answer files, appended and synced, resumable.

A line is ``{"question_id", "prompt", "text", "model_id", "metadata"}``; ``prompt`` is the question without
image tokens or chat template. A line is filed under (question_id, prompt). A process killed while writing
leaves at most a cut last line, which readers skip and the writer removes.

Several processes write a file each (``NAME.part0.jsonl``, ...) beside ``NAME.jsonl``; `merge_parts` joins them.
"""

from __future__ import annotations

import glob
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from vlmamba.common.files import append_text, locked, replace_text, write_errors
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
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or any(key not in record for key in REQUIRED):
        return None
    return record


def mend_records(path: Path) -> list[Record]:
    """The whole lines of an answer file that is to be continued; a cut last line is removed."""
    if not path.is_file():
        return []
    found = list(_scan(path))
    end = found[-1][1] if found else 0
    with write_errors(path), path.open("r+b") as file:
        file.truncate(end)
        file.seek(max(0, end - 1))
        if end and file.read() != b"\n":
            file.write(b"\n")
    return [record for record, _ in found]


def append_records(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Add lines to an answer file; when this returns they are on the disk."""
    append_text(path, "".join(map(_line, records)), sync=True)
