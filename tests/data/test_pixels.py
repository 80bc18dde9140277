"""Pictures are written once, into the batch they belong to."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vlmamba.data import PlanSettings, VLDataset, build_loader, compute_lengths
from vlmamba.data.pixels import PixelBuffer
from vlmamba.testing import tiny_processor

from .conftest import WriteRows, chat


def rows_with_pictures(root: Path) -> list[dict[str, object]]:
    """Rows of none, one and three pictures, one of them missing."""
    generator = np.random.default_rng(0)
    for name in "defg":
        Image.fromarray(generator.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(root / f"{name}.png")
    names = [["d.png"], [], ["e.png", "f.png", "g.png"], ["gone.png"], ["a.png"], ["g.png"], [], ["b.png"]]
    return [
        {"id": i, "images": files, "conversations": chat("<image>" * len(files) + "which?", "that")}
        for i, files in enumerate(names * 2)
    ]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("packed", [False, True])
def test_batches_hold_the_pictures_of_their_rows(write: WriteRows, root: Path, workers: int, packed: bool):
    data = VLDataset(write(rows_with_pictures(root)), tiny_processor())
    settings = PlanSettings(step_samples=8, micro_samples=8)
    if packed:
        settings = PlanSettings(step_samples=8, pack_tokens=512)
    lengths = compute_lengths(data, progress=False) if packed else None
    loader = build_loader(data, settings, lengths=lengths, num_workers=workers, max_bad_fraction=0.5)
    seen = 0
    for step in loader:
        for batch in step.micro_batches:
            rows = [int(where.rpartition(" ")[2]) for where in batch["wheres"]]
            pixels = [data[row]["pixel_values"] for row in rows]
            expected = torch.cat([p for p in pixels if p is not None])
            assert torch.equal(batch["pixel_values"], expected)
            seen += len(expected)
    assert seen >= 14
    loader.close()


def test_joining_copies_nothing(write: WriteRows, root: Path):
    data = VLDataset(write(rows_with_pictures(root)[:1]), tiny_processor())
    buffer = PixelBuffer(expected=4)
    item = data.item(0, buffer)
    assert item["pixel_values"].data_ptr() == buffer.whole().data_ptr()
    assert buffer.whole().shape == (1, 3, 16, 16)


def test_more_pictures_than_expected():
    processor = tiny_processor().image_processor
    pictures = [Image.new("RGB", (9, 9), (40 * i, 0, 0)) for i in range(6)]
    buffer = PixelBuffer(expected=1)
    for first, last in ((0, 1), (1, 4), (4, 6)):
        buffer.add(processor, pictures[first:last])
    assert torch.equal(buffer.whole(), processor(pictures)["pixel_values"])


def test_other_image_processors_are_asked_for_a_batch():
    assert PixelBuffer(expected=1).add(lambda images: {}, [Image.new("RGB", (9, 9))]) is None
