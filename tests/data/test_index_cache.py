"""Offsets of large annotation files: found once, kept, mapped; never those of another file."""

from __future__ import annotations

import json
import multiprocessing
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data.conftest import chat
from vlmamba.data import LLaVASource
from vlmamba.data import index as index_module
from vlmamba.data.index import RowFile
from vlmamba.errors import DataError

ROWS = [{"id": i, "conversations": chat("q", "é" * i)} for i in range(40)]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of its own, used for files of any size."""
    monkeypatch.setenv("VLMAMBA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(index_module, "KEPT_FROM", 0)
    return tmp_path / "cache"


@pytest.fixture
def never_parse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Finding the rows again is an error."""

    def refuse(self: Any) -> np.ndarray:
        raise AssertionError("the file was parsed again")

    monkeypatch.setattr(RowFile, "_find_rows", refuse)


def write(path: Path, rows: list[Any]) -> Path:
    lines = path.suffix == ".jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) if lines else json.dumps(rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_a_second_opening_reads_the_kept_offsets(
    tmp_path: Path, cache: Path, name: str, request: pytest.FixtureRequest
) -> None:
    path = write(tmp_path / name, ROWS)
    first = RowFile(path)
    assert len(list(cache.glob("rows-*.npy"))) == 1
    request.getfixturevalue("never_parse")
    again = RowFile(path)
    assert isinstance(again._table, np.memmap)
    assert [again[i] for i in range(len(again))] == ROWS
    assert [again.where(i) for i in range(40)] == [first.where(i) for i in range(40)]


def test_a_changed_file_is_indexed_anew(tmp_path: Path, cache: Path) -> None:
    path = write(tmp_path / "rows.json", ROWS)
    RowFile(path)
    write(path, ROWS[:-1])
    assert len(RowFile(path)) == 39
    assert len(list(cache.glob("rows-*.npy"))) == 2


def test_a_damaged_index_is_made_anew(tmp_path: Path, cache: Path) -> None:
    path = write(tmp_path / "rows.json", ROWS)
    RowFile(path)
    (kept,) = cache.glob("rows-*.npy")
    kept.write_bytes(kept.read_bytes()[:100])
    assert RowFile(path)[39] == ROWS[39]
    assert isinstance(RowFile(path)._table, np.memmap)


def test_a_cache_that_cannot_be_written_costs_time_only(
    tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache.write_text("not a folder")
    assert len(RowFile(write(tmp_path / "rows.json", ROWS))) == 40
    assert "is found anew next time" in caplog.text


def test_a_list_cut_in_the_middle_is_named_with_row_and_byte(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "rows.json"
    text = json.dumps(ROWS, ensure_ascii=False).encode()
    path.write_bytes(text[: len(text) // 2])
    with pytest.raises(DataError, match=r"rows\.json is not a valid JSON list: at row 2\d \(byte \d+\)"):
        LLaVASource(path)
    kept = [p.name for p in cache.rglob("*") if p.is_file() and p.suffix != ".lock"]
    assert not kept, "nothing is kept of a file that is not whole"


def test_lines_cut_in_the_middle_cost_the_last_row_only(tmp_path: Path, cache: Path) -> None:
    path = write(tmp_path / "rows.jsonl", ROWS)
    path.write_bytes(path.read_bytes()[:-10])
    source = LLaVASource(path)
    assert len(source) == 40
    assert source[38].id == 38
    with pytest.raises(DataError, match=r"rows\.jsonl:40: the row is not valid JSON"):
        source[39]


def test_small_files_leave_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLMAMBA_CACHE", str(tmp_path / "cache"))
    RowFile(write(tmp_path / "rows.json", ROWS))
    assert not (tmp_path / "cache").exists()


def open_and_count(path: Path, parses: Path, ready: Any) -> None:
    """Open the file when all are ready; a line in `parses` for each time it is parsed."""
    find = RowFile._find_rows

    def counted(self: RowFile) -> np.ndarray:
        with parses.open("a") as file:
            file.write("parsed\n")
        time.sleep(0.5)  # the others come while it works
        return find(self)

    RowFile._find_rows = counted  # type: ignore[method-assign]
    ready.wait(60)
    assert len(RowFile(path)) == 40


def test_of_several_processes_one_parses_the_file(tmp_path: Path, cache: Path) -> None:
    path, parses = write(tmp_path / "rows.json", ROWS), tmp_path / "parses"
    context = multiprocessing.get_context("fork")
    ready = context.Barrier(3)
    processes = [context.Process(target=open_and_count, args=(path, parses, ready)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert parses.read_text().splitlines() == ["parsed"]
