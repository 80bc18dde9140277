"""A processor of characters, small pictures, small annotation files."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vlmamba.data import LLaVASource, VLDataset

PAD = EOS = 0
IMAGE = 1


@dataclass
class FakeEncoded:
    input_ids: list[int]
    labels: list[int]
    num_images: int


class FakeProcessor:
    """A character is a token, an image `num_image_tokens`; the end token (= padding) follows an answer."""

    pad_token_id = PAD
    image_token_id = IMAGE

    def __init__(self, num_image_tokens: int = 4) -> None:
        self.num_image_tokens = num_image_tokens

    def image_processor(self, images: list[Image.Image]) -> dict[str, np.ndarray]:
        small = [np.asarray(image.resize((4, 4)), dtype=np.float32).transpose(2, 0, 1) for image in images]
        return {"pixel_values": np.stack(small)}

    def encode_messages(
        self, messages: list[dict[str, Any]], *, add_generation_prompt: bool = False
    ) -> FakeEncoded:
        ids: list[int] = []
        labels: list[int] = []
        images = 0
        for message in messages:
            for part in message["content"]:
                if part["type"] == "image":
                    images += 1
                    ids += [IMAGE] * self.num_image_tokens
                    labels += [-100] * self.num_image_tokens
                else:
                    text = [ord(c) + 10 for c in part["text"]]
                    ids += text
                    labels += text if message["role"] == "assistant" else [-100] * len(text)
            if message["role"] == "assistant":
                ids.append(EOS)
                labels.append(EOS)
        return FakeEncoded(ids, labels, images)


def text_of(ids: Any) -> str:
    """The characters of ids; '#' for an image token, '$' for the end."""
    return "".join({IMAGE: "#", EOS: "$"}.get(int(i), chr(max(int(i) - 10, 0))) for i in ids)


def chat(*turns: str) -> list[dict[str, str]]:
    """Turns in LLaVA's spelling, human first."""
    return [{"from": ("human", "gpt")[i % 2], "value": turn} for i, turn in enumerate(turns)]


@pytest.fixture
def processor() -> FakeProcessor:
    return FakeProcessor()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """An image root with a.png, b.png, c.png."""
    folder = tmp_path / "images"
    folder.mkdir()
    for value, name in enumerate(("a.png", "b.png", "c.png")):
        picture = Image.new("RGB", (8, 6), (40 * value, 10, 200))
        picture.paste((40 * value, 10, 90), (0, 0, 4, 6))
        picture.save(folder / name)
    return folder


WriteRows = Callable[..., LLaVASource]


@pytest.fixture
def write(tmp_path: Path, root: Path) -> WriteRows:
    """Write rows to a file and open it as a source."""

    def write(rows: Any, name: str = "rows.json", **options: Any) -> LLaVASource:
        path = tmp_path / name
        lines = name.endswith(".jsonl")
        text = "".join(json.dumps(row) + "\n" for row in rows) if lines else json.dumps(rows)
        path.write_text(text, encoding="utf-8")
        return LLaVASource(path, options.pop("image_root", root), **options)

    return write


def many_rows(count: int, *, images: tuple[str, ...] = ("a.png", "b.png", "c.png")) -> list[dict[str, Any]]:
    """Rows of different lengths, two of three with an image."""
    rows = []
    for i in range(count):
        row: dict[str, Any] = {"id": f"r{i}", "conversations": chat("how?", "y" * (3 + 7 * i % 31))}
        if i % 3:
            row["image"] = images[i % len(images)]
            row["conversations"][0]["value"] = "<image>\nwhat?"
        rows.append(row)
    return rows


@pytest.fixture
def dataset(write: WriteRows, processor: FakeProcessor) -> VLDataset:
    """Thirty good rows."""
    return VLDataset(write(many_rows(30)), processor, max_length=64)
