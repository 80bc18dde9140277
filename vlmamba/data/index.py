"""Random access to the rows of a JSON list or a JSON-lines file by byte offset.

A file is parsed once, row by row through a moving window, to find the offsets: three 64-bit numbers a row. Those of
large files are kept in the cache folder and mapped from there, so a file of a million rows opens at once and all
processes share the pages.
"""

from __future__ import annotations

import codecs
import json
import os
import re
from array import array
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import numpy as np

from vlmamba.data.cache import file_key, kept_table
from vlmamba.data.downloads import missing_file_message
from vlmamba.errors import DataError, MissingFileError

_CHUNK = 1 << 22
_VERSION = 1
KEPT_FROM = 1 << 24
"""Offsets of files of so many bytes are kept in the cache folder; smaller ones are read faster than found."""
_BLANK = " \t\n\r"
JSONL_SUFFIXES = (".jsonl", ".ndjson")
_ARCHIVES = {
    "gzip": b"\x1f\x8b",
    "zip": b"PK\x03\x04",
    "bzip2": b"BZh",
    "xz": b"\xfd7zXZ\0",
    "zstd": b"\x28\xb5\x2f\xfd",
}
_NEXT = re.compile(r"[,\]]")
_MARKS = re.compile(r'"(?:[^"\\]|\\.)*"|[\[\]{}]', re.DOTALL)


class RowFile:
    """The rows of one annotation file. Rows are parsed when asked for, so a bad row is an error of that row
    only.

    Args:
        path: ``.jsonl`` or ``.ndjson``: one row a line, blank lines skipped. Anything else: one JSON list of
            rows.
        hint: Where the file can be had, for the message when it is missing.

    Raises:
        MissingFileError: There is no such file.
        DataError: The file is not a JSON list, not JSON at all, or not UTF-8.
    """

    def __init__(self, path: str | os.PathLike[str], hint: str = "") -> None:
        self.path = Path(path).expanduser().absolute()
        if not self.path.is_file():
            raise MissingFileError(missing_file_message(self.path, "the annotation file", hint))
        self.is_lines = self.path.suffix.lower() in JSONL_SUFFIXES
        name, size, changed = file_key(self.path)
        self.fingerprint = f"{self.path.name}:{size}:{changed}"
        if size < KEPT_FROM:
            self._table = self._find_rows()
        else:
            key = (_VERSION, name, size, changed, self.is_lines)
            self._table = kept_table("rows", key, self._find_rows, columns=3)
        self._handle: tuple[int, int] | None = None

    def _find_rows(self) -> np.ndarray:
        """(rows, 3) int64: first byte, end, and line (0 in a list) of each row."""
        with self.path.open("rb") as file:
            self._refuse_archives(file.read(8))
            file.seek(0)
            if self.is_lines:
                columns: tuple[array[int], ...] = _index_lines(file, self.path)
            else:
                columns = _ListIndexer(file, self.path).run()
        table = np.zeros((len(columns[0]), 3), dtype=np.int64)
        for column, values in enumerate(columns):
            table[:, column] = np.frombuffer(values, dtype=np.int64)
        return table

    def _refuse_archives(self, head: bytes) -> None:
        for kind, magic in _ARCHIVES.items():
            if head.startswith(magic):
                raise DataError(
                    f"{self.path} is compressed ({kind}); rows are read by their place: unpack it."
                )

    def __len__(self) -> int:
        return len(self._table)

    def where(self, row: int) -> str:
        """The place of a row: ``file:line`` (from 1) for JSON lines, ``file:row n`` (from 0) for a list."""
        if self.is_lines:
            return f"{self.path}:{int(self._table[row, 2])}"
        return f"{self.path}:row {row}"

    def __getitem__(self, row: int) -> Any:
        """The parsed row.

        Raises:
            DataError: The row is not valid JSON; the message has no place (see `where`).
        """
        try:
            return json.loads(self.raw(row))
        except RecursionError as error:
            raise DataError("the row is nested too deeply to be read") from error
        except ValueError as error:
            broken = isinstance(error, json.JSONDecodeError) and not self.is_lines
            hint = " The file has changed since it was indexed; start again." if broken else ""
            raise DataError(f"the row is not valid JSON: {error}.{hint}") from error

    def raw(self, row: int) -> bytes:
        """The row as it stands in the file."""
        start, end, _ = self._table[row].tolist()
        return os.pread(self._descriptor(), end - start, start)

    def _descriptor(self) -> int:
        """A file descriptor of this very process (forked workers must not inherit one that may be closed)."""
        if self._handle is None or self._handle[0] != os.getpid():
            try:
                self._handle = (os.getpid(), os.open(self.path, os.O_RDONLY))
            except OSError as error:
                raise MissingFileError(
                    f"the annotation file {self.path} cannot be read any more: {error}"
                ) from error
        return self._handle[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handle": None}

    def __del__(self) -> None:
        handle = getattr(self, "_handle", None)
        if handle is not None and handle[0] == os.getpid():
            os.close(handle[1])


def _index_lines(file: BinaryIO, path: Path) -> tuple[array[int], array[int], array[int]]:
    starts, ends, lines = array("q"), array("q"), array("q")
    offset = 0
    for number, line in enumerate(file, start=1):
        begin = offset
        offset += len(line)
        if number == 1 and line.startswith(codecs.BOM_UTF8):
            begin, line = begin + 3, line[3:]
        if not line.strip():
            continue
        if not starts and line.lstrip().startswith(b"["):
            raise DataError(
                f"{path} is named as JSON lines but holds a JSON list. Rename it to {path.stem}.json."
            )
        starts.append(begin)
        ends.append(offset)
        lines.append(number)
    return starts, ends, lines


class _ListIndexer:
    """Finds where each element of a top-level JSON list begins and ends, in bytes."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self.file, self.path = file, path
        self.decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self.scan = json.JSONDecoder().raw_decode
        self.text = ""
        self.at = 0  # position in self.text
        bom = file.read(3) == codecs.BOM_UTF8
        self.byte = 3 if bom else 0  # position in the file
        file.seek(0)
        self.ended = False
        self.grow = _CHUNK
        self.starts, self.ends = array("q"), array("q")

    def run(self) -> tuple[array[int], array[int]]:
        self.more()
        first = self.peek()
        if first != "[":
            self.reject(first)
        self.advance(self.at + 1)
        if self.peek() == "]":
            return self.close()
        while True:
            if self.peek() == "]":
                self.fail("a comma stands before the end of the list", "Take it out.")
            end = self.element()
            self.starts.append(self.byte)
            self.advance(end)
            self.ends.append(self.byte)
            token = self.peek()
            if token == "]":
                return self.close()
            if token != ",":
                self.fail(
                    f"expected ',' or ']' and found {token!r}" if token else "the file ends inside the list"
                )
            self.advance(self.at + 1)

    def close(self) -> tuple[array[int], array[int]]:
        self.advance(self.at + 1)
        if self.peek():
            self.fail(f"the list is closed and then follows {self.text[self.at : self.at + 20]!r}")
        return self.starts, self.ends

    def element(self) -> int:
        """The end of the element that begins here, in the window."""
        self.grow = _CHUNK
        while True:
            try:
                _, end = self.scan(self.text, self.at)
            except json.JSONDecodeError as error:
                if self.ended:
                    self.fail(error.msg)
                end = len(self.text)
            except (
                ValueError,
                RecursionError,
            ):  # nested too deeply, numbers too long: an error of this row alone
                end = _end_of_brackets(self.text, self.at)
            if end < len(self.text) or self.ended:
                return int(end)
            self.more()

    def more(self) -> None:
        raw = self.file.read(self.grow)
        self.grow *= 2
        self.ended = not raw
        try:
            self.text = self.text[self.at :] + self.decoder.decode(raw, final=self.ended)
        except UnicodeDecodeError as error:
            raise DataError(f"{self.path} is not UTF-8 text near row {len(self.starts)}: {error}.") from error
        self.at = 0

    def advance(self, to: int) -> None:
        passed = self.text[self.at : to]
        self.byte += len(passed) if passed.isascii() else len(passed.encode("utf-8"))
        self.at = to

    def peek(self) -> str:
        """The next character that is not blank ('' at the end of the file); moves to it."""
        while True:
            to = self.at
            while to < len(self.text) and self.text[to] in _BLANK:
                to += 1
            self.advance(to)
            if to < len(self.text):
                return self.text[to]
            if self.ended:
                return ""
            self.grow = _CHUNK
            self.more()

    def fail(
        self,
        message: str,
        advice: str = "It may have been cut off while downloading; compare its size with the original.",
    ) -> NoReturn:
        raise DataError(
            f"{self.path} is not a valid JSON list: at row {len(self.starts)} (byte {self.byte}): {message}. {advice}"
        )

    def reject(self, first: str) -> NoReturn:
        if not first:
            raise DataError(f"{self.path} is empty; expected a JSON list of rows.")
        if first == "{":
            raise DataError(
                f"{self.path} holds a JSON object, not a list of rows. Give a list [{{...}}, ...], or, if "
                f"each line of the file is a row, rename it to {self.path.stem}.jsonl."
            )
        raise DataError(
            f"{self.path} is not a JSON list of rows: it begins with {self.text[self.at : self.at + 20]!r}."
        )


def _end_of_brackets(text: str, start: int) -> int:
    """Where what begins at `start` is closed again, by its brackets alone; the end of the text if it is not."""
    if text[start] not in "[{":
        end = _NEXT.search(text, start)
        return end.start() if end else len(text)
    depth = 0
    for mark in _MARKS.finditer(text, start):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(mark.group(), 0)
        if depth == 0:
            return mark.end()
    return len(text)
