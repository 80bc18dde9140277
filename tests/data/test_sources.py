"""Annotation files: shapes, places in messages, offsets."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from tests.data.conftest import WriteRows, chat
from vlmamba.data import LLaVASource, RowError, Source, build_source, download_hint, resolve_image_path
from vlmamba.data.index import RowFile
from vlmamba.errors import ConfigError, DataError, ImageError, MissingFileError

GOOD = {"id": "g", "conversations": chat("q", "a")}


def test_missing_annotations_say_where_to_get_them(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError) as caught:
        LLaVASource(tmp_path / "llava_v1_5_mix665k.json", tmp_path)
    assert f"the annotation file {tmp_path}/llava_v1_5_mix665k.json does not exist" in str(caught.value)
    assert "https://huggingface.co/datasets/liuhaotian/LLaVA-Instruct-150K" in str(caught.value)
    assert "train/playground.py" in str(caught.value)
    with pytest.raises(MissingFileError, match="Get it from my server, or set the path"):
        LLaVASource(tmp_path / "x.json", hint="my server")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"id": 1}', r"holds a JSON object, not a list of rows.*rename it to rows\.jsonl"),
        ("", "is empty; expected a JSON list of rows"),
        ("hello", "is not a JSON list of rows: it begins with 'hello'"),
        ('[{"a": 1}, {"b": ', r"is not a valid JSON list: at row 1 \(byte 11\): .*cut off while downloading"),
        ('[{"a": 1}', "at row 1 .*the file ends inside the list"),
        ('[{"a": 1} {"b": 2}]', "expected ',' or ']' and found '{'"),
        ("[{'a': 1}]", "at row 0 .byte 1.: Expecting property name"),
        ("[1][2]", r"the list is closed and then follows '\[2\]'"),
    ],
)
def test_files_that_are_no_list(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "rows.json").write_text(text)
    with pytest.raises(DataError, match=message):
        LLaVASource(tmp_path / "rows.json", tmp_path)


def test_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_bytes(b'[{"id": "\xe9"}]')
    with pytest.raises(DataError, match="is not UTF-8 text near row 0"):
        LLaVASource(tmp_path / "rows.json", tmp_path)


def test_a_list_named_as_lines(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("[\n1]\n")
    with pytest.raises(
        DataError, match=r"is named as JSON lines but holds a JSON list. Rename it to rows\.json\."
    ):
        LLaVASource(tmp_path / "rows.jsonl", tmp_path)


def test_empty_list(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text(" [ ] \n")
    assert len(LLaVASource(tmp_path / "rows.json", tmp_path)) == 0


def test_a_bad_row_is_an_error_of_that_row(write: WriteRows) -> None:
    source = write([GOOD, {"id": 12, "conversations": []}, [3], GOOD])
    assert source[0].id == source[3].id == "g"
    with pytest.raises(RowError, match=r"rows\.json:row 1 \(id 12\): 'conversations' is empty"):
        source[1]
    with pytest.raises(RowError, match=r"rows\.json:row 2: the row is a list"):
        source[2]
    with pytest.raises(IndexError):
        source[4]


def test_lines_are_named_by_number(tmp_path: Path) -> None:
    text = f"\ufeff{json.dumps(GOOD)}\n\n  \n{{broken\n{json.dumps({'id': 5})}\n{json.dumps(GOOD)}"
    (tmp_path / "rows.jsonl").write_text(text, encoding="utf-8")
    source = LLaVASource(tmp_path / "rows.jsonl")
    assert len(source) == 4
    assert source[0].messages == source[3].messages
    with pytest.raises(RowError, match=r"rows\.jsonl:4: the row is not valid JSON"):
        source[1]
    with pytest.raises(RowError, match=r"rows\.jsonl:5 \(id 5\): the row has no 'conversations'"):
        source[2]


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 64])
def test_offsets_do_not_depend_on_the_window(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    rows: list[Any] = [
        {"t": 'é"[]{},\\'},
        {},
        {"n": [1, {"x": "\U0001f600"}]},
        12,
        "a,b",
        None,
        {"z": "\n"},
        345,
    ]
    path = tmp_path / "rows.json"
    for text in (
        json.dumps(rows),
        json.dumps(rows, ensure_ascii=False, indent=2),
        "\ufeff" + json.dumps(rows),
    ):
        path.write_text(text, encoding="utf-8")
        monkeypatch.setattr("vlmamba.data.index._CHUNK", chunk)
        file = RowFile(path)
        assert [file[i] for i in range(len(file))] == rows


def test_sources_survive_pickling_and_report_changes(write: WriteRows) -> None:
    source = write([GOOD, GOOD])
    assert source[1].where.endswith("rows.json:row 1")
    copy = pickle.loads(pickle.dumps(source))
    assert copy[1] == source[1]
    before = source.fingerprint
    assert write([GOOD, GOOD, GOOD]).fingerprint != before


def test_a_file_changed_in_use(write: WriteRows) -> None:
    source = write([GOOD, GOOD])
    source.rows.path.write_text("[" + " " * 500 + "]")
    with pytest.raises(RowError, match="The file has changed since it was indexed"):
        source[1]


def test_images_without_a_root(write: WriteRows) -> None:
    source = write([{"id": 1, "image": "a.png", "conversations": chat("<image>q", "a")}], image_root=None)
    with pytest.raises(RowError, match=r"names the image 'a.png' but the source has no image_root"):
        source[0]


def test_path_traversal_is_a_row_error(write: WriteRows) -> None:
    source = write([{"id": 1, "image": "../rows.json", "conversations": chat("<image>q", "a")}])
    with pytest.raises(
        RowError, match=r"row 0 \(id 1\): image path '../rows.json' leaves its root"
    ) as caught:
        source[0]
    assert caught.value.kind == "image"


def test_protocol_and_registry(write: WriteRows, root: Path) -> None:
    source = write([GOOD])
    assert isinstance(source, Source)
    built = build_source("llava", annotations=source.rows.path, image_root=root)
    assert built[0] == source[0]
    with pytest.raises(ConfigError, match=r"unknown data source 'lava'. Did you mean 'llava'"):
        build_source("lava")
    assert isinstance(pickle.loads(pickle.dumps(RowError("r", "w", 3, "image"))), RowError)


# ---- names of pictures ----
@pytest.mark.parametrize(
    "name", ["../x.png", "a/../../x.png", "..\\x.png", "a\\..\\..\\x.png", "/x.png", "..", ".", "/"]
)
def test_paths_outside_the_root_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "x.png").touch()
    with pytest.raises(ImageError, match=r"leaves its root: it means .* which is outside"):
        resolve_image_path(tmp_path / "root", name)


@pytest.mark.parametrize("name", ["a\0.png", "", "  "])
def test_names_that_are_no_paths(tmp_path: Path, name: str) -> None:
    with pytest.raises(ImageError, match="is not a path"):
        resolve_image_path(tmp_path, name)


def test_a_sibling_folder_with_the_same_beginning_is_outside(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="leaves its root"):
        resolve_image_path(tmp_path / "root", "../root2/x.png")


def test_paths_inside_the_root(tmp_path: Path) -> None:
    for name in ("a/b.png", "a\\b.png", "./a/b.png", "a/c/../b.png", f"{tmp_path}/a/b.png"):
        assert resolve_image_path(tmp_path, name) == tmp_path / "a" / "b.png"


def test_links_are_followed_unless_forbidden(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "root").mkdir()
    (tmp_path / "disk" / "x.png").touch()
    (tmp_path / "root" / "coco").symlink_to(tmp_path / "disk")
    assert resolve_image_path(tmp_path / "root", "coco/x.png").is_file()
    with pytest.raises(ImageError, match=r"leaves its root through a link: it means .*disk/x.png"):
        resolve_image_path(tmp_path / "root", "coco/x.png", allow_symlinks=False)


def test_download_hints() -> None:
    assert "train_val_images.zip" in (download_hint("data/textvqa/train_images") or "")
    assert (download_hint("x/vg/VG_100K_2/1.jpg") or "").endswith("images2.zip")
    assert download_hint("somewhere/else") is None
