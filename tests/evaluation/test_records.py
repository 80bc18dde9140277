from __future__ import annotations

import json

import pytest

from vlmamba.errors import DataError, MissingFileError
from vlmamba.evaluation.records import append_records, mend_records, read_records, record_key


def row(number: int) -> dict:
    return {"question_id": number, "prompt": f"question {number}", "text": "ja – 是"}


def test_lines_come_back(tmp_path):
    path = tmp_path / "deep" / "a.jsonl"
    append_records(path, [row(0), row(1)])
    assert read_records(path) == [row(0), row(1)]
    append_records(path, [row(2)])
    assert mend_records(path) == [row(0), row(1), row(2)]
    assert record_key(row(2)) == ("2", "question 2")


@pytest.mark.parametrize("cut", range(1, 40))
def test_a_cut_last_line_is_skipped_and_removed(tmp_path, cut):
    path = tmp_path / "a.jsonl"
    append_records(path, [row(0), row(1)])
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    kept = [row(0), row(1)] if cut == 1 else [row(0)]  # without its newline the last line is still whole
    assert read_records(path) == kept
    assert mend_records(path) == kept
    append_records(path, [row(2)])
    assert read_records(path) == [*kept, row(2)]


def test_zeros_left_by_a_power_cut_count_as_a_cut_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(json.dumps(row(0)).encode() + b"\n" + b"\0" * 700)
    assert mend_records(path) == [row(0)]
    append_records(path, [row(1)])
    assert read_records(path) == [row(0), row(1)]


def test_a_broken_line_before_the_last_is_an_error_and_changes_nothing(tmp_path):
    path = tmp_path / "a.jsonl"
    content = json.dumps(row(0)) + '\n{"text": "no id"}\n' + json.dumps(row(1)) + "\n"
    path.write_text(content)
    for reader in (read_records, mend_records):
        with pytest.raises(
            DataError, match=r"a\.jsonl:2: not an answer: expected one JSON object a line with question_id"
        ):
            reader(path)
    assert path.read_text() == content


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(MissingFileError, match=r"there is no predictions file .*none\.jsonl"):
        read_records(tmp_path / "none.jsonl")
