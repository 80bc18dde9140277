"""Tar shards by row and from beginning to end."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.data.conftest import FakeProcessor, chat
from vlmamba.common.images import open_image
from vlmamba.data import (
    PlanSettings,
    RowError,
    Sample,
    VLDataset,
    build_loader,
    build_source,
    compute_lengths,
)
from vlmamba.data import shards as shards_module
from vlmamba.data.shards import ShardSource, ShardStream, shard_names
from vlmamba.errors import DataError, MissingFileError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VLMAMBA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), (value, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def write_shard(path: Path, members: dict[str, bytes], mode: str = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def members(first: int, count: int) -> dict[str, bytes]:
    """Rows of LLaVA's format, every third without a picture, and a caption at the end."""
    found: dict[str, bytes] = {}
    for i in range(first, first + count):
        row = {"conversations": chat("<image>\nq" if i % 3 else "q", "a" * (i + 1))}
        if i % 3:
            found[f"{i:06d}.png"] = png(i)
        found[f"{i:06d}.json"] = json.dumps(row).encode()
    found["caption.png"] = png(99)
    found["caption.txt"] = b"a picture\n"
    found["caption.json"] = b'{"width": 8}'
    found["readme.md"] = b"not a sample"
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two shards of 5 and 4 rows."""
    write_shard(tmp_path / "shards" / "part-000.tar", members(0, 4))
    write_shard(tmp_path / "shards" / "part-001.tar", members(4, 3))
    return tmp_path / "shards"


def red(sample: Sample) -> int:
    pixel = open_image(sample.images[0]).getpixel((0, 0))
    assert isinstance(pixel, tuple)
    return int(pixel[0])


def test_rows_by_number(folder: Path) -> None:
    source = build_source("webdataset", annotations=str(folder))
    assert len(source) == 9
    assert [source[i].id for i in range(9)] == [
        *(f"{i:06d}" for i in range(4)),
        "caption",
        *(f"{i:06d}" for i in range(4, 7)),
        "caption",
    ]
    assert source[5].where == f"{folder}/part-001.tar:000004"
    assert red(source[5]) == 4
    assert source[0].images == ()
    assert source[4].messages[0]["content"] == [{"type": "image"}]
    assert source[4].messages[1]["content"] == [{"type": "text", "text": "a picture"}]
    with pytest.raises(IndexError):
        source[9]
    assert red(pickle.loads(pickle.dumps(source))[8]) == 99


def test_a_stream_reads_what_rows_read(folder: Path) -> None:
    source, stream = ShardSource(folder), ShardStream(folder)
    streamed = [sample for shard in range(stream.num_shards) for sample in stream.read(shard)]
    assert [s.messages for s in streamed if isinstance(s, Sample)] == [source[i].messages for i in range(9)]
    assert [red(s) for s in streamed if isinstance(s, Sample) and s.images] == [1, 2, 99, 4, 5, 99]
    assert [s.id for s in stream.read(1, 2) if isinstance(s, Sample)] == ["000006", "caption"]


def test_members_are_found_once(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = ShardSource(folder)
    assert len(list(cache.glob("shard-*.npy"))) == 2
    monkeypatch.setattr(shards_module.tarfile, "open", lambda *a, **k: pytest.fail("read again"))
    again = ShardSource(folder)
    assert again[5] == first[5] or again[5].messages == first[5].messages
    assert again.fingerprint == first.fingerprint


def test_compressed_shards_can_be_streamed_only(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "x.tar.gz", members(0, 2), "w:gz")
    assert len(list(ShardStream(path).read(0))) == 3
    with pytest.raises(DataError, match=r"not a plain tar file; compressed shards can only be streamed"):
        ShardSource(path)


@pytest.mark.parametrize("keep", [700, 3000])
def test_a_shard_cut_off(tmp_path: Path, keep: int) -> None:
    path = write_shard(tmp_path / "x.tar", members(0, 4))
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match=r"the shard .*x\.tar (cannot be read|is cut off)"):
        ShardSource(path)
    with pytest.raises(DataError, match=r"the shard .*x\.tar cannot be read"):
        list(ShardStream(path).read(0))


def test_bad_rows_have_their_place(tmp_path: Path) -> None:
    content = {"a.json": b"{", "b.json": b'{"text": "no turns"}', "c.json": b"[1]"}
    path = write_shard(tmp_path / "x.tar", content)
    source, stream = ShardSource(path), list(ShardStream(path).read(0))
    for row, message in enumerate(
        (
            r"x\.tar:a \(id 'a'\): its json is not valid",
            r"x\.tar:b \(id 'b'\): the row has no 'conv",
            "is a list",
        )
    ):
        with pytest.raises(RowError, match=message) as caught:
            source[row]
        assert str(stream[row]) == str(caught.value)


def test_patterns(folder: Path) -> None:
    both = [str(folder / "part-000.tar"), str(folder / "part-001.tar")]
    assert shard_names(folder) == shard_names(f"{folder}/*.tar") == shard_names(both) == both
    assert shard_names(f"{folder}/part-{{000..001}}.tar") == both
    assert shard_names("https://host/{08..10}.tar") == [f"https://host/{n}.tar" for n in ("08", "09", "10")]
    with pytest.raises(MissingFileError, match=r"the shard .*part-002\.tar does not exist"):
        ShardSource(f"{folder}/part-{{000..002}}.tar")
    with pytest.raises(MissingFileError, match=r"the shards .*none.* does not exist"):
        ShardStream(str(folder / "none*.tar"))


def test_shards_pack_and_resume_like_files(folder: Path, processor: FakeProcessor) -> None:
    data = VLDataset(ShardSource(folder), processor, max_length=64)
    settings = PlanSettings(step_samples=4, pack_tokens=64)
    table = compute_lengths(data, progress=False)
    whole: list[Any] = list(build_loader(data, settings, lengths=table, num_workers=1))
    loader = build_loader(data, settings, lengths=table)
    first = next(iter(loader))
    resumed = build_loader(data, settings, lengths=table)
    resumed.load_state_dict(loader.state_dict())
    ids = [[b["ids"] for b in step.micro_batches] for step in (first, *resumed)]
    assert ids == [[b["ids"] for b in step.micro_batches] for step in whole]
