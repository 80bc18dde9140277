"""LRV-Instruction becomes LLaVA's rows whose pictures are found, charts included."""

import json

import pytest

from vlmamba.cli import main
from vlmamba.data import build_source, check
from vlmamba.data.lrv import CHARTS, PHOTOS, convert_lrv
from vlmamba.errors import DataError, MissingFileError
from vlmamba.testing import write_images
from vlmamba.training import published


def publish(root):
    folder = root / "lrv"
    folder.mkdir()
    for name in write_images(folder / "lrv-vg", 2):
        (folder / "lrv-vg" / name).rename(folder / "lrv-vg" / f"{name[0]}.jpg")
    ids = sorted(p.stem for p in (folder / "lrv-vg").iterdir())
    chart = write_images(folder / "lrv-chart" / "a", 1)[0]
    for name, image in ((PHOTOS[0], ids[0]), (PHOTOS[1], ids[-1]), (CHARTS, f"a/{chart}")):
        entry = {"image_id": image, "question": " Is it? ", "answer": "No.\n"}
        (folder / name).write_text(json.dumps([entry]))
    return folder


def test_every_picture_is_found_from_the_recipes_root(tmp_path, capsys):
    folder, output = publish(tmp_path), tmp_path / "out.json"
    assert main(["data", "convert", "lrv", str(folder), str(output)]) == 0
    assert f"3 rows are in {output}; images: {tmp_path}" in capsys.readouterr().out
    report = check([build_source("llava", annotations=output, image_root=tmp_path)])
    assert report.ok and report.rows == 3 and report.images == 3
    rows = json.loads(output.read_text())
    assert rows[2]["image"].startswith("lrv/lrv-chart/a/")
    assert [turn["value"] for turn in rows[0]["conversations"]] == ["<image>\nIs it?", "No."]
    source = published.LRV_INSTRUCT
    assert source.image_root == "playground/data"  # above the folder lrv, which the paths begin with


def test_what_is_missing_or_of_another_kind_is_named(tmp_path):
    folder = publish(tmp_path)
    (folder / PHOTOS[1]).write_text('[{"image_id": 1, "question": "Q", "answer": "A"}, {"image_id": 2}]')
    with pytest.raises(DataError, match=rf"{PHOTOS[1]}, entry 1: expected image_id"):
        convert_lrv(folder, tmp_path / "out.json")
    (folder / CHARTS).unlink()
    with pytest.raises(MissingFileError, match=f"lacks {CHARTS}. Get the three annotation files"):
        convert_lrv(folder, tmp_path / "out.json")
    assert not (tmp_path / "out.json").exists()
