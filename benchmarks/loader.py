"""Loading pictures: the loader of training beside a bare Pillow loop, in images a second of one core.

    python benchmarks/loader.py                  # 200 pictures of 640 x 480, to 384 x 384
    python benchmarks/loader.py --rounds 9 --workers 2

The bare loop opens, converts to RGB, resizes (bicubic) and makes the normalised float tensor that an encoder takes; the
loader does the same for LLaVA rows, and also reads the row, tokenises it, makes labels and collates; its pictures are
also timed alone. They take turns
in one process; reported is the median ratio. With --workers the loader is also timed with processes of its own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from vlmamba.data import Loader, PlanSettings, VLDataset, build_loader, build_source
from vlmamba.models import VLMambaImageProcessor, VLMambaProcessor
from vlmamba.models.chat import load_template
from vlmamba.testing import tiny_tokenizer

SIZE = 384
MEAN = STD = 0.5


def write_task(folder: Path, count: int) -> list[Path]:
    """Pictures of photographic size and detail (JPEG, about 100 kB), and a row each."""
    generator = np.random.default_rng(0)
    paths, rows = [], []
    for number in range(count):
        coarse = generator.integers(0, 256, (30, 40, 3), dtype=np.uint8)
        picture = Image.fromarray(coarse).resize((640, 480), Image.Resampling.BICUBIC)
        noise = generator.integers(-25, 25, (480, 640, 3))
        pixels = np.clip(np.asarray(picture).astype(np.int64) + noise, 0, 255).astype(np.uint8)
        path = folder / f"{number:05}.jpg"
        Image.fromarray(pixels).save(path, quality=85)
        paths.append(path)
        turns = [
            {"from": "human", "value": "<image>\nWhat is it?"},
            {"from": "gpt", "value": "A red square. " * 8},
        ]
        rows.append({"id": number, "image": path.name, "conversations": turns})
    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    return paths


def bare(paths: list[Path]) -> None:
    """Open, convert, resize, to a normalised tensor."""
    for path in paths:
        with Image.open(path) as image:
            small = image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.asarray(small).transpose(2, 0, 1).copy()).float().div_(255)
        pixels.sub_(MEAN).div_(STD)


def make_loader(folder: Path, workers: int) -> Loader:
    """The loader of training over the rows, 16 in a micro-batch."""
    processor = VLMambaProcessor(
        VLMambaImageProcessor(size=SIZE, mode="resize", mean=[MEAN] * 3, std=[STD] * 3, resample="bicubic"),
        tiny_tokenizer(),
        chat_template=load_template("vicuna_v1"),
        num_image_tokens=729,
    )
    source = build_source("llava", annotations=folder / "rows.json", image_root=folder)
    dataset = VLDataset(source, processor)
    return build_loader(dataset, PlanSettings(step_samples=16, micro_samples=16), num_workers=workers)


def seconds(call: Callable[[], object]) -> float:
    """Wall time of a call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def pictures(loader: Loader) -> None:
    """What the loader does with pictures, without text and collation."""
    for row in range(loader.num_rows):
        sample = loader.dataset.sample(row)
        loader.dataset.load_images(sample, sample.images, [])


def drain(loader: Loader) -> None:
    """One epoch."""
    for _ in loader:
        pass


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--workers", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = write_task(folder, arguments.images)
        loader = make_loader(folder, 0)
        contenders: dict[str, Callable[[], object]] = {
            "bare Pillow loop": lambda: bare(paths),
            "loader, pictures alone": lambda: pictures(loader),
            "loader": lambda: drain(loader),
        }
        if arguments.workers:
            many = make_loader(folder, arguments.workers)
            contenders[f"loader, {arguments.workers} workers"] = lambda: drain(many)
        times: dict[str, list[float]] = {key: [] for key in contenders}
        for call in contenders.values():
            call()  # caches of the disk, workers
        for _ in range(arguments.rounds):
            for key, call in contenders.items():
                times[key].append(seconds(call))
    reference = times["bare Pillow loop"]
    for key, values in times.items():
        ratio = statistics.median(a / b for a, b in zip(reference, values, strict=True))
        rate = arguments.images / statistics.median(values)
        print(f"{key:22} {rate:8.1f} images/s   {ratio:6.1%} of the bare loop")


if __name__ == "__main__":
    main()
