"""How fast a trained model answers: prefill and decoding of one question about one image, and the memory that takes.

Shapes: one row, T visual tokens and a short question.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from vlmamba.common.load import load_model
from vlmamba.evaluation.switches import apply_switches
from vlmamba.training.metrics import peak_memory_gib

QUESTION = "What is in the image?"
NEW_TOKENS = 64
ROUNDS = 7


def measure_speed(
    checkpoint: str | Path,
    switches: Mapping[str, Any] | None = None,
    *,
    rounds: int = ROUNDS,
    device: str = "auto",
) -> dict[str, Any]:
    """Time a model on a random picture.

    Args:
        checkpoint: A run or an exported model.
        switches: Changes of its connector.
        rounds: Repetitions of each measurement, after one that does not count.
        device: Where to compute.

    Returns:
        ``connector_ms`` (encoder and connector on one picture), ``prefill_ms`` (the whole prompt) and
        ``decode_tokens_per_s``: medians; ``memory_gib``: the most that was held; ``prompt_tokens``, ``image_tokens``,
        ``parameters`` by part, ``threads`` and ``device``.
    """
    model, processor = load_model(checkpoint, device=device)
    apply_switches(model, processor, switches or {})
    size = model.vision_tower.image_size
    noise = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    message = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}]
    prompt = processor.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
    inputs = processor(text=[prompt], images=[Image.fromarray(noise)], return_tensors="pt").to(model.device)
    pixels = inputs["pixel_values"].to(model.dtype)
    with torch.inference_mode():
        connector = _median(lambda: model.get_image_features(pixels), rounds, model.device)
        prefill = _median(lambda: model(**inputs, logits_to_keep=1), rounds, model.device)
        decode = _decode_seconds(model, inputs, rounds)
    return {
        "connector_ms": round(1e3 * connector, 4),
        "prefill_ms": round(1e3 * prefill, 4),
        "decode_tokens_per_s": round(NEW_TOKENS / decode, 3),
        "memory_gib": round(peak_memory_gib(model.device), 4),
        "prompt_tokens": int(inputs["input_ids"].shape[1]),
        "image_tokens": processor.num_image_tokens,
        "parameters": {
            part: sum(p.numel() for p in getattr(model, part).parameters())
            for part in ("vision_tower", "multi_modal_projector", "language_model")
        },
        "threads": torch.get_num_threads(),
        "device": str(model.device)
        if model.device.type == "cpu"
        else torch.cuda.get_device_name(model.device),
    }


def _decode_seconds(model: Any, inputs: Mapping[str, torch.Tensor], rounds: int) -> float:
    """Seconds of `NEW_TOKENS` decoding steps: a long answer less a short one, so that the prompt does not count."""

    def answer(count: int) -> None:
        model.generate(
            **inputs,
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )

    pairs = []
    for _ in range(rounds + 1):
        short = _seconds(lambda: answer(1), model.device)
        pairs.append(_seconds(lambda: answer(1 + NEW_TOKENS), model.device) - short)
    return statistics.median(pairs[1:])


def _median(function: Callable[[], Any], rounds: int, device: torch.device) -> float:
    return statistics.median([_seconds(function, device) for _ in range(rounds + 1)][1:])


def _seconds(function: Callable[[], Any], device: torch.device) -> float:
    started = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started
