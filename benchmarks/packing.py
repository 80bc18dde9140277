"""Packed rows beside padded ones: padding, waiting of ranks, and time of a training step.

    python benchmarks/packing.py plan                 # paddings on a mix like LLaVA-1.5's, 1, 8 and 64 ranks
    python benchmarks/packing.py step                 # time of a step, the playground's model, its data and that mix

The mix: the parts of LLaVA-1.5's stage 2 with their numbers of samples (Liu et al., "Improved Baselines with Visual
Instruction Tuning", arXiv 2310.03744, table 7, with A-OKVQA and RefCOCO as its author corrected them in
github.com/haotian-liu/LLaVA/issues/702), the 40K of ShareGPT without a picture. The paper gives no lengths; text
lengths here are lognormal with medians set after what such rows hold (answers of a phrase, several questions about one
picture joined, ShareGPT's long chats), cut at 2,048 with 576 tokens a picture.

In `step` the contenders take turns, so a busy machine slows all of them; reported are medians of time per real token.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vlmamba.config import load_recipe
from vlmamba.data import PACK_MULTIPLE, EpochPlan, PlanSettings, collate, plan_epoch
from vlmamba.data.sampler import row_of
from vlmamba.data.stats import layouts
from vlmamba.training.data import build_data, open_sources
from vlmamba.training.loop import inputs_of
from vlmamba.training.run import prepare_model

MIX = (  # name, thousands of samples, median and sigma of text tokens, has a picture
    ("LLaVA", 158, 230, 0.5, True),
    ("ShareGPT", 40, 1100, 0.8, False),
    ("VQAv2", 83, 90, 0.4, True),
    ("GQA", 72, 150, 0.5, True),
    ("OKVQA", 9, 40, 0.4, True),
    ("OCRVQA", 80, 130, 0.3, True),
    ("A-OKVQA", 66, 80, 0.3, True),
    ("TextCaps", 22, 45, 0.3, True),
    ("RefCOCO", 48, 220, 0.5, True),
    ("VG", 86, 260, 0.4, True),
)
IMAGE_TOKENS = 576
MAX_LENGTH = 2048


def llava_like(rows: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Lengths and numbers of images of so many rows of the mix."""
    generator = np.random.default_rng(seed)
    shares = np.array([part[1] for part in MIX], dtype=float)
    part = generator.choice(len(MIX), rows, p=shares / shares.sum())
    median, sigma = (np.array([entry[column] for entry in MIX], dtype=float)[part] for column in (2, 3))
    images = np.array([entry[4] for entry in MIX], dtype=np.int64)[part]
    text = np.maximum(generator.lognormal(np.log(median), sigma), 8)
    return np.minimum(text + IMAGE_TOKENS * images, MAX_LENGTH).astype(np.int64), images


def show_plans() -> None:
    """Paddings on the mix: stage 2's global batch of 128, 16 samples a padded micro-batch."""
    lengths, images = llava_like(66_500)
    print(f"{len(lengths):,} rows, mean {lengths.mean():.0f} tokens, {images.mean():.1%} with a picture")
    for ranks in (1, 8, 64):
        found = layouts(
            lengths, images, step_samples=128, micro_samples=16, pack_lengths=[2048, 4096, 8192], ranks=ranks
        )
        print(
            f"{ranks} rank{'s' * (ranks > 1)}: padding, idle (padding and waiting), idle of the encoder, micro-steps, "
            "positions each"
        )
        for layout in found:
            print(
                f"  {layout.name:<54} {layout.padding:7.2%} {layout.idle:7.2%} {layout.image_idle:7.2%} "
                f"{layout.micro_steps:6.1f} {layout.positions:8,.0f}"
            )


CONTENDERS: dict[str, dict[str, Any]] = {
    "padded, random order": {"data.order": "random"},
    "padded, grouped by length": {"data.order": "length"},
    "packed to 2,048": {"data.order": "random", "data.pack_length": 2048},
    "packed to 8,192": {"data.order": "random", "data.pack_length": 8192},
}


def learn(model: Any, batches: list[dict[str, Any]], supervised: int) -> None:
    """Forward and backward of a step."""
    for batch in batches:
        model(**inputs_of(batch, torch.device("cpu")), num_items=supervised).loss.backward()
    model.zero_grad()


def playground_steps(
    config: Any, processor: Any, folder: Path
) -> Iterator[tuple[list[dict[str, Any]], int, int, int]]:
    """Micro-batches, supervised and real tokens, and padding of each step of the playground."""
    from vlmamba.training.parallel import make_parallel

    loader = build_data(
        config, open_sources(config), processor, make_parallel("single", "cpu"), run_dir=folder
    )
    steps = iter(loader)
    next(steps)  # the worst one is put first
    for step in steps:
        yield step.micro_batches, step.num_supervised, step.num_tokens, step.num_padding


def mix_steps(name: str, processor: Any) -> Iterator[tuple[list[dict[str, Any]], int, int, int]]:
    """The same of the mix, 32 rows a step; pictures take the mini encoder's tokens, text the rest of the length."""
    lengths, images = llava_like(4000, seed=1)
    common: dict[str, Any] = {"step_samples": 32}
    settings = {
        "padded, random order": PlanSettings(micro_samples=8, **common),
        "padded, grouped by length": PlanSettings(micro_samples=8, grouping="length", **common),
        "packed to 2,048": PlanSettings(pack_tokens=2048, pad_to_multiple_of=PACK_MULTIPLE, **common),
        "packed to 8,192": PlanSettings(pack_tokens=8192, pad_to_multiple_of=PACK_MULTIPLE, **common),
    }[name]
    plan: EpochPlan = plan_epoch(np.arange(len(lengths)), settings, 0, lengths=lengths, num_images=images)
    size = processor.image_processor.size
    for step in range(1, len(plan)):
        batches = [
            collate(
                [
                    _item(int(lengths[row_of(row)]), int(images[row_of(row)]), size, processor)
                    for row in micro
                ],
                processor.pad_token_id,
                pad_to_multiple_of=settings.pad_to_multiple_of,
                packed=settings.pack_tokens is not None,
            )
            for micro in plan.micro_batches(step)
        ]
        yield (
            batches,
            sum(batch["num_supervised"] for batch in batches),
            sum(batch["num_tokens"] for batch in batches),
            sum(batch["num_padding"] for batch in batches),
        )


def _item(length: int, images: int, size: Any, processor: Any) -> dict[str, Any]:
    side = size if isinstance(size, int) else next(iter(size.values()))
    ids = torch.full((length,), 11)
    ids[: images * processor.num_image_tokens] = processor.image_token_id
    labels = torch.where(torch.arange(length) > length * 3 // 4, ids, -100)
    pixels = torch.zeros(images, 3, side, side) if images else None
    return {"input_ids": ids, "labels": labels, "pixel_values": pixels, "id": 0}


def show_steps(rounds: int) -> None:
    """Time per real token, contenders in turns."""
    recipe = load_recipe("train/playground.py:finetune", ["--device", "cpu", "--init_from", "none"])
    model, processor = prepare_model(recipe.config, torch.device("cpu"))
    model.train()
    with tempfile.TemporaryDirectory() as name:
        for data in ("the playground, 16 rows a step", "the mix, 32 rows a step"):
            sources = {}
            for key, changes in CONTENDERS.items():
                words = [word for k, v in changes.items() for word in (f"--{k}", str(v))]
                config = load_recipe("train/playground.py:finetune", [*words, "--device", "cpu"]).config
                playground = data.startswith("the playground")
                sources[key] = (
                    playground_steps(config, processor, Path(name))
                    if playground
                    else mix_steps(key, processor)
                )
            _race(data, model, sources, rounds)


def _race(data: str, model: Any, sources: dict[str, Any], rounds: int) -> None:
    times: dict[str, list[float]] = {key: [] for key in sources}
    padding = {key: [0, 0] for key in sources}
    for number in range(rounds + 1):
        for key, steps in sources.items():
            batches, supervised, tokens, padded = next(steps)
            start = time.perf_counter()
            learn(model, batches, supervised)
            if number:
                times[key].append((time.perf_counter() - start) / tokens)
            padding[key][0] += tokens
            padding[key][1] += padded
    print(f"{data}: forward and backward, {rounds} steps each in turns")
    reference = statistics.median(times["padded, random order"])
    for key, values in times.items():
        median = statistics.median(values)
        tokens, padded = padding[key]
        print(
            f"  {key:28} {1e6 * median:8.1f} us a real token   {median / reference:5.2f} of the first   "
            f"padding {padded / (tokens + padded):6.2%}"
        )


def main() -> None:
    """Run one of the two."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=("plan", "step"))
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    if arguments.what == "plan":
        show_plans()
    else:
        torch.set_num_threads(1)
        show_steps(arguments.rounds)


if __name__ == "__main__":
    main()
