"""Small data sets on disk in LLaVA's layout."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def write_images(root: Path, count: int, *, size: int = 20, seed: int = 0) -> list[str]:
    """Write `count` coloured PNG files under `root` and return their names."""
    rng = np.random.default_rng(seed)
    root.mkdir(parents=True, exist_ok=True)
    names = [f"{index:04d}.png" for index in range(count)]
    for name in names:
        pixels = np.full((size, size, 3), rng.integers(0, 256, 3), dtype=np.uint8)
        pixels[: size // 2, : size // 2] = rng.integers(0, 256, 3)
        Image.fromarray(pixels).save(root / name)
    return names


def write_llava_json(path: Path, images: Sequence[str], *, text_only: int = 0) -> list[dict[str, Any]]:
    """Write one two-turn row for each image and `text_only` rows without one; return the rows."""
    words = ["red square", "blue field", "green circle", "yellow line", "three black dots"]
    rows: list[dict[str, Any]] = [
        {
            "id": f"row-{index}",
            "image": name,
            "conversations": [
                {"from": "human", "value": "<image>\nWhat is in the image?"},
                {"from": "gpt", "value": f"a {words[index % len(words)]}"},
                {"from": "human", "value": "How many digits are there?"},
                {"from": "gpt", "value": str(index % 4)},
            ],
        }
        for index, name in enumerate(images)
    ]
    rows += [
        {
            "id": index,
            "conversations": [
                {"from": "human", "value": "Where is the seven?"},
                {"from": "gpt", "value": "Top left."},
            ],
        }
        for index in range(text_only)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows), encoding="utf-8")
    return rows
