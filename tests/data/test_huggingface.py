"""Hugging Face datasets by row and from beginning to end."""

from __future__ import annotations

import io
import pickle
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
from vlmamba.data.checks import check
from vlmamba.data.huggingface import HuggingFaceSource, HuggingFaceStream
from vlmamba.errors import DataError, MissingFileError

datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def quiet() -> Any:
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def picture(value: int) -> dict[str, Any]:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), (value, 0, 0)).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def llava_rows(count: int = 8) -> list[dict[str, Any]]:
    """LLaVA's columns; every second row without a picture."""
    return [
        {
            "id": f"r{i}",
            "image": picture(i) if i % 2 else None,
            "conversations": chat("<image>\nq" if i % 2 else "q", "a" * (i + 1)),
        }
        for i in range(count)
    ]


def llava_dataset(rows: list[dict[str, Any]] | None = None) -> Any:
    text = datasets.Value("string")
    turns = [{"from": text, "value": text}]
    features = datasets.Features({"id": text, "image": datasets.Image(), "conversations": turns})
    return datasets.Dataset.from_list(rows or llava_rows(), features=features)


def messages_dataset() -> Any:
    """``messages`` with lists of parts, ``images`` with two pictures a row."""
    text = datasets.Value("string")
    parts = [{"type": text, "text": text}]
    rows = [
        {
            "images": [picture(1), picture(2)],
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "image", "text": None}] * 2 + [{"type": "text", "text": "q"}],
                },
                {"role": "assistant", "content": [{"type": "text", "text": "a"}]},
            ],
        },
        {
            "images": [],
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "q"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "b"}]},
            ],
        },
    ]
    features = datasets.Features(
        {"images": datasets.Sequence(datasets.Image()), "messages": [{"role": text, "content": parts}]}
    )
    return datasets.Dataset.from_list(rows, features=features)


def red(sample: Sample, number: int = 0) -> int:
    pixel = open_image(sample.images[number]).getpixel((0, 0))
    assert isinstance(pixel, tuple)
    return int(pixel[0])


def test_llava_columns_by_row() -> None:
    source = HuggingFaceSource(llava_dataset(), name="hf")
    assert len(source) == 8
    assert (source[3].id, source[3].where, red(source[3])) == ("r3", "hf:row 3", 3)
    assert source[2].images == ()
    with pytest.raises(IndexError):
        source[8]
    copy = pickle.loads(pickle.dumps(source))
    assert copy[5].messages == source[5].messages
    assert source.fingerprint != HuggingFaceSource(llava_dataset().select(range(4))).fingerprint


def test_reading_a_row_reads_no_picture() -> None:
    source = HuggingFaceSource(llava_dataset(), name="hf")
    images = source[3].images
    assert type(images[0]).__name__ == "StoredImage"
    assert images[0].name == "image 0 of hf:row 3"  # type: ignore[union-attr]


@pytest.mark.parametrize("streamed", [False, True])
def test_messages_and_images(streamed: bool) -> None:
    if streamed:
        both = list(HuggingFaceStream(messages_dataset().to_iterable_dataset()).read(0))
    else:
        both = list(map(HuggingFaceSource(messages_dataset()).__getitem__, range(2)))
    first, second = both
    assert isinstance(first, Sample)
    assert [part["type"] for part in first.messages[0]["content"]] == ["image", "image", "text"]
    assert (red(first, 0), red(first, 1)) == (1, 2)
    assert isinstance(second, Sample)
    assert second.messages[1]["content"] == [{"type": "text", "text": "b"}]


def test_a_stream_reads_what_rows_read() -> None:
    source = HuggingFaceSource(llava_dataset())
    stream = HuggingFaceStream(llava_dataset().to_iterable_dataset(num_shards=3))
    assert stream.num_shards == 3
    streamed = [sample for shard in range(3) for sample in stream.read(shard)]
    assert [s.messages for s in streamed if isinstance(s, Sample)] == [source[i].messages for i in range(8)]
    later = list(stream.read(1, 1))
    assert [s.id for s in later if isinstance(s, Sample)] == [s.id for s in list(stream.read(1))[1:]]  # type: ignore[union-attr]


def test_saved_to_disk_and_a_folder_of_parquet(tmp_path: Path) -> None:
    llava_dataset().save_to_disk(tmp_path / "saved")
    saved = build_source("hf", annotations=str(tmp_path / "saved"))
    assert saved[1].id == "r1"
    assert saved.name == "saved"
    datasets.DatasetDict({"train": llava_dataset()}).save_to_disk(tmp_path / "splits")
    assert len(HuggingFaceSource(tmp_path / "splits")) == 8
    with pytest.raises(DataError, match=r"has the splits \['train'\], not 'validation'; set split"):
        HuggingFaceSource(tmp_path / "splits", split="validation")


def test_image_paths_need_a_root(tmp_path: Path, root: Path) -> None:
    rows = datasets.Dataset.from_list([{"image": "a.png", "conversations": chat("<image>q", "a")}])
    with pytest.raises(RowError, match=r"names the image 'a\.png' but the source has no image_root; set it"):
        HuggingFaceSource(rows)[0]
    sample = HuggingFaceSource(rows, root)[0]
    assert sample.images == (root / "a.png",)
    outside = datasets.Dataset.from_list([{"image": "/etc/passwd", "conversations": chat("<image>q", "a")}])
    with pytest.raises(RowError, match="leaves its root"):
        HuggingFaceSource(outside, root)[0]


def test_a_dataset_of_another_schema_names_its_columns() -> None:
    other = datasets.Dataset.from_list([{"question": "q", "answer": "a"}])
    with pytest.raises(DataError, match=r"no column 'conversations' or 'messages'.*\['answer', 'question'\]"):
        HuggingFaceSource(other, name="vqa")
    with pytest.raises(DataError, match="the data set dataset has no column"):
        HuggingFaceStream(other.to_iterable_dataset())


def test_a_missing_dataset(tmp_path: Path) -> None:
    with pytest.raises(
        MissingFileError, match=r"cannot be opened .*Get it from my disk\. It is a name on the hub"
    ):
        HuggingFaceSource(tmp_path / "nowhere", hint="my disk")


def test_a_truncated_picture_in_a_table(processor: FakeProcessor) -> None:
    rows = llava_rows(16)
    rows[5]["image"]["bytes"] = rows[5]["image"]["bytes"][:30]
    data = VLDataset(HuggingFaceSource(llava_dataset(rows), name="hf"), processor)
    table = compute_lengths(data, progress=False)
    loader = build_loader(data, PlanSettings(step_samples=4, micro_samples=4), lengths=table)
    assert sum(step.num_samples for step in loader) == 16
    (record,) = loader.bad_samples.records.values()
    assert (record["id"], record["kind"]) == ("r5", "image")
    assert record["reason"].startswith("image 0 of hf:row 5 is c")


@pytest.mark.parametrize("kind", [HuggingFaceSource, HuggingFaceStream])
def test_columns_with_a_meaning_are_not_passed_over(kind: Any) -> None:
    """Videos, losses, two columns of texts or pictures: as in files."""
    text = datasets.Value("string")
    turns = [{"from": text, "value": text, "loss": datasets.Value("bool")}]
    features = {
        "id": text, "image": datasets.Image(), "images": [datasets.Image()], "video": text,
        "conversations": turns, "messages": [{"role": text, "content": text}],
    }  # fmt: skip
    empty = dict.fromkeys(features)
    talk = [{"from": "human", "value": "q", "loss": None}, {"from": "gpt", "value": "a", "loss": None}]
    seen = [{"role": "user", "content": "<image>q"}, {"role": "assistant", "content": "a"}]
    rows = [
        {**empty, "id": "good", "conversations": talk},
        {**empty, "id": "film", "conversations": talk, "video": "v.mp4"},
        {**empty, "id": "quiet", "conversations": [talk[0], {**talk[1], "loss": False}]},
        {**empty, "id": "messages", "messages": seen, "images": [picture(3)], "conversations": None},
        {**empty, "id": "both", "messages": seen, "image": picture(1), "images": [picture(3)]},
    ]
    dataset = datasets.Dataset.from_list(rows, features=datasets.Features(features))
    if kind is HuggingFaceSource:
        source = HuggingFaceSource(dataset)
        found = {p.row: (p.kind, p.reason) for p in check(source).problems}
        assert (found[1][0], found[2][0], found[4][0]) == ("video", "no_label", "shape")
        assert "pictures under both" in found[4][1] and len(found) == 3
        assert len(source[3].images) == 1
        return
    read = list(HuggingFaceStream(dataset.to_iterable_dataset()).read(0))
    assert [r.kind if isinstance(r, RowError) else r.id for r in read] == [
        "good",
        "video",
        "no_label",
        "messages",
        "shape",
    ]
